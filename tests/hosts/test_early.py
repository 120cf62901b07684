"""Early states are those of the host, and no more of it is run than they need."""

import copy

import pytest
import torch
from torch.nn.functional import layer_norm

from baft.hosts.architecture import find_architecture
from baft.hosts.early import early_features, early_layers, n_features
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from tiny import D_MODEL, random_ids, tiny_host, tiny_tokenizer


@pytest.fixture(params=["gpt2", "llama", "gemma3_text"])
def host(request):
    types = {"layer_types": ["sliding_attention", "full_attention"] * 3} if "gemma" in request.param else {}
    return Host("tiny", tiny_host(request.param, num_hidden_layers=6, **types), tiny_tokenizer(), "tiny")


def test_features_are_the_normalized_states_of_the_host(host):
    encoder = Encoder(host.tokenizer)
    rows = [random_ids(1, n, seed=n)[0].tolist() for n in (9, 4)]
    features = early_features(host, encoder, rows, [slice(2, 9), slice(0, 4)])
    layers = early_layers(len(find_architecture(host.model).blocks))
    assert features[0].shape[-1] == n_features(find_architecture(host.model)) == (1 + len(layers)) * D_MODEL
    for of_row, row, start in zip(features, rows, (2, 0), strict=True):
        with torch.no_grad():
            shown = copy.deepcopy(host.model)(torch.tensor([row]), output_hidden_states=True).hidden_states
        want = [layer_norm(shown[layer + 1][0].float(), (D_MODEL,)) for layer in (-1, *layers)]
        torch.testing.assert_close(of_row, torch.cat(want, -1)[start:], rtol=0, atol=1e-5)


def test_the_host_is_run_no_further_and_left_as_it_was(host):
    architecture = find_architecture(host.model)
    ran = []
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(architecture.blocks)
    ]
    early_features(host, Encoder(host.tokenizer), [random_ids(1, 5)[0].tolist()], [slice(5)])
    for handle in handles:
        handle.remove()
    last = early_layers(architecture.n_layers)[-1]
    assert ran == list(range(last + 1))
    assert last < architecture.n_layers - 1  # control: there would have been more
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in host.model.modules())


def test_which_blocks_are_early():
    assert early_layers(30) == (4, 9, 14, 19)
    assert early_layers(18) == (2, 5, 8, 11)
    assert early_layers(32) == (4, 10, 15, 20)
