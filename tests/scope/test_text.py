"""The words that scopes are learned from, and how facts are drawn from them."""

import pytest

from baft.scope import text as module
from baft.scope.text import _TRAILERS, ScopeText, relations


def test_every_wording_asks_of_one_subject():
    known = module._names()[0].keys()
    assert len(relations()) > 450
    assert sum(len(one.wordings) for one in relations()) > 7000
    for one in relations():
        assert len(set(one.wordings)) == len(one.wordings) >= 14, one.name
        assert set(one.subjects) <= known, one.name
        for wording in one.wordings:
            assert wording.count("{s}") == 1, wording
            assert wording == wording.strip(), wording
    assert len({one.name for one in relations()}) == len(relations())


def test_names_are_there_once():
    names, parts = module._names()
    assert sum(len(there) for there in names.values()) > 9000
    for kind, there in [*names.items(), *parts.items()]:
        assert len(set(there)) == len(there) > 9, kind
    assert set(module._INVENTORS) <= names.keys()


@pytest.mark.parametrize("part", ["train", "calibrate"])
def test_a_group_is_hard_to_tell_apart(part):
    text = ScopeText(part, seed=3)
    for _ in range(300):
        group = text.group(2)
        one, whom, *what = group
        assert one.relation == whom.relation
        assert one.subject != whom.subject
        assert len(what) in (1, 2)
        assert {fact.subject for fact in what} == {one.subject}
        assert len({one.relation, *(fact.relation for fact in what)}) == 1 + len(what)
        for fact in group:
            assert fact.subject.lower() in fact.prompt.lower()
            assert len(fact.asked) == 2
            assert all(fact.subject.lower() in asked.lower() for asked in fact.asked)


def test_parts_have_nothing_in_common_and_drawing_is_told_by_the_seed():
    train, check = ScopeText("train"), ScopeText("calibrate")
    named = [{one.name for there in text._relations.values() for one in there} for text in (train, check)]
    assert not named[0] & named[1]
    assert 0.1 < len(named[1]) / len(relations()) < 0.3
    for kind, there in train._names.items():
        assert not set(there) & set(check._names[kind])
    assert train.sentences
    assert not set(train.sentences) & set(check.sentences)
    drawn = [[ScopeText("train", seed).group(3) for _ in range(4)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_mentions_ask_nothing_and_conversations_end_in_the_question():
    text = ScopeText("train")
    said = {text.mention("the Amazon") for _ in range(100)}
    assert len(said) > 10
    assert all("the Amazon" in one or "The Amazon" in one for one in said)
    chats = [text.conversation("Where is it?") for _ in range(200)]
    assert all(chat[-1] == {"role": "user", "content": "Where is it?"} for chat in chats)
    roles = {tuple(message["role"] for message in chat) for chat in chats}
    turns = ("user", "assistant", "user")
    assert roles == {("user",), ("system", "user"), turns, ("system", *turns)}


def test_some_questions_have_an_instruction_behind_them():
    text = ScopeText("train")
    asked = [one for _ in range(300) for fact in text.group(2) for one in fact.asked]
    instructed = [one for one in asked if one.endswith(_TRAILERS)]
    assert 0.01 < len(instructed) / len(asked) < 0.1
    for one in instructed:
        trailer = next(end for end in _TRAILERS if one.endswith(end))
        assert one.removesuffix(trailer).endswith("? ")
