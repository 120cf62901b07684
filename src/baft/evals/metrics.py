"""Scores of texts. STAND-IN: to be replaced whole by the module of the same name and signatures."""

import math
import re
from collections import Counter
from collections.abc import Sequence


def normalize(text: str) -> str:
    """A text in lower case, without punctuation, single spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())


def exact_match(reply: str, answers: Sequence[str]) -> bool:
    """Whether a reply is one of the answers, both normalized."""
    return normalize(reply) in {normalize(answer) for answer in answers}


def contains(reply: str, answers: Sequence[str]) -> bool:
    """Whether a reply holds one of the answers as whole words, both normalized."""
    return any(f" {normalize(answer)} " in f" {normalize(reply)} " for answer in answers)


def ngram_entropy(text: str) -> float:
    """Entropy in bits of the bigrams and trigrams of a text's words, weighted 2/3 and 4/3, and halved."""
    words = text.split()
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        n_grams = sum(counts.values())
        total -= weight * sum(c / n_grams * math.log2(c / n_grams) for c in counts.values())
    return total / 2
