import pytest
import torch

from baft.errors import ConfigError
from baft.hosts.architecture import Site
from baft.hosts.edited_model import EditedModel, Recording
from baft.hosts.positions import PositionSpec
from tiny import N_LAYERS, open_part, random_ids, shared_host


@pytest.fixture
def host():
    return shared_host("llama")


def test_a_layer_that_the_host_lacks_is_refused_at_once_and_changes_nothing(host):
    with pytest.raises(ConfigError, match="out of range"):
        EditedModel(host, {Site(N_LAYERS): [open_part()]})
    edited = EditedModel(host, {Site(0): [open_part()]})
    before = edited.interventions
    with pytest.raises(ConfigError, match="out of range"):
        edited.interventions = {Site(1): [open_part()], Site(-1): [open_part()]}
    assert edited.interventions is before


def test_it_is_enabled_where_there_is_something_to_do_and_nobody_took_it_out(host):
    edited = EditedModel(host, {Site(0): [open_part()]})
    other = EditedModel(host, {Site(0): [open_part()]})
    assert edited.is_enabled
    with edited.disabled():
        assert not edited.is_enabled
        assert other.is_enabled
        with edited.disabled():
            assert not edited.is_enabled
        assert not edited.is_enabled
    assert edited.is_enabled
    with pytest.raises(RuntimeError, match="on purpose"), edited.disabled():
        raise RuntimeError("on purpose")
    assert edited.is_enabled
    assert not EditedModel(host).is_enabled
    assert not EditedModel(host, {Site(0): []}).is_enabled


def test_the_parts_of_a_site_read_the_same_state_and_add_up(host):
    first, second = open_part(seed=1), open_part(seed=2)
    ids = random_ids(1, 6)
    together = EditedModel(host, {Site(0): [first, second]})
    recording = Recording()
    shown = together(ids, recording=recording, output_hidden_states=True).hidden_states[1][0, 1:]
    state = recording.at(Site(0))
    want = state + first.delta(state)[0] + second.delta(state)[0]
    torch.testing.assert_close(shown, want, rtol=0, atol=1e-12)
    after = state + first.delta(state)[0]
    one_by_one = after + second.delta(after)[0]
    assert (shown - one_by_one).abs().max() > 1e-2  # control


def test_without_its_prompt_s_end_every_token_but_bos_is_edited(host):
    edited = EditedModel(host, {Site(0): [open_part()]}, PositionSpec(1, outputs=False))
    recording = Recording()
    edited(random_ids(2, 5), recording=recording)
    assert recording.masks[0].tolist() == [[False, True, True, True, True]] * 2
    ids = random_ids(2, 5)
    ids[0, 0] = 77  # no BOS
    recording = Recording()
    edited(ids, recording=recording)
    assert recording.masks[0].tolist() == [[True] * 5, [False, True, True, True, True]]


def test_gradients_reach_the_interventions_and_not_the_host(host):
    part = open_part().requires_grad_(True)
    EditedModel(host, {Site(0): [part]})(random_ids(1, 5)).logits.sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in (part.R, part.A, part.b))
    assert all(p.grad is None for p in host.parameters())
