"""The intervention, LoReFT and BaFT in one formula.

    Phi(h) = h + R^T W(h) (A h + b - R h) = h + sum_k w_k(h) r_k (a_k^T h + b_k - r_k^T h)

Source: BaFT (arXiv 2503.00306), section 3; with all weights one it is LoReFT (Wu et al. 2024,
arXiv 2404.03592, eq. 2). `R` has orthonormal rows `r_k`, `A` rows `a_k`, `W(h) = diag(w_1(h) .. w_r(h))`.
"""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from baft.nn.gates import ConditionedGate, Gate, LogisticGate, OpenGate
from baft.nn.orthonormal import random_orthonormal


@final
class SubspaceIntervention(nn.Module):
    """`delta(h) = sum_k w_k(h) r_k ((a_k - r_k)^T h + b_k)`, summed over blocks of bases.

    A block is a set of bases that are orthonormal among themselves: the one that all edits share, or
    one an edit owns. Writing `a_k - r_k` makes the change exactly zero where `A = R` and `b = 0`.

    Args:
        R: Bases, `[block, rank, d_model]`, rows orthonormal in each block.
        A: Readout, `[block, rank, d_model]`.
        b: Offset, `[block, rank]`.
        gate: The weights `w_k(h)`.
    """

    def __init__(
        self,
        R: Float[Tensor, "block rank d_model"],
        A: Float[Tensor, "block rank d_model"],
        b: Float[Tensor, "block rank"],
        gate: Gate,
    ):
        super().__init__()
        self.R, self.A, self.b = nn.Parameter(R), nn.Parameter(A), nn.Parameter(b)
        self.gate = gate

    @classmethod
    def identity(
        cls,
        n_blocks: int,
        rank: int,
        d_model: int,
        gate: Gate,
        *,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "SubspaceIntervention":
        """Random orthonormal `R`, `A = R`, `b = 0`: no change at all, whatever the gate.

        Raises:
            ConfigError: If `rank` is not between 1 and `d_model`.
        """
        R = random_orthonormal(n_blocks, rank, d_model, generator=generator, dtype=dtype).to(device)
        return cls(R, R.clone(), torch.zeros(n_blocks, rank, dtype=dtype, device=device), gate)

    @property
    def d_model(self) -> int:
        """Width of the hidden state."""
        return self.R.shape[-1]

    @property
    def rank(self) -> int:
        """Bases in a block."""
        return self.R.shape[-2]

    @property
    def n_blocks(self) -> int:
        """Blocks of bases."""
        return self.R.shape[0]

    def delta(
        self, h: Float[Tensor, "*batch d_model"]
    ) -> tuple[Float[Tensor, "*batch d_model"], Float[Tensor, "*batch block rank"]]:
        """The change of a state and the weights it was made with."""
        w = self.gate.weights(h)
        assert w.shape[-2:] == self.b.shape, "the gate has other blocks or another rank than the bases"
        readout = h @ (self.A - self.R).flatten(0, 1).T + self.b.flatten()
        return (w.flatten(-2) * readout) @ self.R.flatten(0, 1), w

    def delta_each(
        self, h: Float[Tensor, "token d_model"], blocks: Int[Tensor, " token"]
    ) -> tuple[Float[Tensor, "token d_model"], Float[Tensor, "token rank"]]:
        """The change of every state by one block alone, and that block's weights.

        Args:
            h: The states.
            blocks: Which block changes each of them.
        """
        place = _Places(blocks, self.n_blocks)
        own = place.spread(h)
        w = self.gate.weights_each(own)
        readout = torch.baddbmm(self.b.unsqueeze(1), own, (self.A - self.R).mT)
        return place.gather((w * readout) @ self.R), place.gather(w)

    def soft_each(
        self, h: Float[Tensor, "token d_model"], blocks: Int[Tensor, " token"]
    ) -> Float[Tensor, "token rank"]:
        """The weights of one block at every state, before any hard zero."""
        place = _Places(blocks, self.n_blocks)
        return place.gather(self.gate.soft_each(place.spread(h)))

    def select(self, blocks: Int[Tensor, " kept"]) -> "SubspaceIntervention":
        """Some of the blocks, in memory of their own; trained on where this one is."""
        R, A, b = (one.detach()[blocks] for one in (self.R, self.A, self.b))
        return SubspaceIntervention(R, A, b, self.gate.select(blocks)).requires_grad_(self.R.requires_grad)

    def frozen(self) -> "SubspaceIntervention":
        """A copy that shares no memory and takes no gradient, its gate in the paper's form."""
        gate = self.gate.fold() if isinstance(self.gate, ConditionedGate) else self.gate
        return concatenate([SubspaceIntervention(self.R, self.A, self.b, gate)])


def concatenate(parts: Sequence[SubspaceIntervention]) -> SubspaceIntervention:
    """One intervention with the blocks of all parts, which must agree in rank, width and gate."""
    with torch.no_grad():
        gates = [part.gate for part in parts]
        first = gates[0]
        gate: Gate
        if isinstance(first, OpenGate):
            assert all(isinstance(gate, OpenGate) for gate in gates), "an open gate cannot join a closed one"
            gate = OpenGate(sum(part.n_blocks for part in parts), first.rank)
        else:
            logistic = [gate for gate in gates if isinstance(gate, LogisticGate)]
            assert len(logistic) == len(gates), "only folded gates of one kind are concatenated"
            assert len({gate.threshold for gate in logistic}) == 1, "one gate has one threshold"
            gate = LogisticGate(
                torch.cat([gate.U for gate in logistic]).detach().clone(),
                torch.cat([gate.c for gate in logistic]).detach().clone(),
                threshold=logistic[0].threshold,
            )
        fused = SubspaceIntervention(
            torch.cat([part.R for part in parts]).detach().clone(),
            torch.cat([part.A for part in parts]).detach().clone(),
            torch.cat([part.b for part in parts]).detach().clone(),
            gate,
        )
    return fused.requires_grad_(False)


class _Places:
    """Tokens laid out by block, in rows that are as long as the fullest.

    Args:
        blocks: The block of each token.
        n_blocks: How many blocks there are.
    """

    def __init__(self, blocks: Int[Tensor, " token"], n_blocks: int):
        counts = blocks.bincount(minlength=n_blocks)
        order = blocks.argsort(stable=True)
        first = (counts.cumsum(0) - counts)[blocks[order]]
        self._slots = torch.empty_like(blocks)
        self._slots[order] = torch.arange(len(blocks), device=blocks.device) - first
        self._blocks, self._shape = blocks, (n_blocks, int(counts.max()))

    def spread(self, x: Float[Tensor, "token n"]) -> Float[Tensor, "block slot n"]:
        """Tokens by block, zero where a block has fewer."""
        return x.new_zeros(*self._shape, x.shape[-1]).index_put((self._blocks, self._slots), x)

    def gather(self, x: Float[Tensor, "block slot n"]) -> Float[Tensor, "token n"]:
        """The inverse."""
        return x[self._blocks, self._slots]


def intervene(
    parts: Sequence[SubspaceIntervention],
    h: Float[Tensor, "token d_model"],
    own: tuple[SubspaceIntervention, Int[Tensor, " token"]] | None = None,
) -> tuple[Float[Tensor, "token d_model"], Bool[Tensor, " token"]]:
    """`Phi(h)` for all parts together, and where any gate opens.

    A state at which every weight is zero comes back bit for bit. The arithmetic is done in the parts'
    precision and cast back to that of `h`.

    Args:
        parts: What acts on every state.
        h: The states.
        own: What else acts, one of its blocks on each state, and which.
    """
    work = h.to((parts[0] if own is None else own[0]).R.dtype)
    change = torch.zeros_like(work)
    is_open = torch.zeros(h.shape[0], dtype=torch.bool, device=h.device)
    changes = [part.delta(work) for part in parts] + (
        [] if own is None else [own[0].delta_each(work, own[1])]
    )
    for delta, w in changes:
        change = change + delta
        is_open = is_open | (w > 0).flatten(1).any(-1)
    return torch.where(is_open.unsqueeze(-1), (work + change).to(h.dtype), h), is_open


def n_parameters(*, d_model: int, rank: int, n_layers: int, gated: bool) -> int:
    """Learned numbers, one block a layer: `L (3 r d + 2 r)` gated (BaFT), `L (2 r d + r)` open (ReFT)."""
    per_layer = 2 * rank * d_model + rank + (rank * d_model + rank if gated else 0)
    return n_layers * per_layer
