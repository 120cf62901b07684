"""Running an experiment: edits are made, every probe is asked before and after, and a row a case is kept."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from baft import config
from baft.data.base import Benchmark
from baft.errors import ConfigError, EditError, InputError
from baft.evals.asking import Asker, Observation
from baft.evals.beyond import Beyond, held_out_texts
from baft.evals.experiment import Chosen, Experiment, MethodSpec, Stage, Task, tasks_of
from baft.evals.making import Made, make, make_apart, make_many
from baft.evals.provenance import git_revision, machine, versions
from baft.evals.records import Record, Row, sole_writer
from baft.evals.renderings import with_renderings
from baft.evals.scoring import measure
from baft.evals.teacher_forced import Asked
from baft.hosts.edited_model import EditedModel
from baft.hosts.identity import identify
from baft.hosts.kernels import fast_linears
from baft.hosts.models import Host, load_host
from baft.hosts.moments import corpus, texts_from
from baft.methods.base import Editor, GateReading, StackedEditor, methods
from baft.types import EditCase, Probe

_CASES_AT_ONCE = 25  # asked in one call; their probes share batches
_PROBES_KEPT = 3500  # of the untouched host, whose logits take up to 1.6 MB a locality probe

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
        self.chosen: dict[str, Chosen] = {}
        for spec in experiment.benchmarks:
            benchmark = spec.load(data)
            split = benchmark.splits[0] if spec.split is None else spec.split
            name = f"{benchmark.name}/{split}"
            if name in self.benchmarks:
                raise ConfigError(f"{name} stands twice among the benchmarks, once by default: name it once")
            self.benchmarks[name] = benchmark
            self.chosen[name] = spec.chosen(benchmark, split, data)
        texts = held_out_texts(data, experiment.texts)
        self.host = load_host(experiment.model, dtype=experiment.dtype) if host is None else host
        self._asker = Asker(
            self.host,
            batch_size=experiment.batch_size,
            max_new_tokens=experiment.max_new_tokens,
            chat=bool({"generate_chat", "chat_questions"} & set(experiment.scorers)),
        )
        encoder = self._asker.speaker.encoder
        for name, found in self.chosen.items():
            cases = tuple(with_renderings(case, experiment.renderings, encoder) for case in found.cases)
            self.chosen[name] = replace(found, cases=cases)
        self.tasks = tuple(tasks_of(experiment, self.chosen))
        self._beyond = Beyond(self.host, texts, batch_size=experiment.batch_size)
        self._wanted = frozenset(experiment.scorers) - {"gates", "fluency", "cost"}
        self._editors: dict[tuple[str, int], Editor] = {}
        self._before: dict[tuple[tuple[Probe, ...], tuple[int, ...]], Sequence[Observation]] = {}

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
                    "n_cases": len(self.chosen[name].cases),
                    "others": list(self.chosen[name].sources),
                    "left_out": dict(self.chosen[name].left_out),
                }
                for name, benchmark in self.benchmarks.items()
            },
            **({"moments_texts": texts} if (texts := self._moments_texts()) else {}),
            "versions": versions(),
            "git": git_revision(),
            "machine": machine(self.host.model.device),
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
        with fast_linears(), texts_from(self.data):
            if task.protocol.kind == "single":
                rows = self._apart(editor, task.cases) or self._one_by_one(editor, task.cases)
            elif task.protocol.kind == "batched":
                made = [self._make(editor, task.cases)] * len(task.cases)
                rows = self._scored(_Models.of(editor), task.cases, made)
                self._look_beyond(rows, editor.edited, task.cases)
            else:
                rows = self._in_sequence(editor, task)
        editor.reset()
        about = {
            "task": task.id,
            "method": method.called,
            "benchmark": task.benchmark,
            "protocol": task.protocol.called,
            "seed": task.seed,
            "chunk": task.chunk,
        }
        return [about | row for row in rows]

    def _moments_texts(self) -> dict[str, str]:
        """The SHA-256 of the text that a method takes second moments on, of those that do."""
        with texts_from(self.data):
            return {
                name: corpus(found.moments_text).sha256
                for name, found in self.settings.items()
                if hasattr(found, "moments_text")
            }

    def _make(self, editor: Editor, cases: Sequence[EditCase]) -> Made:
        return make(editor, cases, with_cost="cost" in self.experiment.scorers)

    def _apart(self, editor: Editor, cases: Sequence[EditCase]) -> list[Row]:
        """Single edits made and asked in one batch; nothing if the method cannot, or one of them fails."""
        if not isinstance(editor, StackedEditor):
            return []
        try:
            apart, made = make_apart(editor, cases, with_cost="cost" in self.experiment.scorers)
        except (EditError, InputError):
            return []
        rows = self._scored(_Models(apart.by_row, apart.explain), cases, made)
        for i, row in enumerate(rows):
            row["stack"] = len(cases)
            if self.experiment.texts or "fluency" in self.experiment.scorers:
                self._look_beyond([row], apart.alone(i), cases[i : i + 1])
        return rows

    def _one_by_one(self, editor: Editor, cases: Sequence[EditCase]) -> list[Row]:
        """Single edits, each on the untouched host."""
        rows: list[Row] = []
        for position, case in enumerate(cases):
            editor.reset()
            made = [self._make(editor, [case])]
            found = self._scored(_Models.of(editor), [case], made, first=position)
            self._look_beyond(found, editor.edited, [case])
            rows += found
        return rows

    def _in_sequence(self, editor: Editor, task: Task) -> list[Row]:
        """Edits on top of each other, scored at once, where that is wanted, and after the last."""
        rows: list[Row] = []
        made: list[Made] = []
        asked = task.protocol.immediate
        if asked == "none":
            made = make_many(editor, task.cases, with_cost="cost" in self.experiment.scorers)
        else:
            for position, case in enumerate(task.cases):
                made.append(self._make(editor, [case]))
                lone = asked == "reliability"
                rows += self._scored(_Models.of(editor), [case], made[-1:], first=position, lone=lone)
        others = make_many(editor, task.others)
        final = self._scored(_Models.of(editor), task.cases, made, stage="final")
        if others:
            final[-1]["others_failed"] = Counter(one.error for one in others if one.error is not None)
        self._look_beyond(final, editor.edited, task.cases)
        return rows + final

    def _look_beyond(self, rows: Sequence[Row], edited: EditedModel, cases: Sequence[EditCase]) -> None:
        """Adds what one edited model does beyond the probes to the rows of its cases."""
        rows[-1].update(self._beyond.on_texts(edited))
        if "fluency" in self.experiment.scorers:
            prompts = [case.edit.prompt for case in cases]
            for row, found in zip(rows, self._beyond.fluency(edited, prompts), strict=True):
                row.update(found)

    def _scored(
        self,
        models: "_Models",
        cases: Sequence[EditCase],
        made: Sequence["Made"],
        *,
        stage: Stage = "immediate",
        first: int = 0,
        lone: bool = False,
    ) -> list[Row]:
        """A row for each case; the probes of several are asked together.

        Args:
            models: The edited models.
            cases: The cases.
            made: How the edit of each was made.
            stage: When they are asked.
            first: Where the first of them stands in its chunk.
            lone: Whether the edits' own prompts alone are asked.
        """
        rows: list[Row] = []
        for start in range(0, len(cases), _CASES_AT_ONCE):
            places = range(start, min(start + _CASES_AT_ONCE, len(cases)))
            asked = [
                (place, probe)
                for place in places
                for probe in (cases[place].all_probes[:1] if lone else cases[place].all_probes)
            ]
            owners = tuple(place if models.are_several else 0 for place, _ in asked)
            probes = tuple(probe for _, probe in asked)
            before = self._untouched(probes, owners)
            after = self._seen(models.asked, probes, owners, before)
            of_case: dict[int, list[Row]] = {place: [] for place in places}
            for (place, probe), was, now in zip(asked, before, after, strict=True):
                found = _probe_row(cases[place], probe, was, now) | self._gate(models, place, probe)
                of_case[place].append(found)
            rows += [
                {
                    "stage": stage,
                    "position": first + place,
                    "case": cases[place].id,
                    "edit": cases[place].edit.to_dict(),
                    **made[place].as_row(cases[place]),
                    "probes": of_case[place],
                }
                for place in places
            ]
        return rows

    def _seen(
        self,
        asked: Asked,
        probes: Sequence[Probe],
        owners: Sequence[int],
        before: Sequence[Observation] | None = None,
    ) -> Sequence[Observation]:
        seen = self._asker.observe(asked, probes, self._wanted, before=before, owners=owners)
        if "doubted" in self.experiment.renderings:
            seen = self._asker.doubt(asked, probes, seen, owners)
        return seen

    def _editor(self, method: MethodSpec, seed: int) -> Editor:
        key = (method.called, seed)
        if key not in self._editors:
            kind = methods.get(method.name)
            self._editors[key] = kind(self.host, self.settings[method.called], seed=seed)
        return self._editors[key]

    def _gate(self, models: "_Models", place: int, probe: Probe) -> Row:
        """How far the gates open at the last token of a prompt: the mean over layers and bases of one edit,
        of the edit that opens most.
        """
        if "gates" not in self.experiment.scorers:
            return {}
        encoder = self._asker.speaker.encoder
        try:
            ids = encoder.chat(probe.messages) if probe.chat else encoder.prompt(probe.prompt)
        except (InputError, ConfigError):  # too long, or there is no chat: the probe was skipped
            return {}
        weights: dict[str | None, list[float]] = {}
        for reading in models.explain(place, ids, len(ids)):
            if reading.position == len(ids) - 1:
                weights.setdefault(reading.edit_id, []).extend(reading.weights)
        return {"gate": max(sum(found) / len(found) for found in weights.values())} if weights else {}

    def _untouched(self, probes: tuple[Probe, ...], owners: tuple[int, ...]) -> Sequence[Observation]:
        """The untouched host on probes; kept for the methods to come, which are asked in the same batches."""
        if (probes, owners) not in self._before:
            seen = self._seen(EditedModel(self.host.model), probes, owners)
            while self._before and sum(map(len, self._before.values())) > _PROBES_KEPT:
                self._before.pop(next(iter(self._before)))
            self._before[probes, owners] = seen
        return self._before[probes, owners]


@dataclass(frozen=True, slots=True)
class _Models:
    """The edited models that cases are asked of: one for all, or one each.

    Args:
        asked: The model, or the one of each row.
        explain: The gates under the edit of a case.
        are_several: Whether each case has a model of its own.
    """

    asked: Asked
    explain: Callable[[int, Sequence[int], int], tuple[GateReading, ...]]
    are_several: bool = True

    @classmethod
    def of(cls, editor: Editor) -> "_Models":
        """One for all."""
        return cls(editor.edited, lambda _, ids, n: editor.explain(ids, n), are_several=False)


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
