"""The scope of edits on one host: what they are found by, and what a prompt is about."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from baft.errors import InputError
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.hosts.turns import Row
from baft.scope.heads import find_head
from baft.scope.index import Asked, EditKeys, Judge, ScopeIndex, spelled
from baft.scope.reading import Reader, padded
from baft.scope.untrained import UntrainedHead, untrained_head
from baft.types import Edit

logger = logging.getLogger(__name__)

_AT_ONCE = 256  # edits whose prompts are read at once
_CLEARANCE = 1e-3  # above what is not to pass; in other batches it scores otherwise, by rounding

_untrained: WeakKeyDictionary[PreTrainedModel, UntrainedHead] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Scope:
    """Reads prompts with a host, and judges them by its head.

    Args:
        reader: Reads with the host.
        head: The host's, or an untrained one.
    """

    reader: Reader
    head: Judge

    @property
    def is_trained(self) -> bool:
        """Whether the host has a head of its own."""
        return not isinstance(self.head, UntrainedHead)

    @torch.no_grad()
    def read(self, rows: Sequence[Row]) -> Asked:
        """What a user wrote last in each row, as the head reads it."""
        features, real = padded(self.reader.words(rows))
        made = self.head.keys(features, real)
        weights = made.weights
        return Asked(made.vectors, real, lambda i: self.reader.names(rows[i], weights[:, i]))

    @torch.no_grad()
    def keys(
        self, edits: Sequence[Edit], unrelated: Sequence[str] = (), *, made: bool = False
    ) -> list[EditKeys]:
        """What edits are found by.

        Args:
            edits: The edits; each is found by its prompt and by its rephrasings, but not by its neighbors.
            unrelated: Prompts by which none of them is found, either.
            made: Whether they were made before, when another head read their scope: an edit that would never
                act for one of its neighbors then acts, and a warning says so.

        Raises:
            InputError: If a neighbor or an unrelated prompt is so near to a new edit that it would never act.
        """
        found: list[EditKeys] = []
        for start in range(0, len(edits), _AT_ONCE):
            found += self._keys(edits[start : start + _AT_ONCE])
        spared = self.read(self.asked(unrelated)) if unrelated else None
        return [
            self._without(edit, keys, unrelated, spared, made)
            for edit, keys in zip(edits, found, strict=True)
        ]

    def separable(self, edit: Edit, prompts: Sequence[str]) -> tuple[str, ...]:
        """Those of some prompts that an edit can have as further neighbors, one beside the other.

        With them it still acts on its own prompt and rephrasings, raw and as chats, wherever it did before.
        """
        [plain], found = self.keys([edit], made=True), list[str]()
        for prompt in prompts:
            try:
                [strict] = self.keys([replace(edit, neighbors=(*edit.neighbors, *found, prompt))])
            except InputError:
                continue
            if not self._shuts((edit.prompt, *edit.rephrasings), plain, strict):
                found.append(prompt)
        return tuple(found)

    def _keys(self, edits: Sequence[Edit]) -> list[EditKeys]:
        wordings = [(edit.prompt, *edit.rephrasings) for edit in edits]
        rows = [self.reader.encoder.prompt(text) for texts in wordings for text in texts]
        features, real = padded(self.reader.words(rows))
        made = self.head.keys(features, real)
        thresholds = self.head.thresholds(made)
        names = [
            self.reader.names(row, weights) for row, weights in zip(rows, made.weights.unbind(1), strict=True)
        ]
        head = torch.tensor(self.head.fingerprint, device=thresholds.device)
        found, start = [], 0
        for texts in wordings:
            here = slice(start, start + len(texts))
            start += len(texts)
            kept = real[here].flatten()
            vectors = made.vectors[:, here].flatten(1, 2)[:, kept]
            weights = made.weights[:, here].flatten(1)[:, kept]
            lengths = real[here].sum(-1)
            of_names = spelled(names[here])
            found.append(EditKeys(vectors, weights, lengths, thresholds[here].clone(), head, *of_names))
        return found

    def _without(
        self,
        edit: Edit,
        keys: EditKeys,
        unrelated: Sequence[str],
        spared: Asked | None,
        made: bool,
    ) -> EditKeys:
        """The same with thresholds that no neighbor and no unrelated prompt passes, raw or as a chat."""
        asked = [] if spared is None else [spared]
        asked += [self.read(self.asked(edit.neighbors))] if edit.neighbors else []
        if not asked:
            return keys
        index = ScopeIndex(self.head, [keys])
        reached = torch.cat([index.log_probability(one) for one in asked])
        strict = replace(keys, thresholds=torch.maximum(keys.thresholds, reached.amax(0) + _CLEARANCE))
        ways = self.asked([edit.prompt])
        if self._shuts([edit.prompt], keys, strict):
            nearest = (*unrelated, *edit.neighbors)[int(reached.amax(1).argmax()) // len(ways)]
            why = f"{nearest!r} shall stay as it is, and is so near to {edit.prompt!r}"
            if not made:
                raise InputError(f"{why} that the edit would never act: leave it out, or reword it")
            logger.warning("%s, by the scope head of now, that the edit acts on both", why)
            return keys
        return strict

    def _shuts(self, prompts: Sequence[str], keys: EditKeys, strict: EditKeys) -> bool:
        """Whether an edit that is found by some prompts, raw or as chats, is so no more by stricter keys."""
        own = self.read(self.asked(prompts))
        was, now = (ScopeIndex(self.head, [one]).find(own) for one in (keys, strict))
        return bool(((was >= 0) & (now < 0)).any())

    def asked(self, prompts: Sequence[str]) -> list[Row]:
        """Each prompt raw, and in the chat template where there is one."""
        encoder = self.reader.encoder
        ways = [encoder.prompt]
        if encoder.has_chat:
            ways.append(lambda prompt: encoder.chat([{"role": "user", "content": prompt}]))
        return [way(prompt) for prompt in prompts for way in ways]


def scope_of(host: Host, encoder: Encoder) -> Scope:
    """The scope of edits on a host, by its head where it has one."""
    reader, head = Reader(host, encoder), find_head(host)
    if head is not None:
        return Scope(reader, head)
    if host.model not in _untrained:
        _untrained[host.model] = untrained_head(reader)
    return Scope(reader, _untrained[host.model])
