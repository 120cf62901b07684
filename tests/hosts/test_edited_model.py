import pytest
import torch

from baft.errors import ConfigError
from baft.hosts.architecture import Site
from baft.hosts.calls import Recording
from baft.hosts.edited_model import EditedModel
from baft.hosts.positions import PositionSpec
from baft.nn.fused import FusedIntervention
from tiny import N_LAYERS, open_part, random_ids, shared_host, some_interventions


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


@pytest.fixture
def n_fused(monkeypatch):
    """How often a fused form was run."""
    runs = []
    plain = FusedIntervention.__call__

    def counted(self, h):
        runs.append(len(h))
        return plain(self, h)

    monkeypatch.setattr(FusedIntervention, "__call__", counted)
    return runs


def test_without_gradients_it_says_the_same_by_the_fused_form(host, n_fused):
    edited, ids = EditedModel(host, some_interventions(host)), random_ids(2, 7)
    for n_prompt in (None, torch.tensor([6, 4])):
        want = edited(ids, n_prompt_tokens=n_prompt).logits
        assert n_fused == []
        with torch.no_grad():
            got = edited(ids, n_prompt_tokens=n_prompt).logits
            assert len(n_fused) == 2
            n_fused.clear()
            bare = host(ids).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
        assert (got - bare).abs().max() > 1e-2  # control


def test_parts_that_are_trained_are_never_fused(host, n_fused):
    parts = some_interventions(host)
    parts[Site(0)][1].requires_grad_(True)
    edited, ids = EditedModel(host, parts), random_ids(1, 6)
    with torch.no_grad():
        first = edited(ids).logits
        assert len(n_fused) == 1  # control: the other site's
        parts[Site(0)][1].b.add_(1.0)  # as an optimizer does
        assert not torch.allclose(edited(ids).logits, first, rtol=0, atol=1e-3)


def test_generation_edits_every_token_by_the_fused_form(host, n_fused):
    edited, ids = EditedModel(host, {Site(0): [open_part()]}), random_ids(2, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    out = edited.generate(ids, return_dict_in_generate=True, **options)
    assert n_fused == [6, 2, 2, 2]  # three tokens of each prompt, then one of each row
    whole = edited(out.sequences, n_prompt_tokens=torch.tensor([6, 6])).logits[:, 5:-1]
    said = torch.stack(out.logits, 1)  # in float32, as generation keeps them
    torch.testing.assert_close(said, whole.float(), rtol=1e-6, atol=1e-6)
    plain = host(out.sequences).logits[:, 5:-1]
    assert (whole - plain).abs().max() > 1e-2  # control


def test_a_fused_form_is_made_once_for_an_assignment(host, monkeypatch):
    made = []
    monkeypatch.setattr(FusedIntervention, "__init__", noted(FusedIntervention.__init__, made))
    edited, ids = EditedModel(host, {Site(0): [open_part()]}), random_ids(1, 6)
    with torch.no_grad():
        assert made == []
        first = edited(ids).logits
        edited(ids)
        edited.generate(ids, max_new_tokens=3)
        assert len(made) == 1
        before, edited.interventions = edited.interventions, {Site(0): [open_part(seed=3)]}
        assert not torch.equal(edited(ids).logits, first)
        edited.interventions = before
        assert torch.equal(edited(ids).logits, first)
        assert len(made) == 3  # control


def noted(make, made):
    def init(self, parts):
        made.append(parts)
        make(self, parts)

    return init


def test_what_is_seen_before_the_edit_is_no_view_of_the_host_s_states(host):
    """Every token is edited, so that a view would do; a host may change its states in place."""
    edited, ids = EditedModel(host, {Site(0): [open_part()]}), random_ids(1, 5)
    ids[0, 0] = 77  # no BOS
    shown, views, recording = [], [], Recording()

    def spoil(_, __, output):
        hidden = output[0] if isinstance(output, tuple) else output
        shown.append(hidden.clone())
        views.append(hidden.flatten(0, 1))
        hidden.fill_(7.0)

    handle = edited.architecture.block(Site(0)).register_forward_hook(spoil)
    try:
        with torch.no_grad(), edited.disabled():
            edited(ids, recording=recording)
    finally:
        handle.remove()
    assert recording.masks[0].all()
    assert torch.equal(recording.at(Site(0)), shown[0].flatten(0, 1))
    assert not torch.equal(views[0], shown[0].flatten(0, 1))  # control
