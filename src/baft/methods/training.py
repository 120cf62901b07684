"""The one optimization loop: what it trains, what it minimizes, and when it stops.

The loop knows no host and no text. A `TargetPass` shows it the predictions of the target tokens under the
interventions it is training; how that pass runs (over the whole model, or a cached part) is not its concern.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from baft.errors import ConfigError, EditError
from baft.hosts.architecture import Site
from baft.hosts.edited_model import EditedModel, Parts, Recording
from baft.hosts.encoding import EncodedEdit, Encoder
from baft.hosts.models import Host
from baft.hosts.positions import PositionSpec
from baft.methods.base import OnStep
from baft.nn.interventions import SubspaceIntervention
from baft.nn.losses import target_cross_entropy, target_margins
from baft.nn.orthonormal import retract, tangent


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How an edit is trained.

    Args:
        learning_rate: Of `R`, `A` and `b`, by Adam (0.9, 0.999) without weight decay.
        gate_learning_rate: Of the gates, where they are trained.
        schedule: Constant, or falling linearly to zero at `max_steps`.
        max_steps: Steps after which an edit has failed if it is not decoded.
        stop_loss: Stop when the cross-entropy falls below this, in nats.
        stop_margin: Stop when every target token leads every other token by this, in nats.

    Raises:
        ConfigError: If a number is out of range.
    """

    learning_rate: float = 1e-2
    gate_learning_rate: float = 1e-3
    schedule: Literal["constant", "linear"] = "linear"
    max_steps: int = 30
    stop_loss: float | None = None
    stop_margin: float | None = 4.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "gate_learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number, got {value}")
        if self.max_steps < 1:
            raise ConfigError(f"max_steps must be at least 1, got {self.max_steps}")
        for name in ("stop_loss", "stop_margin"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be a number that is not negative, got {value}")


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the host predicts, under edits in training, where target tokens come next.

    Args:
        logits: `[token, vocab]`.
        states: States at the edited tokens of each trained site, before its intervention, `[state, d_model]`.
        state_rows: Which text each of these states belongs to, `[state]`.
    """

    logits: Float[Tensor, "token vocab"]
    states: Mapping[Site, Float[Tensor, "state d_model"]]
    state_rows: Int[Tensor, " state"]


@runtime_checkable
class TargetPass(Protocol):
    """A way of running the host on the texts of a request.

    Attributes:
        targets: The target tokens, all texts one after the other, `[token]`.
        rows: Which text each of them belongs to, `[token]`.
    """

    targets: Int[Tensor, " token"]
    rows: Int[Tensor, " token"]

    def __call__(self, parts: Mapping[Site, Parts]) -> Predictions:
        """The predictions with the given interventions in force."""


class FullPass:
    """Runs the whole host over the whole of every text.

    Args:
        host: The host.
        encoder: Its encoder.
        positions: Which tokens are edited.
        texts: Prompts with their targets; more than one row where an edit has several renderings.
        sites: Where states are wanted.
    """

    def __init__(
        self,
        host: Host,
        encoder: Encoder,
        positions: PositionSpec,
        texts: Sequence[EncodedEdit],
        sites: Sequence[Site],
    ):
        self.sites = tuple(sites)
        self.edited = EditedModel(host.model, {}, positions)
        device = host.model.device
        # The last target token is only ever predicted, so the host need not see it.
        inputs = [text.prompt_ids + text.target_ids[:-1] for text in texts]
        n_prompt = [len(text.prompt_ids) for text in texts]
        self.batch = encoder.pad(inputs, n_prompt, side="right", device=device)
        place = [
            (row, n_prompt[row] - 1 + i, token)
            for row, text in enumerate(texts)
            for i, token in enumerate(text.target_ids)
        ]
        self.rows, columns, self.targets = torch.tensor(place, device=device).unbind(-1)
        # The host computes logits for these positions of every row, and for no others.
        self._keep, self._columns = torch.unique(columns, return_inverse=True)

    def __call__(self, parts: Mapping[Site, Parts]) -> Predictions:
        """The predictions with the given interventions in force."""
        self.edited.interventions = {site: parts.get(site, ()) for site in self.sites}
        seen = Recording()
        output = self.edited(
            self.batch.input_ids,
            self.batch.attention_mask,
            n_prompt_tokens=self.batch.n_prompt_tokens,
            recording=seen,
            use_cache=False,
            logits_to_keep=self._keep,
        )
        self.mask = seen.masks[0]
        logits = output.logits[self.rows, self._columns]
        return Predictions(logits, {site: seen.at(site) for site in self.sites}, self.mask.nonzero()[:, 0])

    def states(self) -> Mapping[Site, Float[Tensor, "state d_model"]]:
        """States of the unedited host at the edited tokens; `mask` then says which tokens they are."""
        with torch.no_grad():
            return self({}).states

    mask: Bool[Tensor, "row pos"]


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a training run reached.

    Args:
        margins: The smallest lead of any target token of each text, in nats, `[row]`.
        losses: The loss at every step taken, and at the end.
        n_steps: Steps taken.
        stopped: Why it stopped.
    """

    margins: tuple[float, ...]
    losses: tuple[float, ...]
    n_steps: int
    stopped: Literal["margin", "loss", "max_steps"]


Penalty = Callable[[int, Predictions], Tensor | None]


def train(
    run: TargetPass,
    trained: Mapping[Site, SubspaceIntervention],
    others: Mapping[Site, Parts],
    config: TrainingConfig,
    *,
    penalty: Penalty | None = None,
    on_step: OnStep | None = None,
) -> TrainingResult:
    """Trains interventions until the targets are decoded.

    `R` moves by Adam on its gradient's tangential part, and after each step back to orthonormal rows.

    Args:
        run: Shows the predictions.
        trained: What is trained, one part a site; changed in place.
        others: What else is in force, and stays as it is.
        config: How.
        penalty: Further terms of the loss at a step, or None.
        on_step: Called after every step with its number, the most there can be, and the loss.

    Raises:
        EditError: If the loss is not finite, or the bases cannot be made orthonormal again.
    """
    bases = [p for part in trained.values() for p in (part.R, part.A, part.b)]
    gates = [p for part in trained.values() for p in part.gate.parameters() if p.requires_grad]
    groups = [{"params": bases, "rate": config.learning_rate}]
    if gates:
        groups.append({"params": gates, "rate": config.gate_learning_rate})
    optimizer = torch.optim.Adam(groups, lr=config.learning_rate)
    parts = {site: (*others.get(site, ()), part) for site, part in trained.items()}
    losses: list[float] = []
    for step in range(config.max_steps + 1):
        with torch.enable_grad():
            predictions = run(parts)
            loss = target_cross_entropy(predictions.logits, run.targets, run.rows)
            cross_entropy = loss.item()
            extra = penalty(step, predictions) if penalty else None
            if extra is not None:
                loss = loss + extra.to(loss)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise _broke_down(config, step, losses[-1])
        margins = _row_margins(predictions.logits.detach(), run)
        stopped = _stopped(config, step, cross_entropy, margins)
        if stopped is not None:
            return TrainingResult(margins, tuple(losses), step, stopped)
        try:
            _step(optimizer, loss, [*bases, *gates], trained, config, step)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # R cannot be made orthonormal
            raise _broke_down(config, step, losses[-1]) from error
        if on_step is not None:
            on_step(step + 1, config.max_steps, losses[-1])
    raise AssertionError("the last step always stops")


def _broke_down(config: TrainingConfig, step: int, loss: float) -> EditError:
    return EditError(
        f"training broke down at step {step} with loss {loss}, where finite numbers were expected: "
        f"lower learning_rate (it is {config.learning_rate})"
    )


def _row_margins(logits: Float[Tensor, "token vocab"], run: TargetPass) -> tuple[float, ...]:
    margins = target_margins(logits, run.targets)
    lowest = margins.new_full((int(run.rows.max()) + 1,), float("inf"))
    return tuple(lowest.scatter_reduce(0, run.rows, margins, "amin").tolist())


def _stopped(
    config: TrainingConfig, step: int, cross_entropy: float, margins: tuple[float, ...]
) -> Literal["margin", "loss", "max_steps"] | None:
    if config.stop_margin is not None and min(margins) >= config.stop_margin:
        return "margin"
    if config.stop_loss is not None and cross_entropy < config.stop_loss:
        return "loss"
    return "max_steps" if step == config.max_steps else None


def _step(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    parameters: Sequence[torch.nn.Parameter],
    trained: Mapping[Site, SubspaceIntervention],
    config: TrainingConfig,
    step: int,
) -> None:
    # Only what is trained gets a gradient, whether or not the host's weights ask for one. A basis behind
    # a shut gate has none; its gradient is zero.
    if not loss.requires_grad:
        raise EditError(
            "no gate opens at the edit, so there is nothing to train: lower gate_threshold, gate_midpoint or "
            "gate_clearance, or raise gate_sharpness"
        )
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
    left = 1.0 - step / config.max_steps if config.schedule == "linear" else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * left
    with torch.no_grad():
        for part in trained.values():
            assert part.R.grad is not None, "it was put there above"
            part.R.grad = tangent(part.R, part.R.grad)
        optimizer.step()
        for part in trained.values():
            part.R.copy_(retract(part.R))
