"""What the commands share of the terminal: results, progress, notes, errors and log lines."""

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text
from typer.core import TyperGroup

from baft.errors import BaftError

_INTERRUPTED = 130  # what a shell says of a process that Ctrl-C ended
_OPTIONS = {"accept_terms=True": "--accept-terms", "host=": "--model"}  # what messages call by Python's names
_LOGGER = logging.getLogger("baft")


class Terminal:
    """Where a command speaks.

    Args:
        as_json: Results are one JSON document on stdout, instead of words and tables.
        quiet: No progress and no notes; there is no progress either where stderr is not a terminal.
    """

    def __init__(self, *, as_json: bool, quiet: bool = False):
        self._as_json, self._quiet = as_json, quiet
        self._out = Console(highlight=False, markup=False, emoji=False)
        self._err = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._still = quiet or not sys.stderr.isatty()

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return self._out.width

    def result(self, data: Any, *shown: RenderableType) -> None:
        """Prints what a command found: `data` as JSON, or else `shown`; texts are never wrapped."""
        if self._as_json:
            typer.echo(json.dumps(data, ensure_ascii=False, indent=2))
            return
        for one in shown:
            self._out.print(safe(one) if isinstance(one, str) else one, soft_wrap=isinstance(one, str))

    def note(self, text: str) -> None:
        """Says on stderr what is good to know."""
        if not self._quiet:
            typer.echo(safe(text), err=True)

    @contextmanager
    def waiting(self, words: str) -> Iterator[None]:
        """Shows that something takes its time, and what baft logs about it."""
        if self._still:
            yield
            return
        with self._err.status(safe(words)) as status:
            handler = _Retell(status)
            _LOGGER.addHandler(handler)
            try:
                yield
            finally:
                _LOGGER.removeHandler(handler)

    @contextmanager
    def training(self, n_requests: int) -> Iterator["TrainingBar"]:
        """Shows the steps of one optimization after the other."""
        words = (
            "{task.description}",
            "{task.completed:.0f}/{task.total:.0f}",
            "loss {task.fields[loss]:.3f}",
        )
        columns = [TextColumn(words[0]), BarColumn(), *map(TextColumn, words[1:])]
        with Progress(*columns, console=self._err, transient=True, disable=self._still) as progress:
            yield TrainingBar(progress, n_requests)

    @contextmanager
    def counting(self, total: int) -> Iterator[Callable[[int, int, str], None]]:
        """Shows how much of a long run is done, and when it will end."""
        columns = [BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeRemainingColumn()]
        words = TextColumn("{task.description}")
        with Progress(*columns, words, console=self._err, transient=True, disable=self._still) as progress:
            bar = progress.add_task("", total=total)

            def counted(done: int, total: int, what: str) -> None:
                progress.update(bar, completed=done, total=total, description=safe(what))

            yield counted


class TrainingBar:
    """A bar for the steps of the current optimization.

    Args:
        progress: Draws it.
        n_requests: How many optimizations there will be.
    """

    def __init__(self, progress: Progress, n_requests: int):
        self._progress, self._n_requests, self._begun = progress, n_requests, 0
        self._task: TaskID | None = None

    def next(self) -> None:
        """Begins the next optimization."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._begun += 1
        self._task = self._progress.add_task(f"edit {self._begun}/{self._n_requests}", total=1, loss=0.0)

    def step(self, step: int, n_steps: int, loss: float) -> None:
        """Is called after every step of the optimizer."""
        assert self._task is not None
        self._progress.update(self._task, completed=step, total=n_steps, loss=loss)


class Group(TyperGroup):
    """The commands; an error that was foreseen ends them with one line on stderr, and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Runs a command."""
        try:
            with logging_to_stderr(verbose=ctx.params["verbose"]):
                return super().invoke(ctx)
        except BrokenPipeError:  # whoever read stdout has seen enough; typer ends quietly
            raise
        except (BaftError, OSError, KeyboardInterrupt) as error:
            if ctx.params["debug"]:
                traceback.print_exception(error)
            print_error(_words(error))
            raise typer.Exit(_INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1) from None


def print_error(message: str) -> None:
    """Prints `error: ...` on one line of stderr."""
    line = "; ".join(part.strip() for part in safe(message).splitlines() if part.strip())
    console = Console(stderr=True, highlight=False, emoji=False)
    console.print(Text.assemble(("error:", "bold red"), " ", line), soft_wrap=True)


def safe(text: str) -> str:
    """A text without the control characters that a terminal would obey."""
    return "".join(one if one.isprintable() or one in "\n\t" else _escaped(one) for one in text)


@contextmanager
def logging_to_stderr(*, verbose: bool) -> Iterator[None]:
    """Lets baft's own loggers write lines to stderr, warnings alone or everything from INFO up."""
    handler = _Lines(print_line)
    handler.setLevel(logging.INFO if verbose else logging.WARNING)
    level = _LOGGER.level
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.addHandler(handler)
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)


def print_line(line: str) -> None:
    """Prints a line on what is stderr at this moment."""
    typer.echo(safe(line), err=True)


class _Lines(logging.Handler):
    """Hands on log records as lines."""

    def __init__(self, hand_on: Callable[[str], None]):
        super().__init__()
        self._hand_on = hand_on

    def emit(self, record: logging.LogRecord) -> None:
        self._hand_on(f"{record.levelname.lower()}: {record.getMessage()}")


class _Retell(logging.Handler):
    """Shows what is logged as the words of a spinner."""

    def __init__(self, status: Status):
        super().__init__()
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:  # warnings have lines of their own
            self._status.update(safe(record.getMessage()))


def _escaped(one: str) -> str:
    return one.encode("unicode_escape").decode()


def _words(error: BaseException) -> str:
    """An error as the command line's user meets it, with whatever was noted on its way up."""
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    if isinstance(error, BaftError):
        for argument, option in _OPTIONS.items():
            text = text.replace(argument, option)
    return "; ".join([text, *getattr(error, "__notes__", [])])
