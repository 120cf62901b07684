import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from baft.errors import ConfigError, UnsupportedHostError
from baft.hosts.architecture import (
    Site,
    accelerate_hooks,
    default_layers,
    find_architecture,
    input_device,
    intervention_dtype,
    site_device,
    text_config,
)
from tiny import N_LAYERS, shared_host, tiny_host


def test_a_site_is_the_block_of_its_number():
    host = shared_host("llama")
    architecture = find_architecture(host)
    assert architecture.stack is host.model
    assert [architecture.block(Site(i)) for i in range(N_LAYERS)] == list(host.model.layers)
    assert architecture.max_positions == 64


@pytest.mark.parametrize("layer", [-1, N_LAYERS])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(ConfigError, match="out of range"):
        find_architecture(shared_host("llama")).block(Site(layer))


def test_the_outermost_stack_is_taken():
    host = tiny_host("llama")
    host.model.layers[0].inside = nn.ModuleList(nn.Identity() for _ in range(N_LAYERS))
    assert find_architecture(host).blocks is host.model.layers
    host.model.second = nn.ModuleList(nn.Identity() for _ in range(N_LAYERS))
    with pytest.raises(UnsupportedHostError, match=r"found model\.layers, model\.second"):
        find_architecture(host)


def test_a_stack_of_another_depth_is_not_mistaken():
    host = tiny_host("llama")
    host.config.num_hidden_layers = N_LAYERS + 1
    with pytest.raises(UnsupportedHostError, match="found none"):
        find_architecture(host)


def test_hosts_that_cannot_be_edited_are_named():
    with pytest.raises(UnsupportedHostError, match="no config"):
        find_architecture(nn.Linear(2, 2))
    tiny = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    with pytest.raises(UnsupportedHostError, match="T5ForConditionalGeneration is an encoder-decoder"):
        find_architecture(T5ForConditionalGeneration(T5Config(**tiny)))
    with pytest.raises(UnsupportedHostError, match="MambaForCausalLM keeps no cache"):
        find_architecture(MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=2, vocab_size=16)))


def test_a_config_that_says_nothing_is_refused():
    class Empty(nn.Module):
        config = object()

    with pytest.raises(UnsupportedHostError, match="layers and width"):
        find_architecture(Empty())


def test_the_text_config_is_the_language_model_s_own():
    host = shared_host("gpt2")
    assert text_config(host) is host.config
    with pytest.raises(UnsupportedHostError):
        text_config(nn.Identity())


def test_the_paper_s_layers_scale_with_the_depth():
    assert default_layers(32) == (9, 18, 24, 28)
    assert default_layers(30) == (8, 17, 23, 26)
    assert default_layers(3) == (1, 2)
    assert default_layers(1) == (0,)
    for n in range(1, 100):
        layers = default_layers(n)
        assert list(layers) == sorted(set(layers))
        assert 0 <= layers[0] <= layers[-1] < n


@pytest.mark.parametrize(
    ("host", "want"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_interventions_compute_in_single_precision_or_better(host, want):
    assert intervention_dtype(nn.Linear(2, 2).to(host)) == want


def test_a_mixed_host_computes_in_single_precision():
    mixed = nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2))
    assert intervention_dtype(mixed) == torch.float32


def test_a_site_lives_where_its_block_runs_or_else_where_the_host_says():
    host = tiny_host("llama")
    assert site_device(host, Site(1)) == input_device(host) == torch.device("cpu")
    host.model.layers[1].to("meta")
    assert site_device(host, Site(1)) == torch.device("cpu")
    host.to("meta")
    assert site_device(host, Site(0)) == input_device(host) == torch.device("meta")


def test_accelerate_knows_where_weights_run_that_it_keeps_elsewhere():
    """Two hooks on one module too, and the block's own device though the embedding has another."""
    host = tiny_host("llama")
    accelerate.cpu_offload(host.model.layers[0], torch.device("cpu"))
    assert all(parameter.is_meta for parameter in host.model.layers[0].parameters())
    assert site_device(host, Site(0)) == torch.device("cpu")
    host.model.layers[1].to("meta")
    add_hook_to_module(host.model.layers[1], AlignDevicesHook(execution_device="meta"))
    add_hook_to_module(host.model.layers[1], ModelHook(), append=True)
    assert len(accelerate_hooks(host.model.layers[1])) == 2
    assert accelerate_hooks(host.model.layers[2]) == ()
    assert site_device(host, Site(1)) == torch.device("meta")
    assert input_device(host) == site_device(host, Site(2)) == torch.device("cpu")
