"""What commands do between reading their options and printing: loading, editing, asking."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from baft.cli.options import Recipe, read_edits, require_place
from baft.cli.tables import count
from baft.cli.terminal import Terminal, print_error
from baft.errors import ConfigError
from baft.types import Edit, OnConflict

if TYPE_CHECKING:
    from baft.model import Model
    from baft.report import EditReport


def wanted_edits(
    prompt: str | None, target: str | None, subject: str | None, source: str | None, batch: bool
) -> list[Edit]:
    """The edits that the options of `edit` name."""
    if source is not None:
        if (prompt, target, subject) != (None, None, None):
            raise typer.BadParameter(
                "--from brings its own prompts, targets and subjects", param_hint="--from"
            )
        return read_edits(source)
    if prompt is None or target is None:
        raise typer.BadParameter("give --prompt and --target, or --from FILE", param_hint="edit")
    if batch:
        raise typer.BadParameter("it goes with --from FILE", param_hint="--batch")
    return [Edit(prompt, target, subject=subject)]


def find_base(model: str | None, save: Path | None) -> tuple[Path | None, str | None]:
    """The saved edits to build on, if any, and the host that was named."""
    from baft.artifact import is_artifact

    builds_on_model = model is not None and is_artifact(model)
    if save is not None:
        require_place(save)
        if is_artifact(save):
            if builds_on_model:
                raise ConfigError(
                    f"{save} is there already, and {model} holds edits too: give another --save"
                )
            return save, model
    return (Path(model), None) if model is not None and builds_on_model else (None, model)


def load(
    terminal: Terminal,
    source: str | Path,
    host: str | None,
    dtype: str | None,
    device: str | None,
    accept_terms: bool,
) -> "Model":
    """Loads a host, or an artifact with its host."""
    with terminal.waiting(f"loading {source}"):
        from baft import artifact
        from baft.loading import load as load_model

        if str(source).endswith(artifact.SUFFIX) and not artifact.is_artifact(source):
            artifact.read(source)  # says what is wrong with it
        return load_model(source, host=host, dtype=dtype, device=device, accept_terms=accept_terms)


def load_edits(
    terminal: Terminal,
    path: Path,
    host: str | None,
    dtype: str | None,
    device: str | None,
    accept_terms: bool,
) -> "Model":
    """Loads an artifact, and nothing else."""
    from baft import artifact

    if not artifact.is_artifact(path):
        artifact.read(path)  # says what is wrong with it
    return load(terminal, path, host, dtype, device, accept_terms)


def make_edits(
    terminal: Terminal,
    model: "Model",
    requests: Sequence[Sequence[Edit]],
    recipe: Recipe,
    unrelated: Sequence[str],
    save: Path | None,
    on_conflict: OnConflict,
) -> list["EditReport"]:
    """Makes one request after the other and saves them; those that were done when one fails are saved too."""
    reports: list[EditReport] = []
    try:
        with terminal.training(len(requests)) as bar:
            for request in requests:
                bar.next()
                report = model.edit(
                    request,
                    method=recipe.method,
                    preset=recipe.preset,
                    unrelated=unrelated,
                    seed=recipe.seed,
                    on_conflict=on_conflict,
                    on_step=bar.step,
                    **recipe.settings,
                )
                reports.append(report)
    except BaseException as error:
        if reports:
            if save is not None:
                model.save(save)
            kept = f"are saved in {save}" if save else "were not kept"
            error.add_note(f"the first {len(reports)} of {count(len(requests), 'edit')} {kept}")
        raise
    if save is not None and reports:
        model.save(save)
    return reports


def in_chat(model: "Model", *, chat: bool | None) -> bool:
    """Whether to use the chat template; where nobody says, if there is one."""
    return bool(model.tokenizer.chat_template) if chat is None else chat


def chat_of(question: str, system: str | None) -> list[dict[str, str]]:
    """A question as a chat."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": question}]


def answer_of(model: "Model", question: str, chat: bool, system: str | None, max_new_tokens: int) -> str:
    """What a model says to a question, spaces as they come."""
    if chat:
        return model.generate(messages=chat_of(question, system), max_new_tokens=max_new_tokens)
    return model.generate(question, max_new_tokens=max_new_tokens)


def require_held(decoded: Sequence[bool]) -> None:
    """Ends with exit code 1 if an edit does not hold."""
    n_failed = len(decoded) - sum(decoded)
    if n_failed:
        print_error(f"{n_failed} of {count(len(decoded), 'edit')} failed")
        raise typer.Exit(1)
