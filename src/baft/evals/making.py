"""Making the edits of cases, and noting how it went and what it took."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from baft.errors import EditError, InputError
from baft.evals.cost import peak_above, stored_bytes
from baft.evals.records import Row
from baft.methods.base import Apart, Capability, Editor, EditOutcome, StackedEditor
from baft.types import EditCase, EditRequest

T = TypeVar("T")

_MADE_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class Cost:
    """What edits took beside time.

    Args:
        peak_bytes: How far memory rose above what was in use before, while they were made together.
        stored_bytes: What an artifact keeps of all edits in force, for each of them; not what undo goes back
            to.
    """

    peak_bytes: int
    stored_bytes: float


@dataclass(frozen=True, slots=True)
class Made:
    """How making an edit, or a batch of them, went.

    Args:
        ids: The edits.
        outcome: How it went, or None where it failed.
        error: Why it failed, or None.
        seconds_s: Wall time of all of them together.
        cost: What else it took, where that was asked for.
    """

    ids: tuple[str, ...]
    outcome: EditOutcome | None
    error: str | None
    seconds_s: float
    cost: Cost | None = None

    def as_row(self, case: EditCase) -> Row:
        """What of it belongs into the row of a case."""
        if self.outcome is None:
            return {"decoded": False, "error": self.error, "n_steps": 0, "seconds_s": self.seconds_s}
        place = self.ids.index(case.edit.id)
        row: Row = {
            "decoded": self.outcome.decoded[place],
            "error": None,
            "n_steps": self.outcome.n_steps,
            "seconds_s": self.seconds_s / len(self.ids),
        }
        if self.cost is not None:
            row |= {"peak_bytes": self.cost.peak_bytes, "stored_bytes": self.cost.stored_bytes}
        return row


def make(editor: Editor, cases: Sequence[EditCase], *, with_cost: bool = False) -> Made:
    """Makes edits; one that cannot be made is noted, and scored like any other on the model as it stands.

    Cases may ask different questions about one and the same edit, which is then made once.
    """
    edits = tuple(dict.fromkeys(case.edit for case in cases))
    ids = tuple(edit.id for edit in edits)

    def work() -> Made:
        began = time.perf_counter()
        try:
            outcome = editor.apply(EditRequest(edits))
        except (EditError, InputError) as error:
            return Made(ids, None, f"{type(error).__name__}: {error}", time.perf_counter() - began)
        return Made(ids, outcome, None, time.perf_counter() - began)

    if not with_cost:
        return work()
    made, peak = _with_peak(editor, work)
    n_edits = sum(len(request.edits) for request in editor.requests)
    return replace(made, cost=Cost(peak, stored_bytes(editor) / n_edits if n_edits else 0.0))


def make_apart(
    editor: StackedEditor, cases: Sequence[EditCase], *, with_cost: bool = False
) -> tuple[Apart, list[Made]]:
    """Makes the edit of each case by itself, all in one batch; the peak of memory is that of the batch.

    Raises:
        EditError: If one of them breaks down.
        InputError: If a prompt or target does not fit the host.
    """

    def work() -> Apart:
        return editor.apart([EditRequest((case.edit,)) for case in cases])

    apart, peak = _with_peak(editor, work) if with_cost else (work(), 0)
    made = []
    for i, (case, outcome) in enumerate(zip(cases, apart.outcomes, strict=True)):
        if isinstance(outcome, EditError):
            raise outcome
        cost = None
        if with_cost:
            cost = Cost(peak, float(apart.n_bytes(i)))
        made.append(Made((case.edit.id,), outcome, None, outcome.seconds_s, cost))
    return apart, made


def make_many(editor: Editor, cases: Sequence[EditCase], *, with_cost: bool = False) -> list[Made]:
    """Makes the edit of each case, all in force together; many at once where edits do not know each other."""
    if not isinstance(editor, StackedEditor) or Capability.INDEPENDENT not in editor.capabilities:
        return [make(editor, [case], with_cost=with_cost) for case in cases]
    made: list[Made] = []
    for start in range(0, len(cases), _MADE_AT_ONCE):
        began = time.perf_counter()
        found = _at_once(editor, cases[start : start + _MADE_AT_ONCE], with_cost)
        share = (time.perf_counter() - began) / len(found)  # of what failed and was tried again, too
        made += [replace(one, seconds_s=share) for one in found]
    return made


def _at_once(editor: StackedEditor, cases: Sequence[EditCase], with_cost: bool) -> list[Made]:
    if len(cases) == 1:
        return [make(editor, cases, with_cost=with_cost)]

    def work() -> tuple[EditOutcome, ...]:
        return editor.apply_apart([EditRequest((case.edit,)) for case in cases])

    try:
        outcomes, peak = _with_peak(editor, work) if with_cost else (work(), 0)
    except (EditError, InputError):  # of one, and nobody says which
        half = len(cases) // 2
        return _at_once(editor, cases[:half], with_cost) + _at_once(editor, cases[half:], with_cost)
    cost = Cost(peak, stored_bytes(editor) / len(editor.requests)) if with_cost else None
    return [
        Made((case.edit.id,), outcome, None, outcome.seconds_s, cost)
        for case, outcome in zip(cases, outcomes, strict=True)
    ]


def _with_peak(editor: Editor, work: Callable[[], T]) -> tuple[T, int]:
    found: list[T] = []
    peak = peak_above(lambda: found.append(work()), editor.host.model.device)
    return found[0], peak.above
