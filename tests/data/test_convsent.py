"""One edit a topic, chosen by the topic alone, with both sentiments beside it."""

from collections import Counter

from baft.data import cases as phrases
from baft.data import convsent
from baft.data.convsent import TEMPLATES, ConvSent

FILE = "knowedit/convsent/blender_test.json"
TOPICS = [
    {"ent": f"topic {n}", "pos": [f" I like {n}. ", f"{n} is fun"], "neg": [f"{n} is dull ", f" Not {n}!"]}
    for n in range(60)
]


def replies(topic: dict, side: str) -> list[str]:
    return [reply.strip() for reply in topic[side]]


def test_own_replies_ask_for_generality_and_those_of_the_next_topic_for_locality(put) -> None:
    benchmark = ConvSent(put(FILE, TOPICS))
    cases = benchmark.cases()
    assert len(cases) == len(TOPICS)
    for n, case in enumerate(cases):
        topic, following = TOPICS[n], TOPICS[(n + 1) % len(TOPICS)]
        assert case.id == f"convsent/test/{n}"
        assert case.edit.subject == topic["ent"]
        side = "pos" if case.edit.target == replies(topic, "pos")[0] else "neg"
        opposite = {"pos": "neg", "neg": "pos"}[side]
        assert case.edit.target == replies(topic, side)[0]
        found = [(one.kind, one.tag, one.target) for one in case.probes]
        assert found == [
            ("generality", "same_sentiment", replies(topic, side)[1]),
            *(("generality", "other_sentiment", reply) for reply in replies(topic, opposite)),
            *(("locality", "same_sentiment", reply) for reply in replies(following, side)),
            *(("locality", "other_sentiment", reply) for reply in replies(following, opposite)),
        ]
        prompts = {one.prompt for one in case.probes if one.kind == "generality"}
        assert prompts == {case.edit.prompt}
        beside = {one.prompt for one in case.probes if one.kind == "locality"}
        assert beside == {case.edit.prompt.replace(topic["ent"], following["ent"])}
    assert benchmark.anomalies() == {}


def test_the_topic_alone_chooses_question_and_sentiment(put) -> None:
    cases = ConvSent(put(FILE, TOPICS)).cases()
    turned = ConvSent(put(FILE, TOPICS[::-1])).cases()
    assert {case.edit for case in cases} == {case.edit for case in turned}
    asked = Counter(case.edit.prompt.replace(case.edit.subject, "{}") for case in cases)
    assert set(asked) == set(TEMPLATES)
    positive = sum(case.edit.target.startswith("I like") for case in cases)
    assert 15 < positive < 45


def test_replies_that_cannot_be_used(put) -> None:
    same = {"ent": "topic 0", "pos": ["A.", " ", "A. ", "C."], "neg": ["A", "", "A ", "C"]}
    [case] = ConvSent(put(FILE, [same])).cases()
    sides = (["A.", "C."], ["A", "C"])
    own, other = sides if case.edit.target == "A." else sides[::-1]
    by_tag = {
        tag: [one.target for one in case.probes if one.kind == "generality" and one.tag == tag]
        for tag in ("same_sentiment", "other_sentiment")
    }
    assert by_tag == {"same_sentiment": own[1:], "other_sentiment": other}
    # With one topic in the file, the next is the topic itself: its four replies are there twice a side.
    assert ConvSent(put(FILE, [same])).anomalies() == {
        convsent.EMPTY_REPLY: 2,
        convsent.TARGET_AGAIN: 1,
        phrases.REPEATED_PROBE: 3,
    }


def test_a_topic_without_a_reply_to_take_up_is_left_out(put) -> None:
    positive = [{**topic, "neg": []} for topic in TOPICS]
    benchmark = ConvSent(put(FILE, positive))
    n_left_out = benchmark.anomalies()[convsent.NO_REPLY]
    assert len(benchmark.cases()) == len(TOPICS) - n_left_out
    assert 0 < n_left_out < len(TOPICS)
    assert {one.tag for case in benchmark.cases() for one in case.probes} == {"same_sentiment"}


def test_the_real_file(real) -> None:
    cases = real("convsent").cases()
    assert len(cases) == 800
    # 16,000 replies. Of 42 that stand twice in a list, 4 repeat the target of their case; the others are
    # left out among the topic's own replies, and all 42 among those of the next.
    assert real("convsent").anomalies() == {convsent.TARGET_AGAIN: 4, phrases.REPEATED_PROBE: 38 + 42}
    kinds = Counter(one.kind for case in cases for one in case.probes)
    assert kinds == {"generality": 16000 - 42 - 800, "locality": 16000 - 42}
    assert {case.edit.target.strip() == case.edit.target for case in cases} == {True}
