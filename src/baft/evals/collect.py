"""From the rows of one or several runs to scores: by benchmark, protocol, stage, method, metric and tag."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from baft.errors import BaftError, ConfigError, DataError
from baft.evals.experiment import is_rendering
from baft.evals.metrics import METRICS, metric, sentiment_score
from baft.evals.records import MANIFEST, ROWS, Row, read_manifest, read_rows
from baft.evals.stats import Scores

UNEDITED = "unedited"
_MANIFEST = ("experiment", "settings", "host", "benchmarks", "versions", "machine", "created")
SENTIMENT_TAGS = ("same_sentiment", "other_sentiment")

Key = tuple[str, int]  # case, seed
Keyed = Mapping[Key, Sequence[float]]
_ByTag = dict[str, dict[Key, list[float]]]


@dataclass(frozen=True, order=True, slots=True)
class Group:
    """What one row of a table is about.

    Args:
        benchmark: The benchmark with its split.
        protocol: The protocol.
        stage: `immediate` or `final`; empty for the unedited host, which has no stages.
        method: The method, or `unedited`.
    """

    benchmark: str
    protocol: str
    stage: str
    method: str


@dataclass(frozen=True, slots=True)
class Run:
    """One record folder.

    Args:
        name: The folder's name.
        folder: The folder.
        manifest: What was run.
        rows: Its whole blocks, in the order of the file.
        n_unfinished: Rows of blocks that were cut short, left out.
    """

    name: str
    folder: Path
    manifest: Mapping[str, Any]
    rows: tuple[Row, ...]
    n_unfinished: int

    @property
    def methods(self) -> list[str]:
        """The methods that have rows, in the order of the experiment."""
        found = dict.fromkeys(row["method"] for row in self.rows)
        planned = [name for name in self.manifest["settings"] if name in found]
        return [*planned, *(name for name in found if name not in planned)]

    @property
    def n_blocks(self) -> int:
        """How many blocks are whole."""
        return len({(row["task"], row["method"]) for row in self.rows})

    @property
    def n_planned(self) -> int:
        """How many blocks the whole experiment has."""
        experiment = self.manifest["experiment"]
        chunks = sum(
            math.ceil(
                benchmark["n_cases"]
                / (
                    experiment.get("stack", 1)
                    if protocol["kind"] == "single"
                    else protocol.get("size", 1) - sum(one["n"] for one in benchmark.get("others", []))
                )
            )
            for benchmark in self.manifest["benchmarks"].values()
            for protocol in experiment["protocols"]
        )
        return int(chunks * len(experiment["seeds"]) * len(experiment["methods"]))

    @property
    def is_finished(self) -> bool:
        """Whether all of it is there."""
        return self.n_blocks >= self.n_planned


@dataclass(slots=True)
class Results:
    """All that tables and plots are made of.

    Args:
        runs: The runs.
        rows: The rows of all runs; a method that several runs hold is named with its run.
        values: By group, metric and tag: the values of each case and seed.
        positions: Where each case of a group stands in its chunk.
    """

    runs: tuple[Run, ...]
    rows: list[Row] = field(default_factory=list)
    values: dict[Group, dict[str, _ByTag]] = field(default_factory=dict)
    positions: dict[Group, dict[Key, int]] = field(default_factory=dict)

    def scores(self, group: Group, name: str, tag: str | None = None) -> dict[Key, list[float]]:
        """The values of one metric, of one tag or of all; empty where there are none.

        Probes that an experiment asked in a harder way are in no figure but that of their own tag: the others
        would depend on what else was asked.
        """
        by_tag = self.values.get(group, {}).get(name, {})
        found: dict[Key, list[float]] = {}
        for one in [one for one in by_tag if not is_rendering(one)] if tag is None else [tag]:
            for key, values in by_tag.get(one, {}).items():
                found.setdefault(key, []).extend(values)
        return found

    def tags(self, group: Group, name: str) -> list[str]:
        """The tags of one metric, in the order of the rows."""
        return list(self.values.get(group, {}).get(name, {}))

    @property
    def arenas(self) -> list[tuple[str, str]]:
        """The pairs of benchmark and protocol, in the order of the rows."""
        return list(dict.fromkeys((group.benchmark, group.protocol) for group in self.values))

    def groups(self, benchmark: str, protocol: str) -> list[Group]:
        """The groups of an arena: the unedited host, then each method with its stages."""
        found = [one for one in self.values if (one.benchmark, one.protocol) == (benchmark, protocol)]
        methods = list(dict.fromkeys(one.method for one in found))
        return sorted(
            found, key=lambda one: (one.stage != "", methods.index(one.method), one.stage == "final")
        )

    def last(self, benchmark: str, protocol: str) -> list[Group]:
        """The groups of the methods' last stage: final where edits follow each other, else immediate."""
        found = [one for one in self.groups(benchmark, protocol) if one.stage]
        stage = "final" if any(one.stage == "final" for one in found) else "immediate"
        return [one for one in found if one.stage == stage]

    def rows_of(self, group: Group) -> Iterator[Row]:
        """The rows of a group."""
        return (row for row in self.rows if group_of(row) == group)


def pool(keyed: Keyed) -> Scores:
    """Scores by case: the values of all seeds together."""
    pooled: dict[str, list[float]] = {}
    for (case, _), values in keyed.items():
        pooled.setdefault(case, []).extend(values)
    return pooled


def group_of(row: Row) -> Group:
    """The group of a row."""
    return Group(row["benchmark"], row["protocol"], row["stage"], row["method"])


def read_run(folder: Path) -> Run:
    """Reads a run; blocks that were cut short are left out.

    Raises:
        ConfigError: If the folder is no record of a run, or holds no whole block.
        DataError: If it cannot be read, or was written by another version.
    """
    manifest, rows = read_manifest(folder), read_rows(folder)
    missing = [name for name in _MANIFEST if name not in manifest]
    if missing:
        raise DataError(
            f"{folder / MANIFEST} does not say {missing[0]!r}: it is of another version; run again"
        )
    counts = Counter((row["task"], row["method"]) for row in rows)
    whole = tuple(row for row in rows if counts[row["task"], row["method"]] == row["of"])
    if not whole:
        raise ConfigError(
            f"{folder} holds no finished rows yet: let `baft bench` write there until a block is done"
        )
    return Run(folder.resolve().name, folder, manifest, whole, len(rows) - len(whole))


def collect(folders: Sequence[Path]) -> Results:
    """Reads runs and sorts their scores.

    Raises:
        ConfigError: If no run is given, one twice or one without rows, or runs cannot stand in one table.
        DataError: If a record cannot be read, or its methods saw different unedited hosts.
    """
    if not folders:
        raise ConfigError("no run given: name at least one folder that `baft bench` wrote")
    runs = tuple(read_run(folder) for folder in folders)
    places = [run.folder.resolve() for run in runs]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ConfigError(f"{twice} stands twice among the runs: name it once")
    for one, other in combinations(runs, 2):
        require_comparable(one, other)
    results = Results(runs)
    hosts = _Unedited(results)
    shared = Counter(method for run in runs for method in run.methods)
    for number, run in enumerate(runs):
        for row in run.rows:
            name = row["method"] if shared[row["method"]] == 1 else f"{row['method']} ({_called(run, runs)})"
            named = {**row, "method": name}
            try:
                _add(results, named)
                results.rows.append(named)
                hosts.add(number, named)
            except BaftError as error:
                raise DataError(
                    f"{run.folder / ROWS}, task {row['task']!r}, {row['method']}: {error}"
                ) from error
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                raise DataError(
                    f"{run.folder / ROWS}: a row of task {row['task']!r} is not what `baft bench` writes "
                    f"({type(error).__name__}: {error}): run the experiment again with this version"
                ) from error
    hosts.finish()
    return results


def _protocols(run: Run, benchmark: str) -> set[str]:
    return {row["protocol"] for row in run.rows if row["benchmark"] == benchmark}


def require_comparable(one: Run, other: Run) -> None:
    """Whether two runs asked the same of the same host.

    Raises:
        ConfigError: If their hosts differ, or a benchmark's cases, or the length of replies.
    """
    where = f"{one.folder} and {other.folder} cannot be compared"
    for part in ("weights", "config", "tokenizer", "dtype"):
        here, there = (run.manifest["host"].get(part) for run in (one, other))
        if here != there:
            label, label_there = (run.manifest["host"].get("label") for run in (one, other))
            raise ConfigError(
                f"{where}: their hosts differ in {part}, {here} ({label}) and {there} ({label_there}). "
                "Run both on the same host"
            )
    for name in one.manifest["benchmarks"].keys() & other.manifest["benchmarks"].keys():
        here, there = (run.manifest["benchmarks"][name]["fingerprint"] for run in (one, other))
        if here != there:
            raise ConfigError(
                f"{where}: the cases of {name} differ, fingerprints {here} and {there}. Run both on the same "
                "files"
            )
        here, there = (run.manifest["benchmarks"][name].get("others", []) for run in (one, other))
        if here != there and _protocols(one, name) & _protocols(other, name):
            raise ConfigError(
                f"{where}: other edits are in force beside the cases of {name}, {here} and {there}. Run both "
                "with the same"
            )
    here, there = (run.manifest["experiment"].get("max_new_tokens") for run in (one, other))
    if here != there:
        raise ConfigError(
            f"{where}: replies were cut at {here} and {there} tokens. Run both with the same max_new_tokens"
        )


def _called(run: Run, runs: Sequence[Run]) -> str:
    """The name of a run, or its folder where two have one name."""
    return run.name if sum(one.name == run.name for one in runs) == 1 else str(run.folder)


# --- sorting rows ---


def _add(results: Results, row: Row) -> None:
    if row["method"] == UNEDITED:
        raise ConfigError(f"a method is called {UNEDITED!r}, as the host without edits is: give it a label")
    group, key = group_of(row), (row["case"], row["seed"])
    by_metric = results.values.setdefault(group, {})
    if key in results.positions.setdefault(group, {}):
        raise DataError(f"case {row['case']!r} stands twice in the {row['stage']} stage")
    results.positions[group][key] = row["position"]
    _sort(by_metric, key, row["probes"], "scores", now=1)
    _sort_fluency(by_metric, key, row, now=1)


def _sort(by_metric: dict[str, _ByTag], key: Key, probes: Sequence[Row], part: str, *, now: int) -> None:
    """Adds the scores of a case: `part` of each probe, and log-probabilities before (0) or after (1)."""
    for probe in probes:
        for score, value in probe[part].items():
            name = f"{probe['kind']}@{score}"
            metric(name)
            by_tag = by_metric.setdefault(name, {}).setdefault(probe["tag"], {})
            by_tag.setdefault(key, []).append(float(value))
    score = _sentiment(probes, now)
    if score is not None:
        by_metric.setdefault("sentiment", {}).setdefault("", {})[key] = [score]


def _sort_fluency(by_metric: dict[str, _ByTag], key: Key, row: Row, *, now: int) -> None:
    """Adds the fluency after the edit's prompt, before (0) or after (1), where it was taken."""
    if "fluency" in row:
        by_metric.setdefault("fluency", {}).setdefault("", {})[key] = [float(row["fluency"][now])]


def _sentiment(probes: Sequence[Row], now: int) -> float | None:
    """ConvSent's score of a case, of the other replies about its topic; each reply weighs alike, for what is
    kept is the mean over its tokens. None where there are no replies of both sentiments.
    """
    asked = [probe for probe in probes if probe["kind"] == "generality" and "logprob" in probe]
    same, other = ([probe for probe in asked if probe["tag"] == tag] for tag in SENTIMENT_TAGS)
    if not same or not other:
        return None
    wanted, opposite = ([[probe["logprob"][now]] for probe in side] for side in (same, other))
    return sentiment_score(wanted, opposite, [[probe["logprob"][0]] for probe in same]).score


class _Unedited:
    """The host without edits, seen beside every method: once for all.

    Beside all methods of one task and stage it was asked in the same batches, and must have scored the same;
    but for single edits that could not be made in a stack, whose probes were asked case by case.
    In another order of cases, or another run, batches and so rounding may be others; the first are taken.
    """

    def __init__(self, results: Results):
        self._results = results
        self._seen: dict[tuple[int, str, str, str, int], Row] = {}
        self._fullest: dict[tuple[Group, str], list[Row]] = {}
        self._fluency: dict[tuple[Group, str], Row] = {}

    def add(self, run: int, row: Row) -> None:
        """Adds what the host said about a case, or compares it with what is there."""
        probes = row["probes"]
        earlier = self._seen.setdefault(
            (run, row["task"], row["stage"], row["case"], row.get("stack", 1)), row
        )
        alike = len(earlier["probes"]) == len(probes) and all(map(_same, earlier["probes"], probes))
        if not alike:
            raise DataError(
                f"the unedited host scores differently on case {row['case']!r} beside {earlier['method']} "
                f"and beside {row['method']} ({row['stage']}): the record mixes two hosts or machines; run "
                "it again in an empty folder"
            )
        key = (Group(row["benchmark"], row["protocol"], "", UNEDITED), row["case"])
        if len(probes) > len(self._fullest.get(key, [])):  # right after an edit, less may be asked
            self._fullest[key] = probes
        if "fluency" in row:
            self._fluency.setdefault(key, row)

    def finish(self) -> None:
        """Sorts the scores of all cases."""
        for (group, case), probes in self._fullest.items():
            _sort(self._results.values.setdefault(group, {}), (case, 0), probes, "unedited", now=0)
        for (group, case), row in self._fluency.items():
            _sort_fluency(self._results.values[group], (case, 0), row, now=0)


def _same(one: Row, other: Row) -> bool:
    """Whether two probes are one and the host scored alike on them; log-probabilities may round."""
    if any(one[name] != other[name] for name in ("kind", "tag", "prompt", "target")):
        return False
    here, there = one["unedited"], other["unedited"]
    return here.keys() == there.keys() and all(
        here[name] == there[name]
        or math.isclose(here[name], there[name], abs_tol=_tolerance(f"{one['kind']}@{name}"))
        for name in here
    )


def _tolerance(name: str) -> float:
    return 1e-9 if METRICS[name].bounds == (0.0, 1.0) else 1e-3
