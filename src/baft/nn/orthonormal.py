"""Matrices with orthonormal rows: how to draw one, and how to move one without leaving them.

`R` has shape `[..., rank, d_model]` and satisfies `R R^T = I` in its last two axes. A step of an
optimizer is taken on the gradient projected to the tangent space, and the result is pulled back by a
retraction. Both cost `O(rank^2 d_model)`; nothing of size `d_model x d_model` is ever built.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from baft.errors import ConfigError


def random_orthonormal(
    n_blocks: int, rank: int, d_model: int, *, generator: torch.Generator, dtype: torch.dtype
) -> Float[Tensor, "block rank d_model"]:
    """Draws matrices with orthonormal rows, uniformly (the Q of a Gaussian, signs fixed by its R).

    Args:
        n_blocks: How many independent matrices.
        rank: Rows of each.
        d_model: Columns of each.
        generator: Source of randomness, on the CPU, so that a seed means the same on any device.
        dtype: Precision of the result; the draw itself is made in float64.

    Raises:
        ConfigError: If `rank` is not between 1 and `d_model`.
    """
    check_rank(rank, d_model)
    gaussian = torch.randn(n_blocks, d_model, rank, generator=generator, dtype=torch.float64)
    q, upper = torch.linalg.qr(gaussian)
    signs = torch.sign(torch.diagonal(upper, dim1=-2, dim2=-1)).unsqueeze(-2)
    return (q * signs).transpose(-2, -1).contiguous().to(dtype)


def check_rank(rank: int, d_model: int) -> None:
    """Refuses a rank for which there are no orthonormal rows.

    Raises:
        ConfigError: If `rank` is not between 1 and `d_model`.
    """
    if not 1 <= rank <= d_model:
        raise ConfigError(
            f"rank {rank} is impossible: {d_model} hidden units have room for 1 to {d_model} bases"
        )


def tangent(
    R: Float[Tensor, "*block rank d_model"], G: Float[Tensor, "*block rank d_model"]
) -> Float[Tensor, "*block rank d_model"]:
    """Projects a gradient `G` onto the tangent space at `R`: `G - sym(G R^T) R`.

    Source: Absil, Mahony, Sepulchre, *Optimization Algorithms on Matrix Manifolds* (2008), eq. 3.35,
    for the transposed matrix.
    """
    inner = G @ R.transpose(-2, -1)
    return G - 0.5 * (inner + inner.transpose(-2, -1)) @ R


def retract(R: Float[Tensor, "*block rank d_model"]) -> Float[Tensor, "*block rank d_model"]:
    """Pulls a matrix of full rank back to orthonormal rows: `L^-1 R`, where `R R^T = L L^T`.

    The Cholesky factor is taken of the `rank x rank` Gram matrix, in float64. A matrix whose rows are
    orthonormal already comes back unchanged up to rounding.
    """
    wide = R.double()
    factor = torch.linalg.cholesky(wide @ wide.transpose(-2, -1))
    return torch.linalg.solve_triangular(factor, wide, upper=False).to(R.dtype)
