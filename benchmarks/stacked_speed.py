"""Seconds an edit when 1, 10 and 100 independent edits are trained as one stack, against each made alone.

    BAFT_DATA=<folder> python benchmarks/stacked_speed.py --json stacked_speed.json

In every round the stacks are trained whole and a few of their edits alone, in alternation; what was made
is taken back, untimed. Every edit has its own bases, its own start and its own stop, stacked or alone, so
that the work is the same; the share that is decoded is given for both.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from baft.errors import EditError
from baft.hosts.models import load_host
from baft.methods.baft import BaftEditor
from baft.methods.base import EditOutcome
from baft.types import Edit, EditRequest
from harness import Sheet, alternate, document, n_rounds, parser, ratios, seconds, summarize, times, write
from workload import data_folder, questions

SIZES = (1, 10, 100)
N_ALONE = 5  # edits made alone in a round; which ones changes from round to round
ALONE = "alone"
LENGTHS = range(5, 41)  # tokens of a prompt: whatever zsRE asks


class Made:
    """One way of making edits: seconds an edit, and how the edits came out.

    Args:
        editor: Makes them.
        edits: All edits.
        size: How many of them are a turn.
        stacked: Whether they are trained as one stack.
    """

    def __init__(self, editor: BaftEditor, edits: list[Edit], size: int, *, stacked: bool):
        self.editor, self.edits, self.size, self.stacked = editor, edits, size, stacked
        self.decoded: list[bool] = []
        self.n_steps: list[int] = []

    def __call__(self, number: int) -> float:
        """Seconds an edit in one round."""
        first = number * self.size
        chosen = [self.edits[(first + i) % len(self.edits)] for i in range(self.size)]
        requests = [EditRequest((edit,)) for edit in chosen]
        editor, outcomes = self.editor, list[EditOutcome | EditError]()
        if self.stacked:
            began = time.perf_counter()
            outcomes += editor.apart(requests).outcomes
            took = time.perf_counter() - began
        else:
            took = 0.0
            for request in requests:
                began = time.perf_counter()
                outcomes.append(editor.apply(request))
                took += time.perf_counter() - began
                editor.reset()  # the next one is alone again
        for outcome in outcomes:
            if isinstance(outcome, EditError):
                raise outcome
            self.decoded.append(all(outcome.decoded))
            self.n_steps.append(outcome.n_steps)
        return took / self.size


def measure(args: argparse.Namespace, sheet: Sheet) -> dict[str, Any]:
    """All stack sizes, and edits alone."""
    torch.set_num_threads(args.threads)
    editor = BaftEditor(load_host(args.model), BaftEditor.preset(args.preset))
    sizes = args.sizes or (SIZES[:2] if args.quick else SIZES)
    edits = questions(data_folder(args.data), editor.encoder, max(sizes), LENGTHS)
    n_alone = min(N_ALONE, len(edits))
    made = {ALONE: Made(editor, edits, n_alone, stacked=False)}
    made |= {f"stack of {size}": Made(editor, edits, size, stacked=True) for size in sizes}
    sheet.tell("every contender once, not counted")
    alternate(made, 1)
    for one in made.values():
        one.decoded, one.n_steps = [], []
    took = alternate(made, n_rounds(args), tell=sheet.tell)
    return {
        name: {
            "seconds_an_edit": summarize(values),
            "alone / this": summarize(ratios(took[ALONE], values)),
            "n_steps": summarize(made[name].n_steps),
            "decoded": sum(made[name].decoded) / len(made[name].decoded),
        }
        for name, values in took.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Measures, shows and writes."""
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="folder of the benchmark files (default: $BAFT_DATA)")
    made.add_argument("--preset", default="default", help="settings of baft with bases of their own")
    made.add_argument("--sizes", nargs="+", type=int, help="stack sizes (default 1 10 100)")
    args, sheet = made.parse_args(argv), Sheet()
    results = measure(args, sheet)
    rows = [
        (
            name,
            seconds(found["seconds_an_edit"]),
            times(found["alone / this"]),
            f"{found['n_steps'].median:.0f}",
            f"{found['decoded']:.0%}",
        )
        for name, found in results.items()
    ]
    columns = ("", "seconds an edit (quartiles)", "times faster than alone", "steps", "decoded")
    sheet.table(f"{args.model}, preset {args.preset}", columns, rows)
    write(args.json, document("stacked_speed", args, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
