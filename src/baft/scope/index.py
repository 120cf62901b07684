"""Which of many edits a prompt is about: late interaction with the keys of all, in pieces of bounded size."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from baft.nn.scope import ScopeKeys, before_end, distance_costs

_AT_ONCE = 1 << 22  # cosines held in memory: 16 MB of them
_EXCLUDED = -2.0  # below every cosine


@runtime_checkable
class Judge(Protocol):
    """What makes keys of prompts, and a judgment of scores; trained, or not (`untrained.py`)."""

    @property
    def fingerprint(self) -> int:
        """A number that tells this head from others; keys of one mean nothing to another."""

    @property
    def discounts(self) -> Float[Tensor, " channel"]:
        """What 24 tokens of distance from the end of a prompt cost."""

    def vectors(
        self, features: Float[Tensor, "row token n_features"]
    ) -> Float[Tensor, "channel row token dim"]:
        """The unit vectors of tokens."""

    def keys(
        self, features: Float[Tensor, "edit token n_features"], real: Bool[Tensor, "edit token"]
    ) -> ScopeKeys:
        """What edits are found by."""

    def thresholds(self, keys: ScopeKeys) -> Float[Tensor, " edit"]:
        """The log-probability above which each edit acts."""

    def log_probability(self, scores: Float[Tensor, "channel prompt edit"]) -> Float[Tensor, "prompt edit"]:
        """How sure it is that a prompt is about an edit; at most zero."""


@dataclass(frozen=True, slots=True)
class EditKeys:
    """What one edit is found by.

    Args:
        vectors: Unit vectors of the tokens of its prompt, then those of its rephrasings.
        weights: How much each counts; one in sum over each wording.
        lengths: Tokens of each wording.
        thresholds: Log-probability that a prompt must exceed to be about each wording.
        head: Fingerprint of the head that made these.
    """

    vectors: Float[Tensor, "channel token dim"]
    weights: Float[Tensor, "channel token"]
    lengths: Int[Tensor, " wording"]
    thresholds: Float[Tensor, " wording"]
    head: Int[Tensor, ""]


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """63 bits of the SHA-256 of some tensors, as they are in float32."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return int.from_bytes(found.digest()[:8], "big") >> 1


@final
class ScopeIndex:
    """The keys of edits, side by side.

    Args:
        head: What made them.
        edits: The keys of each edit.
        before: An index after which these come; None for none.
    """

    def __init__(self, head: Judge, edits: Sequence[EditKeys], before: "ScopeIndex | None" = None):
        self._head = head
        lengths = torch.cat([one.lengths for one in edits])
        places = torch.arange(len(lengths), device=lengths.device)
        n_wordings = lengths.new_tensor([len(one.lengths) for one in edits])
        self._vectors = torch.cat([one.vectors for one in edits], 1)
        self._weights = torch.cat([one.weights for one in edits], 1)
        self._wording = places.repeat_interleave(lengths)  # of each token
        self._edit = places[: len(edits)].repeat_interleave(n_wordings)  # of each wording
        self._thresholds = torch.cat([one.thresholds for one in edits])
        self.n_edits = len(edits)
        if before is not None:
            self._vectors = torch.cat([before._vectors, self._vectors], 1)
            self._weights = torch.cat([before._weights, self._weights], 1)
            self._wording = torch.cat([before._wording, self._wording + len(before._edit)])
            self._edit = torch.cat([before._edit, self._edit + before.n_edits])
            self._thresholds = torch.cat([before._thresholds, self._thresholds])
            self.n_edits += before.n_edits

    @torch.no_grad()
    def log_probability(
        self, vectors: Float[Tensor, "channel row token dim"], asked: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row wording"]:
        """How sure the head is of every prompt and wording that the one is about the other; at most zero.

        Args:
            vectors: Of the tokens of prompts.
            asked: Which of them count; one of each prompt at least.
        """
        n_rows, n_tokens = asked.shape
        scores = vectors.new_zeros(len(vectors), n_rows, len(self._edit))
        costs = distance_costs(before_end(asked), self._head.discounts)
        step = max(1, _AT_ONCE // (n_rows * n_tokens))
        for start in range(0, len(self._wording), step):
            piece = slice(start, start + step)
            for channel, of_channel in enumerate(vectors):
                cosines = of_channel @ self._vectors[channel, piece].T
                cosines -= costs[channel].unsqueeze(-1)
                best = cosines.masked_fill_(~asked.unsqueeze(-1), _EXCLUDED).amax(1)
                scores[channel].index_add_(1, self._wording[piece], best * self._weights[channel, piece])
        return self._head.log_probability(scores)

    @torch.no_grad()
    def acts_on(self, other: "ScopeIndex") -> Bool[Tensor, "other edit"]:
        """Which edits here would act on a wording of which edits there, asked as it is."""
        n_wordings = len(other._edit)
        scores = self._vectors.new_zeros(len(self._vectors), len(self._edit), n_wordings)
        step = max(1, _AT_ONCE // len(other._wording))
        ends = other._wording.bincount(minlength=n_wordings).cumsum(0)[other._wording]
        n_after = ends - 1 - torch.arange(len(ends), device=ends.device)
        costs = distance_costs(n_after, self._head.discounts)
        for start in range(0, len(self._wording), step):
            piece = slice(start, start + step)
            for channel, of_channel in enumerate(other._vectors):
                cosines = self._vectors[channel, piece] @ of_channel.T
                cosines -= costs[channel]
                best = cosines.new_full((len(cosines), n_wordings), _EXCLUDED)
                best.scatter_reduce_(1, other._wording.expand(len(cosines), -1), cosines, "amax")
                weighed = best * self._weights[channel, piece].unsqueeze(1)
                scores[channel].index_add_(0, self._wording[piece], weighed)
        passing = self._head.log_probability(scores) > self._thresholds.unsqueeze(1)
        met = passing.new_zeros(other.n_edits, self.n_edits)
        mine, theirs = passing.nonzero().unbind(-1)
        met[other._edit[theirs], self._edit[mine]] = True
        return met

    @torch.no_grad()
    def passing(
        self, vectors: Float[Tensor, "channel row token dim"], asked: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row edit"]:
        """The log-probability of every prompt and edit, minus infinity where it is not above the threshold.

        So each finite one is of an edit that would act, were it the only one.

        Args:
            vectors: Of the tokens of prompts.
            asked: Which of them count; one of each prompt at least.
        """
        of_wordings = self.log_probability(vectors, asked)
        of_wordings = of_wordings.masked_fill(of_wordings <= self._thresholds, -torch.inf)
        found = of_wordings.new_full((len(asked), self.n_edits), -torch.inf)
        return found.scatter_reduce(1, self._edit.expand(len(asked), -1), of_wordings, "amax")

    def find(
        self,
        vectors: Float[Tensor, "channel row token dim"],
        asked: Bool[Tensor, "row token"],
        only: Int[Tensor, " row"] | None = None,
    ) -> Int[Tensor, " row"]:
        """The likeliest edit of each prompt among those above their threshold; -1 where there is none.

        Of equals it is the latest.

        Args:
            vectors: Of the tokens of prompts.
            asked: Which of them count.
            only: The one edit that a prompt may be about; None for any.
        """
        found = self.passing(vectors, asked)
        if only is not None:
            chosen = torch.zeros_like(found, dtype=torch.bool).scatter(1, only.unsqueeze(-1), True)
            found = found.masked_fill(~chosen, -torch.inf)
        best = found.flip(1).max(1)
        return torch.where(best.values > -torch.inf, self.n_edits - 1 - best.indices, -1)
