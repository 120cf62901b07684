"""What new edits meet in a model: themselves, and edits that they conflict with."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import get_args

from torch import Tensor

from baft.errors import ConfigError, ConflictError, InputError
from baft.methods.base import Conflict, Editor
from baft.report import ConflictRow
from baft.types import Edit, EditRequest, OnConflict, replaced

logger = logging.getLogger(__name__)


def require_new(edits: Sequence[Edit], requests: Sequence[EditRequest]) -> None:
    """Refuses edits that are there already.

    Raises:
        InputError: If one of them is in force, or was replaced.
    """
    known, out_of_force = {edit.id for request in requests for edit in request.edits}, replaced(requests)
    for edit in edits:
        if edit.id in known:
            why = "is in force already: leave it out, or take it back first"
            if edit.id in out_of_force:
                why = "was replaced by a later edit: undo or remove that first"
            raise InputError(f"{edit.prompt!r} -> {edit.target!r} {why}")


def conflicts_of(editor: Editor, requests: Sequence[EditRequest]) -> list[Conflict]:
    """What the edits of requests, all with the same unrelated prompts, conflict with and do not replace."""
    gone = {old for request in requests for _, old in request.replaces}
    edits = [edit for request in requests for edit in request.edits]
    return [one for one in editor.conflicts(edits, requests[0].unrelated) if one.old.id not in gone]


def require_choice(on_conflict: str) -> None:
    """Refuses what is no way to settle a conflict.

    Raises:
        ConfigError: If `on_conflict` is none of the three.
    """
    if on_conflict not in get_args(OnConflict):
        raise ConfigError(f"on_conflict is one of {', '.join(get_args(OnConflict))}, got {on_conflict!r}")


def settled(
    requests: Sequence[EditRequest], conflicts: Sequence[Conflict], on_conflict: str
) -> list[EditRequest]:
    """The requests, each with what it replaces.

    Args:
        requests: What is asked for.
        conflicts: With edits in force.
        on_conflict: As for `Model.edit`.

    Raises:
        ConfigError: If `on_conflict` is none of the three.
        ConflictError: If there are conflicts, and they are refused.
    """
    require_choice(on_conflict)
    if conflicts and on_conflict == "refuse":
        new, old = conflicts[0].new, conflicts[0].old
        raise ConflictError(
            f"{new.prompt!r} -> {new.target!r} conflicts with {old.prompt!r} -> {old.target!r} ({old.id}), "
            "which comes before it: leave one out, or say on_conflict='replace' or 'keep'"
        )
    if on_conflict != "replace":
        return list(requests)
    met: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for one in conflicts:
        met[one.new.id].append((one.new.id, one.old.id))
    return [
        replace(
            request, replaces=(*request.replaces, *(pair for edit in request.edits for pair in met[edit.id]))
        )
        for request in requests
    ]


def settled_beside(
    editor: Editor, requests: Sequence[EditRequest], state: Mapping[str, Tensor], on_conflict: str
) -> tuple[list[EditRequest], Mapping[str, Tensor]]:
    """As `settled`, for edits that were made elsewhere and come beside those of an editor; and their tensors.

    What is kept is warned of, for no report tells it.

    Args:
        editor: The method, with its edits.
        requests: Of all edits together.
        state: Their tensors.
        on_conflict: As for `Model.merge`.

    Returns:
        The requests, and the tensors as they come into force here.

    Raises:
        ConfigError: If `on_conflict` is none of the three.
        ConflictError: If there are conflicts, and they are refused.
        DamagedArtifactError: If tensors are missing or misshapen.
    """
    here, gone = {edit.id for request in editor.requests for edit in request.edits}, replaced(requests)
    added = [
        EditRequest(new, request.unrelated)
        for request in requests
        if (new := tuple(edit for edit in request.edits if edit.id not in here | gone))
    ]
    state = editor.as_here(state, requests)
    met = [one for one in editor.conflicts_of_made(added, state) if one.old.id not in gone]
    if met and on_conflict == "keep":
        pairs = [f"{one.new.prompt!r} -> {one.new.target!r} ({one.old.target!r} before)" for one in met]
        more = f", and {len(pairs) - 3} more" if len(pairs) > 3 else ""
        logger.warning(
            "edits that were added conflict with edits in force; the likelier acts, of equals the later one: "
            "%s%s",
            ", ".join(pairs[:3]),
            more,
        )
    return settled(requests, met, on_conflict), state


def conflict_rows(conflicts: Sequence[Conflict], on_conflict: str) -> Iterator[ConflictRow]:
    """The conflicts as a report shows them."""
    for one in conflicts:
        new, old = one.new, one.old
        yield ConflictRow(new.id, old.id, old.prompt, old.target, on_conflict == "replace")
