"""Edit sets put together and taken apart, where edits do not know each other: exact, and without any host.

What an edit added are the tensors whose names begin with its id, and nothing else depends on it. So a set
without an edit is what it would be had that edit never been made.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from baft.artifact.codec import EditSet, StoredEdit
from baft.errors import ArtifactError, HostMismatchError, UnknownNameError
from baft.hosts.identity import compare
from baft.types import EditRequest


def subset(edits: EditSet, ids: Collection[str]) -> EditSet:
    """The set of some edits of a set, in their order.

    Args:
        edits: The set.
        ids: Which edits are kept.

    Raises:
        UnknownNameError: If the set has no edit of such an id.
        ArtifactError: If edits of this set know each other, or none would be left.
    """
    _require_independent(edits)
    wanted = _known(edits, ids)
    if not wanted:
        raise ArtifactError("an edit set is never empty: keep at least one edit, or delete the set")
    kept = [(one, request) for one, request in _with_requests(edits) if one.edit.id in wanted]
    return _of(edits, kept, edits.requests)


def without(edits: EditSet, ids: Collection[str]) -> EditSet:
    """The set without some of its edits: as if these had never been made.

    Raises:
        UnknownNameError: If the set has no edit of such an id.
        ArtifactError: If edits of this set know each other, or none would be left.
    """
    _require_independent(edits)
    gone = _known(edits, ids)
    return subset(edits, [one.edit.id for one in edits.edits if one.edit.id not in gone])


def merge(first: EditSet, second: EditSet) -> EditSet:
    """The edits of two sets of one host and method: those of the first, and then those only the second has.

    Where edits of both could be meant by a prompt, the likelier acts, and of equals the later one. An edit
    that the second set has replaced by one of the first stays out of force, and stands before that one.
    Where the first has both, and both in force, they stay so: which of its own edits replaced which directly,
    the first set says.

    Raises:
        HostMismatchError: If the sets are of different hosts.
        ArtifactError: If they differ in method or settings, or their edits know each other.
    """
    for one in (first, second):
        _require_independent(one)
    compare(first.host, second.host)
    if first.host.tokenizer_hash != second.host.tokenizer_hash:
        raise HostMismatchError(
            "the sets were made with different tokenizers or chat templates: make one of them anew"
        )
    for name in ("method", "settings", "layers", "positions"):
        mine, other = getattr(first, name), getattr(second, name)
        if mine != other:
            raise ArtifactError(
                f"the sets differ in {name}, {mine} and {other}, and go together only if made alike: make "
                "the edits of one of them anew"
            )
    known = {one.edit.id for one in first.edits}
    added = [pair for pair in _with_requests(second) if pair[0].edit.id not in known]
    state = {name: tensor for name, tensor in second.state.items() if name.partition(".")[0] not in known}
    pieces = (*first.pieces, *second.pieces)
    both = replace(first, state={**first.state, **state}, pieces=pieces)
    # Whether one edit of the first replaces another is for the first to say.
    theirs = [
        replace(request, replaces=tuple(pair for pair in request.replaces if not known.issuperset(pair)))
        for request in second.requests
    ]
    return _of(both, _side_by_side(_with_requests(first), added, theirs), [*first.requests, *theirs])


def _side_by_side(
    mine: Sequence[tuple[StoredEdit, EditRequest]],
    added: Sequence[tuple[StoredEdit, EditRequest]],
    theirs: Sequence[EditRequest],
) -> list[tuple[StoredEdit, EditRequest]]:
    """Edits of a set, and then added ones; what one of the set has replaced elsewhere stands before it.

    So a request may be parted: those of its edits that are still in force stay behind the set's.
    """
    olds, left = _olds(theirs), {pair[0].edit.id: pair for pair in added}
    places = {edit: place for place, edit in enumerate(left)}
    parts: list[list[tuple[StoredEdit, EditRequest]]] = []
    for group in _by_request(mine):
        below = _below([one.edit.id for one, _ in group], olds)
        before = sorted((old for old in below if old in left), key=places.__getitem__)
        parts += [*_by_request([left.pop(old) for old in before]), group]
    parts += _by_request(list(left.values()))
    found: list[tuple[StoredEdit, EditRequest]] = []
    for number, part in enumerate(parts):
        request = replace(part[0][1], edits=tuple(one.edit for one, _ in part))
        found += [(replace(one, request=number), request) for one, _ in part]
    return found


def _by_request(
    pairs: Sequence[tuple[StoredEdit, EditRequest]],
) -> list[list[tuple[StoredEdit, EditRequest]]]:
    found: dict[int, list[tuple[StoredEdit, EditRequest]]] = {}
    for pair in pairs:
        found.setdefault(pair[0].request, []).append(pair)
    return list(found.values())


def _olds(requests: Sequence[EditRequest]) -> dict[str, list[str]]:
    """What each edit has replaced."""
    found: dict[str, list[str]] = {}
    for new, old in (pair for request in requests for pair in request.replaces):
        found.setdefault(new, []).append(old)
    return found


def _below(
    ids: Collection[str], olds: Mapping[str, Sequence[str]], ends: Collection[str] = ()
) -> dict[str, None]:
    """What some edits have replaced, what that had, and so on as far as `ends`; in the order it is met."""
    found, left = dict[str, None](), list(ids)
    while left:
        for old in olds.get(left.pop(), ()):
            if old not in found:
                found[old] = None
                if old not in ends:
                    left.append(old)
    return found


def _known(edits: EditSet, ids: Collection[str]) -> frozenset[str]:
    """The ids, all of which edits of the set must have."""
    known = [one.edit.id for one in edits.edits]
    if other := [one for one in ids if not isinstance(one, str)]:
        raise UnknownNameError(f"ids of edits are texts, got {other[0]!r}: give each by itself")
    wanted = frozenset(ids)
    if strangers := sorted(wanted.difference(known)):
        raise UnknownNameError(f"no edit has the id {strangers[0]!r}; the ids are {', '.join(known)}")
    return wanted


def _of(
    edits: EditSet, chosen: Sequence[tuple[StoredEdit, EditRequest]], before: Sequence[EditRequest]
) -> EditSet:
    """The set with these edits, their requests numbered anew.

    Args:
        edits: What has all their tensors.
        chosen: The edits with their requests.
        before: All requests there were, those without a chosen edit too.
    """
    numbers = {number: i for i, number in enumerate(dict.fromkeys(one.request for one, _ in chosen))}
    requests = {numbers[one.request]: request for one, request in chosen}
    ids = {one.edit.id for one, _ in chosen}
    kept = [requests[i] for i in range(len(requests))]
    return replace(
        edits,
        edits=tuple(replace(one, request=numbers[one.request]) for one, _ in chosen),
        memory=memory_of(_with_what_they_replace(before, kept, ids)),
        state={name: tensor for name, tensor in edits.state.items() if name.partition(".")[0] in ids},
    )


def _with_what_they_replace(
    before: Sequence[EditRequest], kept: Sequence[EditRequest], ids: Collection[str]
) -> list[EditRequest]:
    """Requests without the edits that are gone: what one of these replaced goes to whoever replaced it."""
    olds = _olds(before)

    def held_by(new: str) -> list[str]:
        return [old for old in _below([new], olds, ends=ids) if old in ids and old != new]

    return [
        replace(
            request,
            replaces=tuple(
                (edit.id, old) for edit in request.edits if edit.id in ids for old in held_by(edit.id)
            ),
        )
        for request in kept
    ]


def memory_of(requests: Sequence[EditRequest]) -> dict[str, Any]:
    """What a set remembers of requests beside their edits, by the numbers of those that have any."""
    return {
        "unrelated": {str(i): list(one.unrelated) for i, one in enumerate(requests) if one.unrelated},
        "replaces": {str(i): [*map(list, one.replaces)] for i, one in enumerate(requests) if one.replaces},
    }


def _with_requests(edits: EditSet) -> list[tuple[StoredEdit, EditRequest]]:
    by_edit = {edit.id: request for request in edits.requests for edit in request.edits}
    return [(one, by_edit[one.edit.id]) for one in edits.edits]


def _require_independent(edits: EditSet) -> None:
    ids = {one.edit.id for one in edits.edits}
    if any(name.partition(".")[0] not in ids for name in edits.state):
        raise ArtifactError(
            f"edits by {edits.method}/{edits.preset} share what they learned, and a set of them cannot be "
            "put together or taken apart: undo the last ones, or edit anew"
        )
