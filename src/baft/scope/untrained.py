"""Scope without training, for hosts that have no head yet: whitened token embeddings, the rare ones first.

One channel of late interaction (`nn/scope.py`) with nothing learned: a token is its embedding, whitened by
those of ordinary text, and its weight is the squared length of that, which is larger the rarer the token. It
tells unrelated prompts apart, and near neighbors badly (METHOD.md, section 5).
"""

import math
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize

from baft.hosts.architecture import find_architecture
from baft.hosts.background import background_text, fitting
from baft.nn.scope import ScopeKeys
from baft.nn.whitening import Whitening
from baft.scope.reading import Reader

_SHRINKAGE = 0.1
_SLOPE, _MIDPOINT = 20.0, 0.7
_RECIPE = 2  # goes up when what a head is made of changes


@final
class UntrainedHead(nn.Module):
    """Reads the embeddings of tokens alone.

    Args:
        mean: Of the embeddings of ordinary text.
        whitening: What makes their covariance one, `S^-1/2` up to a rotation.
    """

    mean: Tensor
    whitening: Tensor
    discounts: Tensor

    def __init__(self, mean: Float[Tensor, " d_model"], whitening: Float[Tensor, "d_model d_model"]):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("whitening", whitening)
        self.register_buffer("discounts", mean.new_zeros(1))  # wherever a token stands

    @classmethod
    def fit(cls, embeddings: Float[Tensor, "token d_model"]) -> "UntrainedHead":
        """By the tokens of ordinary text."""
        found = Whitening.fit(embeddings, embeddings.new_ones(len(embeddings)), shrinkage=_SHRINKAGE)
        identity = torch.eye(len(found.mean), dtype=found.factor.dtype, device=found.factor.device)
        inverse = torch.linalg.solve_triangular(found.factor, identity, upper=False)
        return cls(found.mean.to(embeddings.dtype), inverse.to(embeddings.dtype))

    @property
    def fingerprint(self) -> int:
        """A number that tells this head from others: the same for all, which follow from the host."""
        return _RECIPE

    @property
    def n_dims(self) -> int:
        """Width of the vectors: the host's."""
        return len(self.mean)

    def vectors(
        self, features: Float[Tensor, "row token n_features"]
    ) -> Float[Tensor, "1 row token d_model"]:
        """The unit vectors of tokens."""
        return normalize(self._whitened(features), dim=-1).unsqueeze(0)

    def keys(
        self, features: Float[Tensor, "edit token n_features"], real: Bool[Tensor, "edit token"]
    ) -> ScopeKeys:
        """What edits are found by, from the tokens of their prompts."""
        raw = self._whitened(features).square().sum(-1) * real
        return ScopeKeys(self.vectors(features), (raw / raw.sum(-1, keepdim=True)).unsqueeze(0))

    def thresholds(self, keys: ScopeKeys) -> Float[Tensor, " edit"]:
        """The same for all edits: that of a score of 0.7, which unrelated prompts hardly ever reach."""
        return keys.weights.new_full(keys.weights.shape[1:2], math.log(0.5))

    def log_probability(self, scores: Float[Tensor, "1 prompt edit"]) -> Float[Tensor, "prompt edit"]:
        """How sure it is that a prompt is about an edit: nothing but a rising function of the score."""
        return logsigmoid(_SLOPE * (scores[0] - _MIDPOINT))

    def _whitened(
        self, features: Float[Tensor, "row token n_features"]
    ) -> Float[Tensor, "row token d_model"]:
        return (features[..., : len(self.mean)] - self.mean) @ self.whitening.T


def untrained_head(reader: Reader) -> UntrainedHead:
    """The head of a host that has none, by the embeddings of the project's ordinary text."""
    text = background_text()
    rows = fitting(reader.encoder.prompt, [*text["sentences"], *text["prompts"]])
    d_model = find_architecture(reader.host.model).d_model
    return UntrainedHead.fit(torch.cat([one[:, :d_model] for one in reader.words(rows)]))
