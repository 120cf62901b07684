"""How sure a score is, and whether one method is better than another.

The unit is the edit. Its probes share one intervention and rise and fall together, so they are averaged
first, and everything after treats the edits' means as independent. A score is the mean over edits of the
edit's mean: every edit counts alike, however many probes it has. KnowEdit's published tables are averaged so
too.

Intervals are chosen by simulated coverage (`tests/evals/test_stats.py`), not by habit. Near 0 and 1 every
bootstrap of a mean fails: where one edit in a hundred fails, most samples of 20 hold no failure at all, and
resampling them cannot show one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import numpy as np

from baft.errors import ConfigError, InputError
from baft.evals.intervals import (
    Floats,
    adjusted_wald,
    mean,
    sign_flip,
    standard_deviation,
    studentized,
    t_quantile,
    wilson,
)

Scores = Mapping[str, Sequence[float | int]]
Bounds = tuple[float, float]
Better = Literal["higher", "lower"]
Verdict = Literal["better", "worse", "undecided"]

UNIT: Bounds = (0.0, 1.0)
UNBOUNDED: Bounds = (-math.inf, math.inf)

_POWER = 0.8
_FEW = 10  # with fewer edits off the commonest difference, resampling is not trusted


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over edits and where the true one may lie.

    Args:
        estimate: Mean over edits of the edit's mean.
        low: Lower end; minus infinity where the sample sets none.
        high: Upper end; infinity where the sample sets none.
        n_edits: How many edits.
        n_values: How many values, of all edits together.
        level: The confidence, such as 0.95.
    """

    estimate: float
    low: float
    high: float
    n_edits: int
    n_values: int
    level: float


@dataclass(frozen=True, slots=True)
class Difference:
    """How far method `a` lies above method `b` on the same cases.

    Args:
        estimate: Mean over edits of `a` minus `b`.
        low: Lower end of its interval.
        high: Upper end.
        p_value: Chance of a difference at least as large, either way, if for every edit `a` and `b` could be
            swapped.
        p_adjusted: The same after Holm's correction, where the comparison is one of a family.
        n_edits: How many edits.
        detectable: The difference that would be found with a chance of 0.8 among as many edits with the same
            spread. Where it is large, "undecided" says little.
        level: The confidence.
        better: Whether higher or lower scores are better.
    """

    estimate: float
    low: float
    high: float
    p_value: float
    p_adjusted: float
    n_edits: int
    detectable: float
    level: float
    better: Better

    @property
    def verdict(self) -> Verdict:
        """Whether `a` is better than `b`; decided only where the test and the interval both say so."""
        if self.p_adjusted > 1 - self.level or self.low <= 0 <= self.high:
            return "undecided"
        return "better" if (self.estimate > 0) == (self.better == "higher") else "worse"


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The mean score of the edits from position `first` to position `last`, both included."""

    first: int
    last: int
    interval: Interval


def group(values: Sequence[float | int], clusters: Sequence[str]) -> Scores:
    """Scores from two columns: values, and the case that each belongs to.

    Raises:
        InputError: If the columns differ in length.
    """
    if len(values) != len(clusters):
        raise InputError(f"got {len(values)} values for {len(clusters)} clusters: give one case id a value")
    scores: dict[str, list[float | int]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        scores.setdefault(cluster, []).append(value)
    return scores


def mean_interval(
    scores: Scores,
    *,
    level: float = 0.95,
    bounds: Bounds = UNIT,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean over edits of the edit's mean, with an interval.

    Between finite bounds: Wilson's score interval with an effective number of edits (`intervals.wilson`,
    with its sources). All ones, of however many probes, count as n edits and give about `n / (n + 4)` as the
    lower end, never a zero width. Nothing is drawn: `n_resamples` and `seed` are without effect.

    Otherwise: the studentized bootstrap over edits (`intervals.studentized`), cut off at the bounds. Where
    the sample says nothing of an end, as where all values are equal, it is infinite.

    Args:
        scores: The values of each case.
        level: The confidence, between 0 and 1.
        bounds: The least and the greatest value that the score can take.
        n_resamples: How often the edits are drawn anew.
        seed: What the draws start from. The order of cases is no matter.

    Raises:
        InputError: If there is no case, a case has no value, or a value is not finite or out of bounds.
        ConfigError: If the level, the bounds or the number of resamples is impossible.
    """
    _check(level, bounds, n_resamples)
    means = np.sort(_edit_means(scores, bounds))
    low, high = bounds
    if math.isfinite(low) and math.isfinite(high):
        ends = wilson((means - low) / (high - low), level)
        ends = (low + (high - low) * ends[0], low + (high - low) * ends[1])
    else:
        ends = studentized(means, level, n_resamples, seed)
    n_values = sum(len(values) for values in scores.values())
    estimate = mean(means)
    return Interval(estimate, *_cut(ends, bounds, estimate), len(means), n_values, level)


def paired_difference(
    a: Scores,
    b: Scores,
    *,
    better: Better = "higher",
    level: float = 0.95,
    bounds: Bounds = UNIT,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Compares two methods on the same cases, edit by edit.

    The interval is the studentized bootstrap over edits (`intervals.studentized`). Where fewer than ten
    edits differ from the commonest difference there is too little to resample, and it is an adjusted Wald
    interval (`intervals.adjusted_wald`). The p-value flips the sign of every edit's difference
    (`intervals.sign_flip`).

    Args:
        a: The values of each case under one method.
        b: The same under the other; its cases, and their numbers of values, must be those of `a`.
        better: Whether higher or lower scores are better.
        level: The confidence, between 0 and 1.
        bounds: The least and the greatest value that the score can take.
        n_resamples: How often edits are drawn anew, and signs flipped.
        seed: What the draws start from. The order of cases is no matter.

    Raises:
        InputError: If the cases differ or have other numbers of values, or as for `mean_interval`.
        ConfigError: If a setting is impossible.
    """
    _check(level, bounds, n_resamples)
    _same_cases(a, b)
    for case in a:
        if len(a[case]) != len(b[case]):
            raise InputError(
                f"case {case!r} has {len(a[case])} values under the first method and {len(b[case])} under "
                "the second: score both on the same probes"
            )
    aligned = {case: b[case] for case in a}
    deltas = np.sort(_edit_means(a, bounds) - _edit_means(aligned, bounds))
    n = len(deltas)
    estimate = mean(deltas)
    reach = bounds[1] - bounds[0]
    _, counts = np.unique(deltas, return_counts=True)
    if n - int(counts.max()) < _FEW:
        ends, error = adjusted_wald(deltas, level, reach)
    else:
        ends = studentized(deltas, level, n_resamples, seed)
        error = standard_deviation(deltas) / math.sqrt(n)
    p_value = sign_flip(deltas, n_resamples, seed)
    detectable = (t_quantile((1 + level) / 2, n - 1) + t_quantile(_POWER, n - 1)) * error
    low, high = _cut(ends, (-reach, reach), estimate)
    return Difference(estimate, low, high, p_value, p_value, n, min(detectable, reach), level, better)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values of a family: the k-th smallest of m times `m - k + 1`, never falling, at most 1.

    Holm 1979 (Scandinavian Journal of Statistics 6): the chance of one false finding or more in the family
    stays below the level, whatever the dependence between the tests.

    Raises:
        InputError: If a value is not between 0 and 1.
    """
    for name, p_value in p_values.items():
        if not 0 <= p_value <= 1:
            raise InputError(f"the p-value of {name!r} must lie between 0 and 1, got {p_value}")
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def compare(
    methods: Mapping[str, Scores],
    reference: str,
    *,
    better: Better = "higher",
    level: float = 0.95,
    bounds: Bounds = UNIT,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Every other method less the reference; the verdicts stand after Holm's correction over the family.

    The intervals are those of single comparisons.

    Raises:
        InputError: If the reference is missing, or as for `paired_difference`.
        ConfigError: If a setting is impossible.
    """
    if reference not in methods:
        raise InputError(f"the reference {reference!r} is not among the methods: {', '.join(methods)}")
    differences: dict[str, Difference] = {}
    for name, scores in methods.items():
        if name == reference:
            continue
        try:
            differences[name] = paired_difference(
                scores,
                methods[reference],
                better=better,
                level=level,
                bounds=bounds,
                n_resamples=n_resamples,
                seed=seed,
            )
        except InputError as error:
            raise InputError(f"{name} against {reference}: {error}") from None
    adjusted = holm({name: difference.p_value for name, difference in differences.items()})
    return {name: replace(one, p_adjusted=adjusted[name]) for name, one in differences.items()}


def curve(
    scores: Scores,
    positions: Mapping[str, int],
    *,
    n_buckets: int = 10,
    level: float = 0.95,
    bounds: Bounds = UNIT,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> list[CurvePoint]:
    """Mean scores along a sequence of edits, in buckets of about as many edits each; for retention.

    Args:
        scores: The values of each case.
        positions: Where each case stands in the sequence; edits of one batch may share a place, and then
            share a bucket.
        n_buckets: How many buckets at most.
        level: The confidence of each point by itself.
        bounds: The least and the greatest value that the score can take.
        n_resamples: As for `mean_interval`.
        seed: As for `mean_interval`.

    Raises:
        InputError: If the cases of the two differ, or as for `mean_interval`.
        ConfigError: If there shall be no bucket, or a setting is impossible.
    """
    if n_buckets < 1:
        raise ConfigError(f"n_buckets must be at least 1, got {n_buckets}")
    _same_cases(scores, positions)
    buckets: dict[int, list[str]] = {}
    bucket = -1
    before: int | None = None
    for rank, case in enumerate(sorted(scores, key=lambda case: positions[case])):
        if positions[case] != before:
            bucket = max(bucket, rank * n_buckets // len(scores))
        buckets.setdefault(bucket, []).append(case)
        before = positions[case]
    return [
        CurvePoint(
            positions[cases[0]],
            positions[cases[-1]],
            mean_interval(
                {case: scores[case] for case in cases},
                level=level,
                bounds=bounds,
                n_resamples=n_resamples,
                seed=seed,
            ),
        )
        for cases in buckets.values()
    ]


# --- what comes in ---


def _check(level: float, bounds: Bounds, n_resamples: int) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1, such as 0.95; got {level}")
    if not bounds[0] < bounds[1]:
        raise ConfigError(f"bounds must be the least and the greatest value of the score, got {bounds}")
    least = math.ceil(2 / (1 - level) - 1e-9)  # one resample beyond either end
    if n_resamples < least:
        raise ConfigError(f"n_resamples must be at least {least} for a level of {level}, got {n_resamples}")


def _edit_means(scores: Scores, bounds: Bounds) -> Floats:
    if not scores:
        raise InputError("no case to average: the scores are empty")
    sizes = np.fromiter((len(values) for values in scores.values()), dtype=np.int64, count=len(scores))
    values = np.fromiter(chain.from_iterable(scores.values()), dtype=np.float64, count=int(sizes.sum()))
    fit = np.isfinite(values) & (values >= bounds[0]) & (values <= bounds[1])
    if sizes.min() == 0 or not fit.all():
        raise _unfit(scores, bounds)
    starts = np.cumsum(sizes) - sizes
    return np.asarray(np.add.reduceat(values, starts) / sizes)


def _unfit(scores: Scores, bounds: Bounds) -> InputError:
    """Says what is wrong with the first case that cannot be averaged."""
    for case, values in scores.items():
        if len(values) == 0:
            return InputError(f"case {case!r} has no value: leave it out, and say how many cases are scored")
        if not all(math.isfinite(value) for value in values):
            return InputError(f"case {case!r} has a value that is not finite: {list(values)}")
        if min(values) < bounds[0] or max(values) > bounds[1]:
            break
    return InputError(
        f"case {case!r} has a value outside of {bounds[0]} to {bounds[1]}: {list(values)}; "
        "give the bounds of the score"
    )


def _same_cases(a: Mapping[str, object], b: Mapping[str, object]) -> None:
    if a.keys() == b.keys():
        return
    parts = []
    for name, missing in (("first", a.keys() - b.keys()), ("second", b.keys() - a.keys())):
        if missing:
            some = ", ".join(repr(case) for case in sorted(missing)[:3])
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            parts.append(f"only the {name} has {some}{more}")
    raise InputError(f"the cases differ: {'; '.join(parts)}. Compare over the cases that both have")


def _cut(ends: Bounds, bounds: Bounds, estimate: float) -> Bounds:
    """Within the bounds; the estimate within the interval, though rounding would have it otherwise."""
    return max(min(ends[0], estimate), bounds[0]), min(max(ends[1], estimate), bounds[1])
