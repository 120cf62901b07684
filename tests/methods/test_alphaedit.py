"""AlphaEdit's projection and closed form."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baft.errors import ConfigError
from baft.methods.alphaedit import AlphaEditEditor, null_space, projected_solution
from baft.methods.memit import solution
from baft.types import Edit, EditRequest

CONFIG = dataclasses.replace(
    AlphaEditEditor.preset("default"), max_steps=4, n_prefixes=1, n_key_prefixes=1, moments_tokens=500
)
FIRST = EditRequest((Edit("Paris is in", "R", subject="is in"), Edit("Nine hats of", "R", subject="hats of")))
SECOND = EditRequest((Edit("A river", "R", subject="river"),))


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    seed=st.integers(0, 1000), n_preserved=st.integers(1, 6), n=st.integers(1, 4), n_past=st.integers(0, 3)
)
def test_changes_annihilate_preserved_keys_and_solve_the_equation(seed, n_preserved, n, n_past):
    d_in = 9
    preserved, keys = normal(n_preserved, d_in, seed=seed), normal(n, d_in, seed=seed + 1)
    past, residuals = normal(n_past, d_in, seed=seed + 2), normal(n, 5, seed=seed + 3)
    P = null_space(preserved.T @ preserved / n_preserved, 1e-9)
    torch.testing.assert_close(P @ P, P, atol=1e-9, rtol=0.0)
    down = projected_solution(P, keys, past, 0.7)
    change = residuals.T @ down
    assert float((change @ preserved.T).abs().max()) < 1e-9
    unprojected = residuals.T @ solution(0.7 * torch.eye(d_in, dtype=P.dtype), keys)
    assert float((unprojected @ preserved.T).abs().max()) > 1e-4  # control
    # Equation 14 of the paper as it is written there.
    inner = past.T @ past @ P + keys.T @ keys @ P + 0.7 * torch.eye(d_in, dtype=P.dtype)
    torch.testing.assert_close(change, residuals.T @ keys @ P @ torch.linalg.inv(inner), atol=1e-9, rtol=1e-9)


def test_directions_are_free_below_the_threshold():
    P = null_space(torch.diag(torch.tensor([3.0, 0.5, 0.1], dtype=torch.float64)), 0.3)
    assert torch.equal(P, torch.diag(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)))


def test_a_threshold_is_a_number_or_counts_means_of_the_diagonal(host):
    def projection(threshold, unit):
        settings = {"threshold": threshold, "threshold_unit": unit}
        return AlphaEditEditor(host, dataclasses.replace(CONFIG, **settings)).projection(0)

    mean = float(AlphaEditEditor(host, CONFIG).moments(0).diagonal().mean())
    of_mean = projection(0.5, "mean")
    assert torch.equal(of_mean, projection(0.5 * mean, "absolute"))
    assert not torch.allclose(of_mean, projection(0.5, "absolute"), atol=1e-6)  # control


def test_an_editors_change_is_in_the_null_space_and_earlier_keys_count(host):
    editor = AlphaEditEditor(host, dataclasses.replace(CONFIG, threshold=0.5, l2=1e-3))
    editor.apply(FIRST)
    editor.apply(SECOND)
    state = editor.state_dict()
    for layer in editor.modules:
        P = editor.projection(layer)
        assert 0 < float(P.trace()) < len(P)
        for n in (0, 1):
            down = state[f"{n}.layer{layer}.down"]
            torch.testing.assert_close(down @ P, down, atol=1e-9, rtol=1e-9)
        keys, earlier = state[f"1.layer{layer}.keys"], state[f"0.layer{layer}.keys"]
        down = state[f"1.layer{layer}.down"]
        torch.testing.assert_close(down, projected_solution(P, keys, earlier, 1e-3), atol=1e-9, rtol=1e-9)
        forgetful = projected_solution(P, keys, earlier[:0], 1e-3)
        assert not torch.allclose(down, forgetful, atol=1e-6)  # control
        assert float((down @ earlier.T).abs().max()) < float((forgetful @ earlier.T).abs().max())


def test_settings_out_of_range_are_refused(host):
    for name in ("threshold", "l2"):
        with pytest.raises(ConfigError, match=f"{name} must be positive"):
            dataclasses.replace(CONFIG, **{name: 0.0})
    editor = AlphaEditEditor(host, dataclasses.replace(CONFIG, threshold=1e-12))
    with pytest.raises(ConfigError, match="leave no direction free"):
        editor.apply(FIRST)
