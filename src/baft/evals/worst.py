"""The cases that went worst, as text."""

import math
from collections.abc import Sequence

from baft.evals.collect import Group, Results
from baft.evals.numbers import NOTHING
from baft.evals.page import Cell, Fold, Part, Table
from baft.evals.records import Row

N_WORST = 10

_JUDGED = {
    "locality": ("argmax", "text", "text_chat"),
    "": ("teacher_forced", "generate", "generate_chat"),
}
_TEXT_CHARS = 400


def worst_cases(results: Results, group: Group, n: int = N_WORST) -> list[Row]:
    """The rows of a group with the lowest marks, the worst first; equal ones in the order of their cases."""
    rows = [row for row in results.rows_of(group) if mark(row) is not None]
    return sorted(rows, key=lambda row: (mark(row), row["case"], row["seed"]))[:n]


def mark(row: Row) -> float | None:
    """How well a case went: the mean over its kinds of probes of their main scores; None without any."""
    kinds: dict[str, list[float]] = {}
    for probe in row["probes"]:
        judged = _JUDGED.get(probe["kind"], _JUDGED[""])
        found = [probe["scores"][name] for name in judged if name in probe["scores"]]
        kinds.setdefault(probe["kind"], []).extend(found)
    means = [math.fsum(found) / len(found) for found in kinds.values() if found]
    return math.fsum(means) / len(means) if means else None


def worst_part(results: Results, groups: Sequence[Group]) -> list[Part]:
    """The ten worst cases of every method, folded away."""
    parts: list[Part] = []
    for group in groups:
        rows = worst_cases(results, group)
        if rows:
            title = f"{group.method}: the {len(rows)} worst of {sum(1 for _ in results.rows_of(group))}"
            parts.append(Fold(title, [_case(n, row) for n, row in enumerate(rows, start=1)]))
    return parts


def _case(number: int, row: Row) -> Table:
    edit = row["edit"]
    truth = f" (before: {edit['ground_truth']})" if edit.get("ground_truth") else ""
    title = f"{number}. {_short(edit['prompt'])} → {_short(edit['target'])}{truth}"
    said = [f"{row['case']}, seed {row['seed']}, mark {mark(row):.2f}"]
    if row["stage"] == "final":
        said.append(f"place {row['position'] + 1} of its chunk")
    if row["error"] is not None:
        said.append(f"the edit FAILED: {row['error']}")
    replies = [name for name in ("raw", "chat", "doubted") if any(name in probe for probe in row["probes"])]
    shown = "before → after"
    names = {"raw": shown, "chat": f"in a chat: {shown}", "doubted": f"doubted in the chat: {shown}"}
    rows = [
        [
            Cell(probe["kind"], probe["tag"] if probe["tag"] != "edit" else ""),
            Cell(_short(probe["prompt"])),
            Cell(NOTHING if probe["target"] is None else _short(probe["target"])),
            *(_reply(probe, name) for name in replies),
            Cell(_scored(probe)),
        ]
        for probe in row["probes"]
    ]
    header = ("probe", "prompt", "target", *(names[name] for name in replies), "scores")
    return Table(header, rows, title, "; ".join(said), wide=True)


def _reply(probe: Row, name: str) -> Cell:
    if name not in probe:
        return Cell(NOTHING)
    before, after = (_short(text) or "(nothing)" for text in probe[name])
    return Cell(f"{before} → {after}")


def _scored(probe: Row) -> str:
    if "skipped" in probe:
        return f"skipped: {probe['skipped']}"
    judged = _JUDGED.get(probe["kind"], _JUDGED[""])
    return ", ".join(f"{name} {probe['scores'][name]:.2f}" for name in judged if name in probe["scores"])


def _short(text: str) -> str:
    """A text in one line, its middle left out where it is long."""
    text = " ".join(text.split())
    if len(text) <= _TEXT_CHARS:
        return text
    half = _TEXT_CHARS // 2
    return f"{text[:half]} […] {text[-half:]}"
