"""The optimization loop of methods that train something else than bases: weights, adapters, states.

What is trained is in force on the pass that is given (as patches of its edited model); the loop minimizes
the cross-entropy of the targets, and whatever the method adds, by Adam (or as the method says), until its
stop rule is met.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from baft.errors import EditError
from baft.hosts.passes import Predicting, Predictions
from baft.methods.base import OnStep
from baft.methods.optimizer import DescentConfig
from baft.methods.training import Stopped, TrainingResult, broke_down, met_stop_rule, row_margins
from baft.nn.losses import target_cross_entropy


@runtime_checkable
class Loss(Protocol):
    """What is minimized at a step."""

    def __call__(self, cross_entropy: Float[Tensor, ""], seen: Predictions) -> Float[Tensor, ""]:
        """The loss; `cross_entropy` is that of the targets, averaged over texts, in nats."""


@dataclass(frozen=True, slots=True)
class Descent:
    """One optimization.

    Args:
        parameters: What is trained, in place; it must be in force on the pass.
        config: How fast and until when.
        loss: What is minimized; the targets' cross-entropy if left out.
        constrain: Called after every step, without gradients: brings parameters back to where they may be.
        at_rest: Where the pass is noisy in training (dropout), the same without: what has the last word on
            whether the stop rule is met, and tells the margins.
        may_stop: Whether what the method adds is content, too; asked where the targets are.
        by: The kind of optimizer.
    """

    parameters: Sequence[Tensor]
    config: DescentConfig
    loss: Loss | None = None
    constrain: Callable[[], None] | None = None
    at_rest: Callable[[], Predictions] | None = None
    may_stop: Callable[[], bool] | None = None
    by: Literal["adam", "sgd"] = "adam"

    def run(self, shown: Predicting, on_step: OnStep | None = None) -> TrainingResult:
        """Trains until the stop rule is met.

        Raises:
            EditError: If the loss is not finite.
        """
        kind = torch.optim.Adam if self.by == "adam" else torch.optim.SGD
        optimizer = kind(self.parameters, lr=self.config.learning_rate)
        losses: list[float] = []
        for step in range(self.config.max_steps + 1):
            with torch.enable_grad():
                seen = shown({})
                cross_entropy = target_cross_entropy(seen.logits, shown.targets, shown.rows)
                loss = cross_entropy if self.loss is None else self.loss(cross_entropy, seen)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise broke_down(self.config, step, losses[-1])
            stopped, margins = self._stopped(step, shown, seen.logits.detach())
            if stopped is not None and self.at_rest is not None:
                with torch.no_grad():
                    stopped, margins = self._stopped(step, shown, self.at_rest().logits)
            if stopped is not None and self.may_stop is not None and not self.may_stop():
                stopped = "max_steps" if step == self.config.max_steps else None
            if stopped is not None:
                return TrainingResult(tuple(margins.tolist()), tuple(losses), step, stopped)
            found: Sequence[Tensor | None] = ()  # where nothing that is trained is in force
            if loss.requires_grad:
                found = torch.autograd.grad(loss, list(self.parameters), allow_unused=True)
            if all(one is None for one in found):
                raise EditError("nothing that is trained reaches the targets: train other layers")
            for parameter, gradient in zip(self.parameters, found, strict=True):
                parameter.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = self.config.learning_rate * self.config.rate(step)
            optimizer.step()
            if self.constrain is not None:
                with torch.no_grad():
                    self.constrain()
            if on_step is not None:
                on_step(step + 1, self.config.max_steps, losses[-1])
        raise AssertionError("the last step always stops")

    def _stopped(
        self, step: int, shown: Predicting, logits: Float[Tensor, "token vocab"]
    ) -> tuple[Stopped | None, Float[Tensor, " row"]]:
        """Why it stops here, or None, and the margins of all texts."""
        margins = row_margins(logits, shown)
        cross_entropy = target_cross_entropy(logits, shown.targets, shown.rows).item()
        return met_stop_rule(self.config, step, cross_entropy, margins.min().item()), margins


def bounded(parameter: Tensor, most: float | None) -> Callable[[], None] | None:
    """What holds every number of a parameter within a bound after each step; None without a bound."""
    if most is None:
        return None

    def hold() -> None:
        parameter.clamp_(-most, most)

    return hold
