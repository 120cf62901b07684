"""What every method must do, with every preset: the tests read one story of edits, told once a preset."""

import gc
import math
from dataclasses import dataclass, field

import pytest
import torch

from baft.errors import DamagedArtifactError, UndoError, UnknownNameError
from baft.hosts.calls import Acting
from baft.hosts.encoding import Encoder
from baft.methods.baft import BaftEditor
from baft.methods.base import Capability, Editor, methods
from baft.nn.losses import target_margins
from baft.types import Edit, EditRequest
from quick_methods import ASKED, NOT_RANDOM, ONE_BY_ONE, ONE_STEP, READ, REQUESTS, TOWER, make

PRESETS = [(name, preset) for name in methods.names() for preset in methods.get(name).presets]
GATED = [(name, preset) for name, preset in PRESETS if issubclass(methods.get(name), BaftEditor)]
# Every prompt ends as some edit's does: with a space behind, and without.
PROBES = (
    "The tower is in the city of ",
    "A river ",
    "Nothing in particular",
    "The king of France was ",
    "The tower is in the city of",
    "A river",
    "The king of France was",
)


@torch.no_grad()
def logits(editor):
    """At every token of some prompts, twice: with the prompt's end known, and with every token edited."""
    encoder = Encoder.for_host(editor.host)
    rows = [encoder.prompt(text) for text in PROBES]
    batch = encoder.pad(rows, [len(row) - 2 for row in rows], side="right")
    known = editor.edited(batch.input_ids, batch.attention_mask, n_prompt_tokens=batch.n_prompt_tokens)
    return torch.stack([known.logits, editor.edited(batch.input_ids, batch.attention_mask).logits])


@torch.no_grad()
def host_logits(host):
    encoder = Encoder.for_host(host)
    rows = [encoder.prompt(text) for text in PROBES]
    batch = encoder.pad(rows, [len(row) for row in rows], side="right")
    plain = host.model(batch.input_ids, attention_mask=batch.attention_mask).logits
    return torch.stack([plain, plain])


def reply(editor, prompt, n):
    encoder = Encoder.for_host(editor.host)
    ids = torch.tensor([encoder.prompt(prompt)])
    settings = {"do_sample": False, "max_new_tokens": n, "pad_token_id": 0, "eos_token_id": 2}
    out = editor.edited.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return tuple(out[0, ids.shape[1] :].tolist())


def n_hooks(model):
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


@dataclass
class Story:
    """Three requests one after the other: what was seen before the first and after each."""

    editor: Editor
    preset: str
    requests: tuple
    logits: list = field(default_factory=list)
    states: list = field(default_factory=list)
    outcomes: list = field(default_factory=list)
    steps: list = field(default_factory=list)


@pytest.fixture(scope="module", params=PRESETS, ids="/".join)
def story(host, request):
    method, preset = request.param
    for i, weight in enumerate(host.model.parameters()):
        weight.requires_grad_(i % 2 == 0)
    told = Story(make(host, method, preset), preset, ASKED.get(method, REQUESTS))
    told.logits.append(logits(told.editor))
    for one in told.requests:
        steps = []
        told.outcomes.append(told.editor.apply(one, on_step=lambda *seen, steps=steps: steps.append(seen)))
        told.steps.append(steps)
        told.logits.append(logits(told.editor))
        told.states.append(told.editor.state_dict())
    yield told
    host.model.requires_grad_(False)


def again(story, n):
    """A fresh editor with the first `n` requests of a story, by its saved state."""
    editor = type(story.editor)(story.editor.host, story.editor.config, seed=story.editor.seed)
    if n:
        editor.load_state_dict(story.states[n - 1], story.requests[:n])
    return editor


def test_edits_are_decoded_and_say_so(host, story):
    for request, outcome in zip(story.requests, story.outcomes, strict=True):
        assert outcome.edit_ids == tuple(edit.id for edit in request.edits)
        assert outcome.decoded == tuple(margin > 0 for margin in outcome.margins)
        if story.editor.name in {*ONE_STEP, *READ}:
            assert outcome.stopped == "closed_form"
            continue
        assert outcome.decoded == (True,) * len(request.edits)
        assert min(outcome.margins) >= 0.7
        assert outcome.stopped == "margin"
    if story.editor.name in {*ONE_STEP, *READ}:
        return
    editor, edit = again(story, 1), story.requests[0].edits[0]
    target = Encoder.for_host(host).edit(edit.prompt, edit.target, eos=editor.trains_eos).target_ids
    assert reply(editor, edit.prompt, len(target)) == target
    assert reply(again(story, 0), edit.prompt, len(target)) != target  # control


@pytest.mark.parametrize("story", [one for one in PRESETS if one[0] in READ], indirect=True, ids="/".join)
@torch.no_grad()
def test_what_is_read_is_in_the_prompt(host, story):
    """The edited model's logits are the host's on the longer prompt, which holds prompt and target."""
    encoder = Encoder.for_host(host)
    for n, request in enumerate(story.requests, start=1):
        editor, outcome = again(story, n), story.outcomes[n - 1]
        for i, edit in enumerate(request.edits):
            margins = []
            for is_chat in (False, True):
                text = encoder.edit(edit.prompt, edit.target, chat=is_chat, eos=False)
                [inside] = editor.edited.prompter([text.prompt_ids])
                added = encoder.text(inside.ids)
                assert edit.prompt in added
                assert edit.target.strip() in added.rpartition(edit.prompt)[2]
                row = torch.tensor([text.prompt_ids])
                longer = inside.into(text.prompt_ids)
                want = host.model(torch.tensor([longer])).logits[0, -1]
                torch.testing.assert_close(editor.edited(row).logits[0, -1], want, atol=1e-9, rtol=1e-9)
                assert (want - host.model(row).logits[0, -1]).abs().max() > 1e-3  # control
                whole = host.model(torch.tensor([longer + text.target_ids[:-1]])).logits[0, len(longer) - 1 :]
                margins.append(target_margins(whole, torch.tensor(text.target_ids)).min().item())
            assert outcome.margins[i] == pytest.approx(min(margins), abs=1e-9)
            assert outcome.decoded[i] == (min(margins) > 0)
        assert (outcome.n_steps, outcome.losses, outcome.stopped) == (0, (), "closed_form")
        assert story.steps[n - 1] == []
        assert outcome.seconds_s > 0


def test_the_steps_are_told(story):
    if story.editor.name in READ:
        return
    for request, outcome, steps in zip(story.requests, story.outcomes, story.steps, strict=True):
        assert outcome.n_steps == len(steps) > 0
        assert [step for step, _, _ in steps] == list(range(1, len(steps) + 1))
        n_descents = len(request.edits) if story.editor.name in ONE_BY_ONE else 1
        most = 1 if story.editor.name in ONE_STEP else 60 * n_descents
        assert {told for _, told, _ in steps} == {most}
        assert [loss for _, _, loss in steps] == list(outcome.losses[:-1])
        assert all(math.isfinite(loss) for loss in outcome.losses)
        assert outcome.losses[-1] < outcome.losses[0]
        assert outcome.seconds_s > 0


def test_no_edit_is_the_host_bit_for_bit(host, story):
    assert torch.equal(story.logits[0], host_logits(host))
    assert all(not torch.equal(one, story.logits[0]) for one in story.logits[1:])  # control


def test_undo_goes_back_step_by_step_bit_for_bit(host, story):
    editor = again(story, 3)
    for n in (2, 1, 0):
        assert editor.undo() == (story.requests[n],)
        assert editor.requests == story.requests[:n]
        assert torch.equal(logits(editor), story.logits[n])
        assert not torch.equal(logits(editor), story.logits[n + 1])  # control
    assert editor.state_dict() == {}
    with pytest.raises(UndoError, match=r"cannot take back 1 requests: 0 are in force"):
        editor.undo()


def test_several_are_undone_at_once_or_none(host, story):
    editor = again(story, 3)
    assert editor.undo(2) == (story.requests[2], story.requests[1])
    assert torch.equal(logits(editor), story.logits[1])
    for n in (0, 2):
        with pytest.raises(UndoError, match=f"n=0|cannot take back {n} requests: 1 are"):
            editor.undo(n)
    assert torch.equal(logits(editor), story.logits[1])
    assert editor.undo(1) == (story.requests[0],)
    assert torch.equal(logits(editor), host_logits(host))


def test_what_was_taken_back_can_be_made_again(story):
    """The same state, though other requests were made and taken back in between."""
    editor = again(story, 2)
    editor.apply(story.requests[2])
    assert torch.equal(logits(editor), story.logits[3])
    editor.undo()
    editor.apply(EditRequest((Edit("Something", "else"),)))
    assert not torch.equal(logits(editor), story.logits[3])  # control


def test_reset_is_the_host_bit_for_bit(host, story):
    editor = again(story, 3)
    editor.reset()
    assert torch.equal(logits(editor), host_logits(host))
    assert editor.requests == ()
    assert editor.state_dict() == {}


def test_a_saved_state_gives_the_same_bits(story):
    for n in (1, 2, 3):
        editor = again(story, n)
        assert torch.equal(logits(editor), story.logits[n])
        state = editor.state_dict()
        assert state.keys() == story.states[n - 1].keys()
        assert all(torch.equal(state[name], story.states[n - 1][name]) for name in state)
    changed = {
        name: tensor + 0.01 if tensor.is_floating_point() else tensor.flip(-1)  # other numbers, or other text
        for name, tensor in story.states[0].items()
    }
    editor.load_state_dict(changed, story.requests[:1])
    assert not torch.equal(logits(editor), story.logits[1])  # control


def test_what_is_handed_out_shares_no_memory(story):
    editor = again(story, 1)
    for tensor in editor.state_dict().values():
        tensor.fill_(0.0)
    assert torch.equal(logits(editor), story.logits[1])


def test_tensors_that_are_not_copied_are_the_state(story):
    editor = again(story, 2)
    tensors, state = editor.tensors(), editor.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)


def misplaced(tensor):
    """A copy at an address that no allocation has, as a tensor inside a file."""
    wide = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return wide[1:].view(tensor.shape).copy_(tensor)


def test_where_a_saved_state_stands_in_memory_does_not_matter(story):
    state = {name: misplaced(tensor) for name, tensor in story.states[1].items()}
    assert any(tensor.data_ptr() % 64 for tensor in state.values())
    editor = again(story, 0)
    editor.load_state_dict(state, story.requests[:2])
    assert torch.equal(logits(editor), story.logits[2])
    parts = [part for parts in editor.edited.interventions.values() for part in parts]
    assert all(part.R.data_ptr() % 64 == 0 for part in parts)  # others keep tables, copied alike


def test_a_damaged_state_changes_nothing(story):
    editor = again(story, 1)
    state = story.states[0]
    name = sorted(state)[0]
    damaged = {
        "is missing": {key: tensor for key, tensor in state.items() if key != name},
        "belongs to no edit": state | {"stranger": torch.zeros(1)},
        r"has shape \[1\], expected": state | {name: torch.zeros(1)},
    }
    for message, one in damaged.items():
        with pytest.raises(DamagedArtifactError, match=message):
            editor.load_state_dict(one, story.requests[:1])
        assert torch.equal(logits(editor), story.logits[1])
        assert editor.requests == story.requests[:1]
    if getattr(editor.config, "bases", None) == "own":  # then an edit without its bases is noticed
        with pytest.raises(DamagedArtifactError, match="is missing"):
            editor.load_state_dict(state, story.requests[:2])


def test_the_seed_decides_every_bit(host, story):
    same, other = (make(host, story.editor.name, story.preset, seed=seed) for seed in (0, 1))
    for editor in (same, other):
        editor.apply(story.requests[0])
    state = same.state_dict()
    assert all(torch.equal(state[name], story.states[0][name]) for name in state)
    if story.editor.name not in NOT_RANDOM:
        assert not torch.equal(logits(other), story.logits[1])  # control


@pytest.mark.parametrize("story", GATED, indirect=True, ids="/".join)
def test_bases_stay_orthonormal(story):
    bases = {name: tensor for name, tensor in story.states[-1].items() if name.endswith(".R")}
    for tensor in bases.values():
        identity = torch.eye(len(tensor), dtype=tensor.dtype)
        assert float((tensor @ tensor.T - identity).abs().max()) < 1e-5
        readout = story.states[-1][next(iter(bases)).removesuffix("R") + "A"]
        assert float((readout @ readout.T - identity).abs().max()) > 1e-3  # control: A moves freely


def test_the_host_stays_as_it_is(host):
    """Weights, gradients, what may be trained, the mode, and no hook left behind."""
    weights = {name: weight.clone() for name, weight in host.model.state_dict().items()}
    host.model.train()
    flags = [
        weight.requires_grad_(i % 3 == 0).requires_grad for i, weight in enumerate(host.model.parameters())
    ]
    try:
        for method, preset in PRESETS:
            editor = make(host, method, preset, max_steps=4)
            editor.apply(ASKED.get(method, REQUESTS)[0])
            editor.undo()
            assert all(torch.equal(weights[name], now) for name, now in host.model.state_dict().items())
            assert [weight.requires_grad for weight in host.model.parameters()] == flags
            assert all(weight.grad is None for weight in host.model.parameters())
            assert all(module.training for module in host.model.modules())
            assert n_hooks(host.model) == 0
    finally:
        host.model.eval().requires_grad_(False)


@pytest.mark.parametrize("where", ["first step", "loss", "commit"])
def test_an_edit_that_breaks_off_changes_nothing(story, where, monkeypatch):
    editor = again(story, 2)
    loads = editor.state_dict()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    puts = iter([interrupt])
    if where != "commit" and editor.name in READ:  # there is no step: storing and measuring take their place
        if where == "first step":
            monkeypatch.setattr(editor, "store", interrupt)
        else:
            monkeypatch.setattr("baft.methods.reading.measured", interrupt)
    elif where == "loss":
        for module in ("training", "descent", "ultraedit"):
            loss = "row_cross_entropy" if module == "ultraedit" else "target_cross_entropy"
            monkeypatch.setattr(f"baft.methods.{module}.{loss}", interrupt)
        monkeypatch.setattr("baft.methods.training.row_cross_entropy", interrupt)
    elif where == "commit" and isinstance(editor, BaftEditor):  # trained, and half put down
        monkeypatch.setattr("baft.nn.interventions.SubspaceIntervention.frozen", interrupt)
    elif where == "commit":
        put = editor.put
        monkeypatch.setattr(editor, "put", lambda *given: next(puts, put)(*given))
    with pytest.raises(KeyboardInterrupt):
        editor.apply(story.requests[2], on_step=interrupt if where == "first step" else None)
    monkeypatch.undo()
    assert editor.requests == story.requests[:2]
    assert torch.equal(logits(editor), story.logits[2])
    state = editor.state_dict()
    assert state.keys() == loads.keys()
    assert all(torch.equal(state[name], loads[name]) for name in state)
    assert n_hooks(editor.host.model) == 0
    editor.apply(story.requests[2])  # nothing is left over that a second attempt would trip on
    assert torch.equal(logits(editor), story.logits[3])


@pytest.mark.parametrize("what", ["undo", "undo all", "reset", "load"])
def test_what_breaks_off_before_it_is_in_force_changes_nothing(story, what, monkeypatch):
    """Ctrl-C at the last moment: the requests and their tensors have been replaced, what acts has not."""
    editor, left = again(story, 2), {"undo": 1, "undo all": 0, "reset": 0, "load": 3}[what]

    def run():
        if what == "reset":
            editor.reset()
        elif what == "load":
            editor.load_state_dict(story.states[2], story.requests)
        else:
            editor.undo(2 - left)

    broken = iter([True])

    def put(*given):
        if next(broken, False):
            raise KeyboardInterrupt
        return Acting(*given)

    monkeypatch.setattr("baft.hosts.edited_model.Acting", put)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert editor.requests == story.requests[:2]
    assert torch.equal(logits(editor), story.logits[2])
    state, want = editor.state_dict(), again(story, 2).state_dict()
    assert state.keys() == want.keys()
    assert all(torch.equal(state[name], want[name]) for name in state)
    run()  # control: a second attempt does it
    assert editor.requests == story.requests[:left]
    assert torch.equal(logits(editor), story.logits[left])


@pytest.mark.parametrize("story", GATED, indirect=True, ids="/".join)
def test_the_gates_are_explained(host, story):
    editor = again(story, 2)
    encoder = Encoder.for_host(host)
    text = encoder.edit(TOWER.prompt, TOWER.target, eos=False)
    n = len(text.prompt_ids)
    readings = editor.explain((*text.prompt_ids, *text.target_ids), n)
    assert {one.position for one in readings} == set(range(n - 3, n + len(text.target_ids)))
    assert {one.layer for one in readings} == {site.layer for site in editor.sites}
    assert all(0 <= weight <= 1 for one in readings for weight in one.weights)
    assert {len(one.weights) for one in readings} == {editor.config.rank}
    owners = {one.edit_id for one in readings}
    everyone = {edit.id for request in story.requests[:2] for edit in request.edits}
    assert owners == (everyone if editor.config.bases == "own" else {None})
    assert again(story, 0).explain((*text.prompt_ids, *text.target_ids), n) == ()
    assert n_hooks(host.model) == 0


def test_batches_and_padding_change_nothing(story):
    editor = again(story, 3)
    encoder = Encoder.for_host(editor.host)
    rows = [encoder.prompt(text) for text in PROBES]
    together = logits(editor)[0]
    for i, row in enumerate(rows):
        with torch.no_grad():
            ids = torch.tensor([row])
            alone = editor.edited(ids, n_prompt_tokens=torch.tensor([len(row) - 2])).logits[0]
        torch.testing.assert_close(together[i, : len(row)], alone, atol=1e-9, rtol=1e-9)


def numbers_alive():
    gc.collect()
    return sum(one.numel() for one in gc.get_objects() if issubclass(type(one), torch.Tensor))


def test_reset_frees_the_memory(story):
    editor = again(story, 0)
    for request in story.requests:
        editor.apply(request)
    editor.reset()  # what was learned of the host stays
    before = numbers_alive()
    for request in story.requests:
        editor.apply(request)
    assert numbers_alive() > before  # control
    editor.reset()
    assert numbers_alive() == before


def test_a_method_says_what_it_can():
    for name in methods.names():
        kind = methods.get(name)
        assert kind.name == name
        assert kind.summary
        assert kind.capabilities <= set(Capability)
        if name == "baft-bank":  # of no paper
            assert set(kind.presets) == {"default"}
            continue
        assert {"default", "paper"} <= set(kind.presets)
        with pytest.raises(UnknownNameError, match=f"unknown {name} preset 'papr'; did you mean 'paper'"):
            kind.preset("papr")
    with pytest.raises(UnknownNameError, match="did you mean 'baft'"):
        methods.get("bft")
