"""Where the time of one training step goes: the kernels of our cheap pass, by what they do.

    BAFT_DATA=<folder> python benchmarks/step_profile.py --json step_profile.json

Ten steps of one short edit run under torch's profiler, which takes time itself: shares count, not seconds.
What no kernel accounts for is the rest: Python, autograd's bookkeeping, and the profiler. Beside it stands
the time that the products with frozen weights take outside of any model, as often, in the same shapes: what
a step would cost if all else were free.
"""

import argparse
import re
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from baft.hosts.architecture import find_architecture
from baft.hosts.kernels import fast_linears
from baft.hosts.models import load_host
from baft.hosts.positions import PositionSpec
from baft.hosts.suffix import SuffixPass
from baft.methods.baft import BaftEditor
from baft.methods.training import train
from contenders import PassSteps
from harness import Sheet, document, n_rounds, parser, seconds, summarize, write
from workload import Workload, data_folder, questions

N_STEPS = 10
KINDS = {  # the first that fits
    "products with frozen weights": r"mkldnn::_linear_pointwise|aten::linear$",
    "attention": r"scaled_dot_product",
    "cross-entropy and margins over the vocabulary": r"log_softmax|nll_loss|amax|scatter|logsumexp",
    "other products (gates, bases, optimizer)": r"aten::(mm|bmm|addmm|baddbmm|dot)$|cholesky|triangular",
    "copies, fills and gathers": r"copy_|fill_|cat$|index|gather|zero_",
    "element by element (norms, activations, Adam)": r"aten::",
}


class Products:
    """The products of a step with frozen weights, forward and backward to the input, outside of the model."""

    def __init__(self, editor: BaftEditor, n_rows: int, n_targets: int):
        architecture = find_architecture(editor.host.model)
        blocks = architecture.blocks[min(editor.sites).layer + 1 :]
        host: Any = editor.host.model
        head = host.get_output_embeddings()
        self.work = [
            (module.weight, torch.randn(n_rows, module.in_features))
            for block in blocks
            for module in block.modules()
            if isinstance(module, torch.nn.Linear)
        ]
        self.work.append((head.weight, torch.randn(n_targets, head.in_features)))

    @torch.no_grad()
    def __call__(self) -> float:
        """Seconds of all of them."""
        with fast_linears():
            began = time.perf_counter()
            for weight, states in self.work:
                torch.nn.functional.linear(torch.nn.functional.linear(states, weight), weight.T)
            return time.perf_counter() - began


def measure(args: argparse.Namespace, sheet: Sheet) -> dict[str, Any]:
    """Shares of a step by kind of kernel, and the bare products."""
    torch.set_num_threads(args.threads)
    editor = BaftEditor(load_host(args.model), BaftEditor.preset("default"))
    work = Workload.of(editor, questions(data_folder(args.data), editor.encoder, 1))
    steps = PassSteps(work, SuffixPass)
    config = replace(work.config, max_steps=N_STEPS, stop_margin=None, stop_loss=None)
    positions = PositionSpec(work.config.last_prompt, work.config.outputs)
    run = SuffixPass(work.host, work.encoder, positions, work.texts(0), work.sites)
    train(run, steps._parts(), {}, config)  # warm
    sheet.tell(f"{N_STEPS} steps under the profiler")
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        began = time.perf_counter()
        train(run, steps._parts(), {}, config)
        took = time.perf_counter() - began
    spent: dict[str, float] = defaultdict(float)
    for one in seen.key_averages():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, one.key)), None)
        if kind is not None:
            spent[kind] += one.self_cpu_time_total / 1e6
    spent["the rest: Python, autograd, the profiler"] = took - sum(spent.values())
    n_rows = run._ids.numel()
    products = Products(editor, n_rows, len(run.targets))
    sheet.tell("the products alone")
    products()
    alone = [products() for _ in range(n_rounds(args))]
    plain = [steps(0) for _ in range(n_rounds(args))]
    return {
        "rows": n_rows,
        "target_tokens": len(run.targets),
        "share": {kind: seconds / took for kind, seconds in sorted(spent.items(), key=lambda one: -one[1])},
        "step_s": summarize(plain),
        "products_alone_s": summarize(alone),
    }


def main(argv: list[str] | None = None) -> int:
    """Measures, shows and writes."""
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="folder of the benchmark files (default: $BAFT_DATA)")
    args, sheet = made.parse_args(argv), Sheet()
    results = measure(args, sheet)
    rows = [(kind, f"{share:.0%}") for kind, share in results["share"].items()]
    shape = f"{results['rows']} rows through the blocks, {results['target_tokens']} through the head"
    sheet.table(f"{args.model}, one step: {shape}", ("where the time goes", "share"), rows)
    sheet.say(
        f"a step without the profiler {seconds(results['step_s'])}, its products with frozen weights alone "
        f"{seconds(results['products_alone_s'])}"
    )
    write(args.json, document("step_profile", args, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
