"""The mean of reliability, generality and locality, and how far a method lies above others on the same cases.

    python experiments/mean_of_three.py METHOD RUN...

Teacher-forced (locality: identical predictions) and as generated (locality: identical texts), after the last
edit. A case's score is the mean of its three means; intervals and tests are those of `baft report`, corrected
by Holm over all that is printed.
"""

import sys
from pathlib import Path

from baft.evals.collect import Group, Keyed, Results, collect, pool
from baft.evals.differences import Compared, compared, corrected
from baft.evals.metrics import metric
from baft.evals.stats import mean_interval

KINDS = {
    "teacher-forced": ("reliability@teacher_forced", "generality@teacher_forced", "locality@argmax"),
    "generated": ("reliability@generate", "generality@generate", "locality@text"),
}


def of_three(results: Results, group: Group, names: tuple[str, ...]) -> Keyed:
    """The mean of three scores of each case that has all of them."""
    found = [results.scores(group, name) for name in names]
    return {
        key: [sum(sum(one[key]) / len(one[key]) for one in found) / len(found)]
        for key in found[0]
        if all(one.get(key) for one in found)
    }


def main(method: str, runs: list[Path]) -> None:
    """Prints a table in Markdown."""
    results = collect(runs)
    rows, family = [], list[Compared]()
    for benchmark, protocol in results.arenas:
        for kind, names in KINDS.items():
            scores = {one: of_three(results, one, names) for one in results.last(benchmark, protocol)}
            mine = next((one for one in scores if one.method == method), None)
            for one, found in scores.items():
                if not found:
                    continue
                interval = mean_interval(pool(found), bounds=metric(names[0]).bounds)
                rows.append((one, kind, interval, len(family) if mine and one != mine else None))
                if mine and one != mine:
                    family.append(compared(mine, one, names[0], scores[mine], found))
    family = corrected(family)
    print(f"| cases | scored | method | n | mean of three | {method} less it, paired | p, corrected |")
    print("| :-- | :-- | :-- | --: | --: | --: | --: |")
    for one, kind, interval, place in rows:
        cells = [f"{one.benchmark} · {one.protocol}", kind, one.method, str(interval.n_edits)]
        cells.append(f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]")
        found = None if place is None else family[place].difference
        if found is None:
            cells += ["–", "–"]
        else:
            cells += [
                f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]",
                f"{found.p_adjusted:.2g}",
            ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1], [Path(run) for run in sys.argv[2:]])
