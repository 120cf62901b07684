"""What ten thousand edits cost: one more edit, generation, saving and loading, against none.

    python benchmarks/bank_scale.py --edits 10000 --json bank_scale.json

With `--keep all.baft` the edits are made in the first run alone, which takes minutes.

The edits are found by real keys, of prompts of the project's own text about as many made-up facts; their
bases are random. Edits with and without the others in force are alternated, each on a model of its own, as
are replies of the same length: to ordinary prompts, on which none of them acts, and to prompts of theirs.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

import baft
from baft.hosts.background import background_text
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.hosts.models import load_host
from baft.methods.bank import BankEditor
from baft.scope.text import ScopeText
from baft.types import Edit, EditRequest
from generate_speed import Generation
from harness import (
    Sheet,
    alternate,
    document,
    n_rounds,
    parser,
    ratios,
    seconds,
    summarize,
    timed,
    times,
    write,
)

N_NEW = 64
_READ = 256  # edits whose prompts are read at once
TARGETS = ("Rome", "Osaka", "a violin", "Dutch", "1912", "basalt", "the moon", "Ada Lovelace", "salt")


def edits_of_our_text(n: int, seed: int) -> list[Edit]:
    """So many edits about different facts."""
    text, draw = ScopeText("train", seed), random.Random(seed)
    found: dict[str, Edit] = {}
    while len(found) < n:
        for fact in text.group(1):
            found.setdefault(fact.prompt, Edit(fact.prompt, draw.choice(TARGETS), subject=fact.subject))
    return list(found.values())[:n]


def fill(editor: BankEditor, edits: list[Edit]) -> None:
    """Puts edits into force that were never trained: found by their own keys, with random bases."""
    like = {name.partition(".")[2]: tensor for name, tensor in editor.state.items()}
    state = dict[str, torch.Tensor]()
    pieces = [edits[start : start + _READ] for start in range(0, len(edits), _READ)]
    for edit, keys in zip(edits, [keys for piece in pieces for keys in editor.keys(piece)], strict=True):
        state |= {f"{edit.id}.{name}": tensor for name, tensor in keys.items()}
        draw = torch.Generator().manual_seed(crc32(edit.id.encode()))
        for name, tensor in like.items():
            if name not in keys:
                state[f"{edit.id}.{name}"] = 0.01 * torch.randn(tensor.shape, generator=draw)
    editor.load_state_dict(state, [EditRequest((edit,)) for edit in edits])


class OneMore:
    """One further edit a round, taken back outside the time.

    Args:
        model: The model.
        edits: Round `i` makes the i-th.
        path: Where all edits are saved then, within the time; None leaves that out.
    """

    def __init__(self, model: baft.Model, edits: list[Edit], path: Path | None = None):
        self.model, self.edits, self.path = model, edits, path

    def __call__(self, number: int) -> float:
        """Seconds of one call of `Model.edit`, report included, and of saving."""

        def work() -> None:
            self.model.edit(self.edits[number % len(self.edits)])
            if self.path is not None:
                self.model.save(self.path)

        took = timed(work)
        self.model.undo()
        return took


def once(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def many(n: int, pair: Any, path: Path) -> float:
    """Saves so many edits; how many seconds that took."""
    full = baft.load(pair)
    full.edit(edits_of_our_text(1, seed=2)[0])
    editor = full._editor
    assert isinstance(editor, BankEditor), "it is the default"
    held = edits_of_our_text(n, seed=0)
    fill(editor, held)
    full._put_in_force(editor, "default", tuple((True,) for _ in held))
    return once(lambda: full.save(path))[0]


def measure(args: argparse.Namespace, sheet: Sheet) -> dict[str, Any]:
    """One more edit, generation, and the way to disk and back."""
    torch.set_num_threads(args.threads)
    rounds, n_new = n_rounds(args), 8 if args.quick else args.tokens
    plain = baft.load(args.model)
    pair = (plain.host, plain.tokenizer)
    n = min(args.edits, 20) if args.quick else args.edits
    new = edits_of_our_text(rounds + 1, seed=1)
    to = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "all.baft" if args.keep is None else args.keep
        if not path.exists():
            sheet.tell(f"keys of {n} edits")
            to["save all"] = many(n, pair, path)
        to["load"], full = once(lambda: baft.load(path, host=pair))
        n_held, n_bytes = len(full.edits), sum(file.stat().st_size for file in path.iterdir())
        if n_held != n:
            raise SystemExit(f"{path} holds {n_held} edits, and {n} are asked for: give another --keep")
        to["remove one"], _ = once(lambda: full.remove(full.edits[n // 2].edit.id))
        router, encoder = full._edited.router, Encoder.for_host(load_host(pair))
        rows = [encoder.prompt(text) for text in (*background_text()["canaries"], "7 8 9")]
        silent = [row for row in rows if router is not None and router([row]) is None]
        acting = [encoder.prompt(one.edit.prompt) for one in full.edits[: len(rows)]]
        runs = {
            "host, none acts": Generation(EditedModel(plain.host), silent, n_new, encoder.pad_id),
            "all, none acts": Generation(full._edited, silent, n_new, encoder.pad_id),
            "host, one acts": Generation(EditedModel(plain.host), acting, n_new, encoder.pad_id),
            "all, one acts": Generation(full._edited, acting, n_new, encoder.pad_id),
        }
        adding = {"edit 1": OneMore(plain, new), f"edit {n}": OneMore(full, new)}
        saving = {
            "edit 1, saved": OneMore(plain, new, Path(folder) / "one.baft"),
            f"edit {n}, saved": OneMore(full, new, Path(folder) / "more.baft"),
        }
        took: dict[str, list[float]] = {}
        for contenders in (adding, saving, runs):
            sheet.tell("every contender once, not counted")
            alternate(contenders, 1)
            took |= alternate(contenders, rounds, tell=sheet.tell)
    return {
        "n_edits": n,
        "n_distinct_prompts": len({one.edit.prompt for one in full.edits}),
        "n_prompts_on_which_none_acts": f"{len(silent)} of {len(rows)}",
        "seconds": {name: summarize(values) for name, values in took.items()},
        "one more edit, with all / with none": summarize(ratios(took[f"edit {n}"], took["edit 1"])),
        "one more edit and saving, with all / with none": summarize(
            ratios(took[f"edit {n}, saved"], took["edit 1, saved"])
        ),
        "tokens per s, with all / with none": {
            state: summarize(ratios(took[f"host, {state}"], took[f"all, {state}"]))
            for state in ("none acts", "one acts")
        },
        "bytes an edit": n_bytes / n,
        "seconds to": to,
    }


def main(argv: list[str] | None = None) -> int:
    """Measures, shows and writes."""
    made = parser(__doc__)
    made.add_argument("--edits", type=int, default=10_000, help="edits in force (default 10000)")
    made.add_argument("--keep", type=Path, help="where the edits are kept for the next run (NAME.baft)")
    made.add_argument("--tokens", type=int, default=N_NEW, help=f"new tokens a turn (default {N_NEW})")
    args, sheet = made.parse_args(argv), Sheet()
    results = measure(args, sheet)
    rows = [(name, seconds(spread)) for name, spread in results["seconds"].items()]
    sheet.table(f"{args.model}, {results['n_edits']} edits", ("", "median (quartiles)"), rows)
    sheet.say(f"one more edit: {times(results['one more edit, with all / with none'])} the time of the first")
    spread = results["one more edit and saving, with all / with none"]
    sheet.say(f"one more edit, and all of them saved: {times(spread)} the time of the first")
    for state, spread in results["tokens per s, with all / with none"].items():
        sheet.say(f"{state}: {times(spread)} of the host's tokens per second")
    to = ", ".join(f"{name} {took:.1f} s" for name, took in results["seconds to"].items())
    sheet.say(f"{results['bytes an edit'] / 1000:.1f} kB an edit in the artifact; {to}")
    write(args.json, document("bank_scale", args, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
