"""Edits that share a scope, fitted to each other on a tiny host that tells prompts apart by their letters."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import baft
from baft import Edit, Model
from baft.errors import ConfigError, ConflictError, EditError, InputError, UnknownNameError
from baft.methods import bank
from tiny import CHATML, tiny_host, tiny_tokenizer

HATS = Edit("Nine hats of", "Co")
CATS = Edit("Nine cats of", "Al")
FELT = Edit("Nine hats of felt", "Be")  # it has all letters of the first
KING = Edit("Queen Bodicea", "Ro")
QUICK = {"learning_rate": 5e-2, "max_steps": 60, "stop_margin": 0.7, "schedule": "constant", "n_others": 1}
OPTIONS = {"method": "baft-bank", **QUICK}
ASKED = [edit.prompt for edit in (HATS, CATS, FELT, KING)] + ["Nothing in particular"]


@pytest.fixture(autouse=True, scope="module")
def _loose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prompts that share most of their letters share a scope."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("baft.hosts.background._WORTH_KEEPING_S", 0.0)
        patch.setattr("baft.scope.untrained._MIDPOINT", 0.8)
        yield


@pytest.fixture(scope="module")
def pair():
    return tiny_host("llama", max_position_embeddings=512), tiny_tokenizer(chat_template=CHATML)


def in_force(pair, *edits: Edit) -> Model:
    model = baft.load(pair)
    for edit in edits:
        model.edit(edit, **OPTIONS)
    return model


def logits(model: Model) -> torch.Tensor:
    return torch.stack([model.logits(prompt) for prompt in ASKED])


def fires(model: Model, edit_id: str, prompt: str) -> bool:
    """Whether an edit in force would act on a prompt, raw or as a chat, were it the only one."""
    [askings] = model._editor.heard([prompt])
    assert len(askings) == 2
    return any(edit_id in asking.firing for asking in askings)


def test_two_that_conflict_are_told_apart_and_a_third_stays_as_it_is(pair):
    model = in_force(pair, HATS, CATS, KING)
    assert fires(model, HATS.id, CATS.prompt)  # control
    assert fires(model, CATS.id, HATS.prompt)
    plain, kept = logits(model), dict(model._editor.state)
    steps = []
    report = model.refit(on_step=lambda *step: steps.append(step))
    assert steps
    assert report.succeeded
    assert report.conflicts == ()
    hats, cats = report.refit
    assert (hats.old_id, cats.old_id) == (HATS.id, CATS.id)
    for row in (hats, cats):
        assert (row.n_own, row.own, row.n_others, row.others) == (2, (2, 2), 2, (2, 0))
        assert row.decoded == (True, True)
        assert row.inseparable == ()
    shown = [(one.edit.target, one.replaced) for one in model.edits]
    assert shown == [("Co", True), ("Al", True), ("Ro", False), ("Co", False), ("Al", False)]
    new = {one.edit.id: one.edit for one in model.edits}
    assert new[hats.edit_id].neighbors == (CATS.prompt,)
    assert not fires(model, hats.edit_id, CATS.prompt)
    assert not fires(model, cats.edit_id, HATS.prompt)
    assert [said for _, _, said in model.check()] == [True] * 5
    assert torch.equal(logits(model)[3:], plain[3:])
    assert all(model._editor.state[name] is tensor for name, tensor in kept.items())
    said = str(report)
    assert "Nine hats of -> Co  2 to 2 of 2      2 to 0 of 2       yes to yes" in said
    with pytest.raises(EditError, match="none of these edits fires on a wording of another"):
        model.refit()


def test_it_is_taken_back_to_the_bit_and_made_again_to_the_bit_in_any_order(pair, tmp_path):
    model = in_force(pair, HATS, CATS, KING)
    before, edits, state = logits(model), model.edits, model._editor.state_dict()
    model.refit(HATS.id, CATS.id)
    after, ids = logits(model), [one.edit.id for one in model.edits]
    model.save(tmp_path / "a.baft")
    saved = baft.load(tmp_path / "a.baft", host=pair)
    assert torch.equal(logits(saved), after)
    for one in (model, saved):
        assert len(one.undo()) == 2
        assert one.edits == edits
        assert torch.equal(logits(one), before)
        now = one._editor.state_dict()
        assert now.keys() == state.keys()
        assert all(torch.equal(now[name], tensor) for name, tensor in state.items())
    model.refit(KING.id, CATS.id, HATS.id)
    assert [one.edit.id for one in model.edits] == ids
    assert torch.equal(logits(model), after)


def test_afterwards_each_is_an_edit_like_any_other(pair):
    model = in_force(pair, HATS, CATS)
    of_old, n_bytes = logits(model), {}
    hats, cats = model.refit().refit
    after = logits(model)
    for name, tensor in model._editor.state.items():
        owner = name.partition(".")[0]
        n_bytes[owner] = n_bytes.get(owner, 0) + tensor.nbytes
    assert n_bytes[hats.edit_id] == n_bytes[HATS.id]
    model.remove(HATS.id, CATS.id)  # what they replaced need not be kept
    assert torch.equal(logits(model), after)
    new = {one.edit.id: one.edit for one in model.edits}
    model.remove(cats.edit_id)
    assert torch.equal(logits(model), logits(in_force(pair, new[hats.edit_id])))
    back = in_force(pair, HATS, CATS)
    for row in back.refit().refit:
        back.remove(row.edit_id)
    assert torch.equal(logits(back), of_old)


def test_what_cannot_be_told_apart_is_said(pair):
    model = in_force(pair, HATS, FELT)
    report = model.refit(FELT.id, HATS.id)
    hats, felt = report.refit
    assert (hats.edit_id, hats.inseparable, hats.others) == (HATS.id, (FELT.prompt,), (2, 2))
    assert (felt.inseparable, felt.others) == ((), (2, 0))
    assert "NOT TOLD APART: 'Nine hats of' -> 'Co' still fires on 'Nine hats of felt'" in str(report)
    assert [(row.edit_id, row.old_id) for row in report.conflicts] == [(felt.edit_id, HATS.id)]
    want = f"no scope can tell '{HATS.prompt}' -> 'Co' from '{FELT.prompt}': nothing was changed"
    before = model.edits
    with pytest.raises(EditError, match=want):
        model.refit()
    assert model.edits == before


def test_texts_that_were_unrelated_stay_so_and_rephrasings_are_wordings(pair):
    near, other = "Nine mats", "Nine bats of"
    model = baft.load(pair)
    model.edit(HATS, unrelated=[near], **OPTIONS)
    model.edit(dataclasses.replace(CATS, rephrasings=(other,)), **OPTIONS)
    model.edit(KING, **OPTIONS)
    assert fires(model, HATS.id, other)  # control
    hats, cats = model.refit().refit
    new = {one.edit.id: one.edit for one in model.edits}
    assert new[hats.edit_id].neighbors == (near, CATS.prompt, other)
    assert (hats.n_own, hats.n_others, cats.n_own, cats.n_others) == (2, 4, 4, 2)
    for text in new[hats.edit_id].neighbors:
        assert not fires(model, hats.edit_id, text)


def test_edits_that_say_the_same_are_let_be(pair):
    model = in_force(pair, HATS, dataclasses.replace(CATS, target=" Co"))
    with pytest.raises(EditError, match="none of these edits fires on a wording of another"):
        model.refit()
    with pytest.raises(EditError, match="none of these edits fires on a wording of another"):
        model.refit(*(one.edit.id for one in model.edits))


def test_what_cannot_be_refit(pair):
    model = baft.load(pair)
    with pytest.raises(EditError, match="no edit to refit"):
        model.refit()
    model = in_force(pair, HATS, CATS, KING)
    with pytest.raises(EditError, match="edits are disabled here"), model.disabled():
        model.refit()
    with pytest.raises(UnknownNameError, match=f"no edit has the id 'x'; the ids are {HATS.id}, {CATS.id}"):
        model.refit(HATS.id, "x")
    with pytest.raises(InputError, match=f"two edits or more, got {HATS.id}"):
        model.refit(HATS.id, HATS.id)
    with pytest.raises(EditError, match="none of these edits fires"):
        model.refit(HATS.id, KING.id)
    again = dataclasses.replace(HATS, target="Ti")
    model.edit(again, **OPTIONS)
    with pytest.raises(
        ConflictError, match=f"{HATS.id}.* and .*{again.id}.* both answer 'Nine hats of', .* remove"
    ):
        model.refit()
    model.undo()
    model.edit(again, on_conflict="replace", **OPTIONS)
    with pytest.raises(InputError, match=f"{HATS.id}. was replaced by a later edit: refit that"):
        model.refit(HATS.id, CATS.id)
    other = baft.load(pair)
    other.edit("The tower is in", "Ro", method="reft", max_steps=1)
    with pytest.raises(ConfigError, match="edits by reft have no scope"):
        other.refit()


@pytest.mark.parametrize("error", [KeyboardInterrupt, EditError("it broke down")])
def test_what_breaks_off_changes_nothing(pair, monkeypatch, error):
    model = in_force(pair, HATS, CATS)
    before, edits = logits(model), model.edits

    def broken(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(bank, "train_apart", broken)
        with pytest.raises((KeyboardInterrupt, EditError)):
            model.refit()
    with monkeypatch.context() as patch:
        patch.setattr("baft.refit.Refit.look_again", broken)  # the edits are made by then
        with pytest.raises((KeyboardInterrupt, EditError)):
            model.refit()
    assert model.edits == edits
    assert torch.equal(logits(model), before)
