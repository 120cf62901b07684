"""The commands about scopes: what tells which edit, if any, a prompt is about."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from baft.cli.options import DEFAULT_HOST, Device, Dtype, Json, Quiet, Terms
from baft.cli.terminal import Terminal
from baft.errors import ConfigError

if TYPE_CHECKING:
    from baft.scope.heads import Head

scope = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Train what tells which edit, if any, a prompt is about.",
)


@scope.callback()
def _group() -> None:
    """A group of commands, be it of one."""


@scope.command()
def train(
    host: Annotated[
        str, typer.Argument(metavar="HOST", help="Embedded name, folder or hub id.")
    ] = DEFAULT_HOST,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the text and of the first weights.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Train another where this host has one in the cache.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write it there, and leave the cache as it is."),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    accept_terms: Terms = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the scope head of a host, once for each host.

    It learns from baft's own text to tell whom and what a prompt is about, sets from when on an edit acts,
    and says with which confidence. That takes minutes; the host stays as it is. Hosts that baft comes with
    have a head already.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    with terminal.waiting(f"loading {host}"):
        from baft.hosts.models import load_host
        from baft.scope.heads import cached_at, find_head, shipped_head, train_head

        loaded = load_host(host, dtype=dtype, device=device, accept_terms=accept_terms)

    path = out or cached_at(loaded)
    if out is None and shipped_head(loaded) is not None:
        raise ConfigError(
            f"baft comes with a scope head for {host}, which is used: --out FILE writes another"
        )
    if path is None:
        raise ConfigError(f"hooks of other libraries hang in {host}, which may change it: give --out FILE")
    there = find_head(loaded) if out is None and not force else None
    if there is not None:
        terminal.result(_data(there, path, made=False), f"{host} has a scope head: {path}", _bounds(there))
        return
    with terminal.training(1) as bar:
        bar.next()
        head = train_head(loaded, seed=seed, path=path, on_step=bar.step)
    words = f"trained in {head.about.seconds:.0f} s, kept in {path}"
    terminal.result(_data(head, path, made=True), words, _bounds(head))


def _data(head: "Head", path: Path, *, made: bool) -> dict[str, Any]:
    from dataclasses import asdict

    about = head.about
    return {
        "host": about.host.name,
        "file": str(path),
        "trained_now": made,
        "seed": about.seed,
        "seconds": about.seconds,
        "settings": asdict(about.config),
        "calibration": {
            **asdict(about.calibration),
            "named_bound": about.calibration.named_bound,
        },
        "n_ordinary": len(head.ordinary.lengths),
    }


def _bounds(head: "Head") -> str:
    found = head.about.calibration
    return (
        f"with 95 % confidence at most {found.named_bound:.1%} of neighbors with another subject and "
        f"{found.other_relation:.0%} of those with another relation fire an edit ({found.n_near} of each "
        f"asked); with {found.n_edits} edits {found.n_fired} of {found.n_asked} questions about "
        "something else fired one; an ordinary text fires a given edit with a probability of at most "
        f"1/{len(head.ordinary.lengths) + 1}, unless the edit is itself about what such texts say"
    )
