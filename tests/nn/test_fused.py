"""The fused form: the plain path's function, at a fraction of its work."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baft.nn import fused
from baft.nn.fused import FusedIntervention, is_trained
from baft.nn.gates import ConditionedGate, LogisticGate, OpenGate, hard_zero_span
from baft.nn.interventions import SubspaceIntervention, intervene
from references import draws

D = draws.D_MODEL
quick = settings(max_examples=40, deadline=None)
selections = pytest.mark.parametrize("selected_from", [1, 10**6], ids=["those that open", "all bases"])


def one_way(n_blocks: int, *, first: int = 0, threshold: float = 0.1) -> LogisticGate:
    """Block `i` opens where coordinate `first + i` is large."""
    U = torch.zeros(n_blocks, 3, D)
    for block in range(n_blocks):
        U[block, :, first + block] = 2.0
    return LogisticGate(U, torch.full((n_blocks, 3), -15.0), threshold=threshold)


def part_of(seed: int, gate: LogisticGate) -> SubspaceIntervention:
    n_blocks = gate.c.shape[0]
    return draws.intervention(seed, n_blocks, 3, gate, dtype=torch.float32).requires_grad_(False)


@selections
@quick
@given(draws.seeds, st.lists(st.tuples(draws.shapes, st.sampled_from(range(4))), min_size=1, max_size=3))
def test_it_equals_the_plain_path(
    selected_from: int, seed: int, drawn: list[tuple[tuple[int, int], int]]
) -> None:
    """Parts of any kinds of gates, thresholds, ranks and numbers of blocks, together."""
    parts = [
        draws.intervention(seed + i, *shape, draws.gates(seed + i, *shape)[kind])
        for i, (shape, kind) in enumerate(drawn)
    ]
    h = draws.normal(seed + 50, 6, D)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_SELECTED_FROM", selected_from)
        want, want_open = intervene(parts, h)
        found = FusedIntervention(parts)(h)
        if found is None:
            assert not want_open.any()
            return
        torch.testing.assert_close(found[0], want, rtol=1e-12, atol=1e-12)
        assert torch.equal(found[1], want_open)
        twice = FusedIntervention([*parts, *parts])(h)  # control: every change made twice
        assert twice is not None
        assert not torch.allclose(twice[0], want, rtol=1e-9, atol=1e-9)


@selections
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_closed_states_come_back_bit_for_bit(
    selected_from: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_SELECTED_FROM", selected_from)
    h = draws.normal(1, 6, D, dtype=dtype)
    h[1, 0] = h[4, 1] = 10.0
    h[2] = -0.0
    parts = [part_of(0, one_way(2)), part_of(10, one_way(1, first=5))]
    whole = FusedIntervention(parts)
    assert whole(h[[0, 2, 3, 5]]) is None
    found = whole(h)
    assert found is not None
    out, is_open = found
    assert out.dtype == dtype
    assert is_open.tolist() == [False, True, False, False, True, False]
    assert torch.equal(bits(out[~is_open]), bits(h[~is_open]))
    want = intervene(parts, h)[0]
    torch.testing.assert_close(out, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert not (out[is_open] == h[is_open]).all(-1).any()
    # Controls: adding zero loses the sign of zero, and the first block alone says nothing of the second.
    assert not torch.equal(bits(h[2] + torch.zeros_like(h[2])), bits(h[2]))
    alone = FusedIntervention([part_of(0, one_way(1))])(h)
    assert alone is not None
    assert alone[1].tolist() == [False, True, False, False, False, False]


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_what_is_not_finite_stays_out_of_closed_states(poison: float) -> None:
    h = torch.zeros(3, D)
    h[2, 0] = 10.0
    part = part_of(0, one_way(1))
    part.b.fill_(poison)
    found = FusedIntervention([part])(h)
    assert found is not None
    assert torch.equal(found[0][:2], h[:2])
    assert not found[0][2].isfinite().any()  # control


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_where_no_gate_opens_the_bases_are_not_read(poison: float) -> None:
    whole = FusedIntervention([part_of(0, one_way(1))])
    for tensor in (whole.S, whole.b, whole.R):
        tensor.fill_(poison)
    h = torch.zeros(2, D)
    assert whole(h) is None
    h[1, 0] = 10.0  # control
    found = whole(h)
    assert found is not None
    assert not found[0][1].isfinite().any()


def test_of_many_bases_only_those_that_open_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_SELECTED_FROM", 1)
    whole = FusedIntervention([part_of(0, one_way(2))])
    whole.b[3:] = math.nan  # the second block's
    h = torch.zeros(1, D)
    h[0, 0] = 10.0
    found = whole(h)
    assert found is not None
    assert found[0].isfinite().all()
    monkeypatch.setattr(fused, "_SELECTED_FROM", 100)  # control: all of them are
    found = whole(h)
    assert found is not None
    assert not found[0].isfinite().any()


def test_made_again_it_gives_the_same_bits() -> None:
    """As undo and loading want it; and nothing it holds is the parts' own."""
    part, h = part_of(0, one_way(1)), 10.0 * draws.normal(1, 4, D, dtype=torch.float32)
    h[:, 0] = 10.0
    first = FusedIntervention([part])
    want = first(h)
    again = FusedIntervention([part])(h)
    assert want is not None
    assert again is not None
    assert torch.equal(again[0], want[0])
    part.R.mul_(2.0)
    kept, other = first(h), FusedIntervention([part])(h)
    assert kept is not None
    assert other is not None
    assert torch.equal(kept[0], want[0])
    assert not torch.equal(other[0], want[0])  # control


def test_gradients_reach_the_states() -> None:
    part = draws.intervention(0, 2, 3, draws.logistic_gate(0, 2, 3, threshold=0.1)).requires_grad_(False)
    h = draws.normal(5, 6, D).requires_grad_()
    found = FusedIntervention([part])(h)
    assert found is not None
    (got,) = torch.autograd.grad(found[0].square().sum(), h)
    (want,) = torch.autograd.grad(intervene([part], h)[0].square().sum(), h)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(got, 2 * h.detach())  # control: the gradient of the state alone


def test_any_parameter_with_gradients_is_training() -> None:
    still = draws.intervention(0, 1, 2, OpenGate(1, 2)).requires_grad_(False)
    gate = ConditionedGate(1, 2, mean=torch.zeros(D), scale=torch.ones(D))
    moving = SubspaceIntervention(still.R.data, still.A.data, still.b.data, gate).requires_grad_(False)
    assert not is_trained([still, moving])
    gate.v.requires_grad_()
    assert is_trained([still, moving])


def test_the_span_made_in_inference_serves_training() -> None:
    device = torch.device("cpu")
    hard_zero_span.cache_clear()
    with torch.inference_mode():
        span = hard_zero_span(0.25, torch.float64, device)
        inside = torch.ones((), dtype=torch.float64)
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (w / span).sum().backward()
    assert w.grad is not None
    assert hard_zero_span(0.25, torch.float64, device) is span
    with pytest.raises(RuntimeError, match="Inference tensors"):  # control
        (w / inside).sum().backward()
