"""BM25 beside a slow direct implementation, on documents made by hand and drawn at random."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baft.errors import ConfigError, InputError
from baft.methods.bm25 import Bm25, Index, shares, words

REFERENCE = (
    "the capital of spain is madrid",
    "the color of snow is white",
    "a river runs through the city",
    "nobody knows the name of the river",
)
DOCUMENTS = (
    "the capital of france",
    "the river the river the river",
    "a long walk by the river near the city",
)


def directly(query, document, k1, b):
    """The formula, word by word, counting in plain lists."""
    collection = [text.split() for text in REFERENCE]
    average = sum(len(text) for text in collection) / len(collection)
    text, total = document.split(), 0.0
    for word in sorted(set(query.split())):
        n = len([1 for other in collection if word in other])
        tf = len([1 for other in text if other == word])
        idf = math.log(1 + (len(collection) - n + 0.5) / (n + 0.5))
        if tf == 0:
            continue
        total += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(text) / average))
    return total


def scored(query, documents, k1, b):
    bm25 = Bm25(REFERENCE, k1=k1, b=b)
    return Index([bm25.weights(one) for one in documents]).scores(words(query)).tolist()


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.0, 0.0), (2.0, 1.0)])
def test_scores_are_the_formula_s(k1, b):
    for query in ("the capital of france is", "river city river", "madrid", "nothing known"):
        want = [directly(query, one, k1, b) for one in DOCUMENTS]
        assert scored(query, DOCUMENTS, k1, b) == pytest.approx(want, abs=1e-12)
    assert scored("river", DOCUMENTS, 1.2, 0.75) != pytest.approx(
        scored("river", DOCUMENTS, 1.2, 0.0)
    )  # control


by_hand = st.lists(
    st.sampled_from(["the", "of", "river", "city", "snow", "madrid", "zebra"]), min_size=1, max_size=8
)


@settings(max_examples=60, deadline=None)
@given(st.lists(by_hand, min_size=1, max_size=4), by_hand, st.floats(0, 3), st.floats(0, 1))
def test_scores_are_the_formula_s_for_any_documents(documents, query, k1, b):
    texts, asked = [" ".join(one) for one in documents], " ".join(query)
    want = [directly(asked, one, k1, b) for one in texts]
    assert scored(asked, texts, k1, b) == pytest.approx(want, abs=1e-9)


def test_one_text_alone_weighs_rare_words_more():
    weights = Bm25(REFERENCE).weights("the zebra of madrid")
    assert weights["zebra"] > weights["madrid"] > weights["of"] > weights["the"] > 0


def test_other_texts_change_no_score():
    alone = scored("the river city", DOCUMENTS[:1], 1.2, 0.75)
    assert scored("the river city", DOCUMENTS, 1.2, 0.75)[:1] == alone


def test_shares_add_up_and_the_subject_has_its_own():
    weights = {"the": 1.0, "capital": 2.0, "france": 1.0}
    plain, heavy = shares(weights, {"france"}, 0.0), shares(weights, {"france"}, 0.7)
    assert plain == pytest.approx({"the": 0.25, "capital": 0.5, "france": 0.25})
    assert heavy == pytest.approx({"the": 0.1, "capital": 0.2, "france": 0.7})
    assert shares(weights, {"spain"}, 0.7) == pytest.approx(plain)
    assert shares(weights, set(weights), 0.7) == pytest.approx(plain)


def test_words():
    assert words("Where's the  CAFÉ, no. 7?") == ["where", "s", "the", "café", "no", "7"]
    assert words("東京 is big") == ["東", "京", "is", "big"]
    assert words("...") == []


def test_bad_settings_are_refused():
    for bad in ({"k1": -1.0}, {"k1": math.inf}, {"b": 1.5}):
        with pytest.raises(ConfigError, match="k1 must be at least 0 and b between 0 and 1"):
            Bm25(REFERENCE, **bad)
    with pytest.raises(InputError, match="holds no words"):
        Bm25(["...", ""])


def test_many_texts_are_searched_fast():
    """A thousand texts, a thousand queries; the bound is loose, a loop over texts would take minutes."""
    import time

    bm25 = Bm25(REFERENCE)
    texts = [f"the capital of country{i} is" for i in range(1000)]
    index = Index([bm25.weights(text) for text in texts])
    began = time.monotonic()
    found = [int(index.scores(words(text)).argmax()) for text in texts]
    assert time.monotonic() - began < 10
    assert torch.equal(torch.tensor(found), torch.arange(1000))
