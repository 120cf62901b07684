"""Many edits of `baft-bank` in force, of which only those are trained that a question can reach.

    python experiments/ten_thousand.py RUN [--experiment bank-10000.toml] [--asked N]

Runs an experiment whose benchmarks have `others` and keeps a record in RUN, as `baft bench` would. What an
edit is found by needs one reading of its prompt; its bases are read where it acts, and nowhere else. So of
the edits that nothing is asked about, those are trained whose threshold a question passes, or misses by less
than `SLACK`; the others stand in force with their keys alone. Should one of them act nevertheless, its bases
are missing, and the run breaks off with a KeyError. All else is as if every one had been trained, for hours
more.
"""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baft.errors import EditError
from baft.evals.experiment import Task, read_experiment
from baft.evals.making import make_many
from baft.evals.records import Row
from baft.evals.report import write_report
from baft.evals.runner import Bench, _Models
from baft.hosts.encoding import Encoder
from baft.methods.bank import BankEditor
from baft.methods.base import Editor
from baft.scope.index import EditKeys, ScopeIndex
from baft.types import EditCase, EditRequest

SLACK = 0.5  # nats; thousands of times what rounding changes
AT_ONCE = 64  # prompts that are compared with all edits


class Many(Bench):
    """Leaves untrained what is never read."""

    def _in_sequence(self, editor: Editor, task: Task) -> list[Row]:
        if not isinstance(editor, BankEditor) or task.protocol.immediate != "none":
            raise SystemExit("this runs baft-bank alone, asked after the last edit: immediate = 'none'")
        made = make_many(editor, task.cases, with_cost="cost" in self.experiment.scorers)
        print(f"{len(made)} asked edits are made", flush=True)
        about = put_others(
            editor, task.others, [probe.prompt for case in task.cases for probe in case.all_probes]
        )
        print(about, flush=True)
        rows = self._scored(_Models.of(editor), task.cases, made, stage="final")
        rows[-1].update(about)
        self._look_beyond(rows, editor.edited, task.cases)
        return rows


def put_others(editor: BankEditor, others: Sequence[EditCase], prompts: Sequence[str]) -> dict[str, Any]:
    """Puts the edits of others into force, and tells how many were trained and why some could not be made."""
    edits = [case.edit for case in others]
    keys = editor.keys(edits)
    near = within_reach(editor, keys, prompts)
    requests = [EditRequest((edit,)) for edit in edits]
    bases, failed, why = dict[str, Tensor](), set[int](), Counter[str]()
    for start in range(0, len(near), 100):
        chosen = near[start : start + 100]
        outcomes, made = editor._make_apart([requests[i] for i in chosen], None)
        bases |= made
        for i, outcome in zip(chosen, outcomes, strict=True):
            if isinstance(outcome, EditError):
                failed.add(i)
                why[f"{type(outcome).__name__}: {outcome}"] += 1
        print(f"{start + len(chosen)} of {len(near)} others within reach are trained", flush=True)
    state = dict(editor.state)
    for i, (edit, of_edit) in enumerate(zip(edits, keys, strict=True)):
        if i not in failed:
            state |= {f"{edit.id}.{name}": tensor for name, tensor in of_edit.items()}
    trained = {edits[i].id for i in near} - {edits[i].id for i in failed}
    state |= {name: tensor for name, tensor in bases.items() if name.partition(".")[0] in trained}
    left = [request for i, request in enumerate(requests) if i not in failed]
    editor._state, editor.requests = state, (*editor.requests, *left)
    editor._put()
    return {"n_others_trained": len(trained), "others_failed": why}


@torch.no_grad()
def within_reach(editor: BankEditor, keys: Sequence[dict[str, Tensor]], prompts: Sequence[str]) -> list[int]:
    """The edits that one of some prompts passes, or nearly does."""
    scope = editor._scope
    lower = [EditKeys(**of_edit).to(editor.device) for of_edit in keys]
    index = ScopeIndex(scope.head, [replace(one, thresholds=one.thresholds - SLACK) for one in lower])
    encoder, found = Encoder.for_host(editor.host), set[int]()
    rows = [encoder.prompt(prompt) for prompt in dict.fromkeys(prompts)]
    for start in range(0, len(rows), AT_ONCE):
        passing = index.passing(scope.read(rows[start : start + AT_ONCE])) > -torch.inf
        found |= set(passing.any(0).nonzero().flatten().tolist())
    return sorted(found)


if __name__ == "__main__":
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("run", type=Path, help="where the record is kept")
    made.add_argument("--experiment", type=Path, default=Path(__file__).with_name("bank-10000.toml"))
    made.add_argument(
        "--asked", type=int, help="so many cases are asked of each benchmark, not as many as it says"
    )
    args = made.parse_args()
    experiment = read_experiment(args.experiment)
    if args.asked is not None:
        fewer = tuple(replace(benchmark, limit=args.asked) for benchmark in experiment.benchmarks)
        experiment = replace(experiment, benchmarks=fewer)
    Many(experiment, data=Path(os.environ["BAFT_DATA"])).run(args.run)
    write_report([args.run], args.run)
