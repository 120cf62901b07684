"""ROME's closed form against its constrained least squares, and an edit against what it promises."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baft.errors import ConfigError, EditError
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.hosts.patches import DeltaPatch, down_projection, weight_of
from baft.methods.key_value import KeyValues
from baft.methods.memit import MemitEditor
from baft.methods.rome import RomeEditor, insertion
from baft.types import Edit, EditRequest
from tiny import tiny_host, tiny_tokenizer

TOWER = Edit("The tower is in the city of", "R", subject="city of")
CONFIG = dataclasses.replace(
    RomeEditor.preset("paper"), max_steps=3, n_prefixes=1, n_key_prefixes=2, moments_tokens=500
)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(d_in, seed):
    keys = normal(3 * d_in, d_in, seed=seed)
    return keys.T @ keys / len(keys)


@given(d_in=st.integers(2, 9), d_out=st.integers(1, 6), seed=st.integers(0, 1000))
def test_the_insertion_solves_its_constrained_least_squares(d_in, d_out, seed):
    """Minimize tr(D C D^T) so that D k = r: the system of the gradient and the constraint, solved at once."""
    C, key = moments_of(d_in, seed), normal(d_in, seed=seed + 1)
    residual = normal(d_out, seed=seed + 2)
    system = torch.cat([torch.cat([C, key[:, None]], 1), torch.cat([key, key.new_zeros(1)])[None]])
    right = torch.cat([residual.new_zeros(d_in, d_out), residual[None]])
    direct = torch.linalg.solve(system, right)[:d_in].T
    up, down = insertion(C, key, key, residual)
    torch.testing.assert_close(torch.outer(up, down), direct, atol=1e-9, rtol=1e-9)
    if d_in > 2:
        plain = torch.outer(residual, key) / (key @ key)  # control: meets the constraint, not the least
        assert not torch.allclose(plain, direct, atol=1e-6)
        cost, other = (torch.trace(D @ C @ D.T) for D in (direct, plain))
        assert cost < other


def test_a_key_unlike_its_average_is_refused():
    C = torch.eye(3, dtype=torch.float64)
    one, other = torch.eye(3, dtype=torch.float64)[:2]
    with pytest.raises(EditError, match="another layer"):
        insertion(C, one, other, one)


def test_the_edited_weight_puts_out_the_value_at_the_prompts_key(host, monkeypatch):
    found = []
    values = KeyValues.values

    def spied(self, *given):
        vectors, result, why = values(self, *given)
        there = self.outputs(*given[:2])
        found.append(there + vectors)
        return vectors, result, why

    monkeypatch.setattr(KeyValues, "values", spied)
    editor = RomeEditor(host, CONFIG)
    editor.apply(EditRequest((TOWER,)))
    module = down_projection(host.model, 0)
    asked = KeyValues(host, editor.encoder, CONFIG, [TOWER], seed=0)
    torch.testing.assert_close(asked.outputs(editor.edited.patches, module), found[0], atol=1e-9, rtol=1e-9)
    assert not torch.allclose(asked.outputs({}, module), found[0], atol=1e-3)  # control
    # And that is what a weight changed in place would put out.
    patch = editor.edited.patches[module]
    assert isinstance(patch, DeltaPatch)
    averaged, key = asked.keys({}, module)
    weight = weight_of(host.model.get_submodule(module)) + patch.whole()
    torch.testing.assert_close(key @ weight.T, found[0], atol=1e-9, rtol=1e-9)
    assert int(torch.linalg.matrix_rank(patch.whole())) == 1
    # Of such changes it is the one that the moments ask for, equation 2.
    C = editor.moments(0)
    C = C + CONFIG.moments_ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    reads = torch.linalg.inv(C) @ averaged[0]
    change = torch.outer((found[0] - asked.outputs({}, module))[0], reads) / (reads @ key[0])
    torch.testing.assert_close(patch.whole(), change, atol=1e-9, rtol=1e-9)


def test_edits_of_one_request_are_made_one_after_the_other(host):
    other, module = Edit("Nine hats of", "R", subject="hats of"), down_projection(host.model, 0)

    def change(*requests):
        editor = RomeEditor(host, CONFIG)
        for edits in requests:
            editor.apply(EditRequest(edits))
        return editor.edited.patches[module].whole()

    together, in_turn = change((TOWER, other)), change((TOWER,), (other,))
    torch.testing.assert_close(together, in_turn, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(together, change((TOWER,)) + change((other,)), atol=1e-3)  # control


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "gemma3_text", "phi3"])
def test_other_families_are_edited_too(family):
    host = Host("tiny", tiny_host(family), tiny_tokenizer(), family)
    settings = {"max_steps": 4, "n_prefixes": 0, "n_key_prefixes": 0}
    for kind in (RomeEditor, MemitEditor):
        editor = kind(host, dataclasses.replace(kind.preset("paper"), moments_tokens=500, **settings))
        outcome = editor.apply(EditRequest((TOWER,)))
        assert outcome.losses[-1] < outcome.losses[0]
        assert editor.edited.patches


def test_keys_are_means_over_contexts(host):
    module = down_projection(host.model, 1)
    encoder = Encoder.for_host(host)
    asked = KeyValues(host, encoder, CONFIG, [TOWER, Edit("A river", "R", subject="river")], seed=0)
    averaged, alone = asked.keys({}, module)
    caught = []
    handle = host.model.get_submodule(module).register_forward_pre_hook(
        lambda _, given: caught.append(given[0][0])
    )
    with torch.no_grad():
        for of_edit in asked._averaged:
            for one in of_edit:
                host.model(torch.tensor([one.text.prompt_ids]))
                caught[-1] = caught[-1][one.place]
    handle.remove()
    direct = torch.stack(caught).view(2, 3, -1)
    torch.testing.assert_close(averaged, direct.mean(1), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(alone, direct[:, 0], atol=1e-9, rtol=1e-9)
    in_groups, _ = asked.keys({}, module, by_group=True)
    torch.testing.assert_close(in_groups, (direct[:, 0] + direct[:, 1:].mean(1)) / 2, atol=1e-9, rtol=1e-9)
    assert float((in_groups - averaged).abs().max()) > 1e-3  # control


def test_the_vector_stays_within_the_clamp(host):
    config = dataclasses.replace(CONFIG, learning_rate=10.0, clamp=0.5)
    editor = RomeEditor(host, config)
    module, site = editor.modules[0], editor.sites[0]
    asked = KeyValues(host, editor.encoder, config, [TOWER], seed=0)
    vectors, result, _ = asked.values({}, module, site, None)
    length = asked.outputs({}, module).norm()
    assert float(vectors.norm()) == pytest.approx(0.5 * float(length), rel=1e-9)
    assert len(result.losses) == 4


def test_settings_out_of_range_are_refused(host):
    for settings in ({"clamp": 0.0}, {"kl_weight": -1.0}, {"n_prefixes": -1}, {"moments_tokens": 1}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            dataclasses.replace(CONFIG, **settings)
    with pytest.raises(ConfigError, match="layer 3 is out of range"):
        RomeEditor(host, dataclasses.replace(CONFIG, layer=3))


@pytest.mark.parametrize(("layer", "why"), [(0, "its first block is edited inside"), (1, None)])
def test_the_outcome_says_whether_the_whole_host_was_run(host, layer, why):
    outcome = RomeEditor(host, dataclasses.replace(CONFIG, layer=layer)).apply(EditRequest((TOWER,)))
    assert outcome.why_full == why


def test_reading_a_key_runs_nothing_above_and_leaves_nothing_behind(host):
    module, blocks = down_projection(host.model, 1), host.model.model.layers
    shown = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: shown.append(layer))
        for layer, block in enumerate(blocks)
    ]
    try:
        edits = KeyValues(host, Encoder.for_host(host), CONFIG, [TOWER], seed=0)
        averaged, alone = edits.keys({}, module)
    finally:
        for handle in handles:
            handle.remove()
    assert shown == [0]  # the second breaks off inside
    assert averaged.shape == alone.shape
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in host.model.modules())
    ids = torch.tensor([Encoder.for_host(host).prompt(TOWER.prompt)])
    assert host.model(ids).logits.shape[:2] == ids.shape  # and the host runs to its end again
