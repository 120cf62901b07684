"""MEMIT's closed form against its normal equations and against ROME's, and its spread over layers."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baft.errors import ConfigError
from baft.hosts.models import Host
from baft.hosts.patches import weight_of
from baft.methods.key_value import KeyValues
from baft.methods.memit import MemitEditor, solution
from baft.methods.rome import insertion
from baft.types import Edit, EditRequest
from tiny import shared_host, tiny_tokenizer

EDITS = (
    Edit("Paris is in", "R", subject="is in"),
    Edit("Nine hats of", "R", subject="hats of"),
    Edit("A river", "R", subject="river"),
)
CONFIG = dataclasses.replace(
    MemitEditor.preset("paper"), max_steps=4, n_prefixes=1, n_key_prefixes=1, moments_tokens=500
)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(n=st.integers(1, 12), d_in=st.integers(2, 8), d_out=st.integers(1, 5), seed=st.integers(0, 1000))
def test_the_solution_minimizes_its_objective(n, d_in, d_out, seed):
    """`|D K - R|^2 + w tr(D C D^T)` as one least-squares problem over stacked rows."""
    ordinary, keys = normal(4 * d_in, d_in, seed=seed), normal(n, d_in, seed=seed + 1)
    residuals = normal(n, d_out, seed=seed + 2)
    weight = 3.0
    weighed = weight * ordinary.T @ ordinary / len(ordinary)
    rows = torch.cat([keys, ordinary * (weight / len(ordinary)) ** 0.5])
    right = torch.cat([residuals, residuals.new_zeros(len(ordinary), d_out)])
    direct = torch.linalg.lstsq(rows, right).solution.T
    found = residuals.T @ solution(weighed, keys)
    torch.testing.assert_close(found, direct, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(found, residuals.T @ solution(2 * weighed, keys), atol=1e-9)  # control


def test_one_edit_that_ordinary_keys_hardly_weigh_against_is_romes():
    ordinary, key, residual = normal(30, 8, seed=0), normal(8, seed=1), normal(5, seed=2)
    C = ordinary.T @ ordinary / len(ordinary)
    rome = torch.outer(*insertion(C, key, key, residual))
    gaps = [
        float((torch.outer(residual, solution(weight * C, key[None])[0]) - rome).abs().max())
        for weight in (1.0, 1e-4, 1e-9)
    ]
    assert gaps[0] > 1e-2 > gaps[1] > gaps[2]
    assert gaps[2] < 1e-6


def test_all_values_are_met_where_nothing_is_weighed_against_them(host):
    """With one layer, where the last output is linear in the change."""
    config = dataclasses.replace(CONFIG, layers=(2,), moments_weight=1e-12, n_key_prefixes=0)
    wanted = []
    values = KeyValues.values

    class Spied(KeyValues):
        def values(self, *given):
            vectors, result, why = values(self, *given)
            wanted.append(self.outputs(*given[:2]) + vectors)
            return vectors, result, why

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("baft.methods.inserting.KeyValues", Spied)
        editor = MemitEditor(host, config)
        editor.apply(EditRequest(EDITS))
    asked = KeyValues(host, editor.encoder, config, EDITS, seed=0)
    found = asked.outputs(editor.edited.patches, "model.layers.2")
    torch.testing.assert_close(found, wanted[0], atol=1e-6, rtol=1e-6)
    assert float((asked.outputs({}, "model.layers.2") - wanted[0]).abs().max()) > 0.1  # control


def test_every_layer_takes_its_share(host, monkeypatch):
    """As where each layer's weight is changed in place before the next one's keys are read."""
    config = dataclasses.replace(CONFIG, layers=(0, 1, 2), moments_weight=0.3)
    sought, values = [], KeyValues.values

    def spied(*given):
        found = values(*given)
        sought.append(found[0])
        return found

    monkeypatch.setattr(KeyValues, "values", spied)
    editor = MemitEditor(host, config)
    editor.apply(EditRequest(EDITS))
    changed = Host("changed", copy.deepcopy(host.model), host.tokenizer, "")
    asked = KeyValues(changed, editor.encoder, config, EDITS, seed=0)
    wanted = asked.outputs({}, "model.layers.2") + sought[0]
    for layer, n_left in ((0, 3), (1, 2), (2, 1)):
        module = f"model.layers.{layer}.mlp.down_proj"
        K = asked.keys({}, module, by_group=True)[0].T
        R = (wanted - asked.outputs({}, "model.layers.2")).T / n_left
        C = editor.moments(layer)
        C = C + config.moments_ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
        change = R @ K.T @ torch.linalg.inv(0.3 * C + K @ K.T)
        torch.testing.assert_close(editor.edited.patches[module].whole(), change, atol=1e-9, rtol=1e-9)
        weight_of(changed.model.get_submodule(module)).add_(change)
    assert float((wanted - asked.outputs({}, "model.layers.2")).abs().max()) > 0.1  # it is weighed against C


def test_values_found_in_several_descents_are_those_of_one(host):
    """Up to the epsilon of Adam, and with no stop rule met, since it is that of all edits of a descent."""
    stories = []
    for at_once in (8, 2, 1):
        steps = []
        config = dataclasses.replace(CONFIG, edits_at_once=at_once, stop_loss=None)
        editor = MemitEditor(host, config)
        outcome = editor.apply(EditRequest(EDITS), on_step=lambda *seen, steps=steps: steps.append(seen))
        stories.append((editor.state_dict(), outcome.n_steps, [seen[:2] for seen in steps]))
    for n, (state, n_steps, steps) in zip((1, 2, 3), stories, strict=True):
        assert n_steps == 4 * n
        assert steps == [(i, 4 * n) for i in range(1, 4 * n + 1)]
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, stories[0][0][name], atol=1e-4, rtol=1e-3)


def test_settings_out_of_range_are_refused(host):
    for layers in ((), (1, 1)):
        with pytest.raises(ConfigError, match="layers must name"):
            dataclasses.replace(CONFIG, layers=layers)
    with pytest.raises(ConfigError, match="moments_weight must be positive"):
        dataclasses.replace(CONFIG, moments_weight=0.0)


def test_a_host_whose_blocks_give_tuples():
    """Its blocks' first output is what the values are added to."""
    model = shared_host("gptj", "eager")
    host = Host("tiny", model, tiny_tokenizer(), "a tiny random host")
    caught = []
    handle = model.transformer.h[1].register_forward_hook(lambda *args: caught.append(type(args[-1])))
    try:
        config = dataclasses.replace(CONFIG, layers=(0, 1), max_steps=60, moments_weight=1e-3)
        outcome = MemitEditor(host, config).apply(EditRequest(EDITS[:1]))
    finally:
        handle.remove()
    assert tuple in caught
    assert outcome.losses[-1] < 0.5 * outcome.losses[0]
    assert outcome.decoded == (True,)
