"""The options that commands share, and how texts from the command line become edits and settings."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from baft.errors import ArtifactError, ConfigError, InputError
from baft.types import DEFAULT_METHOD, Edit, OnConflict

DEFAULT_HOST = "smollm2"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]
Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Saved edits: a folder NAME.baft.")]
HostOf = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="HOST", help="The host, if it is elsewhere than when saved."),
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", metavar="TYPE", help="Precision of the host, such as bfloat16.")
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="Where to put the host: cpu, cuda, auto, ...")
]
Terms = Annotated[bool, typer.Option("--accept-terms", help="Accept the terms of an embedded host.")]

Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="The text that is continued.")]
Target = Annotated[str | None, typer.Option("--target", "-t", help="What the model shall say.")]
Subject = Annotated[
    str | None, typer.Option("--subject", help="What the prompt is about, for methods that need it.")
]
From = Annotated[
    str | None, typer.Option("--from", metavar="FILE", help="Read the edits from JSON lines; - is stdin.")
]
Batch = Annotated[
    bool, typer.Option("--batch", help="Make the edits of --from in one optimization, not one by one.")
]
Host = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="HOST",
        help="Embedded name, folder or hub id; or saved edits to build on. "
        f"[default: that of --save if it is there, else {DEFAULT_HOST}]",
    ),
]
Method = Annotated[
    str | None,
    typer.Option("--method", metavar="NAME", help=f"See `baft methods`. [default: {DEFAULT_METHOD}]"),
]
Preset = Annotated[
    str | None, typer.Option("--preset", metavar="NAME", help="Settings of the method. [default: default]")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; may be repeated.")
]
Unrelated = Annotated[
    list[str] | None,
    typer.Option("--unrelated", metavar="TEXT", help="A prompt that shall stay as it is; may be repeated."),
]
Conflict = Annotated[
    OnConflict,
    typer.Option(
        "--on-conflict",
        help="What to do where a prompt could be about the new edit and about one in force; only methods "
        "whose edits know their scope can tell.",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the randomness. [default: 0]")]
Save = Annotated[
    Path | None,
    typer.Option("--save", "-o", metavar="ARTIFACT", help="Keep the edits in NAME.baft, or add them to it."),
]

_OWN_OPTIONS = ("method", "preset", "seed", "subject", "unrelated", "prompt", "target")


@dataclass(frozen=True)
class Recipe:
    """How edits shall be made.

    Args:
        method: The method.
        preset: Its preset.
        seed: Of its randomness.
        settings: Single settings in place of the preset's.
        known: Ids of the edits that are made already.
    """

    method: str
    preset: str
    seed: int
    settings: dict[str, Any]
    known: frozenset[str] = frozenset()


def read_settings(given: Sequence[str]) -> dict[str, Any]:
    """Reads `key=value` pairs; a value is JSON where it can be read as such, and else a text."""
    settings: dict[str, Any] = {}
    for pair in given:
        key, sign, value = pair.partition("=")
        key = key.strip()
        if not sign or not key:
            raise typer.BadParameter(f"expected key=value, got {pair!r}", param_hint="--set")
        if key in _OWN_OPTIONS:
            raise typer.BadParameter(f"{key} has its own option: --{key}", param_hint="--set")
        try:
            settings[key] = json.loads(value)
        except (ValueError, RecursionError):
            settings[key] = value
    return settings


def read_edits(source: str) -> list[Edit]:
    """Reads edits, one JSON object a line, from a file or (`-`) from stdin.

    Raises:
        InputError: If a line is no edit, or the same as an earlier one, or there is none.
    """
    from_stdin = source == "-"
    name = "stdin" if from_stdin else source
    raw = typer.get_binary_stream("stdin").read() if from_stdin else Path(source).read_bytes()
    try:
        lines = raw.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    edits: dict[str, tuple[int, Edit]] = {}
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {n}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON: {error}") from None
        edit = Edit.from_dict(row, where=where)
        if edit.id in edits:
            raise InputError(f"{where}: the same edit as on line {edits[edit.id][0]}")
        edits[edit.id] = n, edit
    if not edits:
        raise InputError(f'{name}: there is no edit: a line is like {{"prompt": "...", "target": "..."}}')
    return [edit for _, edit in edits.values()]


def find_recipe(
    base: Path | None, method: str | None, preset: str | None, seed: int | None, settings: dict[str, Any]
) -> Recipe:
    """What was asked for, checked without any host; edits come on top of `base` by its own recipe.

    Raises:
        ConfigError: If a name or a setting is wrong, or is not that of `base`.
    """
    from baft import artifact, config
    from baft.methods.base import methods

    if base is None:
        recipe = Recipe(method or DEFAULT_METHOD, preset or "default", seed or 0, settings)
        start = config.to_dict(methods.get(recipe.method).preset(recipe.preset))
    else:
        saved = artifact.read(base)
        asked = {"method": method, "preset": preset, "seed": seed}
        pairs = [(f"--{name}", value, getattr(saved, name)) for name, value in asked.items()]
        pairs += [
            (f"--set {key}", value, saved.settings[key])
            for key, value in settings.items()
            if key in saved.settings
        ]
        for option, value, has in pairs:
            if value is not None and value != has:
                raise ConfigError(
                    f"{base} was made with {option} {has}, got {value}: an edit set has one for all of its "
                    "edits; leave it out, or save to a new one"
                )
        known = frozenset(one.edit.id for one in saved.edits)
        recipe = Recipe(saved.method, saved.preset, saved.seed, {**saved.settings, **settings}, known)
        start = saved.settings
    kind = methods.get(recipe.method)
    where = f"{recipe.method}/{recipe.preset}"
    config.from_dict(type(kind.preset("default")), {**start, **recipe.settings}, where=where)
    return recipe


def require_place(path: Path) -> None:
    """Refuses, before any work is done, a place where no artifact can be written.

    Raises:
        ArtifactError: If the name or the folder will not do.
    """
    from baft.artifact import SUFFIX, require_free

    if path.suffix != SUFFIX:
        raise ArtifactError(f"the name of an edit set ends in {SUFFIX}, got {path}: use {path}{SUFFIX}")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise ArtifactError(f"{path} cannot be written: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK):
        raise ArtifactError(f"{path} cannot be written: {folder} is read-only; choose another folder")
    try:
        require_free(path)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror or error}; try again, or choose another name"
        ) from error
