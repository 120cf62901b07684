"""Which of many edits a prompt is about: late interaction with the keys of all, in pieces of bounded size."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from baft.hosts.early import early_features
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.hosts.turns import Turns
from baft.nn.scope import CHANNELS, ScopeHead

Row = tuple[int, ...]

_AT_ONCE = 1 << 22  # cosines held in memory: 16 MB of them
_EXCLUDED = -2.0  # below every cosine


@final
class ScopeReader:
    """Reads off a host's early states what prompts are about.

    Args:
        host: The host; it is run up to its last early block, and not changed.
        encoder: Its encoder.
        head: Its scope head.
    """

    def __init__(self, host: Host, encoder: Encoder, head: ScopeHead):
        self.host, self.encoder, self.head = host, encoder, head
        self._turns = Turns(encoder)

    @torch.no_grad()
    def keys(
        self, prompts: Sequence[str]
    ) -> list[tuple[Float[Tensor, "channel token dim"], Float[Tensor, "channel token"]]]:
        """What each of some edits is found by, from its prompt: vectors of tokens, and their weights."""
        rows = [self.encoder.prompt(prompt) for prompt in prompts]
        features, real = self._features(rows)
        keys = self.head.keys(features, real)
        return [(keys.vectors[:, i, kept], keys.weights[:, i, kept]) for i, kept in enumerate(real)]

    @torch.no_grad()
    def read(
        self, rows: Sequence[Row]
    ) -> tuple[Float[Tensor, "channel row token dim"], Bool[Tensor, "row token"]]:
        """The vectors of the tokens of prompts, and which of them are words of the last user turn."""
        features, asked = self._features(rows)
        return self.head.vectors(features), asked

    def _features(
        self, rows: Sequence[Row]
    ) -> tuple[Float[Tensor, "row token n_features"], Bool[Tensor, "row token"]]:
        features, real = early_features(self.host, self.encoder, rows)
        words = [self._turns.words(tuple(row)) for row in rows]
        start, end = torch.tensor(words, device=real.device).unbind(-1)
        place = torch.arange(real.shape[1], device=real.device)
        inside = real & (place >= start.unsqueeze(-1)) & (place < end.unsqueeze(-1))
        return features, torch.where(inside.any(-1, keepdim=True), inside, real)


@final
class ScopeIndex:
    """The keys of edits, side by side.

    Args:
        head: What made them.
        vectors: Unit vectors of the tokens of each edit's prompt.
        weights: Their weights.
    """

    def __init__(
        self,
        head: ScopeHead,
        vectors: Sequence[Float[Tensor, "channel token dim"]],
        weights: Sequence[Float[Tensor, "channel token"]],
    ):
        self._head = head
        lengths = torch.tensor([one.shape[1] for one in weights])
        self._vectors, self._weights = torch.cat(list(vectors), 1), torch.cat(list(weights), 1)
        self._owner = torch.arange(len(lengths)).repeat_interleave(lengths).to(self._weights.device)
        self.n_edits = len(lengths)

    @torch.no_grad()
    def log_probability(
        self, vectors: Float[Tensor, "channel row token dim"], asked: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row edit"]:
        """How sure it is of every prompt and edit that the one is about the other; at most zero."""
        n_rows, n_tokens = asked.shape
        scores = vectors.new_zeros(len(CHANNELS), n_rows, self.n_edits)
        step = max(1, _AT_ONCE // (n_rows * n_tokens))
        for start in range(0, len(self._owner), step):
            piece = slice(start, start + step)
            for channel in range(len(CHANNELS)):
                cosines = vectors[channel] @ self._vectors[channel, piece].T
                best = cosines.masked_fill_(~asked.unsqueeze(-1), _EXCLUDED).amax(1)
                scores[channel].index_add_(1, self._owner[piece], best * self._weights[channel, piece])
        return self._head.log_probability(scores)


def best_above(
    log_probability: Float[Tensor, "row edit"],
    thresholds: Float[Tensor, " edit"],
    only: Int[Tensor, " row"] | None = None,
) -> Int[Tensor, " row"]:
    """The likeliest edit of each row among those above their threshold; -1 where there is none.

    Args:
        log_probability: Of every row and edit.
        thresholds: Of every edit.
        only: The one edit that a row may have; None for any.
    """
    passing = log_probability > thresholds
    if only is not None:
        chosen = torch.zeros_like(passing).scatter(1, only.unsqueeze(-1), True)
        passing = passing & chosen
    best = log_probability.masked_fill(~passing, -torch.inf).max(-1)
    return torch.where(best.values > -torch.inf, best.indices, -1)
