"""What texts name, against texts whose names are plain to see."""

import unicodedata

import pytest
import torch

from baft.hosts.encoding import Encoder
from baft.scope.names import COST, Names, cost_of, folded, is_alike, read_names
from tiny import tiny_tokenizer


def named(*pairs):
    return Names(tuple(word for word, _ in pairs), tuple(weight for _, weight in pairs))


@pytest.mark.parametrize(
    ("word", "other", "alike"),
    [
        ("ada", "ada", True),
        ("f", "franklin", True),  # an initial
        ("ron", "ronald", True),  # cut short
        ("ro", "ronald", False),
        ("katharine", "katherine", True),  # one letter off
        ("procaccini", "procacini", True),  # one letter missing
        ("katharine", "catherine", False),  # two
        ("anna", "anne", False),  # too short for that
        ("910", "911", False),  # figures are what they are
        ("9", "910", False),
        ("tr2", "tr", False),
        ("lennon", "lemon", False),
        ("gambia", "zambia", False),  # the first letter
        ("vi", "vii", False),  # numbers of kings
        ("v", "vi", False),
        ("v", "victor", True),
        ("st", "saint", True),
        ("st", "stone", False),
        ("ab", "abcdef", False),
    ],
)
def test_words_that_may_be_one(word, other, alike):
    assert is_alike(word, other) is alike
    assert is_alike(other, word) is alike


@pytest.mark.parametrize(
    ("word", "plain"),
    [("Obradović", "obradovic"), ("ÉLAN", "elan"), ("Straße", "strasse"), ("Ⅳ", "iv"),
     ("Mu\u0308ller", "muller"), ("𝐇ello", "hello"), ("Ho\u200bpper", "hopper")],
)  # fmt: skip
def test_case_and_accents_are_left_out(word, plain):
    assert folded(word) == folded(plain) == plain


def test_another_letter_is_no_accent():
    assert folded("パリ") != folded("バリ")


def test_a_folded_word_is_one_word():
    """Some letters come apart into several words, or into accents alone."""
    assert folded("\ufdfa") == "".join(unicodedata.normalize("NFKD", "\ufdfa").split())
    assert all(
        len(folded(one).split()) == 1 for one in ("\uff9e", "\u2474", "\ufb01x", "\u0345", "Ho\u200bpper")
    )


def test_what_each_names_that_the_other_does_not():
    paul, scholes = named(("chris", 0.25), ("paul", 0.75)), named(("paul", 0.4), ("scholes", 0.6))
    assert paul.missing_in(scholes) == pytest.approx(0.25)
    assert scholes.missing_in(paul) == pytest.approx(0.6)
    assert cost_of(paul, scholes) == cost_of(scholes, paul) == pytest.approx(COST * 0.25)
    less = named(("paul", 1.0))  # names less, and nobody else
    assert cost_of(paul, less) == cost_of(less, paul) == 0.0
    other = named(("porsche", 0.2), ("924", 0.8))
    assert cost_of(other, named(("porsche", 0.3), ("910", 0.7))) == pytest.approx(COST * 0.7)


def test_of_a_prompt_whose_names_are_not_known_all_that_the_edit_names_is_wanted():
    hopper = named(("where", 0.2), ("grace", 0.3), ("hopper", 0.5)).only("The Grace  HOPPER")
    assert hopper == named(("where", 0.0), ("grace", 1.0), ("hopper", 1.0))
    said = {"was hoppers grace": 0, "was g hopper": 0, "was hopper": 1, "was ada": 1, "the g s as how": 1}
    for words, missing in said.items():
        prompt = Names(tuple(words.split()), (0.0,) * len(words.split()))
        assert cost_of(hopper, prompt, both=False) == COST * missing
        assert cost_of(hopper, prompt) == 0.0  # it names nothing that it would have to
    assert cost_of(named(("the", 1.0), ("ada", 1.0)).only("the"), prompt, both=False) == 0.0


def test_words_that_name_nothing_stand_for_no_name():
    """'a' is no initial of Amsterdam, nor 'the' a short form of Theresa, but the same word is the same."""
    city = named(("amsterdam", 0.9), ("theresa", 0.9))
    assert city.missing_in(named(("a", 0.01), ("the", 0.0), ("city", 0.0), ("oslo", 0.9))) == 1.0
    assert city.missing_in(named(("a", 0.8), ("the", 0.8), ("oslo", 0.9))) == 0.0
    assert city.missing_in(named(("amsterdam", 0.0), ("theresa", 0.0), ("oslo", 0.9))) == 0.0


def test_nothing_is_missing_where_nothing_is_named():
    assert named(("it", 0.0)).missing_in(named(("ada", 1.0))) == 0.0
    assert Names((), ()).missing_in(named(("ada", 1.0))) == 0.0
    assert named(("ada", 1.0)).missing_in(Names((), ())) == 1.0
    assert cost_of(named(("ada", 1.0)), Names((), ())) == 0.0


@pytest.mark.parametrize(
    ("text", "last", "words"),
    [
        ("Ada Lovelace's first, 1843", "1843", ("ada", "lovelace", "s", "first", "1843")),
        ("Où est Zoë? 東京は", "は", ("ou", "est", "zoe", "東", "京", "は")),
        ("naïve 😀 x", "x", ("naive", "x")),
        ("Mu\u0308ller राम रोम", "रोम", ("muller", "राम", "रोम")),
        (" Пётр  \n Ho\u200bpper ", "Ho\u200bpper", ("петр", "hopper")),
    ],
)
@pytest.mark.parametrize("n_letters", [1, 2])
def test_words_weigh_what_their_tokens_do(text, last, words, n_letters):
    """Tokens of a byte, or of two, which may be a space and the beginning of a letter."""
    raw = text.encode()
    pieces = [raw[i : i + n_letters] for i in range(0, len(raw), n_letters)]

    def decode(ids):
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    weights = torch.rand(2, len(pieces), generator=torch.Generator().manual_seed(0)) + 0.1
    found = read_names(decode, range(len(pieces)), weights)
    begin = len(text[: text.rindex(last)].encode())
    mine = range(begin // n_letters, (begin + len(last.encode()) - 1) // n_letters + 1)
    whom, what = weights[:, list(mine)].sum(-1)
    assert found.weights[-1] == pytest.approx(float(whom.sqrt() * whom / (whom + what)), rel=1e-4)
    assert found.words == words


def test_a_token_of_several_words_counts_for_each():
    pieces = ["東京", "は日本", " the"]
    weights = torch.tensor([[0.5, 0.25, 0.25]] * 2)
    found = read_names(lambda ids: "".join(pieces[i] for i in ids), range(3), weights)
    assert found.words == ("東", "京", "は", "日", "本", "the")
    assert (
        found.weights[0] == found.weights[1] > found.weights[2] == found.weights[4] > found.weights[5] == 0.0
    )


def test_common_words_name_nothing_unless_written_as_names():
    pieces = ["The", " band", " The", " Who", " of", " the", " who"]
    found = read_names(lambda ids: "".join(pieces[i] for i in ids), range(7), torch.ones(2, 7))
    assert [bool(one) for one in found.weights] == [False, True, True, True, False, False, False]


def test_by_one_channel_nothing_is_a_name():
    encoder = Encoder(tiny_tokenizer())
    ids = encoder.inner("Ada Lovelace")
    assert read_names(encoder.text, ids, torch.ones(1, len(ids))) == Names(("ada", "lovelace"), (0.0, 0.0))
