"""Background statistics, against loops, and the gates set by them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baft.nn.gates import closed_form_gate
from baft.nn.whitening import Whitening
from references import draws, loops

quick = settings(max_examples=30, deadline=None)


def shrunk(whitening: Whitening) -> torch.Tensor:
    return whitening.factor @ whitening.factor.T


@quick
@given(draws.seeds, st.integers(2, 30), st.floats(0.01, 1))
def test_fit_equals_the_loop(seed: int, n_states: int, shrinkage: float) -> None:
    """Fewer states than dimensions included: there the covariance alone has no inverse."""
    states, weights = draws.normal(seed, n_states, 5) + 3, 0.1 + draws.normal(seed + 1, n_states).abs()
    whitening = Whitening.fit(states, weights, shrinkage=shrinkage)
    mean, covariance = loops.weighted_moments(states.tolist(), weights.tolist())
    slow = torch.tensor(covariance, dtype=torch.float64)
    slow = (1 - shrinkage) * slow + shrinkage * slow.diagonal().diag()
    assert whitening.mean.tolist() == pytest.approx(mean, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(shrunk(whitening), slow, rtol=1e-10, atol=1e-12)
    evenly = Whitening.fit(states, torch.ones(n_states).double(), shrinkage=shrinkage)  # control
    assert not torch.allclose(evenly.mean, whitening.mean, rtol=0, atol=1e-6)


@quick
@given(draws.seeds, st.floats(1e-3, 1e3))
def test_only_the_proportions_of_the_weights_count(seed: int, factor: float) -> None:
    states = draws.normal(seed, 8, 4)
    counts = torch.tensor([1.0, 2.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    whitening = Whitening.fit(states, factor * counts, shrinkage=0.1)
    repeated = states.repeat_interleave(counts.long(), dim=0)
    evenly = Whitening.fit(repeated, torch.ones(len(repeated)).double(), shrinkage=0.1)
    torch.testing.assert_close(whitening.mean, evenly.mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(shrunk(whitening), shrunk(evenly), rtol=1e-11, atol=1e-13)


def test_coarse_states_are_summed_in_float64() -> None:
    """Weights divided in float32 do not sum to one, which a huge mean shows."""
    states = (1e4 + draws.normal(0, 300, 4)).float()
    weights = (0.1 + draws.normal(1, 300).abs()).float()
    whitening = Whitening.fit(states, weights, shrinkage=0.1)
    exact = Whitening.fit(states.double(), weights.double(), shrinkage=0.1)
    assert whitening.mean.dtype == whitening.factor.dtype == torch.float64
    assert torch.equal(whitening.mean, exact.mean)
    assert torch.equal(whitening.factor, exact.factor)
    coarse = (weights / weights.sum()).double() @ states.double()  # control
    assert float((coarse - exact.mean).abs().max()) > 1e-6


def test_a_dimension_without_variance_is_survived() -> None:
    states = draws.normal(0, 20, 4)
    states[:, 2] = 1.0
    whitening = Whitening.fit(states, torch.ones(20).double(), shrinkage=0.1)
    assert whitening.factor.isfinite().all()
    with pytest.raises(torch.linalg.LinAlgError):  # control
        torch.linalg.cholesky(states[:5].T.cov())


@quick
@given(draws.seeds, st.integers(1, 3))
def test_its_gate_is_the_closed_form(seed: int, n_keys: int) -> None:
    d_model = 6
    states, keys = 5 + draws.normal(seed, 50, d_model), draws.normal(seed + 1, n_keys, d_model)
    whitening = Whitening.fit(states, torch.ones(50).double(), shrinkage=0.2)
    u, c = whitening.gate(keys, sharpness=12.0, midpoint=0.5)
    precision_keys = torch.linalg.solve(shrunk(whitening), (keys - whitening.mean).T).T
    expected_u, expected_c = closed_form_gate(
        keys, whitening.mean, precision_keys, sharpness=12.0, midpoint=0.5
    )
    torch.testing.assert_close(u, expected_u, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(c, expected_c, rtol=1e-7, atol=1e-7)
    assert (keys @ u + c).tolist() == pytest.approx([6.0] * n_keys, abs=0.1)
    assert float((states @ u + c).mean()) == pytest.approx(-6.0, abs=1e-9)
    assert math.isfinite(float(whitening.gate(keys.float(), sharpness=1.0, midpoint=0.5)[1]))
