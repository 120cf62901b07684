"""Peak memory of one edit above the host's own.

    BAFT_DATA=<folder> python benchmarks/memory.py --json memory.json

Every measurement is a process of its own, since what one contender leaves behind would count for the next.
It loads the host, runs it once over the edit's prompt and target, gives freed memory back to the system,
and notes the resident memory: the host's own. Then the peak is reset, one edit is made, and the peak is
read (`baft.evals.cost`). Whatever the edit loads or caches on the way
counts as the edit's: the first edit of a process includes reading the background's states and their
statistics, the second does not; the first edit ever of a host also computes those states and writes them to
a cache that is empty then.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from baft.evals.cost import peak_above
from baft.hosts.models import load_host
from baft.hosts.passes import FullPass
from baft.methods.baft import BaftEditor
from contenders import PassSteps, PlainForward, WholeEdit
from harness import Sheet, document, n_rounds, parser, ratios, summarize, write
from workload import Workload, data_folder, host_bytes, padded_out, questions

EVER, FIRST, SECOND = "first edit ever, empty cache", "first edit", "second edit"
FULL, LORA = "four steps of our full pass", "LoRA, four steps"
CONTENDERS = (EVER, FIRST, SECOND, FULL, LORA)
MB = 1e6


def one_process(args: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own measures."""
    torch.set_num_threads(args.threads)
    editor = BaftEditor(load_host(args.model), BaftEditor.preset(args.preset))
    edits = questions(data_folder(args.data), editor.encoder, 2)
    if args.long:
        edits = [padded_out(edit, editor.encoder) for edit in edits]
    work = Workload.of(editor, edits)
    PlainForward(work)(1)
    whole = WholeEdit(work, editor)
    if args.contender == SECOND:
        whole(0)
    run: Callable[[int], float] = whole
    if args.contender == FULL:
        run = PassSteps(work, FullPass)
    elif args.contender == LORA:
        from contenders import Lora  # a second copy of the host: it is there before anything is counted

        run = Lora(work).step
    with empty_cache() if args.contender == EVER else contextlib.nullcontext():
        found = peak_above(lambda: run(1))
    return {**asdict(found), "host_bytes": host_bytes(work.host.model)}


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """Lets this process find nothing that was kept; an embedded host must have been loaded before."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, BAFT_CACHE=folder):
        yield


def measure(args: argparse.Namespace, sheet: Sheet) -> dict[str, Any]:
    """Every contender on short and long prompts, some processes each."""
    results: dict[str, Any] = {}
    contenders = CONTENDERS[:3] if args.quick else CONTENDERS
    for long in (False,) if args.quick else (False, True):
        for contender in contenders:
            found = []
            for number in range(1 if args.quick else n_rounds(args)):
                sheet.tell(f"{contender}, {'long' if long else 'short'} prompt, process {number + 1}")
                found.append(_asked(args, contender, long=long))
            above = [one["above"] for one in found]
            results[f"{contender}, {'long' if long else 'short'} prompt"] = {
                "bytes_above_the_host": summarize(above),
                "share_of_host": summarize(ratios(above, [one["host_bytes"] for one in found])),
                "resident_before": summarize([one["own"] for one in found]),
                "peak_of_process": summarize([one["whole_process"] for one in found]),
                "host_bytes": found[0]["host_bytes"],
                "how": found[0]["how"],
            }
    return results


def _asked(args: argparse.Namespace, contender: str, *, long: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--contender", contender, "--model", args.model]
    command += ["--threads", str(args.threads), "--preset", args.preset, *(["--long"] if long else [])]
    command += ["--data", str(data_folder(args.data))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the process for {contender!r} failed:\n{done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main(argv: list[str] | None = None) -> int:
    """Measures, shows and writes."""
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="folder of the benchmark files (default: $BAFT_DATA)")
    made.add_argument("--preset", default="default", help="settings of baft")
    made.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)  # this is such a process
    made.add_argument("--long", action="store_true", help=argparse.SUPPRESS)
    args, sheet = made.parse_args(argv), Sheet()
    if args.contender:
        print(json.dumps(one_process(args)))
        return 0
    results = measure(args, sheet)
    rows = [
        (
            name,
            f"{found['bytes_above_the_host'].median / MB:.0f} MB",
            f"{found['bytes_above_the_host'].maximum / MB:.0f} MB",
            f"{found['share_of_host'].median:.1%}",
            f"{found['peak_of_process'].median / MB:.0f} MB",
        )
        for name, found in results.items()
    ]
    columns = ("", "above the host, median", "most", "share of host", "peak of the process")
    sheet.table(f"{args.model}, preset {args.preset}", columns, rows)
    sheet.say(next(iter(results.values()))["how"])
    write(args.json, document("memory", args, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
