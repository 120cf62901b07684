"""The settings of `baft-bank`, and their presets."""

from dataclasses import dataclass

from baft.errors import ConfigError
from baft.hosts.positions import PositionSpec
from baft.methods.optimizer import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class BankConfig(TrainingConfig):
    """Settings of `baft-bank`.

    Args:
        layers: Decoder blocks whose output is edited, 0-based; None takes the paper's, scaled to the depth.
        deepest_layers: Of the layers that None stands for, keep this many of the deepest; None keeps all.
        rank: Bases of an edit at each layer, to begin with.
        most_rank: An edit that is not decoded with margin is trained anew with twice the bases, up to this.
        last_prompt: Prompt tokens edited, counted from its end.
        outputs: Whether output tokens are edited.
        chat: Whether edits are also trained inside the host's chat template, where it has one.
        n_others: Texts about other things that the target shall follow, too, raw and as chats in turn: inside
            its scope an edit speaks whatever the words.
        train_eos: Whether the model also learns to stop after the target.
        max_target_tokens: Longest target that is taken for a fact.

    Raises:
        ConfigError: If a value is out of range.
    """

    layers: tuple[int, ...] | None = None
    deepest_layers: int | None = 2
    rank: int = 4
    most_rank: int = 16
    last_prompt: int = 3
    outputs: bool = True
    chat: bool = True
    n_others: int = 4
    train_eos: bool = True
    max_target_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        PositionSpec(self.last_prompt, self.outputs)
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ConfigError(f"layers must name at least one layer, each once, got {list(self.layers)}")
        bounds = {
            # The last prompt token predicts the first of the target: without it no edit can be learned.
            "last_prompt": (self.last_prompt >= 1, "at least 1"),
            "rank": (self.rank >= 1, "at least 1"),
            "most_rank": (self.most_rank >= 1, "at least 1"),
            "deepest_layers": (
                self.deepest_layers is None or self.deepest_layers >= 1,
                "at least 1, or None",
            ),
            "n_others": (self.n_others >= 0, "0 or more"),
            "max_target_tokens": (self.max_target_tokens >= 1, "at least 1"),
        }
        for name, (fits, expected) in bounds.items():
            if not fits:
                raise ConfigError(f"{name} is out of range: got {getattr(self, name)}, expected {expected}")


DEFAULT = BankConfig()
