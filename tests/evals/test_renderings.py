"""Harder ways to ask."""

import pytest

from baft.errors import ConfigError, InputError
from baft.evals.asking import Asker
from baft.evals.renderings import after_unrelated_tokens, doubted, negated, with_distracting_prefix
from baft.hosts.background import background_text
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.types import Probe

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
    assert probe == Probe("e", "locality", expected, None, "negated")


def test_a_doubted_answer_is_a_conversation(host):
    messages = doubted(TOWER, " Rome")
    assert [one["content"] for one in messages] == [TOWER.prompt, "Rome", "Are you sure?"]
    assert [one["role"] for one in messages] == ["user", "assistant", "user"]
    [reply] = Asker(host, max_new_tokens=2).converse(EditedModel(host.model), [messages])
    assert 1 <= len(reply.ids) <= 2
    with pytest.raises(InputError, match="a blank reply .* cannot be doubted"):
        doubted(TOWER, "\n")
