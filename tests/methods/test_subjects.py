"""Where a prompt's subject is found."""

import pytest

from baft.errors import InputError, UnsupportedHostError
from baft.hosts.encoding import Encoder
from baft.methods.subjects import essence, placed, prefixes, subject_span
from baft.types import Edit
from tiny import tiny_tokenizer


def said(prompt, subject=None):
    start, end = subject_span(Edit(prompt, "x", subject=subject))
    return prompt[start:end]


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The capital of France is", "France"),
        ("What is the capital of New South Wales?", "New South Wales"),
        ("Who fought the Battle of the Nile, and when?", "Battle of the Nile"),
        ("Michael Jordan plays the sport of", "Michael Jordan"),
        ("In which city is Ludwig van Beethoven buried?", "Ludwig van Beethoven"),
        ("What year was USA-88?", "USA-88"),
        ("Is Rome in Italy, or Florence-Sesto?", "Florence-Sesto"),
    ],
)
def test_capitals_tell_the_subject(prompt, subject):
    assert said(prompt) == subject


def test_a_named_subject_is_found_as_the_prompt_says_it():
    assert said("the tower of the tower-house", "tower") == "tower"
    assert subject_span(Edit("a tower by the tower", "x", subject="tower"))[0] == 15  # the last
    assert said("Where is the EIFFEL tower?", "Eiffel Tower") == "EIFFEL tower"
    assert subject_span(Edit("The US joined thus in", "x", subject="US"))[0] == 4  # not inside a word
    assert subject_span(Edit("Rome, unlike Romeo and rome, is", "x", subject="Rome"))[0] == 0
    assert said("Romeo and rome met in", "Rome") == "rome"  # rather a word than a spelling
    assert said("İzmir lies in Turkey, which is", "turkey") == "Turkey"  # "İ" is longer in small letters
    assert said("The coast of Großbritannien is", "britannien") == "britannien"  # else a part of one
    assert said("What is C++ (the language)?", "C++") == "C++"
    with pytest.raises(InputError, match="'Louvre' is not in the prompt .* give subject="):
        said("Where is the Eiffel tower?", "Louvre")
    for prompt in ("the tower is in", "The tower is in", "what?"):
        with pytest.raises(InputError, match="cannot tell what .* give subject="):
            said(prompt)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_place_is_that_of_the_last_token(adds_bos):
    encoder = Encoder(tiny_tokenizer(adds_bos=adds_bos))
    edit = Edit("The tower of Rome is in", "x", subject="tower of")
    for one in (*placed(encoder, edit, prefixes(6, seed=0), eos=False), essence(encoder, edit)):
        through = encoder.text(one.text.prompt_ids[: one.place + 1])
        assert through.endswith("tower of")
    rows = placed(encoder, edit, prefixes(6, seed=0), eos=False)
    assert len(rows) == 7
    assert len({one.text.prompt_ids for one in rows}) == 7
    assert len({one.text.target_ids for one in rows}) == 1


def test_contexts_that_do_not_fit_are_left_out():
    edit = Edit("The tower of Rome is in", "x")
    encoder = Encoder(tiny_tokenizer(), max_tokens=26)
    assert len(placed(encoder, edit, prefixes(6, seed=0), eos=False)) == 1
    with pytest.raises(InputError, match="holds 10"):
        placed(Encoder(tiny_tokenizer(), max_tokens=10), edit, (), eos=False)


def test_a_tokenizer_that_tells_no_places_is_refused(monkeypatch):
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UnsupportedHostError, match="fast tokenizer"):
        placed(Encoder(tokenizer), Edit("Rome is in", "x"), (), eos=False)


def test_texts_before_are_drawn_by_the_seed():
    assert prefixes(5, seed=0) == prefixes(5, seed=0) != prefixes(5, seed=1)
    assert [len(one.split()) for one in prefixes(6, seed=0)] == [2, 5, 10, 2, 5, 10]
    assert all(one.endswith(". ") for one in prefixes(6, seed=0))
