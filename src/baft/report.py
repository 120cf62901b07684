"""What an edit did, as data and as a table of plain text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from baft.types import Edit

_CELL_CHARS = 46


@dataclass(frozen=True, slots=True)
class AppliedEdit:
    """An edit in force.

    Args:
        edit: The edit.
        decoded: Whether its target was decoded when it was made; if not, it failed.
        request: Which call of `edit` made it, counted from 0; `undo` takes back whole calls.
        replaced: Whether a later edit has taken its place; it comes back when that is taken back.
    """

    edit: Edit
    decoded: bool
    request: int
    replaced: bool = False


@dataclass(frozen=True, slots=True)
class TokenGates:
    """The gates at one token, for one layer and edit.

    Args:
        token: The token as text.
        position: Its index in the sequence.
        is_output: Whether it belongs to the reply.
        layer: Decoder block.
        edit_id: The edit that owns the bases, or None where all edits share them.
        weights: `w_k(h)` of every basis, in [0, 1].
    """

    token: str
    position: int
    is_output: bool
    layer: int
    edit_id: str | None
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class EditRow:
    """One edit of a report.

    Args:
        edit_id: Its id.
        prompt: What was asked.
        target: What shall be said.
        before: What the model said before, greedily.
        after: What it says now.
        decoded: Whether the target, and its end where that is trained, led in every rendering that was
            trained on, and is what the model then said; if not, the edit has failed and is marked so.
        margin: Smallest lead of any target token over the best other token, in nats; negative if failed.
        gate: Largest basis weight over layers and bases, averaged over the edited tokens of its text.
    """

    edit_id: str
    prompt: str
    target: str
    before: str
    after: str
    decoded: bool
    margin: float
    gate: float


@dataclass(frozen=True, slots=True)
class ConflictRow:
    """An edit in force that a new one conflicts with: prompts could be about both, and they differ.

    Args:
        edit_id: The new edit.
        old_id: The other.
        prompt: What the other was asked.
        target: What it says.
        replaced: Whether it was replaced; else both are in force.
    """

    edit_id: str
    old_id: str
    prompt: str
    target: str
    replaced: bool


@dataclass(frozen=True, slots=True)
class RefitRow:
    """One edit of those that were fitted to each other, before and after.

    Every wording of an edit, its prompt and its rephrasings, is asked raw, and in the chat template where the
    host has one; these askings are counted.

    Args:
        edit_id: Its id now.
        old_id: Its id before; the same if it fired on no other's wording, or could not be kept from them, and
            so stayed as it was.
        prompt: What is asked.
        target: What shall be said.
        n_own: Askings of its own wordings.
        own: On how many of these it acts, before and after.
        n_others: Askings of the others' wordings, of those with another target.
        others: On how many of these it would act were it the only edit, before and after.
        decoded: Whether its target is what the model says to its prompt, before and after.
        inseparable: Wordings of others that its scope cannot tell from its own; it still fires on them.
    """

    edit_id: str
    old_id: str
    prompt: str
    target: str
    n_own: int
    own: tuple[int, int]
    n_others: int
    others: tuple[int, int]
    decoded: tuple[bool, bool]
    inseparable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EditReport:
    """What one call of `Model.edit`, `Model.edit_many` or `Model.refit` did.

    Args:
        method: The method.
        preset: Its preset.
        rows: One for each edit.
        n_steps: Optimizer steps; of edits trained apart, the most that one of them took.
        stopped: Why training stopped; of edits trained apart, all the reasons.
        loss: Last value of the loss, in nats, the mean of edits trained apart; None for a method that
            minimizes none.
        seconds_s: Wall time, report included.
        n_canaries: Unrelated prompts that were watched.
        n_canaries_identical: How many of them have next-token logits that are bit for bit the host's.
        n_canaries_same_token: How many of them have the same next token.
        broken: Earlier edits whose target is no longer decoded.
        why_full: Why every step of training ran the whole host, or None if it did not have to.
        notes: What else is to be known of how the method works on this host.
        conflicts: Edits in force that the new ones conflict with.
        refit: Of a refit, one for each edit that took part, those included that stayed as they were.
    """

    method: str
    preset: str
    rows: tuple[EditRow, ...]
    n_steps: int
    stopped: str
    loss: float | None
    seconds_s: float
    n_canaries: int
    n_canaries_identical: int
    n_canaries_same_token: int
    broken: tuple[str, ...]
    why_full: str | None = None
    notes: tuple[str, ...] = ()
    conflicts: tuple[ConflictRow, ...] = ()
    refit: tuple[RefitRow, ...] = ()

    @property
    def succeeded(self) -> bool:
        """Whether every edit of the call is decoded."""
        return all(row.decoded for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return {**asdict(self), "succeeded": self.succeeded}

    def __str__(self) -> str:
        """The report as a table."""
        header = ("prompt", "before", "after", "gate", "margin", "")
        cells = [
            (row.prompt, row.before, row.after, f"{row.gate:.2f}", f"{row.margin:.1f}", _verdict(row))
            for row in self.rows
        ]
        lines = [table(header, cells), ""]
        plural = "s" if len(self.rows) > 1 else ""
        loss = "" if self.loss is None else f", loss {self.loss:.3f}"
        lines.append(
            f"{len(self.rows)} edit{plural} by {self.method}/{self.preset}: {self.n_steps} steps{loss}, "
            f"stopped at {self.stopped}, {self.seconds_s:.1f} s"
        )
        lines.append(
            f"of {self.n_canaries} unrelated prompts {self.n_canaries_identical} are bit for bit the host's, "
            f"{self.n_canaries_same_token} have its next token"
        )
        if self.why_full is not None:
            lines.append(f"every step ran the whole host: {self.why_full}")
        lines += [f"note: {note}" for note in self.notes]
        lines += dict.fromkeys(
            f"conflict with {one.prompt!r} -> {one.target!r}: "
            + ("replaced" if one.replaced else "both are kept")
            for one in self.conflicts
        )
        lines += [
            f"FAILED: {row.prompt!r} does not yield {row.target!r}" for row in self.rows if not row.decoded
        ]
        if self.broken:
            lines.append(f"earlier edits no longer decoded: {', '.join(map(repr, self.broken))}")
        if self.refit:
            lines += ["", table(REFIT_HEADER, refit_cells(self.refit)), *inseparable_lines(self.refit)]
        return "\n".join(lines)


REFIT_HEADER = ("refit", "acts on its own", "fires on others'", "decoded")


def refit_cells(rows: Sequence[RefitRow]) -> list[tuple[str, ...]]:
    """What a refit did to each edit, before and after, under `REFIT_HEADER`."""
    return [
        (
            f"{row.prompt} -> {row.target}",
            f"{row.own[0]} to {row.own[1]} of {row.n_own}",
            f"{row.others[0]} to {row.others[1]} of {row.n_others}",
            " to ".join("yes" if one else "no" for one in row.decoded),
        )
        for row in rows
    ]


def inseparable_lines(rows: Sequence[RefitRow]) -> list[str]:
    """What a refit could not tell apart."""
    return [
        f"NOT TOLD APART: {row.prompt!r} -> {row.target!r} still fires on {other!r}"
        for row in rows
        for other in row.inseparable
    ]


def _verdict(row: EditRow) -> str:
    return "ok" if row.decoded else "FAILED"


def clip(text: str, n_chars: int = _CELL_CHARS) -> str:
    """One line of at most `n_chars` characters."""
    line = " ".join(text.split())
    return line if len(line) <= n_chars else line[: n_chars - 1] + "…"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under a ruled header, cells clipped to a line."""
    cells = [[clip(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    rule = "  ".join("─" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])
