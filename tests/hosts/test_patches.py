"""Patches: what a module would put out with another weight, on a host whose weights stay as they are."""

import copy

import pytest
import torch
from torch import nn

from baft.errors import ConfigError, UnsupportedHostError
from baft.hosts.edited_model import EditedModel
from baft.hosts.live_view import live_view
from baft.hosts.patches import DeltaPatch, Patch, down_projection, weight_of, weight_shape
from baft.hosts.positions import PositionSpec
from tiny import (
    BOS_ID,
    D_MODEL,
    pad_rows,
    positions_of,
    random_ids,
    shared_host,
    some_interventions,
    tiny_host,
)

FAMILIES = ["gpt2", "gptj", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma3_text"]
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_weight(host, name, delta):
    """A copy of a host whose weight has a matrix added to it: what a patch must equal."""
    changed = copy.deepcopy(host)
    with torch.no_grad():
        weight_of(changed.get_submodule(name)).add_(delta)
    return changed


def n_hooks(host):
    return sum(len(module._forward_hooks) for module in host.modules())


def parts_of(kind, d_out, d_in):
    whole, up, down = drawn(d_out, d_in), drawn(d_out, 2, seed=1), drawn(2, d_in, seed=2)
    parts = {
        "whole": [whole],
        "pair": [(up, down)],
        "both": [whole, (up, down)],
        "many pairs": [(up, down)] * 9,
    }
    return parts[kind]


@pytest.mark.parametrize("kind", ["whole", "pair", "both", "many pairs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_delta_is_the_changed_weight(family, kind):
    host = shared_host(family, "eager" if family == "gptj" else "sdpa")
    name = down_projection(host, 1)
    d_out, d_in = weight_shape(host.get_submodule(name))
    assert d_out == D_MODEL
    parts = parts_of(kind, d_out, d_in)
    patch = DeltaPatch(parts)
    assert isinstance(patch, Patch)
    changed, hooks = with_weight(host, name, patch.whole()), n_hooks(host)
    edited = EditedModel(host)
    edited.patches = {name: patch}
    ids, mask = pad_rows([random_ids(1, 9)[0], random_ids(1, 5)[0]], "left")
    given = {"attention_mask": mask, "position_ids": positions_of(mask)}
    with torch.no_grad():
        want, plain, got = (run(ids, **given).logits for run in (changed, host, edited))
    within = 1e-5 if family == "gptj" else 1e-9  # its attention is computed in float32
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=within, rtol=within)
    assert (got - plain)[mask.bool()].abs().max() > 1e-2  # control
    said = edited.generate(ids, attention_mask=mask, **OPTIONS)
    assert torch.equal(said, changed.generate(ids, attention_mask=mask, **OPTIONS))
    with edited.disabled(), torch.no_grad():
        assert torch.equal(edited(ids, **given).logits, plain)
    edited.patches = {}
    with torch.no_grad():
        assert torch.equal(edited(ids, **given).logits, plain)
    assert n_hooks(host) == hooks  # transformers may have hung some of its own before


def test_what_is_trained_gets_its_gradient():
    host = shared_host("llama")
    name = down_projection(host, 0)
    delta = torch.zeros(weight_shape(host.get_submodule(name)), dtype=torch.float64, requires_grad=True)
    edited, ids = EditedModel(host), random_ids(1, 6)
    edited.patches = {name: DeltaPatch([delta])}
    [found] = torch.autograd.grad(edited(ids).logits.logsumexp(-1).sum(), [delta])
    changed = with_weight(host, name, 0.0)
    weight = changed.get_submodule(name).weight.requires_grad_()
    [want] = torch.autograd.grad(changed(ids).logits.logsumexp(-1).sum(), [weight])
    torch.testing.assert_close(found, want, atol=1e-9, rtol=1e-9)
    assert found.abs().max() > 1e-6


def test_patches_and_interventions_act_together():
    host = shared_host("llama")
    name, ids = down_projection(host, 0), random_ids(2, 7)
    delta = drawn(*weight_shape(host.get_submodule(name)))
    edited = EditedModel(host, some_interventions(host))
    edited.patches = {name: DeltaPatch([delta])}
    other = EditedModel(with_weight(host, name, delta), edited.interventions)
    n = torch.tensor([5, 7])
    with torch.no_grad():
        got = edited(ids, n_prompt_tokens=n).logits
        torch.testing.assert_close(got, other(ids, n_prompt_tokens=n).logits, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(live_view(edited)(ids, n_prompt_tokens=n).logits, got, atol=0, rtol=0)
        edited.interventions = {}
        assert not torch.equal(edited(ids, n_prompt_tokens=n).logits, got)  # control
        edited.patches = {}
        assert torch.equal(edited(ids).logits, host(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_host_keeps_its_precision(dtype):
    host = tiny_host("llama", dtype=dtype)
    name, ids = down_projection(host, 1), random_ids(1, 6)
    edited = EditedModel(host)
    edited.patches = {name: DeltaPatch([drawn(*weight_shape(host.get_submodule(name)), dtype=torch.float32)])}
    with torch.no_grad():
        got, plain = edited(ids).logits, host(ids).logits
    assert got.dtype == dtype
    assert not torch.equal(got, plain)


class Notes:
    """Changes nothing, and notes what it is shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, module, inputs, output, seen):
        seen.memo["calls"] = seen.memo.get("calls", 0) + 1
        self.seen.append((seen.edited.tolist(), seen.prompt.tolist(), seen.memo["calls"]))


def test_a_patch_knows_prompts_and_edited_tokens_and_keeps_notes_for_one_generation():
    host = shared_host("llama")
    notes, edited = Notes(), EditedModel(host, positions=PositionSpec(1, outputs=False))
    edited.patches = {down_projection(host, 1): notes}
    ids, mask = pad_rows([random_ids(1, 4)[0], random_ids(1, 2)[0]], "left")
    given = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(edited.generate(ids, **given), host.generate(ids, **given))  # nothing was changed
    last = [[False, False, False, True]] * 2
    prompts = [[True] * 4, [False, False, True, True]]
    assert notes.seen == [(last, prompts, 1)] + [([[False]] * 2, [[False]] * 2, n) for n in (2, 3)]
    notes.seen.clear()
    with torch.no_grad():
        edited(ids, mask)  # where the prompt ends is unknown
    [(shown, prompt, calls)] = notes.seen
    assert prompt == prompts
    assert ids[0, 0] == ids[1, 2] == BOS_ID
    assert shown == [[False, True, True, True], [False, False, False, True]]
    assert calls == 1  # another call, other notes


def test_down_projections_are_found_by_shape():
    assert down_projection(shared_host("gpt2"), 2) == "transformer.h.2.mlp.c_proj"
    assert down_projection(shared_host("llama"), 0) == "model.layers.0.mlp.down_proj"
    assert down_projection(shared_host("opt"), 1).endswith("layers.1.fc2")
    with pytest.raises(ConfigError, match="layer 3 is out of range"):
        down_projection(shared_host("llama"), 3)
    with pytest.raises(UnsupportedHostError, match="0 down-projections"):
        down_projection(shared_host("mixtral"), 0)


def test_weights_that_are_no_numbers_are_refused():
    with pytest.raises(UnsupportedHostError, match="a linear module was expected, got LayerNorm"):
        weight_shape(nn.LayerNorm(3))
    quantized = nn.Linear(3, 2)
    quantized.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedHostError, match="not quantized"):
        weight_of(quantized)


def test_a_patch_names_a_module_that_is_there():
    edited = EditedModel(shared_host("llama"))
    with pytest.raises(AttributeError):
        edited.patches = {"model.layers.7.mlp.down_proj": DeltaPatch([])}
    assert edited.patches == {}
    assert not edited.is_enabled


def test_a_model_follows_another():
    host = shared_host("llama")
    name, ids = down_projection(host, 1), random_ids(1, 5)
    one, other = EditedModel(host), EditedModel(host, positions=PositionSpec(1))
    other.patches = {name: DeltaPatch([drawn(*weight_shape(host.get_submodule(name)))])}
    other.interventions = some_interventions(host)
    one.follow(other)
    assert one.positions == other.positions
    with torch.no_grad():
        assert torch.equal(one(ids).logits, other(ids).logits)
        one.follow(EditedModel(host))
        assert torch.equal(one(ids).logits, host(ids).logits)
