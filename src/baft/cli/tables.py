"""Results as tables and lines of text."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from baft.cli.terminal import safe
from baft.report import REFIT_HEADER, inseparable_lines, refit_cells
from baft.types import replaced

if TYPE_CHECKING:
    from baft.artifact import EditSet
    from baft.report import AppliedEdit, EditReport, TokenGates

OPEN = 0.1  # above this weight a basis is shown as open
_GATE_CHARS, _TOKEN_CHARS = 14, 24

_Column = tuple[int, str | None]  # layer, edit


def table(header: Sequence[str], rows: Iterable[Sequence[str | Text]], *, right: Sequence[str] = ()) -> Table:
    """Aligned columns; long cells are folded into the width of the terminal."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in header:
        made.add_column(name, overflow="fold", justify="right" if name in right else "left")
    for row in rows:
        made.add_row(*(Text(safe(cell)) if isinstance(cell, str) else cell for cell in row))
    return made


def verdict(good: bool, bad: str = "FAILED") -> Text:
    """Whether an edit holds."""
    return Text("ok", style="green") if good else Text(bad, style="bold red")


def count(n: int, noun: str) -> str:
    """A count with its noun."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def report_view(reports: Sequence["EditReport"]) -> list[RenderableType]:
    """What calls of `edit` did: one table for all, then what else there is to know."""
    rows = [row for report in reports for row in report.rows]
    cells = [
        (
            row.prompt,
            row.before.strip(),
            row.after.strip(),
            f"{row.gate:.2f}",
            f"{row.margin:.1f}",
            verdict(row.decoded),
        )
        for row in rows
    ]
    last = reports[-1]
    steps = count(sum(one.n_steps for one in reports), "step")
    seconds_s = sum(one.seconds_s for one in reports)
    lines = [
        f"{count(len(rows), 'edit')} by {last.method}/{last.preset}: {steps}, {seconds_s:.1f} s",
        f"of {last.n_canaries} unrelated prompts {last.n_canaries_identical} are bit for bit as before, "
        f"{last.n_canaries_same_token} have the same next token",
    ]
    lines += [f"FAILED: {row.prompt!r} does not yield {row.target!r}" for row in rows if not row.decoded]
    broken = dict.fromkeys(prompt for report in reports for prompt in report.broken)
    if broken:
        lines.append(f"earlier edits no longer decoded: {', '.join(map(repr, broken))}")
    header = ("prompt", "before", "after", "gate", "margin", "")
    shown: list[RenderableType] = [table(header, cells, right=("gate", "margin")), "", *lines]
    if refits := [row for report in reports for row in report.refit]:
        shown += ["", table(REFIT_HEADER, refit_cells(refits)), *inseparable_lines(refits)]
    return shown


def stored_view(title: str, saved: "EditSet") -> list[RenderableType]:
    """What is in an artifact."""
    gone = replaced(saved.requests)
    cells = [
        (
            str(n),
            str(one.request + 1),
            one.edit.prompt,
            one.edit.target,
            "replaced" if one.edit.id in gone else verdict(one.decoded),
        )
        for n, one in enumerate(saved.edits, start=1)
    ]
    host = saved.host
    source = f", from {saved.host_source}" if saved.host_source not in ("", host.name) else ""
    layers = ", ".join(map(str, saved.layers))
    return [
        title,
        f"host: {host.name} ({host.architecture}, {host.dtype}{source})",
        f"method: {saved.method}/{saved.preset}, seed {saved.seed}, layers {layers or 'none'}",
        "",
        table(("edit", "request", "prompt", "target", ""), cells, right=("edit", "request")),
    ]


def gates_view(
    gates: Sequence["TokenGates"], edits: Sequence["AppliedEdit"], width: int
) -> list[RenderableType]:
    """The gates as a table of tokens by layer and edit: the columns that open most, as many as fit."""
    by_column: dict[_Column, dict[int, TokenGates]] = {}
    for one in gates:
        by_column.setdefault((one.layer, one.edit_id), {})[one.position] = one
    strength = {
        column: max(max(one.weights) for one in cells.values()) for column, cells in by_column.items()
    }
    ranked = sorted(by_column, key=lambda column: -strength[column])
    shown, hidden = ranked[: (n := max(1, (width - _TOKEN_CHARS) // _GATE_CHARS))], ranked[n:]
    numbers: dict[str | None, int] = {one.edit.id: n for n, one in enumerate(edits, start=1)}
    shown.sort(key=lambda column: (numbers.get(column[1], 0), column[0]))
    names = [f"layer {layer}\n{_owner(edit_id, numbers)}" for layer, edit_id in shown]
    tokens = {one.position: one for one in gates}
    rows = [
        (
            repr(tokens[place].token),
            "reply" if tokens[place].is_output else "prompt",
            *(_cell(by_column[column].get(place)) for column in shown),
        )
        for place in sorted(tokens)
    ]
    n_bases = len(gates[0].weights)
    legend = [f"largest weight, and how many of {n_bases} bases are open (above {OPEN}); · is all shut"]
    legend += [
        f"edit {numbers[edit_id]}: {edits[numbers[edit_id] - 1].edit.prompt!r} -> "
        f"{edits[numbers[edit_id] - 1].edit.target!r}"
        for edit_id in dict.fromkeys(edit_id for _, edit_id in shown)
        if edit_id in numbers
    ]
    if hidden:
        most = strength[hidden[0]]
        legend.append(f"{count(len(hidden), 'column')} not shown, with weights up to {most:.2f} (see --json)")
    return [table(("token", "part", *names), rows, right=names), "", *legend]


def _owner(edit_id: str | None, numbers: dict[str | None, int]) -> str:
    return "all edits" if edit_id is None else f"edit {numbers[edit_id]}"


def _cell(gates: "TokenGates | None") -> str:
    if gates is None or not any(gates.weights):
        return "·"
    return f"{max(gates.weights):.2f} {sum(weight > OPEN for weight in gates.weights):3d}"
