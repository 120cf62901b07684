"""The scope of edits on one host: what they are found by, and what a prompt is about."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from baft.errors import InputError
from baft.hosts.architecture import input_device
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.hosts.turns import Row
from baft.scope.heads import find_head
from baft.scope.index import Asked, EditKeys, Judge, ScopeIndex, spelled
from baft.scope.reading import Reader, padded
from baft.scope.untrained import UntrainedHead, untrained_head
from baft.types import Edit

logger = logging.getLogger(__name__)

_COARSE = (torch.float16, torch.bfloat16)
# Above what is not to pass: in other batches it scores otherwise, on SmolLM2 by 4e-6, in bfloat16 by 0.03.
_CLEARANCE, _CLEARANCE_COARSE = 1e-3, 0.05

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

    @property
    def fingerprint(self) -> int:
        """A number that tells what reads here from others: the head, and a host of less than 32 bits."""
        dtype = self.reader.host.model.dtype
        return self.head.fingerprint ^ (1 + _COARSE.index(dtype) << 61 if dtype in _COARSE else 0)

    @torch.no_grad()
    def read(self, rows: Sequence[Row]) -> Asked:
        """What a user wrote last in each row, as the head reads it."""
        features, real = padded(self.reader.words(rows))
        made = self.head.keys(features, real)
        weights = made.weights
        return Asked(made.vectors, real, lambda i: self.reader.names(rows[i], weights[:, i]))

    @torch.inference_mode(False)  # they become part of an edit, wherever they are read
    @torch.no_grad()
    def keys(
        self, edits: Sequence[Edit], unrelated: Sequence[str] = (), *, made: bool = False
    ) -> list[EditKeys]:
        """What edits are found by.

        Args:
            edits: The edits; each is found by its prompt and by its rephrasings, but not by its neighbors.
            unrelated: Prompts by which none of them is found, either.
            made: Whether they were made before, when another head read their scope. An edit that would never
                act for one of its neighbors then acts on both; a rephrasing that a neighbor shuts stays shut.
                A warning says so.

        Raises:
            InputError: If a neighbor or an unrelated prompt is so near to a new edit that it would not act on
                its own prompt or one of its rephrasings any more, raw or as a chat.
        """
        found = self._keys(edits)
        spared = self.read(self.asked(unrelated)) if unrelated else None
        return [
            self._without(edit, keys, unrelated, spared, made)
            for edit, keys in zip(edits, found, strict=True)
        ]

    def separable(self, edit: Edit, prompts: Sequence[str]) -> tuple[str, ...]:
        """Those of some prompts that an edit can have as further neighbors, one beside the other.

        With them it still acts on its own prompt and rephrasings, raw and as chats, wherever it did before.
        There are none for an edit whose neighbors would have it refused already; a warning says so.
        """
        try:
            self.keys([edit])
        except InputError as error:  # another head read it, or another baft
            logger.warning("%r keeps its scope: %s", edit.prompt, error)
            return ()
        found = list[str]()
        for prompt in prompts:
            with suppress(InputError):
                self.keys([replace(edit, neighbors=(*edit.neighbors, *found, prompt))])
                found.append(prompt)
        return tuple(found)

    def _keys(self, edits: Sequence[Edit]) -> list[EditKeys]:
        """Each wording is read by itself.

        So the keys of two edits of one prompt are equal to the bit, whatever they are made with, and the
        later one acts (`likeliest`).
        """
        head = torch.tensor(self.fingerprint, device=input_device(self.reader.host.model))
        found = []
        for edit in edits:
            rows = [self.reader.encoder.prompt(text) for text in (edit.prompt, *edit.rephrasings)]
            made = [self.head.keys(*padded(self.reader.words([row]))) for row in rows]
            names = [
                self.reader.names(*pair)
                for pair in zip(rows, (one.weights[:, 0] for one in made), strict=True)
            ]
            if not self.is_trained and edit.subject:
                names = [one.only(edit.subject) for one in names]
            found.append(
                EditKeys(
                    torch.cat([one.vectors[:, 0] for one in made], 1),
                    torch.cat([one.weights[:, 0] for one in made], 1),
                    torch.tensor([one.weights.shape[-1] for one in made], device=head.device),
                    torch.cat([self.head.thresholds(one) for one in made]),
                    head,
                    *spelled(names),
                )
            )
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
        clear = _CLEARANCE_COARSE if self.reader.host.model.dtype in _COARSE else _CLEARANCE
        strict = replace(keys, thresholds=torch.maximum(keys.thresholds, reached.amax(0) + clear))
        wordings = (edit.prompt, *edit.rephrasings)
        shut = self._shut(wordings, keys, strict)
        if not shut:
            return strict
        named, wording = (*unrelated, *edit.neighbors), wordings[shut[0]]
        nearest = named[int(reached[:, shut[0]].argmax()) // (len(reached) // len(named))]
        why = f"{nearest!r} shall stay as it is, and is so near to {wording!r}"
        if made and shut[0] == 0:
            logger.warning("%s, by the scope head of now, that the edit acts on both", why)
            return keys
        whose = "this rephrasing" if shut[0] else "its own prompt"
        idle = f"{why} that the edit would not act on {whose}, raw or as a chat"
        if made:
            logger.warning("%s; another head, or an earlier baft, made it so", idle)
            return strict
        raise InputError(f"{idle}: leave one of the two out, or reword it")

    def _shut(self, prompts: Sequence[str], keys: EditKeys, strict: EditKeys) -> list[int]:
        """By which of some prompts, raw or as chats, an edit is found, and is no more by stricter keys."""
        own = self.read(self.asked(prompts))
        was, now = (ScopeIndex(self.head, [one]).find(own) for one in (keys, strict))
        lost = ((was >= 0) & (now < 0)).view(len(prompts), -1)
        return lost.any(1).nonzero()[:, 0].tolist()

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
    kept = _untrained.get(host.model)
    if kept is None or kept.mean.device != input_device(host.model):  # a host may be moved
        kept = _untrained[host.model] = untrained_head(reader)
    return Scope(reader, kept)
