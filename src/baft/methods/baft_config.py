"""The settings of BaFT and ReFT, and their presets."""

import math
from dataclasses import dataclass
from typing import Literal

from baft.errors import ConfigError
from baft.hosts.positions import PositionSpec
from baft.methods.optimizer import TrainingConfig
from baft.nn.losses import BalanceForm


@dataclass(frozen=True, kw_only=True)
class BaftConfig(TrainingConfig):
    """Settings of BaFT and ReFT.

    Args:
        layers: Decoder blocks whose output is edited, 0-based; None takes the paper's, scaled to the depth.
        deepest_layers: Of the layers that None stands for, keep this many of the deepest; None keeps all.
        rank: Bases of a block; the paper's is 12.
        bases: One set that all edits share, or a set an edit.
        gate: The paper's trained logistic gate, one set in closed form, or none (ReFT).
        last_prompt: Prompt tokens edited, counted from its end.
        outputs: Whether output tokens are edited.
        chat: Whether edits are also trained inside the host's chat template, where it has one.
        train_eos: Whether the model also learns to stop after the target.
        load_balance: Weight of `R_bal`.
        balance_form: How the load of past edits counts.
        locality: Weight of `R_loc`.
        locality_from_step: First step on which `R_loc` counts; before, A, b and R shall have moved.
        gate_threshold: Closed form: weight at and below which a gate is exactly zero.
        gate_sharpness: Closed form: slope of the gate in its score, which is one at the edit.
        gate_midpoint: Closed form: least score at which the gate of a prompt's last token stands at one half.
        output_midpoint: Closed form: the same for the gate of an output token; once the answer has begun, its
            states hardly differ between phrasings, so this gate can be stricter.
        gate_clearance: Closed form: how far the midpoint stays above the scores of the background.
        gate_shrinkage: Closed form: how far the background's covariance is drawn to its diagonal.
        slot_share: Closed form: share of the background's weight that goes to states at the same slot
            (the last token of other prompts, raw or in the chat template).
        unrelated_share: Closed form: share of it that goes to the prompts that a request names as unrelated.
        max_target_tokens: Longest target that is taken for a fact.

    Raises:
        ConfigError: If a value is out of range, or two do not fit together.
    """

    layers: tuple[int, ...] | None = None
    deepest_layers: int | None = None
    rank: int = 12
    bases: Literal["own", "shared"] = "own"
    gate: Literal["logistic", "closed_form", "open"] = "closed_form"
    last_prompt: int = 3
    outputs: bool = True
    chat: bool = True
    train_eos: bool = True
    load_balance: float = 0.0
    balance_form: BalanceForm = "running"
    locality: float = 0.0
    locality_from_step: int = 3
    gate_threshold: float = 0.1
    gate_sharpness: float = 14.0
    gate_midpoint: float = 0.42
    output_midpoint: float = 0.45
    gate_clearance: float = 0.22
    gate_shrinkage: float = 0.7
    slot_share: float = 0.5
    unrelated_share: float = 0.25
    max_target_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        PositionSpec(self.last_prompt, self.outputs)
        if (self.gate == "closed_form") != (self.bases == "own"):
            raise ConfigError(
                f"gate={self.gate!r} and bases={self.bases!r} do not fit: a gate in closed form belongs to "
                "bases of its own, a trained or open gate to shared ones"
            )
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ConfigError(f"layers must name at least one layer, each once, got {list(self.layers)}")
        bounds = {
            # The last prompt token predicts the first of the target: without it no edit can be learned.
            "last_prompt": (self.last_prompt >= 1, "at least 1"),
            "rank": (self.rank >= 1, "at least 1"),
            "deepest_layers": (
                self.deepest_layers is None or self.deepest_layers >= 1,
                "at least 1, or None",
            ),
            "load_balance": (0 <= self.load_balance < math.inf, "0 or more"),
            "locality": (0 <= self.locality < math.inf, "0 or more"),
            "locality_from_step": (self.locality_from_step >= 0, "0 or more"),
            "gate_threshold": (0 <= self.gate_threshold < 1, "at least 0 and below 1"),
            "gate_sharpness": (0 < self.gate_sharpness < math.inf, "above 0"),
            "gate_midpoint": (0 < self.gate_midpoint < 1, "between 0 and 1"),
            "output_midpoint": (0 < self.output_midpoint < 1, "between 0 and 1"),
            "gate_clearance": (0 <= self.gate_clearance < math.inf, "0 or more"),
            "gate_shrinkage": (0 < self.gate_shrinkage <= 1, "above 0 and at most 1"),
            "slot_share": (0 <= self.slot_share < 1, "at least 0 and below 1"),
            "unrelated_share": (0 <= self.unrelated_share < 1, "at least 0 and below 1"),
            "max_target_tokens": (self.max_target_tokens >= 1, "at least 1"),
        }
        for name, (fits, expected) in bounds.items():
            if not fits:
                raise ConfigError(f"{name} is out of range: got {getattr(self, name)}, expected {expected}")
        if self.gate != "logistic" and (self.load_balance or self.locality):
            raise ConfigError(
                f"load_balance={self.load_balance} and locality={self.locality} train logistic gates, and "
                f"gate={self.gate!r} has none to train: set both to 0"
            )

    @property
    def hard_zero(self) -> float:
        """Weight at and below which a gate is shut; the paper's gates have none."""
        return self.gate_threshold if self.gate == "closed_form" else 0.0


PAPER = BaftConfig(
    bases="shared",
    gate="logistic",
    learning_rate=2e-3,
    schedule="constant",
    max_steps=70,
    stop_loss=0.02,
    stop_margin=None,
    chat=False,
    train_eos=False,
    load_balance=0.1,
)
DEFAULT = BaftConfig(deepest_layers=2)
