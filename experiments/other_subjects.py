"""How many locality questions of a sequence name another edit's subject, and locality without these.

    python experiments/other_subjects.py EXPERIMENT.toml RUN

`apart` leaves out locality questions that are worded as another edit's prompt; those that ask about its
subject in other words stay, and may be what that edit is about. For the last stage of `baft-bank` in RUN.
"""

import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from baft.evals.experiment import read_experiment
from baft.evals.records import read_rows
from baft.types import Edit


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


def mean(asked: Sequence[tuple[str, bool, float]]) -> float:
    """Over cases, of the mean of each one's questions."""
    of_case: dict[str, list[float]] = defaultdict(list)
    for case, _, score in asked:
        of_case[case].append(score)
    return fmean(map(fmean, of_case.values()))


def main(experiment: Path, run: Path) -> None:
    """Prints the counts, for each benchmark of the run."""
    data = Path(os.environ["BAFT_DATA"])
    rows = [row for row in read_rows(run) if row["method"] == "baft-bank" and row["stage"] == "final"]
    for spec in read_experiment(experiment).benchmarks:
        benchmark = spec.load(data)
        split = benchmark.splits[0] if spec.split is None else spec.split
        chosen = spec.chosen(benchmark, split, data)
        subjects = Subjects(case.edit for case in (*chosen.cases, *chosen.others))
        ids = {case.id: case.edit.id for case in chosen.cases}
        asked = [
            (
                row["case"],
                subjects.names_another(probe["prompt"], ids[row["case"]]),
                probe["scores"]["argmax"],
            )
            for row in rows
            if row["benchmark"] == f"{benchmark.name}/{split}"
            for probe in row["probes"]
            if probe["kind"] == "locality" and "argmax" in probe["scores"]
        ]
        if asked:
            changed = [named for _, named, score in asked if score < 1]
            left = [one for one in asked if not one[1]]
            print(f"{benchmark.name}/{split}: {len(asked)} locality questions, locality {mean(asked):.3f};")
            print(f"{len(asked) - len(left)} name another edit's subject, without them {mean(left):.3f};")
            print(f"{len(changed)} changed, {sum(changed)} of which name one")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
