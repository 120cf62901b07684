"""Asking probes: the same whatever the company, the padding and the order."""

import random
from dataclasses import replace

import pytest
import torch

from baft.errors import ConfigError, InputError, UnknownNameError
from baft.evals.asking import EVERYTHING, Asker
from baft.evals.renderings import doubted
from baft.evals.teacher_forced import N_COMPARED
from baft.hosts.edited_model import EditedModel
from baft.types import Probe
from references.teacher_forced import greedy_reply
from rules import Ruled, prefers
from tiny import EOS_ID, some_interventions

PROBES = (
    Probe("e", "reliability", "The tower is in", "Rome"),
    Probe("e", "generality", "Where is it?", "Rome", aliases=("Roma",)),
    Probe("e", "portability", "Its country is", "Italy, N"),
    Probe("e", "locality", "The river is in", "Bern"),
    Probe("e", "locality", "A hat", None),
    Probe("e", "locality", "A hat", "of straw"),
    Probe("e", "locality", "Why?", None, chat=True),
    Probe("e", "reliability", "The tower is in", "Rome", "again"),
)
# Twice the tokens of the longest answer, which are bytes but for " R" and "of", in threes.
LIMITS = (9, 9, 18, 12, 3, 18, 3, 9)


def ask(host, edited, probes=PROBES, want=EVERYTHING, before=None, **settings):
    return Asker(host, **{"batch_size": 3, "max_new_tokens": 3, **settings}).observe(
        edited, probes, want, before=before
    )


def assert_same(one, other):
    assert (one.skipped, one.forced is None) == (other.skipped, other.forced is None)
    for name in ("raw", "chat"):
        reply, again = getattr(one, name), getattr(other, name)
        assert (reply is None) == (again is None)
        assert reply is None or (reply.ids, reply.text, reply.stopped) == (
            again.ids,
            again.text,
            again.stopped,
        )
    if one.forced is not None:
        seen, again = one.forced, other.forced
        assert (seen.answer, seen.predicted) == (again.answer, again.predicted)
        assert seen.logprobs == pytest.approx(again.logprobs, rel=0, abs=1e-9)
        assert seen.margin == pytest.approx(again.margin, rel=0, abs=1e-9)
        assert (seen.logits is None) == (again.logits is None)
        if seen.logits is not None:
            torch.testing.assert_close(seen.logits, again.logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_observations_do_not_depend_on_company(host_of, family):
    host = host_of(family)
    edited = EditedModel(host.model, some_interventions(host.model))
    base = ask(host, EditedModel(host.model))
    seen = ask(host, edited, before=base)
    shuffled = list(range(len(PROBES)))
    random.Random(0).shuffle(shuffled)
    mixed = ask(
        host, edited, [PROBES[i] for i in shuffled], before=[base[i] for i in shuffled], batch_size=16
    )
    for i, observation in zip(shuffled, mixed, strict=True):
        assert_same(observation, seen[i])
    for i, probe in enumerate(PROBES):
        assert_same(ask(host, edited, [probe], before=[base[i]])[0], seen[i])
    left = ask(host_of(family, side="left"), edited, before=base)
    for one, other in zip(left, seen, strict=True):
        assert_same(one, other)
        assert one.raw == other.raw  # the same batches too
    assert any(one.raw != other.raw for one, other in zip(base, seen, strict=True))  # control


def test_the_order_of_probes_changes_no_bit(host):
    edited = EditedModel(host.model, some_interventions(host.model))
    seen, turned = ask(host, edited), ask(host, edited, PROBES[::-1])[::-1]
    for one, other in zip(seen, turned, strict=True):
        assert (one.raw, one.chat) == (other.raw, other.chat)
        if one.forced is not None:
            assert one.forced.place == other.forced.place
            assert one.forced.logprobs == other.forced.logprobs


def test_replies_equal_one_text_at_a_time(host):
    edited = EditedModel(host.model, some_interventions(host.model))
    asker = Asker(host, batch_size=4, max_new_tokens=3)
    encoder, stops = asker.speaker.encoder, asker.speaker.encoder.stop_ids()
    before = asker.observe(EditedModel(host.model), PROBES)
    after = asker.observe(edited, PROBES, before=before)
    for probe, n, seen in list(zip(PROBES, LIMITS, after, strict=True))[1:7]:
        if not probe.chat:
            assert list(seen.raw.ids) == greedy_reply(edited, encoder.prompt(probe.prompt), stops, n)
        chat = encoder.chat([{"role": "user", "content": probe.prompt}])
        assert list(seen.chat.ids) == greedy_reply(edited, chat, stops, n)
        assert seen.chat.stopped == (seen.chat.ids[-1] in stops)
        assert seen.chat.text == encoder.text(seen.chat.ids)
    assert {len(seen.chat.ids) for seen in after} >= {3, 9, 12, 18}  # the limits, where nothing ended before


def test_a_reply_that_ends_says_so(host):
    observed = ask(host, Ruled(host.model, prefers(EOS_ID)), [PROBES[0]], max_new_tokens=16)[0]
    assert observed.raw.ids == (EOS_ID,)
    assert (observed.raw.text, observed.raw.stopped) == ("", True)


def test_equal_questions_are_asked_once(host):
    edited = Ruled(host.model, prefers(EOS_ID))
    ask(host, edited, [PROBES[0]] * 9, frozenset({"generate"}), batch_size=2)
    assert edited.n_generations == 1


def test_the_host_gives_the_answer_where_none_is_known(host):
    probe = Probe("e", "locality", "A hat", None)
    plain, edited = EditedModel(host.model), EditedModel(host.model, some_interventions(host.model))
    want = frozenset({"teacher_forced"})
    for n, length in ((3, 3), (12, N_COMPARED)):
        before = ask(host, plain, [probe], want, max_new_tokens=n)
        own = ask(host, plain, [probe], max_new_tokens=n)[0].raw.ids
        assert before[0].forced.answer == before[0].forced.predicted == own[:length]
        assert before[0].raw is None  # needed, but not asked for
        after = ask(host, edited, [probe], want, before=before, max_new_tokens=n)
        assert after[0].forced.answer == own[:length]
        assert after[0].forced.predicted != own[:length]
    with pytest.raises(InputError, match="the host was not asked for teacher_forced"):
        ask(host, edited, [probe], before=ask(host, plain, [probe], frozenset({"generate"})))


def test_only_what_is_wanted_is_asked(host, host_of):
    plain = EditedModel(host.model)
    for want, seen in (
        ({"teacher_forced"}, (True, False, False)),
        ({"generate"}, (False, True, False)),
        ({"generate_chat"}, (False, False, True)),
        (set(), (False, False, False)),
    ):
        one = ask(host, plain, PROBES[:1], frozenset(want))[0]
        assert (one.forced is not None, one.raw is not None, one.chat is not None) == seen
    for other in (host_of(chat=False), host):
        one, for_chat = ask(other, plain, [PROBES[0], PROBES[6]], chat=False)
        assert (one.forced is not None, one.raw is not None, one.chat is None) == (True, True, True)
        assert "for the chat alone" in for_chat.skipped
    one = ask(host, plain, [PROBES[6]])[0]
    assert (one.forced, one.raw, one.chat is not None) == (None, None, True)
    assert ask(host, plain, []) == []


def test_logits_are_kept_for_locality_alone(host):
    for probe, seen in zip(PROBES, ask(host, EditedModel(host.model)), strict=True):
        kept = seen.forced is not None and seen.forced.logits is not None
        assert kept == (probe.kind == "locality" and not probe.chat)
    assert seen.target_logprob == pytest.approx(sum(seen.forced.logprobs) / len(seen.forced.logprobs))


def test_what_does_not_fit_is_skipped_and_says_so(host):
    plain = EditedModel(host.model)
    fits = Probe("e", "reliability", "a" * 153, "b")  # with BOS and 6 tokens of reply the whole context
    long = Probe("e", "reliability", "a" * 154, "b")
    raw = frozenset({"teacher_forced", "generate"})
    one, other = ask(host, plain, [fits, long], raw, max_new_tokens=6)
    assert one.skipped is None
    assert other.skipped == "it takes 161 tokens, and the host's context holds 160"
    assert (other.forced, other.raw, other.chat, other.target_logprob) == (None, None, None, None)
    assert ask(host, plain, [fits])[0].skipped.endswith("context holds 160")  # not in the chat template
    wordy = Probe("e", "reliability", "a", "b" * 160)
    assert ask(host, plain, [wordy], frozenset({"teacher_forced"}))[0].skipped.startswith("it takes 163 ")


def test_a_conversation_that_a_template_refuses_is_skipped(host_of):
    host = host_of("llama", chat=True)
    host.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        + host.tokenizer.chat_template
    )
    probe = replace(PROBES[6], earlier=(("system", "Be kind."),))
    [seen] = ask(host, EditedModel(host.model), [probe])
    assert "no system here" in seen.skipped
    [seen] = ask(host, EditedModel(host.model), [PROBES[6]])
    assert seen.skipped is None  # control


def test_a_target_that_adds_no_token_is_skipped(host, monkeypatch):
    # No tokenizer at hand does that.
    monkeypatch.setattr("baft.evals.teacher_forced._default_ids", lambda *_: (1, 2))
    seen = ask(host, EditedModel(host.model), PROBES[:1])[0]
    assert seen.skipped == "by the published rule its target adds no token to the prompt"
    assert seen.raw is None


def test_conversations(host):
    asker = Asker(host, max_new_tokens=4)
    turns = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me"},
        {"role": "user", "content": "Sure?"},
    ]
    plain, edited = EditedModel(host.model), EditedModel(host.model, some_interventions(host.model))
    replies = asker.converse(edited, [turns, turns[:1]])
    rows = [asker.speaker.encoder.chat(one) for one in (turns, turns[:1])]
    assert [list(one.ids) for one in replies] == [greedy_reply(edited, row, {EOS_ID}, 4) for row in rows]
    assert [one.ids for one in asker.converse(plain, [turns])] != [replies[0].ids]  # control
    assert len(asker.converse(plain, [turns], max_new_tokens=2)[0].ids) == 2
    with pytest.raises(InputError, match="take 162 tokens, this host's context holds 160: shorten it"):
        asker.converse(plain, [[{"role": "user", "content": "a" * 139}]])


def test_a_probe_is_asked_behind_its_earlier_messages(host):
    edited, asker = EditedModel(host.model), Asker(host, max_new_tokens=6)
    earlier = (("user", "Why so?"), ("assistant", "A hat."))
    probe = replace(PROBES[6], earlier=earlier)
    [want] = asker.converse(edited, [probe.messages])
    [seen], [alone] = (
        ask(host, edited, [probe], max_new_tokens=6),
        ask(host, edited, [PROBES[6]], max_new_tokens=6),
    )
    assert seen.chat.ids == want.ids[: len(seen.chat.ids)]
    assert seen.chat.ids != alone.chat.ids  # control


def test_what_is_refused(host):
    plain = EditedModel(host.model)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        Asker(host, batch_size=0)
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1, got 0"):
        Asker(host, max_new_tokens=0)
    with pytest.raises(UnknownNameError, match="unknown observation 'generated'; did you mean 'generate'"):
        ask(host, plain, want=frozenset({"generated"}))
    with pytest.raises(InputError, match="got 0 earlier observations for 8 probes"):
        ask(host, plain, before=[])


DOUBTED = (
    Probe("e", "reliability", "The tower is in", "Rome"),
    Probe("e", "reliability", "The hat is of", "felt, a lot of it"),
    Probe("e", "generality", "It is in", "Rome"),
)


def test_a_reply_to_an_edits_own_prompt_is_doubted(host):
    asker, edited = Asker(host, max_new_tokens=3), EditedModel(host.model, some_interventions(host.model))
    seen = asker.observe(edited, DOUBTED)
    found = asker.doubt(edited, DOUBTED, seen)
    assert [one.doubted is None for one in found] == [False, False, True]  # the last is no reliability probe
    for probe, one, limit in zip(DOUBTED[:2], found, (18, 72), strict=False):
        [alone] = asker.converse(edited, [doubted(probe, one.chat.text)], max_new_tokens=limit)
        assert one.doubted.ids == alone.ids
        assert one.doubted.ids != one.chat.ids  # control
        assert replace(one, doubted=None).chat == one.chat
    raw = asker.observe(edited, DOUBTED, frozenset({"generate"}))
    assert asker.doubt(edited, DOUBTED, raw) == raw  # without a chat there is nothing to doubt


def test_what_cannot_be_doubted_is_told(host):
    asker = Asker(host, max_new_tokens=3)
    silent = Ruled(host.model, prefers(EOS_ID))
    [one] = asker.doubt(silent, DOUBTED[:1], asker.observe(silent, DOUBTED[:1]))
    assert (one.doubted, one.undoubted) == (None, "its reply in the chat was blank")
    long = [Probe("e", "reliability", "The tower is in " * 5, "Rome")]
    plain = EditedModel(host.model)
    [one] = asker.doubt(plain, long, asker.observe(plain, long))
    assert one.chat is not None
    assert (one.doubted, one.undoubted) == (None, "its chat with a second reply exceeds 160 tokens")
