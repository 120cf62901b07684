"""What all readers share: cases are collected, and whatever is odd about them is counted."""

from collections import Counter, defaultdict
from typing import NamedTuple

from baft.data.base import Loaded
from baft.types import Edit, EditCase, Probe, ProbeKind

BLANK_EDIT = "blank prompt or target: case left out"
BLANK_PROMPT = "blank prompt of a probe: probe left out"
BLANK_TRUTH = "blank ground truth: none recorded"
CONFLICT = "subject and prompt of an earlier case with another target: kept"
DUPLICATE = "exact duplicate of an earlier case: left out"
FIRST_ANSWER_EMPTY = "first answer empty: the next one taken"
LATER_ANSWER_EMPTY = "another answer than the first empty: passed over"
NO_ANSWER = "no usable answer: probe left out"
NO_ANSWER_KEPT = "no usable answer: locality probe kept without one"
NO_SUBJECT = "subject not literally in the prompt: kept"
PADDED = "white space around a text: taken off"
REPEATED_PROBE = "exact duplicate of an earlier probe of the case: left out"
SAME_EDIT = "subject, prompt and target of an earlier case with other questions: kept"
TARGET_TRUE = "target among the ground truths: kept"


class Question(NamedTuple):
    """A probe as a file has it, before it belongs to an edit.

    Args:
        kind: What it tests.
        tag: Its group within the kind.
        prompt: The text asked.
        answers: All right answers, the best first; a blank one is passed over.
    """

    kind: ProbeKind
    tag: str
    prompt: str
    answers: tuple[str, ...]


class Cases:
    """Collects the cases of one split.

    Args:
        benchmark: The benchmark's name.
        split: The split's name; a case's id is made of both and of its index in the file.
    """

    def __init__(self, benchmark: str, split: str):
        self._prefix = f"{benchmark}/{split}"
        self._cases: list[EditCase] = []
        self._seen: defaultdict[tuple[str | None, str], list[EditCase]] = defaultdict(list)
        self._odd: Counter[str] = Counter()

    def odd(self, what: str, n: int = 1) -> None:
        """Counts something odd, `what` saying also what was done about it."""
        self._odd[what] += n

    def add_row(
        self,
        index: int,
        *,
        prompt: str,
        target: str,
        subject: str,
        truths: tuple[str, ...] = (),
        questions: list[Question],
    ) -> None:
        """Makes a case of what a public file says, and adds it; white space around texts is taken off.

        Args:
            index: Place of the record in the file, counted from 0.
            prompt: The edit's prompt.
            target: The edit's target.
            subject: What the prompt is about; may be blank.
            truths: The old answers; the first is the edit's ground truth.
            questions: The probes.
        """
        asked = [text for one in questions for text in (one.prompt, *one.answers)]
        texts = {prompt, target, subject, *truths, *asked}
        self._odd[PADDED] += sum(text.strip() not in ("", text) for text in texts)
        prompt, target, subject = prompt.strip(), target.strip(), subject.strip()
        if not prompt or not target:
            return self.odd(BLANK_EDIT)
        known = tuple(text.strip() for text in truths if text.strip())
        self._odd[BLANK_TRUTH] += len(truths) - len(known)
        edit = Edit(prompt, target, subject or None, known[0] if known else None)
        edit_id = edit.id  # each time it is asked for, it is hashed anew
        probes = [probe for one in questions if (probe := self._probe(edit_id, one))]
        distinct = tuple(dict.fromkeys(probes))
        self._odd[REPEATED_PROBE] += len(probes) - len(distinct)
        self.add(EditCase(f"{self._prefix}/{index}", edit, distinct), truths=known)

    def add(self, case: EditCase, *, truths: tuple[str, ...] = ()) -> None:
        """Adds a case, unless an earlier one is the same in all but its id."""
        edit = case.edit
        earlier = self._seen[edit.subject, edit.prompt]
        if any(one.edit == edit and one.probes == case.probes for one in earlier):
            return self.odd(DUPLICATE)
        if earlier:
            is_same = any(one.edit.target == edit.target for one in earlier)
            self.odd(SAME_EDIT if is_same else CONFLICT)
        self._odd[TARGET_TRUE] += edit.target in truths
        self._odd[NO_SUBJECT] += edit.subject is not None and edit.subject not in edit.prompt
        earlier.append(case)
        self._cases.append(case)

    def loaded(self) -> Loaded:
        """The cases, in the order in which they came, and what was odd."""
        return Loaded(tuple(self._cases), {what: n for what, n in sorted(self._odd.items()) if n})

    def _probe(self, edit_id: str, one: Question) -> Probe | None:
        prompt, texts = one.prompt.strip(), [answer.strip() for answer in one.answers]
        if not prompt:
            self.odd(BLANK_PROMPT)
            return None
        usable = list(dict.fromkeys(text for text in texts if text))
        if not usable:
            self.odd(NO_ANSWER_KEPT if one.kind == "locality" else NO_ANSWER)
            return Probe(edit_id, one.kind, prompt, None, one.tag) if one.kind == "locality" else None
        if "" in texts:
            self.odd(LATER_ANSWER_EMPTY if texts[0] else FIRST_ANSWER_EMPTY)
        return Probe(edit_id, one.kind, prompt, usable[0], one.tag, tuple(usable[1:]))
