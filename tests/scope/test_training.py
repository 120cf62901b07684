"""A head is trained on a tiny host: the same from the same seed, better than before."""

import pytest
import torch

from baft.errors import ConfigError
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.scope.training import ScopeConfig, _same, train_scope
from tiny import tiny_host, tiny_tokenizer


@pytest.fixture(scope="module")
def host():
    return Host("tiny", tiny_host("llama", dtype=torch.float32), tiny_tokenizer(), "tiny")


def trained(host, seed=0, **settings):
    losses = []
    config = ScopeConfig(n_groups=3, n_dims=8, n_hidden=8, **settings)
    state = torch.random.get_rng_state()
    head = train_scope(
        host, Encoder(host.tokenizer), config, seed=seed, on_step=lambda *told: losses.append(told)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    return head, losses


def fallen_to(losses):
    first, last = (sum(told[2] for told in some) for some in (losses[:6], losses[-6:]))
    return last / first


def test_training_learns_and_is_told_by_its_seed(host):
    weights = {name: one.clone() for name, one in host.model.state_dict().items()}
    head, losses = trained(host, n_steps=24, learning_rate=2e-2)
    assert [told[:2] for told in losses] == [(i + 1, 24) for i in range(24)]
    assert fallen_to(losses) < 0.9
    assert fallen_to(trained(host, n_steps=24, learning_rate=1e-9)[1]) > 0.95  # control: it is not the texts
    assert not any(one.requires_grad for one in head.parameters())
    assert all(torch.equal(one, weights[name]) for name, one in host.model.state_dict().items())
    few = [trained(host, seed, n_steps=2)[0].state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(one, few[1][name]) for name, one in few[0].items())
    assert not all(torch.equal(one, few[2][name]) for name, one in few[0].items())


def test_names_are_compared():
    assert _same(["a", "b"], ["b", None, "a"]).tolist() == [[False, True], [False, False], [True, False]]


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"n_steps is out of range: got 0, expected above 0"):
        ScopeConfig(n_steps=0)
