"""The commands of `baft`.

Torch and transformers are imported by the commands that need them, so that `baft --help` is quick.
"""

import io
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

import baft
from baft.cli.bench import bench, compare, general, list_benchmarks, report
from baft.cli.options import (
    DEFAULT_HOST,
    Artifact,
    Batch,
    Conflict,
    Device,
    Dtype,
    From,
    Host,
    HostOf,
    Json,
    Method,
    Preset,
    Prompt,
    Quiet,
    Save,
    Seed,
    Settings,
    Subject,
    Target,
    Terms,
    Unrelated,
    find_recipe,
    read_settings,
    require_place,
)
from baft.cli.scope import scope
from baft.cli.sets import merge, refit, remove
from baft.cli.tables import count, gates_view, report_view, stored_view, table, verdict
from baft.cli.terminal import Group, Terminal
from baft.cli.work import (
    answer_of,
    chat_of,
    find_base,
    in_chat,
    load,
    load_edits,
    make_edits,
    require_held,
    wanted_edits,
)
from baft.errors import ConfigError, UndoError
from baft.types import replaced

app = typer.Typer(
    name="baft",
    cls=Group,
    help="Change what a language model knows, one fact at a time, without touching its weights.",
    epilog="`baft COMMAND --help` tells more. BAFT_DEBUG=1 shows tracebacks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def main() -> None:
    """Runs the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a sign is no error
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    app(prog_name="baft")


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"baft {baft.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="BAFT_DEBUG", help="Show the traceback of an error.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is going on to stderr.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del debug, verbose, version  # `Group` reads the first two, and `_version` the last


@app.command()
def edit(
    prompt: Prompt = None,
    target: Target = None,
    subject: Subject = None,
    source: From = None,
    batch: Batch = False,
    model: Host = None,
    method: Method = None,
    preset: Preset = None,
    settings: Settings = None,
    unrelated: Unrelated = None,
    on_conflict: Conflict = "keep",
    seed: Seed = None,
    save: Save = None,
    dtype: Dtype = None,
    device: Device = None,
    accept_terms: Terms = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Edit facts, and report what changed.

    Give --prompt and --target, or a file with --from: one JSON object a line, such as
    {"prompt": "...", "target": "..."}, with "subject" and the lists "rephrasings" and "neighbors" where there
    are any. Edits in --save stay, and the new ones come on top.
    The exit code is 1 if an edit failed; it is kept all the same, and `baft undo` takes it back.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    given = read_settings(settings or ())
    wanted = wanted_edits(prompt, target, subject, source, batch)
    base, host = find_base(model, save)
    recipe = find_recipe(base, method, preset, seed, given)
    if source and not batch:
        wanted, n_asked = [one for one in wanted if one.id not in recipe.known], len(wanted)
        if n_asked > len(wanted):
            terminal.note(f"skipped {count(n_asked - len(wanted), 'edit')} made already")
    requests = [tuple(wanted)] if batch else [(one,) for one in wanted]
    loaded = load(terminal, base or host or DEFAULT_HOST, host if base else None, dtype, device, accept_terms)
    reports = make_edits(terminal, loaded, requests, recipe, tuple(unrelated or ()), save, on_conflict)
    data = {"saved": str(save) if save else None, "reports": [report.to_dict() for report in reports]}
    kept = f"saved in {save}" if save else "nothing was kept: --save NAME.baft keeps the edits"
    terminal.result(data, *(report_view(reports) if reports else ()), kept)
    gone = {one.old_id for report in reports for one in report.conflicts if one.replaced}
    require_held([row.decoded for report in reports for row in report.rows if row.edit_id not in gone])


@app.command()
def ask(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Saved edits, or a model by itself.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.")],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; use no chat template.")] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="The system message of the chat.")
    ] = None,
    before: Annotated[bool, typer.Option("--before", help="Show the unedited answer beside it.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer.")
    ] = 64,
    model: HostOf = None,
    dtype: Dtype = None,
    device: Device = None,
    accept_terms: Terms = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask an edited model, in its chat template where it has one."""
    if raw and system is not None:
        raise typer.BadParameter(
            "a system message needs the chat template, and --raw uses none", param_hint="--system"
        )
    terminal = Terminal(as_json=as_json, quiet=quiet)
    loaded = load(terminal, source, model, dtype, device, accept_terms)
    chat = in_chat(loaded, chat=False if raw else None if system is None else True)
    with terminal.waiting("answering"):
        answer = answer_of(loaded, question, chat, system, max_new_tokens)
        unedited = None
        if before:
            with loaded.disabled():
                unedited = answer_of(loaded, question, chat, system, max_new_tokens)
    data: dict[str, Any] = {"question": question, "chat": chat, "answer": answer}
    if unedited is None:
        terminal.result(data, answer.strip())
    else:
        both = (unedited.strip(), answer.strip())
        terminal.result({**data, "before": unedited}, table(("before", "now"), [both]))


@app.command()
def show(artifact: Artifact, as_json: Json = False) -> None:
    """Show what is in saved edits, without loading their host."""
    from baft.artifact import CONFIG, read
    from baft.config import read_json

    terminal = Terminal(as_json=as_json)
    saved = read(artifact)
    gone = replaced(saved.requests)
    about = read_json(artifact / CONFIG)
    n_bytes = sum((artifact / name).stat().st_size for name in (CONFIG, *about["files"]))
    created, by = str(about["created"]), str(about["baft_version"])
    data = {
        "artifact": str(artifact),
        "size_bytes": n_bytes,
        "created": created,
        "baft_version": by,
        **{name: getattr(saved, name) for name in ("method", "preset", "seed", "settings", "layers")},
        "host": {
            "name": saved.host.name,
            "source": saved.host_source,
            "architecture": saved.host.architecture,
            "dtype": saved.host.dtype,
        },
        "edits": [
            {
                "id": one.edit.id,
                "request": one.request,
                "decoded": one.decoded,
                "replaced": one.edit.id in gone,
                **one.edit.to_dict(),
            }
            for one in saved.edits
        ],
    }
    title = f"{artifact}: {count(len(saved.edits), 'edit')}, {decimal(n_bytes)}, made {created} by baft {by}"
    terminal.result(data, *stored_view(title, saved))


@app.command()
def check(
    artifact: Artifact,
    model: HostOf = None,
    dtype: Dtype = None,
    device: Device = None,
    accept_terms: Terms = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask every saved edit's prompt again, raw.

    The exit code is 1 if one of them is not said any more; those that were replaced need not be.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    loaded = load_edits(terminal, artifact, model, dtype, device, accept_terms)
    with terminal.waiting(f"asking {count(len(loaded.edits), 'edit')}"):
        found = loaded.check()
    data = [
        {"id": one.edit.id, **one.edit.to_dict(), "says": says, "holds": ok, "replaced": one.replaced}
        for one, says, ok in found
    ]
    rows = [
        (one.edit.prompt, one.edit.target, says.strip(), "replaced" if one.replaced else verdict(ok))
        for one, says, ok in found
    ]
    terminal.result(data, table(("prompt", "target", "says", ""), rows))
    require_held([ok for one, _, ok in found if not one.replaced])


@app.command()
def explain(
    artifact: Artifact,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model is asked.")],
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw", help="With or without chat template. [default: with, where there is one]"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest reply to look at.")
    ] = 8,
    model: HostOf = None,
    dtype: Dtype = None,
    device: Device = None,
    accept_terms: Terms = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show which gates open on a prompt.

    One row is a token that is edited, of the prompt or the reply; one column is a layer and an edit.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    loaded = load_edits(terminal, artifact, model, dtype, device, accept_terms)
    if in_chat(loaded, chat=chat):
        gates = loaded.explain(messages=chat_of(prompt, None), max_new_tokens=max_new_tokens)
    else:
        gates = loaded.explain(prompt, max_new_tokens=max_new_tokens)
    data = [asdict(one) for one in gates]
    terminal.result(data, *(gates_view(gates, loaded.edits, terminal.width) if gates else ("no gates",)))


@app.command()
def undo(
    artifact: Artifact,
    n: Annotated[int, typer.Option("--number", "-n", min=1, help="How many requests to take back.")] = 1,
    save: Annotated[
        Path | None,
        typer.Option("--save", "-o", metavar="OTHER", help="Write to NAME.baft and leave ARTIFACT."),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete ARTIFACT when no edit is left.")] = False,
    model: HostOf = None,
    dtype: Dtype = None,
    device: Device = None,
    accept_terms: Terms = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take the last edits back out of saved ones.

    A request is one edit, or one batch. Saved edits are never empty: to take back all of them is to delete
    ARTIFACT, which --delete allows.
    """
    from baft.artifact import delete as delete_artifact
    from baft.artifact import read

    terminal = Terminal(as_json=as_json, quiet=quiet)
    if save is not None and delete:
        raise typer.BadParameter(
            "--save leaves ARTIFACT, and --delete removes it: give one", param_hint="--delete"
        )
    saved = read(artifact)
    n_requests = len({one.request for one in saved.edits})
    if n > n_requests:
        raise UndoError(f"cannot take back {count(n, 'request')}: {artifact} holds {n_requests}")
    if n == n_requests:
        if not delete:
            raise UndoError(f"no edit would be left in {artifact}: undo with --delete deletes it")
        delete_artifact(artifact)
        gone, place = [one.edit for one in reversed(saved.edits)], None
    else:
        place = save or artifact
        require_place(place)
        loaded = load(terminal, str(artifact), model, dtype, device, accept_terms)
        gone = list(loaded.undo(n))
        loaded.save(place)
    n_left = len(saved.edits) - len(gone)
    data = {
        "saved": str(place) if place else None,
        "undone": [one.to_dict() for one in gone],
        "n_left": n_left,
    }
    rows = [(one.prompt, one.target) for one in gone]
    end = f"{count(n_left, 'edit')} left in {place}" if place else f"{artifact} is deleted"
    terminal.result(data, table(("taken back", "target"), rows), "", end)


@app.command()
def models(as_json: Json = False) -> None:
    """List the embedded hosts; folders and hub ids work as well."""
    from baft.hosts.embedded import embedded_hosts

    found = embedded_hosts()
    rows = [
        (
            one.name,
            one.label,
            one.license,
            "yes" if one.downloaded else "no",
            decimal(one.download_bytes),
            decimal(one.disk_bytes) if one.downloaded else "-",
        )
        for one in found
    ]
    header = ("name", "model", "license", "here", "download", "on disk")
    shown = table(header, rows, right=("download", "on disk"))
    Terminal(as_json=as_json).result([asdict(one) for one in found], shown)


@app.command("methods")
def list_methods(as_json: Json = False) -> None:
    """List the editing methods, their presets and what they can do."""
    from baft.methods.base import methods

    data: list[dict[str, Any]] = []
    for name in methods.names():
        try:
            kind = methods.get(name)
        except ConfigError as error:  # of another package: no reason to hide the others
            data.append({"name": name, "summary": str(error), "presets": [], "capabilities": []})
            continue
        can = sorted(capability.value for capability in kind.capabilities)
        data.append(
            {"name": name, "summary": kind.summary, "presets": list(kind.presets), "capabilities": can}
        )
    rows = [
        (
            one["name"],
            one["summary"],
            "\n".join(one["presets"]),
            "\n".join(one["capabilities"]).replace("_", " "),
        )
        for one in data
    ]
    Terminal(as_json=as_json).result(data, table(("name", "summary", "presets", "can"), rows))


app.command()(remove)
app.command()(merge)
app.command()(refit)
app.command()(bench)
app.command()(report)
app.command()(compare)
app.command()(general)
app.command("benchmarks")(list_benchmarks)
app.add_typer(scope, name="scope")
