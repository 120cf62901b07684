"""ROME: one fact, one key, one value, one layer.

Source: Meng et al. 2022 (arXiv 2202.05262), section 3.1, and the published code
(https://github.com/kmeng01/rome). Its steps, and where they are done here:

1. The key `k*`: the down-projection's input at the subject's last token, averaged over short texts before
   the prompt. `KeyValues.keys`.
2. The value `v*`: what the down-projection should put out there, found by descent on a vector added to what
   it does. `KeyValues.values`.
3. The change that puts `v*` at `k*` and moves the outputs on ordinary keys least, `C = E[k k^T]` being their
   second moments: `Delta = (v* - W k) (C^-1 k*)^T / ((C^-1 k*)^T k)` (equation 2). `insertion`. In the paper
   `k` is `k*`; in the code, and here, it is the key of the prompt alone, so that the edited host puts out
   `v*` itself for the very prompt.
4. Edits come one after the other, each on the host with those before in force; those of one request, too.

The published settings leave step 3's moments out for Llama (`mom2_adjustment` is false); they are used here.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from baft.errors import EditError
from baft.hosts.architecture import find_architecture, scaled_layers
from baft.hosts.models import Host
from baft.methods.base import EditOutcome, OnStep
from baft.methods.inserting import InsertingEditor, Steps
from baft.methods.key_value import KeyValueConfig, KeyValues
from baft.methods.stateful import State
from baft.types import EditRequest


@dataclass(frozen=True, kw_only=True)
class RomeConfig(KeyValueConfig):
    """Settings of `rome`.

    Args:
        layer: The decoder block whose down-projection is changed, counted from 0; None for
            `layer_of_32`.
        layer_of_32: A layer of a host of 32, moved to the depth of the one at hand; the published one.
    """

    layer: int | None = None
    layer_of_32: int = 5


PAPER = RomeConfig(
    learning_rate=0.5,
    schedule="constant",
    max_steps=25,
    stop_loss=5e-2,
    stop_margin=None,
    n_prefixes=20,
    n_key_prefixes=50,
)


class RomeEditor(InsertingEditor):
    """Rank-one edits of one down-projection.

    The layer of `default` is the best of six on training cases of zsRE and CounterFact, on SmolLM2.
    """

    name: ClassVar[str] = "rome"
    summary: ClassVar[str] = "a rank-one change of one matrix, in closed form (Meng et al. 2022)"
    presets: ClassVar[Mapping[str, RomeConfig]] = {
        "default": replace(
            PAPER,
            max_steps=50,
            stop_loss=None,
            stop_margin=2.0,
            n_prefixes=2,
            n_key_prefixes=10,
            train_eos=True,
            layer_of_32=8,
        ),
        "paper": PAPER,
    }
    config: RomeConfig

    def __init__(self, host: Host, config: RomeConfig, *, seed: int = 0):
        n_layers = find_architecture(host.model).n_layers
        layers = (
            scaled_layers((config.layer_of_32,), of=32, n_layers=n_layers)
            if config.layer is None
            else (config.layer,)
        )
        super().__init__(host, config, layers, seed=seed)

    def fit(
        self, request: EditRequest, state: State, on_step: OnStep | None
    ) -> tuple[Mapping[str, Tensor], EditOutcome]:
        """Inserts one edit after the other."""
        began = time.monotonic()
        site, module = self.sites[0], self.modules[self.sites[0].layer]
        made, pairs, why = dict(state), [], None
        steps = Steps(on_step, self.config.max_steps * len(request.edits))
        for edit in request.edits:
            now = self.patches(made)
            one = KeyValues(self.host, self.encoder, self.config, [edit], seed=self.seed)
            vectors, result, why = one.values(now, module, site, steps)
            averaged, alone = one.keys(now, module)
            moments = self.regularized_moments(site.layer)
            pairs.append(insertion(moments, averaged[0], alone[0], vectors[0].to("cpu", torch.float64)))
            up, down = (torch.stack(parts) for parts in zip(*pairs, strict=True))
            made |= self.pair(f"layer{site.layer}", up.T, down)
            steps.results.append(result)
        return made, self.outcome(request, made, steps.results, began, why)


def insertion(
    moments: Float[Tensor, "d_in d_in"],
    key: Float[Tensor, " d_in"],
    at: Float[Tensor, " d_in"],
    residual: Float[Tensor, " d_out"],
) -> tuple[Float[Tensor, " d_out"], Float[Tensor, " d_in"]]:
    """The two factors of the change by which the output at a key moves by a residual.

    Args:
        moments: `C`.
        key: `k*`, whose direction `C^-1 k*` the change reads.
        at: The key at which the output moves by the residual; `k*` itself in the paper.
        residual: `v* - W k`.

    Raises:
        EditError: If the key is nothing that the change could tell from others.
    """
    reads = torch.linalg.solve(moments, key)
    reads = reads / reads.norm()
    there = reads @ at
    if not abs(float(there)) > 1e-8 * float(at.norm()):
        raise EditError(
            "the key of the prompt is nothing like that behind other texts, so that no change of the weight "
            "reads both: set n_key_prefixes = 0, or take another layer"
        )
    return residual / there, reads
