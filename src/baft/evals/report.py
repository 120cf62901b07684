"""Reports of runs: a page and Markdown, a summary for the terminal, two methods against each other.

The figures are those of `stats`; which scores are compared, and how that is corrected, stands in
`differences`.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from baft.errors import ConfigError, DataError
from baft.evals import tables
from baft.evals.collect import Group, Results, Run, collect, read_run, require_comparable
from baft.evals.differences import FAMILIES, PRIMARY, Compared, all_pairs, compared, corrected
from baft.evals.metrics import metric
from baft.evals.numbers import NOTHING, counted, detectable_text, number, p_text, score_cell, signed
from baft.evals.page import Document, Fold, Part, Section, to_html, to_markdown
from baft.evals.worst import worst_part
from baft.registry import unknown_name

if TYPE_CHECKING:
    from baft.evals.plots import Painter

Rows = list[tuple[str, ...]]

MARKDOWN, HTML = "report.md", "report.html"
SUMMARIZED = ("Teacher-forced", "Generated")

_HOW = (
    "The unit is the edit: its probes are averaged first, then the edits. The intervals are at 95 %. A score "
    "is marked as the best of its stage only where paired tests on the same cases, corrected by Holm over "
    "all comparisons of the stage, find the method better than every other one. Teacher-forced scores give "
    "the model the target's own tokens; generated ones ask what it says by itself. They do not mix."
)


def write_report(runs: Sequence[Path], out: Path) -> list[Path]:
    """Writes `report.md` and `report.html` about runs on one host, each whole or not at all.

    The same records give the same bytes.

    Raises:
        ConfigError: If there is no run, one has no finished rows, or they cannot stand in one table.
        DataError: If a record cannot be read, or the disk refuses.
    """
    document = _document(collect(runs))
    written = []
    for name, text in ((MARKDOWN, to_markdown(document)), (HTML, to_html(document))):
        _write(out / name, text)
        written.append(out / name)
    return written


def summary_rows(runs: Sequence[Path]) -> tuple[tuple[str, ...], Rows]:
    """The main scores of all methods, for a terminal: a header, and rows.

    Raises:
        ConfigError: As for `write_report`.
        DataError: If a record cannot be read.
    """
    results = collect(runs)
    names = [name for family in SUMMARIZED for name in FAMILIES[family]]
    names = [name for name in names if any(name in found for found in results.values.values())]
    rows = []
    for arena in results.arenas:
        for group in results.groups(*arena):
            cells = [score_cell(results.scores(group, name), metric(name)) for name in names]
            scored = [f"{cell.text} {cell.aside}".strip() for cell in cells]
            n = str(tables.n_cases(results, group))
            rows.append((*arena, group.stage or NOTHING, group.method, n, *scored))
    return ("benchmark", "protocol", "stage", "method", "n", *names), rows


def comparison_rows(a: tuple[Path, str | None], b: tuple[Path, str | None]) -> tuple[tuple[str, ...], Rows]:
    """Two methods against each other, score by score, on the cases that both have: a header, and rows.

    The correction is over the scores of one benchmark, protocol and stage. A method need not be named where
    a run holds one alone.

    Raises:
        ConfigError: If a run has no finished rows, the runs asked other questions or another host, a method
            is not named where there are several, the two are one and the same, or they share no case.
        UnknownNameError: If a run has no method of that name; suggests the nearest one.
        DataError: If a record cannot be read.
    """
    runs = [read_run(folder) for folder, _ in (a, b)]
    methods = [_method(run, named) for run, (_, named) in zip(runs, (a, b), strict=True)]
    same = runs[0].folder.resolve() == runs[1].folder.resolve()
    if same and methods[0] == methods[1]:
        raise ConfigError(f"both sides are {methods[0]} of {a[0]}: name two methods, or two runs")
    require_comparable(*runs)
    first, second = (collect([run.folder]) for run in runs)
    found: list[Compared] = []
    for one in (group for arena in first.arenas for group in first.groups(*arena)):
        other = Group(one.benchmark, one.protocol, one.stage, methods[1])
        if one.method == methods[0]:
            found += corrected(_on_all_scores(first, one, second, other))
    if not any(one.difference for one in found):
        raise ConfigError(
            f"{methods[0]} of {a[0]} and {methods[1]} of {b[0]} have no case with the same benchmark, "
            "protocol and seed in common: run both on the same cases"
        )
    header = (
        "benchmark",
        "protocol",
        "stage",
        "score",
        "n",
        "A",
        "B",
        "A − B",
        "p (Holm)",
        "verdict",
        "detectable",
    )
    return header, [_compared_row(one) for one in found]


def _on_all_scores(first: Results, a: Group, second: Results, b: Group) -> list[Compared]:
    both = [(name, first.scores(a, name), second.scores(b, name)) for name in PRIMARY]
    return [compared(a, b, name, in_a, in_b) for name, in_a, in_b in both if in_a and in_b]


def _compared_row(one: Compared) -> tuple[str, ...]:
    bounds, found = metric(one.metric).bounds, one.difference
    start = (one.a.benchmark, one.a.protocol, one.a.stage, one.metric)
    unpaired = {"only A": one.n_only_a, "only B": one.n_only_b}
    beside = f" ({counted(unpaired)})" if any(unpaired.values()) else ""
    if found is None:
        return (*start, f"0{beside}", *[NOTHING] * 4, "not comparable", "")
    return (
        *start,
        f"{found.n_edits}{beside}",
        number(one.mean_a, bounds),
        number(one.mean_b, bounds),
        f"{signed(found.estimate, bounds)} {tables.ends(one)}",
        p_text(found.p_adjusted),
        {"better": "A better", "worse": "B better"}.get(found.verdict, found.verdict),
        detectable_text(found, bounds),
    )


def _method(run: Run, named: str | None) -> str:
    if named is None:
        if len(run.methods) > 1:
            raise ConfigError(
                f"{run.folder} holds {len(run.methods)} methods: name one, as in "
                f"{run.folder}:{run.methods[0]}; there are {', '.join(run.methods)}"
            )
        return run.methods[0]
    if named not in run.methods:
        raise unknown_name(f"method of {run.folder}", named, run.methods)
    return named


# --- the document ---


def _document(results: Results) -> Document:
    from baft.evals.plots import Painter  # matplotlib takes a second to load

    painter = Painter(results)
    names = [run.manifest["experiment"]["name"] for run in results.runs]
    host = results.runs[0].manifest["host"]["label"]
    n_methods = len({method for run in results.runs for method in run.methods})
    seeds = {seed for run in results.runs for seed in run.manifest["experiment"]["seeds"]}
    subtitle = f"{host}; methods: {n_methods}, seeds: {len(seeds)}"
    unfinished = [f"{run.name}: {tables.progress(run)}." for run in results.runs if not run.is_finished]
    sections = [Section("How to read this", [_HOW, *unfinished])]
    sections += [Section(" · ".join(arena), _arena(results, arena, painter)) for arena in results.arenas]
    about: list[Part] = [tables.about(results), Fold("Settings of the methods", [tables.settings(results)])]
    odd = tables.anomalies(results)
    if odd:
        about.append(Section("Anomalies of the data", [odd], level=3))
    about.append(Section("What the scores mean", [Fold("All scores", [tables.glossary(results)])], level=3))
    sections.append(Section("What was run", about))
    return Document(", ".join(dict.fromkeys(names)), subtitle, sections)


def _arena(results: Results, arena: tuple[str, str], painter: "Painter") -> list[Part]:
    groups = [group for group in results.groups(*arena) if group.stage]
    families = {
        stage: all_pairs(results, [group for group in groups if group.stage == stage])
        for stage in dict.fromkeys(group.stage for group in groups)
    }
    last = results.last(*arena)
    parts: list[Part] = [*tables.main_tables(results, arena, families)]
    _add(parts, "Locality against the edit's own scores", [painter.scatter(arena)])
    _add(parts, "Retention", painter.retention(arena))
    compared_stages = [
        tables.difference_table(family, f"{stage} scores" if len(families) > 1 else "")
        for stage, family in reversed(families.items())
        if family
    ]
    _add(parts, "Paired differences", compared_stages)
    _add(parts, "By tag", [tables.tag_table(results, arena)])
    _add(parts, "Gates", [painter.gates(arena)])
    _add(parts, "Ordinary text", [tables.fires_table(results, arena)])
    _add(
        parts, "Making the edits", [tables.edits_table(results, arena), tables.failure_table(results, arena)]
    )
    _add(parts, "All other scores", [_folded("Show", tables.other_scores(results, arena))])
    _add(parts, "Worst cases", worst_part(results, last))
    return parts


def _folded(summary: str, part: Part | None) -> Part | None:
    return None if part is None else Fold(summary, [part])


def _add(parts: list[Part], title: str, found: Sequence[Part | None]) -> None:
    there = [one for one in found if one is not None]
    if there:
        parts.append(Section(title, there, level=3))


# --- the disk ---


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all; characters that no page may hold are replaced."""
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"{path}: the report could not be written: {error.strerror or error}. "
            "Choose another folder (--out)"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
