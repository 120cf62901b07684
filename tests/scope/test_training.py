"""A head is trained on a tiny host: the same from the same seed, better than before."""

import random

import pytest
import torch

from baft.errors import ConfigError
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.scope.reading import Reader
from baft.scope.text import ScopeText
from baft.scope.training import ScopeConfig, _same, read_lessons, train_scope
from tiny import CHATML, tiny_host, tiny_tokenizer


@pytest.fixture(scope="module")
def reader():
    model = tiny_host("llama", dtype=torch.float32, max_position_embeddings=4096)
    host = Host("tiny", model, tiny_tokenizer(chat_template=CHATML), "tiny")
    return Reader(host, Encoder(host.tokenizer))


def trained(reader, seed=0, **settings):
    losses = []
    sizes = {"n_groups": 5, "n_at_once": 2, "n_dims": 8, "n_hidden": 8, "n_uses": 8}
    state = torch.random.get_rng_state()
    head = train_scope(
        reader, ScopeConfig(**{**sizes, **settings}), seed=seed, on_step=lambda *told: losses.append(told)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    return head, losses


def fallen_to(losses):
    first, last = (sum(told[2] for told in some) for some in (losses[:6], losses[-6:]))
    return last / first


def test_training_learns_and_is_told_by_its_seed(reader):
    model = reader.host.model
    weights = {name: one.clone() for name, one in model.state_dict().items()}
    head, losses = trained(reader, learning_rate=2e-2)
    assert [told[:2] for told in losses] == [(i + 1, 24) for i in range(24)]
    assert fallen_to(losses) < 0.9
    assert fallen_to(trained(reader, learning_rate=1e-9)[1]) > 0.95  # control: it is not the texts
    assert not any(one.requires_grad for one in head.parameters())
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())
    few = [trained(reader, seed, n_groups=2, n_uses=1)[0].state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(one, few[1][name]) for name, one in few[0].items())
    assert not all(torch.equal(one, few[2][name]) for name, one in few[0].items())


def test_what_is_read_says_whom_and_what_it_is_about(reader):
    found = read_lessons(reader, ScopeText("train"), ScopeConfig(n_groups=12), random.Random(0))
    assert len(found.groups) == 12
    assert len(found.unrelated) == len(ScopeText("train").sentences)
    assert {(one.subject, one.relation) for one in found.unrelated} == {(None, None)}
    for group in found.groups:
        facts = {(one.subject, one.relation) for one in group.edits}
        assert len(facts) == len(group.edits)
        assert facts == {(one.subject, one.relation) for one in group.prompts if one.relation is not None}
    assert any(one.subject and not one.relation for group in found.groups for one in group.prompts)


def test_names_are_compared_and_nobody_is_not_nobody():
    found = _same(["a", "b", None], ["b", None, "a"]).tolist()
    assert found == [[False, True, False], [False, False, False], [True, False, False]]


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"n_uses is out of range: got 0, expected above 0"):
        ScopeConfig(n_uses=0)
