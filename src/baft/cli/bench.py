"""The commands that score methods: running an experiment, reporting it, comparing two methods."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from baft.cli.options import Artifact, Device, Dtype, HostOf, Json, Quiet, Terms
from baft.cli.tables import table
from baft.cli.terminal import Terminal
from baft.cli.work import load_edits
from baft.errors import ConfigError

Data = Annotated[
    Path | None,
    typer.Option(
        "--data", envvar="BAFT_DATA", metavar="FOLDER", help="Where the files of public benchmarks lie."
    ),
]
Folders = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that `baft bench` wrote.")]


def bench(
    experiment: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="What to run, in TOML. [default: a quick look at two methods on the project's own facts]",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="RUN", help="Where to keep it. [default: runs/NAME]")
    ] = None,
    data: Data = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="No more cases than this of each benchmark.")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Share the work out to processes, with Ray.")] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="HOST:PORT",
            help="With --ray: a running cluster, or `auto`. [default: one on this machine, for this run]",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="With --ray: how many processes. [default: as many as fit]"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run an experiment and report it.

    Every case is a row in RUN/rows.jsonl as soon as its batch is scored; the same command goes on with a run
    that was cut off. The report is written to RUN/report.md and RUN/report.html.
    """
    for given, option in ((ray_address, "--ray-address"), (workers, "--workers")):
        if given is not None and not ray:
            raise typer.BadParameter("goes with --ray", param_hint=option)
    from dataclasses import replace

    from baft.evals.experiment import default_experiment, read_experiment
    from baft.evals.launch import require_ray, run_on_ray
    from baft.evals.report import summary_rows, write_report
    from baft.evals.runner import Bench

    if ray:
        require_ray()
    terminal = Terminal(as_json=as_json, quiet=quiet)
    found = default_experiment() if experiment is None else read_experiment(experiment)
    if limit is not None:
        fewer = tuple(replace(one, limit=min(limit, one.limit or limit)) for one in found.benchmarks)
        found = replace(found, benchmarks=fewer)
    folder = out or Path("runs") / found.name
    with terminal.waiting(f"loading {found.model}"):
        ready = Bench(found, data=data)
    with terminal.counting(len(ready.blocks)) as counted:
        if ray:
            run_on_ray(ready, folder, address=ray_address, n_workers=workers, on_block=counted)
        else:
            ready.run(folder, on_block=counted)
    written = write_report([folder], folder)
    header, rows = summary_rows([folder])
    said = f"kept in {folder}; the report: {', '.join(str(path) for path in written)}"
    terminal.result({"run": str(folder), "scores": _as_dicts(header, rows)}, table(header, rows), said)


def report(
    runs: Folders,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="[default: the first RUN]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the report of runs: Markdown and HTML.

    The page is one file that loads nothing. Several runs stand side by side.
    """
    from baft.evals.report import summary_rows, write_report

    written = write_report(runs, out or runs[0])
    header, rows = summary_rows(runs)
    data = {"written": [str(path) for path in written], "scores": _as_dicts(header, rows)}
    Terminal(as_json=as_json).result(data, table(header, rows), *(str(path) for path in written))


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A run, or RUN:METHOD.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another, scored on the same cases.")],
    as_json: Json = False,
) -> None:
    """Compare two methods case by case.

    What is shown are the differences A - B with their intervals. A run that holds one method needs only its
    folder.
    """
    from baft.evals.report import comparison_rows

    header, rows = comparison_rows(_side(first), _side(second))
    Terminal(as_json=as_json).result(_as_dicts(header, rows), table(header, rows))


def general(
    artifact: Artifact,
    tasks: Annotated[
        list[str],
        typer.Option("--tasks", metavar="NAME,...", help="Tasks of lm-eval, such as hellaswag,arc_easy."),
    ],
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="No more questions than this of each task.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions asked at once.")] = 8,
    folder: Annotated[
        Path | None,
        typer.Option("--task-folder", metavar="FOLDER", help="Where further tasks are defined, in YAML."),
    ] = None,
    model: HostOf = None,
    dtype: Dtype = None,
    device: Device = None,
    accept_terms: Terms = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure general ability with and without edits, by lm-eval.

    Needs `pip install 'baft[general]'`. Most tasks fetch their questions from the Hugging Face hub.
    """
    from dataclasses import asdict

    from baft.evals.general import general_ability, require_lm_eval

    require_lm_eval()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant here
    terminal = Terminal(as_json=as_json, quiet=quiet)
    loaded = load_edits(terminal, artifact, model, dtype, device, accept_terms)
    names = [name.strip() for given in tasks for name in given.split(",") if name.strip()]
    found = general_ability(
        loaded.host, loaded.hf, loaded.tokenizer, names, limit=limit, batch_size=batch_size, folder=folder
    )
    header = ("task", "metric", "n", "before", "after", "after − before")
    rows = [
        (
            one.task,
            one.metric,
            "" if one.n is None else str(one.n),
            _measured(one.before, one.before_stderr),
            _measured(one.after, one.after_stderr),
            f"{one.after - one.before:+.4f}",
        )
        for one in found
    ]
    terminal.result([asdict(one) for one in found], table(header, rows))


def list_benchmarks(as_json: Json = False) -> None:
    """List the benchmarks and their splits."""
    from baft.data.base import benchmarks

    data: list[dict[str, Any]] = []
    for name in benchmarks.names():
        try:
            kind = benchmarks.get(name)
        except ConfigError as error:  # of another package: no reason to hide the others
            data.append({"name": name, "summary": str(error), "source": "", "splits": []})
            continue
        data.append(
            {"name": name, "summary": kind.summary, "source": kind.source, "splits": list(kind.splits)}
        )
    rows = [(one["name"], one["summary"], "\n".join(one["splits"]), one["source"]) for one in data]
    Terminal(as_json=as_json).result(data, table(("name", "summary", "splits", "source"), rows))


def _measured(value: float, stderr: float | None) -> str:
    """A score with its standard error."""
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def _side(text: str) -> tuple[Path, str | None]:
    """A folder, and the method named behind a colon."""
    if os.path.isdir(text):
        return Path(text), None
    folder, colon, method = text.rpartition(":")
    if not colon:
        raise ConfigError(f"{text} is no folder: give a run that `baft bench` wrote, or RUN:METHOD")
    return Path(folder), method


def _as_dicts(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    return [dict(zip(header, row, strict=True)) for row in rows]
