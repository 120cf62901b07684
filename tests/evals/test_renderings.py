"""Harder ways to ask."""

from dataclasses import replace
from typing import get_args

import pytest

from baft.errors import ConfigError, InputError
from baft.evals.asking import Asker
from baft.evals.experiment import Rendering, is_rendering
from baft.evals.renderings import (
    after_unrelated_tokens,
    after_unrelated_words,
    doubted,
    in_conversation,
    negated,
    with_distracting_prefix,
    with_renderings,
)
from baft.hosts.background import background_text
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.types import Edit, EditCase, Probe

TOWER = Probe("e", "reliability", "The tower is in the city of", "Rome", "edit", ("Roma",))


def test_a_distraction_stands_before_the_prompt():
    probe = with_distracting_prefix(TOWER, "Paris")
    assert probe.prompt == "Everybody keeps talking about Paris. The tower is in the city of"
    assert (probe.kind, probe.target, probe.aliases) == ("reliability", "Rome", ("Roma",))
    assert probe.tag == "edit+distracting_prefix"
    unrelated = with_distracting_prefix(TOWER)
    assert unrelated == with_distracting_prefix(TOWER)
    assert unrelated.prompt.removesuffix(f" {TOWER.prompt}") in background_text()["sentences"]
    with pytest.raises(InputError, match="the distractor is blank"):
        with_distracting_prefix(TOWER, " ")


@pytest.mark.parametrize("n", [1, 200, 60_000])
def test_unrelated_tokens_stand_before_the_prompt(host, n):
    encoder = Encoder.for_host(host)
    probe = after_unrelated_tokens(TOWER, encoder, n)
    filler = probe.prompt.removesuffix(TOWER.prompt)
    assert filler != probe.prompt
    n_tokens = len(encoder.prompt(filler)) - 1
    longest = max(len(encoder.prompt(one)) for one in background_text()["sentences"])
    assert n <= n_tokens < n + longest
    assert probe.tag == "edit+after_unrelated_tokens"
    other = Probe("e", "generality", "Where is the tower?", "Rome")
    assert not after_unrelated_tokens(other, encoder, n).prompt.startswith(filler[:40])
    with pytest.raises(ConfigError, match="at least 1 token before the prompt, got n=0"):
        after_unrelated_tokens(TOWER, encoder, 0)


@pytest.mark.parametrize("n", [1, 200, 10_000])
def test_unrelated_words_stand_before_the_prompt(n):
    probe = after_unrelated_words(TOWER, n)
    filler = probe.prompt.removesuffix(TOWER.prompt)
    assert filler != probe.prompt
    longest = max(len(one.split()) for one in background_text()["sentences"])
    assert n <= len(filler.split()) < n + longest
    assert probe.tag == "edit+after_unrelated_words"
    with pytest.raises(ConfigError, match="at least 1 word before the prompt, got n=0"):
        after_unrelated_words(TOWER, 0)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("The tower is in the city of", "The tower is not in the city of"),
        ("What is known was written by", "What is known was not written by"),
        ("The island has", "The island has not"),  # "is" in a word is none
        ("Where is it? ", "Where is it? The answer is not"),
        ("The film follows", "It is not true that The film follows"),
    ],
)
def test_a_denied_statement_has_no_known_answer(prompt, expected):
    probe = negated(Probe("e", "generality", prompt, "Rome", "", ("Roma",)))
    assert probe == Probe("e", "locality", expected, None, "generality+negated")


def test_a_doubted_answer_is_a_conversation(host):
    messages = doubted(TOWER, " Rome")
    assert [one["content"] for one in messages] == [TOWER.prompt, "Rome", "Are you sure?"]
    assert [one["role"] for one in messages] == ["user", "assistant", "user"]
    [reply] = Asker(host, max_new_tokens=2).converse(EditedModel(host.model), [messages])
    assert 1 <= len(reply.ids) <= 2
    with pytest.raises(InputError, match="a blank reply .* cannot be doubted"):
        doubted(TOWER, "\n")


EDIT = Edit("The tower is in the city of", "Rome", ground_truth="Paris")
CASE = EditCase(
    "toy/1",
    EDIT,
    (
        Probe(EDIT.id, "generality", "Where is it?", "Rome", "question", chat=True),
        Probe(EDIT.id, "generality", "It stands in", "Lazio", "wider"),
        Probe(EDIT.id, "generality", "You see the tower in", "Rome", "rephrase", ("Roma",)),
        Probe(EDIT.id, "generality", "The tower's city is", "Rome", "rephrase"),
        Probe(EDIT.id, "locality", "A hat is", None, "unrelated"),
    ),
)


def test_a_case_asks_its_prompt_and_its_first_rephrasing_in_harder_ways(host):
    encoder = Encoder.for_host(host)
    found = with_renderings(CASE, get_args(Rendering), encoder)
    assert found.probes[: len(CASE.probes)] == CASE.probes
    made = found.probes[len(CASE.probes) :]
    assert [(probe.kind, probe.tag) for probe in made] == [
        ("generality", "edit+distracting_prefix"),
        ("generality", "rephrase+distracting_prefix"),
        ("generality", "edit+after_unrelated_tokens"),
        ("generality", "rephrase+after_unrelated_tokens"),
        ("generality", "edit+after_unrelated_words"),
        ("generality", "rephrase+after_unrelated_words"),
        ("locality", "edit+negated"),
        ("locality", "rephrase+negated"),
        ("generality", "edit+in_conversation"),
        ("generality", "rephrase+in_conversation"),
    ]
    assert [bool(probe.chat) for probe in made] == [False] * 8 + [True] * 2
    assert made[1].prompt == "Everybody keeps talking about Paris. You see the tower in"
    assert made[1].aliases == ("Roma",)
    assert all(probe.prompt.endswith(("in", "of")) for probe in made)
    assert {probe.target for probe in made} == {"Rome", None}
    assert all(is_rendering(probe.tag) for probe in made)
    assert not any(is_rendering(probe.tag) for probe in found.all_probes[: len(CASE.probes) + 1])  # control
    assert with_renderings(CASE, (), encoder) == CASE


@pytest.mark.parametrize("tag", ["negated", "distracting_prefix", "a+b", "", "+", "negated+x"])
def test_a_benchmarks_own_tag_is_no_rendering(tag):
    assert not is_rendering(tag)
    assert is_rendering(f"{tag}+negated")


def test_a_case_without_rephrasings_or_an_old_answer(host):
    bare = EditCase("toy/2", Edit("The king was", "Al"), ())
    [probe] = with_renderings(bare, ["distracting_prefix"], Encoder.for_host(host)).probes
    assert probe.prompt.removesuffix(" The king was") in background_text()["sentences"]


def test_a_conversation_ends_in_the_question(host):
    probe = in_conversation(TOWER)
    assert (probe.prompt, probe.tag) == (TOWER.prompt, "edit+in_conversation")
    assert [one["role"] for one in probe.messages] == ["system", "user", "assistant", "user"]
    assert probe.messages[-1] == {"role": "user", "content": TOWER.prompt}
    assert TOWER.messages == [probe.messages[-1]]
    with pytest.raises(InputError, match="is for no chat"):
        replace(probe, chat=False)
