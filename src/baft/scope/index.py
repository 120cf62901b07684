"""Which of many edits a prompt is about: late interaction with the keys of all, in pieces of bounded size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from baft.nn.scope import ScopeKeys

_AT_ONCE = 1 << 22  # cosines held in memory: 16 MB of them
_WORDINGS = 256  # compared at once with all edits
_EXCLUDED = -2.0  # below every cosine


@runtime_checkable
class Judge(Protocol):
    """What makes keys of prompts, and a judgment of scores; trained, or not (`untrained.py`)."""

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
        threshold: Log-probability that a prompt must exceed.
    """

    vectors: Float[Tensor, "channel token dim"]
    weights: Float[Tensor, "channel token"]
    lengths: Int[Tensor, " wording"]
    threshold: Float[Tensor, ""]


@final
class ScopeIndex:
    """The keys of edits, side by side.

    Args:
        head: What made them.
        edits: The keys of each edit, one edit at least.
    """

    def __init__(self, head: Judge, edits: Sequence[EditKeys]):
        self._head = head
        self._vectors = torch.cat([one.vectors for one in edits], 1)
        self._weights = torch.cat([one.weights for one in edits], 1)
        device = self._weights.device
        lengths = torch.cat([one.lengths for one in edits])
        self._wording = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        n_wordings = torch.tensor([len(one.lengths) for one in edits], device=device)
        self._edit = torch.arange(len(edits), device=device).repeat_interleave(n_wordings)
        self.thresholds = torch.stack([one.threshold for one in edits])

    @torch.no_grad()
    def log_probability(
        self, vectors: Float[Tensor, "channel row token dim"], asked: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row edit"]:
        """How sure the head is of every prompt and edit that the one is about the other; at most zero.

        Args:
            vectors: Of the tokens of prompts.
            asked: Which of them count; one of each prompt at least.
        """
        n_rows, n_tokens = asked.shape
        scores = vectors.new_zeros(len(vectors), n_rows, len(self._edit))
        step = max(1, _AT_ONCE // (n_rows * n_tokens))
        for start in range(0, len(self._wording), step):
            piece = slice(start, start + step)
            for channel, of_channel in enumerate(vectors):
                cosines = of_channel @ self._vectors[channel, piece].T
                best = cosines.masked_fill_(~asked.unsqueeze(-1), _EXCLUDED).amax(1)
                scores[channel].index_add_(1, self._wording[piece], best * self._weights[channel, piece])
        of_wordings = self._head.log_probability(scores)
        found = of_wordings.new_full((n_rows, len(self.thresholds)), -torch.inf)
        return found.scatter_reduce(1, self._edit.expand(n_rows, -1), of_wordings, "amax")

    def acts_on(self, others: Sequence[EditKeys]) -> Bool[Tensor, "other edit"]:
        """Which edits here act on any wording of which others, where these have the prompt to themselves."""
        wordings = [part for one in others for part in one.vectors.split(one.lengths.tolist(), 1)]
        n_tokens = torch.tensor([part.shape[1] for part in wordings], device=self._weights.device)
        padded = pad_sequence([part.transpose(0, 1) for part in wordings], batch_first=True)
        real = torch.arange(padded.shape[1], device=n_tokens.device) < n_tokens.unsqueeze(1)
        owner = torch.arange(len(others), device=n_tokens.device).repeat_interleave(
            torch.tensor([len(one.lengths) for one in others], device=n_tokens.device)
        )
        met = torch.zeros(len(others), len(self.thresholds), dtype=torch.bool, device=n_tokens.device)
        for start in range(0, len(wordings), _WORDINGS):
            here = slice(start, start + _WORDINGS)
            passing = self.log_probability(padded[here].movedim(2, 0), real[here]) > self.thresholds
            which, edit = passing.nonzero().unbind(-1)
            met[owner[here][which], edit] = True
        return met

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
        found = self.log_probability(vectors, asked)
        passing = found > self.thresholds
        if only is not None:
            passing = passing & torch.zeros_like(passing).scatter(1, only.unsqueeze(-1), True)
        best = found.masked_fill(~passing, -torch.inf).flip(1).max(1)
        return torch.where(passing.any(1), len(self.thresholds) - 1 - best.indices, -1)
