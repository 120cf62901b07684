"""Running an experiment: edits are made, every probe is asked before and after, and a row a case is kept."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from baft import config
from baft.data.base import Benchmark
from baft.errors import ConfigError, DataError, EditError, InputError
from baft.evals.asking import Asker, Observation
from baft.evals.beyond import Beyond
from baft.evals.experiment import Experiment, MethodSpec, Stage, Task, tasks_of
from baft.evals.records import Record, Row, sole_writer
from baft.evals.renderings import with_renderings
from baft.evals.scoring import measure
from baft.hosts.edited_model import EditedModel
from baft.hosts.identity import identify
from baft.hosts.models import Host, load_host
from baft.methods.base import Editor, EditOutcome, methods
from baft.types import EditCase, EditRequest, Probe

HELD_OUT = "general/wikitext-2-test.txt"
_TEXT_WORDS = 80  # a paragraph this long has 100 tokens
_CASES_AT_ONCE = 25  # asked in one call; their probes share batches
_PROBES_KEPT = 3500  # of the untouched host, whose logits take up to 1.6 MB a locality probe
_PACKAGES = ("baft", "torch", "transformers", "tokenizers", "numpy", "peft")

OnBlock = Callable[[int, int, str], None]  # blocks done, blocks in all, the one that was done


class Bench:
    """Runs the tasks of one experiment on one host.

    Args:
        experiment: What is run.
        data: The folder of the public files; None where no benchmark needs one.
        host: The host; None loads the experiment's.

    Raises:
        ConfigError: If a benchmark, a method, a preset or a setting is not known.
        DataError: If a file is missing or malformed.
    """

    def __init__(self, experiment: Experiment, *, data: Path | None = None, host: Host | None = None):
        self.experiment, self.data = experiment, data
        self.settings = {
            spec.called: methods.get(spec.name).configured(spec.preset, spec.settings)
            for spec in experiment.methods
        }
        self.benchmarks: dict[str, Benchmark] = {}
        self.cases: dict[str, tuple[EditCase, ...]] = {}
        for spec in experiment.benchmarks:
            benchmark = spec.load(data)
            split = benchmark.splits[0] if spec.split is None else spec.split
            name = f"{benchmark.name}/{split}"
            if name in self.benchmarks:
                raise ConfigError(f"{name} stands twice among the benchmarks, once by default: name it once")
            self.benchmarks[name] = benchmark
            self.cases[name] = spec.cases(benchmark, split)
        texts = held_out_texts(data, experiment.texts)
        self.host = load_host(experiment.model, dtype=experiment.dtype) if host is None else host
        self._asker = Asker(
            self.host,
            batch_size=experiment.batch_size,
            max_new_tokens=experiment.max_new_tokens,
            chat="generate_chat" in experiment.scorers,
        )
        encoder = self._asker.speaker.encoder
        for name, found in self.cases.items():
            self.cases[name] = tuple(with_renderings(case, experiment.renderings, encoder) for case in found)
        self.tasks = tuple(tasks_of(experiment, self.cases))
        self._beyond = Beyond(self.host, texts, batch_size=experiment.batch_size)
        self._wanted = frozenset(experiment.scorers) - {"gates", "fluency"}
        self._editors: dict[tuple[str, int], Editor] = {}
        self._before: dict[tuple[Probe, ...], Sequence[Observation]] = {}

    @property
    def blocks(self) -> list[tuple[Task, MethodSpec]]:
        """What there is to do: every method on every task, in order."""
        return [(task, method) for task in self.tasks for method in self.experiment.methods]

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """All that a row depends on, and where and when it was made."""
        identity = identify(self.host)
        return {
            "experiment": config.to_dict(self.experiment),
            "settings": {name: config.to_dict(found) for name, found in self.settings.items()},
            "host": {
                "label": self.host.label,
                "weights": identity.weights_hash,
                "config": identity.config_hash,
                "tokenizer": identity.tokenizer_hash,
                "dtype": identity.dtype,
            },
            "benchmarks": {
                name: {
                    "fingerprint": benchmark.fingerprint(name.partition("/")[2]),
                    "anomalies": dict(benchmark.anomalies(name.partition("/")[2])),
                    "n_cases": len(self.cases[name]),
                }
                for name, benchmark in self.benchmarks.items()
            },
            "versions": _versions(),
            "git": _git_revision(),
            "machine": {
                "system": platform.platform(),
                "processor": _processor(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "device": str(self.host.model.device),
            },
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def run(self, folder: Path, *, on_block: OnBlock | None = None) -> Record:
        """Runs whatever the record in `folder` does not hold yet.

        Raises:
            ConfigError: If the folder holds a record of something else, or another process writes it.
            DataError: If the disk refuses.
        """
        with sole_writer(folder):
            record = Record(folder, self.manifest)
            blocks = self.blocks
            left = [(task, method) for task, method in blocks if (task.id, method.called) not in record.done]
            for n, (task, method) in enumerate(left, start=len(blocks) - len(left) + 1):
                record.append(self.block(task, method))
                if on_block:
                    on_block(n, len(blocks), f"{method.called} on {task.id}")
            # Some may have come from elsewhere, in another order.
            record.sort([(task.id, method.called) for task, method in blocks])
        return record

    def block(self, task: Task, method: MethodSpec) -> list[Row]:
        """The rows of one method on one task: one a case and stage."""
        editor = self._editor(method, task.seed)
        editor.reset()
        rows: list[Row] = []

        def score(cases: Sequence[EditCase], made: Sequence["_Made"], stage: Stage, first: int = 0) -> None:
            lone = task.protocol.immediate == "reliability" and stage == "immediate"
            for place, (case, found) in enumerate(self._probe_rows(editor, cases, lone=lone)):
                rows.append(
                    {
                        "task": task.id,
                        "method": method.called,
                        "benchmark": task.benchmark,
                        "protocol": task.protocol.called,
                        "seed": task.seed,
                        "chunk": task.chunk,
                        "stage": stage,
                        "position": first + place,
                        "case": case.id,
                        "edit": case.edit.to_dict(),
                        **made[place].as_row(case),
                        "probes": found,
                    }
                )

        if task.protocol.kind == "sequential":
            made: list[_Made] = []
            for position, case in enumerate(task.cases):
                made.append(_make(editor, [case]))
                score([case], made[-1:], "immediate", position)
            score(task.cases, made, "final")
        else:
            score(task.cases, [_make(editor, task.cases)] * len(task.cases), "immediate")
        rows[-1] |= self._beyond.on_texts(editor.edited)
        if "fluency" in self.experiment.scorers:
            prompts = [case.edit.prompt for case in task.cases]
            last = rows[-len(prompts) :]
            for row, found in zip(last, self._beyond.fluency(editor.edited, prompts), strict=True):
                row |= found
        editor.reset()
        return rows

    def _probe_rows(
        self, editor: Editor, cases: Sequence[EditCase], *, lone: bool
    ) -> Iterator[tuple[EditCase, list[Row]]]:
        """What is kept of the probes of each case; those of several cases are asked together.

        Args:
            editor: The edits in force.
            cases: The cases.
            lone: Whether the edits' own prompts alone are asked.
        """
        for start in range(0, len(cases), _CASES_AT_ONCE):
            chunk = cases[start : start + _CASES_AT_ONCE]
            probes = [probe for case in chunk for probe in (case.all_probes[:1] if lone else case.all_probes)]
            before = self._untouched(tuple(probes))
            after = self._asker.observe(editor.edited, probes, self._wanted, before=before)
            if "doubted" in self.experiment.renderings:
                after = self._asker.doubt(editor.edited, probes, after)
            found = dict(zip(probes, zip(before, after, strict=True), strict=True))
            for case in chunk:
                asked = [probe for probe in case.all_probes if probe in found]
                yield (
                    case,
                    [_probe_row(case, probe, *found[probe]) | self._gate(editor, probe) for probe in asked],
                )

    def _editor(self, method: MethodSpec, seed: int) -> Editor:
        key = (method.called, seed)
        if key not in self._editors:
            kind = methods.get(method.name)
            self._editors[key] = kind(self.host, self.settings[method.called], seed=seed)
        return self._editors[key]

    def _gate(self, editor: Editor, probe: Probe) -> Row:
        """How far the gates open at the last token of a prompt: the mean over layers and bases of one edit,
        of the edit that opens most.
        """
        if "gates" not in self.experiment.scorers:
            return {}
        encoder = self._asker.speaker.encoder
        try:
            ids = (
                encoder.chat([{"role": "user", "content": probe.prompt}])
                if probe.chat
                else encoder.prompt(probe.prompt)
            )
        except (InputError, ConfigError):  # too long, or there is no chat: the probe was skipped
            return {}
        weights: dict[str | None, list[float]] = {}
        for reading in editor.explain(ids, len(ids)):
            if reading.position == len(ids) - 1:
                weights.setdefault(reading.edit_id, []).extend(reading.weights)
        return {"gate": max(sum(found) / len(found) for found in weights.values())} if weights else {}

    def _untouched(self, probes: tuple[Probe, ...]) -> Sequence[Observation]:
        """The untouched host on probes; kept for the methods to come, which are asked in the same batches."""
        if probes not in self._before:
            untouched = EditedModel(self.host.model)
            seen = self._asker.observe(untouched, probes, self._wanted)
            if "doubted" in self.experiment.renderings:
                seen = self._asker.doubt(untouched, probes, seen)
            while self._before and sum(map(len, self._before)) > _PROBES_KEPT:
                self._before.pop(next(iter(self._before)))
            self._before[probes] = seen
        return self._before[probes]


@dataclass(frozen=True, slots=True)
class _Made:
    """How making an edit, or a batch of them, went."""

    ids: tuple[str, ...]
    outcome: EditOutcome | None
    error: str | None
    seconds_s: float

    def as_row(self, case: EditCase) -> Row:
        """What of it belongs into the row of a case."""
        if self.outcome is None:
            return {"decoded": False, "error": self.error, "n_steps": 0, "seconds_s": self.seconds_s}
        place = self.ids.index(case.edit.id)
        return {
            "decoded": self.outcome.decoded[place],
            "error": None,
            "n_steps": self.outcome.n_steps,
            "seconds_s": self.seconds_s / len(self.ids),
        }


def _make(editor: Editor, cases: Sequence[EditCase]) -> _Made:
    """Makes edits; one that cannot be made is noted, and scored like any other on the model as it stands.

    Cases may ask different questions about one and the same edit, which is then made once.
    """
    edits = tuple(dict.fromkeys(case.edit for case in cases))
    ids = tuple(edit.id for edit in edits)
    began = time.perf_counter()
    try:
        outcome = editor.apply(EditRequest(edits))
    except (EditError, InputError) as error:
        return _Made(ids, None, f"{type(error).__name__}: {error}", time.perf_counter() - began)
    return _Made(ids, outcome, None, time.perf_counter() - began)


def _probe_row(case: EditCase, probe: Probe, before: Observation, after: Observation) -> Row:
    """What is kept of a probe: what was asked and said, the scores, and the unedited host's on the same."""
    row: Row = {
        "kind": probe.kind,
        "tag": probe.tag,
        "prompt": probe.prompt,
        "target": probe.target,
        "scores": measure(probe, case.edit.target, before, after),
        "unedited": measure(probe, case.edit.target, before, before),
    }
    if after.skipped is not None:
        row["skipped"] = after.skipped
    if after.undoubted is not None:
        row["undoubted"] = after.undoubted
    replies = {
        "raw": (before.raw, after.raw),
        "chat": (before.chat, after.chat),
        "doubted": (before.doubted, after.doubted),
    }
    for name, (was, now) in replies.items():
        if was is not None and now is not None:
            row[name] = [was.text, now.text]
    if before.target_logprob is not None and after.target_logprob is not None:
        row["logprob"] = [before.target_logprob, after.target_logprob]
    return row


def held_out_texts(data: Path | None, n: int) -> tuple[str, ...]:
    """The first `n` long paragraphs of the held-out text that no method sees.

    Raises:
        DataError: If the file is not there, cannot be read, or does not hold so many.
    """
    if not n:
        return ()
    path = None if data is None else data / HELD_OUT
    if path is None or not path.is_file():
        raise DataError(
            f"texts={n} asks for held-out text, and {path or HELD_OUT} is not there: name the data folder "
            "(--data or BAFT_DATA), or set texts = 0"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Fetch it anew, or set texts = 0") from error
    found = [line.strip() for line in lines if len(line.split()) >= _TEXT_WORDS][:n]
    if len(found) < n:
        raise DataError(
            f"{path} has {len(found)} paragraphs of {_TEXT_WORDS} words, got texts={n}: ask for fewer"
        )
    return tuple(found)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def _git_revision() -> str | None:
    """The commit of the code that runs, marked where it was changed since; None outside a checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
