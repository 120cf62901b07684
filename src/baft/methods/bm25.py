"""BM25: how well the words of a query match those of a stored text.

Source: Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", section 3.4,
with the weight of Robertson and Sparck Jones 1976 without relevance information, kept positive by adding one
inside the logarithm. The score of a text `d` for a query `q` is, over the words that both hold,

    sum_t idf(t) * tf * (k1 + 1) / (tf + k1 * (1 - b + b * |d| / avgdl)),
    idf(t) = ln(1 + (N - n + 0.5) / (n + 0.5)).

`N`, `n` and `avgdl` are those of a fixed reference collection and not of the texts that are searched: so one
text alone has sensible weights, and adding or taking away texts changes no score of another.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from baft.errors import ConfigError, InputError

# Scripts without spaces between words: each character counts as one.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation."""
    return _WORD.findall(text.casefold())


class Bm25:
    """Word weights from a reference collection.

    Args:
        reference: The collection's texts.
        k1: How slowly a word's repetition stops counting; 0 counts each word once.
        b: How far long texts are weighed down, from 0, not at all, to 1.

    Raises:
        ConfigError: If a number is out of range.
        InputError: If the collection holds no word.
    """

    def __init__(self, reference: Sequence[str], *, k1: float = 1.2, b: float = 0.75):
        if not (math.isfinite(k1) and k1 >= 0 and 0 <= b <= 1):
            raise ConfigError(f"k1 must be at least 0 and b between 0 and 1, got k1={k1} and b={b}")
        texts = [words(text) for text in reference]
        n_words = sum(len(text) for text in texts)
        if not n_words:
            raise InputError("the reference collection holds no words: give some text")
        self.k1, self.b = k1, b
        self.n_texts, self.mean_length = len(texts), n_words / len(texts)
        self._n_with = Counter(word for text in texts for word in set(text))

    def idf(self, word: str) -> float:
        """The weight of a word by how few of the collection's texts hold it, in nats."""
        n = self._n_with[word]
        return math.log1p((self.n_texts - n + 0.5) / (n + 0.5))

    def is_common(self, word: str) -> bool:
        """Whether more than 1.5 % of the collection's texts hold a word."""
        return self._n_with[word] > 0.015 * self.n_texts

    def weights(self, text: str) -> dict[str, float]:
        """What each word of a stored text adds to the score of a query that holds it."""
        found = words(text)
        slow = self.k1 * (1 - self.b + self.b * len(found) / self.mean_length)
        return {word: self.idf(word) * n * (self.k1 + 1) / (n + slow) for word, n in Counter(found).items()}


def shares(weights: Mapping[str, float], subject: Collection[str], subject_weight: float) -> dict[str, float]:
    """Weights as shares of their sum, those of a subject's words together no less than `subject_weight`."""
    total = sum(weights.values())
    of_subject = sum(weight for word, weight in weights.items() if word in subject)
    if not 0 < of_subject < total:
        return {word: weight / total for word, weight in weights.items()}
    together = max(subject_weight, of_subject / total)
    factors = (1 - together) / (total - of_subject), together / of_subject
    return {word: weight * factors[word in subject] for word, weight in weights.items()}


class Index:
    """Stored texts that are searched by the words of a query.

    Args:
        texts: What each word of each text adds to its score.
    """

    def __init__(self, texts: Sequence[Mapping[str, float]]):
        postings: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        for i, weights in enumerate(texts):
            for word, weight in weights.items():
                postings[word].append((i, weight))
        self._n_texts = len(texts)
        self._postings = {
            word: (
                torch.tensor([i for i, _ in there]),
                torch.tensor([w for _, w in there], dtype=torch.float64),
            )
            for word, there in postings.items()
        }

    def scores(self, query: Sequence[str]) -> Float[Tensor, " text"]:
        """The score of each text for the words of a query, each counted once, in the order of the texts."""
        found = torch.zeros(self._n_texts, dtype=torch.float64)
        for word in dict.fromkeys(query):
            if word in self._postings:
                found.index_add_(0, *self._postings[word])
        return found
