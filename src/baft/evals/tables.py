"""The tables of a report."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from baft.evals.collect import UNEDITED, Group, Results, Run
from baft.evals.differences import FAMILIES, PRIMARY, Compared, best, known
from baft.evals.experiment import is_rendering
from baft.evals.metrics import METRICS, metric
from baft.evals.numbers import (
    NOTHING,
    between,
    detectable_text,
    number,
    p_text,
    score_cell,
    signed,
)
from baft.evals.page import Cell, Table
from baft.evals.records import Row
from baft.evals.stats import UNBOUNDED, Scores, mean_interval

Arena = tuple[str, str]

_POSITIVE = (0.0, UNBOUNDED[1])


# --- what was run ---


def about(results: Results) -> Table:
    """What each run was: host, cases, methods, seeds, versions, machine."""
    facts: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "host": lambda one: str(one["host"].get("label")),
        "weights": lambda one: str(one["host"].get("weights")),
        "config": lambda one: str(one["host"].get("config")),
        "tokenizer": lambda one: str(one["host"].get("tokenizer")),
        "precision": lambda one: str(one["host"].get("dtype")),
        "benchmarks": lambda one: _joined(
            f"{name}: {found['n_cases']} cases, fingerprint {found['fingerprint']}"
            + "".join(
                f", beside them {other['n']} edits of {other['cases']}, fingerprint {other['fingerprint']}"
                for other in found.get("others", [])
            )
            + "".join(f", {what} left out {n}" for what, n in found.get("left_out", {}).items())
            for name, found in one["benchmarks"].items()
        ),
        "protocols": lambda one: _joined(
            found["kind"] if found["kind"] == "single" else f"{found['kind']}({found['size']})"
            for found in one["experiment"]["protocols"]
        ),
        "seeds": lambda one: _joined(map(str, one["experiment"]["seeds"])),
        "scorers": lambda one: _joined(one["experiment"].get("scorers", [])),
        "renderings": lambda one: _joined(one["experiment"].get("renderings", [])) or "none",
        "length of replies": lambda one: f"{one['experiment'].get('max_new_tokens')} tokens or more",
        "rows asked at once": lambda one: str(one["experiment"].get("batch_size")),
        "versions": lambda one: _joined(f"{name} {found}" for name, found in one["versions"].items()),
        "code": lambda one: str(one.get("git") or "not from a checkout"),
        "machine": lambda one: _joined(f"{name} {found}" for name, found in one["machine"].items()),
        "begun": lambda one: str(one["created"]),
    }
    rows = [[Cell("done"), *(Cell(progress(run)) for run in results.runs)]]
    rows += [
        [Cell(name), *(Cell(found(run.manifest)) for run in results.runs)] for name, found in facts.items()
    ]
    note = "A block is one method on one chunk of cases with one seed."
    return Table(("", *(run.name for run in results.runs)), rows, note=note, wide=True)


def settings(results: Results) -> Table:
    """The settings of every method."""
    rows = [
        [Cell(name), Cell(run.name), Cell(_plain(found))]
        for run in results.runs
        for name, found in run.manifest["settings"].items()
    ]
    return Table(("method", "run", "settings"), rows, wide=True)


def anomalies(results: Results) -> Table | None:
    """What was odd in the data and what was done about it."""
    found: dict[tuple[str, str], int] = {}
    for run in results.runs:
        for benchmark, facts in run.manifest["benchmarks"].items():
            found |= {(benchmark, what): n for what, n in facts.get("anomalies", {}).items()}
    rows = [[Cell(benchmark), Cell(what), Cell(str(n))] for (benchmark, what), n in found.items()]
    note = "Counted over the whole split, whatever part of it was run."
    return (
        Table(("benchmark", "what was odd: what was done", "how often"), rows, note=note, labels=2)
        if rows
        else None
    )


def glossary(results: Results) -> Table:
    """What the scores mean."""
    rows = [
        [Cell(name), Cell(METRICS[name].better), Cell(METRICS[name].summary)]
        for name in known(name for found in results.values.values() for name in found)
    ]
    return Table(("score", "better", "what it is"), rows, wide=True)


def progress(run: Run) -> str:
    """How much of a run is done."""
    text = f"{run.n_blocks} of {run.n_planned} blocks"
    if not run.is_finished:
        text += ": UNFINISHED, the tables hold what is there"
    return text + (f"; {run.n_unfinished} rows of blocks cut short left out" if run.n_unfinished else "")


def _joined(parts: Any) -> str:
    return ", ".join(str(part) for part in parts)


def _plain(value: Any) -> str:
    return (
        ", ".join(f"{name} = {json.dumps(found, ensure_ascii=False)}" for name, found in value.items())
        or "none"
    )


# --- scores ---


def main_tables(results: Results, arena: Arena, families: Mapping[str, Sequence[Compared]]) -> list[Table]:
    """One table for each way of asking: a row a method and stage, a column a score.

    Args:
        results: The results.
        arena: Benchmark and protocol.
        families: By stage: all pairs of methods, for marking the best.
    """
    groups = results.groups(*arena)
    tables = []
    for title, names in FAMILIES.items():
        columns = [name for name in names if any(results.scores(one, name) for one in groups)]
        if not columns:
            continue
        rows = []
        for group in groups:
            cells = [Cell(group.method), *_stage(group, groups), Cell(str(n_cases(results, group)))]
            for name in columns:
                family = families.get(group.stage, ())
                peers = [one for one in groups if one.stage == group.stage]
                mark = group.stage != "" and best(family, peers, name) == group
                cells.append(score_cell(results.scores(group, name), metric(name), best=mark))
            rows.append(cells)
        head = ("method", *(["stage"] if len(rows[0]) > len(columns) + 2 else []), "n", *columns)
        tables.append(
            Table(head, rows, title, _fewer(results, groups, columns), labels=len(head) - 1 - len(columns))
        )
    return tables


def other_scores(results: Results, arena: Arena) -> Table | None:
    """All scores that stand in no main table: a row a score and stage, a column a method."""
    shown = {name for names in FAMILIES.values() for name in names}
    groups = results.groups(*arena)
    names = known(name for group in groups for name in results.values[group] if name not in shown)
    methods = list(dict.fromkeys(group.method for group in groups))
    stages = [stage for stage in ("immediate", "final") if any(group.stage == stage for group in groups)]
    rows = []
    for name in names:
        for stage in stages:
            cells = [Cell(name), Cell(METRICS[name].better), Cell(stage)]
            for method in methods:
                group = Group(*arena, "" if method == UNEDITED else stage, method)
                cells.append(score_cell(results.scores(group, name), metric(name)))
            rows.append(cells)
    return Table(("score", "better", "stage", *methods), rows, labels=3) if rows else None


def tag_table(results: Results, arena: Arena) -> Table | None:
    """The main scores by tag, where a kind of probe has several tags or a harder rendering.

    A row is a score and tag, a column a method.
    """
    host = [one for one in results.groups(*arena) if not one.stage]
    groups = [*host, *results.last(*arena)]
    rows = []
    for name in PRIMARY:
        tags = list(dict.fromkeys(tag for group in groups for tag in results.tags(group, name)))
        if len(tags) < 2 and not any(map(is_rendering, tags)):
            continue
        for tag in tags:
            scores = [results.scores(group, name, tag) for group in groups]
            n = max(len({case for case, _ in found}) for found in scores)
            cells = [score_cell(found, metric(name)) for found in scores]
            rows.append([Cell(name), Cell(tag or NOTHING), Cell(str(n)), *cells])
    header = ("score", "tag", "n", *(group.method for group in groups))
    return Table(header, rows, labels=2) if rows else None


def difference_table(family: Sequence[Compared], title: str = "") -> Table:
    """Every pair of methods on every main score."""
    rows = []
    for one in family:
        pair = Cell(f"{one.a.method} − {one.b.method}")
        if one.difference is None:
            rows.append([Cell(one.metric), pair, *[Cell(NOTHING)] * 3, Cell("not comparable"), Cell("")])
            continue
        bounds, winner = metric(one.metric).bounds, one.winner
        found = one.difference
        rows.append(
            [
                Cell(one.metric),
                pair,
                Cell(str(found.n_edits)),
                Cell(signed(found.estimate, bounds), ends(one)),
                Cell(p_text(found.p_adjusted)),
                Cell(f"{winner.method} better" if winner else "undecided", best=winner is not None),
                Cell(detectable_text(found, bounds)),
            ]
        )
    header = ("score", "difference", "n", "mean", "p (Holm)", "verdict", "detectable")
    note = (
        f"{len(rows)} comparisons, corrected together. Detectable: the difference that would have been found "
        "with a chance of 0.8; where it is large, undecided says little."
    )
    return Table(header, rows, title, note, labels=2)


def ends(one: Compared) -> str:
    """The interval of a difference."""
    assert one.difference is not None
    bounds = metric(one.metric).bounds
    low, high = (signed(value, bounds) for value in (one.difference.low, one.difference.high))
    return f"[{low}, {high}]"


def _stage(group: Group, groups: Sequence[Group]) -> list[Cell]:
    final = any(one.stage == "final" for one in groups)
    return [Cell(group.stage or NOTHING)] if final else []


def n_cases(results: Results, group: Group) -> int:
    """How many cases a group has."""
    found = results.positions.get(group)
    if found is None:  # the unedited host
        found = {key: 0 for name in results.values[group] for key in results.scores(group, name)}
    return len({case for case, _ in found})


def _fewer(results: Results, groups: Sequence[Group], names: Sequence[str]) -> str:
    """Which columns rest on fewer cases than the column n says."""
    found = []
    for name in names:
        counts = {
            len({case for case, _ in scores}) for group in groups if (scores := results.scores(group, name))
        }
        if counts and max(counts) < max(n_cases(results, group) for group in groups):
            found.append(f"{name} rests on {max(counts)}")
    return f"Not every case has every kind of probe: {', '.join(found)}." if found else ""


# --- how it went ---


def edits_table(results: Results, arena: Arena) -> Table:
    """How making the edits went: failures, what held in training, skipped probes, seconds."""
    of_groups = {group: list(results.rows_of(group)) for group in results.last(*arena)}
    with_cost = any("peak_bytes" in row for found in of_groups.values() for row in found)
    rows = []
    for group, found in of_groups.items():
        failed = [row for row in found if row["error"] is not None]
        times: dict[str, list[float]] = {}
        for row in found:
            times.setdefault(row["case"], []).append(row["seconds_s"])
        seconds = mean_interval(times, bounds=_POSITIVE)
        probes = [probe for row in found for probe in row["probes"]]
        n_skipped = sum("skipped" in probe for probe in probes)
        rows.append(
            [
                Cell(group.method),
                Cell(str(len(found))),
                Cell(str(len(failed)), f"of {len(found)}" if failed else ""),
                Cell(str(sum(bool(row["decoded"]) for row in found))),
                Cell(str(n_skipped), f"of {len(probes)}" if n_skipped else ""),
                Cell(number(seconds.estimate, _POSITIVE), between(seconds.low, seconds.high, _POSITIVE)),
                Cell(number(statistics.median(row["seconds_s"] for row in found), _POSITIVE)),
                Cell(f"{statistics.fmean(row['n_steps'] for row in found):.1f}"),
                *(_cost_cells([row for row in found if "peak_bytes" in row]) if with_cost else ()),
            ]
        )
    header = (
        "method",
        "edits made",
        "failed",
        "decoded after training",
        "probes skipped",
        "seconds an edit",
        "median",
        "steps an edit",
        *(("peak memory, MB", "kept an edit, kB") if with_cost else ()),
    )
    note = (
        "A failed edit changed nothing and is scored like any other, on the model as it stood. A skipped "
        "probe has no scores. An edit that was made with several seeds counts once for each. Edits that were "
        "made in one batch (single ones, and where nothing is asked in between those that do not know each "
        "other) have a share each of the seconds that it took."
    )
    if with_cost:
        note += (
            " Peak memory is the median rise above what was in use before an edit, or a batch of them, was "
            "made; kept is what an artifact holds for each edit in force, without earlier states for undo."
        )
    return Table(header, rows, note=note)


def _cost_cells(rows: Sequence[Row]) -> list[Cell]:
    """Peak memory and room in an artifact, of rows that have them; blank without any."""
    if not rows:
        return [Cell(""), Cell("")]
    peak = statistics.median(row["peak_bytes"] for row in rows)
    return [Cell(f"{peak / 1e6:.0f}"), Cell(f"{rows[-1]['stored_bytes'] / 1e3:.1f}")]


def failure_table(results: Results, arena: Arena) -> Table | None:
    """What failed edits said, asked or not, and why probes were skipped or replies not doubted."""
    rows = []
    for group in results.last(*arena):
        found = list(results.rows_of(group))
        errors = Counter(row["error"] for row in found if row["error"] is not None)
        skipped = Counter(probe["skipped"] for row in found for probe in row["probes"] if "skipped" in probe)
        calm = Counter(probe["undoubted"] for row in found for probe in row["probes"] if "undoubted" in probe)
        others = Counter[str]()
        for row in found:
            others.update(row.get("others_failed", {}))
        told = {
            "edit failed": errors,
            "other edit failed": others,
            "probe skipped": skipped,
            "reply not doubted": calm,
        }
        for what, counts in told.items():
            for said, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
                rows.append([Cell(group.method), Cell(what), Cell(str(n)), Cell(said)])
    return Table(("method", "what", "how often", "why"), rows, wide=True) if rows else None


_FIRES = {
    "tokens where a gate opens": ("n_fired", False),
    "tokens that changed": ("n_changed", False),
    "texts where a gate opens": ("n_fired", True),
    "texts that changed": ("n_changed", True),
}


def fires_table(results: Results, arena: Arena) -> Table | None:
    """Changes in ordinary text after each chunk of edits."""
    rows = []
    for group in results.last(*arena):
        found = [row for row in results.rows_of(group) if "false_fires" in row]
        if not found:
            continue
        fires = [row["false_fires"] for row in found]
        n_tokens = sum(sum(one["n_tokens"]) for one in fires)
        cells = [Cell(group.method), Cell(str(len(found))), Cell(str(n_tokens))]
        for field, any_token in _FIRES.values():
            if not all(field in one for one in fires):
                cells.append(Cell(NOTHING))
                continue
            interval = mean_interval(_fires_by_chunk(found, field, any_token))
            cells.append(
                Cell(number(interval.estimate), between(interval.low, interval.high), interval.estimate)
            )
        rows.append([*cells, *_perplexity(found)])
    note = (
        "Held-out text, the same for every chunk. The intervals take chunks of edits as independent, and say "
        "nothing of other texts. A token may change because of a gate that opened before it. The last two "
        "columns are of whole texts, the others of their first 100 tokens."
    )
    header = ("method", "chunks", "tokens", *_FIRES, "host's perplexity", "perplexity_ratio")
    return Table(header, rows, note=note) if rows else None


def _fires_by_chunk(rows: Sequence[Row], field: str, any_token: bool) -> Scores:
    """The share of each chunk's tokens or texts. A single edit is one chunk for all seeds."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        fires = row["false_fires"]
        if any_token:
            share = sum(n > 0 for n in fires[field]) / len(fires[field])
        else:
            share = sum(fires[field]) / sum(fires["n_tokens"])
        scores.setdefault(_chunk(row), []).append(share)
    return scores


def _perplexity(rows: Sequence[Row]) -> list[Cell]:
    """The host's perplexity, and how many times that of the host the edited model's is."""
    taken = [row for row in rows if "perplexity" in row]
    if len(taken) < len(rows):  # recorded by an earlier version
        return [Cell(NOTHING), Cell(NOTHING)]
    ratios: dict[tuple[str, int], list[float]] = {}
    for row in taken:
        loss = row["perplexity"]
        rise = (math.fsum(loss["after"]) - math.fsum(loss["before"])) / sum(loss["n_tokens"])
        ratios.setdefault((_chunk(row), 0), []).append(math.exp(rise) if rise < 700 else math.inf)
    loss = taken[0]["perplexity"]
    before = math.exp(math.fsum(loss["before"]) / sum(loss["n_tokens"]))
    return [Cell(number(before, _POSITIVE)), score_cell(ratios, metric("perplexity_ratio"))]


def _chunk(row: Row) -> str:
    """The name of a row's chunk; a single edit is one for all seeds."""
    return str(row["case"]) if row["protocol"] == "single" else f"{row['seed']}:{row['chunk']}"
