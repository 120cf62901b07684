"""Fine-tuning of one weight matrix, the plainest of editors: `ft-l` and `ft-m`.

Sources: Meng et al. 2022 (arXiv 2202.05262), section 3.1 and appendix E.1, for the constrained fine-tuning of
one feed-forward layer; EasyEdit (https://github.com/zjunlp/EasyEdit), `models/ft`, for the two objectives and
the names. Its steps, and where they are done here:

1. The weight that is trained: the down-projection of one layer. `FtEditor.__init__`, by `down_projection`.
2. The objective. FT-L: minus the log-probability of *every* target token at the last prompt token, the place
   that predicts the first; `_at_the_last_prompt_token`. FT-M: the cross-entropy of the target given the
   prompt and the target's tokens before; `Descent` without a loss of its own.
3. Adam on that weight for 25 steps, until the loss falls below 0.01; `Descent.run`.
4. The constraint of Meng et al.: no number of the weight moves by more than `norm_bound`; `bounded`.

The weight itself is never changed: what is trained is the matrix added to it, which Adam without weight decay
moves exactly as it would the weight.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from baft.errors import ConfigError
from baft.hosts.architecture import find_architecture, intervention_dtype, scaled_layers
from baft.hosts.edited_model import EditedModel
from baft.hosts.models import Host
from baft.hosts.passes import Pass, Predictions
from baft.hosts.patches import DeltaPatch
from baft.methods.base import EditOutcome, OnStep
from baft.methods.descent import Descent, bounded
from baft.methods.optimizer import DescentConfig
from baft.methods.stateful import DownProjectionEditor, Layout, State
from baft.methods.texts import renderings
from baft.methods.training import outcome_of
from baft.nn.losses import target_cross_entropy
from baft.types import EditRequest

DELTA = "delta"


@dataclass(frozen=True, kw_only=True)
class FtConfig(DescentConfig):
    """Settings of `ft-l` and `ft-m`.

    Args:
        layer: The decoder block whose down-projection is trained, counted from 0, or None.
        depth: Where that is None, the block at this share of the host's depth; the published one is 21 of 32.
        objective: What is minimized: the target's tokens where they stand, or all of them at the last prompt
            token.
        norm_bound: Most that any number of the weight may move in all, or None for no bound.
        chat: Whether the chat rendering is trained beside the raw one.
        train_eos: Whether the target's end is trained.

    Raises:
        ConfigError: If a value is out of range.
    """

    layer: int | None = None
    depth: float = 21 / 32
    objective: Literal["target", "last_prompt"] = "target"
    norm_bound: float | None = None
    chat: bool = False
    train_eos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.depth <= 1:
            raise ConfigError(f"depth must be at least 0 and at most 1, got {self.depth}")
        if self.norm_bound is not None and not (math.isfinite(self.norm_bound) and self.norm_bound > 0):
            raise ConfigError(f"norm_bound must be a positive number or None, got {self.norm_bound}")


PAPER = FtConfig(learning_rate=5e-4, schedule="constant", max_steps=25, stop_loss=1e-2, stop_margin=None)


class FtEditor(DownProjectionEditor):
    """Fine-tuning of one down-projection.

    Args:
        host: The host; never changed.
        config: The settings.
        seed: Without effect: nothing here is random.

    Raises:
        ConfigError: If the host has no such layer.
        UnsupportedHostError: If the layer has no down-projection of its own.
    """

    config: FtConfig

    def __init__(self, host: Host, config: FtConfig, *, seed: int = 0):
        n_layers = find_architecture(host.model).n_layers
        [at_depth] = scaled_layers((config.depth,), of=1, n_layers=n_layers)
        super().__init__(host, config, at_depth if config.layer is None else config.layer, seed=seed)
        self.trains_eos = config.train_eos

    def fit(
        self, request: EditRequest, state: State, on_step: OnStep | None
    ) -> tuple[Mapping[str, Tensor], EditOutcome]:
        """Trains what is added to the weight, going on from what was added before."""
        began = time.monotonic()
        config = self.config
        texts = renderings(self.encoder, request.edits, chat=config.chat, eos=config.train_eos)
        shown, why = self.pass_over(texts)
        dtype = intervention_dtype(self.host.model)
        delta = torch.zeros(self.shape, dtype=dtype, device=self.device)
        if state:
            delta.copy_(state[DELTA])
        delta.requires_grad_()
        shown.edited.patches = {self.module: DeltaPatch([delta])}

        def loss(cross_entropy: Float[Tensor, ""], seen: Predictions) -> Float[Tensor, ""]:
            return cross_entropy if config.objective == "target" else _at_the_last_prompt_token(shown, seen)

        descent = Descent([delta], config, loss, bounded(delta, config.norm_bound))
        result = descent.run(shown, on_step)
        return {DELTA: delta}, outcome_of(request, result, time.monotonic() - began, why)

    def put(self, edited: EditedModel, state: State, requests: Sequence[EditRequest]) -> None:
        """The matrix is added to what the down-projection puts out."""
        edited.patches = {self.module: DeltaPatch([state[DELTA]])} if state else {}

    def layout(self, requests: Sequence[EditRequest], state: State) -> Layout:
        """One matrix of the weight's shape."""
        return {DELTA: self.shape}


def _at_the_last_prompt_token(shown: Pass, seen: Predictions) -> Float[Tensor, ""]:
    """Minus the mean log-probability of all target tokens of a text at its last prompt token, over texts."""
    n_rows = int(shown.rows.max()) + 1
    first = torch.searchsorted(shown.rows.contiguous(), torch.arange(n_rows, device=shown.rows.device))
    return target_cross_entropy(seen.logits[first][shown.rows], shown.targets, shown.rows)


class FtLEditor(FtEditor):
    """FT-L: every target token is asked of the last prompt token.

    So it can say only targets of one token, whatever the settings, and never where they end. `default` is the
    best of ten that were tried on training cases of zsRE, and of five on CounterFact (SmolLM2).
    """

    name: ClassVar[str] = "ft-l"
    summary: ClassVar[str] = "fine-tuning of one matrix, the loss at the last prompt token (Meng et al. 2022)"
    presets: ClassVar[Mapping[str, FtConfig]] = {
        "default": replace(PAPER, objective="last_prompt", depth=0.8, learning_rate=2e-3),
        "paper": replace(PAPER, objective="last_prompt"),
    }


class FtMEditor(FtEditor):
    """FT-M: the cross-entropy of the target.

    Depth and rate of `default` were chosen on ten training cases of zsRE, on SmolLM2.
    """

    name: ClassVar[str] = "ft-m"
    summary: ClassVar[str] = "fine-tuning of one matrix, the loss on the target's tokens (EasyEdit)"
    presets: ClassVar[Mapping[str, FtConfig]] = {
        "default": FtConfig(
            depth=0.8,
            learning_rate=2e-3,
            max_steps=30,
            stop_margin=4.0,
            chat=True,
            train_eos=True,
            schedule="constant",
        ),
        "paper": PAPER,
    }
