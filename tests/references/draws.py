"""Random objects to state a claim about, from a seed."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from baft.nn.gates import ConditionedGate, Gate, LogisticGate, OpenGate
from baft.nn.interventions import SubspaceIntervention
from baft.nn.orthonormal import random_orthonormal

D_MODEL = 7

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4))  # blocks, rank


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    n_blocks, rank, d_model = shape
    generator = torch.Generator().manual_seed(seed)
    return random_orthonormal(n_blocks, rank, d_model, generator=generator, dtype=dtype)


def logistic_gate(
    seed: int, n_blocks: int, rank: int, *, threshold: float = 0.0, dtype: torch.dtype = torch.float64
) -> LogisticGate:
    U = normal(seed, n_blocks, rank, D_MODEL, dtype=dtype)
    return LogisticGate(U, normal(seed + 1, n_blocks, rank, dtype=dtype), threshold=threshold)


def conditioned_gate(seed: int, n_blocks: int, rank: int) -> ConditionedGate:
    """One that has been trained: its parameters are not zero."""
    scale = 0.5 + normal(seed, D_MODEL).abs()
    gate = ConditionedGate(n_blocks, rank, mean=3.0 * normal(seed + 1, D_MODEL), scale=scale)
    with torch.no_grad():
        gate.V.copy_(normal(seed + 2, n_blocks, rank, D_MODEL))
        gate.v.copy_(normal(seed + 3, n_blocks, rank))
    return gate


def gates(seed: int, n_blocks: int, rank: int) -> list[Gate]:
    """One of each kind."""
    return [
        OpenGate(n_blocks, rank),
        logistic_gate(seed, n_blocks, rank),
        logistic_gate(seed, n_blocks, rank, threshold=0.4),
        conditioned_gate(seed, n_blocks, rank),
    ]


def constant_gate(n_blocks: int, rank: int, weight: float) -> LogisticGate:
    """`w_k(h) = weight` for every state."""
    c = torch.full((n_blocks, rank), weight, dtype=torch.float64).logit()
    return LogisticGate(torch.zeros(n_blocks, rank, D_MODEL, dtype=torch.float64), c)


def intervention(
    seed: int, n_blocks: int, rank: int, gate: Gate, *, dtype: torch.dtype = torch.float64
) -> SubspaceIntervention:
    """One with orthonormal bases that changes states."""
    return SubspaceIntervention(
        orthonormal(seed, n_blocks, rank, D_MODEL, dtype=dtype),
        normal(seed + 1, n_blocks, rank, D_MODEL, dtype=dtype),
        normal(seed + 2, n_blocks, rank, dtype=dtype),
        gate,
    )
