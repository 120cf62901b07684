"""How strongly each basis acts on a hidden state: `w_k(h)` in [0, 1].

Three final gates share one interface. `OpenGate` is LoReFT (all weights one), `LogisticGate` is BaFT's
logistic regression with an optional hard zero, `ConditionedGate` is the same function in coordinates
in which it can be trained; `fold` turns it into a `LogisticGate`.

Symbols, as in the paper: `h` a hidden state, `U` and `c` the slopes and intercepts of the gate, `w` its
weights. Axes: `block` (an edit's own bases, or one shared block), `rank`, `d_model`.
"""

import functools
import math
from abc import ABC, abstractmethod
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from baft.errors import ConfigError


class Gate(nn.Module, ABC):
    """A weight in [0, 1] for every basis, as a function of the hidden state alone.

    Attributes:
        threshold: The weight up to which a basis stays shut; 0 where there is no hard zero.
    """

    threshold: float = 0.0

    @abstractmethod
    def soft(self, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch block rank"]:
        """The weights before any hard zero; what the regularizers see."""

    @abstractmethod
    def soft_each(self, h: Float[Tensor, "block token d_model"]) -> Float[Tensor, "block token rank"]:
        """The same where every block has states of its own, and sees no others."""

    @abstractmethod
    def select(self, blocks: Int[Tensor, " kept"]) -> "Gate":
        """The gate of some of the blocks; what is trained or saved of it in memory of its own."""

    def weights(self, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch block rank"]:
        """The weights that act."""
        return hard_zero(self.soft(h), self.threshold)

    def weights_each(self, h: Float[Tensor, "block token d_model"]) -> Float[Tensor, "block token rank"]:
        """The same where every block has states of its own, and sees no others."""
        return hard_zero(self.soft_each(h), self.threshold)


@final
class OpenGate(Gate):
    """`w_k(h) = 1`: every basis acts on every state. BaFT with this gate is LoReFT (paper, section 3).

    Args:
        n_blocks: Blocks of bases.
        rank: Bases in a block.
    """

    def __init__(self, n_blocks: int, rank: int):
        super().__init__()
        self.n_blocks, self.rank = n_blocks, rank

    def soft(self, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch block rank"]:
        """All ones."""
        return h.new_ones(*h.shape[:-1], self.n_blocks, self.rank)

    def soft_each(self, h: Float[Tensor, "block token d_model"]) -> Float[Tensor, "block token rank"]:
        """All ones."""
        return h.new_ones(*h.shape[:-1], self.rank)

    def select(self, blocks: Int[Tensor, " kept"]) -> "OpenGate":
        """As many blocks as are kept."""
        return OpenGate(len(blocks), self.rank)


@final
class LogisticGate(Gate):
    """`w(h) = sigmoid(U h + c)`, then a hard zero: `max(0, (w - threshold) / (1 - threshold))`.

    At and below the threshold a weight is exactly zero, so that the state it gates is left bit for bit
    as it was. With `threshold = 0` this is the paper's gate.

    Args:
        U: Slopes, `[block, rank, d_model]`.
        c: Intercepts, `[block, rank]`.
        threshold: The weight up to which a basis stays shut, in [0, 1).

    Raises:
        ConfigError: If the threshold is outside [0, 1).
    """

    def __init__(
        self,
        U: Float[Tensor, "block rank d_model"],
        c: Float[Tensor, "block rank"],
        *,
        threshold: float = 0.0,
    ):
        super().__init__()
        if not 0.0 <= threshold < 1.0:
            raise ConfigError(f"the gate's threshold must lie in [0, 1), got {threshold}")
        self.threshold = threshold
        self.register_buffer("U", U)
        self.register_buffer("c", c)

    U: Tensor
    c: Tensor

    def soft(self, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch block rank"]:
        """The logistic regression."""
        logits = h @ self.U.flatten(0, 1).T + self.c.flatten()
        return torch.sigmoid(logits).unflatten(-1, self.c.shape)

    def soft_each(self, h: Float[Tensor, "block token d_model"]) -> Float[Tensor, "block token rank"]:
        """The logistic regression, each block's on its own states."""
        return torch.sigmoid(torch.baddbmm(self.c.unsqueeze(1), h, self.U.mT))

    def select(self, blocks: Int[Tensor, " kept"]) -> "LogisticGate":
        """The slopes and intercepts of the blocks that are kept."""
        return LogisticGate(self.U[blocks], self.c[blocks], threshold=self.threshold)


@final
class ConditionedGate(Gate):
    """Logistic, on standardized states: `w(h) = sigmoid(V z + v)`, `z = (h - mean) / (scale sqrt(d))`.

    Hidden states carry a few huge directions; along them one step of an optimizer on `U` would throw a
    gate from half open to shut. In `z` all directions weigh the same and `|z|` is about one. The
    function class is the same: `fold` gives the equal gate on raw states.

    Args:
        n_blocks: Blocks of bases.
        rank: Bases in a block.
        mean: Mean of the host's background states at this site, `[d_model]`.
        scale: Their standard deviation, `[d_model]`, positive.
    """

    def __init__(
        self, n_blocks: int, rank: int, *, mean: Float[Tensor, " d_model"], scale: Float[Tensor, " d_model"]
    ):
        super().__init__()
        self.V = nn.Parameter(mean.new_zeros(n_blocks, rank, mean.shape[0]))
        self.v = nn.Parameter(mean.new_zeros(n_blocks, rank))
        self.register_buffer("mean", mean)
        self.register_buffer("stretch", 1.0 / (scale * math.sqrt(mean.shape[0])))

    mean: Tensor
    stretch: Tensor

    def soft(self, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch block rank"]:
        """The logistic regression on conditioned states."""
        logits = ((h - self.mean) * self.stretch) @ self.V.flatten(0, 1).T + self.v.flatten()
        return torch.sigmoid(logits).unflatten(-1, self.v.shape)

    def soft_each(self, h: Float[Tensor, "block token d_model"]) -> Float[Tensor, "block token rank"]:
        """The logistic regression on conditioned states, each block's on its own."""
        z = (h - self.mean) * self.stretch
        return torch.sigmoid(torch.baddbmm(self.v.unsqueeze(1), z, self.V.mT))

    def select(self, blocks: Int[Tensor, " kept"]) -> "ConditionedGate":
        """The blocks that are kept, on the same conditioning."""
        kept = ConditionedGate(len(blocks), self.v.shape[1], mean=self.mean, scale=torch.ones_like(self.mean))
        kept.stretch = self.stretch
        with torch.no_grad():
            kept.V.copy_(self.V[blocks])
            kept.v.copy_(self.v[blocks])
        return kept

    def fold(self) -> LogisticGate:
        """The same function of raw states: `U = V * stretch`, `c = v - U mean`."""
        with torch.no_grad():
            U = self.V * self.stretch
            return LogisticGate(U, self.v - U @ self.mean)

    def load(self, gate: LogisticGate) -> None:
        """Takes over the function of a folded gate, so that training can go on from it."""
        assert gate.threshold == 0.0, "a gate with a hard zero would lose it here"
        with torch.no_grad():
            self.V.copy_(gate.U / self.stretch)
            self.v.copy_(gate.c + gate.U @ self.mean)


def hard_zero(w: Float[Tensor, "*shape"], threshold: float) -> Float[Tensor, "*shape"]:
    """`max(0, (w - threshold) / (1 - threshold))`: continuous, one at one, exactly zero at the threshold."""
    if threshold == 0.0:
        return w
    return ((w - threshold) / hard_zero_span(threshold, w.dtype, w.device)).clamp_min(0.0)


@functools.lru_cache(maxsize=64)
def hard_zero_span(threshold: float, dtype: torch.dtype, device: torch.device) -> Float[Tensor, ""]:
    """`1 - threshold`, the divisor of `hard_zero`, made once.

    Rounded as the numerator is, or a weight of one would come out above one; positive though the threshold
    may round to one; and a tensor on the weights' device, since accelerators divide by a number inexactly.
    """
    with torch.inference_mode(False):  # or it could serve no later training
        one = torch.ones((), dtype=dtype, device=device)
        return (one - threshold).clamp_min(torch.finfo(dtype).tiny)


def closed_form_gate(
    keys: Float[Tensor, "key d_model"],
    mean: Float[Tensor, " d_model"],
    precision_keys: Float[Tensor, "key d_model"],
    *,
    sharpness: float,
    midpoint: float,
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]:
    """The gate that scores one at every key and, on average, zero on background: `(u, c)`.

    Of all directions `g` with `g^T (key - mean) = 1` for every key it takes the one with the smallest
    variance on the background, `g = S^-1 D (D^T S^-1 D)^-1 1`, where the columns of `D` are `key - mean`
    (for one key: Fisher's linear discriminant). Then `u = sharpness g` and
    `c = -sharpness (midpoint + g^T mean)`. Our own choice, not the paper's, which trains its gates.

    Args:
        keys: States that must open the gate.
        mean: Mean of the background states.
        precision_keys: `S^-1 (key - mean)` for every key, where `S` is the background's covariance.
        sharpness: Slope of the logistic in the score.
        midpoint: Score at which the gate stands at one half.
    """
    offsets = keys - mean
    gram = precision_keys @ offsets.T
    ridge = 1e-6 * gram.diagonal().diag()  # each key's own, or it would drown the keys nearest to the mean
    g = torch.linalg.solve(gram + ridge, torch.ones_like(gram[0])) @ precision_keys
    return sharpness * g, -sharpness * (midpoint + g @ mean)
