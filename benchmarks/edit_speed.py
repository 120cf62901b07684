"""One training step and one whole edit: our passes, pyreft, LoRA, and what the memory allows.

    BAFT_DATA=<folder> python benchmarks/edit_speed.py --json edit_speed.json

All contenders are alternated: in every round each takes its turn on the same edit, pyreft in a process of
its own that waits while others work. Prompts are zsRE's, 10 to 20 tokens long, and the same behind
ordinary text, 128 tokens. The memory bound of a step is the bytes of the weights above the first site,
read twice (forward and backward), at the speed at which this machine reads a buffer far larger than its
caches, measured in the same rounds. docs/performance.md says what each figure means.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from baft.hosts.models import load_host
from baft.methods.baft import BaftEditor
from contenders import Lora, PassSteps, PlainForward, Streaming, WholeEdit, of_this_checkout
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
CHEAP, FULL, PYREFT, LORA = "our cheap pass", "our full pass", "pyreft", "LoRA"
PLAIN_FAST = "plain forward, our kernels"
PLAIN, EDIT, LORA_FIXED, LORA_STOPPED = "plain forward", "whole edit", "LoRA, all steps", "LoRA, our stop"
SUM, PRODUCT = "read by a sum", "read by a product"


@dataclass
class Setting:
    """One preset on prompts of one length, with all who are compared there."""

    work: Workload
    contenders: dict[str, Contender]
    passes: dict[str, PassSteps]
    edit: WholeEdit
    lora: Lora | None
    pyreft: PyreftSteps | None
    streaming: Streaming

    def results(self, took: dict[str, list[float]]) -> dict[str, Any]:
        """Every figure of this setting."""
        first = self.work.sites[0]
        n_bytes = bytes_above(self.work.host.model, first)
        n_buffer = self.streaming.n_bytes
        speed = [n_buffer / min(pair) for pair in zip(took[SUM], took[PRODUCT], strict=True)]
        bound = [2 * n_bytes / one for one in speed]
        step = took.get(CHEAP, took[FULL])
        against = {
            f"{name} / our step": summarize(ratios(took[name], step))
            for name in (FULL, PYREFT, LORA)
            if name in took and took[name] is not step
        }
        whole = {
            f"whole edit / {name}": summarize(ratios(took[EDIT], took[name]))
            for name in (PLAIN, PLAIN_FAST)
            if name in took
        }
        for name in (LORA_FIXED, LORA_STOPPED):
            if name in took:
                whole[f"{name} / whole edit"] = summarize(ratios(took[name], took[EDIT]))
        return {
            "layers": [site.layer for site in self.work.sites],
            "rank": self.work.config.rank,
            "n_rows": len(self.work.texts(0)),
            "prompt_tokens": [len(text.prompt_ids) for text in self.work.texts(0)],
            "our_step_is": CHEAP if CHEAP in took else FULL,
            "seconds": {name: summarize(values) for name, values in took.items()},
            "preparation_s": {name: summarize(one.preparation_s) for name, one in self.passes.items()},
            "bytes_above_first_site": n_bytes,
            "bytes_per_s": summarize(speed),
            "bound_s": summarize(bound),
            "ratios": {**against, "our step / memory bound": summarize(ratios(step, bound)), **whole},
            "whole_edit": {
                "n_steps": summarize(self.edit.n_steps),
                "decoded": sum(self.edit.decoded) / len(self.edit.decoded),
            },
            "lora": {} if self.lora is None else self._lora(),
            "pyreft_losses": None if self.pyreft is None else self.pyreft.losses,
        }

    def _lora(self) -> dict[str, Any]:
        lora = self.lora
        assert lora is not None
        return {
            "n_steps": lora.n_steps,
            "stopped_after": summarize(lora.stopped_after),
            "decoded": {name: sum(flags) / len(flags) for name, flags in lora.decoded.items()},
        }


def prepare(args: argparse.Namespace, work: Workload, editor: BaftEditor, streaming: Streaming) -> Setting:
    """Everybody who takes part in one setting."""
    contenders: dict[str, Contender] = {SUM: streaming.sum, PRODUCT: streaming.product}
    passes = {}
    for name, kind in ((CHEAP, "SuffixPass"), (FULL, "FullPass")):
        pass_class = of_this_checkout(kind)
        if pass_class is None:
            print(f"{name}: this checkout has no {kind}; it is left out", file=sys.stderr)
            continue
        passes[name] = PassSteps(work, pass_class)
        contenders[name] = passes[name]
    edit, lora, pyreft = WholeEdit(work, editor), None, None
    contenders |= {PLAIN: PlainForward(work), EDIT: edit}
    fast_linears = of_this_checkout("fast_linears")
    if fast_linears is not None:
        contenders[PLAIN_FAST] = PlainForward(work, fast_linears)
    if "pyreft" not in args.without:
        contenders[PYREFT] = pyreft = PyreftSteps(work, args.threads)
    if "lora" not in args.without:
        lora = Lora(work, n_steps=3) if args.quick else Lora(work)
        contenders |= {LORA: lora.step, LORA_FIXED: lora.fixed, LORA_STOPPED: lora.stopped}
    return Setting(work, contenders, passes, edit, lora, pyreft, streaming)


def measure(args: argparse.Namespace, sheet: Sheet) -> dict[str, Any]:
    """All settings, one after the other."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    host = load_host(args.model)
    streaming = Streaming((1 << 26) if args.quick else (1 << 30))
    rounds, results = n_rounds(args), {}
    for preset in args.presets:
        editor = BaftEditor(host, BaftEditor.preset(preset))
        edits = questions(data_folder(args.data), editor.encoder, rounds)
        for length in args.lengths:
            chosen = edits if length == "short" else [padded_out(edit, editor.encoder) for edit in edits]
            setting = prepare(args, Workload.of(editor, chosen), editor, streaming)
            sheet.tell(f"{preset}, {length} prompts: every contender once, not counted")
            alternate(setting.contenders, 1)
            for seen in (setting.edit.n_steps, setting.edit.decoded):
                seen.clear()
            for one in setting.passes.values():
                one.preparation_s.clear()
            if setting.lora is not None:
                setting.lora.forget()
            took = alternate(setting.contenders, rounds, tell=sheet.tell)
            results[f"{preset}/{length}"] = setting.results(took)
            if setting.pyreft is not None:
                setting.pyreft.close()
    return results


def show(sheet: Sheet, results: dict[str, Any]) -> None:
    """Two tables a setting."""
    for name, found in results.items():
        tokens = " and ".join(map(str, found["prompt_tokens"]))
        where = f"{name}: layers {found['layers']}, rank {found['rank']}, prompts of e.g. {tokens} tokens"
        rows = [(who, seconds(spread)) for who, spread in found["seconds"].items()]
        rows.append(("memory bound of a step", seconds(found["bound_s"])))
        sheet.table(where, ("one turn of", "median (quartiles)"), rows)
        sheet.table("ratios, round by round", ("", "median (quartiles)"), _ratio_rows(found["ratios"]))
        speed: Summary = found["bytes_per_s"]
        whole = found["whole_edit"]
        sheet.say(
            f"our step: {found['our_step_is']}; {found['bytes_above_first_site'] / 1e6:.0f} MB of weights "
            f"above the first site, memory read at {speed.median / 1e9:.1f} GB/s; "
            f"a whole edit took {whole['n_steps'].median:.0f} steps, {whole['decoded']:.0%} decoded\n"
        )


def _ratio_rows(found: dict[str, Summary]) -> list[tuple[str, str]]:
    return [(name, times(spread)) for name, spread in found.items()]


def options(argv: list[str] | None) -> argparse.Namespace:
    """What was asked for."""
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="folder of the benchmark files (default: $BAFT_DATA)")
    made.add_argument("--presets", nargs="+", choices=PRESETS, help="default: both, --quick: default alone")
    made.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
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
