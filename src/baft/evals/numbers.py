"""Numbers as reports show them."""

import math
from collections.abc import Mapping

from baft.evals.collect import Keyed, pool
from baft.evals.metrics import MetricSpec
from baft.evals.page import Cell
from baft.evals.stats import UNIT, Bounds, Difference, Interval, mean_interval

NOTHING = "–"
_MANY = 10_000


def number(value: float, bounds: Bounds = UNIT) -> str:
    """A score: two decimals, or as many more as keep it from looking like a bound that it is not."""
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if bounds != UNIT:
        text = f"{value:.2f}" if 0.1 <= abs(value) < _MANY or value == 0 else f"{value:.2g}"
        return _minus(text)
    for n_decimals in (2, 3, 4):
        text = f"{value:.{n_decimals}f}"
        if float(text) not in bounds or float(text) == value:
            break
    return text


def signed(value: float, bounds: Bounds = UNIT) -> str:
    """A difference, with its sign."""
    sign = "+" if value > 0 else "−" if value < 0 else ""
    if bounds != UNIT:
        return sign + number(abs(value), bounds)
    for n_decimals in (2, 3, 4):
        text = f"{abs(value):.{n_decimals}f}"
        if float(text) or not value:
            break
    return sign + text


def between(low: float, high: float, bounds: Bounds = UNIT) -> str:
    """An interval."""
    return f"[{number(low, bounds)}, {number(high, bounds)}]"


def p_text(value: float) -> str:
    """A p-value."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def interval_of(keyed: Keyed, spec: MetricSpec) -> Interval | None:
    """The mean of a metric with its interval; None without values, or where one is not finite."""
    if not keyed or n_infinite(keyed):
        return None
    return mean_interval(pool(keyed), bounds=spec.bounds)


def n_infinite(keyed: Keyed) -> int:
    """How many values are not finite."""
    return sum(not math.isfinite(value) for values in keyed.values() for value in values)


def score_cell(keyed: Keyed, spec: MetricSpec, *, best: bool = False, with_n: bool = False) -> Cell:
    """A mean and its interval."""
    found = interval_of(keyed, spec)
    if found is None:
        n = n_infinite(keyed)
        return Cell(f"{n} of {sum(map(len, keyed.values()))} not finite" if n else NOTHING)
    aside = between(found.low, found.high, spec.bounds) + (f" n={found.n_edits}" if with_n else "")
    share = found.estimate if spec.bounds == UNIT else None
    return Cell(number(found.estimate, spec.bounds), aside, share, best)


def detectable_text(difference: Difference, bounds: Bounds) -> str:
    """The difference that would have been found, where none was."""
    if difference.verdict != "undecided":
        return ""
    return "unknown" if math.isinf(difference.detectable) else number(difference.detectable, bounds)


def counted(counts: Mapping[str, int]) -> str:
    """Counts by name, as `3 a, 1 b`."""
    return ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "none"


def _minus(text: str) -> str:
    return text.replace("-", "−") if text.startswith("-") else text
