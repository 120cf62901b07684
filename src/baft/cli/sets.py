"""The commands that put saved edits together, take them apart, and fit them to each other."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baft.cli.options import Artifact, Device, Dtype, HostOf, Json, Quiet, Terms, require_place
from baft.cli.tables import count, report_view, table
from baft.cli.terminal import Terminal
from baft.cli.work import load, require_held
from baft.errors import ArtifactError, UnknownNameError

if TYPE_CHECKING:
    from baft.artifact import EditSet

Out = Annotated[
    Path | None,
    typer.Option("--save", "-o", metavar="OTHER", help="Write to NAME.baft and leave ARTIFACT."),
]


def remove(
    artifact: Artifact,
    edits: Annotated[
        list[str], typer.Argument(metavar="EDIT...", help="Numbers as `baft show` has them, or ids.")
    ],
    save: Out = None,
    as_json: Json = False,
) -> None:
    """Take single edits out of saved ones, whenever they were made.

    All others are as if these had never been. Works where edits do not know each other, as with the default
    method; `baft undo` takes back the last ones, whatever the method.
    """
    from baft.artifact import read, without, write

    saved = read(artifact)
    wanted = {_id_of(one, saved) for one in edits}
    n_left = len(saved.edits) - len(wanted)
    if not n_left:
        n = len(saved.requests)
        raise ArtifactError(
            f"no edit would be left in {artifact}: `baft undo {artifact} -n {n} --delete` deletes it"
        )
    place = save or artifact
    require_place(place)
    write(place, without(saved, wanted))
    gone = [one.edit for one in saved.edits if one.edit.id in wanted]
    data = {"saved": str(place), "removed": [one.to_dict() for one in gone], "n_left": n_left}
    rows = [(one.prompt, one.target) for one in gone]
    end = f"{count(n_left, 'edit')} left in {place}"
    Terminal(as_json=as_json).result(data, table(("removed", "target"), rows), "", end)


def merge(
    artifact: Artifact,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Whose edits are added: NAME.baft.")],
    save: Annotated[
        Path | None,
        typer.Option("--save", "-o", metavar="THIRD", help="Write to NAME.baft and leave ARTIFACT."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put the edits of two saved sets into one.

    Nothing is trained. Both must be of one host and made alike; edits that both hold are taken once.
    The host is not run, so edits of one prompt that say different things are not looked for, and the likelier
    acts, of equals the later one; `Model.merge` in Python finds them.
    """
    from baft.artifact import merge as merged
    from baft.artifact import read, write

    first = read(artifact)
    both = merged(first, read(other))
    place = save or artifact
    require_place(place)
    write(place, both)
    known = {one.edit.id for one in first.edits}
    added = [one.edit for one in both.edits if one.edit.id not in known]
    data = {"saved": str(place), "added": [one.to_dict() for one in added], "n_edits": len(both.edits)}
    rows = [(one.prompt, one.target) for one in added]
    end = f"{count(len(both.edits), 'edit')} in {place}"
    Terminal(as_json=as_json).result(data, table(("added", "target"), rows), "", end)


def refit(
    artifact: Artifact,
    edits: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EDIT...]",
            help="Numbers as `baft show` has them, or ids; two at least. "
            "[default: all that fire on another's prompt]",
        ),
    ] = None,
    save: Out = None,
    model: HostOf = None,
    dtype: Dtype = None,
    device: Device = None,
    accept_terms: Terms = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit saved edits that share a scope to each other.

    Each that fires on a prompt of another is trained anew, so as to be silent there, and replaces what it
    was; the report says from what it cannot be kept. It is one request: `baft undo` takes it back. The exit
    code is 1 if an edit failed; it is kept all the same.
    """
    from baft.artifact import read

    terminal = Terminal(as_json=as_json, quiet=quiet)
    saved = read(artifact)
    ids = [_id_of(one, saved) for one in edits or ()]
    place = save or artifact
    require_place(place)
    loaded = load(terminal, str(artifact), model, dtype, device, accept_terms)
    with terminal.training(1) as bar:
        bar.next()
        report = loaded.refit(*ids, on_step=bar.step)
    loaded.save(place)
    data = {"saved": str(place), "report": report.to_dict()}
    terminal.result(data, *report_view([report]), f"saved in {place}")
    require_held([row.decoded for row in report.rows])


def _id_of(given: str, saved: "EditSet") -> str:
    """The id of an edit that is named by its number or its id."""
    ids = [one.edit.id for one in saved.edits]
    if given in ids:
        return given
    if given.isdecimal() and 1 <= int(given) <= len(ids):
        return ids[int(given) - 1]
    more = ", ..." if len(ids) > 3 else ""
    raise UnknownNameError(
        f"no edit {given!r}: give a number from 1 to {len(ids)}, or an id ({', '.join(ids[:3])}{more})"
    )
