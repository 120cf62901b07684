"""The three terms of the loss, against loops, by their gradients and in their limits."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from baft.nn.losses import (
    BalanceForm,
    accumulate_load,
    load_balance,
    locality,
    target_cross_entropy,
    target_margins,
)
from references import draws, loops

quick = settings(max_examples=30, deadline=None)
shapes = st.tuples(st.integers(1, 3), st.integers(2, 6))  # blocks, rank


def weights(seed: int, *shape: int) -> Tensor:
    return torch.sigmoid(2 * draws.normal(seed, *shape))


def slope(m: Tensor, M: Tensor) -> Tensor:
    """Gradient of the balancing term with respect to this edit's weights."""
    m = m.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(load_balance(m, M).mean(), m)
    return gradient


# --- cross-entropy ---


@quick
@given(draws.seeds, st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_cross_entropy_equals_the_loop(seed: int, lengths: list[int]) -> None:
    n, vocab = sum(lengths), 11
    logits = 5 * draws.normal(seed, n, vocab)
    targets = torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed))
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    loss = target_cross_entropy(logits[shuffled], targets[shuffled], rows[shuffled])
    slow = loops.cross_entropy(logits.tolist(), targets.tolist(), rows.tolist())
    assert float(loss) == pytest.approx(slow, rel=1e-12)


def test_a_long_target_weighs_no_more_than_a_short_one() -> None:
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0], [0.0, 4.0], [0.0, 4.0]], dtype=torch.float64)
    targets, rows = torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 1, 1])
    right, wrong = math.log1p(math.exp(-4)), math.log1p(math.exp(4))
    loss = target_cross_entropy(logits, targets, rows)
    assert float(loss) == pytest.approx((right + wrong) / 2, rel=1e-14)
    over_tokens = torch.nn.functional.cross_entropy(logits, targets)  # control: the mean over all tokens
    assert float(over_tokens) != pytest.approx((right + wrong) / 2, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_coarse_logits_are_widened_before_the_logarithm(dtype: torch.dtype) -> None:
    logits = (5 * draws.normal(0, 3, 50)).to(dtype)
    targets, rows = torch.tensor([1, 2, 3]), torch.tensor([0, 0, 1])
    loss, margins = target_cross_entropy(logits, targets, rows), target_margins(logits, targets)
    assert loss.dtype == margins.dtype == torch.float32
    exact = target_cross_entropy(logits.double(), targets, rows)
    assert exact.dtype == torch.float64
    assert float(loss) == pytest.approx(float(exact), rel=1e-6)
    torch.testing.assert_close(
        margins.double(), target_margins(logits.double(), targets), rtol=1e-6, atol=1e-6
    )


def test_gradients_of_the_losses() -> None:
    logits = draws.normal(0, 5, 7).requires_grad_()
    targets, rows = torch.tensor([0, 6, 3, 3, 1]), torch.tensor([0, 0, 1, 1, 1])
    assert torch.autograd.gradcheck(lambda x: target_cross_entropy(x, targets, rows), (logits,))
    m, M = weights(1, 2, 5).requires_grad_(), 3 * weights(2, 2, 5)
    assert torch.autograd.gradcheck(lambda x: load_balance(x, M), (m,))
    w = weights(3, 4, 2, 5).requires_grad_()
    assert torch.autograd.gradcheck(locality, (w,))


@quick
@given(draws.seeds)
def test_a_margin_is_the_lead_over_the_best_other_token(seed: int) -> None:
    logits = draws.normal(seed, 4, 6)
    targets = torch.randint(6, (4,), generator=torch.Generator().manual_seed(seed))
    margins = target_margins(logits, targets)
    for scores, target, margin in zip(logits.tolist(), targets.tolist(), margins.tolist(), strict=True):
        own = scores.pop(target)
        assert margin == own - max(scores)
    assert torch.equal(margins > 0, logits.argmax(-1) == targets)
    lead = torch.arange(4)
    raised = logits.clone()
    raised[lead, targets] += 1.0 - margins  # such that every target leads by one nat
    torch.testing.assert_close(target_margins(raised, targets), torch.ones(4, dtype=torch.float64))


# --- balancing ---


@quick
@given(draws.seeds, shapes)
def test_balance_equals_the_loop(seed: int, shape: tuple[int, int]) -> None:
    m, M = weights(seed, *shape), 5 * weights(seed + 1, *shape)
    fast = float(load_balance(m, M).mean())  # over blocks
    assert fast == pytest.approx(loops.load_balance(m.tolist(), M.tolist()), rel=1e-8)  # eps = 1e-10
    load = m + M
    sample = float((load.var(-1) / load.mean(-1).square()).mean())  # control: the sample's variance
    assert sample > fast * 1.1


@quick
@given(draws.seeds, st.integers(2, 8), st.floats(0.1, 100))
def test_balance_runs_from_zero_to_rank_less_one(seed: int, rank: int, factor: float) -> None:
    """Zero where all bases carry the same, `rank - 1` where one carries all; the scale is no matter."""
    m, nothing = weights(seed, rank), torch.zeros(rank, dtype=torch.float64)
    value = float(load_balance(m, nothing))
    assert 0 < value < rank - 1
    assert float(load_balance(factor * m, nothing)) == pytest.approx(value, rel=1e-4)
    assert float(load_balance(torch.full_like(m, 0.3), nothing)) == pytest.approx(0, abs=1e-15)
    alone = nothing.clone()
    alone[seed % rank] = 0.8
    assert float(load_balance(alone, nothing)) == pytest.approx(rank - 1, rel=1e-8)


def test_balance_is_finite_where_nothing_is_carried() -> None:
    nothing = torch.zeros(2, 4, dtype=torch.float64)
    assert load_balance(nothing, nothing).tolist() == [0.0, 0.0]
    assert torch.equal(slope(nothing, nothing), nothing)


@quick
@given(draws.seeds, st.integers(2, 8))
def test_balance_pushes_an_edit_away_from_loaded_bases(seed: int, rank: int) -> None:
    """The slope is positive exactly on bases whose load exceeds `sum load^2 / sum load`."""
    m, M = weights(seed, rank), 4 * weights(seed + 1, rank)
    load, gradient = m + M, slope(m, M)
    border = load.square().sum() / load.sum()
    assume(float((load - border).abs().min()) > 1e-6)
    assert torch.equal(gradient > 0, load > border)
    assert float(gradient[load.argmax()]) > 0 > float(gradient[load.argmin()])
    assert float((load * gradient).sum()) == pytest.approx(0, abs=1e-8)  # Euler: scaling all changes nothing


def test_the_past_decides_where_the_push_goes() -> None:
    m = torch.full((4,), 0.5, dtype=torch.float64)
    M = torch.tensor([9.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert (slope(m, M) > 0).tolist() == [True, False, False, False]
    moved = m - 0.1 * slope(m, M)
    assert float(load_balance(moved, M)) < float(load_balance(m, M))
    assert torch.equal(slope(m, torch.zeros_like(M)), torch.zeros_like(M))  # control: no past, no push


def test_the_past_takes_no_gradient() -> None:
    m, M = weights(0, 4).requires_grad_(), weights(1, 4).requires_grad_()
    load_balance(m, M).backward()
    assert M.grad is None
    assert m.grad is not None
    assert not accumulate_load(M.detach(), m, "running").requires_grad


def test_the_pull_of_the_running_form_fades_like_one_over_t() -> None:
    m, one = weights(0, 6), weights(1, 6)
    at_t, at_2t = (float(slope(m, t * one).norm()) for t in (1000, 2000))
    assert at_2t == pytest.approx(at_t / 2, rel=0.01)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("running", [3.0, 1.0]),
        ("running_times_t", [3.0, 1.0]),  # the factor t is the trainer's
        ("exponential", [0.81 + 0.9 + 1.0, 1.0]),
        ("current", [0.0, 0.0]),
    ],
)
def test_what_the_bases_carry_after_three_edits(form: BalanceForm, expected: list[float]) -> None:
    assert form in get_args(BalanceForm)
    load = torch.zeros(1, 2, dtype=torch.float64)
    for m in ([1.0, 0.0], [1.0, 0.0], [1.0, 1.0]):
        before = load.clone()
        after = accumulate_load(load, torch.tensor([m], dtype=torch.float64), form)
        assert torch.equal(load, before)  # nothing is changed in place: an undo keeps the old one
        load = after
    assert load.flatten().tolist() == pytest.approx(expected, rel=1e-15)


# --- locality ---


@quick
@given(draws.seeds, shapes)
def test_locality_equals_the_loop(seed: int, shape: tuple[int, int]) -> None:
    w = weights(seed, 5, *shape)
    slow = loops.locality(w.flatten(1).tolist())
    assert locality(w).shape == (shape[0],)
    assert float(locality(w).mean()) == pytest.approx(slow, rel=1e-13)
    assert 0 < float(locality(w).mean()) < 1


def test_locality_is_zero_exactly_where_every_weight_is() -> None:
    w = torch.zeros(3, 1, 4, dtype=torch.float64)
    assert float(locality(w)) == 0.0
    w[1, 0, 2] = 0.5
    assert float(locality(w)) == 0.25 / 12
    assert float(locality(torch.ones_like(w))) == 1.0
