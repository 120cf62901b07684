"""What becomes of edits in force that new ones conflict with."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import get_args

from baft.errors import ConfigError, ConflictError
from baft.methods.base import Conflict
from baft.report import ConflictRow
from baft.types import EditRequest, OnConflict


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
    if on_conflict not in get_args(OnConflict):
        raise ConfigError(f"on_conflict is one of {', '.join(get_args(OnConflict))}, got {on_conflict!r}")
    if conflicts and on_conflict == "refuse":
        new, old = conflicts[0].new, conflicts[0].old
        raise ConflictError(
            f"{new.prompt!r} -> {new.target!r} conflicts with {old.prompt!r} -> {old.target!r} ({old.id}), "
            "which comes before it: leave one out, or edit with on_conflict='replace' or 'keep'"
        )
    if on_conflict != "replace":
        return list(requests)
    return [
        replace(
            request,
            replaces=tuple((one.new.id, one.old.id) for one in conflicts if one.new in request.edits),
        )
        for request in requests
    ]


def conflict_rows(conflicts: Sequence[Conflict], on_conflict: str) -> Iterator[ConflictRow]:
    """The conflicts as a report shows them."""
    for one in conflicts:
        new, old = one.new, one.old
        yield ConflictRow(new.id, old.id, old.prompt, old.target, on_conflict == "replace")
