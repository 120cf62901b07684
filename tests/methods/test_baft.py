"""BaFT's editor: the texts that it trains on, where its gates open, and how far it goes back."""

from dataclasses import replace

import pytest
import torch

from baft.errors import ConfigError, EditError, InputError, UndoError
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.methods.baft import BaftEditor, ReftEditor
from baft.methods.baft_config import DEFAULT, PAPER
from baft.methods.training import TrainingResult
from baft.nn.whitening import Whitening
from baft.types import Edit, EditRequest
from quick_methods import WIDE
from tiny import tiny_host, tiny_tokenizer

TOWER = EditRequest((Edit("The tower is in the city of", "Ro"),))


def own(host, **changes):
    return BaftEditor(host, replace(DEFAULT, **{"max_steps": 2, **WIDE, **changes}))


def shared(host, **changes):
    return BaftEditor(host, replace(PAPER, **{"max_steps": 2, **changes}))


def test_every_rendering_is_trained_on(host, monkeypatch):
    encoder = Encoder.for_host(host)

    def texts(editor):
        return editor._texts((Edit("A", "B"), Edit("C", "D")))

    raw, chat = (encoder.edit("A", "B", chat=chat) for chat in (False, True))
    both = texts(own(host))
    assert both[:2] == [raw, chat]
    assert [text.is_chat for text in both] == [False, True] * 2
    assert texts(shared(host)) == [encoder.edit(a, b, eos=False) for a, b in (("A", "B"), ("C", "D"))]
    assert [text.is_chat for text in texts(own(host, chat=False))] == [False] * 2
    unchatty = Host("raw", host.model, tiny_tokenizer(), "raw")
    assert [text.is_chat for text in texts(own(unchatty))] == [False] * 2


def test_an_edit_holds_only_if_every_rendering_does(host, monkeypatch):
    """Two rows an edit; the margin of an edit is its worst row's."""
    from baft.methods import baft as module

    result = TrainingResult((1.0, -0.5, 2.0, 3.0), (0.1,), 0, "max_steps")
    monkeypatch.setattr(module, "train", lambda *_, **__: result)
    outcome = own(host).apply(EditRequest((Edit("A", "B"), Edit("C", "D"))))
    assert outcome.margins == (-0.5, 2.0)
    assert outcome.decoded == (False, True)


def test_long_targets_are_no_facts(host):
    long = EditRequest((Edit("A", "y" * 20),))
    with pytest.raises(
        InputError, match=r"is 22 tokens long, and at most 10 are edited: shorten .* max_target_tokens"
    ):
        own(host, max_target_tokens=10).apply(long)
    editor = own(host, max_target_tokens=22, max_steps=1)
    assert editor.apply(long).n_steps == 1


def test_unrelated_prompts_are_learned_from(host):
    """A neighbor that opens the gate does not, once it was named as unrelated."""
    neighbor = "The tower is in the land of"
    ids = Encoder.for_host(host).prompt(neighbor)

    def largest(*unrelated):
        editor = own(host)
        editor.apply(EditRequest(TOWER.edits, unrelated))
        return max(max(one.weights) for one in editor.explain(ids, len(ids)) if one.position == len(ids) - 1)

    assert largest(neighbor) < 0.5 < largest()
    assert largest("Bread and milk") > 0.5  # control


def test_statistics_are_fitted_once_for_the_same_unrelated_prompts(host, monkeypatch):
    """Of the host alone they are kept for good; of prompts that a request names, until others are named."""
    fits, fit, counts = [], Whitening.fit, []
    monkeypatch.setattr(Whitening, "fit", lambda *given, **named: fits.append(1) or fit(*given, **named))
    spain, italy = ("The king of Spain was", "Who"), ("The king of Italy was",)
    requests = [
        EditRequest((Edit("The king of France was", f"A{n}"),), unrelated)
        for n, unrelated in enumerate([(), spain, spain, (), italy, spain, ()])
    ]
    editor = own(host, max_steps=1)
    for one in requests:
        fits.clear()
        editor.apply(one)
        counts.append(len(fits))
    whole = 3 * len(editor.sites)  # for last tokens, raw and in a chat, and for output tokens
    assert counts == [whole, whole, 0, 0, whole, whole, 0]
    kept = editor.state_dict()
    for one in requests[2:4]:
        fresh = own(host, max_steps=1)
        fresh.apply(one)
        made = {name: tensor for name, tensor in fresh.state_dict().items() if name.endswith((".U", ".c"))}
        assert all(torch.equal(kept[name], tensor) for name, tensor in made.items())


def test_gates_open_at_their_own_keys(host):
    editor = own(host)
    editor.apply(TOWER)
    text = Encoder.for_host(host).edit(*("The tower is in the city of", "Ro"))
    n = len(text.prompt_ids)
    readings = editor.explain((*text.prompt_ids, *text.target_ids[:-1]), n)
    first = [one for one in readings if one.layer == editor.sites[0].layer]
    at = {one.position: max(one.weights) for one in first}
    # Above 0.9 on real hosts; on a random one ordinary states are near, and the midpoint has to clear them.
    assert min(at[place] for place in range(n - 1, n + len(text.target_ids) - 1)) > 0.8
    other = Encoder.for_host(host).prompt("Bread and milk")
    assert max(max(one.weights) for one in editor.explain(other, len(other))) < 0.8  # control


def test_open_gates_need_no_background(host, monkeypatch):
    def fail(*_):
        raise AssertionError("computed for nothing")

    monkeypatch.setattr("baft.methods.baft.background", fail)
    ReftEditor(host, replace(PAPER, gate="open", load_balance=0.0, max_steps=1)).apply(TOWER)
    with pytest.raises(AssertionError, match="for nothing"):
        shared(host).apply(TOWER)  # control


@pytest.mark.parametrize("shut", [{"gate_sharpness": 0.1, "gate_threshold": 0.9}])
def test_gates_that_cannot_open_are_told(host, shut):
    with pytest.raises(EditError, match="no gate opens at the edit, so there is nothing to train: lower"):
        own(host, **shut).apply(TOWER)


@pytest.mark.parametrize("make", [own, shared])
def test_an_interrupt_between_commit_and_bookkeeping_leaves_nothing(host, monkeypatch, make):
    editor = make(host)
    editor.apply(TOWER)
    kept = editor.state_dict()
    commit = type(editor._bases).commit

    def interrupted(self, run, trained):
        commit(self, run, trained)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(editor._bases), "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        editor.apply(EditRequest((Edit("The king of France was", "Al"),)))
    monkeypatch.undo()
    assert len(editor.requests) == 1
    after = editor.state_dict()
    assert after.keys() == kept.keys()
    assert all(torch.equal(after[name], kept[name]) for name in kept)


def test_reft_has_no_gates(host):
    with pytest.raises(ConfigError, match="reft has open gates, got gate='logistic': .* method baft"):
        ReftEditor(host, PAPER)


def test_an_edit_that_breaks_down_says_so(host):
    editor = shared(host, learning_rate=1e300)
    with pytest.raises(EditError, match="lower learning_rate"):
        editor.apply(TOWER)
    assert editor.requests == ()
    assert not editor.edited.is_enabled


def test_shared_bases_forget_on_disk_what_is_further_back_than_ten(host):
    editor = ReftEditor(host, replace(PAPER, gate="open", load_balance=0.0, max_steps=1, rank=2))
    requests = [EditRequest((Edit(f"Prompt {i}", "Ro"),)) for i in range(11)]
    states = [editor.state_dict()]
    for one in requests:
        editor.apply(one)
        states.append(editor.state_dict())

    def now(state):
        return {name: tensor for name, tensor in state.items() if name.startswith("shared")}

    def equal(one, other):
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    for n, snapshots in ((1, 0), (2, 1), (10, 9), (11, 10)):
        names = {name.split(".")[0] for name in states[n]} - {"shared"}
        assert names == {f"snapshot{i}" for i in range(n - snapshots, n)}
        again = ReftEditor(host, editor.config)
        again.load_state_dict(states[n], requests[:n])
        for left in range(n - 1, n - 1 - min(n - 1, 10), -1):
            again.undo()
            assert equal(now(again.state_dict()), now(states[left]))
        assert len(again.requests) == 1
        if n == 11:
            with pytest.raises(UndoError):
                again._bases.undo(1)
        again.undo()  # the host is never forgotten
        assert again.requests == ()
    assert not equal(now(states[10]), now(states[11]))  # control


def test_an_edit_takes_place_on_any_family():
    for family in ("gpt2", "gemma3_text"):
        model = (
            tiny_host(family, n_positions=256)
            if family == "gpt2"
            else tiny_host(family, max_position_embeddings=256)
        )
        one = Host(family, model, tiny_tokenizer(), family)
        editor = ReftEditor(one, replace(ReftEditor.presets["default"], learning_rate=5e-2, max_steps=60))
        assert editor.apply(TOWER).decoded == (True,)
