"""Mean and covariance of background states, and what they make of a direction.

Fitted once from weighted states; the result is frozen. Computed in float64: states have directions whose
variances differ by many orders of magnitude.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from baft.nn.gates import closed_form_gate

_ROWS = 256


@dataclass(frozen=True, slots=True)
class Whitening:
    """Background statistics of one site: `mean`, and the Cholesky factor of the shrunk covariance `S`.

    Args:
        mean: `[d_model]`.
        factor: Lower triangular, `S = factor factor^T`, `[d_model, d_model]`.
    """

    mean: Float[Tensor, " d_model"]
    factor: Float[Tensor, "d_model d_model"]

    @classmethod
    def fit(
        cls, states: Float[Tensor, "state d_model"], weights: Float[Tensor, " state"], *, shrinkage: float
    ) -> "Whitening":
        """Weighted mean and covariance, the covariance drawn toward its diagonal.

        `S = (1 - shrinkage) C + shrinkage diag(C)`: with fewer states than dimensions `C` alone has no
        inverse.

        Args:
            states: Background states.
            weights: Weight of each, positive; only their proportions count.
            shrinkage: Between 0 and 1, above 0.
        """
        share = (weights.double() / weights.double().sum()).unsqueeze(-1)
        # In pieces: all states at once in float64 would take many times the memory of an edit.
        pieces = list(zip(states.split(_ROWS), share.split(_ROWS), strict=True))
        mean = torch.stack([(part * rows.double()).sum(0) for rows, part in pieces]).sum(0)
        covariance = mean.new_zeros(len(mean), len(mean))
        for rows, part in pieces:
            centered = rows.double() - mean
            covariance.addmm_((part * centered).T, centered)
        diagonal = covariance.diagonal()
        diagonal = diagonal.clamp_min(1e-9 * diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny))
        shrunk = (1.0 - shrinkage) * covariance + torch.diag(shrinkage * diagonal)
        return cls(mean, torch.linalg.cholesky(shrunk))

    def gate(
        self, keys: Float[Tensor, "key d_model"], *, sharpness: float, midpoint: float
    ) -> tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]:
        """The closed-form gate `(u, c)` that opens at every key; see `closed_form_gate`."""
        keys = keys.double()
        precision_keys = self.precision(keys)
        return closed_form_gate(keys, self.mean, precision_keys, sharpness=sharpness, midpoint=midpoint)

    def precision(self, keys: Float[Tensor, "key d_model"]) -> Float[Tensor, "key d_model"]:
        """`S^-1 (key - mean)` for every key, in float64."""
        return torch.cholesky_solve((keys.double() - self.mean).T, self.factor).T
