"""Scores of probes: what they say of an unedited host, of edits, and of planted cheats."""

from dataclasses import replace

import pytest
import torch

from baft.errors import InputError
from baft.evals.asking import Asker, Observation, Reply
from baft.evals.scoring import measure
from baft.evals.teacher_forced import Forced
from baft.hosts.architecture import Site
from baft.hosts.edited_model import EditedModel
from baft.types import Probe
from rules import Ruled, follows, prefers
from tiny import EOS_ID, shut_part, some_interventions

RIGHT = Probe("e", "reliability", "The tower is in", "Rome", aliases=("the Eternal City",))
KEEPS = Probe("e", "locality", "The river is in", "Bern")
OPEN = Probe("e", "locality", "A hat", None)
CHAT = Probe("e", "locality", "Why?", None, chat=True)
RIGHTNESS = {
    "teacher_forced",
    "margin",
    *(f"{name}{what}" for name in ("generate", "generate_chat") for what in ("", "_contains", "_stopped")),
}
SAMENESS = {"argmax", "bit_exact", "logprob_max", "logprob_mean", "text", "bleed", "text_chat", "bleed_chat"}
UNCHANGED = {name: float(name in ("argmax", "bit_exact", "text", "text_chat")) for name in SAMENESS}


@pytest.fixture(scope="module")
def asker(host):
    return Asker(host, batch_size=4, max_new_tokens=8)


def scores(asker, edited, probes, target="Rome"):
    before = asker.observe(EditedModel(asker.host.model), probes)
    after = asker.observe(edited, probes, before=before)
    return [measure(*one) for one in zip(probes, [target] * len(probes), before, after, strict=True)]


def reply(text, *, stopped=True, ids=(7,), place=(1, 1, 0)):
    return Reply(ids, text, stopped, place)


def forced(logits, answer=(1, 2), place=(1, 2, 2, 0)):
    predicted = tuple(logits.argmax(-1).tolist())
    return Forced(answer, predicted, (-1.0,) * len(answer), 0.5, logits, place)


def test_an_unedited_model_is_the_host(asker):
    probes = [RIGHT, KEEPS, OPEN, CHAT]
    right, keeps, unknown, chat = scores(asker, EditedModel(asker.host.model), probes)
    assert set(right) == RIGHTNESS
    assert right["generate"] == right["generate_contains"] == right["generate_stopped"] == 0.0
    assert right["margin"] < 0
    assert keeps == unknown == UNCHANGED
    assert chat == {"text_chat": 1.0, "bleed_chat": 0.0}


def test_edits_that_act_everywhere_move_everything(asker, host):
    edited = EditedModel(host.model, some_interventions(host.model))
    _, keeps, unknown, chat = scores(asker, edited, [RIGHT, KEEPS, OPEN, CHAT])
    for seen in (keeps, unknown):
        assert (seen["bit_exact"], seen["text"], seen["text_chat"]) == (0.0, 0.0, 0.0)
        assert seen["argmax"] < 1.0
        assert seen["logprob_max"] > seen["logprob_mean"] > 0.0
    assert chat["text_chat"] == 0.0


def test_shut_gates_are_bit_exact_in_any_company(asker, host):
    edited = EditedModel(host.model, {Site(1): [shut_part()]})
    assert scores(asker, edited, [RIGHT, KEEPS, OPEN])[1:] == [UNCHANGED, UNCHANGED]


def test_a_target_said_everywhere_is_seen(asker, host):
    token = asker.speaker.encoder.tokenizer("W", add_special_tokens=False)["input_ids"][0]
    says, ends = prefers(token), follows([token, EOS_ID], by=1e6)
    cheat = Ruled(host.model, lambda ids, logits: ends(ids, says(ids, logits)))
    probes = [Probe("e", "reliability", "The tower is in", "W"), KEEPS, OPEN, CHAT]
    right, keeps, unknown, chat = scores(asker, cheat, probes, target="W")
    assert right["generate"] == right["generate_chat"] == 1.0  # by itself that looks like success
    for seen in (keeps, unknown):
        assert (seen["text"], seen["bit_exact"], seen["argmax"], seen["bleed"]) == (0.0, 0.0, 0.0, 1.0)
        assert seen["logprob_max"] > 100
    assert chat == {"text_chat": 0.0, "bleed_chat": 1.0}


def test_a_model_that_follows_the_given_answer_is_right_only_while_it_is_given(asker, host):
    tokens = asker.speaker.encoder.tokenizer(" abcdefghij", add_special_tokens=False)["input_ids"]
    leaks = Ruled(host.model, follows([*tokens, EOS_ID]))
    probe = Probe("e", "reliability", "What is", "abcdefghij")
    [seen] = scores(asker, leaks, [probe])
    # All but the first token, which nothing in view foretells.
    assert seen["teacher_forced"] == pytest.approx((len(tokens) - 1) / len(tokens))
    assert (seen["generate"], seen["generate_contains"], seen["generate_chat"]) == (0.0, 0.0, 0.0)
    # Control: one that finds the first token too is right both ways, and stops.
    last = asker.speaker.encoder.prompt(probe.prompt)[-1]
    [seen] = scores(asker, Ruled(host.model, follows([last, *tokens, EOS_ID])), [probe])
    assert seen["teacher_forced"] == seen["generate"] == seen["generate_stopped"] == 1.0


def test_a_reply_counts_only_if_it_ends():
    def of(**changes):
        seen = Observation(raw=reply(**{"text": " Rome", **changes}), chat=reply("No, rome."))
        return measure(RIGHT, "Rome", Observation(), seen)

    assert of() == {
        "generate": 1.0,
        "generate_contains": 1.0,
        "generate_stopped": 1.0,
        "generate_chat": 0.0,
        "generate_chat_contains": 1.0,
        "generate_chat_stopped": 1.0,
    }
    assert (of(stopped=False)["generate"], of(stopped=False)["generate_contains"]) == (0.0, 1.0)
    assert of(stopped=False)["generate_stopped"] == 0.0
    assert of(text="the eternal city")["generate"] == 1.0
    assert of(text="Rome, Italy")["generate"] == 0.0
    assert of(text="Bern")["generate_contains"] == 0.0


def test_changes_of_logits():
    before = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, -torch.inf]], dtype=torch.float64)

    def of(after):
        return measure(KEEPS, "x", Observation(forced=forced(before)), Observation(forced=forced(after)))

    assert of(before.clone()) == {"argmax": 1.0, "bit_exact": 1.0, "logprob_max": 0.0, "logprob_mean": 0.0}
    nearly = before.clone()
    nearly[0, 0] += 1e-16  # a bit at zero; it would be lost beside one
    assert of(nearly)["bit_exact"] == 0.0
    assert of(nearly)["argmax"] == 1.0
    after = torch.tensor([[4.0, 1.0, 2.0], [3.0, 1.0, -torch.inf]], dtype=torch.float64)
    change = (after[0].log_softmax(-1) - before[0].log_softmax(-1)).abs()
    seen = of(after)
    assert (seen["argmax"], seen["bit_exact"]) == (0.5, 0.0)
    assert seen["logprob_max"] == pytest.approx(change.max().item())
    assert seen["logprob_mean"] == pytest.approx(change.sum().item() / 6)
    assert of(torch.full_like(before, torch.nan))["logprob_max"] == torch.inf


def test_bleeding_is_the_edits_doing():
    def of(was, now):
        seen = (Observation(raw=reply(was)), Observation(raw=reply(now, ids=(8,))))
        return measure(KEEPS, "Rome", *seen)

    assert of("Bern", "It is Rome.") == {"text": 0.0, "bleed": 1.0}
    assert of("rome", "It is Rome.")["bleed"] == 0.0
    assert of("Bern", "Romeo")["bleed"] == 0.0


def test_batches_of_other_shapes_are_not_compared(asker, host):
    plain = EditedModel(host.model)
    before = asker.observe(plain, [KEEPS])[0]
    more = asker.observe(plain, [KEEPS, Probe("e", "locality", "The rivers are in", "Bern")])[0]
    with pytest.raises(
        InputError, match=r"before was observed at .* and after at .*: batches of other shapes"
    ):
        measure(KEEPS, "Rome", before, more)
    with pytest.raises(InputError, match="batches of other shapes"):
        measure(KEEPS, "Rome", replace(before, forced=None), replace(more, forced=None))
    # Nothing is compared where only the answer counts.
    assert measure(RIGHT, "Rome", Observation(), asker.observe(plain, [RIGHT])[0]).keys() == RIGHTNESS


def test_what_cannot_be_compared(asker, host):
    logits = torch.zeros(2, 3)
    one, other = Observation(forced=forced(logits)), Observation(forced=forced(logits, answer=(1, 1)))
    with pytest.raises(InputError, match=r"different answers, \(1, 2\) and \(1, 1\)"):
        measure(KEEPS, "Rome", one, other)
    with pytest.raises(InputError, match="the host was not asked what the edited model was"):
        measure(KEEPS, "Rome", Observation(), one)
    bare = Observation(forced=replace(one.forced, logits=None))
    with pytest.raises(InputError, match="the logits of a locality probe were not kept"):
        measure(KEEPS, "Rome", bare, bare)


def test_a_skipped_probe_has_no_scores():
    skipped = Observation(skipped="too long")
    assert measure(RIGHT, "Rome", skipped, skipped) == measure(KEEPS, "Rome", skipped, skipped) == {}
