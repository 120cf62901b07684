"""What an edit is, in plain data: no torch, no host."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from baft.errors import InputError


@dataclass(frozen=True, slots=True)
class Edit:
    """One fact to change: after `prompt` the model shall say `target`, and stop.

    Its `id` is 16 hex digits of the SHA-256 of its content.

    Args:
        prompt: The text that the target continues; a statement to be completed or a question.
        target: The new answer.
        subject: What the prompt is about, where a method needs to know it.
        ground_truth: The old answer, kept for the record; no method trains on it.
        rephrasings: Other wordings of the prompt, for methods that make use of them.
        neighbors: Prompts nearly about the same that shall stay as they are, for methods that make use of
            them.

    Raises:
        InputError: If the prompt, the target or another text is not one, or is empty or blank.
    """

    prompt: str
    target: str
    subject: str | None = None
    ground_truth: str | None = None
    rephrasings: tuple[str, ...] = ()
    neighbors: tuple[str, ...] = ()
    id: str = field(init=False, repr=False, compare=False)  # kept, as it is asked for again and again

    def __post_init__(self) -> None:
        for name in ("prompt", "target"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise InputError(f"{name} must be a string, got {type(value).__name__}: {value!r}")
            if not value.strip():
                raise InputError(f"{name} is empty or blank ({value!r}): give the text of the edit")
        for name in ("subject", "ground_truth"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InputError(f"{name} must be a string or absent, got {type(value).__name__}: {value!r}")
        for name in _LISTS:
            texts = getattr(self, name)
            if isinstance(texts, str) or not all(isinstance(one, str) and one.strip() for one in texts):
                raise InputError(f"{name} must be several texts, none of them blank, got {texts!r}")
            object.__setattr__(self, name, tuple(texts))
        content = json.dumps(self.to_dict(), sort_keys=True).encode()
        object.__setattr__(self, "id", hashlib.sha256(content).hexdigest()[:16])

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as plain data."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in _TEXTS}
        lists = {name: list(getattr(self, name)) for name in _LISTS}
        return {name: value for name, value in (fields | lists).items() if value not in (None, [])}

    @classmethod
    def from_dict(cls, row: dict[str, Any], *, where: str = "edit") -> "Edit":
        """Reads an edit from plain data; `where` names its place in error messages.

        Raises:
            InputError: If a field is missing, unknown or not a text.
        """
        known = (*_TEXTS, *_LISTS)
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with {', '.join(known)}, got {type(row).__name__}")
        unknown = sorted(set(row) - set(known))
        if unknown:
            raise InputError(f"{where}: unknown field {unknown[0]!r}; the fields are {', '.join(known)}")
        missing = [name for name in ("prompt", "target") if name not in row]
        if missing:
            raise InputError(f"{where}: field {missing[0]!r} is missing; an edit needs prompt and target")
        for name in _LISTS:
            if name in row and not isinstance(row[name], list):
                raise InputError(f"{where}: {name} must be a list of texts, got {row[name]!r}")
        try:
            fields: dict[str, Any] = {
                name: tuple(value) if name in _LISTS else value for name, value in row.items()
            }
            return cls(**fields)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


DEFAULT_METHOD = "baft-bank"  # of edits, where none is named

_TEXTS = ("prompt", "target", "subject", "ground_truth")
_LISTS = ("rephrasings", "neighbors")


@dataclass(frozen=True, slots=True)
class EditRequest:
    """What one optimization is asked to do: one edit is a single edit, several are a batch.

    Args:
        edits: The edits, each id once.
        unrelated: Texts that must stay as they are; never the prompts that locality is scored on.
        replaces: Pairs of ids: one of these edits, and an earlier one that is out of force for it.

    Raises:
        InputError: If there is no edit, or the same edit twice.
    """

    edits: tuple[Edit, ...]
    unrelated: tuple[str, ...] = field(default=())
    replaces: tuple[tuple[str, str], ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.edits:
            raise InputError("no edit given: a request needs at least one")
        ids = [edit.id for edit in self.edits]
        if len(set(ids)) < len(ids):
            twice = next(edit for edit in self.edits if ids.count(edit.id) > 1)
            raise InputError(
                f"the same edit stands twice in one request: {twice.prompt!r} -> {twice.target!r}"
            )


def replaced(requests: Sequence[EditRequest]) -> frozenset[str]:
    """The ids of the edits that a later one has taken the place of."""
    if not any(request.replaces for request in requests):
        return frozenset()
    seen: set[str] = set()
    found: set[str] = set()
    for request in requests:
        for edit in request.edits:
            found |= {old for new, old in request.replaces if new == edit.id and old in seen}
            seen.add(edit.id)
    return frozenset(found)


def as_edits(
    prompt: str | Edit | Sequence[Edit], target: str | None, subject: str | None
) -> tuple[Edit, ...]:
    """The edits of a call that names one by prompt and target, or gives one or several as they are.

    Raises:
        InputError: If the target is missing, or is given beside edits, or something is no edit.
    """
    if isinstance(prompt, str):
        if target is None:
            raise InputError("edit(prompt, target) needs the target: what shall the model say?")
        return (Edit(prompt, target, subject=subject),)
    if target is not None or subject is not None:
        raise InputError("target and subject go with a prompt in text; an Edit brings its own")
    if isinstance(prompt, Edit):
        return (prompt,)
    if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):  # where no type checker is
        raise InputError(f"expected a prompt, an Edit or a list of them, got {type(prompt).__name__}")
    edits: tuple[Edit, ...] = tuple(prompt)
    for edit in edits:
        if not isinstance(edit, Edit):
            raise InputError(f"expected an Edit, got {type(edit).__name__}: {edit!r}")
    return edits


OnConflict = Literal["keep", "replace", "refuse"]  # of edits that a prompt could both be about
ProbeKind = Literal["reliability", "generality", "locality", "portability"]


@dataclass(frozen=True, slots=True)
class Probe:
    """One question that is asked of an edited model.

    Args:
        edit_id: The edit it is about.
        kind: What it tests.
        prompt: The text asked.
        target: The right answer: the edit's, what follows from it, or, for locality, the one that stays;
            None where no answer is known and only sameness is asked for.
        tag: Its group within the kind, such as `rephrase` or `one_hop`.
        aliases: Other answers that are as right.
        chat: Whether it is a question for the chat template alone.
        earlier: Role and text of the messages before it in that chat.

    Raises:
        InputError: If the kind is none of the four, a text is blank, a target is missing that is needed, or
            there are earlier messages without a chat.
    """

    edit_id: str
    kind: ProbeKind
    prompt: str
    target: str | None
    tag: str = ""
    aliases: tuple[str, ...] = ()
    chat: bool = False
    earlier: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.earlier and not self.chat:
            raise InputError(f"{self.prompt!r} has earlier messages and is for no chat: give chat=True")
        if self.kind not in get_args(ProbeKind):
            raise InputError(f"a probe's kind is one of {', '.join(get_args(ProbeKind))}, got {self.kind!r}")
        if not self.prompt.strip():
            raise InputError(f"a {self.kind} probe has a blank prompt ({self.prompt!r})")
        if self.target is None and self.kind != "locality":
            raise InputError(f"the {self.kind} probe {self.prompt!r} needs a target")
        if any(not answer.strip() for answer in (*self.aliases, *([self.target] if self.target else []))):
            raise InputError(f"the {self.kind} probe {self.prompt!r} has a blank answer")
        if self.target == "":
            raise InputError(
                f"the {self.kind} probe {self.prompt!r} has an empty target: use None for unknown"
            )

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat that asks it."""
        return [{"role": role, "content": text} for role, text in (*self.earlier, ("user", self.prompt))]


@dataclass(frozen=True, slots=True)
class EditCase:
    """A row of a benchmark: an edit and what is asked about it.

    Args:
        id: Its name in the benchmark, the same in every run.
        edit: The edit.
        probes: The questions beside the edit's own prompt.

    Raises:
        InputError: If a probe is about another edit, or asks for reliability, which the edit's prompt does.
    """

    id: str
    edit: Edit
    probes: tuple[Probe, ...]

    def __post_init__(self) -> None:
        edit_id = self.edit.id
        for probe in self.probes:
            if probe.edit_id != edit_id:
                raise InputError(f"case {self.id}: the probe {probe.prompt!r} is about another edit")
            if probe.kind == "reliability":
                raise InputError(f"case {self.id}: reliability is asked of the edit's own prompt alone")

    @property
    def all_probes(self) -> tuple[Probe, ...]:
        """The edit's own prompt as a probe, and then the others."""
        edit = self.edit
        return (Probe(edit.id, "reliability", edit.prompt, edit.target, "edit"), *self.probes)
