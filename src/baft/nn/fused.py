"""Interventions that are no longer trained, in the form that costs least at every token."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from baft.nn.gates import ConditionedGate, LogisticGate, OpenGate, hard_zero_span
from baft.nn.interventions import SubspaceIntervention

_SELECTED_FROM = 256  # bases; below, one product over all is quicker than picking those that open


@final
class FusedIntervention:
    """`Phi(h) = h + R^T (w * (S h + b))`, `S = A - R`, over the bases of all parts of a site at once.

    The weights are `w = max(0, (sigmoid(U h + c) - threshold) / span)`, `span = 1 - threshold`. An open gate
    has `U = 0` and `c = inf`. The gates are one product for all bases; `S` and `R` are read only where one
    opens, and of many bases only those that open.

    The function is that of `intervene`, to rounding. It is fixed when this is made, so it must not be made of
    parts that are still trained; gradients reach `h` alone.

    Args:
        parts: What acts at the site, one at least; all in one precision, on one device.
    """

    U: Float[Tensor, "basis d_model"]
    c: Float[Tensor, " basis"]
    threshold: Float[Tensor, " basis"]
    span: Float[Tensor, " basis"]
    S: Float[Tensor, "basis d_model"]
    b: Float[Tensor, " basis"]
    R: Float[Tensor, "basis d_model"]

    @torch.no_grad()
    def __init__(self, parts: Sequence[SubspaceIntervention]):
        gates = [_gate(part) for part in parts]
        self.U = torch.cat([gate.U.flatten(0, 1) for gate in gates])
        self.c = torch.cat([gate.c.flatten() for gate in gates])
        of_basis = [torch.full_like(gate.c, gate.threshold).flatten() for gate in gates]
        self.threshold = torch.cat(of_basis)
        spans = [hard_zero_span(gate.threshold, gate.c.dtype, gate.c.device) for gate in gates]
        self.span = torch.cat([span.expand_as(one) for span, one in zip(spans, of_basis, strict=True)])
        self.S = torch.cat([(part.A - part.R).flatten(0, 1) for part in parts])
        self.b = torch.cat([part.b.flatten() for part in parts])
        self.R = torch.cat([part.R.flatten(0, 1) for part in parts])

    def __call__(
        self, h: Float[Tensor, "token d_model"]
    ) -> tuple[Float[Tensor, "token d_model"], Bool[Tensor, " token"]] | None:
        """`Phi(h)` and where any gate opens, or None where none does: then all states stay as they are.

        A state at which every weight is zero comes back bit for bit. The arithmetic is done in the parts'
        precision and cast back to that of `h`.
        """
        work = h.to(self.U.dtype)
        w = torch.sigmoid(torch.addmm(self.c, work, self.U.T))
        opened = w > self.threshold
        if not opened.any():
            return None
        w = ((w - self.threshold) / self.span).clamp_min(0.0)
        S, b, R = self.S, self.b, self.R
        if len(b) >= _SELECTED_FROM:
            chosen = opened.any(0).nonzero()[:, 0]
            w, S, b, R = w[:, chosen], S[chosen], b[chosen], R[chosen]
        changed = torch.addmm(work, w * torch.addmm(b, work, S.T), R).to(h.dtype)
        is_open = opened.any(-1)
        return torch.where(is_open.unsqueeze(-1), changed, h), is_open


def is_trained(parts: Sequence[SubspaceIntervention]) -> bool:
    """Whether any parameter of any part takes gradients."""
    return any(parameter.requires_grad for part in parts for parameter in part.parameters())


def _gate(part: SubspaceIntervention) -> LogisticGate:
    """Any gate as a logistic one."""
    gate = part.gate
    if isinstance(gate, OpenGate):
        return LogisticGate(torch.zeros_like(part.R), torch.full_like(part.b, torch.inf))
    if isinstance(gate, ConditionedGate):
        return gate.fold()
    assert isinstance(gate, LogisticGate), "there are three kinds of gates"
    return gate
