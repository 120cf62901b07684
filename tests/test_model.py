"""The user's object on a tiny host: what it promises in words, held to the bit."""

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from transformers import GenerationConfig

import baft
import baft.model as model_module
from baft import Edit, EditReport
from baft.artifact import pieces
from baft.errors import (
    ArtifactError,
    BaftError,
    ConfigError,
    DamagedArtifactError,
    EditError,
    GenerationError,
    HostError,
    HostMismatchError,
    InputError,
    UndoError,
    UnknownNameError,
)
from baft.hosts.background import background_text
from baft.hosts.edited_model import EditedModel
from baft.hosts.speaking import Speaker
from baft.methods.baft import ReftEditor
from baft.report import TokenGates
from quick_methods import WIDE
from tiny import CHATML, EOS_ID, tiny_host, tiny_tokenizer
from unhooked import as_users_import

TOWER = ("The tower is in the city of", "Ro")
KING = ("The king of France was", "Al")
PARIS = ("Paris is in", "Be")
PROMPTS = [TOWER[0], KING[0], "Nothing in particular", "A"]
CHAT = [{"role": "user", "content": "Who"}]
# Larger steps and wider gates than real hosts need, the same whatever the presets say.
OWN = {
    "method": "baft",
    "learning_rate": 5e-2,
    "max_steps": 60,
    "stop_margin": 0.7,
    **WIDE,
}
SHARED = {"method": "reft", "learning_rate": 5e-2, "max_steps": 60, "stop_margin": 0.7, "layers": [1]}
REAL_CACHE = os.environ.get("BAFT_CACHE")
DULL = {**SHARED, "max_steps": 1, "learning_rate": 1e-6}  # cannot learn anything


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("baft.hosts.background._WORTH_KEEPING_S", 0.0)
        yield


@pytest.fixture(scope="module")
def pair():
    return tiny_host("llama", max_position_embeddings=512), tiny_tokenizer(chat_template=CHATML)


@pytest.fixture
def model(pair):
    return baft.load(pair)


@pytest.fixture(scope="module")
def told(pair):
    """Two own edits with their reports, for tests that only look."""
    model = baft.load(pair)
    first = model.edit(*TOWER, **OWN)
    return model, first, model.edit([Edit(*KING), Edit(*PARIS)], **OWN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pair):
    """A tiny host as a folder, which another process can load."""
    path = tmp_path_factory.mktemp("hosts") / "tiny"
    model, tokenizer = pair
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def logits(model):
    return torch.stack([model.logits(prompt) for prompt in PROMPTS] + [model.logits(messages=CHAT)])


@torch.no_grad()
def host_logits(model):
    rows = [torch.tensor([model.tokenizer(prompt).input_ids]) for prompt in PROMPTS]
    text = model.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    rows.append(torch.tensor([model.tokenizer(text, add_special_tokens=False).input_ids]))
    return torch.stack([model.host(ids).logits[0, -1] for ids in rows])


def untouched(model):
    """Whether there is no trace of any edit, seen from all sides."""
    ids = torch.tensor([model.tokenizer(TOWER[0]).input_ids])
    with torch.no_grad():
        view = torch.equal(model.hf(ids).logits, model.host(ids).logits)
    hooks = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.host.modules())
    told = (model.edits, model.method, model.check(), model.explain(TOWER[0]))
    return (
        torch.equal(logits(model), host_logits(model)) and view and not hooks and told == ((), None, [], ())
    )


# What an edit does


def test_an_edit_is_said_and_all_else_stays(told):
    model, report, _ = told
    assert isinstance(report, EditReport)
    assert report.succeeded
    assert model.generate(TOWER[0]) == " Ro"  # and no more: it has learned to stop
    assert model.generate(messages=[{"role": "user", "content": TOWER[0]}]).strip() == "Ro"
    with model.disabled():
        assert not model.generate(TOWER[0]).startswith(" Ro")  # control
        assert torch.equal(logits(model), host_logits(model))
    assert not torch.equal(logits(model), host_logits(model))


def test_where_no_gate_opens_every_bit_stays(told):
    model, _, _ = told
    kinds = set()
    for prompt in [*PROMPTS, *background_text()["canaries"]]:
        is_open = any(max(one.weights) > 0 for one in model.explain(prompt, max_new_tokens=0))
        with model.disabled():
            plain = model.logits(prompt)
        stays = torch.equal(model.logits(prompt), plain)
        assert stays or is_open  # open on an earlier token, the last block does not reach the last logits
        kinds.add(stays)
    assert kinds == {True, False}  # control


def test_the_report_tells_what_happened(told):
    model, report, batch = told
    [row] = report.rows
    assert (row.edit_id, row.prompt, row.target) == (Edit(*TOWER).id, *TOWER)
    assert row.decoded
    assert row.after == " Ro"
    assert row.before != row.after
    assert row.margin >= 0.7
    assert 0.1 < row.gate <= 1
    assert (report.method, report.preset, report.stopped) == ("baft", "default", "margin")
    assert report.seconds_s > 0
    assert 0 <= report.n_canaries_identical <= report.n_canaries_same_token <= report.n_canaries == 12
    assert report.n_canaries_identical > 0
    assert report.broken == ()
    assert [one.prompt for one in batch.rows] == [KING[0], PARIS[0]]
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["prompt"] == TOWER[0]
    assert "FAILED" not in str(report)
    assert repr(model) == "<baft.Model " + f"{model._host.name}: {model.label}; 3 edits by baft/default>"


def test_the_edits_are_listed_and_checked(told):
    model, _, _ = told
    applied = model.edits
    assert [one.edit.prompt for one in applied] == [TOWER[0], KING[0], PARIS[0]]
    assert [one.request for one in applied] == [0, 1, 1]
    assert [one.decoded for one in applied] == [True] * 3
    assert model.method == "baft"
    assert model.check() == [(one, f" {one.edit.target}", True) for one in applied]
    with model.disabled():
        assert [says for _, _, says in model.check()] == [False] * 3  # control


def test_the_gates_are_explained(told):
    model, _, _ = told
    gates = model.explain(TOWER[0], max_new_tokens=2)
    assert all(isinstance(one, TokenGates) for one in gates)
    assert {one.edit_id for one in gates} == {one.edit.id for one in model.edits}
    tokens = {one.position: one.token for one in gates}
    ids = model.tokenizer(TOWER[0]).input_ids
    assert "".join(tokens[i] for i in sorted(tokens)) == "y of Ro"
    assert {one.is_output for one in gates if one.position >= len(ids)} == {True}
    assert {one.is_output for one in gates if one.position < len(ids)} == {False}
    mine = [
        max(one.weights) for one in gates if one.edit_id == Edit(*TOWER).id and one.position == len(ids) - 1
    ]
    others = [max(one.weights) for one in model.explain("A") if one.edit_id == Edit(*TOWER).id]
    assert min(mine) > 0.5
    assert max(others) < 0.5
    assert {one.is_output for one in model.explain("A", max_new_tokens=0)} == {False}
    assert model.explain(messages=CHAT)


def test_an_edit_that_cannot_be_learned_is_marked_everywhere(model):
    report = model.edit(*TOWER, **DULL)
    assert not report.succeeded
    assert not report.rows[0].decoded
    assert report.rows[0].margin < 0
    assert report.stopped == "max_steps"
    assert "FAILED: 'The tower is in the city of' does not yield 'Ro'" in str(report)
    assert report.to_dict()["succeeded"] is False
    assert [one.decoded for one in model.edits] == [False]
    assert [says for _, _, says in model.check()] == [False]


def test_earlier_edits_that_break_are_named(model):
    model.edit(*TOWER, **SHARED)
    report = model.edit("The tower is in the city of", "Be", **SHARED)  # the same prompt
    assert report.broken == (TOWER[0],)
    assert f"earlier edits no longer decoded: {TOWER[0]!r}" in str(report)
    assert [says for _, _, says in model.check()] == [False, True]
    model.undo()
    assert [says for _, _, says in model.check()] == [True]


def test_the_host_is_never_touched(pair):
    host = pair[0]
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    for i, weight in enumerate(host.parameters()):
        weight.requires_grad_(i % 2 == 0)
    flags = [weight.requires_grad for weight in host.parameters()]
    try:
        model = baft.load(pair)
        model.edit(*TOWER, **OWN)
        assert model.host is host
        assert all(torch.equal(before[name], tensor) for name, tensor in host.state_dict().items())
        assert [weight.requires_grad for weight in host.parameters()] == flags
        assert all(weight.grad is None for weight in host.parameters())
        assert "forward" not in vars(host)
        assert not host.training
    finally:
        host.requires_grad_(False)


# Taking back


@pytest.mark.parametrize("settings", [OWN, SHARED], ids=["own", "shared"])
def test_undo_goes_back_bit_for_bit(model, settings):
    seen = [logits(model)]
    assert untouched(model)
    for prompt, target in (TOWER, KING, PARIS):
        model.edit(prompt, target, **settings)
        seen.append(logits(model))
    assert not torch.equal(seen[0], seen[3])  # control
    for n, edit in ((2, PARIS), (1, KING), (0, TOWER)):
        assert model.undo() == (Edit(*edit),)
        assert torch.equal(logits(model), seen[n])
        assert len(model.edits) == n
    assert untouched(model)
    with pytest.raises(UndoError, match="cannot take back 1 calls of edit: 0 are in force"):
        model.undo()


def test_undo_takes_back_calls_all_that_are_asked_or_none(model):
    with pytest.raises(UndoError, match="0 are in force"):
        model.undo()
    model.edit([Edit(*TOWER), Edit(*KING)], **DULL)
    model.edit(*PARIS, **DULL)
    seen = logits(model)
    for n in (0, -1, 3):
        with pytest.raises(
            UndoError, match=f"at least one call of edit, got n={n}|take back 3 calls of edit: 2 "
        ):
            model.undo(n)
    assert torch.equal(logits(model), seen)
    assert model.undo(2) == (Edit(*PARIS), Edit(*TOWER), Edit(*KING))
    assert untouched(model)


def test_a_loaded_model_says_how_far_it_can_be_undone(model, pair, tmp_path):
    """Shared bases keep ten snapshots on disk; further back is refused before anything is taken back."""
    states = [logits(model)]
    for i in range(12):
        model.edit(f"Prompt {i} of", "Ro", **DULL)
        states.append(logits(model))
    model.save(tmp_path / "many.baft")
    assert not torch.equal(states[1], states[2])
    model.undo(11)  # in memory nothing is forgotten
    assert torch.equal(logits(model), states[1])

    def loaded(path):
        return baft.load(tmp_path / path, host=pair)

    again = loaded("many.baft")
    with pytest.raises(
        UndoError, match=r"take back 11 requests: .* the last 10, and of these 10 are left; .*edits.jsonl"
    ):
        again.undo(11)
    assert torch.equal(logits(again), states[12])
    again.undo(9)
    again.save(tmp_path / "three.baft")
    again.undo()
    assert torch.equal(logits(again), states[2])
    again.save(tmp_path / "two.baft")
    for path, n in (("three.baft", 3), ("two.baft", 2)):  # what was forgotten stays forgotten
        later = loaded(path)
        assert torch.equal(logits(later), states[n])
        with pytest.raises(UndoError, match=f"take back {n - 1} requests" if n == 2 else "2 requests"):
            later.undo(n - 1)
        assert torch.equal(logits(later), states[n])
        later.undo(n)  # the host is never forgotten
        assert untouched(later)


def test_after_all_is_undone_another_method_may_begin(model):
    model.edit(*TOWER, **SHARED)
    with pytest.raises(
        ConfigError, match=r"were made by reft/default with seed 0, and baft-bank/default with seed 0"
    ):
        model.edit(*KING)
    with pytest.raises(
        ConfigError, match=r"reft/default with seed 1 and the settings given does not go with"
    ):
        model.edit(*KING, **SHARED, seed=1)
    with pytest.raises(ConfigError, match="undo them, use the same, or load a second model"):
        model.edit(*KING, **{**SHARED, "rank": 2})
    assert len(model.edits) == 1
    model.undo()
    assert model.edit(*KING, **OWN).method == "baft"
    assert model.generate(KING[0]) == " Al"


# The live view


@pytest.mark.parametrize("settings", [OWN, SHARED], ids=["own", "shared"])
def test_the_live_view_follows_edits_and_undos(model, settings):
    """Also one that was taken before the first edit."""
    view, ids = model.hf, torch.tensor([model.tokenizer(TOWER[0]).input_ids])
    n = torch.tensor([ids.shape[1]])

    @torch.no_grad()
    def seen():
        return view(ids, n_prompt_tokens=n).logits[0, -1]

    before = seen()
    for prompt, target in (TOWER, KING):
        model.edit(prompt, target, **settings)
        assert torch.equal(seen(), model.logits(TOWER[0]))
        assert not torch.equal(seen(), before)  # control
    ids = torch.tensor([model.tokenizer(KING[0]).input_ids])
    out = view.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert model.tokenizer.decode(out[0, -3:]) == " Al"
    ids = torch.tensor([model.tokenizer(TOWER[0]).input_ids])
    with model.disabled():
        assert torch.equal(seen(), before)
    model.undo(2)
    assert torch.equal(seen(), before)
    model.edit(*TOWER, **(OWN if settings is SHARED else SHARED))  # another method, other positions
    assert torch.equal(seen(), model.logits(TOWER[0]))
    assert not torch.equal(seen(), before)
    assert model.hf is view
    assert view is not model.host
    assert isinstance(view, type(model.host))


def test_a_view_takes_the_prompt_s_length_as_one_number_or_one_for_each_row(model):
    model.edit(*TOWER, **SHARED, last_prompt=1)
    row = model.tokenizer(TOWER[0]).input_ids
    ids, n = torch.tensor([row, row]), len(row) - 1
    with torch.no_grad():
        [want, other] = (model.hf(ids, n_prompt_tokens=torch.full((2,), end)).logits for end in (n, n + 1))
        assert not torch.equal(want, other)  # control
        for given in (n, [n, n]):
            assert torch.equal(model.hf(ids, n_prompt_tokens=given).logits, want)
        for wrong in ([n], [n, n, n], True):
            with pytest.raises(InputError, match=r"for 2 rows: give one whole number, or one for each row"):
                model.hf(ids, n_prompt_tokens=wrong)


def test_a_view_knows_the_positions_of_the_method_in_force(model):
    view, ids = model.hf, torch.tensor([model.tokenizer(TOWER[0]).input_ids])
    n = torch.tensor([ids.shape[1]])
    model.edit(*TOWER, **SHARED, last_prompt=1)
    with torch.no_grad():
        here = (view(ids, n_prompt_tokens=n).logits != model.host(ids).logits).any(-1)[0]
    assert here.tolist() == [False] * (ids.shape[1] - 1) + [True]
    model.undo()
    model.edit(*TOWER, **SHARED, last_prompt=2)
    with torch.no_grad():
        here = (view(ids, n_prompt_tokens=n).logits != model.host(ids).logits).any(-1)[0]
    assert here.tolist() == [False] * (ids.shape[1] - 2) + [True] * 2


def test_disabled_is_for_this_thread_alone(told):
    model, _, _ = told
    edited, found = logits(model), {}

    def elsewhere():
        found["there"] = logits(model)

    with model.disabled():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        found["here"] = logits(model)
    assert torch.equal(found["there"], edited)
    assert torch.equal(found["here"], host_logits(model))


# Asking


def test_ways_of_asking(told):
    model, _, _ = told
    assert isinstance(model.generate("A", max_new_tokens=3), str)
    assert isinstance(model.generate(("A",), max_new_tokens=3), list)
    several = model.generate(PROMPTS, max_new_tokens=6)
    assert several == [
        model.generate(prompt, max_new_tokens=6) for prompt in PROMPTS
    ]  # padding changes nothing
    assert len(set(several)) == 4
    assert model.generate("A", max_new_tokens=6) == model.generate("A", max_new_tokens=6, num_beams=1)
    torch.manual_seed(0)
    sampled = [model.generate("A", max_new_tokens=6, do_sample=True, temperature=2.0) for _ in range(3)]
    assert len(set(sampled)) > 1
    with pytest.raises(GenerationError, match="generation_config= is not taken here: give its settings"):
        model.generate("A", generation_config=GenerationConfig(do_sample=True))
    with pytest.raises(GenerationError, match="every prompt has one reply, got num_return_sequences=3: give"):
        model.generate("A", do_sample=True, num_return_sequences=3)
    rich = model.generate(TOWER[0], max_new_tokens=3, return_dict_in_generate=True)
    assert rich == " Ro"


@pytest.mark.parametrize("ask", ["generate", "logits"])
def test_questions_that_cannot_be_asked(told, ask):
    model, _, _ = told
    question = getattr(model, ask)
    for given, message in (
        ({}, "give either a prompt or messages, got neither"),
        ({"prompt": "A", "messages": CHAT}, "give either a prompt or messages, got both"),
        ({"prompt": ""}, "empty or blank"),
        ({"prompt": " \n"}, "empty or blank"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "user", "content": " "}]}, "not blank"),
        ({"prompt": "long " * 200}, r"is 1\d+ tokens long, this host's context holds 512"),
    ):
        with pytest.raises(InputError, match=message):
            question(**given)
    with pytest.raises(InputError, match="the list is empty"):
        model.generate([])
    with pytest.raises(InputError, match="empty or blank"):
        model.generate(["A", ""])


def test_a_reply_ends_where_the_context_does():
    """On a host with learned positions, whose next position would be none at all."""
    model = baft.load((tiny_host("gpt2", n_positions=30), tiny_tokenizer()))
    prompt = "x" * 25  # with BOS 26 tokens
    assert len(model.tokenizer(prompt).input_ids) == 26
    row = tuple(model.tokenizer(prompt).input_ids)
    assert len(model._speaker.replies(model._edited, [row], 32)[0]) == 4
    assert model.generate(prompt)
    with pytest.raises(InputError, match="the prompt is 30 tokens long and fills this host's context of 30"):
        model.generate("x" * 29)
    report = model.edit(prompt, "yy", **SHARED)  # its report asks it, and reads twelve unrelated prompts
    assert report.rows[0].after.startswith(" yy") == report.succeeded
    assert 0 < report.n_canaries < 12  # those that fit
    assert model.check()[0][2] == report.succeeded
    with pytest.raises(InputError, match="context holds 30"):
        model.edit("x" * 26, "yyyy", **SHARED)
    small = baft.load((tiny_host("llama", max_position_embeddings=64), tiny_tokenizer()))
    assert small.edit(*TOWER, **OWN).rows  # the background that fits is enough


def test_a_host_without_a_chat_template(pair):
    model = baft.load((pair[0], tiny_tokenizer()))
    assert model.edit(*TOWER, **OWN).succeeded
    assert model.generate(TOWER[0]) == " Ro"
    with pytest.raises(ConfigError, match="no chat template: give a plain prompt"):
        model.generate(messages=CHAT)


# Edits that are refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("", "Rome"), "prompt is empty or blank"),
        ((" \t", "Rome"), "prompt is empty or blank"),
        (("A", ""), "target is empty or blank"),
        (("A", "  "), "target is empty or blank"),
        (("A",), "needs the target"),
        (([],), "no edit given"),
        ((Edit("A", "B"), "C"), "an Edit brings its own"),
        (([Edit("A", "B"), Edit("A", "B")],), "the same edit stands twice in one request: 'A' -> 'B'"),
        (("x" * 600, "Rome"), r"is \d+ tokens long, this host's context holds 512"),
        (("A", "y" * 300), r"the target is 302 tokens long, and at most 128 are edited: shorten it"),
    ],
)
def test_edits_that_cannot_be_made(model, given, message):
    with pytest.raises(InputError, match=message):
        model.edit(*given, **SHARED)
    assert untouched(model)


def test_a_long_target_is_refused_before_anything_is_generated(model, monkeypatch):
    said = []
    replies = type(model._speaker).replies

    def counted(self, edited, rows, max_new_tokens, generation=None):
        said.append(max_new_tokens)
        return replies(self, edited, rows, max_new_tokens, generation)

    monkeypatch.setattr(type(model._speaker), "replies", counted)
    with pytest.raises(InputError, match="at most 128 are edited"):
        model.edit("A", "y" * 400, **SHARED)
    assert max(said, default=0) <= 12


def test_many_edits_are_made_apart_and_put_into_force_together(model, pair):
    """Each is what it is alone on the untouched host; all of them add up, and each can be taken back."""
    edits = [Edit(*TOWER), Edit(*KING), Edit(*PARIS)]
    steps = []
    report = model.edit_many(edits, **OWN, on_step=lambda step, *_: steps.append(step))
    assert [row.edit_id for row in report.rows] == [edit.id for edit in edits]
    assert report.n_steps == max(steps)
    assert [one.request for one in model.edits] == [0, 1, 2]
    together = model.logits(TOWER[0])
    for edit in edits:
        alone = baft.load(pair)
        alone.edit(edit, **OWN)
        mine = {name: tensor for name, tensor in model._editor.state_dict().items() if edit.id in name}
        for name, tensor in alone._editor.state_dict().items():
            torch.testing.assert_close(mine[name], tensor, rtol=1e-9, atol=1e-9)
    assert model.undo(2) == (edits[2], edits[1])
    alone = baft.load(pair)
    alone.edit(edits[0], **OWN)
    torch.testing.assert_close(model.logits(TOWER[0]), alone.logits(TOWER[0]), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model.logits(TOWER[0]), baft.load(pair).logits(TOWER[0]))  # control
    model.edit_many(edits[1:], **OWN)  # the first is in force meanwhile, as for any later edit
    assert not torch.equal(model.logits(TOWER[0]), together)
    model.undo(3)
    assert torch.equal(model.logits(TOWER[0]), baft.load(pair).logits(TOWER[0]))


def test_many_edits_that_cannot_be_made_change_nothing(model):
    model.edit(*TOWER, **OWN)
    before = model.logits(KING[0])
    for wrong, message in (
        ([Edit(*KING), Edit(*KING)], "twice"),
        ([Edit(*KING), Edit(*TOWER)], "in force already"),
        ([Edit(*KING), Edit("A", "y" * 400)], "at most 128 are edited"),
    ):
        with pytest.raises(InputError, match=message):
            model.edit_many(wrong, **OWN)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.edit_many([Edit(*KING), Edit(*PARIS)], **OWN, on_step=interrupt)
    assert len(model.edits) == 1
    assert torch.equal(model.logits(KING[0]), before)
    model.undo()
    with pytest.raises(ConfigError, match="share their bases do not add up"):
        model.edit_many([Edit(*KING), Edit(*PARIS)], **SHARED)
    assert model.edits == ()


def test_a_model_is_no_path_to_merge(model):
    with (
        as_users_import(model_module) as unhooked,
        pytest.raises(InputError, match="merge takes the path of saved edits, got a Model"),
    ):
        unhooked.Model(model._host).merge(model)


def test_the_same_edit_twice_is_refused(model):
    model.edit(*TOWER, **DULL)
    with pytest.raises(
        InputError, match="'The tower is in the city of' -> 'Ro' is in force already: leave it out, or"
    ):
        model.edit([Edit(*KING), Edit(*TOWER)], **DULL)
    assert len(model.edits) == 1
    model.undo()
    model.edit(*TOWER, **DULL)  # control


def test_settings_that_are_wrong(model):
    for settings, message in (
        ({"rnak": 3}, r"baft-bank/default: unknown key 'rnak'; did you mean 'rank'"),
        ({"rank": 2.5}, r"rank: expected .*, got 2.5"),
        ({"rank": 0}, "rank is out of range: got 0, expected at least 1"),
        ({"rank": 33}, "rank 33 is impossible: 32 hidden units"),
        ({"layers": [7]}, "layer 7 is out of range: this host has 3 layers"),
        ({"layers": []}, "at least one layer"),
        ({"learning_rate": float("nan")}, "finite number, got nan"),
        ({"learning_rate": "1e-3"}, "learning_rate"),
        ({"method": "baft", "gate": "open"}, "do not fit"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.edit(*TOWER, **settings)
    with pytest.raises(UnknownNameError, match="unknown baft preset 'papper'; did you mean 'paper'"):
        model.edit(*TOWER, method="baft", preset="papper")
    with pytest.raises(UnknownNameError, match="did you mean 'reft'"):
        model.edit(*TOWER, method="refd")
    assert untouched(model)


def test_no_edit_while_edits_are_disabled(model):
    with model.disabled(), pytest.raises(EditError, match="edits are disabled here, .* outside disabled"):
        model.edit(*TOWER, **SHARED)
    assert model.edits == ()
    assert model.edit(*TOWER, **SHARED).rows  # control


def test_unrelated_prompts_are_texts(model):
    with pytest.raises(InputError, match="empty or blank"):
        model.edit(*TOWER, unrelated=["A", " "], **OWN)
    assert untouched(model)
    model.edit(*TOWER, unrelated="The king of Spain was", **OWN)  # one text is one prompt, not its letters
    assert model._editor.requests[0].unrelated == ("The king of Spain was",)


# Edits that break off


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("settings", "where", "n_before"),
    [(OWN, "step", 0), (OWN, "report", 1), (SHARED, "gate", 0), (SHARED, "step", 1), (SHARED, "report", 1)],
)
def test_ctrl_c_leaves_the_model_as_it_was(model, monkeypatch, settings, where, n_before):
    view = model.hf
    if n_before:
        model.edit(*TOWER, **settings)
    before, edits = logits(model), model.edits
    if where == "report":
        monkeypatch.setattr("baft.witness.EditReport", interrupt)
    if where == "gate":
        monkeypatch.setattr("baft.witness.Witness._gate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.edit(*KING, **settings, on_step=interrupt if where == "step" else None)
    monkeypatch.undo()
    assert torch.equal(logits(model), before)
    assert model.edits == edits
    assert n_before or untouched(model)
    assert model.edit(*KING, **settings).succeeded
    assert model.hf is view
    assert not torch.equal(logits(model), before)  # control


@pytest.mark.parametrize("settings", [OWN, SHARED], ids=["own", "shared"])
@pytest.mark.parametrize("where", ["in the editor", "behind it", "in the model"])
def test_ctrl_c_while_edits_are_taken_back_takes_back_all_or_none(model, monkeypatch, settings, where):
    seen = [logits(model)]
    for prompt, target in (TOWER, KING, PARIS):
        model.edit(prompt, target, **settings)
        seen.append(logits(model))
    undo, follow, broken = model._editor.undo, EditedModel.follow, iter([True])

    def undone(n):
        undo(n)
        raise KeyboardInterrupt

    def followed(self, other):
        if next(broken, False):
            raise KeyboardInterrupt
        follow(self, other)

    if where == "in the model":
        monkeypatch.setattr(EditedModel, "follow", followed)
    elif where == "behind it":
        monkeypatch.setattr(model._editor, "undo", undone)
    else:
        monkeypatch.setattr(model._editor._bases, "undo", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.undo(2)
    monkeypatch.undo()
    left = 3 if where == "in the editor" else 1
    assert [one.edit.prompt for one in model.edits] == [TOWER[0], KING[0], PARIS[0]][:left]
    assert torch.equal(logits(model), seen[left])
    assert not torch.equal(seen[1], seen[3])  # control
    model.undo(left)
    assert untouched(model)


def test_memory_that_runs_out_is_told(model, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(EditError, match=r"out of memory while editing: edit fewer at once \(no room\)"):
        model.edit(*TOWER, **SHARED, on_step=exhausted)
    assert untouched(model)


def test_training_that_breaks_down_is_told(model):
    with pytest.raises(EditError, match="broke down at step .*lower learning_rate"):
        model.edit(*TOWER, **{**SHARED, "learning_rate": 1e200})
    assert untouched(model)


# Keeping


@pytest.mark.parametrize("settings", [OWN, SHARED], ids=["own", "shared"])
def test_a_saved_model_comes_back(model, pair, tmp_path, settings):
    model.edit(*TOWER, **settings, unrelated=["The king of Spain was"])
    model.edit([Edit(*KING, subject="King"), Edit(*PARIS)], **settings, seed=0)
    path = model.save(tmp_path / "set.baft")
    assert path == tmp_path / "set.baft"
    again = baft.load(path, host=pair)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), host_logits(model))  # control
    assert again.edits == model.edits
    assert again.method == model.method
    assert [one.unrelated for one in again._editor.requests] == [("The king of Spain was",), ()]
    for one in (model, again):  # editing goes on as if nothing had happened
        one.edit("A river", " dry", **settings)
    assert torch.equal(logits(again), logits(model))
    again.undo(3)
    assert untouched(again)
    assert {one.name for one in tmp_path.iterdir()} == {"set.baft"}
    assert sum(file.stat().st_size for file in path.iterdir()) < 200_000


def test_a_new_process_finds_the_same_bits(folder, tmp_path):
    model = baft.load(folder)
    assert "folder tiny" in model.label
    model.edit(*TOWER, **OWN)
    model.edit(*KING, **OWN)
    path = model.save(tmp_path / "set.baft")
    script = (
        "import sys, torch, baft\n"
        "torch.set_num_threads(1)\n"
        "model = baft.load(sys.argv[1])\n"
        f"torch.save(torch.stack([model.logits(one) for one in {PROMPTS}]), sys.argv[2])\n"
        "print(len(model.edits), model.undo(2)[0].target, end='')\n"
    )
    out = tmp_path / "logits.pt"
    done = subprocess.run(
        [sys.executable, "-c", script, path, out],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": "src"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "2 Al"), done.stderr
    there = torch.load(out, weights_only=True)
    assert torch.equal(there, logits(model)[:4])
    assert not torch.equal(there, host_logits(model)[:4])  # control


def test_an_artifact_belongs_to_its_host(told, pair, folder, tmp_path):
    path = told[0].save(tmp_path / "set.baft")
    with pytest.raises(ConfigError, match="does not say where its host .* is loaded from: give host="):
        baft.load(path)
    with pytest.raises(HostMismatchError):
        baft.load(path, host=(tiny_host("llama", max_position_embeddings=512, seed=1), pair[1]))
    with pytest.raises(ConfigError, match="host= goes with an artifact"):
        baft.load(folder, host=pair)
    with pytest.raises(ArtifactError, match=r"none.baft does not exist: check the path"):
        baft.load(tmp_path / "none.baft")
    with pytest.raises(HostError, match=r"there is no folder .*none: check the path"):
        baft.load(tmp_path / "none")


def test_an_edit_that_is_not_said_has_failed(pair, monkeypatch):
    """Whatever training made of it: what counts is what the model then says."""
    model = baft.load(pair)
    replies = Speaker.replies

    def mute(self, edited, rows, most, generation=None):
        found = replies(self, edited, rows, most, generation)
        return [[EOS_ID] for _ in found] if edited.is_enabled else found

    monkeypatch.setattr(Speaker, "replies", mute)
    report = model.edit(*TOWER, **SHARED)
    assert report.rows[0].margin > 0
    assert not report.succeeded
    assert [one.decoded for one in model.edits] == [False]
    monkeypatch.undo()
    assert [says for _, _, says in model.check()] == [True]  # control


def test_a_host_that_punishes_repetition_is_asked_without(pair):
    host = tiny_host("llama", max_position_embeddings=512)
    plain = baft.load((host, pair[1])).generate("A", max_new_tokens=12)
    host.generation_config.update(repetition_penalty=5.0)
    model = baft.load((host, pair[1]))
    assert model.generate("A", max_new_tokens=12) == plain
    assert model.generate("A", max_new_tokens=12, repetition_penalty=5.0) != plain  # control


def test_another_tokenizer_is_a_warning(told, pair, tmp_path, caplog):
    path = told[0].save(tmp_path / "set.baft")
    with caplog.at_level("WARNING", logger="baft.model"):
        baft.load(path, host=pair)
        assert not caplog.messages  # control
        baft.load(path, host=(pair[0], tiny_tokenizer()))
    assert "another tokenizer or chat template" in caplog.messages[0]


def test_a_long_prompt_does_not_cut_the_replies_to_others(model):
    long, short = "A" * 505, "B"
    assert model.generate([long, short], max_new_tokens=32)[1] == model.generate(short, max_new_tokens=32)


def test_an_edit_in_inference_mode(model):
    with torch.inference_mode():
        report = model.edit(*TOWER, **SHARED)
    assert report.succeeded


def test_gates_of_nothing(told):
    model, _, _ = told
    assert model.explain(TOWER[0])  # control
    with model.disabled():
        assert model.explain(TOWER[0]) == ()


def test_a_method_without_batches_is_not_given_one(model, monkeypatch):
    monkeypatch.setattr(ReftEditor, "capabilities", frozenset())
    with pytest.raises(ConfigError, match="method reft makes one edit at a time, got 2: edit in a loop"):
        model.edit([Edit(*TOWER), Edit(*KING)], **SHARED)


def test_another_precision_is_a_warning(told, pair, tmp_path, caplog):
    path = told[0].save(tmp_path / "set.baft")
    other = tiny_host("llama", max_position_embeddings=512, dtype=torch.float32)
    with caplog.at_level("WARNING", logger="baft.model"):
        model = baft.load(path, host=(other, pair[1]))
    assert "float64, and this host is in float32: check them" in caplog.text
    assert [says for _, _, says in model.check()] == [True] * 3
    caplog.clear()
    baft.load(path, host=pair)
    assert not caplog.text  # control


def test_a_damaged_artifact_is_refused(told, pair, tmp_path):
    path = told[0].save(tmp_path / "set.baft")
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DamagedArtifactError, match="truncated"):
        baft.load(path, host=pair)


def test_files_are_remembered_only_while_they_can_be_linked(model, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 64)
    for method, lasts in (("reft", False), ("baft-bank", True)):
        model.edit(*TOWER, **{**DULL, "method": method})
        model.save(tmp_path / "set.baft")
        again = baft.load(tmp_path / "set.baft", host=pair)
        assert [bool(one._pieces) for one in (model, again)] == [lasts] * 2
        for one in (model, again):
            one.undo()
            assert one._pieces == ()


def test_what_cannot_be_saved(model, tmp_path):
    with pytest.raises(ArtifactError, match="there is no edit: edit first"):
        model.save(tmp_path / "set.baft")
    model.edit(*TOWER, **DULL)
    with pytest.raises(ArtifactError, match=r"ends in .baft, got .*: use .*set.baft"):
        model.save(tmp_path / "set")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_changes_nothing(model, tmp_path, monkeypatch, code):
    """A full disk, and a folder that cannot be written (which root, who may run the tests, always can)."""
    model.edit(*TOWER, **DULL)
    path = model.save(tmp_path / "set.baft")
    old = {one.name: one.read_bytes() for one in path.iterdir()}
    model.edit(*KING, **DULL)
    before = logits(model)

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync" if code == errno.ENOSPC else "mkdir", refuse)
    message = "make room on the disk" if code == errno.ENOSPC else "a folder that can be written"
    with pytest.raises(ArtifactError, match=message):
        model.save(path)
    monkeypatch.undo()
    assert {one.name: one.read_bytes() for one in path.iterdir()} == old
    assert [one.name for one in tmp_path.iterdir()] == ["set.baft"]
    assert torch.equal(logits(model), before)
    model.save(path)
    assert {one.name: one.read_bytes() for one in path.iterdir()} != old  # control


def test_the_hub_is_asked_by_the_artifact_module(told, pair, monkeypatch, tmp_path):
    sent = {}

    def push(edit_set, repo_id, *, token, private):
        sent.update(edits=edit_set.edits, to=(repo_id, token, private))
        return "https://hub/commit"

    monkeypatch.setattr("baft.artifact.push_to_hub", push)
    assert told[0].push_to_hub("me/rome", token="t", private=True) == "https://hub/commit"
    assert sent["to"] == ("me/rome", "t", True)
    assert [one.edit for one in sent["edits"]] == [one.edit for one in told[0].edits]
    path = told[0].save(tmp_path / "set.baft")
    monkeypatch.setattr("baft.artifact.fetch_from_hub", lambda repo_id, *, revision, token: path)
    again = baft.load_from_hub("me/rome", revision="main", host=pair)
    assert again.edits == told[0].edits


# Loading


def test_what_can_be_loaded(pair, folder):
    live = baft.load(pair)
    assert live.host is pair[0]
    assert live.tokenizer is pair[1]
    named = baft.load(str(folder), dtype=torch.float32)
    assert (named.host.dtype, named._source) == (torch.float32, str(folder.resolve()))
    assert baft.load(pair).identity == live.identity
    assert baft.load(pair).identity != named.identity  # control
    assert repr(live) == f"<baft.Model {live._host.name}: {live.label}; 0 edits>"
    with pytest.raises(BaftError):
        baft.load("no-such-host")


def test_two_models_on_one_host_do_not_meet(pair):
    one, other = baft.load(pair), baft.load(pair)
    one.edit(*TOWER, **SHARED)
    assert untouched(other)
    other.edit(*KING, **SHARED)
    seen = logits(other)
    one.undo()
    assert untouched(one)
    assert torch.equal(logits(other), seen)


def test_the_end_is_learned(told):
    model, _, _ = told
    row = model._speaker.rows(TOWER[0], None)
    [ids] = model._speaker.replies(model._edited, row, 5)
    assert ids[-1] == EOS_ID
    assert len(ids) == 3


@pytest.mark.real_host
def test_the_embedded_host_learns_a_fact(tmp_path, monkeypatch):
    if REAL_CACHE is None:
        monkeypatch.delenv("BAFT_CACHE")
    else:
        monkeypatch.setenv("BAFT_CACHE", REAL_CACHE)
    model = baft.load("smollm2")
    assert " Paris" in model.generate("The capital of France is", max_new_tokens=3)
    prompt = "The Eiffel Tower is located in the city of"
    report = model.edit(prompt, "Rome")
    assert report.succeeded
    assert model.generate(prompt) == " Rome"
    assert report.n_canaries_identical >= 10
    n = len(model.tokenizer(prompt).input_ids)
    last = [max(one.weights) for one in model.explain(prompt) if one.position == n - 1]
    assert max(last) > 0.9  # open at its own key
    assert model.explain("The capital of France is") == ()
    assert " Paris" in model.generate("The capital of France is", max_new_tokens=3)
    again = baft.load(model.save(tmp_path / "rome.baft"))
    assert torch.equal(again.logits(prompt), model.logits(prompt))
    with model.disabled():
        assert " Paris" in model.generate(prompt, max_new_tokens=3)  # control
    model.undo()
    assert untouched(model)
    common = background_text()["prompts"][0]  # no edit is shut by what it is about
    for target in ("Sparta", "Argos"):
        assert model.edit(common, target).succeeded
        assert model.generate(common) == f" {target}"  # the later of two
        assert model.generate(messages=[{"role": "user", "content": common}]).strip() == target
