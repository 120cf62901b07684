"""Intervals by their coverage, tests by their size and power, all of it simulated; and what is refused."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baft.errors import ConfigError, InputError
from baft.evals import intervals
from baft.evals.stats import (
    UNBOUNDED,
    Scores,
    compare,
    curve,
    group,
    holm,
    mean_interval,
    paired_difference,
)

Rng = np.random.Generator
quick = settings(max_examples=50, deadline=None)
p_values = st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8)
small_scores = st.dictionaries(
    st.text(max_size=3), st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=8
)


def correlated(rng: Rng, n: int, p: float) -> Scores:
    """Right and wrong answers with mean `p`: one to eight probes an edit, correlated by 0.5."""
    right = rng.random((n, 8)) < rng.beta(p, 1 - p, size=n)[:, None]
    sizes = rng.integers(1, 9, size=n)
    rows = zip(right.astype(float).tolist(), sizes.tolist(), strict=True)
    return {f"case {i}": row[:size] for i, (row, size) in enumerate(rows)}


def single(rng: Rng, n: int, p: float) -> Scores:
    return columns((rng.random(n) < p).astype(float))


def columns(values: np.ndarray) -> Scores:
    """One value a case."""
    return {f"case {i}": [value] for i, value in enumerate(values.tolist())}


def coverage(draw: Callable[[Rng, int, float], Scores], n: int, p: float, n_sets: int = 400) -> float:
    rng = np.random.default_rng(n)
    ends = [mean_interval(draw(rng, n, p)) for _ in range(n_sets)]
    return sum(one.low <= p <= one.high for one in ends) / n_sets


# --- the mean of scores between 0 and 1 ---


@pytest.mark.parametrize("draw", [single, correlated])
@pytest.mark.parametrize(
    ("n", "p", "least", "most"),
    [
        (200, 0.5, 0.92, 0.98),
        (200, 0.9, 0.92, 0.98),
        (50, 0.3, 0.92, 0.98),
        (50, 0.9, 0.92, 0.98),
        (20, 0.5, 0.90, 1.0),
        (20, 0.95, 0.90, 1.0),
        (50, 0.98, 0.90, 1.0),
        (50, 0.05, 0.90, 1.0),
        (200, 0.99, 0.90, 1.0),
    ],
)
def test_the_interval_covers_as_often_as_it_says(
    draw: Callable[[Rng, int, float], Scores], n: int, p: float, least: float, most: float
) -> None:
    assert least <= coverage(draw, n, p) <= most


def test_an_interval_that_ignores_edits_covers_too_seldom() -> None:
    rng = np.random.default_rng(0)
    n_sets, covered, covered_apart = 200, 0, 0
    for _ in range(n_sets):
        chances = rng.beta(0.3, 0.3, size=50)
        values = (rng.random((50, 8)) < chances[:, None]).astype(float)
        clustered = mean_interval({f"case {i}": row for i, row in enumerate(values.tolist())})
        apart = mean_interval(columns(values.ravel()))
        assert clustered.estimate == pytest.approx(apart.estimate)
        covered += clustered.low <= 0.5 <= clustered.high
        covered_apart += apart.low <= 0.5 <= apart.high
    assert covered / n_sets >= 0.92
    assert covered_apart / n_sets < 0.75


def test_the_percentile_bootstrap_would_fail_near_the_border() -> None:
    """Why it is not used: with one edit in fifty wrong, most samples of twenty are all right."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        values = (rng.random(20) < 0.98).astype(float)
        means = values[rng.integers(20, size=(500, 20))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        covered += low <= 0.98 <= high
    assert covered / 200 < 0.5
    assert coverage(single, 20, 0.98, 200) >= 0.90


@pytest.mark.parametrize("n", [1, 5, 50, 1000])
@pytest.mark.parametrize("n_probes", [1, 10])
def test_all_right_is_not_certain(n: int, n_probes: int) -> None:
    right = mean_interval({f"case {i}": [1] * n_probes for i in range(n)})
    t = intervals.t_quantile(0.975, n - 1)
    assert right.estimate == right.high == 1.0
    assert right.low == pytest.approx(n / (n + t * t))
    wrong = mean_interval({f"case {i}": [0] * n_probes for i in range(n)})
    assert (wrong.low, wrong.high) == (0.0, pytest.approx(1 - right.low))
    assert (right.n_edits, right.n_values, right.level) == (n, n * n_probes, 0.95)


def test_equal_values_between_the_borders_are_not_certain_either() -> None:
    half = mean_interval({f"case {i}": [0, 1] for i in range(20)})
    assert half.low < 0.49 < 0.51 < half.high


def test_every_edit_counts_alike() -> None:
    scores = {"many probes": [1, 1, 1, 1, 1, 1, 1, 1, 1], "one probe": [0]}
    assert mean_interval(scores).estimate == 0.5
    together = [value for values in scores.values() for value in values]  # control: the mean over probes
    assert sum(together) / len(together) == 0.9


@quick
@given(small_scores, st.randoms())
def test_the_interval_holds_the_estimate_within_the_bounds_in_any_order(
    scores: Scores, random: object
) -> None:
    interval = mean_interval(scores)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval.low < interval.high
    shuffled = dict(random.sample(list(scores.items()), len(scores)))  # type: ignore[attr-defined]
    assert mean_interval(shuffled) == interval
    mirrored = mean_interval({case: [1 - value for value in values] for case, values in scores.items()})
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - interval.high, 1 - interval.low), abs=1e-9)
    wide = {case: [20 * value - 10 for value in values] for case, values in scores.items()}
    scaled = mean_interval(wide, bounds=(-10.0, 10.0))
    assert (scaled.low, scaled.high) == pytest.approx(
        (20 * interval.low - 10, 20 * interval.high - 10), abs=1e-7
    )


def test_a_higher_level_is_a_wider_interval_and_more_edits_a_narrower_one() -> None:
    scores = correlated(np.random.default_rng(0), 60, 0.7)
    fewer = dict(itertools.islice(scores.items(), 15))
    ends = [mean_interval(scores, level=level) for level in (0.5, 0.9, 0.95, 0.99)]
    for narrow, wide in itertools.pairwise(ends):
        assert wide.low < narrow.low < narrow.high < wide.high
    assert (
        mean_interval(fewer).high - mean_interval(fewer).low
        > mean_interval(scores).high - mean_interval(scores).low
    )


# --- the mean of other scores ---


@pytest.mark.parametrize("n", [20, 50])
def test_unbounded_scores_are_covered_too(n: int) -> None:
    rng = np.random.default_rng(n)
    covered = {"normal": 0, "skewed": 0}
    n_sets = 600
    for seed in range(n_sets):
        for name, values in (("normal", rng.normal(3, 2, n)), ("skewed", 2 + rng.exponential(1, n))):
            interval = mean_interval(columns(values), bounds=UNBOUNDED, n_resamples=399, seed=seed)
            covered[name] += interval.low <= 3 <= interval.high
    assert 0.92 <= covered["normal"] / n_sets <= 0.98
    assert 0.90 <= covered["skewed"] / n_sets <= 0.98


def test_a_seed_gives_one_interval_and_another_seed_another() -> None:
    scores = columns(np.random.default_rng(0).normal(size=30))
    first = mean_interval(scores, bounds=UNBOUNDED)
    assert mean_interval(dict(reversed(scores.items())), bounds=UNBOUNDED) == first
    assert mean_interval(scores, bounds=UNBOUNDED, seed=1).low != first.low


def test_where_a_sample_says_nothing_the_interval_is_infinite() -> None:
    alike = mean_interval({"a": [2.5], "b": [2.5], "c": [2.5]}, bounds=UNBOUNDED)
    assert (alike.estimate, alike.low, alike.high) == (2.5, -math.inf, math.inf)
    assert mean_interval({"a": [2.5]}, bounds=(0.0, math.inf)).low == 0
    rare = mean_interval(columns(np.array([0.0] * 49 + [8.0])), bounds=(0.0, math.inf))
    assert (rare.low, rare.high) == (0.0, math.inf)  # a third of the resamples hold no 8


# --- two methods ---


def flips(rng: Rng, n: int, better: float, worse: float) -> tuple[Scores, Scores]:
    """Two methods with three probes an edit; edits that change, change as a whole or in part."""
    kind = rng.random(n)
    changed = np.where(kind < better, 1, np.where(kind < better + worse, -1, 0))
    parts = rng.choice([1 / 3, 2 / 3, 1.0], size=n, p=[0.2, 0.2, 0.6])
    a = np.where(changed > 0, parts, 0.0)
    b = np.where(changed < 0, parts, 0.0)
    return columns(a), columns(b)


@pytest.mark.parametrize(
    ("n", "better", "worse", "most"),
    [
        (200, 0.3, 0.1, 0.98),
        (50, 0.4, 0.2, 0.98),
        (20, 0.5, 0.2, 1.0),
        (200, 0.03, 0.01, 1.0),
        (50, 0.02, 0.02, 1.0),
        (20, 0.02, 0.0, 1.0),
    ],
)
def test_the_interval_of_a_difference_covers(n: int, better: float, worse: float, most: float) -> None:
    rng = np.random.default_rng(n)
    truth = (better - worse) * 0.8
    results = [
        paired_difference(*flips(rng, n, better, worse), n_resamples=199, seed=seed) for seed in range(200)
    ]
    assert 0.92 <= sum(one.low <= truth <= one.high for one in results) / 200 <= most


@pytest.mark.parametrize("n", [8, 30])
def test_p_values_are_uniform_where_nothing_differs(n: int) -> None:
    rng = np.random.default_rng(n)
    found = []
    for seed in range(400):
        a, b = rng.random((2, n))
        found.append(paired_difference(columns(a), columns(b), n_resamples=199, seed=seed).p_value)
    assert np.mean(np.array(found) < 0.05) <= 0.07
    for share in (0.25, 0.5, 0.75):
        assert np.mean(np.array(found) <= share) == pytest.approx(share, abs=0.08)


def test_the_detectable_difference_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(0)
    n, n_sets = 40, 200
    zero = columns(np.zeros(n))
    draws = rng.normal(0, 0.1, (n_sets, n))
    effect = np.median(
        [
            paired_difference(columns(one), zero, bounds=(-9.0, 9.0), n_resamples=199).detectable
            for one in draws
        ]
    )
    found = [
        paired_difference(columns(one + effect), zero, bounds=(-9.0, 9.0), n_resamples=199).verdict
        for one in draws
    ]
    assert 0.72 <= found.count("better") / n_sets <= 0.88
    assert "worse" not in found


def test_small_samples_are_tested_exactly() -> None:
    a = {"a": [0.9], "b": [0.5], "c": [0.7], "d": [0.3]}
    zero = {case: [0.0] for case in a}
    assert paired_difference(a, zero).p_value == 2 / 2**4
    a["d"], zero["d"] = [0.0], [0.4]
    deltas = [0.9, 0.5, 0.7, -0.4]
    sums = [abs(math.fsum(s * d for s, d in zip(signs, deltas, strict=True))) for signs in SIGNS]
    assert paired_difference(a, zero).p_value == sum(one >= 1.7 - 1e-12 for one in sums) / 16
    assert paired_difference(a, a).p_value == 1.0


SIGNS = list(itertools.product((-1, 1), repeat=4))


def test_random_flips_agree_with_all_flips() -> None:
    deltas = np.random.default_rng(3).normal(0.3, 1, 14)
    exact = intervals.sign_flip(deltas, 100, 0)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(intervals, "_EXACT_UP_TO", 0)
        assert intervals.sign_flip(deltas, 20_000, 0) == pytest.approx(exact, abs=0.015)
    assert 0.02 < exact < 0.98


def test_verdicts() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.3, 40)
    worse, better = columns(low), columns(low + 0.3 + rng.uniform(0, 0.3, 40))
    assert paired_difference(better, worse).verdict == "better"
    assert paired_difference(worse, better).verdict == "worse"
    assert paired_difference(worse, better, better="lower").verdict == "better"
    same = paired_difference(better, better)
    assert (same.verdict, same.estimate, same.p_value) == ("undecided", 0.0, 1.0)
    assert same.low < 0 < same.high  # forty edits alike do not show that all are
    assert same.detectable > 0
    one = paired_difference({"a": [1]}, {"a": [0]})
    assert (one.verdict, one.p_value, one.low, one.high, one.n_edits) == ("undecided", 1.0, -1.0, 1.0, 1)


@quick
@given(st.integers(0, 2**32 - 1), st.integers(2, 30))
def test_swapping_the_methods_mirrors_the_difference(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = columns(rng.integers(0, 3, n) / 2), columns(rng.integers(0, 3, n) / 2)
    there, back = paired_difference(a, b, n_resamples=199), paired_difference(b, a, n_resamples=199)
    assert there.estimate == -back.estimate
    assert there.low <= there.estimate <= there.high
    if n <= 14:
        assert there.p_value == back.p_value
    reordered = paired_difference(dict(reversed(a.items())), b, n_resamples=199)
    assert reordered == there


def test_pairing_finds_what_two_intervals_hide() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 0.9, 60)
    a, b = columns(base + rng.uniform(0, 0.1, 60)), columns(base)
    assert paired_difference(a, b).verdict == "better"
    assert mean_interval(a).low < mean_interval(b).high


def test_unbounded_scores_without_a_difference_have_no_scale() -> None:
    same = paired_difference({"a": [3.0], "b": [7.0]}, {"a": [3.0], "b": [7.0]}, bounds=UNBOUNDED)
    assert (same.low, same.high, same.verdict) == (-math.inf, math.inf, "undecided")


# --- families ---


def test_holm_by_hand() -> None:
    """0.01 x 4, 0.02 x 3, then 0.03 x 2 which may not fall below 0.06, then 0.5 x 1."""
    adjusted = holm({"c": 0.03, "a": 0.01, "d": 0.5, "b": 0.02})
    assert adjusted == pytest.approx({"c": 0.06, "a": 0.04, "d": 0.5, "b": 0.06})
    assert list(adjusted) == ["c", "a", "d", "b"]
    assert holm({"x": 0.4, "y": 0.9, "z": 0.5}) == {"x": 1.0, "y": 1.0, "z": 1.0}
    assert holm({}) == {}


@quick
@given(p_values)
def test_holm_adjusts_upwards_keeps_the_order_and_is_no_harsher_than_bonferroni(
    family: dict[str, float],
) -> None:
    adjusted = holm(family)
    for name, p_value in family.items():
        assert p_value <= adjusted[name] <= min(1.0, len(family) * p_value)
        assert all(adjusted[name] <= adjusted[other] for other in family if p_value < family[other])


def test_a_family_is_adjusted_and_one_true_difference_survives() -> None:
    rng = np.random.default_rng(0)
    reference = columns(rng.uniform(0.3, 0.5, 40))
    methods = {f"same {i}": columns(rng.uniform(0.3, 0.5, 40)) for i in range(5)}
    methods |= {"reference": reference, "good": columns(rng.uniform(0.5, 0.8, 40))}
    differences = compare(methods, "reference")
    assert list(differences) == [*(f"same {i}" for i in range(5)), "good"]
    assert differences["good"].verdict == "better"
    assert differences["good"].p_adjusted == pytest.approx(6 * differences["good"].p_value)
    assert {one.verdict for name, one in differences.items() if name != "good"} == {"undecided"}


def test_the_family_decides_the_verdict() -> None:
    rng = np.random.default_rng(5)
    base = rng.uniform(0.3, 0.6, 30)
    border = columns(base + 0.0205 + np.linspace(-0.08, 0.08, 30))  # 2.3 standard errors
    alone = compare({"border": border, "reference": columns(base)}, "reference")["border"]
    noise = {f"noise {i}": columns(base + rng.normal(0, 0.08, 30)) for i in range(9)}
    among = compare({"border": border, "reference": columns(base), **noise}, "reference")["border"]
    assert (alone.verdict, among.verdict) == ("better", "undecided")
    assert alone.p_value == among.p_value == alone.p_adjusted < among.p_adjusted


# --- along a sequence ---


def test_a_curve_has_a_point_a_bucket() -> None:
    scores = {f"case {i}": [0.0 if i < 50 else 1.0] for i in range(100)}
    positions = {case: i for i, case in enumerate(scores)}
    points = curve(scores, positions, n_buckets=4)
    assert [(point.first, point.last) for point in points] == [(0, 24), (25, 49), (50, 74), (75, 99)]
    assert [point.interval.estimate for point in points] == [0, 0, 1, 1]
    assert points[0].interval == mean_interval({f"case {i}": [0.0] for i in range(25)})
    assert curve(dict(reversed(scores.items())), positions, n_buckets=4) == points


@quick
@given(st.lists(st.integers(0, 12), min_size=1, max_size=40), st.integers(1, 15))
def test_every_case_is_in_one_bucket_and_a_batch_stays_together(places: list[int], n_buckets: int) -> None:
    positions = {f"case {i}": place for i, place in enumerate(places)}
    points = curve({case: [0.5] for case in positions}, positions, n_buckets=n_buckets)
    assert sum(point.interval.n_edits for point in points) == len(places)
    assert 1 <= len(points) <= n_buckets
    for before, after in itertools.pairwise(points):
        assert before.first <= before.last < after.first
    assert (points[0].first, points[-1].last) == (min(places), max(places))


# --- arithmetic and refusals ---


@pytest.mark.parametrize(
    ("df", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (10**6, 1.95997)],
)
def test_quantiles_of_student_are_those_of_the_tables(df: int, expected: float) -> None:
    assert intervals.t_quantile(0.975, df) == pytest.approx(expected, rel=2e-3)
    assert intervals.t_quantile(0.025, df) == pytest.approx(-expected, rel=2e-3)


def test_two_columns_make_scores() -> None:
    assert group([1, 0, 0.5], ["b", "a", "b"]) == {"b": [1, 0.5], "a": [0]}
    with pytest.raises(InputError, match="2 values for 1 clusters"):
        group([1, 0], ["a"])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "no case"),
        ({"a": []}, "case 'a' has no value"),
        ({"a": [math.nan]}, "'a' has a value that is not finite"),
        ({"a": [0.5], "b": [1.5]}, "'b' has a value outside of 0.0 to 1.0"),
    ],
)
def test_scores_that_cannot_be_averaged_are_refused(scores: Scores, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mean_interval(scores)


def test_different_cases_are_refused_by_name() -> None:
    a, b = {f"case {i}": [1] for i in range(6)}, {"case 0": [1], "other": [1]}
    with pytest.raises(
        InputError, match="only the first has 'case 1', 'case 2', 'case 3' and 2 more; only the second"
    ):
        paired_difference(a, b)
    with pytest.raises(
        InputError, match="case 'x' has 2 values under the first method and 1 under the second"
    ):
        paired_difference({"x": [1, 0]}, {"x": [1]})
    with pytest.raises(InputError, match="good against plain: the cases differ"):
        compare({"good": a, "plain": b}, "plain")
    with pytest.raises(InputError, match="'none' is not among the methods: good"):
        compare({"good": a}, "none")
    with pytest.raises(InputError, match="only the second has 'b'"):
        curve({"a": [1]}, {"a": 0, "b": 1})


def test_impossible_settings_are_refused() -> None:
    scores = {"a": [1], "b": [0]}
    with pytest.raises(ConfigError, match="level must lie between 0 and 1"):
        mean_interval(scores, level=1.5)
    with pytest.raises(ConfigError, match="bounds must be"):
        mean_interval(scores, bounds=(1.0, 0.0))
    with pytest.raises(ConfigError, match="n_resamples must be at least 40 for a level of 0.95, got 39"):
        paired_difference(scores, scores, n_resamples=39)
    with pytest.raises(ConfigError, match="n_buckets must be at least 1"):
        curve(scores, {"a": 0, "b": 1}, n_buckets=0)
    with pytest.raises(InputError, match="p-value of 'x' must lie between 0 and 1, got nan"):
        holm({"x": math.nan})
