"""The main job, on a real model: edit facts one by one and all together, and look at what changed.

    make demo                                          the facts of demo/facts.toml, which must hold the
                                                       bars, and eight of the benchmark `facts`, shown
    python demo/run.py --benchmark                     the latter alone, held to the bars; they miss one
    python demo/run.py --facts experiments/dev_facts.toml --set rank=8 --brief
                                                       the same on facts for choosing settings

Ends with exit code 0 only if what README promises holds (`BARS`). Everything is shown, the failures too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import baft
from baft.data.facts import Facts
from baft.types import DEFAULT_METHOD, EditCase

HERE = Path(__file__).parent
N_FACTS = 8  # of the benchmark
N_TOKENS = 20  # of every answer; of unrelated texts, all of them are compared
# Shares that must hold, each fact edited alone and all together.
BARS = {"edit": 1.0, "rephrasing": 0.75, "in chat": 0.75, "unrelated": 0.95}
HITS = (
    "edit",
    "rephrasing",
    "in chat",
    "chat question",
)  # scored by the target; the others by staying the same
# Prints the SHA-256 of next-token logits, so that two processes can be compared.
NEW_PROCESS = """
import hashlib, sys, torch, baft
torch.set_num_threads(int(sys.argv[1]))
model = baft.load(sys.argv[2])
for prompt in sys.argv[3:]:
    print(hashlib.sha256(model.logits(prompt).numpy().tobytes()).hexdigest())
"""


@dataclass(frozen=True)
class Probe:
    """A question about an edit."""

    kind: str
    prompt: str
    target: str
    chat: bool = False


@dataclass(frozen=True)
class Answer:
    """What the model says to a probe before and after, and how far the gates open."""

    probe: Probe
    before: str
    after: str
    gate: float

    @property
    def ok(self) -> bool:
        """The target and nothing after it; or, where nothing should change, the very same text."""
        if self.probe.kind in HITS:
            return self.after.strip().rstrip(".").lower() == self.probe.target.lower()
        return self.after == self.before


def read_facts(path: Path) -> list[dict]:
    return tomllib.loads(path.read_text(encoding="utf-8"))["fact"]


def facts_of_benchmark() -> list[dict]:
    """Facts of the benchmark `facts`, by a rule that was fixed before it was first run.

    Of each of the first relations of the report half, in the order of the file, the first fact that
    SmolLM2-135M-Instruct is recorded to know; with all its rephrasings, neighbors and ordinary texts.
    """
    benchmark = Facts()
    known = benchmark.known("smollm2")
    chosen: dict[str, EditCase] = {}
    for case in benchmark.cases("report"):
        relation = case.id.partition("/")[0]
        if known[case.id]:
            chosen.setdefault(relation, case)
    return [as_fact(case) for case in list(chosen.values())[:N_FACTS]]


def as_fact(case: EditCase) -> dict:
    """A case in the form of facts.toml."""

    def prompts(*tags: str) -> list[str]:
        return [probe.prompt for tag in tags for probe in case.probes if probe.tag == tag]

    return {
        "prompt": case.edit.prompt,
        "target": case.edit.target,
        "was": case.edit.ground_truth,
        "rephrasings": prompts("rephrase"),
        "neighbors": prompts("same_relation", "same_subject"),
        "unrelated": prompts("unrelated"),
        "question": prompts("chat_question")[0],
    }


def probes_of(fact: dict) -> list[Probe]:
    target = fact["target"]
    *same_relation, same_subject = fact["neighbors"]
    return [
        Probe("edit", fact["prompt"], target),
        *(Probe("rephrasing", text, target) for text in fact["rephrasings"]),
        *(Probe("same relation", text, target) for text in same_relation),
        Probe("same subject", same_subject, target),
        *(Probe("unrelated", text, target) for text in fact["unrelated"]),
        Probe("in chat", fact["prompt"], target, chat=True),
        Probe("chat question", fact["question"], target, chat=True),
    ]


def ask(model: baft.Model, probes: list[Probe]) -> dict[Probe, str]:
    """Answers in the order of the probes; before and after an edit the same prompts share a batch."""
    raw = [probe for probe in probes if not probe.chat]
    said = dict(
        zip(raw, model.generate([probe.prompt for probe in raw], max_new_tokens=N_TOKENS), strict=True)
    )
    for probe in probes:
        if probe.chat:
            messages = [{"role": "user", "content": probe.prompt}]
            said[probe] = model.generate(messages=messages, max_new_tokens=N_TOKENS)
    return {probe: said[probe] for probe in probes}


def mean_gate(model: baft.Model, probe: Probe) -> float:
    """Mean weight over bases and layers at the prompt's last token, of the edit that opens most there."""
    if probe.chat:
        read = model.explain(messages=[{"role": "user", "content": probe.prompt}], max_new_tokens=0)
    else:
        read = model.explain(probe.prompt, max_new_tokens=0)
    last = max((one.position for one in read), default=0)
    by_edit: dict[str | None, list[float]] = {}
    for one in read:
        if one.position == last:
            by_edit.setdefault(one.edit_id, []).extend(one.weights)
    return max((sum(weights) / len(weights) for weights in by_edit.values()), default=0.0)


def score(model: baft.Model, probes: list[Probe], before: dict[Probe, str]) -> list[Answer]:
    after = ask(model, probes)
    return [Answer(probe, before[probe], after[probe], mean_gate(model, probe)) for probe in probes]


def show(console: Console, title: str, answers: list[Answer], *, bold_first: bool = True) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", expand=True)
    for name, ratio in (("", 3), ("prompt", 9), ("before", 6), ("after", 6), ("gate", 1), ("", 1)):
        table.add_column(name, ratio=ratio, no_wrap=True, justify="right" if name == "gate" else "left")
    for answer in answers:
        hit = answer.probe.kind in HITS
        mark = Text("✓" if answer.ok else ("✗" if hit else "≠"), style="green" if answer.ok else "red")
        after = " ".join(answer.after.split())
        table.add_row(
            answer.probe.kind,
            answer.probe.prompt,
            " ".join(answer.before.split()),
            Text(after, style="bold" if hit and answer.ok else ""),
            f"{answer.gate:.2f}",
            mark,
        )
    console.print(table)


def tally(answers: list[Answer]) -> dict[str, tuple[int, int]]:
    kinds: dict[str, tuple[int, int]] = {}
    for answer in answers:
        n, of = kinds.get(answer.probe.kind, (0, 0))
        kinds[answer.probe.kind] = (n + answer.ok, of + 1)
    return kinds


def show_benchmark(console: Console, model: baft.Model, options: dict) -> None:
    """Facts of the benchmark, each edited alone; without bars, for its rephrasings miss theirs."""
    answers: list[Answer] = []
    for fact in facts_of_benchmark():
        probes = probes_of(fact)
        before = ask(model, probes)
        model.edit(fact["prompt"], fact["target"], **options)
        answers += score(model, probes, before)
        model.undo()
    title = f"{N_FACTS} facts of the benchmark `facts`, alone; shown, without bars"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("", "scored by", "alone"):
        table.add_column(name, justify="right" if name == "alone" else "left")
    for kind, (n, of) in tally(answers).items():
        table.add_row(kind, scored_by(kind), f"{n}/{of}")
    console.print(table)


def scored_by(kind: str) -> str:
    return "the target, and then it stops" if kind in HITS else "text identical to before"


def same_in_new_process(model: baft.Model, path: Path, prompts: list[str]) -> bool:
    """Both on as many threads: rounding depends on it, and libraries count theirs each by itself."""
    import hashlib

    torch.set_num_threads(torch.get_num_threads())
    command = [sys.executable, "-c", NEW_PROCESS, str(torch.get_num_threads()), str(path), *prompts]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    mine = [hashlib.sha256(model.logits(prompt).numpy().tobytes()).hexdigest() for prompt in prompts]
    return done.stdout.split() == mine


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--facts", type=Path, default=HERE / "facts.toml")
    parser.add_argument("--benchmark", action="store_true", help="facts of the benchmark `facts` instead")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--method", default=DEFAULT_METHOD)
    parser.add_argument("--preset", default="default")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, value in JSON"
    )
    parser.add_argument("--brief", action="store_true", help="only the counts")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    began = time.monotonic()
    settings = {key: json.loads(value) for key, _, value in (item.partition("=") for item in args.set)}
    options = {"method": args.method, "preset": args.preset, **settings}
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    facts = facts_of_benchmark() if args.benchmark else read_facts(args.facts)

    model = baft.load(args.model)
    console.print(
        f"[bold]{model.label}[/bold], {len(facts)} facts, {args.method}/{args.preset} {settings or ''}\n"
    )
    plan = [(fact, probes_of(fact)) for fact in facts]
    before = {probe: said for _, probes in plan for probe, said in ask(model, probes).items()}
    untouched = {prompt: model.logits(prompt) for prompt in (fact["prompt"] for fact in facts)}

    alone: list[Answer] = []
    seconds = []
    for fact, probes in plan:
        report = model.edit(fact["prompt"], fact["target"], **options)
        seconds.append(report.seconds_s)
        answers = score(model, probes, before)
        alone += answers
        if not args.brief:
            took = f"{report.n_steps} steps, {report.seconds_s:.1f} s"
            show(console, f"{fact['was']} → {fact['target']}, alone ({took})", answers)
        model.undo()

    for fact in facts:
        model.edit(fact["prompt"], fact["target"], **options)
    together = [answer for _, probes in plan for answer in score(model, probes, before)]
    if not args.brief:
        show(console, f"All {len(facts)} together", together)

    prompts = [fact["prompt"] for fact in facts]
    with tempfile.TemporaryDirectory() as folder:
        path = model.save(Path(folder) / "demo.baft")
        n_bytes = sum(file.stat().st_size for file in path.iterdir())
        reloads = same_in_new_process(model, path, prompts)
    model.undo(len(facts))
    undone = all(torch.equal(model.logits(prompt), logits) for prompt, logits in untouched.items())

    counts = {"alone": tally(alone), "together": tally(together)}
    table = Table(title="Summary", title_justify="left", title_style="bold")
    for name in ("", "scored by", "bar", "alone", "together"):
        table.add_column(name, justify="left" if name in ("", "scored by") else "right")
    failed = []
    for kind in counts["alone"]:
        bar = BARS.get(kind)
        cells = []
        for setting, kinds in counts.items():
            n, of = kinds[kind]
            good = bar is None or n >= bar * of
            if not good:
                failed.append(f"{kind} {setting}: {n}/{of}")
            cells.append(Text(f"{n}/{of}", style="" if bar is None else ("green" if good else "red")))
        table.add_row(kind, scored_by(kind), "shown" if bar is None else f"{bar:.0%}", *cells)
    console.print(table)
    for good, what in (
        (reloads, f"saved ({n_bytes / 1024:.0f} KiB), loaded in a new process: the same logits, bit for bit"),
        (undone, "undone: the host's logits, bit for bit"),
    ):
        console.print(Text(f"{'✓' if good else '✗'} {what}", style="green" if good else "red"))
        if not good:
            failed.append(what)
    if args.facts == HERE / "facts.toml" and not args.benchmark:
        show_benchmark(console, model, options)
    mean_s, total_s = sum(seconds) / len(seconds), time.monotonic() - began
    console.print(f"an edit with its report took {mean_s:.1f} s on average; the whole demo {total_s:.0f} s")
    if args.json:
        args.json.write_text(
            json.dumps({"settings": settings, "counts": counts, "failed": failed}, indent=1) + "\n"
        )
    for what in failed:
        console.print(f"[red]missed: {what}[/red]")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
