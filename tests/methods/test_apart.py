"""Edits made apart in one batch, by every method that offers it: the same as one after the other."""

import dataclasses

import pytest
import torch

import quick_methods
from baft.errors import ConfigError, EditError
from baft.hosts.encoding import Encoder
from baft.methods import baft as module
from baft.methods.baft import alike
from baft.methods.base import Apart, Capability, StackedEditor, methods
from baft.types import Edit, EditRequest
from tiny import tiny_tokenizer

STACKED = [
    (name, preset)
    for name in methods.names()
    if issubclass(methods.get(name), StackedEditor)
    for preset in methods.get(name).presets
]
SMALL = {"max_steps": 40, "layers": (0, 2), "most_rank": 4, "n_others": 0}
EDITS = (
    Edit("The tower is in the city of", "Ro"),
    Edit("A longer prompt than that", "so it is"),
    Edit("Who", "of it"),
    Edit("The king of Spain is", "Bob"),
)
REQUESTS = [EditRequest((edit,)) for edit in EDITS]
EARLIER = EditRequest((Edit("Nine hats of", "Co"),))


def make(host, method, preset, **changes):
    return quick_methods.make(host, method, preset, **{**SMALL, **changes})


@pytest.fixture(params=STACKED, ids="/".join)
def editor(host, request):
    return make(host, *request.param)


@torch.no_grad()
def logits(model, edit=EDITS[1]):
    """Three rows of an edit's prompt."""
    ids = torch.tensor([Encoder(tiny_tokenizer()).prompt(edit.prompt)] * 3)
    return model(ids, n_prompt_tokens=torch.full((3,), ids.shape[1])).logits


def blocks(interventions):
    """Every number of some interventions, by site."""
    return {
        site: [(name, tensor) for part in parts for name, tensor in part.state_dict().items()]
        for site, parts in interventions.items()
    }


def check_close(one, other, tolerance=1e-9):
    assert one.keys() == other.keys()
    for site in one:
        assert len(one[site]) == len(other[site])
        for (name, a), (same, b) in zip(one[site], other[site], strict=True):
            assert name == same
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def check_outcomes(one, other):
    assert one.edit_ids == other.edit_ids
    assert (one.n_steps, one.stopped, one.decoded) == (other.n_steps, other.stopped, other.decoded)
    assert one.losses == pytest.approx(other.losses, rel=1e-9)
    assert one.margins == pytest.approx(other.margins, rel=1e-9, abs=1e-9)
    assert one.why_full is other.why_full is None


@pytest.mark.parametrize("earlier", [False, True])
def test_apart_is_one_after_the_other(editor, earlier):
    if earlier:
        editor.apply(EARLIER)
    state, edited = editor.state_dict(), editor.edited
    before = [logits(edited, edit) for edit in EDITS]
    told = []
    apart = editor.apart(REQUESTS, on_step=lambda *one: told.append(one))
    assert isinstance(apart, Apart)
    # Nothing of it is in force.
    assert all(torch.equal(logits(editor.edited, edit), before[i]) for i, edit in enumerate(EDITS))
    assert editor.requests == ((EARLIER,) if earlier else ())
    assert editor.state_dict().keys() == state.keys()
    assert all(torch.equal(editor.state_dict()[name], state[name]) for name in state)
    steps = {one.n_steps for one in apart.outcomes}
    assert len(steps) > 1  # they stop at different steps, so that the batch shrinks
    assert [step for step, _, _ in told] == list(range(1, max(steps) + 1))
    for i, request in enumerate(REQUESTS):
        want = editor.apply(request)
        check_outcomes(apart.outcomes[i], want)
        alone, now = logits(apart.alone(i), EDITS[i]), logits(editor.edited, EDITS[i])
        torch.testing.assert_close(alone, now, rtol=0, atol=1e-9)
        rows = apart.by_row([i, (i + 1) % 4, i])
        got = logits(rows, EDITS[i])
        torch.testing.assert_close(got[[0, 2]], now[[0, 2]], rtol=0, atol=1e-9)
        assert not torch.allclose(got[1], now[1], rtol=0, atol=1e-3)  # control: another edit's
        assert not torch.equal(now, before[i])
        editor.undo()
        assert torch.equal(logits(editor.edited, EDITS[i]), before[i])


def test_each_edit_s_gates_are_explained(editor):
    editor.apply(EARLIER)
    apart = editor.apart(REQUESTS)
    text = Encoder.for_host(editor.host).edit(EDITS[1].prompt, EDITS[1].target)
    ids, n = (*text.prompt_ids, *text.target_ids), len(text.prompt_ids)
    got = apart.explain(1, ids, n)
    editor.apply(REQUESTS[1])
    want = editor.explain(ids, n)
    assert [(one.layer, one.edit_id, one.position) for one in got] == [
        (one.layer, one.edit_id, one.position) for one in want
    ]
    for a, b in zip(got, want, strict=True):
        assert a.weights == pytest.approx(b.weights, rel=1e-9, abs=1e-12)
    if getattr(editor.config, "bases", None) == "own":
        assert {one.edit_id for one in got} == {EARLIER.edits[0].id, EDITS[1].id}
        assert apart.explain(2, ids, n) != got  # control


def test_together_in_force_they_are_the_sum_of_each_alone(host):
    editor, slow = make(host, "baft", "default"), make(host, "baft", "default")
    for one in (editor, slow):
        one.apply(EARLIER)
    outcomes = editor.apply_apart(REQUESTS)
    assert editor.requests == (EARLIER, *REQUESTS)
    parts = [blocks(slow.edited.interventions)]
    for request, outcome in zip(REQUESTS, outcomes, strict=True):
        check_outcomes(outcome, slow.apply(request))
        parts.append(blocks(slow.edited.interventions))
        slow.undo()
    got = blocks(editor.edited.interventions)
    assert got.keys() == parts[0].keys()
    for site, tensors in got.items():
        for place, (name, tensor) in enumerate(tensors):
            # The earlier edit's block, and after it one for each that was trained beside it alone.
            want = torch.cat([parts[0][site][place][1], *[one[site][place][1][1:] for one in parts[1:]]])
            torch.testing.assert_close(tensor, want, rtol=1e-9, atol=1e-9, msg=name)
    for i in range(4, 0, -1):  # each is a request of its own, and is taken back by itself
        assert editor.undo() == (REQUESTS[i - 1],)
    check_close(blocks(editor.edited.interventions), parts[0], 0)
    one_batch = make(host, "baft", "default")  # control: trained jointly they come out otherwise
    one_batch.apply(EARLIER)
    joint = one_batch.apply(EditRequest(EDITS))
    assert joint.losses[1] != pytest.approx(outcomes[0].losses[1], rel=1e-3)


def test_what_was_made_apart_is_saved_and_read(host):
    editor = make(host, "baft", "default")
    editor.apply_apart(REQUESTS)
    again = make(host, "baft", "default")
    again.load_state_dict(editor.state_dict(), REQUESTS)
    assert torch.equal(logits(again.edited), logits(editor.edited))
    assert not torch.equal(logits(again.edited), logits(make(host, "baft", "default").edited))  # control


@pytest.mark.parametrize("preset", STACKED, ids="/".join)
def test_shared_bases_do_not_add_up(host, preset):
    editor = make(host, *preset)
    if getattr(editor.config, "bases", "own") == "own":
        assert len(editor.apply_apart(REQUESTS[:2])) == 2  # control
        return
    with pytest.raises(ConfigError, match="edits that share their bases do not add up"):
        editor.apply_apart(REQUESTS)
    assert editor.requests == ()
    assert editor.state_dict() == {}


@pytest.mark.parametrize(
    "requests",
    [[EditRequest(EDITS[:2])], [REQUESTS[0], EditRequest((EDITS[1],), unrelated=("Something",))]],
    ids=["two edits in one", "other unrelated prompts"],
)
def test_requests_that_cannot_be_stacked_are_refused(host, requests):
    editor = make(host, "baft", "default")
    for how in (editor.apart, editor.apply_apart):
        with pytest.raises(ConfigError, match="come one to a request, and with the same unrelated prompts"):
            how(requests)
    same = [dataclasses.replace(one, unrelated=("Something",)) for one in REQUESTS[:2]]
    assert len(editor.apart(same).outcomes) == 2  # control


def test_one_that_breaks_down_is_an_error_in_its_place(host, monkeypatch):
    editor = make(host, "baft", "default")
    healthy = editor.apart(REQUESTS)
    plain = module.train_apart

    def spoiled(run, trained, *rest, **more):
        for part in trained.values():
            part.b.data[2] = float("nan")
        return plain(run, trained, *rest, **more)

    monkeypatch.setattr(module, "train_apart", spoiled)
    apart = editor.apart(REQUESTS)
    assert isinstance(apart.outcomes[2], EditError)
    assert "broke down at step 0 with loss nan" in str(apart.outcomes[2])
    for i in (0, 1, 3):
        check_outcomes(apart.outcomes[i], healthy.outcomes[i])
        one, other = (logits(those.alone(i), EDITS[i]) for those in (apart, healthy))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    with pytest.raises(EditError, match="broke down at step 0"):
        editor.apply_apart(REQUESTS)
    assert editor.requests == ()
    assert editor.state_dict() == {}
    monkeypatch.undo()
    assert len(editor.apply_apart(REQUESTS)) == 4  # control: nothing is left over to trip on


def test_where_no_gate_opens_it_fails_apart_as_it_does_alone(host):
    """Though an earlier edit's opens at the very same tokens."""
    earlier = make(host, "baft", "default", gate_threshold=0.6)
    earlier.apply(EARLIER)
    editor = make(host, "baft", "default", gate_threshold=0.6, gate_sharpness=0.1)
    editor.load_state_dict(earlier.state_dict(), [EARLIER])
    prompt = EARLIER.edits[0].prompt
    ids = Encoder.for_host(host).prompt(prompt)
    assert max(max(one.weights) for one in editor.explain(ids, len(ids))) > 0
    request = EditRequest((Edit(prompt, "Bob"),))
    with pytest.raises(EditError, match="no gate opens at the edit") as alone:
        editor.apply(request)
    [outcome] = editor.apart([request]).outcomes
    assert str(outcome) == str(alone.value)
    [fine] = earlier.apart([request]).outcomes  # control
    check_outcomes(fine, earlier.apply(request))


@pytest.mark.parametrize("where", ["first step", "commit"])
def test_when_it_breaks_off_nothing_has_changed(host, monkeypatch, where):
    editor = make(host, "baft", "default")
    editor.apply(EARLIER)
    before = logits(editor.edited)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    if where == "commit":
        monkeypatch.setattr("baft.methods.bases.concatenate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        editor.apply_apart(REQUESTS, on_step=interrupt if where == "first step" else None)
    monkeypatch.undo()
    assert editor.requests == (EARLIER,)
    assert torch.equal(logits(editor.edited), before)
    editor.apply_apart(REQUESTS)
    assert not torch.equal(logits(editor.edited), before)  # control


def test_large_requests_are_trained_in_mini_batches(host, monkeypatch):
    seen = []
    plain = module.train_in_batches
    monkeypatch.setattr(
        module,
        "train_in_batches",
        lambda *args, **more: seen.append(args[4].tolist()) or plain(*args, **more),
    )
    editor = make(host, "baft", "default", edits_at_once=2, max_steps=60)
    told = []
    outcome = editor.apply(EditRequest(EDITS), on_step=lambda *one: told.append(one))
    assert seen == [[0, 0, 1, 1, 2, 2, 3, 3]]  # two renderings each
    assert outcome.decoded == (True,) * 4
    assert outcome.n_steps == 2 * len(outcome.losses) == 2 * len(told)
    assert [loss for _, _, loss in told] == list(outcome.losses)
    whole = make(host, "baft", "default", edits_at_once=4, max_steps=60)  # control
    whole.apply(EditRequest(EDITS))
    assert len(seen) == 1


def test_a_method_offers_it_or_not():
    for name in methods.names():
        kind = methods.get(name)
        assert (Capability.STACKED in kind.capabilities) == issubclass(kind, StackedEditor)


def test_stacks_hold_edits_of_like_width():
    widths = [9, 4, 5] * 10 + [20]
    stacks = alike(widths, 64)
    assert [sorted({widths[i] for i in stack}) for stack in stacks] == [[4, 5], [9, 20]]  # one is no stack
    assert sorted(i for stack in stacks for i in stack) == list(range(31))
    assert [len(stack) for stack in alike([5] * 10, 4)] == [4, 4, 2]
    assert alike([3, 99], 64) == [[0, 1]]
