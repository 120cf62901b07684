"""Merging changes of a weight that were made apart: TIES (Yadav et al. 2023, arXiv 2306.01708)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def trimmed(delta: Float[Tensor, "*shape"], density: float) -> Float[Tensor, "*shape"]:
    """The change with all but its largest numbers set to zero.

    Args:
        delta: The change.
        density: The share of all numbers that is kept, in (0, 1].
    """
    n_kept = max(1, int(density * delta.numel()))
    if int(delta.count_nonzero()) <= n_kept:
        return delta
    kept = delta.abs().flatten().topk(n_kept).indices
    flat = delta.flatten()
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(delta)


def ties(deltas: Sequence[Float[Tensor, "*shape"]], density: float) -> Float[Tensor, "*shape"]:
    """One change for several, by the three steps of TIES.

    1. Trim: of each, the `density` largest numbers are kept.
    2. Elect sign: at each place the sign of their sum; where they cancel, plus.
    3. Disjoint mean: the mean of those that have that sign; zeros do not count.

    Args:
        deltas: The changes, one at least.
        density: The share of each that is kept, in (0, 1].
    """
    kept = torch.stack([trimmed(delta, density) for delta in deltas])
    elected = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agrees = kept.sign() == elected
    return (kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)
