"""Edits that share a scope, fitted to each other: each is kept from the others' prompts, and trained anew.

Edits do not know each other, and after a refit they still do not: one that fires on a wording of another is
replaced by itself with that wording among its neighbors, as if its user had named it there. All of it is one
request, so that taking it back brings back what it replaced.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from baft.errors import ConfigError, ConflictError, EditError, InputError, UnknownNameError
from baft.hosts.speaking import Speaker
from baft.methods.base import Editor, Heard, ScopedEditor
from baft.report import EditReport, RefitRow
from baft.types import Edit, EditRequest, replaced
from baft.witness import Witness

_Askings = Mapping[str, tuple[Heard, ...]]  # who hears each wording, in each way of asking


@dataclass(frozen=True, slots=True)
class _Standing:
    """How an edit stands among the others, in the terms of `RefitRow`."""

    n_own: int
    own: int
    n_others: int
    others: int
    decoded: bool


@final
class Refit:
    """A refit that was planned: what is to be made, and how the edits stand before.

    Args:
        editor: The method, with the edits in force.
        speaker: Asks the host.
        ids: Of the edits, two at least, in any order; none for all that share a scope.

    Raises:
        ConfigError: If edits of this method have no scope.
        UnknownNameError: If no edit has such an id.
        InputError: If one edit alone is named, or one that was replaced.
        ConflictError: If two of the edits have a wording in common, and different targets.
        EditError: If no edit fires on another's wording, or none that does can be kept from it.
    """

    def __init__(self, editor: Editor, speaker: Speaker, ids: Sequence[str]):
        if not isinstance(editor, ScopedEditor):
            raise ConfigError(
                f"edits by {editor.name} have no scope, and a refit is of edits that know which prompts "
                "they are about, such as those by baft-bank"
            )
        self._editor, self._witness = editor, Witness(speaker, editor.edited)
        self._edits = _named(editor, ids)
        heard = self._heard()
        fired_on = self._fired_on(heard)
        if not ids:
            met = {one.id for others in fired_on.values() for one, _ in others}
            met |= {own for own, others in fired_on.items() if others}
            self._edits = [edit for edit in self._edits if edit.id in met]
        for both in itertools.combinations(self._edits, 2):
            _require_two_wordings(*both)
        self._new: dict[str, Edit] = {}
        self._inseparable: dict[str, tuple[str, ...]] = {}
        unrelated = {edit.id: request.unrelated for request in editor.requests for edit in request.edits}
        for edit in self._edits:
            reached = _once(text for _, text in fired_on[edit.id])
            # Prompts were unrelated to all edits of a request; now every edit has its own.
            own = replace(edit, neighbors=_once((*edit.neighbors, *unrelated[edit.id])))
            kept_from = editor.separable(own, reached) if reached else ()
            self._inseparable[edit.id] = tuple(text for text in reached if text not in kept_from)
            if kept_from:
                self._new[edit.id] = replace(own, neighbors=(*own.neighbors, *kept_from))
        if not self._new:
            raise EditError(self._why_none())
        self.request = EditRequest(
            tuple(self._new.values()), replaces=tuple((new.id, old) for old, new in self._new.items())
        )
        self._before = self._after = self._standings(self._edits, heard)

    def look_again(self) -> None:
        """Notes how the edits stand once the request is made."""
        self._after = self._standings([self._now(edit) for edit in self._edits], self._heard())

    def told(self, report: EditReport) -> EditReport:
        """The report of the request, with what became of all edits that took part."""
        rows = tuple(
            RefitRow(
                edit_id=self._now(edit).id,
                old_id=edit.id,
                prompt=edit.prompt,
                target=edit.target,
                n_own=was.n_own,
                own=(was.own, now.own),
                n_others=was.n_others,
                others=(was.others, now.others),
                decoded=(was.decoded, now.decoded),
                inseparable=self._inseparable[edit.id],
            )
            for edit, was, now in zip(self._edits, self._before, self._after, strict=True)
        )
        return replace(report, refit=rows)

    def _now(self, edit: Edit) -> Edit:
        """What an edit has become; itself if it stays as it was."""
        return self._new.get(edit.id, edit)

    def _of_others(self, edit: Edit) -> list[tuple[Edit, str]]:
        """The others that say something else, with each of their wordings."""
        return [(one, text) for one in self._edits if _differ(edit, one) for text in _wordings(one)]

    def _fired_on(self, heard: _Askings) -> dict[str, list[tuple[Edit, str]]]:
        """On which wordings of others, that say something else, each edit fires, however these are asked.

        It goes over what fires, for of thousands of edits hardly any does.
        """
        edits = {edit.id: edit for edit in self._edits}
        found: dict[str, list[tuple[Edit, str]]] = {own: [] for own in edits}
        for one in self._edits:
            for text in _wordings(one):
                for own in edits.keys() & set[str]().union(*(asking.firing for asking in heard[text])):
                    if _differ(edits[own], one):
                        found[own].append((one, text))
        return found

    def _heard(self) -> _Askings:
        """Who hears each wording of all edits, in each way of asking."""
        texts = _once(text for edit in self._edits for text in _wordings(edit))
        return dict(zip(texts, self._editor.heard(texts), strict=True))

    def _standings(self, edits: Sequence[Edit], heard: _Askings) -> list[_Standing]:
        """How the edits stand, as the editor has them in force."""
        says = self._witness.check(edits, eos=self._editor.trains_eos)
        found = []
        for edit, (_, decoded) in zip(edits, says, strict=True):
            own = [asking for text in _wordings(edit) for asking in heard[text]]
            theirs = _once(text for _, text in self._of_others(edit))
            others = [asking for text in theirs for asking in heard[text]]
            n_acting = sum(asking.acting == edit.id for asking in own)
            n_firing = sum(edit.id in asking.firing for asking in others)
            found.append(_Standing(len(own), n_acting, len(others), n_firing, decoded))
        return found

    def _why_none(self) -> str:
        """Why there is nothing to make."""
        pairs = [
            f"{edit.prompt!r} -> {edit.target!r} from {text!r}"
            for edit in self._edits
            for text in self._inseparable[edit.id]
        ]
        if not pairs:
            return "none of these edits fires on a wording of another: there is nothing to refit"
        return (
            f"no scope can tell {'; '.join(pairs)}: nothing was changed; reword one of the two, or remove it"
        )


def _named(editor: ScopedEditor, ids: Sequence[str]) -> list[Edit]:
    """The edits with these ids, or all that are in force, in the order in which they were made."""
    edits = {edit.id: edit for request in editor.requests for edit in request.edits}
    out_of_force = replaced(editor.requests)
    if not ids:
        return [edit for edit in edits.values() if edit.id not in out_of_force]
    if strangers := [one for one in ids if one not in edits]:
        raise UnknownNameError(f"no edit has the id {strangers[0]!r}; the ids are {', '.join(edits)}")
    if gone := out_of_force.intersection(ids):
        edit = edits[min(gone)]
        raise InputError(
            f"{edit.prompt!r} -> {edit.target!r} ({edit.id}) was replaced by a later edit: refit that, or "
            "undo it first"
        )
    if len(set(ids)) < 2:
        raise InputError(
            f"a refit is of two edits or more, got {ids[0]}: name the others, too, or none for all that "
            "fire on each other's prompts"
        )
    return [edit for edit in edits.values() if edit.id in ids]


def _require_two_wordings(one: Edit, other: Edit) -> None:
    common = set(_wordings(one)).intersection(_wordings(other))
    if common and _differ(one, other):
        first, second = (f"{edit.prompt!r} -> {edit.target!r} ({edit.id})" for edit in (one, other))
        raise ConflictError(
            f"{first} and {second} both answer {min(common)!r}, and no refit can give that two answers: "
            "remove one of them"
        )


def _wordings(edit: Edit) -> tuple[str, ...]:
    """What an edit is found by."""
    return (edit.prompt, *edit.rephrasings)


def _differ(one: Edit, other: Edit) -> bool:
    return one.target.strip() != other.target.strip()


def _once(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))
