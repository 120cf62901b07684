"""Intervals and a test for the mean of independent values, one an edit; `stats` says when which is used."""

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ends = tuple[float, float]

NOWHERE: Ends = (-math.inf, math.inf)

_FAR_EDIT = 0.05  # how much of one more edit at the far border is reckoned with; chosen by simulated coverage
_EXACT_UP_TO = 14  # edits that differ; 2^13 ways to flip them are tried in full
_CHUNK = 2_000_000  # draws held in memory at once


def wilson(values: Floats, level: float) -> Ends:
    """Interval for the mean of values between 0 and 1, whether they are only 0 and 1 or anything between.

    Wilson's score interval (Wilson 1927, JASA 22) with an effective number of values `n_eff = p (1 - p) /
    var(p)` and Student's t, after Korn and Graubard 1998 (Survey Methodology 24); in Wilson's form as in
    Dean and Pagano 2015 (J. Survey Statistics and Methodology 3). `var(p)` is the sample's variance over n.
    To the variance a twentieth of one more value at the far border is added, up to the largest variance that
    the mean permits (Bhatia and Davis 2000, American Mathematical Monthly 107). Without it the interval
    forgets rare failures that the sample does not hold.
    """
    n, p = len(values), mean(values)
    n_effective = float(n)
    if n > 1 and p * (1 - p) > 1e-12:
        largest = p * (1 - p) * n / (n - 1)
        far = _FAR_EDIT * max(p, 1 - p) ** 2 / (n + 1)
        n_effective = n * p * (1 - p) / min(standard_deviation(values) ** 2 + far, largest)
    t = t_quantile((1 + level) / 2, n - 1)
    center = p + t * t / (2 * n_effective)
    half = t * math.sqrt(max(p * (1 - p), 0.0) / n_effective + (t / (2 * n_effective)) ** 2)
    shrink = 1 + t * t / n_effective
    return (center - half) / shrink, (center + half) / shrink


def studentized(values: Floats, level: float, n_resamples: int, seed: int) -> Ends:
    """The bootstrap of `(mean* - mean) / error*` (Efron and Tibshirani 1993, section 12.5).

    A resample of equal values has no error to divide by and counts as infinitely far off. Where so many do
    that one is the quantile, the end is infinite: the sample says nothing of it.
    """
    n, center = len(values), mean(values)
    error = standard_deviation(values) / math.sqrt(n)
    if error == 0.0:
        return NOWHERE
    rng = np.random.default_rng(seed)
    scaled = (values - center) / error
    pivots = []
    for size in _chunks(n_resamples, n):
        drawn = scaled[rng.integers(n, size=(size, n), dtype=np.int32)]
        offsets = drawn.mean(axis=1)
        squares = np.einsum("ij,ij->i", drawn, drawn) / n - offsets**2
        errors = np.sqrt(np.maximum(squares, 0.0) / (n - 1))
        flat = errors < 1e-6
        pivots.append(np.where(flat, np.copysign(np.inf, offsets), offsets / np.where(flat, 1.0, errors)))
    ordered = np.sort(np.concatenate(pivots))
    tail = math.floor((1 - level) / 2 * (n_resamples + 1))
    return center - float(ordered[-tail]) * error, center - float(ordered[tail - 1]) * error


def adjusted_wald(values: Floats, level: float, reach: float) -> tuple[Ends, float]:
    """Interval for the mean of differences most of which are alike, and the standard error behind it.

    Bonett and Price 2012 (J. Educational and Behavioral Statistics 37), with Student's t: two values more,
    one for each side, as far out as the farthest observed, or as `reach` if all are zero.
    """
    n = len(values)
    farthest = float(np.abs(values).max()) or reach
    if math.isinf(farthest):
        return NOWHERE, math.inf
    widened = np.concatenate([values, [-farthest, farthest]])
    center, error = mean(widened), float(widened.std()) / math.sqrt(n + 2)
    half = t_quantile((1 + level) / 2, n - 1) * error
    return (center - half, center + half), error


def sign_flip(differences: Floats, n_resamples: int, seed: int) -> float:
    """The share of ways to flip signs (Fisher 1935) whose sum is as far from zero as the observed one.

    All ways where at most 14 differences are not zero. Otherwise random ones, with the observed one counted
    among them (Phipson and Smyth 2010, Statistical Applications in Genetics and Molecular Biology 9).
    """
    changed = differences[differences != 0.0]
    k = len(changed)
    rounding = 1e-9 * float(np.abs(changed).sum())
    observed = abs(math.fsum(changed)) - rounding
    if k <= _EXACT_UP_TO:
        ways = np.arange(2 ** max(k - 1, 0))[
            :, None
        ]  # the last sign stands: the mirror images count the same
        bits = ways >> np.arange(k) & 1
        return float(np.mean(np.abs((1.0 - 2.0 * bits) @ changed) >= observed))
    rng = np.random.default_rng(seed)
    n_as_far = 0
    for size in _chunks(n_resamples, k):
        bits = rng.integers(2, size=(size, k), dtype=np.int8)
        n_as_far += int(np.count_nonzero(np.abs((1.0 - 2.0 * bits) @ changed) >= observed))
    return (n_as_far + 1) / (n_resamples + 1)


def t_quantile(probability: float, df: int) -> float:
    """Quantile of Student's t: in closed form for one and two degrees of freedom, then by a series.

    Abramowitz and Stegun 26.7.5, off by less than 0.2 % at the 95 % level. Zero degrees count as one.
    """
    if df <= 1:
        return math.tan(math.pi * (probability - 0.5))
    if df == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / float(df) ** power for power, term in enumerate(terms, 1))


def mean(values: Floats) -> float:
    """The mean, rounded once: whatever the order of the values."""
    return math.fsum(values) / len(values)


def standard_deviation(values: Floats) -> float:
    """The sample's; exactly 0 for equal values, and for a single one."""
    return float(values.std(ddof=1)) if values.min() < values.max() else 0.0


def _chunks(n_rows: int, n_columns: int) -> Iterator[int]:
    """How many rows to draw at a time."""
    size = max(1, _CHUNK // n_columns)
    for start in range(0, n_rows, size):
        yield min(size, n_rows - start)
