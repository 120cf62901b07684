"""One training step and one whole edit: our passes, pyreft, LoRA, and what the memory allows.

    BAFT_DATA=<folder> python benchmarks/edit_speed.py --json edit_speed.json

All contenders are alternated: in every round each takes its turn on the same edit, pyreft in a process of
its own that waits while others work. Prompts are zsRE's, 10 to 20 tokens long, and the same behind
ordinary text, 128 tokens. The rows of an edit are the raw one alone, or all that the preset trains: with
`default` a second row, longer, holds the prompt inside the chat template. The memory bound of a step is the
bytes of the weights above the first site, read twice (forward and backward), at the speed at which this
machine reads a buffer far larger than its caches, measured in the same rounds. docs/performance.md says what
each figure means.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from baft.hosts.kernels import fast_linears
from baft.hosts.models import load_host
from baft.hosts.passes import FullPass
from baft.hosts.suffix import SuffixPass
from baft.methods.baft import BaftEditor
from contenders import Lora, PassSteps, PlainForward, Streaming, WholeEdit
from harness import (
    Contender,
    Sheet,
    Summary,
    alternate,
    document,
    n_rounds,
    parser,
    ratios,
    seconds,
    summarize,
    times,
    write,
)
from pyreft_steps import PyreftSteps, remove_environment
from workload import Workload, bytes_above, data_folder, padded_out, questions

PRESETS = ("default", "paper")
LENGTHS = ("short", "long")
RAW, BOTH = "raw", "both"  # rows of an edit: raw alone, or the chat rendering beside it
CHEAP, FULL, PYREFT, LORA = "our cheap pass", "our full pass", "pyreft", "LoRA"
PLAIN_FAST, EDIT_FULL = "plain forward, our kernels", "whole edit, full pass"
PLAIN, EDIT, LORA_FIXED, LORA_STOPPED = "plain forward", "whole edit", "LoRA, all steps", "LoRA, our stop"
SUM, PRODUCT = "read by a sum", "read by a product"


@dataclass
class Setting:
    """One preset on prompts of one length and rows of one form, with all who are compared there."""

    work: Workload
    contenders: dict[str, Contender]
    passes: dict[str, PassSteps]
    whole: dict[str, WholeEdit]
    lora: Lora | None
    pyreft: PyreftSteps | None
    streaming: Streaming

    def forget(self) -> None:
        """Forgets what was counted so far."""
        for steps in self.passes.values():
            steps.preparation_s.clear()
        for edit in self.whole.values():
            edit.outcomes.clear()
        if self.lora is not None:
            self.lora.forget()

    def results(self, took: dict[str, list[float]]) -> dict[str, Any]:
        """Every figure of this setting."""
        first = self.work.sites[0]
        rows = [self.work.row_tokens(number) for number in range(len(self.work.edits))]
        n_bytes = bytes_above(self.work.host.model, first)
        n_buffer = self.streaming.n_bytes
        speed = [n_buffer / min(pair) for pair in zip(took[SUM], took[PRODUCT], strict=True)]
        bound = [2 * n_bytes / one for one in speed]
        step, edit = took[CHEAP], took[EDIT]
        pairs = {
            **{f"{name} / {CHEAP}": (took.get(name), step) for name in (FULL, PYREFT, LORA)},
            f"{CHEAP} / memory bound": (step, bound),
            **{f"{EDIT} / {name}": (edit, took.get(name)) for name in (PLAIN, PLAIN_FAST)},
            **{f"{name} / {EDIT}": (took.get(name), edit) for name in (EDIT_FULL, LORA_FIXED, LORA_STOPPED)},
        }
        return {
            "layers": [site.layer for site in self.work.sites],
            "rank": self.work.config.rank,
            "n_rows": len(rows[0]),
            "prompt_tokens": [len(text.prompt_ids) for text in self.work.texts(0)],
            "row_tokens": rows,
            "width": summarize([max(one) for one in rows]),
            "padded_tokens": summarize([len(one) * max(one) for one in rows]),
            "seconds": {name: summarize(values) for name, values in took.items()},
            "preparation_s": {name: summarize(one.preparation_s) for name, one in self.passes.items()},
            "bytes_above_first_site": n_bytes,
            "bytes_per_s": summarize(speed),
            "bound_s": summarize(bound),
            "ratios": {
                name: summarize(ratios(above, below))
                for name, (above, below) in pairs.items()
                if above is not None and below is not None
            },
            "edits": {name: one.results() for name, one in self.whole.items()},
            "lora": None if self.lora is None else self.lora.results(),
            "pyreft_losses": None if self.pyreft is None else self.pyreft.losses,
        }


def prepare(args: argparse.Namespace, work: Workload, editor: BaftEditor, streaming: Streaming) -> Setting:
    """Everybody who takes part in one setting."""
    contenders: dict[str, Contender] = {SUM: streaming.sum, PRODUCT: streaming.product}
    passes: dict[str, PassSteps] = {}
    for name, kind in ((CHEAP, SuffixPass), (FULL, FullPass)):
        passes[name] = PassSteps(work, kind)
        contenders[name] = passes[name]
    whole = {EDIT: WholeEdit(work, editor), EDIT_FULL: WholeEdit(work, editor, full=True)}
    lora, pyreft = None, None
    contenders |= {PLAIN: PlainForward(work), PLAIN_FAST: PlainForward(work, fast_linears), **whole}
    if "pyreft" not in args.without:
        contenders[PYREFT] = pyreft = PyreftSteps(work, args.threads)
    if "lora" not in args.without:
        lora = Lora(work, n_steps=3) if args.quick else Lora(work)
        contenders |= {LORA: lora.step, LORA_FIXED: lora.fixed, LORA_STOPPED: lora.stopped}
    return Setting(work, contenders, passes, whole, lora, pyreft, streaming)


def wanted(presets: Sequence[str], forms: Sequence[str]) -> list[tuple[str, str]]:
    """Presets with the forms of their rows; a preset that trains raw rows alone has no other form."""
    return [
        (preset, form)
        for preset in presets
        for form in forms
        if form == RAW or BaftEditor.preset(preset).chat
    ]


def measure(args: argparse.Namespace, sheet: Sheet) -> dict[str, Any]:
    """All settings, one after the other."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    host = load_host(args.model)
    streaming = Streaming((1 << 26) if args.quick else (1 << 30))
    rounds, results = n_rounds(args), {}
    for preset, form in wanted(args.presets, args.renderings):
        config = BaftEditor.preset(preset)
        editor = BaftEditor(host, config if form == BOTH else replace(config, chat=False))
        edits = questions(data_folder(args.data), editor.encoder, rounds)
        for length in args.lengths:
            chosen = edits if length == "short" else [padded_out(edit, editor.encoder) for edit in edits]
            setting = prepare(args, Workload.of(editor, chosen), editor, streaming)
            name = f"{preset}/{form}/{length}"
            sheet.tell(f"{name}: every contender once, not counted")
            alternate(setting.contenders, 1)
            setting.forget()
            took = alternate(setting.contenders, rounds, tell=sheet.tell)
            results[name] = setting.results(took)
            if setting.pyreft is not None:
                setting.pyreft.close()
    return results


def show(sheet: Sheet, results: dict[str, Any]) -> None:
    """Two tables a setting."""
    for name, found in results.items():
        n_rows, width = found["n_rows"], found["width"]
        where = (
            f"{name}: layers {found['layers']}, rank {found['rank']}, rows an edit: {n_rows}, "
            f"{width.minimum:.0f} to {width.maximum:.0f} tokens wide"
        )
        rows = [(who, seconds(spread)) for who, spread in found["seconds"].items()]
        rows.append(("memory bound of a step", seconds(found["bound_s"])))
        sheet.table(where, ("one turn of", "median (quartiles)"), rows)
        sheet.table("ratios, round by round", ("", "median (quartiles)"), _ratio_rows(found["ratios"]))
        speed: Summary = found["bytes_per_s"]
        edit = found["edits"][EDIT]
        sheet.say(
            f"{found['bytes_above_first_site'] / 1e6:.0f} MB of weights above the first site, "
            f"memory read at {speed.median / 1e9:.1f} GB/s; "
            f"with padding {found['padded_tokens'].median:.0f} tokens an edit; "
            f"a whole edit took {edit['n_steps'].median:.0f} steps, {edit['decoded']:.0%} decoded\n"
        )


def _ratio_rows(found: dict[str, Summary]) -> list[tuple[str, str]]:
    return [(name, times(spread)) for name, spread in found.items()]


def options(argv: list[str] | None) -> argparse.Namespace:
    """What was asked for."""
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="folder of the benchmark files (default: $BAFT_DATA)")
    made.add_argument("--presets", nargs="+", choices=PRESETS, help="default: both, --quick: default alone")
    made.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    made.add_argument("--renderings", nargs="+", choices=(RAW, BOTH), default=[RAW, BOTH])
    made.add_argument("--without", nargs="+", choices=("pyreft", "lora"), default=[], help="leave out")
    made.add_argument("--remove-pyreft", action="store_true", help="remove pyreft's environment, and end")
    args = made.parse_args(argv)
    args.presets = args.presets or list(PRESETS[:1] if args.quick else PRESETS)
    return args


def main(argv: list[str] | None = None) -> int:
    """Measures, shows and writes."""
    args, sheet = options(argv), Sheet()
    if args.remove_pyreft:
        remove_environment()
        return 0
    results = measure(args, sheet)
    show(sheet, results)
    write(args.json, document("edit_speed", args, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
