"""The intervention: its identities, its gradients, its bounds, and states that must come back bit for bit.

Every claim is measured once more where it does not hold: that control must fail.
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from baft.errors import ConfigError
from baft.nn.gates import ConditionedGate, Gate, LogisticGate, OpenGate
from baft.nn.interventions import SubspaceIntervention, concatenate, intervene, n_parameters
from baft.nn.orthonormal import random_orthonormal, retract, tangent
from references import draws, loops

D = draws.D_MODEL
quick = settings(max_examples=25, deadline=None)
halves = [torch.float32, torch.bfloat16, torch.float16]
KINDS = range(4)  # of gates, as draws.gates lists them


def states_of(seed: int, n: int = 5) -> Tensor:
    return draws.normal(seed + 100, n, D)


def loreft(part: SubspaceIntervention, h: Tensor) -> Tensor:
    """`R^T (A h + b - R h)`, for one block."""
    R, A, b = (p.detach()[0] for p in (part.R, part.A, part.b))
    return (h @ A.T + b - h @ R.T) @ R


def residuals(part: SubspaceIntervention, h: Tensor) -> Tensor:
    """`A h + b - R h`, `[token, block, rank]`."""
    A, R, b = part.A.detach(), part.R.detach(), part.b.detach()
    return torch.einsum("brd,td->tbr", A - R, h) + b


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


# --- the formula and its identities ---


@quick
@given(draws.seeds, draws.shapes, st.sampled_from(KINDS))
def test_delta_equals_the_loop_over_bases(seed: int, shape: tuple[int, int], kind: int) -> None:
    gate = draws.gates(seed, *shape)[kind]
    part = draws.intervention(seed, *shape, gate)
    h = states_of(seed)
    fast, w = part.delta(h)
    R, A, b = part.R.tolist(), part.A.tolist(), part.b.tolist()
    slow = [loops.delta(x, R, A, b, w_x) for x, w_x in zip(h.tolist(), gate.weights(h).tolist(), strict=True)]
    torch.testing.assert_close(fast, torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert torch.equal(w, gate.weights(h))
    one, _ = part.delta(h[0])
    torch.testing.assert_close(one, fast[0], rtol=1e-12, atol=1e-12)


@quick
@given(draws.seeds, st.integers(1, 4))
def test_all_weights_one_is_loreft(seed: int, rank: int) -> None:
    h = states_of(seed)
    part = draws.intervention(seed, 1, rank, OpenGate(1, rank))
    change, _ = part.delta(h)
    torch.testing.assert_close(change, loreft(part, h), rtol=1e-12, atol=1e-12)
    gated = draws.intervention(seed, 1, rank, draws.logistic_gate(seed, 1, rank))  # control
    assert not torch.allclose(gated.delta(h)[0], loreft(part, h), rtol=0, atol=1e-6)


@quick
@given(draws.seeds, st.integers(1, 4))
def test_a_saturated_gate_is_loreft_and_a_shut_one_the_identity(seed: int, rank: int) -> None:
    """The legal extremes of the paper's own gate: `sigmoid` reaches one and zero."""
    h = states_of(seed)
    no_slope = torch.zeros(1, rank, D, dtype=torch.float64)

    def at(logit: float) -> SubspaceIntervention:
        c = torch.full((1, rank), logit, dtype=torch.float64)
        return draws.intervention(seed, 1, rank, LogisticGate(no_slope, c))

    torch.testing.assert_close(at(50.0).delta(h)[0], loreft(at(50.0), h), rtol=1e-12, atol=1e-12)
    assert torch.equal(at(-800.0).delta(h)[0], torch.zeros_like(h))
    unchanged, is_open = intervene([at(-800.0)], h)
    assert torch.equal(unchanged, h)
    assert not is_open.any()
    assert float(at(0.0).delta(h)[0].detach().norm()) > 1e-6  # control: half open it changes them


@quick
@given(draws.seeds, draws.shapes, st.sampled_from(KINDS))
def test_the_start_is_the_identity_for_any_gate(seed: int, shape: tuple[int, int], kind: int) -> None:
    gate = draws.gates(seed, *shape)[kind]
    generator = torch.Generator().manual_seed(seed)
    part = SubspaceIntervention.identity(*shape, D, gate, generator=generator, dtype=torch.float64)
    assert (part.n_blocks, part.rank, part.d_model) == (*shape, D)
    assert part.R.data_ptr() != part.A.data_ptr()
    for h in (states_of(seed), 1e6 * states_of(seed)):
        assert torch.equal(part.delta(h)[0], torch.zeros_like(h))
        assert torch.equal(intervene([part], h)[0], h)
    with torch.no_grad():
        part.b += 1.0  # control
    h = states_of(seed)
    assert torch.equal(intervene([part], h)[0], h) == (not gate.weights(h).any())


@quick
@given(draws.seeds, st.integers(1, 4), st.sampled_from(KINDS))
def test_the_change_lies_in_the_row_space(seed: int, rank: int, kind: int) -> None:
    part = draws.intervention(seed, 1, rank, draws.gates(seed, 1, rank)[kind])
    change = part.delta(states_of(seed))[0].detach()
    R = part.R.detach()[0]
    outside = change - change @ R.T @ R
    assert float(outside.norm()) < 1e-12 * (1 + float(change.norm()))
    other = draws.orthonormal(seed + 50, 1, rank, D)[0]  # control: some other space of that rank
    elsewhere = loreft(part, states_of(seed))
    assert float((elsewhere - elsewhere @ other.T @ other).norm()) > 1e-6


@quick
@given(draws.seeds, draws.shapes, st.floats(0.01, 0.99))
def test_a_constant_gate_scales_the_change(seed: int, shape: tuple[int, int], weight: float) -> None:
    h = states_of(seed)
    full, _ = draws.intervention(seed, *shape, OpenGate(*shape)).delta(h)
    scaled, _ = draws.intervention(seed, *shape, draws.constant_gate(*shape, weight)).delta(h)
    torch.testing.assert_close(scaled, weight * full, rtol=1e-10, atol=1e-11)
    gated, _ = draws.intervention(seed, *shape, draws.logistic_gate(seed, *shape)).delta(h)  # control
    ratio = (gated / full).detach()
    assert float(ratio.max() - ratio.min()) > 1e-6


@quick
@given(draws.seeds, draws.shapes)
def test_bases_turned_alike_are_the_same_loreft_but_not_the_same_baft(
    seed: int, shape: tuple[int, int]
) -> None:
    """`Q R, Q A, Q b` for orthogonal Q: LoReFT knows a subspace, BaFT knows its bases."""
    n_blocks, rank = shape[0], max(2, shape[1])
    Q = draws.orthonormal(seed + 9, n_blocks, rank, rank)
    h = states_of(seed)

    def pair(gate: Gate) -> tuple[Tensor, Tensor]:
        part = draws.intervention(seed, n_blocks, rank, gate)
        R, A, b = part.R.detach(), part.A.detach(), part.b.detach()
        turned = SubspaceIntervention(Q @ R, Q @ A, (Q @ b.unsqueeze(-1)).squeeze(-1), gate)
        return part.delta(h)[0], turned.delta(h)[0]

    one, other = pair(OpenGate(n_blocks, rank))
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    one, other = pair(draws.logistic_gate(seed, n_blocks, rank))  # control
    assert not torch.allclose(one, other, rtol=0, atol=1e-6)


# --- gradients ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_blocks", [1, 2])
def test_gradients(kind: int, n_blocks: int) -> None:
    """Through R, A, b, the state, and the parameters of a gate that has some."""
    part = draws.intervention(3, n_blocks, 2, draws.gates(3, n_blocks, 2)[kind])
    h = states_of(3, 2).requires_grad_()
    learned = tuple(part.parameters())
    assert len(learned) == (5 if isinstance(part.gate, ConditionedGate) else 3)
    assert torch.autograd.gradcheck(lambda *_: part.delta(h)[0], (*learned, h))


LOSSES = {
    "linear": lambda out: (out * states_of(8)).sum(),
    "square": lambda out: out.square().mean(),
    "cross-entropy": lambda out: torch.nn.functional.cross_entropy(
        (3 * out) @ draws.normal(9, D, 11), torch.arange(5)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_at_the_start_the_bases_get_minus_the_readout_s_gradient(kind: int, loss: str) -> None:
    """The residual is zero there: the gates get nothing, and R what A gets, negated, under any loss."""
    gate = draws.gates(2, 2, 3)[kind]
    part = SubspaceIntervention.identity(
        2, 3, D, gate, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    h = states_of(1)

    def gradients() -> list[Tensor]:
        part.zero_grad()
        LOSSES[loss](h + part.delta(h)[0]).backward()
        return [p.grad.clone() for p in part.parameters() if p.grad is not None]

    of_R, of_A, of_b, *of_gate = gradients()
    assert float(of_A.norm()) > 1e-3
    assert float(of_b.norm()) > 1e-3
    assert torch.equal(of_R, -of_A)
    assert not any(gradient.any() for gradient in of_gate)
    with torch.no_grad():
        part.b += 0.1  # control: away from the start
    of_R, of_A, _, *of_gate = gradients()
    assert not torch.allclose(of_R, -of_A)
    assert all(gradient.any() for gradient in of_gate)


def test_bases_stay_orthonormal_through_training() -> None:
    """Adam on the tangent gradient, then a retraction, and the intervention learns what it is to do."""
    goal = states_of(5) + 1.0

    def train(*, retracted: bool) -> tuple[float, float, float]:
        gate = ConditionedGate(1, 3, mean=torch.zeros(D).double(), scale=torch.ones(D).double())
        generator = torch.Generator().manual_seed(0)
        part = SubspaceIntervention.identity(1, 3, D, gate, generator=generator, dtype=torch.float64)
        optimizer = torch.optim.Adam(part.parameters(), lr=3e-2)
        defects, losses = [], []
        for _ in range(40):
            optimizer.zero_grad()
            loss = (states_of(5) + part.delta(states_of(5))[0] - goal).square().mean()
            loss.backward()
            assert part.R.grad is not None
            part.R.grad = tangent(part.R.detach(), part.R.grad)
            optimizer.step()
            if retracted:
                part.R.data = retract(part.R.data)
            R = part.R.detach()[0]
            defects.append(float((R @ R.T - torch.eye(3)).abs().max()))
            losses.append(loss.item())
        return max(defects), losses[0], losses[-1]

    defect, first, last = train(retracted=True)
    assert defect < 1e-14
    assert last < 0.5 * first
    assert train(retracted=False)[0] > 1e-3  # control


# --- copies and sums ---


@quick
@given(draws.seeds, draws.shapes, st.sampled_from(KINDS))
def test_frozen_is_the_same_function_in_memory_of_its_own(
    seed: int, shape: tuple[int, int], kind: int
) -> None:
    part = draws.intervention(seed, *shape, draws.gates(seed, *shape)[kind])
    frozen, h = part.frozen(), states_of(seed)
    before, w = frozen.delta(h)
    assert not isinstance(frozen.gate, ConditionedGate)
    assert not before.requires_grad
    assert not any(p.requires_grad for p in frozen.parameters())
    torch.testing.assert_close(before, part.delta(h)[0].detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(w, part.delta(h)[1].detach(), rtol=0, atol=1e-12)

    def memory(module: SubspaceIntervention) -> set[int]:
        tensors = [*module.parameters(), *module.buffers()]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    assert not memory(part) & memory(frozen)
    alias = SubspaceIntervention(part.R.data, part.A.data, part.b.data, part.gate)  # control
    assert memory(part) == memory(alias)
    with torch.no_grad():
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.fill_(7.0)
    assert torch.equal(frozen.delta(h)[0], before)


@quick
@given(draws.seeds, st.lists(st.integers(1, 2), min_size=1, max_size=3), st.sampled_from([0, 1, 2]))
def test_concatenate_is_the_sum_of_its_parts(seed: int, blocks: list[int], kind: int) -> None:
    parts = [
        draws.intervention(seed + i, n, 3, draws.gates(seed + i, n, 3)[kind]) for i, n in enumerate(blocks)
    ]
    whole, h = concatenate(parts), states_of(seed)
    assert whole.n_blocks == sum(blocks)
    change, w = whole.delta(h)
    each = [part.delta(h) for part in parts]
    total = sum((delta for delta, _ in each), torch.zeros_like(h)).detach()
    torch.testing.assert_close(change, total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(w, torch.cat([w for _, w in each], dim=1), rtol=0, atol=1e-14)
    together, is_open = intervene([whole], h)
    apart, is_open_apart = intervene(parts, h)
    torch.testing.assert_close(together, apart.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(is_open, is_open_apart)
    once, twice = change, concatenate([*parts, parts[0]]).delta(h)[0]  # control: one part counted twice
    assert torch.allclose(once, twice, rtol=0, atol=1e-9) == (not parts[0].delta(h)[1].any())


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(lambda: (OpenGate(1, 2), draws.logistic_gate(0, 1, 2)), id="open and logistic"),
        pytest.param(lambda: (draws.logistic_gate(0, 1, 2), OpenGate(1, 2)), id="logistic and open"),
        pytest.param(
            lambda: (draws.logistic_gate(0, 1, 2), draws.logistic_gate(0, 1, 2, threshold=0.1)),
            id="two thresholds",
        ),
        pytest.param(lambda: (draws.conditioned_gate(0, 1, 2),), id="not folded"),
    ],
)
def test_gates_that_differ_are_not_concatenated(kinds: Callable[[], tuple[Gate, ...]]) -> None:
    """An open gate in front once made the others open too, and the first threshold was everyone's."""
    with pytest.raises(AssertionError, match="gate"):
        concatenate([draws.intervention(0, 1, 2, gate) for gate in kinds()])


# --- states that come back bit for bit ---


def awkward(dtype: torch.dtype) -> Tensor:
    """Rows of zeros of both signs, of the largest and the smallest numbers there are, and ordinary ones."""
    limits = torch.finfo(dtype)
    rows = torch.randn(8, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[0] = -0.0
    rows[1, ::2] = -0.0
    rows[2] = limits.max
    rows[3] = limits.min
    rows[4] = limits.smallest_normal
    rows[5] = -limits.smallest_normal / 2  # subnormal
    return rows


def one_way(threshold: float, dtype: torch.dtype = torch.float32) -> LogisticGate:
    """Opens by the first coordinate alone: at 10 and above, not at 5 and below."""
    U = torch.zeros(1, 3, D, dtype=dtype)
    U[..., 0] = 2.0
    return LogisticGate(U, torch.full((1, 3), -15.0, dtype=dtype), threshold=threshold)


def shut(threshold: float) -> LogisticGate:
    return LogisticGate(torch.zeros(1, 3, D), torch.full((1, 3), -15.0), threshold=threshold)


@pytest.mark.parametrize("dtype", halves)
def test_closed_states_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    h = awkward(dtype)
    parts = [draws.intervention(seed, 1, 3, shut(0.1), dtype=torch.float32) for seed in (0, 10)]
    out, is_open = intervene(parts, h)
    assert out.dtype == dtype
    assert not is_open.any()
    assert torch.equal(bits(out), bits(h))
    # Controls: adding a change of zero loses the sign of zero, and without the hard zero the gate leaks.
    added = (h.float() + torch.zeros(D)).to(dtype)
    assert not torch.equal(bits(added), bits(h))
    leaky = draws.intervention(0, 1, 3, LogisticGate(torch.zeros(1, 3, D), torch.full((1, 3), -3.0)))
    leaky = leaky.float()
    out, is_open = intervene([leaky], h)
    assert is_open.all()
    assert not torch.equal(bits(out), bits(h))


@pytest.mark.parametrize("dtype", halves)
def test_only_open_states_change(dtype: torch.dtype) -> None:
    h = torch.randn(6, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    h[1, 0] = h[4, 0] = 10.0
    h[2] = -0.0
    parts = [
        draws.intervention(0, 1, 3, one_way(0.1), dtype=torch.float32),
        draws.intervention(10, 1, 3, shut(0.1), dtype=torch.float32),
    ]
    out, is_open = intervene(parts, h)
    assert is_open.tolist() == [False, True, False, False, True, False]
    assert torch.equal(bits(out[~is_open]), bits(h[~is_open]))
    expected = (h.float() + parts[0].delta(h.float())[0].detach()).to(dtype)
    torch.testing.assert_close(out[is_open], expected[is_open], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert not (out[is_open] == h[is_open]).all(-1).any()
    assert torch.equal(intervene([parts[1], parts[0]], h)[1], is_open)  # whichever part it is that opens


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", halves)
def test_what_is_not_finite_stays_out_of_closed_states(dtype: torch.dtype, poison: float) -> None:
    h = awkward(dtype)[4:].clone()
    h[3, 0] = 10.0
    part = draws.intervention(0, 1, 3, one_way(0.1), dtype=torch.float32)
    with torch.no_grad():
        part.b.fill_(poison)
    assert not part.delta(h.float())[0].isfinite().any()  # control: it is in every row of the change
    out, is_open = intervene([part], h)
    assert is_open.tolist() == [False, False, False, True]
    assert torch.equal(bits(out[:3]), bits(h[:3]))
    assert not out[3].isfinite().any()


def test_huge_states_whose_logits_overflow_come_back() -> None:
    h = torch.full((2, D), torch.finfo(torch.float32).max)
    part = draws.intervention(0, 1, 3, draws.logistic_gate(0, 1, 3, threshold=0.1, dtype=torch.float32))
    part = part.float()
    part.gate.U[..., 0], part.gate.U[..., 1] = 5.0, -5.0  # infinity less infinity
    part.gate.U[..., 2:] = 0.0
    assert not part.delta(h)[0].isfinite().any()
    assert torch.equal(intervene([part], h)[0], h)


def test_no_gradient_reaches_a_closed_gate_s_bases() -> None:
    part = draws.intervention(0, 1, 3, shut(0.1), dtype=torch.float32)
    h = torch.ones(2, D, requires_grad=True)
    intervene([part], h)[0].sum().backward()
    assert h.grad is not None
    assert torch.equal(h.grad, torch.ones(2, D))  # the state itself passes
    assert part.R.grad is not None
    assert not part.R.grad.any()


# --- what the method's theory rests on ---


@quick
@given(draws.seeds, draws.shapes, st.sampled_from(KINDS))
def test_the_widest_gate_bounds_the_change(seed: int, shape: tuple[int, int], kind: int) -> None:
    """`|delta(h)| <= max_k w_k(h) |A h + b - R h|` a block, because the rows of R are orthonormal."""
    part = draws.intervention(seed, *shape, draws.gates(seed, *shape)[kind])
    h = states_of(seed)

    def bound_and_change(part: SubspaceIntervention) -> tuple[Tensor, Tensor]:
        change, w = part.delta(h)
        bound = (w.amax(-1) * residuals(part, h).norm(dim=-1)).sum(-1)
        return bound.detach(), change.detach().norm(dim=-1)

    bound, change = bound_and_change(part)
    assert (change <= bound * (1 + 1e-12) + 1e-15).all()
    one = draws.intervention(seed, 1, shape[1], OpenGate(1, shape[1]))
    bound, change = bound_and_change(one)
    torch.testing.assert_close(change, bound, rtol=1e-12, atol=1e-12)  # LoReFT reaches it
    R, A = one.R.detach(), one.A.detach()
    longer = SubspaceIntervention(3 * R, A + 2 * R, one.b.detach(), one.gate)  # the same A h + b - R h
    bound, change = bound_and_change(longer)
    torch.testing.assert_close(change, 3 * bound, rtol=1e-12, atol=1e-12)  # control: rows of length three


@quick
@given(draws.seeds, st.integers(1, 4))
def test_an_open_change_is_affine_and_a_gated_one_is_not(seed: int, rank: int) -> None:
    """`delta(h) = delta(h_e) + H (h - h_e)` with `H = R^T (A - R)`, whose norm is that of `A - R`."""
    h, h_e = states_of(seed), states_of(seed + 1, 1)

    def error(gate: Gate) -> float:
        part = draws.intervention(seed, 1, rank, gate)
        H = (part.R.mT @ (part.A - part.R)).detach()[0]
        affine = part.delta(h_e)[0] + (h - h_e) @ H.T
        return float((part.delta(h)[0] - affine).detach().norm())

    assert error(OpenGate(1, rank)) < 1e-11
    assert error(draws.logistic_gate(seed, 1, rank)) > 1e-4  # control


@quick
@given(draws.seeds, st.integers(1, 4))
@example(44390, 1)  # an edit that hardly pushes
def test_around_an_open_edit_every_state_is_pushed(seed: int, rank: int) -> None:
    """`|delta(h)| >= D - sigma |h - h_e|`, `D = |delta(h_e)|`, `sigma = |A - R|`: the paper's trade-off."""
    h_e = states_of(seed, 1)
    part = draws.intervention(seed, 1, rank, OpenGate(1, rank))
    difference = (part.A - part.R).detach()[0]
    H = part.R.detach()[0].T @ difference
    sigma = torch.linalg.matrix_norm(difference, 2)
    torch.testing.assert_close(torch.linalg.matrix_norm(H, 2), sigma, rtol=1e-12, atol=0)
    eye = torch.eye(D, dtype=torch.float64)
    assert float(torch.linalg.matrix_norm(eye + H, 2)) >= 1 - 1e-12  # since rank H < d
    pushed = part.delta(h_e)[0].detach().norm()
    h = h_e + draws.normal(seed + 3, 50, D) * torch.logspace(-6, 0, 50, dtype=torch.float64).unsqueeze(1)
    floor = pushed - sigma * (h - h_e).norm(dim=-1)
    assert (part.delta(h)[0].detach().norm(dim=-1) >= floor - 1e-12).all()
    assert (floor > 0).any()
    # Control: a steep gate, open at h_e and shut half way to where the floor ends.
    away = draws.orthonormal(seed + 4, 1, 1, D)[0, 0]
    distance = float(pushed / sigma) / 2
    u, near = 40 / distance * away, h_e - distance * away
    gate = LogisticGate(u.expand(1, rank, D), (20 - u @ h_e[0]).expand(1, rank))
    gated = draws.intervention(seed, 1, rank, gate)
    at_edit, at_neighbor = (float(gated.delta(x)[0].detach().norm()) for x in (h_e, near))
    assert at_edit == pytest.approx(float(pushed), rel=1e-6)
    assert float(part.delta(near)[0].detach().norm()) >= float(pushed) / 2 - 1e-12
    assert at_neighbor < 1e-6 * float(pushed)


def test_a_full_rank_change_may_contract_everything() -> None:
    """Why the bound `|I + H| >= 1` asks for rank H < d."""
    R = draws.orthonormal(0, 1, D, D)
    H = R[0].T @ (torch.zeros(D, D, dtype=torch.float64) - R[0])
    assert float(torch.linalg.matrix_norm(torch.eye(D, dtype=torch.float64) + H, 2)) < 1e-14


# --- sizes ---


@pytest.mark.parametrize(
    ("rank", "gated", "expected"), [(12, True, 589_920), (12, False, 393_264), (18, False, 589_896)]
)
def test_sizes_on_llama_2_7b(rank: int, gated: bool, expected: int) -> None:
    d_model, n_layers = 4096, 4
    assert n_parameters(d_model=d_model, rank=rank, n_layers=n_layers, gated=gated) == expected
    on_meta = torch.ones(d_model, device="meta")
    gate = ConditionedGate(1, rank, mean=on_meta, scale=on_meta) if gated else OpenGate(1, rank)
    part = SubspaceIntervention.identity(
        1, rank, d_model, gate, generator=torch.Generator().manual_seed(0), device="meta"
    )
    assert {p.device.type for p in part.parameters()} == {"meta"}
    assert n_layers * sum(p.numel() for p in part.parameters()) == expected


@quick
@given(st.integers(1, 6), st.integers(6, 9), st.integers(1, 3), st.booleans())
def test_sizes_are_those_of_the_modules(rank: int, d_model: int, n_layers: int, gated: bool) -> None:
    ones = torch.ones(d_model)
    gate = ConditionedGate(1, rank, mean=ones, scale=ones) if gated else OpenGate(1, rank)
    part = SubspaceIntervention.identity(1, rank, d_model, gate, generator=torch.Generator().manual_seed(0))
    built = n_layers * sum(p.numel() for p in part.parameters())
    assert n_parameters(d_model=d_model, rank=rank, n_layers=n_layers, gated=gated) == built
    assert n_parameters(d_model=d_model, rank=rank, n_layers=n_layers, gated=not gated) != built  # control


def test_a_gate_of_another_shape_is_not_stretched_over_the_bases() -> None:
    part = draws.intervention(0, 2, 3, OpenGate(1, 1))
    with pytest.raises(AssertionError, match="the gate has other blocks"):
        part.delta(states_of(0))


@pytest.mark.parametrize("rank", [0, D + 1])
def test_impossible_ranks_are_refused(rank: int) -> None:
    generator = torch.Generator()
    with pytest.raises(ConfigError, match=f"rank {rank} is impossible"):
        SubspaceIntervention.identity(1, rank, D, OpenGate(1, max(rank, 1)), generator=generator)
    with pytest.raises(ConfigError, match=f"rank {rank} is impossible"):
        random_orthonormal(1, rank, D, generator=generator, dtype=torch.float64)


# --- a block for every state ---


def dealt(seed: int, n_blocks: int, n: int) -> Tensor:
    """Blocks in any order; where there are several, the first changes no state at all."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(1, n_blocks - 1), n_blocks, (n,), generator=generator)


@quick
@given(draws.seeds, draws.shapes, st.sampled_from(KINDS), st.integers(1, 9))
def test_delta_each_equals_the_loop_over_the_block_s_own_bases(
    seed: int, shape: tuple[int, int], kind: int, n: int
) -> None:
    gate = draws.gates(seed, *shape)[kind]
    part = draws.intervention(seed, *shape, gate)
    h, blocks = states_of(seed, n), dealt(seed, shape[0], n)
    fast, w = part.delta_each(h, blocks)
    every = gate.weights(h)
    R, A, b = part.R.tolist(), part.A.tolist(), part.b.tolist()

    def slow(blocks: Tensor) -> Tensor:
        found = [
            loops.delta(x, [R[i]], [A[i]], [b[i]], [w_x[i]])
            for x, i, w_x in zip(h.tolist(), blocks.tolist(), every.tolist(), strict=True)
        ]
        return torch.tensor(found, dtype=torch.float64)

    torch.testing.assert_close(fast, slow(blocks), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(w, every[torch.arange(n), blocks], rtol=1e-12, atol=1e-14)
    soft = gate.soft(h)[torch.arange(n), blocks]
    torch.testing.assert_close(part.soft_each(h, blocks), soft, rtol=1e-12, atol=1e-14)
    if shape[0] > 1 and kind == 0:  # control: another block's bases make another change
        assert not torch.allclose(fast, slow((blocks + 1) % shape[0]), rtol=0, atol=1e-6)


@quick
@given(draws.seeds, draws.shapes, st.sampled_from(KINDS))
def test_gradients_of_blocks_apart_are_those_of_each_alone(
    seed: int, shape: tuple[int, int], kind: int
) -> None:
    gate = draws.gates(seed, *shape)[kind]
    part = draws.intervention(seed, *shape, gate)
    h, blocks = states_of(seed, 8), dealt(seed, shape[0], 8)
    push = draws.normal(seed + 7, 8, D)
    names = [name for name, _ in part.named_parameters()]
    together = torch.autograd.grad((part.delta_each(h, blocks)[0] * push).sum(), list(part.parameters()))
    for i in range(shape[0]):
        alone, mine = part.select(torch.tensor([i])), blocks == i
        assert [name for name, _ in alone.named_parameters()] == names
        each = torch.autograd.grad((alone.delta(h[mine])[0] * push[mine]).sum(), list(alone.parameters()))
        for all_of_them, one in zip(together, each, strict=True):
            torch.testing.assert_close(all_of_them[i : i + 1], one, rtol=1e-12, atol=1e-12)
            assert mine.any() or not one.any()


@quick
@given(draws.seeds, draws.shapes, st.sampled_from(KINDS))
def test_selected_blocks_are_the_same_function_in_memory_of_their_own(
    seed: int, shape: tuple[int, int], kind: int
) -> None:
    gate = draws.gates(seed, *shape)[kind]
    part = draws.intervention(seed, *shape, gate)
    order = torch.arange(shape[0] - 1, -1, -1).repeat(2)
    kept, h = part.select(order), states_of(seed)
    assert torch.equal(kept.R, part.R[order])
    torch.testing.assert_close(kept.gate.soft(h), gate.soft(h)[:, order], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(kept.gate.weights(h), gate.weights(h)[:, order], rtol=1e-12, atol=1e-14)
    assert kept.R.requires_grad == kept.A.requires_grad == part.R.requires_grad
    assert not part.select(order).requires_grad_(False).select(order).R.requires_grad
    mine = {one.data_ptr() for one in [*part.parameters(), *part.buffers()]}
    of_blocks = [kept.R, kept.A, kept.b, *kept.gate.parameters()]
    of_blocks += [kept.gate.U, kept.gate.c] if isinstance(kept.gate, LogisticGate) else []
    assert not mine & {one.data_ptr() for one in of_blocks}
    before = part.delta(h)[0]
    with torch.no_grad():
        for one in of_blocks:
            one.add_(1.0)
    assert torch.equal(part.delta(h)[0], before)
    changed = kept.delta(h)[0]  # control
    assert not torch.allclose(changed, part.select(order).delta(h)[0], rtol=0, atol=1e-9)


@quick
@given(draws.seeds, st.sampled_from(KINDS))
def test_one_block_for_each_state_acts_beside_what_acts_on_all(seed: int, kind: int) -> None:
    own = draws.intervention(seed, 3, 2, draws.gates(seed, 3, 2)[kind])
    beside = draws.intervention(seed + 20, 2, 2, draws.logistic_gate(seed + 20, 2, 2, threshold=0.5))
    h = states_of(seed, 6)
    blocks = torch.tensor([2, 0, 2, 2, 0, 0])
    got, is_open = intervene([beside], h, (own, blocks))
    for i in range(6):
        alone = own.select(blocks[i : i + 1])
        want, was_open = intervene([beside, alone], h[i : i + 1])
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-12, atol=1e-12)
        assert bool(is_open[i]) == bool(was_open)
        if not is_open[i]:
            assert torch.equal(got[i], h[i])
    without, _ = intervene([beside], h)
    if kind == 0:
        assert not torch.allclose(got, without, rtol=0, atol=1e-6)  # control


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_at_which_their_own_block_is_shut_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    c = torch.tensor([[-30.0], [30.0]])
    gate = LogisticGate(torch.zeros(2, 1, D), c, threshold=0.5)
    part = SubspaceIntervention.identity(2, 1, D, gate, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        part.b.fill_(5.0)
    h = draws.normal(3, 4, D).to(dtype)
    got, is_open = intervene([], h, (part, torch.tensor([0, 1, 0, 1])))
    assert got.dtype == dtype
    assert is_open.tolist() == [False, True, False, True]
    assert torch.equal(bits(got[::2]), bits(h[::2]))
    assert (bits(got[1::2]) != bits(h[1::2])).any(-1).all()  # control
