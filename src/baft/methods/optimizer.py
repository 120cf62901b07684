"""How an edit is trained: the settings, and the optimizer that keeps bases orthonormal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baft.errors import ConfigError, EditError
from baft.hosts.architecture import Site
from baft.nn.interventions import SubspaceIntervention
from baft.nn.orthonormal import retract, tangent

Layers = Mapping[Site, SubspaceIntervention]


@dataclass(frozen=True, kw_only=True)
class DescentConfig:
    """How anything is trained: how fast, and until when.

    Args:
        learning_rate: Of what is trained, by Adam (0.9, 0.999) without weight decay, or as the method says.
        schedule: Constant, or falling linearly to zero at `max_steps`.
        max_steps: Steps after which an edit has failed if it is not decoded.
        stop_loss: Stop when the cross-entropy falls below this, in nats.
        stop_margin: Stop when every target token leads every other token by this, in nats.

    Raises:
        ConfigError: If a number is out of range.
    """

    learning_rate: float = 1e-2
    schedule: Literal["constant", "linear"] = "linear"
    max_steps: int = 30
    stop_loss: float | None = None
    stop_margin: float | None = 4.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"learning_rate must be a positive number, got {self.learning_rate}")
        if self.max_steps < 1:
            raise ConfigError(f"max_steps must be at least 1, got {self.max_steps}")
        for name in ("stop_loss", "stop_margin"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be a number that is not negative, got {value}")

    def rate(self, step: int) -> float:
        """What is left of every learning rate at a step, counted from 0."""
        return 1.0 - step / self.max_steps if self.schedule == "linear" else 1.0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(DescentConfig):
    """How the bases of an edit are trained.

    Of a request that is trained in mini-batches, `max_steps` is the number of times that all of its edits are
    gone through.

    Args:
        gate_learning_rate: Of the gates, where they are trained.
        edits_at_once: Most edits in a step: a larger request is trained in mini-batches, more edits that are
            each trained by themselves in several stacks. What is held beside a step still grows with a
            request: of every text, until training ends, the keys and values of its prompt in the blocks
            above the first edited one, and the states of its edited tokens.

    Raises:
        ConfigError: If a number is out of range.
    """

    gate_learning_rate: float = 1e-3
    edits_at_once: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.gate_learning_rate) and self.gate_learning_rate > 0):
            raise ConfigError(f"gate_learning_rate must be a positive number, got {self.gate_learning_rate}")
        if self.edits_at_once < 1:
            raise ConfigError(f"edits_at_once must be at least 1, got {self.edits_at_once}")


@dataclass
class Optimizer:
    """Adam, with `R` kept orthonormal.

    Args:
        trained: What is trained, one part a site.
        config: How.
        apart: Whether a block whose bases become dependent breaks down by itself.
    """

    trained: Layers
    config: TrainingConfig
    apart: bool = False
    adam: torch.optim.Adam = field(init=False)

    def __post_init__(self) -> None:
        bases = [p for part in self.trained.values() for p in (part.R, part.A, part.b)]
        gates = [p for part in self.trained.values() for p in part.gate.parameters() if p.requires_grad]
        self.parameters: list[torch.nn.Parameter] = [*bases, *gates]
        groups = [{"params": bases, "rate": self.config.learning_rate}]
        if gates:
            groups.append({"params": gates, "rate": self.config.gate_learning_rate})
        self.adam = torch.optim.Adam(groups, lr=self.config.learning_rate)

    def gradients(self, loss: Float[Tensor, ""]) -> list[Tensor]:
        """Of every parameter; zero of a basis behind a shut gate.

        Only what is trained gets one, whether or not the host's weights ask for it.
        """
        if not loss.requires_grad:
            return [torch.zeros_like(parameter) for parameter in self.parameters]
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(self.parameters, found, strict=True)
        ]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], step: int) -> None:
        """Moves everything that is trained.

        Raises:
            EditError: If bases cannot be made orthonormal again.
        """
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * self.config.rate(step)
        for part in self.trained.values():
            assert part.R.grad is not None, "it was put there above"
            part.R.grad = tangent(part.R, part.R.grad)
        self.adam.step()
        try:
            for part in self.trained.values():
                part.R.copy_(_each_by_itself(part.R) if self.apart else retract(part.R))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # the rows of R are dependent
            raise EditError(
                f"training broke down at step {step}: the bases became dependent; lower learning_rate (it is "
                f"{self.config.learning_rate})"
            ) from error

    def only(self, trained: Layers, staying: Int[Tensor, " kept"]) -> "Optimizer":
        """The same for some of the blocks, with what it remembers of them."""
        found = Optimizer(trained, self.config, self.apart)
        for old, new in zip(self.parameters, found.parameters, strict=True):
            found.adam.state[new] = {
                name: value[staying.to(value.device)] if value.shape == old.shape else value.clone()
                for name, value in self.adam.state[old].items()
            }
        return found


def _each_by_itself(R: Float[Tensor, "block rank d_model"]) -> Float[Tensor, "block rank d_model"]:
    """The bases made orthonormal again; no numbers where they cannot be, so that the next loss says so."""
    try:
        return retract(R)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(R) == 1:
            return torch.full_like(R, math.nan)
        return torch.cat([_each_by_itself(one) for one in R.split(1)])
