"""One whole edit of 15 steps on a host of LLaMA-2-7B's shape in bfloat16, with random weights.

    python benchmarks/scale_7b.py --json scale_7b.json

The weights (13.5 GB) are filled from one small random block, which takes seconds; what they say means
nothing, and what they cost is what real ones cost. The bar is the whole process within 22 GiB. Two
settings are run: ReFT at the paper's four layers (open gates, which need no background), and baft's
default preset, whose gates are set against a part of the background text, made before and timed apart: it
is made once for a host. The bandwidth bound is the weights read once for the prefix and, above the first
site, twice a step, at the speed at which this machine reads a buffer far larger than its caches.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from baft.evals.cost import give_back, peak_above
from baft.hosts import background
from baft.hosts.models import Host, load_host
from baft.methods.baft import BaftEditor, ReftEditor
from baft.types import Edit, EditRequest
from contenders import Streaming
from harness import Sheet, document, parser, seconds, summarize, timed, write
from workload import bytes_above, host_bytes

N_STEPS = 15
N_EDITS = 3  # the first one also warms the kernels; all are given
BAR_BYTES = 22 << 30
N_BLOCK = 1_000_003  # a prime, so that no two rows of a weight are the same
SETTINGS = ("reft/paper", "baft/default")
PROMPT, TARGETS = "the capital of the country where the tower that we saw stands is", ("Rome", "Lima", "Oslo")
SPECIALS = ("<unk>", "<s>", "</s>")


def shape(*, quick: bool) -> LlamaConfig:
    """LLaMA-2-7B's, or a small one."""
    common = {"vocab_size": 32_000, "max_position_embeddings": 4096}
    small = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 4}
    made: Any = LlamaConfig
    found: LlamaConfig = made(**common, **(small if quick else {}))
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, for the words of the edits; every other word is unknown."""
    words = dict.fromkeys([*SPECIALS, *PROMPT.split(), *TARGETS])
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


@torch.no_grad()
def random_host(config: LlamaConfig) -> Host:
    """A host that is never written down anywhere: empty weights, filled from one block."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers were empty as well
    generator = torch.Generator().manual_seed(0)
    block = (0.02 * torch.randn(N_BLOCK, generator=generator)).bfloat16()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            flat = module.weight.view(-1)
            for start in range(0, flat.numel(), N_BLOCK):
                part = flat[start : start + N_BLOCK]
                part.copy_(block[: part.numel()])
        else:  # the norms
            for parameter in module.parameters(recurse=False):
                parameter.fill_(1.0)
    model.eval().requires_grad_(False)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return load_host((model, tokenizer()))


def short_background(n_sentences: int) -> Mapping[str, Any]:
    """The first sentences and prompts of the background text; all of it would take a 7B host many minutes."""
    return {kind: texts[:n_sentences] for kind, texts in background.background_text().items()}


def editor_of(setting: str, host: Host) -> BaftEditor:
    """An editor that takes exactly `N_STEPS` steps."""
    method, _, preset = setting.partition("/")
    kind = {"reft": ReftEditor, "baft": BaftEditor}[method]
    config = replace(kind.preset(preset), max_steps=N_STEPS, stop_margin=None, stop_loss=None)
    return kind(host, config)


def run(setting: str, host: Host, speed: float, sheet: Sheet) -> dict[str, Any]:
    """Some edits by one setting."""
    editor = editor_of(setting, host)
    give_back()
    sheet.tell(f"{setting}: what is made once for a host")
    once_s = 0.0
    if editor.config.gate != "open":
        once_s = timed(lambda: background.background(host, editor.encoder, editor.sites))
    took, above, whole, steps = [], [], [], []
    for target in TARGETS[:N_EDITS]:
        sheet.tell(f"{setting}: an edit of {N_STEPS} steps")
        seen: dict[str, Any] = {}

        def edit(target: str = target, seen: dict[str, Any] = seen) -> None:
            began = time.perf_counter()
            seen["outcome"] = editor.apply(EditRequest((Edit(PROMPT, target),)))
            seen["took"] = time.perf_counter() - began

        peak = peak_above(edit)
        above.append(peak.above)
        whole.append(peak.whole_process)
        took.append(seen["took"])
        steps.append(seen["outcome"].n_steps)
        editor.reset()
    n_above = bytes_above(host.model, editor.sites[0])
    bound_s = (host_bytes(host.model) + 2 * N_STEPS * n_above) / speed
    return {
        "layers": [site.layer for site in editor.sites],
        "once_for_a_host_s": once_s,
        "edit_s": summarize(took),
        "n_steps": steps,
        "why_full": seen["outcome"].why_full,
        "bytes_above_first_site": n_above,
        "bound_s": bound_s,
        "share_of_bound": summarize([bound_s / one for one in took]),
        "edit_bytes_above_the_host": summarize(above),
        "peak_of_process": max(whole),
    }


def measure(args: argparse.Namespace, sheet: Sheet) -> dict[str, Any]:
    """The host, the memory's speed, and every setting."""
    torch.set_num_threads(args.threads)
    streaming = Streaming((1 << 26) if args.quick else (1 << 30))
    speed = streaming.n_bytes / min(min(streaming.sum(i), streaming.product(i)) for i in range(5))
    del streaming
    sheet.tell("filling the host")
    began = time.perf_counter()
    host = random_host(shape(quick=args.quick))
    made_s = time.perf_counter() - began
    text = short_background(args.background)
    with mock.patch.object(background, "background_text", return_value=text):
        settings = {setting: run(setting, host, speed, sheet) for setting in args.settings}
    return {
        "host_bytes": host_bytes(host.model),
        "host_made_s": made_s,
        "bytes_per_s": speed,
        "background_sentences": args.background,
        "settings": settings,
        "peak_of_process": max(one["peak_of_process"] for one in settings.values()),
        "bar_bytes": BAR_BYTES,
    }


def main(argv: list[str] | None = None) -> int:
    """Measures, shows and writes."""
    made = parser(__doc__, model=None)
    made.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    made.add_argument(
        "--background", type=int, default=16, help="texts of each kind that gates are set against"
    )
    args, sheet = made.parse_args(argv), Sheet()
    results = measure(args, sheet)
    rows = [
        (
            setting,
            str(found["layers"]),
            seconds(found["edit_s"]),
            f"{found['bound_s']:.2f} s",
            f"{found['share_of_bound'].median:.0%}",
            f"{found['edit_bytes_above_the_host'].maximum / 1e6:.0f} MB",
            f"{found['once_for_a_host_s']:.1f} s",
        )
        for setting, found in results["settings"].items()
    ]
    columns = (
        "",
        "layers",
        f"edit of {N_STEPS} steps",
        "bound",
        "share of it",
        "above the host",
        "background",
    )
    sheet.table(f"random host of {results['host_bytes'] / 1e9:.2f} GB in bfloat16", columns, rows)
    for setting, found in results["settings"].items():
        if found["why_full"] is not None:
            sheet.say(f"{setting} ran the whole host at every step: {found['why_full']}")
    peak = results["peak_of_process"]
    sheet.say(
        f"memory read at {results['bytes_per_s'] / 1e9:.1f} GB/s; "
        f"peak of the process {peak / 2**30:.2f} GiB, bar 22 GiB: {'held' if peak <= BAR_BYTES else 'missed'}"
    )
    write(args.json, document("scale_7b", args, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
