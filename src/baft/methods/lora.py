"""Low-rank adapters: `lora` and `adalora`.

Sources: Hu et al. 2021 (arXiv 2106.09685), sections 4.1 and 4.2; Zhang et al. 2023 (arXiv 2303.10512),
sections 3.1 to 3.3; as editors, with the published settings, EasyEdit (https://github.com/zjunlp/EasyEdit),
`models/lora`. The steps, and where they are done here:

1. Every query and value projection W gets an adapter. LoRA: `W + (alpha / rank) B A`, with A random and B
   zero. AdaLoRA: `W + (alpha / initial_rank) P E Q`, P and Q random and E, a diagonal, zero. Both are peft's
   own modules; `adapters.Adapter`.
2. Adam on the cross-entropy of the target's tokens, under dropout of what goes into the adapter;
   `AdapterEditor.fit`. AdaLoRA adds how far P and Q are from orthonormal, Zhang's equation 4;
   `AdaLoraEditor.loss`.
3. AdaLoRA prunes: after every step the triplets that matter least lose their place on the diagonal, until
   `rank` of them are left of a projection on average (Zhang, sections 3.2 and 3.3); peft's
   `update_and_allocate` in `AdaLoraEditor.constrain`. EasyEdit never calls it, so that its AdaLoRA keeps the
   initial rank; here the paper is followed. A run that meets its stop rule early has pruned as far as its
   schedule had come.
4. The next request goes on training the same adapters, as EasyEdit does in a sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from baft.errors import ConfigError, UnsupportedHostError
from baft.hosts.architecture import site_device
from baft.hosts.models import Host
from baft.methods.adapters import ADAPTER, Adapter, AdapterConfig, AdapterEditor


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(AdapterConfig):
    """Settings of `adalora`; `rank` is what a projection is left with on average, its target rank.

    Args:
        initial_rank: Triplets of a projection before any is pruned; what is added is scaled by
            `alpha / initial_rank`.
        warmup_steps: Steps before the first pruning.
        final_steps: Steps after the last pruning.
        pruning_interval: Steps from one pruning to the next.
        orthogonality: Weight of the distance of P and Q from orthonormal.

    Raises:
        ConfigError: If a value is out of range, or no step is left for pruning.
    """

    initial_rank: int = 12
    warmup_steps: int = 0
    final_steps: int = 0
    pruning_interval: int = 1
    orthogonality: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, fits, expected in (
            ("initial_rank", self.initial_rank >= self.rank, f"rank ({self.rank}) or more"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
            ("final_steps", self.final_steps >= 0, "0 or more"),
            ("pruning_interval", self.pruning_interval >= 1, "1 or more"),
            ("orthogonality", 0 <= self.orthogonality < float("inf"), "0 or more"),
        ):
            if not fits:
                raise ConfigError(f"{name} is out of range: got {getattr(self, name)}, expected {expected}")
        if self.max_steps - self.final_steps <= max(self.warmup_steps, 1):
            raise ConfigError(
                f"no step is left for pruning: of max_steps={self.max_steps}, two or more must come before "
                f"the last final_steps={self.final_steps}, and more than warmup_steps={self.warmup_steps}"
            )


class LoraEditor(AdapterEditor):
    """LoRA: a product of two thin matrices is added to each projection.

    The rate of `default` was chosen on ten training cases of zsRE, on SmolLM2.
    """

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "low-rank adapters on all queries and values, by peft (Hu et al. 2021)"
    presets: ClassVar[Mapping[str, AdapterConfig]] = {
        "default": AdapterConfig(
            learning_rate=1e-3, max_steps=30, stop_margin=4.0, chat=True, train_eos=True, schedule="constant"
        ),
        "paper": AdapterConfig(
            learning_rate=5e-3, max_steps=70, stop_margin=None, schedule="constant", dropout=0.1
        ),
    }

    def peft_config(self, targets: list[str]) -> Any:
        """The settings in peft's own form."""
        config = self.config
        return self._peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
        )

    def parameters(self, layer: Any) -> Mapping[str, Tensor]:
        """A and B."""
        return {"A": layer.lora_A[ADAPTER].weight, "B": layer.lora_B[ADAPTER].weight}

    def shapes(self, d_out: int, d_in: int) -> Mapping[str, tuple[int, int]]:
        """A is `[rank, d_in]`, B `[d_out, rank]`."""
        return {"A": (self.config.rank, d_in), "B": (d_out, self.config.rank)}

    def factors(self, kept: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`(alpha / rank) B` and A."""
        return kept["B"] * (self.config.alpha / self.config.rank), kept["A"]


_PAPER_ADALORA = AdaLoraConfig(
    learning_rate=5e-3, max_steps=70, stop_margin=None, schedule="constant", dropout=0.1
)


class AdaLoraEditor(AdapterEditor):
    """AdaLoRA: the product has a diagonal, on which what matters least is pruned.

    The rate of `default` is the published one, which did well on ten training cases of zsRE, on SmolLM2.

    Raises:
        UnsupportedHostError: If the host is split over several devices.
    """

    name: ClassVar[str] = "adalora"
    summary: ClassVar[str] = "low-rank adapters that share a budget of ranks, by peft (Zhang et al. 2023)"
    presets: ClassVar[Mapping[str, AdaLoraConfig]] = {
        "default": replace(
            _PAPER_ADALORA, max_steps=30, stop_margin=4.0, chat=True, train_eos=True, dropout=0.0
        ),
        "paper": _PAPER_ADALORA,
    }
    config: AdaLoraConfig

    def __init__(self, host: Host, config: AdaLoraConfig, *, seed: int = 0):
        super().__init__(host, config, seed=seed)
        devices = {str(site_device(host.model, site)) for site in self.sites}
        if len(devices) > 1:
            raise UnsupportedHostError(
                "adalora adds up norms over all adapters, which peft does on one device, and "
                f"{host.name!r} is split over {', '.join(sorted(devices))}: load it on one, or take lora"
            )

    def peft_config(self, targets: list[str]) -> Any:
        """The settings in peft's own form."""
        config = self.config
        return self._peft.AdaLoraConfig(
            init_r=config.initial_rank,
            target_r=config.rank,
            tinit=config.warmup_steps,
            tfinal=config.final_steps,
            deltaT=config.pruning_interval,
            orth_reg_weight=config.orthogonality,
            total_step=config.max_steps,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
        )

    def parameters(self, layer: Any) -> Mapping[str, Tensor]:
        """P, the diagonal E, and Q, which peft calls B, E and A."""
        return {"P": layer.lora_B[ADAPTER], "E": layer.lora_E[ADAPTER], "Q": layer.lora_A[ADAPTER]}

    def shapes(self, d_out: int, d_in: int) -> Mapping[str, tuple[int, int]]:
        """P is `[d_out, initial_rank]`, E `[initial_rank, 1]`, Q `[initial_rank, d_in]`."""
        rank = self.config.initial_rank
        return {"P": (d_out, rank), "E": (rank, 1), "Q": (rank, d_in)}

    def factors(self, kept: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`(alpha / initial_rank) P E` and Q, with the 1e-5 that peft adds to the rank it divides by."""
        scale = self.config.alpha / (self.config.initial_rank + 1e-5)
        return kept["P"] * kept["E"].T * scale, kept["Q"]

    def loss(self, adapter: Adapter, cross_entropy: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The cross-entropy and the distance from orthonormal, the mean Frobenius norm over all P and Q."""
        # peft adds the distance to the loss of whatever its model puts out, in place.
        return adapter.tuner(SimpleNamespace(loss=cross_entropy.clone())).loss

    def constrain(self, adapter: Adapter, step: int) -> None:
        """Prunes the diagonals, where there is anything to prune."""
        if self.config.initial_rank > self.config.rank:
            adapter.tuner.update_and_allocate(step)
