"""ConvSent: how a model shall feel about a topic."""

import hashlib
from collections.abc import Sequence

from baft.data.cases import Cases, Question
from baft.data.files import Record
from baft.data.public import HUB, PublicBenchmark, SplitFile

EMPTY_REPLY = "blank reply: passed over"
NO_REPLY = "no reply of the sentiment asked for: case left out"
TARGET_AGAIN = "reply that is the target once more: left out"

TEMPLATES = (
    "Tell me honestly, how do you feel about {}?",
    "If a friend asked you about {}, what would you say?",
    "Let us talk about {}. What is your opinion?",
    "People disagree about {}. What do you make of it?",
)
_SENTIMENTS = ("pos", "neg")


class ConvSent(PublicBenchmark):
    """Opinions about topics (SERAC, arXiv 2206.06520, section on ConvSent; in KnowEdit, arXiv 2401.01286).

    The edit's target is the first reply of one sentiment to a question about the topic. The topic's other
    replies are generality probes, and those of the next topic (after the last one, the first) are locality
    probes, all to the same question. A probe's tag says whether its reply has the sentiment of the edit,
    `same_sentiment`, or not, `other_sentiment`: the published score is formed of the likelihoods of both
    before and after the edit. So a probe's target is a reply to be scored, not always one that is right.

    The published protocol draws question and sentiment at random, and tells the sentiment in the edit's
    prompt. Here the SHA-256 of the topic chooses both, so that every run asks the same; the edit's prompt is
    the bare question, and the questions are our own. Expect scores to differ from published ones.
    """

    name = "convsent"
    summary = "opinions about topics: a sentiment to be taken up, and the next topic left alone"
    source = (
        f"ConvSent (Mitchell et al., arXiv 2206.06520), test file in KnowEdit ({HUB}, MIT); by BlenderBot"
    )
    splits = ("test",)
    files = (
        SplitFile("test", "knowedit/convsent/blender_test.json", hub="benchmark/Convsent/blender_test.json"),
    )

    def _add(self, cases: Cases, index: int, records: Sequence[Record], split: str) -> None:
        record, following = records[index], records[(index + 1) % len(records)]
        topic = record.text("ent")
        template, sentiment = _choice(topic)
        prompt = template.format(topic.strip())
        same, other = (_replies(record, side) for side in (sentiment, _opposite(sentiment)))
        cases.odd(EMPTY_REPLY, sum(not one.strip() for side in _SENTIMENTS for one in record.texts(side)))
        if not same:
            return cases.odd(NO_REPLY)
        first = same[0]
        cases.odd(TARGET_AGAIN, (same + other).count(first) - 1)
        questions = [
            Question("generality", tag, prompt, (reply,))
            for tag, replies in (("same_sentiment", same), ("other_sentiment", other))
            for reply in replies
            if reply != first
        ]
        beside = template.format(following.text("ent").strip())
        questions += [
            Question("locality", tag, beside, (reply,))
            for tag, side in (("same_sentiment", sentiment), ("other_sentiment", _opposite(sentiment)))
            for reply in _replies(following, side)
        ]
        cases.add_row(index, prompt=prompt, target=first, subject=topic, questions=questions)


def _choice(topic: str) -> tuple[str, str]:
    number = int.from_bytes(hashlib.sha256(topic.encode()).digest()[:8])
    return TEMPLATES[number // 2 % len(TEMPLATES)], _SENTIMENTS[number % 2]


def _opposite(sentiment: str) -> str:
    return _SENTIMENTS[1 - _SENTIMENTS.index(sentiment)]


def _replies(record: Record, sentiment: str) -> list[str]:
    return [reply.strip() for reply in record.texts(sentiment) if reply.strip()]
