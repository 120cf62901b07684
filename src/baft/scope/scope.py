"""The scope of edits on one host: what they are found by, and what a prompt is about."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.hosts.turns import Row
from baft.scope.heads import find_head
from baft.scope.index import EditKeys, Judge, ScopeIndex
from baft.scope.reading import Reader, padded
from baft.scope.untrained import UntrainedHead, untrained_head
from baft.types import Edit

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
    def read(
        self, rows: Sequence[Row]
    ) -> tuple[Float[Tensor, "channel row word dim"], Bool[Tensor, "row word"]]:
        """The vectors of the words that a user wrote last in each row, and which places are no padding."""
        features, real = padded(self.reader.words(rows))
        return self.head.vectors(features), real

    @torch.no_grad()
    def keys(self, edits: Sequence[Edit], unrelated: Sequence[str] = ()) -> list[EditKeys]:
        """What edits are found by.

        Args:
            edits: The edits; each is found by its prompt and by its rephrasings, but not by its neighbors.
            unrelated: Prompts by which none of them is found, either.
        """
        wordings = [(edit.prompt, *edit.rephrasings) for edit in edits]
        encode = self.reader.encoder.prompt
        features, real = padded(self.reader.words([encode(text) for texts in wordings for text in texts]))
        made = self.head.keys(features, real)
        thresholds = self.head.thresholds(made)
        head = torch.tensor(self.head.fingerprint, device=thresholds.device)
        found, start = [], 0
        for edit, texts in zip(edits, wordings, strict=True):
            here = slice(start, start + len(texts))
            start += len(texts)
            kept = real[here].flatten()
            keys = EditKeys(
                made.vectors[:, here].flatten(1, 2)[:, kept],
                made.weights[:, here].flatten(1)[:, kept],
                real[here].sum(-1),
                thresholds[here].max(),
                head,
            )
            found.append(self._without((*edit.neighbors, *unrelated), keys))
        return found

    def _without(self, neighbors: Sequence[str], keys: EditKeys) -> EditKeys:
        """The same with a threshold that none of some prompts passes."""
        if not neighbors:
            return keys
        rows = [self.reader.encoder.prompt(text) for text in neighbors]
        reached = ScopeIndex(self.head, [keys]).log_probability(*self.read(rows)).max()
        return replace(keys, threshold=torch.maximum(keys.threshold, reached))


def scope_of(host: Host, encoder: Encoder) -> Scope:
    """The scope of edits on a host, by its head where it has one."""
    reader, head = Reader(host, encoder), find_head(host)
    if head is not None:
        return Scope(reader, head)
    if host.model not in _untrained:
        _untrained[host.model] = untrained_head(reader)
    return Scope(reader, _untrained[host.model])
