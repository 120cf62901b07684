"""Names of scores; replies compared as texts; sameness, fluency and sentiment by hand and by their limits."""

import math
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baft.errors import InputError, UnknownNameError
from baft.evals.metrics import (
    METRICS,
    contains,
    exact_match,
    metric,
    ngram_entropy,
    normalize,
    sentiment_score,
    share_changed,
    token_agreement,
)

quick = settings(max_examples=200, deadline=None)
words = st.text(string.ascii_lowercase, min_size=4, max_size=8)  # too long for an article
texts = st.text(max_size=30)
answers = texts.filter(str.strip)
logprobs = st.floats(-20, 0)
replies = st.lists(st.lists(logprobs, min_size=1, max_size=5), min_size=1, max_size=4)


# --- names ---


def test_the_table_holds_the_names_that_records_use() -> None:
    hows = ["teacher_forced", "margin"]
    for how in ("generate", "generate_chat"):
        hows += [how, f"{how}_contains", f"{how}_stopped"]
    expected = {f"{kind}@{how}" for kind in ("reliability", "generality", "portability") for how in hows}
    expected |= {f"reliability@generate_doubted{how}" for how in ("", "_contains", "_stopped")}
    locality = ["argmax", "text", "text_chat", "bit_exact", "logprob_max", "logprob_mean"]
    locality += ["bleed", "bleed_chat"]
    expected |= {f"locality@{how}" for how in locality}
    expected |= {"fluency", "perplexity_ratio", "false_fires_tokens", "false_fires_texts", "sentiment"}
    assert set(METRICS) == expected


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_what_it_is_in_a_sentence(name: str) -> None:
    spec = metric(name)
    kind, _, how = name.partition("@")
    assert (spec.name, spec.kind) == (name, kind if how else "run")
    assert spec.summary.endswith(".")
    assert len(spec.summary) > 40
    assert len({one.summary for one in METRICS.values()}) == len(METRICS)
    assert spec.bounds[0] < spec.bounds[1]


def test_lower_is_better_exactly_for_harm() -> None:
    lower = {name for name, spec in METRICS.items() if spec.better == "lower"}
    changes = {"locality@logprob_max", "locality@logprob_mean", "locality@bleed", "locality@bleed_chat"}
    assert lower == changes | {"perplexity_ratio", "false_fires_tokens", "false_fires_texts"}


def test_published_names_are_told() -> None:
    for name, synonym in {
        "reliability@teacher_forced": "rewrite_acc",
        "generality@teacher_forced": "rephrase_acc",
        "locality@argmax": "specificity",
        "fluency": "ngram_entropy",
    }.items():
        assert synonym in metric(name).summary


def test_an_unknown_metric_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown metric 'locality@txt'; did you mean 'locality@text'"):
        metric("locality@txt")


# --- replies ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The Eiffel Tower. ", "eiffel tower"),
        ("U.S.", "us"),
        ("an apple, a pear and the rest", "apple pear and rest"),
        ("theatre", "theatre"),
        ("Ｒｏｍｅ\u00a0Ⅳ", "rome iv"),
        ("«São Paulo»", "são paulo"),
        ("Sa\u0303o Paulo", "são paulo"),
        ("$100", "100"),
        ("20 °C", "20 °c"),
        ("The The", "the the"),
        ("A", "a"),
        (" !? ", "!?"),
        ("", ""),
    ],
)
def test_normalized_texts(text: str, expected: str) -> None:
    assert normalize(text) == expected


@quick
@given(texts)
def test_normalizing_twice_changes_nothing_and_loses_no_whole_text(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    assert bool(once) == bool(text.strip())


@quick
@given(
    st.lists(words, min_size=1, max_size=4),
    st.sampled_from(["", "the ", "A ", "\t"]),
    st.sampled_from("!.,;:'"),
)
def test_case_articles_and_punctuation_do_not_count(parts: list[str], before: str, mark: str) -> None:
    answer = " ".join(parts)
    assert exact_match(f"{before}{answer.upper()}{mark}", ["something else", answer])
    assert not exact_match(f"{answer} indeed", [answer])
    assert contains(f"Well, {before}{answer.title()}{mark} Indeed", [answer])


@quick
@given(words, words, words)
def test_only_whole_words_are_contained(answer: str, left: str, right: str) -> None:
    assert contains(f"{left} {answer} {right}", [answer])
    if answer not in (left, right):
        glued = f"{left}{answer}{right}"
        assert not contains(f"{left} {glued} {right}", [answer])
    assert contains(f"{left} {right}", [f"{left} {right}"])
    if left != right:
        assert not contains(f"{right} {left}", [f"{left} {right}"])  # in the answer's order only


@quick
@given(texts, st.lists(answers, min_size=1, max_size=3))
def test_what_matches_exactly_is_contained(reply: str, accepted: list[str]) -> None:
    assert exact_match(accepted[0], accepted)
    assert contains(accepted[0], accepted)
    if exact_match(reply, accepted):
        assert contains(reply, accepted)


@pytest.mark.parametrize(
    ("reply", "answer", "expected"),
    [
        ("Romeo and Juliet", "Rome", False),
        ("It is in Rome/Lazio.", "Rome", True),
        ("He moved to the U.S. in 1990", "US", True),
        ("He moved to the US in 1990", "U.S.", True),
        ("the Franco-German border", "German", True),
        ("New York City", "York City", True),
        ("New York, City", "New York City", True),
        ("They played The Who's songs", "The Who", True),
        ("a plan", "A", True),
        ("plan", "A", False),
        ("what!?", "!", True),
        ("what", "!", False),
        ("", "Rome", False),
    ],
)
def test_contained_or_not(reply: str, answer: str, expected: bool) -> None:
    assert contains(reply, [answer]) is expected


def test_answers_of_nothing_are_refused() -> None:
    for compare in (exact_match, contains):
        with pytest.raises(InputError, match="no answer"):
            compare("Rome", [])
        with pytest.raises(InputError, match="blank answer"):
            compare("Rome", ["Rome", " "])
        with pytest.raises(InputError, match="put it into a list"):
            compare("Rome", "Rome")


# --- sameness ---


def test_shares_of_what_changed() -> None:
    assert share_changed([[1, 2], [3], []], [[1, 2], [4], []]) == 1 / 3
    assert share_changed([[1, 2]], [[1, 2, 3]]) == 1.0  # a longer reply is another reply
    assert share_changed([[1, 2]], [(1, 2)]) == 0.0
    assert token_agreement([1, 2, 3, 4], [1, 0, 3, 0]) == 0.5
    with pytest.raises(InputError, match="1 replies before and 2 after"):
        share_changed([[1]], [[1], [2]])
    with pytest.raises(InputError, match="no tokens"):
        token_agreement([], [])


# --- fluency ---


def test_entropy_by_hand() -> None:
    """Three bigrams, of which one twice: 1.5 bits; four trigrams, each once: 2 bits."""
    tokens = ["x", "y", "x", "y", "z", "w"]  # xy yx xy yz zw; xyx yxy xyz yzw
    bigrams = 0.4 * math.log2(2.5) + 3 * 0.2 * math.log2(5)
    assert ngram_entropy(tokens) == pytest.approx((2 / 3 * bigrams + 4 / 3 * 2) / 2)
    assert ngram_entropy("x y x y z w") == ngram_entropy(tokens)
    assert ngram_entropy([7, 8, 7, 8, 9, 6]) == ngram_entropy(tokens)


def test_punctuation_is_a_token_of_the_text() -> None:
    assert ngram_entropy("Rome, it's big.") == ngram_entropy(["Rome", ",", "it", "'", "s", "big", "."])


@pytest.mark.parametrize("text", ["", "one", "one two", "la la la la la la la"])
def test_short_and_repeating_texts_have_none(text: str) -> None:
    assert ngram_entropy(text) == 0.0


def test_repetition_lowers_entropy() -> None:
    varied = [f"w{i}" for i in range(60)]
    assert ngram_entropy(varied) == pytest.approx((2 / 3 * math.log2(59) + 4 / 3 * math.log2(58)) / 2)
    assert ngram_entropy(varied[:5] * 12) < ngram_entropy(varied[:30] * 2) < ngram_entropy(varied)


# --- sentiment ---


def test_sentiment_by_hand() -> None:
    """Means over all tokens: -2 wanted, -4 opposite, -1 wanted before."""
    score = sentiment_score([[-1.0], [-2.0, -3.0]], [[-4.0, -4.0]], [[-1.0], [-1.0, -1.0]])
    assert score.z_sent == pytest.approx(1 / (1 + math.exp(-2)))
    assert score.z_topic == pytest.approx(math.exp(-1))
    assert score.score == score.z_sent * score.z_topic


@quick
@given(replies, replies)
def test_sentiment_within_its_limits(wanted: list[list[float]], opposite: list[list[float]]) -> None:
    same = sentiment_score(wanted, opposite, wanted)
    assert same.z_topic == 1.0
    mirrored = sentiment_score(opposite, wanted, opposite)
    assert same.z_sent + mirrored.z_sent == pytest.approx(1.0)
    likelier = [[value + 1 for value in reply] for reply in wanted]
    gained, lost = sentiment_score(likelier, opposite, wanted), sentiment_score(wanted, opposite, likelier)
    assert gained.z_topic == 1.0  # a gain is not rewarded
    assert lost.z_topic == pytest.approx(math.exp(-1))
    assert lost.score < same.score <= gained.score


def test_log_probabilities_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(InputError, match="the same replies, token by token"):
        sentiment_score([[-1.0, -2.0]], [[-1.0]], [[-1.0]])
    with pytest.raises(InputError, match="opposite has no token"):
        sentiment_score([[-1.0]], [[]], [[-1.0]])
    with pytest.raises(InputError, match="wanted has a log-probability that is not finite"):
        sentiment_score([[-math.inf]], [[-1.0]], [[-1.0]])
