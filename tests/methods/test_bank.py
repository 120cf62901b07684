"""Edits that know their scope: each acts on its own prompts, as if the others did not exist."""

import dataclasses
import os

import pytest
import torch

import baft
from baft.artifact import pieces
from baft.errors import (
    ArtifactError,
    ConfigError,
    ConflictError,
    DamagedArtifactError,
    EditError,
    InputError,
    UnknownNameError,
)
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.methods import bank as module
from baft.methods.bank import BankEditor
from baft.methods.bank_config import BankConfig
from baft.scope import scope
from baft.scope.index import ScopeIndex
from baft.scope.scope import Scope
from baft.scope.untrained import UntrainedHead
from baft.settling import settled
from baft.types import Edit, EditRequest
from tiny import CHATML, tiny_host, tiny_tokenizer

TOWER = Edit("The tower is in the city of", "Ro")
KING = Edit("The king of France was", "Al")
HATS = Edit("Nine hats of", "Co")
EDITS = (TOWER, KING, HATS)
QUICK = {"learning_rate": 5e-2, "max_steps": 60, "stop_margin": 0.7, "schedule": "constant", "n_others": 1}
ASKED = [edit.prompt for edit in EDITS] + ["Nothing in particular", "A river"]
OPTIONS = {"method": "baft-bank", **QUICK}


@pytest.fixture(autouse=True, scope="module")
def _strict():
    """The tiny hosts' tokens are letters, and most prompts hold most letters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("baft.scope.untrained._MIDPOINT", 0.99)
        yield


@pytest.fixture
def model(host):
    return baft.load((host.model, host.tokenizer))


def editor_of(host, **settings):
    return BankEditor(host, BankConfig(**QUICK | settings))


def logits(model):
    return torch.stack([model.logits(prompt) for prompt in ASKED])


def in_force(host, *edits):
    model = baft.load((host.model, host.tokenizer))
    for edit in edits:
        model.edit(edit, **OPTIONS)
    return model


@pytest.fixture(scope="module")
def alone(host):
    """The logits with each edit alone, and with none."""
    return [logits(in_force(host, edit)) for edit in EDITS], logits(in_force(host))


def test_each_edit_acts_on_its_own_prompts_as_if_it_were_alone(host, alone):
    of_edits, plain = alone
    for order in ((0, 1, 2), (2, 0, 1)):
        now = logits(in_force(host, *(EDITS[i] for i in order)))
        for i in range(3):
            assert torch.equal(now[i], of_edits[i][i])
            assert not torch.equal(now[i], plain[i])  # control
        assert torch.equal(now[3:], plain[3:])


def test_made_at_once_they_are_what_they_are_alone(host, model, alone):
    model.edit_many(EDITS, **OPTIONS)
    together = in_force(host)
    together.edit(EDITS, **OPTIONS)
    for one in (model, together):
        torch.testing.assert_close(logits(one)[:3], torch.stack([alone[0][i][i] for i in range(3)]))
        assert torch.equal(logits(one)[3:], alone[1][3:])


def test_a_row_s_own_edit_alone_is_asked(host):
    editor = editor_of(host)
    requests = [EditRequest((edit,)) for edit in EDITS]
    apart = editor.apart(requests)
    encoder = Encoder.for_host(host)
    rows = [encoder.prompt(TOWER.prompt)] * 3
    batch = encoder.pad(rows, [len(row) for row in rows], side="right")
    got = apart.by_row([0, 1, 2])(batch.input_ids).logits
    plain = host.model(batch.input_ids).logits
    assert not torch.equal(got[0], plain[0])
    assert torch.equal(got[1:], plain[1:])  # the others' edits are about something else
    assert apart.explain(0, rows[0], len(rows[0]))[0].edit_id == TOWER.id
    assert apart.explain(1, rows[0], len(rows[0])) == ()
    assert editor.edited.router is None
    with pytest.raises(ConfigError, match="one to a request"):
        editor.apart([EditRequest(EDITS)])


def test_bases_are_doubled_until_the_target_is_decoded(host):
    few = editor_of(host, rank=1, most_rank=1, max_steps=2)
    grown = editor_of(host, rank=1, most_rank=4, max_steps=2)
    for editor in (few, grown):
        editor.apply(EditRequest((TOWER,)))
    ranks = [len(editor.state[f"{TOWER.id}.layer{editor.sites[0].layer}.b"]) for editor in (few, grown)]
    assert ranks == [1, 4]
    enough = editor_of(host)
    assert enough.apply(EditRequest((TOWER,))).stopped == "margin"
    assert len(enough.state[f"{TOWER.id}.layer{enough.sites[0].layer}.b"]) == enough.config.rank


def test_edits_of_different_rank_act_in_one_batch(host, model, alone):
    model.edit(TOWER, **OPTIONS)
    editor = model._editor
    wide = editor_of(host, rank=8)
    wide.apply(EditRequest((KING,)))
    state = {**editor.state_dict(), **wide.state_dict()}
    editor.load_state_dict(state, (EditRequest((TOWER,)), EditRequest((KING,))))
    encoder = Encoder.for_host(host)
    rows = [encoder.prompt(edit.prompt) for edit in (TOWER, KING, HATS)]
    batch = encoder.pad(rows, [len(row) for row in rows], side="right")
    got = editor.edited(batch.input_ids, batch.attention_mask, n_prompt_tokens=batch.n_prompt_tokens).logits
    for i, (single, row) in enumerate(zip((editor, wide), rows, strict=False)):
        want = single.edited(torch.tensor([row]), n_prompt_tokens=torch.tensor([len(row)])).logits[0]
        torch.testing.assert_close(got[i, : len(row)], want)


def test_rephrasings_are_found_by_thresholds_of_their_own(host):
    other = "Which hat is the ninth"
    plain, reworded = (in_force(host, one) for one in (HATS, dataclasses.replace(HATS, rephrasings=(other,))))
    before = in_force(host).logits(other)
    assert torch.equal(plain.logits(other), before)
    assert not torch.equal(reworded.logits(other), before)
    thresholds = reworded._editor.state[f"{reworded.edits[0].edit.id}.thresholds"]
    assert thresholds.shape == (2,)


def test_of_two_edits_of_one_prompt_the_later_acts_whatever_it_was_made_with(host):
    first = dataclasses.replace(TOWER, rephrasings=("Where the tower stands",))
    model = baft.load((host.model, host.tokenizer))
    model.edit_many([KING, first, HATS], **OPTIONS)
    later = Edit(TOWER.prompt, "Be")
    model.edit(later, **OPTIONS)
    state = model._editor.state_dict()
    n = int(state[f"{first.id}.lengths"][0])
    assert torch.equal(state[f"{first.id}.vectors"][:, :n], state[f"{later.id}.vectors"])
    assert torch.equal(state[f"{first.id}.weights"][:, :n], state[f"{later.id}.weights"])
    numbers = model._editor._bank.find([model._editor.encoder.prompt(TOWER.prompt)])
    assert [model._editor._bank.edits[i] for i in numbers.tolist()] == [later.id]


@pytest.mark.parametrize("named", ["neighbors", "unrelated"])
def test_neighbors_stay_raw_and_in_chat_and_the_edit_acts(host, named, monkeypatch):
    monkeypatch.setattr("baft.scope.untrained._MIDPOINT", 0.6)
    near, model, plain = "Nine cats", in_force(host, HATS), in_force(host)
    chat = [{"role": "user", "content": near}]
    assert not torch.equal(model.logits(near), plain.logits(near))  # control
    assert not torch.equal(model.logits(messages=chat), plain.logits(messages=chat))
    model.undo()
    if named == "neighbors":
        model.edit(dataclasses.replace(HATS, neighbors=(near,)), **OPTIONS)
    else:
        model.edit(HATS, unrelated=[near], **OPTIONS)
    model.edit(KING, **OPTIONS)
    for one in ({"prompt": near}, {"messages": chat}):
        assert torch.equal(model.logits(**one), plain.logits(**one))
    own = [{"role": "user", "content": HATS.prompt}]
    for one in ({"prompt": HATS.prompt}, {"messages": own}):
        assert not torch.equal(model.logits(**one), plain.logits(**one))


def test_neighbors_narrow_the_scope_and_leave_the_bases(host):
    plain, other = editor_of(host), dataclasses.replace(HATS, neighbors=("A river",))
    narrow = editor_of(host)
    plain.apply(EditRequest((HATS,)))
    narrow.apply(EditRequest((other,)))
    bases = [name for name in plain.state if "layer" in name]
    assert bases
    for name in bases:
        assert torch.equal(plain.state[name], narrow.state[name.replace(HATS.id, other.id)])
    spared = narrow._scope.read(narrow._scope.asked(["A river"]))
    reached = narrow._bank._index.log_probability(spared).max()
    threshold = narrow.state[f"{other.id}.thresholds"][0]
    assert threshold >= reached + 0.9e-3  # rounding in another batch does not bring it above
    assert torch.equal(threshold, plain.state[f"{HATS.id}.thresholds"][0].maximum(reached + 1e-3))


def test_on_a_coarse_host_scopes_keep_clear_by_more_and_are_read_anew(monkeypatch):
    monkeypatch.setattr("baft.scope.untrained._MIDPOINT", 0.6)
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    halves, singles = (
        Host("tiny", tiny_host("llama", max_position_embeddings=512, dtype=dtype), tokenizer, "tiny")
        for dtype in (torch.bfloat16, torch.float32)
    )
    edit = dataclasses.replace(HATS, neighbors=("Ten hats of",))
    coarse, fine = editor_of(halves), editor_of(singles)
    for editor, clearance in ((coarse, 0.05), (fine, 1e-3)):
        [keys] = editor._scope.keys([edit])
        [plain] = editor._scope.keys([HATS])
        reached = ScopeIndex(editor._scope.head, [plain]).log_probability(
            editor._scope.read(editor._scope.asked(["Ten hats of"]))
        )
        want = plain.thresholds[0].maximum(reached.max() + clearance)
        torch.testing.assert_close(keys.thresholds[0], want, rtol=0, atol=1e-6)
        assert reached.max() + clearance > plain.thresholds[0]  # control: the neighbor raises it
    fine.apply(EditRequest((KING,)))
    coarse.load_state_dict(fine.state_dict(), fine.requests)
    [anew] = coarse.keys([KING])
    assert int(anew["head"]) != int(fine.state[f"{KING.id}.head"])
    for name, tensor in anew.items():
        assert torch.equal(coarse.state[f"{KING.id}.{name}"], tensor)


def test_a_host_of_short_context_is_trained_on_what_fits():
    short = Host("short", tiny_host("llama", max_position_embeddings=40), tiny_tokenizer(), "tiny")
    editor = editor_of(short, n_others=4)
    texts = [text for edit in EDITS for text in editor._texts(edit)]
    assert len(texts) == 15
    assert len({text.prompt_ids for text in texts}) < 15  # control: some of the others are too long
    assert editor.apply(EditRequest(EDITS)).decoded == (True,) * 3


def test_edits_meet_if_either_acts_on_the_other(host, monkeypatch):
    one, other = (ScopeIndex(editor_of(host)._scope.head, []) for _ in range(2))
    told = {one: [[False, True, False], [False] * 3], other: [[False] * 2, [False] * 2, [True, False]]}
    monkeypatch.setattr(ScopeIndex, "acts_on", lambda self, _: torch.tensor(told[self]))
    assert module._meeting(other, one) == [(0, 1), (0, 2)]


def test_an_edit_is_also_trained_behind_texts_of_its_own_drawing(host):
    one = editor_of(host, n_others=4)
    texts = {edit: one._texts(edit) for edit in (HATS, KING)}
    rows = {edit: [text.prompt_ids for text in of_edit] for edit, of_edit in texts.items()}
    assert [len(of_edit) for of_edit in rows.values()] == [6, 6]
    turns = one.encoder.chat([{"role": "user", "content": "?"}])[:3]
    assert [row[:3] == turns for row in rows[HATS]] == [False, True, False, True, False, False]
    assert rows[HATS][2:] == [text.prompt_ids for text in one._texts(HATS)[2:]]
    assert rows[HATS][2:] != rows[KING][2:]
    assert {text.target_ids for text in texts[HATS] if len(text.target_ids)} == {
        text.target_ids for text in texts[HATS][:2]
    }


def test_a_neighbor_that_would_shut_the_edit_is_refused(host, model):
    near = HATS.prompt + " and"  # it says all that the edit says
    with pytest.raises(InputError, match=f"'{near}' shall stay as it is, and is so near to 'Nine hats of'"):
        model.edit(dataclasses.replace(HATS, neighbors=("Something", near)), **OPTIONS)
    with pytest.raises(InputError, match=f"'{near}' shall stay as it is"):
        model.edit(HATS, unrelated=["Something", near], **OPTIONS)
    assert model.edits == ()


@pytest.mark.parametrize("near", ["Which hat is the ninth", "Which hat is the ninth one"])
def test_a_neighbor_that_would_shut_a_rephrasing_is_refused(host, model, near):
    other = "Which hat is the ninth"
    edit = dataclasses.replace(HATS, rephrasings=(other,), neighbors=(near,))
    with pytest.raises(InputError, match=f"near to '{other}' that the edit would not act on this rephrasing"):
        model.edit(edit, **OPTIONS)
    assert model.edits == ()
    model.edit(dataclasses.replace(edit, rephrasings=()), **OPTIONS)  # its own prompt is far from it
    assert torch.equal(model.logits(near), in_force(host).logits(near))


def test_misshapen_tensors_are_refused(host):
    editor, request = editor_of(host), EditRequest((TOWER,))
    editor.apply(request)
    state, site = editor.state_dict(), editor.sites[0].layer
    n_channels, n_tokens, n_dims = state[f"{TOWER.id}.vectors"].shape
    wrong = {
        "vectors": torch.zeros(n_channels, n_tokens, n_dims + 1),
        "weights": torch.zeros(n_channels, n_tokens - 1),
        "lengths": torch.tensor([n_tokens + 1]),
        "thresholds": torch.zeros(2),
        f"layer{site}.b": torch.zeros(0),
        f"layer{site}.A": state[f"{TOWER.id}.layer{site}.A"][:2],
        f"layer{editor.sites[-1].layer}.R": torch.zeros(1, n_dims),
    }
    for name, tensor in wrong.items():
        with pytest.raises(DamagedArtifactError, match="has shape"):
            editor.load_state_dict({**state, f"{TOWER.id}.{name}": tensor}, (request,))
    of_bases = {f"{TOWER.id}.layer{one.layer}.{part}" for one in editor.sites for part in "RAb"}
    none = {name: tensor[:0] if name in of_bases else tensor for name, tensor in state.items()}
    with pytest.raises(DamagedArtifactError, match="has shape"):
        editor.load_state_dict(none, (request,))
    for lengths in (torch.tensor([float(n_tokens)]), torch.tensor([0]), torch.tensor([n_tokens + 1, -1])):
        with pytest.raises(DamagedArtifactError, match=r"lengths' holds .* in torch\..*, expected"):
            editor.load_state_dict({**state, f"{TOWER.id}.lengths": lengths}, (request,))
    editor.load_state_dict(state, (request,))


def test_an_empty_turn_is_no_reason_to_break_off(host, model):
    model.edit(HATS, **OPTIONS)
    empty = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    assert torch.isfinite(model.logits(empty)).all()
    model.edit("Say <|im_start|>user\n", "Al", **OPTIONS)


def test_a_state_with_other_thresholds_is_put_into_force(host):
    editor, request = editor_of(host), EditRequest((TOWER,))
    editor.apply(request)
    row = [Encoder.for_host(host).prompt(TOWER.prompt)]
    assert editor._bank.find(row).tolist() == [0]
    never = {f"{TOWER.id}.thresholds": torch.tensor([1.0])}  # no log-probability is above it
    editor.load_state_dict({**editor.tensors(), **never}, (request,))
    assert editor._bank.find(row).tolist() == [-1]


def test_removing_an_edit_is_as_if_it_had_never_been_made(host, alone):
    model = in_force(host, *EDITS)
    assert model.remove(KING.id) == (KING,)
    assert [one.edit for one in model.edits] == [TOWER, HATS]
    assert torch.equal(logits(model), logits(in_force(host, TOWER, HATS)))
    assert torch.equal(logits(model)[1], alone[1][1])
    with pytest.raises(UnknownNameError, match=f"no edit has the id '{KING.id}'; the ids are {TOWER.id}"):
        model.remove(KING.id)
    assert model.undo() == (HATS,)
    model.remove(TOWER.id)
    assert torch.equal(logits(model), alone[1])
    assert model.edits == ()
    with pytest.raises(ArtifactError, match="edit first"):
        model.remove(TOWER.id)


def test_a_subset_is_as_if_the_others_had_never_been_made(host):
    model = in_force(host, *EDITS)
    assert model.subset(HATS.id, TOWER.id) == (KING,)
    assert [one.edit for one in model.edits] == [TOWER, HATS]
    assert torch.equal(logits(model), logits(in_force(host, TOWER, HATS)))
    for ids, error, message in (
        ((KING.id,), UnknownNameError, f"no edit has the id '{KING.id}'"),
        ((), ArtifactError, "keep at least one edit"),
    ):
        with pytest.raises(error, match=message):
            model.subset(*ids)
    assert model.subset(TOWER.id, HATS.id) == ()


def test_sets_are_merged_in_any_order(host, tmp_path):
    paths = [
        in_force(host, *some).save(tmp_path / f"{i}.baft") for i, some in enumerate([EDITS[:2], EDITS[1:]])
    ]
    want = logits(in_force(host, *EDITS))
    for first, second in (paths, paths[::-1]):
        model = in_force(host)
        assert len(model.merge(first)) == 2
        assert len(model.merge(second)) == 1  # the one that both hold is there already
        assert torch.equal(logits(model), want)
        assert model.merge(second) == ()
        model.save(tmp_path / "both.baft")
        again = baft.load(tmp_path / "both.baft", host=(host.model, host.tokenizer))
        assert torch.equal(logits(again), want)
    model = in_force(host)
    model.edit(TOWER, **OPTIONS | {"stop_margin": 0.8})
    with pytest.raises(ArtifactError, match="the sets differ in settings"):
        model.merge(paths[1])
    shared = baft.load((host.model, host.tokenizer))
    shared.edit([TOWER, KING], method="reft", learning_rate=5e-2, max_steps=60, stop_margin=0.7)
    with pytest.raises(ArtifactError, match="share what they learned"):
        shared.remove(TOWER.id)


@pytest.mark.parametrize("choice", ["keep", "replace", "refuse"])
def test_edits_that_say_something_else_are_met_when_sets_are_merged(host, tmp_path, caplog, choice):
    other = in_force(host, KING, Edit(TOWER.prompt, "Be")).save(tmp_path / "other.baft")
    model = in_force(host, HATS, TOWER)
    before = logits(model)
    if choice == "refuse":
        with pytest.raises(ConflictError, match=r"conflicts with 'The tower is in the city of' -> 'Ro' \("):
            model.merge(other, on_conflict=choice)
        assert torch.equal(logits(model), before)
        assert len(model.edits) == 2
        return
    assert [one.target for one in model.merge(other, on_conflict=choice)] == ["Al", "Be"]
    assert [one.replaced for one in model.edits] == [False, choice == "replace", False, False]
    assert ("-> 'Be' ('Ro' before)" in caplog.text) == (choice == "keep")
    want = in_force(host, HATS, KING, Edit(TOWER.prompt, "Be"))
    assert torch.equal(logits(model), logits(want))  # of equals the later one acts
    again = baft.load(model.save(tmp_path / "both.baft"), host=(host.model, host.tokenizer))
    assert [one.replaced for one in again.edits] == [one.replaced for one in model.edits]
    again.remove(again.edits[-1].edit.id)
    assert torch.equal(logits(again), logits(in_force(host, HATS, TOWER, KING)))


def test_a_merge_meets_what_comes_into_force_and_not_what_its_own_set_settled(
    host, tmp_path, caplog, monkeypatch
):
    new = Edit(TOWER.prompt, "Be")
    settled_there = in_force(host, TOWER)
    settled_there.edit(new, on_conflict="replace", **OPTIONS)
    both = settled_there.save(tmp_path / "both.baft")
    model = in_force(host, TOWER)  # an earlier state of the same set
    assert [one.target for one in model.merge(both, on_conflict="refuse")] == ["Be"]
    assert [one.replaced for one in model.edits] == [True, False]
    model = in_force(host, new)  # without the one that it replaced there
    before = logits(model)
    assert [one.target for one in model.merge(both, on_conflict="refuse")] == ["Ro"]
    assert [(one.edit.target, one.replaced) for one in model.edits] == [("Ro", True), ("Be", False)]
    assert torch.equal(logits(model), before)
    assert not caplog.text
    assert model.undo() == (new,)
    assert torch.equal(logits(model), logits(in_force(host, TOWER)))
    apart = in_force(host)
    apart.edit(new, unrelated=["The king"], **OPTIONS)
    path = apart.save(tmp_path / "apart.baft")
    model, seen = in_force(host, KING, TOWER), []
    as_it_was = BankEditor._conflicts

    def conflicts(self, edits, keys, among):
        seen.append((edits, keys, among))
        return as_it_was(self, edits, keys, among)

    with monkeypatch.context() as patch:
        patch.setattr(BankEditor, "_conflicts", conflicts)
        patch.setattr(Scope, "keys", lambda *_, **__: pytest.fail("the keys were read anew"))
        model.merge(path)
    [(edits, [keys], among)] = seen
    assert (edits, among) == ([new], None)
    state = apart._editor.state_dict()  # as they are put into force, kept from what they are to spare
    for name in ("vectors", "weights", "thresholds", "spelling"):
        assert torch.equal(getattr(keys, name), state[f"{new.id}.{name}"])
    assert "('Ro' before)" in caplog.text


def test_a_merge_leaves_replaced_what_was_replaced_before(host, tmp_path):
    model = in_force(host, TOWER)
    model.edit(Edit(TOWER.prompt, "Be"), on_conflict="replace", **OPTIONS)
    model.edit(KING, **OPTIONS)
    model.merge(in_force(host, Edit(KING.prompt, "Fr")).save(tmp_path / "a.baft"), on_conflict="replace")
    assert [(one.edit.target, one.replaced) for one in model.edits] == [
        ("Ro", True),
        ("Be", False),
        ("Al", True),
        ("Fr", False),
    ]


def test_what_an_added_set_replaced_itself_meets_nothing(host, tmp_path, caplog):
    added = in_force(host, Edit(TOWER.prompt, "Be"))
    added.edit(Edit(TOWER.prompt, "Co"), on_conflict="replace", **OPTIONS)
    model = in_force(host, TOWER)
    model.merge(added.save(tmp_path / "a.baft"))
    assert "-> 'Co' ('Ro' before)" in caplog.text
    assert "'Be'" not in caplog.text
    assert [one.replaced for one in model.edits] == [False, True, False]


def test_a_merge_reads_strange_scopes_once(host, tmp_path, monkeypatch, caplog):
    path = in_force(host, KING, HATS).save(tmp_path / "a.baft")
    monkeypatch.setattr("baft.scope.untrained._RECIPE", 3)
    model, read, as_it_was = in_force(host, TOWER), [], Scope.keys

    def keys(self, edits, *rest, **options):
        read.append(edits)
        return as_it_was(self, edits, *rest, **options)

    monkeypatch.setattr(Scope, "keys", keys)
    model.merge(path)
    assert read == [[KING, HATS]]
    assert caplog.text.count("read with another head") == 1
    assert len(model.edits) == 3


def test_one_more_edit_is_an_append_and_changes_no_bit(host, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1024)
    path, model = tmp_path / "a.baft", in_force(host, *EDITS[:2])
    model.save(path)
    before = {file.name: file.stat() for file in path.glob("state*")}
    model = baft.load(path, host=(host.model, host.tokenizer))
    assert torch.equal(logits(model), logits(in_force(host, *EDITS[:2])))
    model.edit(HATS, **OPTIONS)
    model.save(path)
    shared = {name for name, was in before.items() if (path / name).stat().st_ino == was.st_ino}
    assert shared == {name for name, was in before.items() if was.st_size >= 1024} != set()
    loaded = baft.load(path, host=(host.model, host.tokenizer))
    assert torch.equal(logits(loaded), logits(in_force(host, *EDITS)))
    loaded.undo(2)
    loaded.save(path)
    last = baft.load(path, host=(host.model, host.tokenizer))
    assert torch.equal(logits(last), alone[0][0])


@pytest.mark.parametrize("what", ["remove", "merge", "elsewhere"])
def test_what_was_changed_under_a_model_is_not_saved_as_sound(host, tmp_path, monkeypatch, what):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1024)
    path = tmp_path / "a.baft"
    in_force(host, *EDITS[:2]).save(path)
    if what == "merge":
        model = in_force(host, HATS)
        model.merge(path)
    else:
        model = baft.load(path, host=(host.model, host.tokenizer))
    os.truncate(model._pieces[-1].path, 16)
    if what == "remove":
        model.remove(TOWER.id)
    with pytest.raises(DamagedArtifactError, match="changed in place since it was read"):
        model.save(path if what == "remove" else tmp_path / "b.baft")


def test_edits_made_and_read_in_inference_mode_are_like_any_other(host, tmp_path, monkeypatch):
    with torch.inference_mode():
        model = in_force(host, TOWER)
        path = in_force(host, KING).save(tmp_path / "a.baft")
        monkeypatch.setattr("baft.scope.untrained._RECIPE", 3)
        model.merge(path)  # its scope is read anew
    state = model._editor.state
    assert int(state[f"{KING.id}.head"]) == model._editor._scope.fingerprint
    assert not any(tensor.is_inference() for name, tensor in state.items() if "layer" not in name)


def test_conflicts_are_kept_replaced_or_refused(host, alone):
    other = dataclasses.replace(TOWER, target="Be")
    model = in_force(host, TOWER, KING)
    with pytest.raises(ConflictError, match=f"conflicts with .*'Ro' .{TOWER.id}"):
        model.edit(other, on_conflict="refuse", **OPTIONS)
    with pytest.raises(ConfigError, match="on_conflict is one of keep, replace, refuse, got 'ask'"):
        settled([EditRequest((other,))], [], "ask")
    assert torch.equal(logits(model)[:2], torch.stack([alone[0][0][0], alone[0][1][1]]))
    of_other = logits(in_force(host, other))[0]
    for how in ("keep", "replace"):
        report = model.edit(other, on_conflict=how, **OPTIONS)
        [row] = report.conflicts
        assert (row.old_id, row.edit_id, row.replaced) == (TOWER.id, other.id, how == "replace")
        assert "conflict with 'The tower is in the city of' -> 'Ro': " in str(report)
        assert [one.replaced for one in model.edits] == [how == "replace", False, False]
        assert report.broken == (() if how == "replace" else (TOWER.prompt,))
        assert torch.equal(logits(model)[0], of_other)  # of equals the later one
        assert model.undo() == (other,)
        assert torch.equal(logits(model)[0], alone[0][0][0])
    assert model.edit(HATS, on_conflict="refuse", **OPTIONS).conflicts == ()


def test_conflicts_inside_one_call_are_found(host, model):
    other = dataclasses.replace(TOWER, target="Be")
    with pytest.raises(ConflictError, match="conflicts with"):
        model.edit_many([TOWER, KING, other], on_conflict="refuse", **OPTIONS)
    report = model.edit_many([TOWER, KING, other], on_conflict="replace", **OPTIONS)
    assert [(row.edit_id, row.old_id) for row in report.conflicts] == [(other.id, TOWER.id)]
    assert [one.replaced for one in model.edits] == [True, False, False]


def test_conflicts_are_found_in_pieces_too(host, model, monkeypatch):
    monkeypatch.setattr(module, "_MET_AT_ONCE", 2)
    others = [dataclasses.replace(TOWER, target="Be"), dataclasses.replace(TOWER, target="Co")]
    report = model.edit_many([TOWER, KING, *others], **OPTIONS)
    want = {(others[0].id, TOWER.id), (others[1].id, TOWER.id), (others[1].id, others[0].id)}
    assert {(row.edit_id, row.old_id) for row in report.conflicts} == want
    assert len(report.conflicts) == 3
    heard = model._editor.heard([HATS.prompt, KING.prompt, TOWER.prompt])
    everyone = {TOWER.id, *(one.id for one in others)}
    assert [[one.firing for one in ways] for ways in heard][1:] == [[{KING.id}] * 2, [everyone] * 2]
    assert [{one.acting for one in ways} for ways in heard] == [{None}, {KING.id}, {others[1].id}]


def test_who_replaced_whom_survives_removal(host, alone):
    second, third = (dataclasses.replace(TOWER, target=text) for text in ("Be", "Co"))
    options = {**OPTIONS, "on_conflict": "replace"}

    def replaced(model):
        return [(one.edit.target, one.replaced) for one in model.edits if one.edit.prompt == TOWER.prompt]

    chain = in_force(host, TOWER)
    chain.edit(second, **options)
    with pytest.raises(InputError, match="was replaced by a later edit"):
        chain.edit(TOWER, **options)
    chain.edit(third, **options)
    chain.remove(second.id)
    assert replaced(chain) == [("Ro", True), ("Co", False)]
    chain.remove(third.id)
    assert torch.equal(logits(chain)[0], alone[0][0][0])

    batch = in_force(host, TOWER)
    batch.edit([second, KING], **options)
    batch.remove(second.id)
    assert replaced(batch) == [("Ro", False)]
    assert torch.equal(logits(batch)[0], alone[0][0][0])

    again = in_force(host, TOWER)
    again.edit(second, **options)
    again.remove(TOWER.id)
    again.edit(TOWER, **options)
    assert replaced(again) == [("Be", True), ("Ro", False)]
    assert torch.equal(logits(again)[0], alone[0][0][0])


@pytest.mark.parametrize("how", ["remove", "merge"])
def test_ctrl_c_while_a_set_is_swapped_changes_nothing(host, how, tmp_path, monkeypatch):
    path = in_force(host, HATS).save(tmp_path / "hats.baft")
    model = in_force(host, TOWER, KING)
    before, edits, broken = logits(model), model.edits, iter([True])
    follow = EditedModel.follow

    def interrupted(self, other):
        if next(broken, False):
            raise KeyboardInterrupt
        follow(self, other)

    monkeypatch.setattr(EditedModel, "follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.remove(TOWER.id) if how == "remove" else model.merge(path)
    assert model.edits == edits
    assert torch.equal(logits(model), before)


def test_a_larger_rank_that_comes_out_worse_is_not_kept(host, monkeypatch):
    train, ranks = module.train_apart, []

    def worse(run, started, *rest, **named):
        found, layers = train(run, started, *rest, **named)
        ranks.append(next(iter(started.values())).rank)
        return ([EditError("no")] if len(ranks) > 1 else found), layers

    monkeypatch.setattr(module, "train_apart", worse)
    editor = editor_of(host, rank=1, most_rank=4, max_steps=3)
    editor.apply(EditRequest((TOWER,)))
    assert ranks == [1, 2, 4]
    assert len(editor.state[f"{TOWER.id}.layer{editor.sites[0].layer}.b"]) == 1


def test_what_was_replaced_comes_back_with_a_saved_set_too(host, alone, tmp_path):
    other = dataclasses.replace(TOWER, target="Be")
    model = in_force(host, TOWER)
    model.edit(other, on_conflict="replace", **OPTIONS)
    again = baft.load(model.save(tmp_path / "a.baft"), host=(host.model, host.tokenizer))
    assert [one.replaced for one in again.edits] == [True, False]
    again.remove(other.id)
    assert torch.equal(logits(again), alone[0][0])


def test_what_both_sets_have_is_as_the_first_has_it(host, tmp_path):
    other = dataclasses.replace(TOWER, target="Be")
    first, second = in_force(host, TOWER, other), in_force(host, TOWER, KING)
    second.edit(other, on_conflict="replace", **OPTIONS)
    assert [one.replaced for one in second.edits] == [True, False, False]  # control
    first.merge(second.save(tmp_path / "b.baft"))
    assert [(one.edit.target, one.replaced) for one in first.edits] == [
        ("Ro", False),
        ("Be", False),
        ("Al", False),
    ]


def test_scopes_that_another_head_read_are_read_anew(host, alone, tmp_path, monkeypatch):
    kept = dataclasses.replace(TOWER, rephrasings=("zqx",))
    model = in_force(host, kept, KING)
    path, want, zqx = model.save(tmp_path / "a.baft"), logits(model), model.logits("zqx")
    head = model._editor._scope.head
    other = UntrainedHead(head.mean + 0.01, head.whitening)
    monkeypatch.setattr("baft.scope.untrained._RECIPE", 3)
    monkeypatch.setitem(scope._untrained, host.model, other)
    again = baft.load(path, host=(host.model, host.tokenizer))
    assert torch.equal(logits(again), want)
    assert torch.equal(again.logits("zqx"), zqx)
    state, old = again._editor.state_dict(), model._editor.state_dict()
    changed = {name.partition(".")[2] for name in state if not torch.equal(state[name], old[name])}
    assert changed == {"vectors", "weights", "head"}
    assert "thresholds" in {name.partition(".")[2] for name in state}
    assert again.save(tmp_path / "b.baft").is_dir()


def test_scopes_from_before_names_were_compared_are_read_anew(host):
    before, after = editor_of(host), editor_of(host)
    before.apply(EditRequest((TOWER, KING)))
    state = before.state_dict()
    older = {
        name: one for name, one in state.items() if name.partition(".")[2] not in {"spelling", "name_weights"}
    }
    assert len(older) == len(state) - 4
    after.load_state_dict(older, before.requests)
    again = after.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_a_saved_edit_that_another_head_takes_for_a_neighbor_still_loads(host, tmp_path, monkeypatch, caplog):
    model = in_force(host, dataclasses.replace(TOWER, neighbors=("Nothing",)), KING)
    path = model.save(tmp_path / "a.baft")
    monkeypatch.setattr("baft.scope.untrained._RECIPE", 3)
    monkeypatch.setattr(UntrainedHead, "log_probability", lambda _, scores: 0 * scores[0] - 0.1)
    again = baft.load(path, host=(host.model, host.tokenizer))
    assert [one.edit.prompt for one in again.edits] == [TOWER.prompt, KING.prompt]
    assert "read by words alone" in caplog.text
    assert "that the edit acts on both" in caplog.text
    with pytest.raises(InputError, match="so near to .* that the edit would not act on its own prompt"):
        again.edit(dataclasses.replace(HATS, neighbors=("Nothing",)), **OPTIONS)


def test_without_a_head_the_report_says_so(model):
    report = model.edit(TOWER, **OPTIONS)
    assert "train one with `baft scope train`" in report.notes[0]
    assert f"note: {report.notes[0]}" in str(report)
    assert model.explain(TOWER.prompt)[0].edit_id == TOWER.id
    assert model.explain(ASKED[3]) == ()


def test_settings_are_checked():
    for wrong in ({"rank": 0}, {"most_rank": 0}, {"n_others": -1}, {"last_prompt": 0}, {"deepest_layers": 0}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is out of range"):
            BankConfig(**wrong)
    with pytest.raises(ConfigError, match="layers must name at least one layer"):
        BankConfig(layers=(1, 1))
