"""AlphaEdit: MEMIT with its changes kept out of what ordinary keys read.

Source: Fang et al. 2025 (arXiv 2410.02355), section 3, and the published code
(https://github.com/jianghoucheng/AlphaEdit). Its steps, and where they are done here:

1. `P`, the projection onto the null space of ordinary keys: onto the directions in which their second moments
   are below a threshold (equations 8 and 9). `null_space`.
2. Values, and residuals spread over layers, as in MEMIT. `SpreadEditor.fit`.
3. The change that puts out `R` at `K`, leaves the keys `K_p` of earlier edits alone, and is small:
   `Delta = R K^T P (K_p K_p^T P + K K^T P + L2 I)^-1` (equation 14 of the paper, where the last weight is 1;
   it is 10 in the settings they publish, `hparams/AlphaEdit`, and in `paper`). `projected_solution`. The keys
   of each request are kept for those after it.

The published threshold is a number of the moments of one host's keys; `default` counts it in means of their
diagonal instead, since hosts write in different units.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from baft.errors import ConfigError
from baft.hosts.models import Host
from baft.hosts.patches import weight_shape
from baft.methods.inserting import SpreadConfig, SpreadEditor
from baft.methods.stateful import Layout, State, number_of
from baft.types import EditRequest


@dataclass(frozen=True, kw_only=True)
class AlphaEditConfig(SpreadConfig):
    """Settings of `alphaedit`.

    Args:
        threshold: Moments below this count as none.
        threshold_unit: What the threshold counts: plain numbers, or means of the moments' diagonal.
        l2: Weight of the change's size.

    Raises:
        ConfigError: If a value is out of range.
    """

    threshold: float = 2e-2
    threshold_unit: Literal["absolute", "mean"] = "mean"
    l2: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("threshold", "l2"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")


PAPER = AlphaEditConfig(
    learning_rate=0.1,
    schedule="constant",
    max_steps=25,
    stop_loss=5e-2,
    stop_margin=None,
    n_key_prefixes=5,
    weight_decay=0.5,
    clamp=0.75,
    threshold_unit="absolute",
    l2=10.0,
)


class AlphaEditEditor(SpreadEditor):
    """Edits of several down-projections in the null space of ordinary keys.

    The layers of `default` are those that were chosen for MEMIT.
    """

    name: ClassVar[str] = "alphaedit"
    summary: ClassVar[str] = "MEMIT, its changes projected off what ordinary text reads (Fang et al. 2025)"
    presets: ClassVar[Mapping[str, AlphaEditConfig]] = {
        "default": replace(
            PAPER,
            learning_rate=0.5,
            max_steps=50,
            stop_loss=None,
            stop_margin=2.0,
            clamp=4.0,
            weight_decay=1e-3,
            n_prefixes=2,
            n_key_prefixes=10,
            train_eos=True,
            threshold=1.0,
            threshold_unit="mean",
            l2=1.0,
            layers_of_32=(1, 2, 3, 4, 5),
        ),
        "paper": PAPER,
    }
    config: AlphaEditConfig

    def __init__(self, host: Host, config: AlphaEditConfig, *, seed: int = 0):
        super().__init__(host, config, seed=seed)
        self._projections: dict[int, Tensor] = {}

    def projection(self, layer: int) -> Float[Tensor, "d_in d_in"]:
        """`P` of a layer.

        Raises:
            ConfigError: If the threshold leaves no direction.
        """
        if layer not in self._projections:
            moments, config = self.moments(layer), self.config
            unit = float(moments.diagonal().mean()) if config.threshold_unit == "mean" else 1.0
            found = null_space(moments, config.threshold * unit)
            if not bool(found.any()):
                raise ConfigError(
                    f"ordinary keys of layer {layer} leave no direction free below the threshold "
                    f"{config.threshold} ({config.threshold_unit}): raise it"
                )
            self._projections[layer] = found
        return self._projections[layer]

    def solve(self, layer: int, keys: Float[Tensor, "edit d_in"], state: State) -> Float[Tensor, "edit d_in"]:
        """`K^T P (K_p K_p^T P + K K^T P + L2 I)^-1`."""
        names = sorted((number_of(name), name) for name in state if name.endswith(f".layer{layer}.keys"))
        earlier = [state[name].to("cpu", torch.float64) for _, name in names]
        past = torch.cat([keys[:0], *earlier])
        return projected_solution(self.projection(layer), keys, past, self.config.l2)

    def more(self, layer: int, keys: Float[Tensor, "edit d_in"]) -> Mapping[str, Tensor]:
        """The keys, for the requests to come."""
        return {f"{len(self.requests)}.layer{layer}.keys": self.kept(keys)}

    def layout(self, requests: Sequence[EditRequest], state: State) -> Layout:
        """As of all such methods, and the keys."""
        found = dict(super().layout(requests, state))
        for layer, module in self.modules.items():
            d_in = weight_shape(self.host.model.get_submodule(module))[1]
            for n, request in enumerate(requests):
                found[f"{n}.layer{layer}.keys"] = (len(request.edits), d_in)
        return found


def null_space(moments: Float[Tensor, "d_in d_in"], threshold: float) -> Float[Tensor, "d_in d_in"]:
    """The orthogonal projection onto the eigenvectors whose eigenvalues are below a threshold."""
    values, vectors = torch.linalg.eigh(moments)
    free = vectors[:, values < threshold]
    return free @ free.T


def projected_solution(
    P: Float[Tensor, "d_in d_in"],
    keys: Float[Tensor, "edit d_in"],
    past: Float[Tensor, "past d_in"],
    l2: float,
) -> Float[Tensor, "edit d_in"]:
    """`K^T P (K_p K_p^T P + K K^T P + L2 I)^-1`, the columns of `K` and `K_p` being keys, now and earlier.

    `P` being symmetric, `Q = (K, K_p)` and `G = Q^T P Q`, these are the keys' rows of `(L2 I + G)^-1 Q^T P`:
    a system of as many unknowns as there are keys, and in the range of `P` by its form.
    """
    both = torch.cat([keys, past])
    projected = both @ P
    gram = projected @ both.T
    eye = torch.eye(len(both), dtype=both.dtype)
    return torch.linalg.solve(gram + l2 * eye, projected)[: len(keys)]
