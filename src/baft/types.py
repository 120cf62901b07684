"""What an edit is, in plain data: no torch, no host."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from baft.errors import InputError


@dataclass(frozen=True, slots=True)
class Edit:
    """One fact to change: after `prompt` the model shall say `target`, and stop.

    Args:
        prompt: The text that the target continues; a statement to be completed or a question.
        target: The new answer.
        subject: What the prompt is about, where a method needs to know it.
        ground_truth: The old answer, kept for the record; no method trains on it.

    Raises:
        InputError: If the prompt or the target is not a text, or is empty or blank.
    """

    prompt: str
    target: str
    subject: str | None = None
    ground_truth: str | None = None

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

    @property
    def id(self) -> str:
        """Name of the edit: 16 hex digits of the SHA-256 of its content."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, str]:
        """The fields that are set, as plain data."""
        fields = {"prompt": self.prompt, "target": self.target, "subject": self.subject}
        fields["ground_truth"] = self.ground_truth
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def from_dict(cls, row: dict[str, Any], *, where: str = "edit") -> "Edit":
        """Reads an edit from plain data; `where` names its place in error messages.

        Raises:
            InputError: If a field is missing, unknown or not a text.
        """
        known = ("prompt", "target", "subject", "ground_truth")
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with {', '.join(known)}, got {type(row).__name__}")
        unknown = sorted(set(row) - set(known))
        if unknown:
            raise InputError(f"{where}: unknown field {unknown[0]!r}; the fields are {', '.join(known)}")
        missing = [name for name in ("prompt", "target") if name not in row]
        if missing:
            raise InputError(f"{where}: field {missing[0]!r} is missing; an edit needs prompt and target")
        try:
            return cls(**row)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


@dataclass(frozen=True, slots=True)
class EditRequest:
    """What one optimization is asked to do: one edit is a single edit, several are a batch.

    Args:
        edits: The edits, each id once.
        unrelated: Texts that must stay as they are; never the prompts that locality is scored on.

    Raises:
        InputError: If there is no edit, or the same edit twice.
    """

    edits: tuple[Edit, ...]
    unrelated: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.edits:
            raise InputError("no edit given: a request needs at least one")
        ids = [edit.id for edit in self.edits]
        if len(set(ids)) < len(ids):
            twice = next(edit for edit in self.edits if ids.count(edit.id) > 1)
            raise InputError(
                f"the same edit stands twice in one request: {twice.prompt!r} -> {twice.target!r}"
            )
