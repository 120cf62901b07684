"""The one optimization loop: what it trains, what it minimizes, and when it stops.

The loop knows no host and no text. A `TargetPass` shows it the predictions of the target tokens under the
interventions it is training; how that pass runs (over the whole model, or a cached part) is not its concern.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from baft.errors import EditError
from baft.hosts.architecture import Site
from baft.hosts.calls import Parts
from baft.hosts.passes import Predicting, Predictions, TargetPass
from baft.methods.base import EditOutcome, OnStep
from baft.methods.optimizer import DescentConfig, Layers, Optimizer, TrainingConfig
from baft.nn.interventions import SubspaceIntervention, concatenate
from baft.nn.losses import row_cross_entropy, target_cross_entropy, target_margins
from baft.types import EditRequest

Stopped = Literal["margin", "loss", "max_steps"]


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
    stopped: Stopped


# Further terms of the loss at a step, of each block by itself; told which block each text belongs to, where
# blocks are trained apart.
Penalty = Callable[[int, Predictions, Layers, Int[Tensor, " row"] | None], Float[Tensor, " block"] | None]


def train(
    run: TargetPass,
    trained: Layers,
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
        EditError: If no gate opens, the loss is not finite, or the bases cannot be made orthonormal again.
    """
    parts = {site: (*others.get(site, ()), part) for site, part in trained.items()}
    optimizer = Optimizer(trained, config)
    losses: list[float] = []
    for step in range(config.max_steps + 1):
        with torch.enable_grad():
            predictions = run(parts)
            cross_entropy = target_cross_entropy(predictions.logits, run.targets, run.rows)
            loss = _penalized(cross_entropy, penalty, step, predictions, trained)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise broke_down(config, step, losses[-1])
        margins = row_margins(predictions.logits.detach(), run)
        stopped = met_stop_rule(config, step, cross_entropy.item(), margins.min().item())
        if stopped is not None:
            return TrainingResult(tuple(margins.tolist()), tuple(losses), step, stopped)
        if step == 0 and not _opening(trained, predictions).any():
            raise EditError(_SHUT)
        optimizer.step(optimizer.gradients(loss), step)
        if on_step is not None:
            on_step(step + 1, config.max_steps, losses[-1])
    raise AssertionError("the last step always stops")


def train_apart(
    run: TargetPass,
    trained: Layers,
    others: Mapping[Site, Parts],
    config: TrainingConfig,
    blocks: Int[Tensor, " row"],
    *,
    penalty: Penalty | None = None,
    on_step: OnStep | None = None,
) -> tuple[list[TrainingResult | EditError], Layers]:
    """Trains every block by itself, all in one batch: the same as training one after the other.

    Each text is edited by its own block alone, each block has its own loss and stops by itself; one that has
    stopped leaves the batch.

    Args:
        run: Shows the predictions.
        trained: What is trained, as many blocks at every site as there are edits.
        others: What else is in force, on all texts.
        config: How.
        blocks: Which block each text belongs to, `[row]`, in rising order.
        penalty: Further terms of the loss at a step, or None.
        on_step: Called after every step with its number, the most there can be, and the mean loss.

    Returns:
        What became of each block, an error where its training broke down; and all blocks, trained.
    """
    left = _Left(run, trained, torch.arange(int(blocks.max()) + 1, device=blocks.device), blocks)
    optimizer = Optimizer(trained, config, apart=True)
    losses: dict[int, list[float]] = {int(name): [] for name in left.names}
    results: dict[int, TrainingResult | EditError] = {}
    kept: dict[int, Layers] = {}
    for step in range(config.max_steps + 1):
        with torch.enable_grad():
            predictions = left.run(others, (left.trained, left.blocks))
            of_rows = row_cross_entropy(predictions.logits, left.run.targets, left.run.rows)
            cross_entropy = left.mean_over_rows(of_rows)
            loss = _penalized(cross_entropy, penalty, step, predictions, left.trained, left.blocks)
        margins = row_margins(predictions.logits.detach(), left.run)
        is_open = _opening(left.trained, predictions, left.blocks).tolist() if step == 0 else []
        done = []
        for i, (name, now, plain) in enumerate(
            zip(left.names.tolist(), loss.tolist(), cross_entropy.tolist(), strict=True)
        ):
            losses[name].append(now)
            mine = margins[left.blocks == i]
            stopped = met_stop_rule(config, step, plain, mine.min().item())
            if not math.isfinite(now):
                results[name] = broke_down(config, step, now)
            elif stopped is not None:
                results[name] = TrainingResult(tuple(mine.tolist()), tuple(losses[name]), step, stopped)
            elif step == 0 and not is_open[i]:
                results[name] = EditError(_SHUT)
            if name in results:
                done.append(i)
        for i in done:
            layers = {site: part.select(_index(i, part)) for site, part in left.trained.items()}
            kept[int(left.names[i])] = layers
        if len(done) == len(left.names):
            break
        staying = left.all_but(done)
        gradients = optimizer.gradients(loss[staying].sum())
        if done:
            left = left.only(staying)
            gradients = [gradient[staying.to(gradient.device)] for gradient in gradients]
            optimizer = optimizer.only(left.trained, staying)
        optimizer.step(gradients, step)
        if on_step is not None:
            on_step(step + 1, config.max_steps, loss.detach().mean().item())
    in_order = [kept[name] for name in sorted(kept)]
    return [results[name] for name in sorted(results)], {
        site: concatenate([layers[site].frozen() for layers in in_order]) for site in trained
    }


def train_in_batches(
    run: TargetPass,
    trained: Layers,
    others: Mapping[Site, Parts],
    config: TrainingConfig,
    edits: Int[Tensor, " row"],
    *,
    penalty: Penalty | None = None,
    on_step: OnStep | None = None,
) -> TrainingResult:
    """As `train`, a mini-batch of edits a step, breadth first: again and again through all of them.

    Args:
        run: Shows the predictions.
        trained: What is trained; changed in place.
        others: What else is in force.
        config: How; `max_steps` counts the rounds through all edits.
        edits: Which edit each text belongs to, `[row]`.
        penalty: Further terms of the loss at a step, or None.
        on_step: Called after every round with its number, the most there can be, and its mean loss.

    Raises:
        EditError: If no gate opens, the loss is not finite, or the bases cannot be made orthonormal again.
    """
    parts = {site: (*others.get(site, ()), part) for site, part in trained.items()}
    optimizer = Optimizer(trained, config)
    n_edits, losses, n_steps = int(edits.max()) + 1, [], 0
    for epoch in range(config.max_steps):
        order = torch.randperm(n_edits, generator=torch.Generator().manual_seed(epoch)).to(edits.device)
        met, total = True, 0.0
        for chunk in order.split(config.edits_at_once):
            rows = torch.isin(edits, chunk).nonzero()[:, 0]
            part_of_run = run.select(rows)
            with torch.enable_grad():
                predictions = part_of_run(parts)
                of_rows = row_cross_entropy(predictions.logits, part_of_run.targets, part_of_run.rows)
                loss = _penalized(of_rows.mean(), penalty, epoch, predictions, trained)
            if not math.isfinite(loss.item()):
                raise broke_down(config, epoch, loss.item())
            margin = row_margins(predictions.logits.detach(), part_of_run).min().item()
            met = met and met_stop_rule(config, 0, of_rows.mean().item(), margin) is not None
            if epoch == 0 and not _opening(trained, predictions).any():
                raise EditError(_SHUT)
            optimizer.step(optimizer.gradients(loss), epoch)
            total, n_steps = total + loss.item() * len(chunk) / n_edits, n_steps + 1
        losses.append(total)
        if on_step is not None:
            on_step(epoch + 1, config.max_steps, total)
        last = epoch + 1 == config.max_steps
        if met or last:  # as seen before each step; now once more, all under the final bases
            margins, cross_entropy = _look_again(run, parts, edits, config)
            stopped = met_stop_rule(
                config, config.max_steps if last else 0, cross_entropy, margins.min().item()
            )
            if stopped is not None:
                return TrainingResult(tuple(margins.tolist()), tuple(losses), n_steps, stopped)
    raise AssertionError("the last round always stops")


def outcome_of(
    request: EditRequest, result: TrainingResult, seconds_s: float, why_full: str | None = None
) -> EditOutcome:
    """How a request went whose texts were trained together, those of one edit side by side."""
    return EditOutcome.of(
        request.edits,
        result.margins,
        losses=result.losses,
        n_steps=result.n_steps,
        stopped=result.stopped,
        seconds_s=seconds_s,
        why_full=why_full,
    )


def pieces(run: TargetPass, edits: Int[Tensor, " row"], most: int) -> Iterator[TargetPass]:
    """The pass over the texts of a few edits at a time, in order.

    Args:
        run: Shows the predictions of all.
        edits: Which edit each text belongs to, `[row]`, in rising order.
        most: Edits in a piece.
    """
    for chunk in torch.arange(int(edits.max()) + 1, device=edits.device).split(most):
        yield run.select(torch.isin(edits, chunk).nonzero()[:, 0])


@torch.no_grad()
def _look_again(
    run: TargetPass, parts: Mapping[Site, Parts], edits: Int[Tensor, " row"], config: TrainingConfig
) -> tuple[Float[Tensor, " row"], float]:
    """The margins of all texts, and their mean cross-entropy."""
    margins, cross_entropy = [], []
    for here in pieces(run, edits, config.edits_at_once):
        logits = here(parts).logits
        margins.append(row_margins(logits, here))
        cross_entropy.append(row_cross_entropy(logits, here.targets, here.rows))
    return torch.cat(margins), torch.cat(cross_entropy).mean().item()


@dataclass(frozen=True, slots=True)
class _Left:
    """The blocks that are still trained.

    Args:
        run: Shows the predictions of their texts.
        trained: The blocks.
        names: Their numbers among all, `[block]`.
        blocks: Which of them each text belongs to, `[row]`.
    """

    run: TargetPass
    trained: Layers
    names: Int[Tensor, " block"]
    blocks: Int[Tensor, " row"]

    def mean_over_rows(self, of_rows: Float[Tensor, " row"]) -> Float[Tensor, " block"]:
        """The mean over the texts of each block."""
        sums = of_rows.new_zeros(len(self.names)).index_add(0, self.blocks.to(of_rows.device), of_rows)
        return sums / self.blocks.bincount(minlength=len(self.names)).to(of_rows.device)

    def all_but(self, done: Sequence[int]) -> Int[Tensor, " kept"]:
        """The places of those that go on."""
        staying = [i for i in range(len(self.names)) if i not in done]
        return torch.tensor(staying, dtype=torch.long, device=self.names.device)

    def only(self, staying: Int[Tensor, " kept"]) -> "_Left":
        """Those that go on."""
        rows = torch.isin(self.blocks, staying).nonzero()[:, 0]
        new = torch.searchsorted(staying, self.blocks[rows])
        trained = {site: part.select(staying.to(part.R.device)) for site, part in self.trained.items()}
        return _Left(self.run.select(rows), trained, self.names[staying], new)


def _index(i: int, part: SubspaceIntervention) -> Int[Tensor, "1"]:
    return torch.tensor([i], device=part.R.device)


def _penalized(
    cross_entropy: Tensor,
    penalty: Penalty | None,
    step: int,
    predictions: Predictions,
    trained: Layers,
    blocks: Int[Tensor, " row"] | None = None,
) -> Tensor:
    extra = penalty(step, predictions, trained, blocks) if penalty else None
    if extra is None:
        return cross_entropy
    return cross_entropy + (extra.sum() if blocks is None else extra).to(cross_entropy)


_SHUT = (
    "no gate opens at the edit, so there is nothing to train: lower gate_threshold, gate_midpoint or "
    "gate_clearance, or raise gate_sharpness"
)


@torch.no_grad()
def _opening(
    trained: Layers, seen: Predictions, blocks: Int[Tensor, " row"] | None = None
) -> Bool[Tensor, " block"]:
    """Which blocks have a gate that opens at an edited token of their own texts, or of all without `blocks`.

    It is asked at the first step, once and for all: gates that can be shut are not trained, and a block that
    is shut at every site moves no state at which it might open later.
    """
    found = []
    for site, part in trained.items():
        states = seen.states[site].to(part.R.dtype)
        if blocks is None:
            is_open = (part.gate.soft(states) > part.gate.threshold).any(-1).any(0)
        else:
            of_states = blocks[seen.state_rows].to(states.device)
            opens = (part.soft_each(states, of_states) > part.gate.threshold).any(-1)
            is_open = opens.new_zeros(part.n_blocks).index_put((of_states[opens],), opens[opens])
        found.append(is_open.to(seen.state_rows.device))
    return torch.stack(found).any(0)


def broke_down(config: DescentConfig, step: int, loss: float) -> EditError:
    """The error of a loss that is not finite."""
    return EditError(
        f"training broke down at step {step} with loss {loss}, where finite numbers were expected: "
        f"lower learning_rate (it is {config.learning_rate})"
    )


def row_margins(logits: Float[Tensor, "token vocab"], run: Predicting) -> Float[Tensor, " row"]:
    """The smallest lead of any target token of each text over the best other token, in nats."""
    margins = target_margins(logits, run.targets)
    lowest = margins.new_full((int(run.rows.max()) + 1,), float("inf"))
    return lowest.scatter_reduce(0, run.rows, margins, "amin")


def met_stop_rule(config: DescentConfig, step: int, cross_entropy: float, margin: float) -> Stopped | None:
    """Why a training run ends before its next step, or None if it goes on."""
    if config.stop_margin is not None and margin >= config.stop_margin:
        return "margin"
    if config.stop_loss is not None and cross_entropy < config.stop_loss:
        return "loss"
    return "max_steps" if step == config.max_steps else None
