"""An experiment: one TOML file that says what is run, and the tasks that it comes to."""

import random
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from baft.config import from_dict, read_toml
from baft.data.base import Benchmark, benchmarks
from baft.data.overlap import apart
from baft.errors import ConfigError
from baft.types import EditCase, Probe

Scorer = Literal["teacher_forced", "generate", "generate_chat", "chat_questions", "gates", "fluency", "cost"]
Rendering = Literal[
    "distracting_prefix",
    "after_unrelated_tokens",
    "after_unrelated_words",
    "negated",
    "doubted",
    "in_conversation",
]
Stage = Literal["immediate", "final"]


def is_rendering(tag: str) -> bool:
    """Whether a tag is that of a probe asked in a harder way, such as `rephrase+negated`."""
    _, plus, how = tag.rpartition("+")
    return bool(plus) and how in get_args(Rendering)


@dataclass(frozen=True, kw_only=True)
class OthersSpec:
    """Further edits, made after those of a sequence and in force with them, that are not asked.

    Args:
        name: A registered benchmark.
        split: One of its splits; None takes its first.
        n: How many.

    Raises:
        ConfigError: If that is not positive.
    """

    name: str
    split: str | None = None
    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"n of the other edits, from {self.name!r}, must be at least 1, got {self.n}")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The cases of a benchmark.

    Args:
        cases: Those that are asked, with the probes that are.
        others: Those whose edits are made after them and in force with them.
        sources: Where the others are from: benchmark with its split, fingerprint, how many.
        left_out: What was left out as bearing on others, counted by reason.
    """

    cases: tuple[EditCase, ...]
    others: tuple[EditCase, ...] = ()
    sources: tuple[Mapping[str, Any], ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BenchmarkSpec:
    """Which cases.

    Args:
        name: A registered benchmark.
        split: One of its splits; None takes its first.
        limit: How many cases; None takes all.
        seed: Draws the cases from the split; None takes them in the order of the file.
        file: For `jsonl`: the file.
        probes_per_tag: Of each case no more probes of one kind and tag than this; None asks all.
        apart: Leave out cases that bear on earlier ones, for edits that are in force together; the limit
            counts those that are left.
        others: Edits beside those of a sequence; they bear neither on these nor on each other.

    Raises:
        ConfigError: If a number is not positive, or there are others though cases may bear on each other.
    """

    name: str
    split: str | None = None
    limit: int | None = None
    seed: int | None = None
    file: str | None = None
    probes_per_tag: int | None = None
    apart: bool = False
    others: tuple[OthersSpec, ...] = ()

    def __post_init__(self) -> None:
        for name in ("limit", "probes_per_tag"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} of benchmark {self.name!r} must be at least 1, got {value}")
        if self.others and not self.apart:
            raise ConfigError(
                f"benchmark {self.name!r} has others, which must not bear on it: set apart = true"
            )

    def chosen(self, benchmark: Benchmark, split: str, data: Path | None) -> Chosen:
        """The cases of a split.

        Args:
            benchmark: The benchmark.
            split: Its split.
            data: Where the files of the others are looked for.

        Raises:
            ConfigError: If there are not so many others, or a split of them stands twice.
        """
        left_out: dict[str, int] = {}
        others: tuple[EditCase, ...] = ()
        sources: tuple[Mapping[str, Any], ...] = ()
        if self.apart:
            found, left_out = apart(benchmark.cases(split, seed=self.seed), self.limit)
        else:
            found = benchmark.cases(split, limit=self.limit, seed=self.seed)
        for spec in self.others:
            source = benchmarks.get(spec.name)(data)
            of = source.splits[0] if spec.split is None else spec.split
            if any(one["cases"] == f"{spec.name}/{of}" for one in sources):
                raise ConfigError(f"the others of {self.name!r} name {spec.name}/{of} twice: name it once")
            found, others, more = _with_others(found, others, source.cases(of), spec.n, f"{spec.name}/{of}")
            left_out |= more
            about = {"cases": f"{spec.name}/{of}", "fingerprint": source.fingerprint(of), "n": spec.n}
            sources = (*sources, about)
        if self.probes_per_tag is not None:
            n = self.probes_per_tag
            found = tuple(replace(case, probes=_first_of_each(case.probes, n)) for case in found)
        return Chosen(found, others, sources, left_out)

    def load(self, data: Path | None) -> Benchmark:
        """The benchmark, whose files are looked for in `data`."""
        return benchmarks.get(self.name)(Path(self.file).expanduser() if self.file else data)


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """Which method.

    Args:
        name: A registered method.
        preset: One of its presets.
        settings: Single settings in place of the preset's.
        label: What the tables call it; None makes one of name and preset.
    """

    name: str
    preset: str = "default"
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None

    @property
    def called(self) -> str:
        """Its name in tables and records."""
        return self.label or (self.name if self.preset == "default" else f"{self.name}/{self.preset}")


@dataclass(frozen=True, kw_only=True)
class ProtocolSpec:
    """How edits follow each other.

    Args:
        kind: `single`: each edit on the untouched host. `batched`: `size` edits in one optimization.
            `sequential`: `size` edits one after another on one model, each scored right after it was made
            and again after the last. After each chunk the host is untouched again.
        size: Edits in a chunk, a benchmark's others among them; the last chunk may be smaller.
        immediate: What is asked right after each edit of a sequence: all probes; the edit's own prompt
            alone, for a tenth of the cost; or nothing, and then edits that do not know each other (capability
            `independent`) are made a hundred at once.

    Raises:
        ConfigError: If the size is not positive, or given for `single`.
    """

    kind: Literal["single", "batched", "sequential"]
    size: int = 1
    immediate: Literal["all", "reliability", "none"] = "all"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"a protocol's size is at least 1, got {self.size}")
        if self.kind == "single" and self.size != 1:
            raise ConfigError(
                f"single edits come one at a time, got size={self.size}: use batched or sequential"
            )
        if self.kind != "sequential" and self.immediate != "all":
            raise ConfigError(
                f"{self.kind} edits are scored once, got immediate={self.immediate!r}: leave it out"
            )

    @property
    def called(self) -> str:
        """Its name in tables and records, such as `sequential(100)`."""
        return self.kind if self.kind == "single" else f"{self.kind}({self.size})"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is run: every method on every benchmark by every protocol with every seed.

    Args:
        name: Names the record.
        benchmarks: The cases.
        methods: The methods. The unedited host needs none: it is scored beside every case.
        protocols: How edits follow each other.
        model: The host.
        dtype: Its precision; None takes its own.
        seeds: Of the methods; but for 0, they also draw the order in which a chunk's edits are made.
        scorers: What is asked. Teacher-forced predictions also carry the locality scores on logits;
            `generate_chat` asks everything in the chat template too, `chat_questions` only what is a question
            for the chat, which costs half; `gates` reads how far the gates open at the last token of each
            prompt, `fluency` how varied a text of 100 tokens is that the model writes after each edit's
            prompt, and `cost` what memory and what room in an artifact an edit takes.
        renderings: Harder ways in which the edit's own prompt and its first rephrasing are asked too; their
            scores stand by tag and count in no other figure. `doubted` asks "Are you sure?" after the reply
            to the edit's own prompt in chat.
        max_new_tokens: Length limit of replies to short targets.
        batch_size: Rows that the host is asked at once; part of what floating point rounds.
        stack: Single edits that are made and asked at once, each under itself alone, by methods that can.
        texts: How many held-out texts of 100 tokens or more are scanned for changes, and their perplexity
            taken, after each chunk of edits (from `general/wikitext-2-test.txt` in the data folder).

    Raises:
        ConfigError: If something is missing or stands twice, or goes only with something else.
    """

    name: str
    benchmarks: tuple[BenchmarkSpec, ...]
    methods: tuple[MethodSpec, ...]
    protocols: tuple[ProtocolSpec, ...] = (ProtocolSpec(kind="single"),)
    model: str = "smollm2"
    dtype: str | None = None
    seeds: tuple[int, ...] = (0,)
    scorers: tuple[Scorer, ...] = ("teacher_forced", "generate", "generate_chat", "gates")
    renderings: tuple[Rendering, ...] = ()
    max_new_tokens: int = 16
    batch_size: int = 64
    stack: int = 25
    texts: int = 0

    def __post_init__(self) -> None:
        named: dict[str, list[Any]] = {
            "benchmarks": [(one.name, one.split) for one in self.benchmarks],
            "methods": [one.called for one in self.methods],
            "protocols": [one.called for one in self.protocols],
            "seeds": list(self.seeds),
            "scorers": list(self.scorers),
            "renderings": list(self.renderings),
        }
        for name, found in named.items():
            if not found and name != "renderings":
                raise ConfigError(f"experiment {self.name!r} has no {name}: give at least one")
            twice = next((one for one in found if found.count(one) > 1), None)
            if twice is not None:
                raise ConfigError(f"experiment {self.name!r}: {twice!r} stands twice among the {name}")
        in_chat = [one for one in self.renderings if one in ("doubted", "in_conversation")]
        if in_chat and "generate_chat" not in self.scorers:
            raise ConfigError(
                f"experiment {self.name!r}: the rendering {in_chat[0]!r} is asked in chat: add "
                "'generate_chat' to scorers"
            )
        for name in ("max_new_tokens", "batch_size", "stack"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.texts < 0:
            raise ConfigError(f"texts must be 0 or more, got {self.texts}")
        for one in self.benchmarks:
            n = sum(spec.n for spec in one.others)
            if n and not all(one.kind == "sequential" and one.size > n for one in self.protocols):
                raise ConfigError(
                    f"the {n} others of benchmark {one.name!r} come after edits in sequence: give protocols "
                    "of kind sequential alone, and as size the number of all edits together"
                )


def _first_of_each(probes: Sequence[Probe], n: int) -> tuple[Probe, ...]:
    """The first `n` probes of each kind and tag."""
    counts: Counter[tuple[str, str]] = Counter()
    kept = []
    for probe in probes:
        counts[probe.kind, probe.tag] += 1
        if counts[probe.kind, probe.tag] <= n:
            kept.append(probe)
    return tuple(kept)


def _with_others(
    cases: tuple[EditCase, ...],
    before: tuple[EditCase, ...],
    given: Sequence[EditCase],
    n: int,
    where: str,
) -> tuple[tuple[EditCase, ...], tuple[EditCase, ...], dict[str, int]]:
    """Cases without what others change of them, the others with `n` more of them, and what was left out."""
    more = [  # of the others nothing is asked, but their rephrasings are nobody's locality questions
        replace(one, probes=tuple(probe for probe in one.probes if probe.kind == "generality"))
        for one in given
    ]
    there = (*cases, *before)
    found, left_out = apart([*there, *more], len(there) + n)
    n_found = len(found) - len(there)
    if n_found < n:
        raise ConfigError(
            f"{n} others were wanted, and {where} has {n_found} that do not bear on the cases or on each "
            "other: take as many"
        )
    return found[: len(cases)], found[len(cases) :], {f"{where}: {why}": k for why, k in left_out.items()}


def read_experiment(path: Path) -> Experiment:
    """Reads an experiment file.

    Raises:
        ConfigError: If it cannot be read, or something in it is unknown, missing or wrong.
    """
    return from_dict(Experiment, {"name": path.stem, **read_toml(path)}, where=str(path))


def default_experiment() -> Experiment:
    """What is run where no file is named: a quick look at the project's own facts (`default.toml`)."""
    text = files("baft.evals").joinpath("default.toml").read_text(encoding="utf-8")
    return from_dict(Experiment, tomllib.loads(text), where="default.toml")


@dataclass(frozen=True, slots=True)
class Task:
    """A chunk of cases under one protocol and seed, for every method in turn.

    Args:
        id: Its name in the record.
        benchmark: The benchmark with its split, as `facts/report`.
        protocol: The protocol.
        seed: The seed.
        chunk: The number of the chunk.
        cases: The cases, in the order in which they are edited.
        others: Those whose edits are made after them, and which are not asked.
    """

    id: str
    benchmark: str
    protocol: ProtocolSpec
    seed: int
    chunk: int
    cases: tuple[EditCase, ...]
    others: tuple[EditCase, ...] = ()


def tasks_of(experiment: Experiment, chosen: Mapping[str, Chosen]) -> Iterator[Task]:
    """All tasks, in the order in which they are run and recorded.

    Args:
        experiment: The experiment.
        chosen: The cases by benchmark with its split.
    """
    for benchmark, found in chosen.items():
        for protocol in experiment.protocols:
            for seed in experiment.seeds:
                ordered = list(found.cases)
                if seed and protocol.kind != "single":
                    random.Random(seed).shuffle(ordered)
                size = experiment.stack if protocol.kind == "single" else protocol.size - len(found.others)
                for chunk, start in enumerate(range(0, len(ordered), size)):
                    name = f"{benchmark}:{protocol.called}:seed{seed}:{chunk}"
                    here = tuple(ordered[start : start + size])
                    yield Task(name, benchmark, protocol, seed, chunk, here, found.others)
