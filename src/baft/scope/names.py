"""Whether two texts name the same: word by word, as they are spelled.

A host's early states hold "Porsche 910" and "Porsche 924" for much the same, and so does the channel *whom*
that is read off them. Spelling tells them apart. What counts is what each text names that the other does not:
a text that names less, "Hopper" for "Grace Hopper", lacks nothing that it would have to say.

With `v_i` the weight of a word in the channel *whom* and `u_i` in *what*, a word is part of a name by

    n_i = sqrt(v_i) v_i / (v_i + u_i),

for a host that reads from left to right has the last word of a name carry nearly all of `v`. Words that stand
in any text, such as "the", name nothing. Our own construction; `experiments/LOG.md`, 2026-11-26, has where it
comes from and what it is worth.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from baft.hosts.background import background_text

COST = 6.0  # nats for a name that is another's altogether
_LEAST = 0.1  # of the weight of a text's likeliest name, what a word of a name has at least
_COMMON = 10  # ordinary texts that hold a word that names nothing
_LONG = 5  # letters from which a word may be misspelled
_ROMAN = re.compile("[ivxlcdm]+")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
)
_GO_ALONG = ("Mn", "Mc", "Me", "Cf")  # marks, and what has no width
_KANA_MARKS = "\u3099\u309a"  # what makes another letter of one, other than an accent
_CUT_OFF = "\ufffd"  # what a part of a letter is decoded to


@dataclass(frozen=True, slots=True)
class Names:
    """The words of a text, and how much each is part of a name.

    Args:
        words: As `folded` makes them.
        weights: At least zero; those of a text are compared with each other alone.
    """

    words: tuple[str, ...]
    weights: tuple[float, ...]

    def missing_in(self, other: "Names") -> float:
        """The share of what is named here that is not in another text, 0 to 1; 0 where nothing is named.

        A word may be spelled like a word of a name there, or be any word there.
        """
        least = _LEAST * max(other.weights, default=0.0)
        names = [word for word, weight in zip(other.words, other.weights, strict=True) if weight > least]
        missing = sum(
            weight
            for word, weight in zip(self.words, self.weights, strict=True)
            if weight and word not in other.words and not any(is_alike(word, name) for name in names)
        )
        return missing / sum(self.weights) if missing else 0.0

    def only(self, said: str) -> "Names":
        """The same words, of which those of another text are names, one as much as another, and no others.

        Words that stand in any text are none, wherever they stand.
        """
        named = _words_in(said) - _common_words()
        return Names(self.words, tuple(float(word in named) for word in self.words))


def cost_of(edit: Names, prompt: Names, *, both: bool = True) -> float:
    """What it takes from the log-probability that a prompt is about an edit, in nats.

    Args:
        edit: The words of the edit's wording.
        prompt: Those of the prompt.
        both: Whether it is known what the prompt names. Otherwise any word of it may be a name, and it has to
            say all that the edit names.
    """
    if not both:
        words = tuple(float(word not in _common_words()) for word in prompt.words)
        return COST * (edit.missing_in(Names(prompt.words, words)) > 0)
    missing = edit.missing_in(prompt)
    return COST * min(missing, prompt.missing_in(edit)) if missing else 0.0


def read_names(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], weights: Float[Tensor, "channel token"]
) -> Names:
    """The words that tokens spell, and how much each is part of a name.

    Args:
        decode: From tokens to text.
        ids: The tokens.
        weights: What each counts in the channels *whom* and *what*. By one channel alone, nothing is known to
            be a name.
    """
    text = decode(ids)
    spans = list(_words(text))
    words = tuple(folded(text[begin:end]) for begin, end in spans)
    if len(weights) == 1:
        return Names(words, (0.0,) * len(words))
    sums, start = torch.zeros(2, len(words)), 0
    for i, weight in enumerate(weights.T.cpu()):
        read = decode(ids[: i + 1])
        whole = len(read.rstrip(_CUT_OFF))
        end = whole + (len(read) > whole)  # with the letter that a part of is read
        for k, (begin, stop) in enumerate(spans):
            if begin < end and stop > start:
                sums[:, k] += weight
        start = max(start, whole)
    whom, what = sums
    names = torch.nan_to_num(whom.sqrt() * whom / (whom + what))  # a word of no token has no weight at all
    for k, (begin, _) in enumerate(spans):
        if words[k] in _common_words() and (k == 0 or text[begin].islower()):
            names[k] = 0.0
    return Names(words, tuple(names.tolist()))


@lru_cache(1 << 16)
def folded(word: str) -> str:
    """A word without what people leave out, case and accents; never empty, and without spaces."""
    apart = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", word).casefold())
    letters = [one for one in apart if one in _KANA_MARKS or not _is_left_out(one)]
    return unicodedata.normalize("NFC", "".join(letters)) or word


@lru_cache(1 << 16)
def is_alike(word: str, other: str) -> bool:
    """Whether two folded words may be one: the same, or letters alone and cut short, or one letter off.

    So are an initial, and "St" for "Saint"; the number of a king is not.
    """
    if word == other:
        return True
    if not (word.isalpha() and other.isalpha()) or (_ROMAN.fullmatch(word) and _ROMAN.fullmatch(other)):
        return False
    short, long = sorted((word, other), key=len)
    if len(short) == 2:
        return short == long[0] + long[-1]
    return long.startswith(short) or (len(short) >= _LONG and _is_one_off(short, long))


def _is_one_off(short: str, long: str) -> bool:
    """Whether one letter, not the first, is another, or is missing in the shorter word."""
    if len(long) > len(short) + 1 or short[0] != long[0]:
        return False
    same = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    return long[same + 1 :] in (short[same + 1 :], short[same:])


def _words(text: str) -> Iterator[tuple[int, int]]:
    """Where words begin and end; in scripts without spaces every letter is one."""
    begin: int | None = None
    for i, one in enumerate(text):
        if begin is not None and unicodedata.category(one) in _GO_ALONG:
            continue  # goes with the letter before
        is_unspaced = _UNSPACED.match(one) is not None
        if begin is not None and (is_unspaced or not one.isalnum() or _UNSPACED.match(text[begin])):
            yield begin, i
            begin = None
        if begin is None and one.isalnum():
            begin = i
    if begin is not None:
        yield begin, len(text)


def _words_in(text: str) -> set[str]:
    """Its words, folded, each once."""
    return {folded(text[slice(*span)]) for span in _words(text)}


def _is_left_out(letter: str) -> bool:
    """Whether it is an accent, a space, or of no width."""
    return unicodedata.combining(letter) > 0 or letter.isspace() or unicodedata.category(letter) == "Cf"


@cache
def _common_words() -> frozenset[str]:
    """Words, not figures, that stand in many of the project's ordinary texts."""
    text = background_text()
    texts = [*text["sentences"], *text["prompts"]]
    found = Counter(word for one in texts for word in _words_in(one))
    return frozenset(word for word, n in found.items() if n >= _COMMON and word.isalpha())
