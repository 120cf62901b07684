"""KnowEdit's benchmarks of facts: WikiData recent and counterfactual, zsRE, WikiBio.

Answers are texts, lists of texts, or lists of lists that give each answer its aliases. The first that is
usable is the target, all others are aliases. Some texts hold a Wikidata id in place of a name (`Q781063`), or
what was left of one (`The name of the child of Q is`); nothing can be asked with them.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from baft.data.cases import Cases, Question
from baft.data.files import Record
from baft.data.public import HUB, PublicBenchmark, SplitFile
from baft.types import ProbeKind

EMPTY_GROUP = "empty group of probes: passed over"
EMPTY_PART = {
    "portability": "no portability probe in the record: kept",
    "locality": "no locality probe in the record: kept",
}
UNRESOLVED_ANSWER = "answer is an unresolved Wikidata id: passed over"
UNRESOLVED_EDIT = "unresolved Wikidata id in the edit's prompt or target: case left out"
UNRESOLVED_PROMPT = "unresolved Wikidata id in a probe's prompt: probe left out"

_SOURCE = f"KnowEdit (Zhang et al., arXiv 2401.01286; {HUB} on the hub, MIT)"
_TAGS: dict[ProbeKind, dict[str, str]] = {
    "portability": {
        "Reasoning": "reasoning",
        "Subject_Aliasing": "subject_aliasing",
        "Logical_Generalization": "logical_generalization",
    },
    "locality": {"Relation_Specificity": "relation_specificity", "Forgetfulness": "forgetfulness"},
}
_BARE_Q = re.compile(r"\b(of|is) Q (is|are)\b")
_ID = re.compile(r"Q\d{3,}")


class KnowEdit(PublicBenchmark):
    """Reads the layout that KnowEdit's files of facts share."""

    fields: ClassVar[tuple[str, str, str]] = ("prompt", "target_new", "subject")
    rephrase: ClassVar[str | None] = None  # the field of a generality probe
    parts: ClassVar[tuple[ProbeKind, ...]] = ("portability", "locality")

    def _add(self, cases: Cases, index: int, records: Sequence[Record], split: str) -> None:
        record = records[index]
        prompt, target, subject = (record.text(field) for field in self.fields)
        if (_BARE_Q.search(prompt) and subject != "Q") or _ID.fullmatch(target.strip()):
            return cases.odd(UNRESOLVED_EDIT)
        questions = []
        if self.rephrase is not None:
            questions.append(Question("generality", "rephrase", record.text(self.rephrase), (target,)))
        for kind in self.parts:
            questions += _asked(cases, record.record(kind), kind, subject)
        truths = _resolved(cases, record.answers("ground_truth")) if "ground_truth" in record else ()
        cases.add_row(
            index, prompt=prompt, target=target, subject=subject, truths=truths, questions=questions
        )


class WikidataRecent(KnowEdit):
    """Facts that changed after most models were trained.

    The original of the split `test` is `recent_test.json`. Where the folder has only
    `recent_test.rebuilt.json`, that is read: the same records in the same order, made again from published
    result logs. It lacks what those had dropped: all aliases, blank answers and empty groups.
    """

    name = "wikidata-recent"
    summary = (
        "recent facts of Wikidata with what follows from them; test is rebuilt unless the original is there"
    )
    source = f"{_SOURCE}; made of RippleEdits (Cohen et al., arXiv 2307.12976, MIT), facts of Wikidata (CC0)"
    splits = ("test", "train")
    files = (
        SplitFile(
            "test",
            "knowedit/wiki_recent/recent_test.json",
            stand_in="knowedit/wiki_recent/recent_test.rebuilt.json",
            hub="benchmark/wiki_recent/recent_test.json",
        ),
        SplitFile(
            "train",
            "knowedit/wiki_recent/recent_train.json",
            hub="benchmark/wiki_recent/recent_train.json",
        ),
    )


class WikidataCounterfact(KnowEdit):
    """Counterfactual changes of popular facts."""

    name = "wikidata-counterfact"
    summary = "counterfactual changes of popular facts of Wikidata with what follows from them"
    source = f"{_SOURCE}; made of RippleEdits (Cohen et al., arXiv 2307.12976, MIT), facts of Wikidata (CC0)"
    splits = ("test", "train")
    files = (
        SplitFile(
            "test", "knowedit/wiki_counterfact/test_cf.json", hub="benchmark/wiki_counterfact/test_cf.json"
        ),
        SplitFile(
            "train", "knowedit/wiki_counterfact/train_cf.json", hub="benchmark/wiki_counterfact/train_cf.json"
        ),
    )


class KnowEditZsre(KnowEdit):
    """KnowEdit's choice of zsRE; many questions are also in `zsre`, but locality asks about the subject."""

    name = "knowedit-zsre"
    summary = "zsRE as KnowEdit has it: rephrased, one portability and two locality questions each"
    source = f"{_SOURCE}; questions of zsRE (Levy et al., arXiv 1706.04115)"
    splits = ("test",)
    files = (SplitFile("test", "knowedit/ZsRE/ZsRE-test-all.json", hub="benchmark/ZsRE/ZsRE-test-all.json"),)
    rephrase = "rephrase_prompt"


class WikiBio(KnowEdit):
    """Passages of Wikipedia to be gone on with the right sentence, where GPT-3 went on with a wrong one."""

    name = "wikibio"
    summary = "hallucinated biographies put right: a long prompt, a sentence as target"
    source = (
        f"{_SOURCE}; made of SelfCheckGPT's passages (arXiv 2303.08896), text of Wikipedia (CC BY-SA 3.0)"
    )
    splits = ("test", "train")
    files = (
        SplitFile(
            "test", "knowedit/WikiBio/wikibio-test-all.json", hub="benchmark/WikiBio/wikibio-test-all.json"
        ),
        SplitFile(
            "train", "knowedit/WikiBio/wikibio-train-all.json", hub="benchmark/WikiBio/wikibio-train-all.json"
        ),
    )
    fields = ("text", "labels", "concept")
    parts = ("locality",)


def _asked(cases: Cases, part: Record, kind: ProbeKind, subject: str) -> list[Question]:
    tags, questions = _TAGS[kind], []
    groups = list(part)
    if not groups:
        cases.odd(EMPTY_PART[kind])
    for group in groups:
        if group not in tags:
            part.refuse(group, f"unknown group of {kind} probes; the groups are {', '.join(tags)}")
        rows = part.records(group)
        cases.odd(EMPTY_GROUP, not rows)
        for row in rows:
            prompt = row.text("prompt")
            if _BARE_Q.search(prompt) and subject != "Q":
                cases.odd(UNRESOLVED_PROMPT)
                continue
            questions.append(
                Question(kind, tags[group], prompt, _resolved(cases, row.answers("ground_truth")))
            )
    return questions


def _resolved(cases: Cases, answers: tuple[str, ...]) -> tuple[str, ...]:
    kept = tuple(one for one in answers if not _ID.fullmatch(one.strip()))
    if len(kept) < len(answers):
        cases.odd(UNRESOLVED_ANSWER, len(answers) - len(kept))
    return kept
