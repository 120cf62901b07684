"""How many locality questions of a sequence name another edit's subject, and locality without these.

    python experiments/other_subjects.py EXPERIMENT.toml RUN
    python experiments/other_subjects.py EXPERIMENT.toml

`apart` leaves out locality questions that are worded as another edit's prompt; those that ask about its
subject in other words stay, and may be what that edit is about. With RUN, by the scores of the last stage of
`baft-bank`. Without it, by the scope alone, which no edit need be made for: what meets no edit is answered
bit for bit as by the host, so that the share of these is what locality is at least.
"""

import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from false_fires import acting

from baft.evals.experiment import read_experiment
from baft.evals.intervals import wilson
from baft.evals.records import Row, read_rows
from baft.hosts.encoding import Encoder
from baft.hosts.models import load_host
from baft.scope.scope import Scope, scope_of
from baft.types import Edit, EditCase

Asked = tuple[str, bool, float]  # the case, whether another edit's subject is named, whether the reply stays


class Subjects:
    """The subjects of edits."""

    def __init__(self, edits: Iterable[Edit]):
        self._owners: dict[str, set[str]] = defaultdict(set)
        self._by_word: dict[str, set[str]] = defaultdict(set)  # their first
        for edit in edits:
            subject = plain(edit.subject or "")
            if subject.strip():
                self._owners[subject].add(edit.id)
                self._by_word[subject.split()[0]].add(subject)

    def names_another(self, prompt: str, own: str) -> bool:
        """Whether a prompt names the subject of an edit that is not this one."""
        text = plain(prompt)
        near = {subject for word in text.split() for subject in self._by_word.get(word, ())}
        return any(subject in text and self._owners[subject] - {own} for subject in near)


def plain(text: str) -> str:
    """Its words in small letters, one space before and behind each."""
    words = " ".join(re.findall(r"\w+", text.casefold()))
    return f" {words} "


def mean(asked: Sequence[Asked]) -> str:
    """Over cases, of the mean of each one's questions, with its 95 % interval."""
    of_case: dict[str, list[float]] = defaultdict(list)
    for case, _, score in asked:
        of_case[case].append(score)
    values = np.array([fmean(one) for one in of_case.values()])
    low, high = wilson(values, 0.95)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}], {len(values)} cases"


def by_scores(rows: Sequence[Row], name: str) -> dict[str, list[tuple[str, float]]]:
    """The locality questions of each case of a benchmark, and whether the prediction stayed."""
    found: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for row in rows:
        if row["method"] == "baft-bank" and row["stage"] == "final" and row["benchmark"] == name:
            found[row["case"]] += [
                (probe["prompt"], probe["scores"]["argmax"])
                for probe in row["probes"]
                if probe["kind"] == "locality" and "argmax" in probe["scores"]
            ]
    return found


def by_scope(
    scope: Scope, cases: Sequence[EditCase], others: Sequence[EditCase]
) -> dict[str, list[tuple[str, float]]]:
    """The locality questions of each case, and whether it meets no edit."""
    pairs = [(case.id, probe.prompt) for case in cases for probe in case.probes if probe.kind == "locality"]
    rows = [scope.reader.encoder.prompt(prompt) for _, prompt in pairs]
    met = {row for row, _ in acting(scope, (*cases, *others), rows)}
    found: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for row, (case, prompt) in enumerate(pairs):
        found[case].append((prompt, float(row not in met)))
    return found


def main(experiment: Path, run: Path | None) -> None:
    """Prints the counts, for each benchmark."""
    data, plan = Path(os.environ["BAFT_DATA"]), read_experiment(experiment)
    if run is not None:
        rows = list(read_rows(run))
    else:
        host = load_host(plan.model)
        scope = scope_of(host, Encoder.for_host(host))
    for spec in plan.benchmarks:
        benchmark = spec.load(data)
        split = benchmark.splits[0] if spec.split is None else spec.split
        chosen = spec.chosen(benchmark, split, data)
        subjects = Subjects(case.edit for case in (*chosen.cases, *chosen.others))
        ids = {case.id: case.edit.id for case in chosen.cases}
        name = f"{benchmark.name}/{split}"
        stayed = by_scores(rows, name) if run else by_scope(scope, chosen.cases, chosen.others)
        asked = [
            (case, subjects.names_another(prompt, ids[case]), score)
            for case, of_case in stayed.items()
            for prompt, score in of_case
        ]
        if asked:
            changed = [named for _, named, score in asked if score < 1]
            left = [one for one in asked if not one[1]]
            print(f"{name}: {len(asked)} locality questions, of which stay {mean(asked)};")
            print(f"{len(asked) - len(left)} name another edit's subject, without them {mean(left)};")
            print(f"{len(changed)} do not stay, {sum(changed)} of which name one", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
