"""The gates: against loops, at their hard zero, under an optimizer, and set in closed form."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from baft.errors import ConfigError
from baft.nn.gates import ConditionedGate, LogisticGate, OpenGate, closed_form_gate, hard_zero
from references import draws, loops

quick = settings(max_examples=30, deadline=None)
thresholds = st.floats(0.001, 0.999)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


# --- the formula ---


@quick
@given(draws.seeds, draws.shapes, st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_logistic_gate_equals_the_loop(seed: int, shape: tuple[int, int], threshold: float) -> None:
    gate = draws.logistic_gate(seed, *shape, threshold=threshold)
    states = draws.normal(seed + 5, 3, draws.D_MODEL)

    def slow(threshold: float) -> Tensor:
        blocks = [
            [
                loops.logistic(h, U, c, threshold)
                for U, c in zip(gate.U.tolist(), gate.c.tolist(), strict=True)
            ]
            for h in states.tolist()
        ]
        return torch.tensor(blocks, dtype=torch.float64)

    torch.testing.assert_close(gate.soft(states), slow(0.0), rtol=0, atol=1e-13)
    torch.testing.assert_close(gate.weights(states), slow(threshold), rtol=0, atol=1e-12)


@quick
@given(draws.seeds, draws.shapes)
def test_conditioned_gate_equals_the_loop(seed: int, shape: tuple[int, int]) -> None:
    gate = draws.conditioned_gate(seed, *shape)
    scale = (0.5 + draws.normal(seed, draws.D_MODEL).abs()).tolist()
    states = draws.normal(seed + 5, 3, draws.D_MODEL)
    slow = [
        [
            loops.conditioned(h, V, v, gate.mean.tolist(), scale)
            for V, v in zip(gate.V.tolist(), gate.v.tolist(), strict=True)
        ]
        for h in states.tolist()
    ]
    torch.testing.assert_close(gate.soft(states), torch.tensor(slow, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(gate.weights(states), gate.soft(states))


@quick
@given(draws.seeds, draws.shapes)
def test_states_of_any_batch_shape(seed: int, shape: tuple[int, int]) -> None:
    flat = draws.normal(seed, 6, draws.D_MODEL)
    for gate in draws.gates(seed, *shape):
        one_by_one = torch.stack([gate.weights(h) for h in flat]).detach()
        assert one_by_one.shape == (6, *shape)
        assert float(one_by_one.min()) >= 0
        assert float(one_by_one.max()) <= 1
        in_batch = gate.weights(flat.unflatten(0, (2, 3))).flatten(0, 1).detach()
        torch.testing.assert_close(in_batch, one_by_one, rtol=0, atol=1e-13)


@dtypes
def test_an_open_gate_is_one_everywhere(dtype: torch.dtype) -> None:
    gate = OpenGate(2, 3)
    w = gate.weights(torch.full((4, 7), torch.inf, dtype=dtype))
    assert torch.equal(w, torch.ones(4, 2, 3, dtype=dtype))
    assert not list(gate.parameters())


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 1.5, float("nan")])
def test_impossible_thresholds_are_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"threshold must lie in \[0, 1\), got"):
        draws.logistic_gate(0, 1, 2, threshold=threshold)


# --- the hard zero ---


@dtypes
@quick
@given(thresholds)
@example(0.1)
@example(0.998046875)  # one in bfloat16
@example(0.99)
def test_the_hard_zero_is_exact_at_both_ends(dtype: torch.dtype, threshold: float) -> None:
    at = torch.tensor(threshold, dtype=dtype)
    w = torch.cat([torch.zeros(1, dtype=dtype), at.expand(1), at.expand(1) / 2, torch.ones(1, dtype=dtype)])
    lowest, at_threshold, below, highest = hard_zero(w, threshold).tolist()
    assert lowest == at_threshold == below == 0.0
    assert highest == (1.0 if at < 1 else 0.0)  # a coarse precision may round the threshold up to one


@quick
@given(thresholds, st.floats(0, 1), st.floats(0, 1))
def test_the_hard_zero_is_monotone_and_continuous(threshold: float, one: float, other: float) -> None:
    w = torch.tensor(sorted((one, other)), dtype=torch.float64)
    low, high = hard_zero(w, threshold).tolist()
    assert 0 <= low <= high <= 1
    rise = float(w[1] - w[0]) / (1 - threshold)
    assert high - low <= rise + 1e-9  # Lipschitz, so without a jump
    around = torch.tensor([threshold, threshold + 1e-9], dtype=torch.float64)
    assert float(hard_zero(around, threshold).diff()) < 2e-9 / (1 - threshold)
    cut_off = torch.where(around > threshold, around, 0)  # control: zero up to the threshold, then the weight
    assert float(cut_off.diff()) >= threshold


def test_without_a_threshold_nothing_is_touched() -> None:
    w = draws.normal(0, 5)
    assert hard_zero(w, 0.0) is w


# --- conditioning ---


@quick
@given(draws.seeds, draws.shapes)
def test_fold_is_the_same_function_and_load_its_inverse(seed: int, shape: tuple[int, int]) -> None:
    gate = draws.conditioned_gate(seed, *shape)
    states = 10 * draws.normal(seed + 5, 8, draws.D_MODEL)
    folded = gate.fold()
    assert folded.threshold == 0
    assert not folded.U.requires_grad
    assert not folded.c.requires_grad
    torch.testing.assert_close(folded.weights(states), gate.weights(states), rtol=0, atol=1e-11)
    unshifted = LogisticGate(folded.U, gate.v.detach())  # control: the mean left out of the intercept
    assert not torch.allclose(unshifted.weights(states), gate.weights(states), rtol=0, atol=1e-6)

    back = draws.conditioned_gate(seed + 9, *shape)
    assert not torch.allclose(back.V, gate.V)
    back.load(folded)
    assert back.V.requires_grad
    torch.testing.assert_close(back.weights(states), gate.weights(states), rtol=0, atol=1e-10)
    refolded = back.fold()
    torch.testing.assert_close(refolded.U, folded.U, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(refolded.c, folded.c, rtol=1e-11, atol=1e-11)


def test_a_folded_gate_does_not_follow_further_training() -> None:
    gate = draws.conditioned_gate(0, 1, 2)
    states = draws.normal(1, 4, draws.D_MODEL)
    folded = gate.fold()
    before = folded.weights(states)
    with torch.no_grad():
        gate.V.zero_()
        gate.v.fill_(1)
        gate.mean.zero_()
        gate.stretch.zero_()
    assert torch.equal(folded.weights(states), before)


def test_a_hard_zero_is_not_lost_in_loading() -> None:
    with pytest.raises(AssertionError, match="hard zero"):
        draws.conditioned_gate(0, 1, 2).load(draws.logistic_gate(0, 1, 2, threshold=0.1))


def test_a_step_of_adam_throws_the_raw_gate_but_not_the_conditioned() -> None:
    """The reason for conditioning: states that share a huge mean, and one step of 1e-2 to shut the gate."""
    d_model, step = 64, 1e-2
    scale = 0.5 + draws.normal(0, d_model).abs()
    mean = draws.normal(1, d_model)
    mean[:4] *= 1000  # as residual streams have them
    states = mean + scale * draws.normal(2, 200, d_model)
    raw = LogisticGate(
        torch.zeros(1, 3, d_model, dtype=torch.float64).requires_grad_(),
        torch.zeros(1, 3, dtype=torch.float64).requires_grad_(),
    )
    conditioned = ConditionedGate(1, 3, mean=mean, scale=scale)

    def jump(gate: LogisticGate | ConditionedGate, learned: list[Tensor]) -> Tensor:
        optimizer = torch.optim.Adam(learned, lr=step)
        assert torch.equal(gate.soft(states), torch.full((200, 1, 3), 0.5, dtype=torch.float64))
        gate.soft(states).square().mean().backward()
        optimizer.step()
        return gate.soft(states).detach().clamp(1e-300, 1 - 1e-16).logit().abs()

    thrown = jump(raw, [raw.U, raw.c])
    moved = jump(conditioned, list(conditioned.parameters()))
    assert float(thrown.min()) > 9
    assert float(moved.max()) < 0.2
    assert float(moved.max()) < step * (d_model**0.5 * 2 + 1)  # |z| is about one, so at most sqrt(d) in sum


# --- the closed form ---


def background(seed: int, d_model: int) -> tuple[Tensor, Tensor]:
    """States of unequal spread in correlated directions around a mean far from zero, and their covariance."""
    mixing = draws.normal(seed, d_model, d_model) * torch.logspace(-1, 1, d_model, dtype=torch.float64)
    states = draws.normal(seed + 1, 40 * d_model, d_model) @ mixing + 20 * draws.normal(seed + 2, d_model)
    return states, states.T.cov(correction=0)


@quick
@given(draws.seeds, st.integers(1, 4), st.floats(0.5, 20), st.floats(0.1, 0.9))
def test_closed_form_gate(seed: int, n_keys: int, sharpness: float, midpoint: float) -> None:
    d_model = 6
    states, covariance = background(seed, d_model)
    mean = states.mean(0)
    keys = mean + states.std(0) * draws.normal(seed + 3, n_keys, d_model)
    offsets = keys - mean
    precision_keys = torch.linalg.solve(covariance, offsets.T).T
    u, c = closed_form_gate(keys, mean, precision_keys, sharpness=sharpness, midpoint=midpoint)
    g = u / sharpness

    # One at every key, zero on average on background, and the logit is what the docstring says.
    # The tolerances are those of the ridge, 1e-6 of the Gram matrix of the keys.
    gram = precision_keys @ offsets.T
    slack = 1e-5 * float(torch.linalg.cond(gram))
    torch.testing.assert_close(offsets @ g, torch.ones(n_keys, dtype=torch.float64), rtol=0, atol=slack)
    assert float((states - mean).mean(0) @ g) == pytest.approx(0, abs=1e-9 * float(g.abs().sum()))
    logits = sharpness * ((states - mean) @ g - midpoint)
    torch.testing.assert_close(states @ u + c, logits, rtol=1e-9, atol=1e-7)

    # The direct solution of: least g^T S g under g^T D = 1, by its Lagrange conditions.
    zero = torch.zeros(n_keys, n_keys, dtype=torch.float64)
    conditions = torch.cat([torch.cat([covariance, offsets.T], 1), torch.cat([offsets, zero], 1)])
    sought = torch.cat([torch.zeros(d_model, dtype=torch.float64), torch.ones(n_keys, dtype=torch.float64)])
    direct = torch.linalg.solve(conditions, sought)[:d_model]
    deviation = g - direct
    variance = float(direct @ covariance @ direct)
    assert float(deviation @ covariance @ deviation) < slack**2 * variance + 1e-18

    # No other direction that meets the constraints has a smaller variance on the background.
    for competitor in draws.normal(seed + 4, 20, d_model):
        correction = torch.linalg.lstsq(offsets, 1 - offsets @ competitor, driver="gelsd").solution
        other = competitor + correction
        torch.testing.assert_close(offsets @ other, torch.ones_like(other[:n_keys]), rtol=0, atol=1e-8)
        assert float(other @ covariance @ other) > variance * (1 - 1e-9)
    naive = torch.linalg.lstsq(offsets, torch.ones_like(direct[:n_keys]), driver="gelsd").solution
    assert float(naive @ covariance @ naive) > variance  # control: the shortest direction is not the quietest


def test_for_one_key_it_is_fishers_discriminant() -> None:
    states, covariance = background(0, 6)
    mean, key = states.mean(0), 3 * draws.normal(5, 1, 6)
    fisher = torch.linalg.solve(covariance, (key - mean)[0])
    fisher = fisher / (fisher @ (key - mean)[0])
    u, c = closed_form_gate(key, mean, fisher.unsqueeze(0), sharpness=12.0, midpoint=0.5)
    torch.testing.assert_close(u, 12 * fisher, rtol=1e-5, atol=0)
    gate = LogisticGate(u.reshape(1, 1, -1), c.reshape(1, 1), threshold=0.2)
    assert float(gate.soft(key)) == pytest.approx(1 / (1 + torch.e**-6), rel=1e-4)
    assert float(gate.soft(mean)) == pytest.approx(1 / (1 + torch.e**6), rel=1e-4)
    assert float(gate.weights(mean)) == 0.0


def test_keys_of_very_unequal_distance_all_score_one() -> None:
    """A ridge of one size for all keys drowned the near one: it scored 0.17."""
    keys = draws.normal(0, 2, 16)
    keys[0] *= 1000
    nothing = torch.zeros(16, dtype=torch.float64)
    u, c = closed_form_gate(keys, nothing, keys.clone(), sharpness=1.0, midpoint=0.0)
    assert (keys @ u + c).tolist() == pytest.approx([1, 1], abs=5e-3)
    gram = keys @ keys.T
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(2, dtype=torch.float64)
    drowned = torch.linalg.solve(gram + ridge, torch.ones(2, dtype=torch.float64)) @ keys  # control
    assert float(keys[1] @ drowned) < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_key_twice_is_that_key(dtype: torch.dtype) -> None:
    key, nothing = draws.normal(0, 1, 16, dtype=dtype), torch.zeros(16, dtype=dtype)
    once, _ = closed_form_gate(key, nothing, key.clone(), sharpness=3.0, midpoint=0.5)
    twice = key.repeat(2, 1)
    u, _ = closed_form_gate(twice, nothing, twice.clone(), sharpness=3.0, midpoint=0.5)
    torch.testing.assert_close(u, once, rtol=1e-5, atol=1e-6)
    assert float(torch.linalg.det(twice.double() @ twice.double().T)) == pytest.approx(
        0, abs=1e-6
    )  # singular
