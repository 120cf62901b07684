"""Methods against each other: differences on the same cases, corrected for how many are looked at."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from baft.evals.collect import Group, Keyed, Results, pool
from baft.evals.metrics import METRICS, metric
from baft.evals.stats import Difference, Scores, holm, paired_difference

TEACHER_FORCED = (
    "reliability@teacher_forced",
    "generality@teacher_forced",
    "portability@teacher_forced",
    "locality@argmax",
)
GENERATED = ("reliability@generate", "generality@generate", "portability@generate", "locality@text")
IN_CHAT = (
    "reliability@generate_chat",
    "generality@generate_chat",
    "portability@generate_chat",
    "locality@text_chat",
)
FAMILIES = {
    "Teacher-forced": TEACHER_FORCED,
    "Generated": GENERATED,
    "In the chat template": IN_CHAT,
}

# What methods are compared by; every further score would cost the others power.
PRIMARY = (*TEACHER_FORCED, *GENERATED, *IN_CHAT, "locality@bleed", "locality@bleed_chat", "sentiment")


@dataclass(frozen=True, slots=True)
class Compared:
    """Two groups on one metric, over the cases that both have.

    Args:
        a: The first.
        b: The second.
        metric: The metric's name.
        mean_a: The first one's mean over those cases.
        mean_b: The second one's.
        difference: First less second; None where a value is not finite, or no case is shared.
        n_only_a: Cases that only the first has.
        n_only_b: Cases that only the second has.
    """

    a: Group
    b: Group
    metric: str
    mean_a: float
    mean_b: float
    difference: Difference | None
    n_only_a: int
    n_only_b: int

    @property
    def winner(self) -> Group | None:
        """The better one, if the test decides."""
        verdict = None if self.difference is None else self.difference.verdict
        return {"better": self.a, "worse": self.b}.get(verdict or "")


def compared(a: Group, b: Group, name: str, in_a: Keyed, in_b: Keyed) -> Compared:
    """Compares two groups; cases are paired seed by seed."""
    both = [key for key in in_a if key in in_b and len(in_a[key]) == len(in_b[key])]
    scores_a, scores_b = ({key: one[key] for key in both} for one in (in_a, in_b))
    only_a, only_b = (len({key[0] for key in one.keys() - set(both)}) for one in (in_a, in_b))
    values = [value for one in (scores_a, scores_b) for found in one.values() for value in found]
    if not values or not all(map(math.isfinite, values)):
        return Compared(a, b, name, math.nan, math.nan, None, only_a, only_b)
    spec, pooled_a, pooled_b = metric(name), pool(scores_a), pool(scores_b)
    difference = paired_difference(pooled_a, pooled_b, better=spec.better, bounds=spec.bounds)
    mean_a, mean_b = (_mean(one) for one in (pooled_a, pooled_b))
    return Compared(a, b, name, mean_a, mean_b, difference, only_a, only_b)


def corrected(family: Iterable[Compared]) -> list[Compared]:
    """The same comparisons with Holm's correction over all of them."""
    found = list(family)
    adjusted = holm({str(i): one.difference.p_value for i, one in enumerate(found) if one.difference})
    for i, one in enumerate(found):
        if one.difference is not None:
            found[i] = replace(one, difference=replace(one.difference, p_adjusted=adjusted[str(i)]))
    return found


def all_pairs(results: Results, groups: Sequence[Group]) -> list[Compared]:
    """Every pair of methods of one stage on every primary metric that both have, corrected over all."""
    family = []
    for name in PRIMARY:
        for a, b in combinations(groups, 2):
            in_a, in_b = results.scores(a, name), results.scores(b, name)
            if in_a and in_b:
                family.append(compared(a, b, name, in_a, in_b))
    return corrected(family)


def best(family: Sequence[Compared], groups: Sequence[Group], name: str) -> Group | None:
    """The method that the tests find better than every other one on a metric, if there is one."""
    pairs = [one for one in family if one.metric == name]
    for group in groups:
        against = [one for one in pairs if group in (one.a, one.b)]
        if against and len(against) == len(groups) - 1 and all(one.winner == group for one in against):
            return group
    return None


def known(names: Iterable[str]) -> list[str]:
    """Metric names, each once, in the order of the registry."""
    found = set(names)
    return [name for name in METRICS if name in found]


def _mean(scores: Scores) -> float:
    return math.fsum(math.fsum(values) / len(values) for values in scores.values()) / len(scores)
