"""What all benchmarks share: alternated runs, medians and spread, tables, and JSON that says where it was.

A contender is a function that is given the number of the round, does its work once, and says how long that
took in seconds. In every round each contender runs once, and who begins moves on from round to round, so
that whatever else the machine does falls on all alike. Ratios are taken within a round and only then
summarized.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MIN_ROUNDS = 7  # fewer make no figure that may be quoted; --quick runs two and says so
QUICK_ROUNDS = 2
PACKAGES = ("baft", "torch", "transformers", "peft", "numpy", "tokenizers")

Contender = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Summary:
    """Several measurements of one thing: median, extremes, quartiles (inclusive), and how many there were."""

    median: float
    minimum: float
    maximum: float
    lower_quartile: float
    upper_quartile: float
    n: int


def summarize(values: Sequence[float]) -> Summary:
    """Median and spread of at least one number."""
    if not values:
        raise ValueError("there is nothing to summarize: give at least one measurement")
    if len(values) == 1:
        [only] = values
        return Summary(only, only, only, only, only, n=1)
    lower, median, upper = quantiles(values, n=4, method="inclusive")
    return Summary(median, min(values), max(values), lower, upper, len(values))


def alternate(
    contenders: Mapping[str, Contender], n_rounds: int, *, tell: Callable[[str], None] = lambda _: None
) -> dict[str, list[float]]:
    """Runs every contender once a round, beginning with another one each time.

    Returns:
        The seconds of each contender, by round.
    """
    names = list(contenders)
    took: dict[str, list[float]] = {name: [] for name in names}
    for number in range(n_rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            tell(f"round {number + 1} of {n_rounds}: {name}")
            took[name].append(contenders[name](number))
    return took


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """One measurement over another, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def timed(work: Callable[[], object]) -> float:
    """Seconds that a piece of work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def parser(about: str | None, *, model: str | None = "smollm2") -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="see that it works: few rounds, small inputs")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every figure to this file")
    made.add_argument("--rounds", type=int, default=MIN_ROUNDS, help=f"at least {MIN_ROUNDS} (the default)")
    made.add_argument("--threads", type=int, default=2, help="threads of one operation (default 2)")
    if model is not None:
        made.add_argument("--model", default=model, help=f"an embedded host or a folder (default {model})")
    return made


def n_rounds(args: argparse.Namespace) -> int:
    """How many rounds the options ask for.

    Raises:
        SystemExit: If they are too few to be quoted.
    """
    if args.quick:
        return QUICK_ROUNDS
    if args.rounds < MIN_ROUNDS:
        sys.exit(f"--rounds must be at least {MIN_ROUNDS}, got {args.rounds}: use --quick for a trial")
    return int(args.rounds)


def environment(threads: int) -> dict[str, Any]:
    """Where and with what a figure was measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "cpu": cpu_name(),
        "n_cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
    }


def cpu_name() -> str:
    """The processor, as it calls itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def document(benchmark: str, args: argparse.Namespace, results: Mapping[str, Any]) -> dict[str, Any]:
    """One benchmark's figures with all that they depend on, as plain data."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name != "json"
    }
    return {
        "benchmark": benchmark,
        "quick": bool(args.quick),
        "settings": settings,
        "environment": environment(args.threads),
        "results": _plain(results),
    }


def write(path: Path | None, found: Mapping[str, Any]) -> None:
    """Writes a document where a file is asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


class Sheet:
    """A terminal: tables, remarks, and on the error channel what is being run."""

    def __init__(self) -> None:
        self.console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
        self._errors = Console(stderr=True, highlight=False)

    def tell(self, text: str) -> None:
        """A remark that is no result."""
        self._errors.print(f"[dim]{text}[/dim]")

    def say(self, text: str) -> None:
        """A remark below a table."""
        self.console.print(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table whose first column is words and whose others are numbers."""
        made = Table()
        for i, name in enumerate(columns):
            made.add_column(name, justify="right" if i else "left")
        for row in rows:
            made.add_row(*row)
        self.console.print(f"[bold]{title}[/bold]")
        self.console.print(made)


def seconds(summary: Summary) -> str:
    """A median with its quartiles, in milliseconds below a second."""
    unit, scale = ("ms", 1e3) if summary.median < 1 else ("s", 1.0)
    low, middle, high = (
        f"{value * scale:.3g}" for value in (summary.lower_quartile, summary.median, summary.upper_quartile)
    )
    return f"{middle} {unit} ({low} to {high})"


def times(summary: Summary) -> str:
    """A ratio's median with its quartiles."""
    return f"{summary.median:.2f} ({summary.lower_quartile:.2f} to {summary.upper_quartile:.2f})"


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _revision() -> str | None:
    """The commit that was measured, with a mark where files differ from it."""
    try:
        told = [
            subprocess.run(
                ["git", *what], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for what in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return told[0] + (" with changes" if told[1] else "")


def _plain(value: Any) -> Any:
    if isinstance(value, Summary):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value
