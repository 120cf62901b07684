"""What methods share that edit by text put into the prompt: what is stored, put in, and measured."""

import re
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from baft.errors import DamagedArtifactError
from baft.hosts.architecture import find_architecture, input_device
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.hosts.prompting import Insertion, Row
from baft.hosts.turns import Turns
from baft.methods.base import EditOutcome, OnStep
from baft.methods.bm25 import Bm25, shares, words
from baft.methods.stateful import AdditiveEditor, State
from baft.methods.texts import measured, renderings
from baft.types import Edit, EditRequest

_NONE = -1  # fills up the shorter texts of a table


@runtime_checkable
class Finder(Protocol):
    """Finds the stored edit that a text is about."""

    def __call__(self, texts: Sequence[str]) -> Sequence[int | None]:
        """For each text the number of a stored edit, counted over all requests, or None."""


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """Puts into each prompt what is stored of the edit that it is about.

    Args:
        encoder: The host's.
        turns: Where the words of a user stand.
        find: Finds the edit.
        raw: What goes into a raw prompt: of each edit, pieces of which the first may be left out.
        chat: The same for a chat.
        limit: Longest prompt that is made, in tokens, or None.
    """

    encoder: Encoder
    turns: Turns
    find: Finder
    raw: Sequence[Sequence[Row]]
    chat: Sequence[Sequence[Row]]
    limit: int | None

    def __call__(self, prompts: Sequence[Row]) -> Sequence[Insertion | None]:
        """What goes into each prompt, at the beginning of the user's words."""
        places = [self.turns.words(row) for row in prompts]
        asked = [self.encoder.text(row[start:end]) for row, (start, end) in zip(prompts, places, strict=True)]
        found: list[Insertion | None] = []
        for row, (start, _), number in zip(prompts, places, self.find(asked), strict=True):
            if number is None:
                found.append(None)
                continue
            pieces = list((self.chat if self.turns.is_chat(row) else self.raw)[number])
            while self.limit is not None and pieces and sum(map(len, pieces)) > self.limit - len(row):
                pieces.pop(0)
            ids = tuple(token for piece in pieces for token in piece)
            found.append(Insertion(start, ids) if ids else None)
        return found


class ReadingEditor(AdditiveEditor):
    """A method whose edits are text that is put into the prompt.

    Nothing is trained: an edit is made as soon as it is stored, and whether the host then says its target is
    measured.

    Args:
        host: The host; never changed.
        config: The method's settings; `chat` says whether the chat rendering is measured beside the raw one.
        seed: Without effect: nothing here is random.
    """

    def __init__(self, host: Host, config: Any, *, seed: int = 0):
        super().__init__(host, config, seed=seed)
        limit = find_architecture(host.model).max_positions
        self.turns = Turns(self.encoder)
        # A reply has a quarter of the context, unless the prompt itself takes more.
        self._limit = None if limit is None else limit - limit // 4

    @abstractmethod
    def store(self, edits: Sequence[Edit]) -> Mapping[str, Tensor]:
        """What is stored of some edits, by name."""

    @abstractmethod
    def reader(self, state: State, requests: Sequence[EditRequest]) -> Reader:
        """What puts stored edits into prompts; `state` is not empty."""

    def fit(
        self, request: EditRequest, state: State, on_step: OnStep | None
    ) -> tuple[Mapping[str, Tensor], EditOutcome]:
        """Stores the edits, and measures what the host says with all of them in force."""
        began = time.monotonic()
        texts = renderings(self.encoder, request.edits, chat=self.config.chat, eos=False)
        n = len(self.requests)
        stored = {f"{n}.{name}": tensor for name, tensor in self.store(request.edits).items()}
        made = {**state, **stored}
        edited = EditedModel(self.host.model)
        self.put(edited, made, (*self.requests, request))
        return made, EditOutcome.of(
            request.edits,
            measured(self.host, self.encoder, edited, texts)[0],
            losses=(),
            n_steps=0,
            stopped="closed_form",
            seconds_s=time.monotonic() - began,
        )

    def put(self, edited: EditedModel, state: State, requests: Sequence[EditRequest]) -> None:
        """What is stored is put into prompts."""
        edited.prompter = self.reader(state, requests) if state else None

    def rows_of(self, state: State, name: str, n_requests: int) -> list[list[Row]]:
        """What is stored under a name: of each edit of all requests its pieces, without what fills them up.

        Raises:
            DamagedArtifactError: If a number is no token of this host.
        """
        embeddings: Any = self.host.model.get_input_embeddings()
        n_tokens = embeddings.weight.shape[0]
        found: list[list[Row]] = []
        for i in range(n_requests):
            tensor = state[f"{i}.{name}"]
            if tensor.dtype != torch.long or bool(((tensor < _NONE) | (tensor >= n_tokens)).any()):
                raise DamagedArtifactError(f"tensor '{i}.{name}' holds numbers that are no tokens")
            table = tensor.tolist() if tensor.ndim == 3 else tensor.unsqueeze(1).tolist()
            found += [[tuple(t for t in piece if t != _NONE) for piece in pieces] for pieces in table]
        return found

    def table(self, rows: Sequence[Row]) -> Tensor:
        """Rows as one table, `[row, longest]`, filled up with -1."""
        width = max((len(row) for row in rows), default=0)
        filled = [[*row, *[_NONE] * (width - len(row))] for row in rows]
        found = torch.tensor(filled, dtype=torch.long, device=input_device(self.host.model))
        return found.view(len(rows), width)


def edit_shares(edit: Edit, bm25: Bm25, subject_weight: float) -> dict[str, float]:
    """What each word of an edit's prompt adds to its score, as a share of the score for itself.

    Args:
        edit: The edit.
        bm25: The word weights.
        subject_weight: The least share of the words of its subject, which is guessed where it is not given.
    """
    text = edit.prompt
    subject = guessed_subject(text, bm25) if edit.subject is None else edit.subject
    if not set(words(subject)) & set(words(text)):  # a prompt that does not name what it is about
        text = f"{text} {subject}"
    return shares(bm25.weights(text), set(words(subject)), subject_weight)


def latest_best(scores: Float[Tensor, " edit"]) -> int:
    """The number of the highest score, the last of equals."""
    return len(scores) - 1 - int(scores.flip(0).argmax())


def statement(edit: Edit) -> str:
    """An edit as a sentence."""
    seam = "" if edit.prompt[-1:].isspace() or edit.target[:1].isspace() else " "
    return f"{edit.prompt}{seam}{edit.target.rstrip()}".rstrip(".") + "."


_NAME = r"(?:[^\W\d_a-z][\w'’.-]*|\d[\w.-]*)"
_NAMES = re.compile(rf"{_NAME}(?:\s+{_NAME})*")


def guessed_subject(prompt: str, bm25: Bm25) -> str:
    """What a prompt is probably about where nobody says it: its longest run of capitalized words or numbers.

    A first word that is common, such as "The" or "Which", is none of it. Empty where there is no such run.
    """
    runs = [re.sub(r"['’]s$", "", run) for run in _NAMES.findall(prompt)]
    if runs and prompt.lstrip().startswith(runs[0]):
        first, _, others = runs[0].partition(" ")
        if any(bm25.is_common(word) for word in words(first)):
            runs[0] = others.strip()
    return max(runs, key=len, default="")
