"""From which log-probability on an edit acts: thresholds with a stated bound.

Two things must not fire an edit. *Near neighbors*, other subjects of its relation and other relations of its
subject, are kept out by the midpoints of the two channels: no edit fires unless both channels are above
theirs. They are set on relations, names and sentences that the head has not learned from, such that with a
confidence of 95 % at most a given share of each kind passes (an exact binomial tolerance bound) before names
are compared; what then is left of other subjects is counted. *Ordinary text* is kept out by a threshold of an
edit's own, the highest that any of a fixed list of texts reaches: a further text like them exceeds it with a
probability of at most one in their number plus one (split conformal prediction, Vovk et al. 2005). Texts that
the head takes for the edit's own prompt do not count, for somebody may edit what one of the list asks; of an
edit for which any is left out ("The water is", 3 of 380; "The", 102) the bound does not hold. That is two of
CounterFact's 10,000 edits. The threshold depends on the edit's keys and on what is fixed for the host, never
on other edits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from baft.errors import ConfigError
from baft.hosts.background import background_text, fitting
from baft.nn.scope import ScopeHead, ScopeKeys, late_interaction
from baft.scope.names import cost_of
from baft.scope.reading import Reader, padded
from baft.scope.text import Fact, ScopeText

CONFIDENCE: Final = 0.95
_TEXTS = 64  # that are compared at once
_SAME = math.log(0.99)  # an edit's own prompt is above, raw, and nearly always as a chat


@dataclass(frozen=True, slots=True)
class Ordinary:
    """Texts that must fire no edit, as a head sees them.

    Args:
        vectors: Of the tokens of all texts, one after the other, `[channel, token, dim]`.
        lengths: Tokens of each text.
    """

    vectors: Float[Tensor, "channel token dim"]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Where edits begin to act.

    Args:
        other_subject: The share of neighbors of the same relation and another subject that passes, at most,
            before names are compared.
        other_relation: The same for another relation of the subject.
        n_near: On how many neighbors of each kind that rests.
        n_named: Of those with another subject, how many fire the edit once names are compared.
        n_fired: Questions about something else, other subject and other relation, on which any of the
            `n_edits` edits fired when this was tried out. They come in groups that share a subject and are
            about as many facts as the edits, so that no bound rests on their number.
        n_asked: How many such questions there were.
        n_edits: Edits that were in force together.
    """

    other_subject: float
    other_relation: float
    n_near: int
    n_named: int
    n_fired: int
    n_asked: int
    n_edits: int

    @property
    def named_bound(self) -> float:
        """The share of neighbors with another subject that fires an edit, with a confidence of 95 %."""
        return share_bound(self.n_named, self.n_near)


def read_ordinary(reader: Reader, head: ScopeHead) -> Ordinary:
    """Sentences that the head has not learned from, and questions and openings about common things."""
    texts = [*ScopeText("calibrate").sentences, *background_text()["prompts"]]
    words = reader.words(fitting(reader.encoder.prompt, texts))
    lengths = tuple(len(one) for one in words)
    return Ordinary(head.vectors(torch.cat(words).unsqueeze(0))[:, 0], lengths)


def own_thresholds(head: ScopeHead, ordinary: Ordinary, keys: ScopeKeys) -> Float[Tensor, " edit"]:
    """The log-probability above which each edit acts.

    It is at least one half: then no channel is below its midpoint. Ordinary texts of which the head is as
    sure as of the edit's own prompt are about the edit, and do not count.
    """
    best = keys.weights.new_full(keys.weights.shape[1:2], math.log(0.5))
    texts = ordinary.vectors.transpose(0, 1).split(ordinary.lengths)
    for start in range(0, len(texts), _TEXTS):
        vectors, real = padded([one.flatten(1) for one in texts[start : start + _TEXTS]])
        split = vectors.unflatten(-1, (len(ordinary.vectors), -1)).movedim(2, 0)
        scores = late_interaction(keys, split, real, head.discounts)
        found = head.log_probability(scores)
        best = torch.maximum(best, found.masked_fill(found > _SAME, -torch.inf).amax(0))
    return best


def calibrate(
    reader: Reader,
    head: ScopeHead,
    ordinary: Ordinary,
    *,
    other_subject: float,
    other_relation: float,
    n_groups: int,
    seed: int = 0,
) -> Calibration:
    """Sets a head's midpoints, in place, and tries out what fires.

    Args:
        reader: Reads with the host.
        head: The trained head; its parameters need no gradient.
        ordinary: The texts of the edits' own thresholds.
        other_subject: Of neighbors with another subject, at most this share shall pass before names are
            compared.
        other_relation: Of those with another relation, any that can be asked of the subject.
        n_groups: How many of each kind are drawn.
        seed: Of the drawing.

    Raises:
        ConfigError: If so few groups cannot show so small a share.
    """
    text = ScopeText("calibrate", seed)
    groups = [text.group(1) for _ in range(n_groups)]
    facts = [fact for group in groups for fact in group]
    edits = [reader.encoder.prompt(fact.prompt) for fact in facts]
    keys = head.keys(*padded(reader.words(edits)))
    prompts = [reader.encoder.prompt(fact.asked[0]) for fact in facts]
    words = reader.words(prompts)
    parts = [padded(words[start : start + _TEXTS]) for start in range(0, len(words), _TEXTS)]
    asked = [head.keys(*part) for part in parts]
    scores = torch.cat(
        [
            late_interaction(keys, one.vectors, real, head.discounts)
            for one, (_, real) in zip(asked, parts, strict=True)
        ],
        1,
    )
    starts = [0, *torch.tensor([len(group) for group in groups]).cumsum(0).tolist()][:-1]
    others = (
        [start + 1 for start in starts],
        [start + len(group) - 1 for start, group in zip(starts, groups, strict=True)],
    )
    for channel, share in enumerate((other_subject, other_relation)):
        head.midpoints[channel] = tolerance_threshold(scores[channel, others[channel], starts], share)
    margins = head.log_probability(scores) - own_thresholds(head, ordinary, keys)
    fires = margins > 0
    weights = [one for part in asked for one in part.weights.unbind(1)]
    of_prompts = [reader.names(row, one) for row, one in zip(prompts, weights, strict=True)]
    of_edits = [reader.names(row, one) for row, one in zip(edits, keys.weights.unbind(1), strict=True)]
    for prompt, edit in fires.nonzero().tolist():
        fires[prompt, edit] = margins[prompt, edit] > cost_of(of_edits[edit], of_prompts[prompt])
    n_named = int(fires[others[0], starts].sum())
    n_fired = int((fires.cpu() & _unrelated(facts)).any(-1).sum())
    return Calibration(other_subject, other_relation, n_groups, n_named, n_fired, len(facts), len(facts))


def tolerance_threshold(scores: Float[Tensor, " pair"], share: float) -> float:
    """What at most a share of further scores like these exceeds, with a confidence of 95 %.

    Source: Wilks 1941, "Determination of sample sizes for setting tolerance limits": `k` scores may lie
    above where the chance of at most `k` in a binomial of so many trials and that share is at most 5 %.

    Raises:
        ConfigError: If there are too few scores for the share.
    """
    n, n_above, chance = len(scores), -1, 0.0
    while chance <= 1 - CONFIDENCE:
        n_above += 1
        chance += _chance(n_above, n, share)
    if n_above == 0:
        needed = math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-share))
        raise ConfigError(f"{n} pairs cannot show a share of {share}: expected at least {needed}")
    return float(scores.sort(descending=True).values[n_above - 1])


def share_bound(n_found: int, n: int) -> float:
    """The share that is behind `n_found` of `n`, at most, with a confidence of 95 % (Clopper and Pearson)."""
    if n_found == n:
        return 1.0
    low, high = n_found / n, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        chance = sum(_chance(k, n, middle) for k in range(n_found + 1))
        low, high = (middle, high) if chance > 1 - CONFIDENCE else (low, middle)
    return high


def _chance(k: int, n: int, share: float) -> float:
    """That exactly `k` of `n` are found."""
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(share) + (n - k) * math.log1p(-share))


def _unrelated(facts: Sequence[Fact]) -> Tensor:
    """Which facts, as asked, have neither subject nor relation in common with which, as edited."""
    return torch.tensor([
        [one.subject != other.subject and one.relation != other.relation for one in facts] for other in facts
    ])  # fmt: skip
