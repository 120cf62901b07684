"""Editors that insert values at keys of down-projections: what of them is the same for all."""

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from baft.errors import ConfigError
from baft.hosts.architecture import Site, find_architecture, scaled_layers
from baft.hosts.models import Host
from baft.hosts.moments import corpus, regularized, second_moments
from baft.hosts.patches import down_projection, weight_shape
from baft.methods.base import EditOutcome, OnStep
from baft.methods.key_value import KeyValueConfig, KeyValues
from baft.methods.stateful import Layout, LowRankEditor, State
from baft.methods.training import TrainingResult
from baft.types import EditRequest


class Steps:
    """Tells the steps of several descents as those of one.

    Args:
        on_step: Whom, or nobody.
        most: How many they can be in all.
    """

    def __init__(self, on_step: OnStep | None, most: int):
        self._on_step, self._most = on_step, most
        self.results: list[TrainingResult] = []

    def __call__(self, step: int, most: int, loss: float) -> None:
        """One more step of the descent under way."""
        if self._on_step is not None:
            self._on_step(sum(one.n_steps for one in self.results) + step, self._most, loss)


class InsertingEditor(LowRankEditor):
    """Adds a matrix of low rank to the down-projections of some layers, one at each request.

    Args:
        host: The host; never changed.
        config: The settings.
        layers: The layers.
        seed: Draws the short texts before the prompts.

    Raises:
        ConfigError: If the host has no such layer.
        UnsupportedHostError: If a layer has no down-projection of its own.
    """

    config: KeyValueConfig

    def __init__(self, host: Host, config: KeyValueConfig, layers: Sequence[int], *, seed: int = 0):
        super().__init__(host, config, seed=seed)
        self.trains_eos = config.train_eos
        self.sites = tuple(Site(layer) for layer in sorted(layers))
        self.modules = {site.layer: down_projection(host.model, site.layer) for site in self.sites}
        self._moments: Mapping[str, Tensor] | None = None

    @property
    def named(self) -> Mapping[str, str]:
        """The down-projections, by `layer{number}`."""
        return {f"layer{layer}": module for layer, module in self.modules.items()}

    def moments(self, layer: int) -> Float[Tensor, "d_in d_in"]:
        """Second moments of a layer's keys on ordinary text, in float64 on the CPU, as they were taken."""
        if self._moments is None:
            config = self.config
            text = corpus(config.moments_text)
            self._moments = second_moments(
                self.host, self.encoder, list(self.modules.values()), text, config.moments_tokens
            )
        return self._moments[self.modules[layer]]

    def regularized_moments(self, layer: int) -> Float[Tensor, "d_in d_in"]:
        """The same, made invertible."""
        return regularized(self.moments(layer), self.config.moments_ridge)

    def layout(self, requests: Sequence[EditRequest], state: State) -> Layout:
        """A pair of matrices of every request and layer, whose rank is its number of edits."""
        found: dict[str, tuple[int | None, ...]] = {}
        for short, module in self.named.items():
            d_out, d_in = weight_shape(self.host.model.get_submodule(module))
            for n, request in enumerate(requests):
                found[f"{n}.{short}.up"] = (d_out, len(request.edits))
                found[f"{n}.{short}.down"] = (len(request.edits), d_in)
        return found

    def outcome(
        self,
        request: EditRequest,
        state: State,
        results: Sequence[TrainingResult],
        began: float,
        why_full: str | None,
    ) -> EditOutcome:
        """How a request went: the descents as they were, the margins as they are with the table in force."""
        asked = KeyValues(self.host, self.encoder, self.config, request.edits, seed=self.seed)
        losses = [loss for result in results for loss in result.losses[:-1]]
        return EditOutcome.of(
            request.edits,
            asked.margins(self.patches(state)),
            losses=(*losses, results[-1].losses[-1]),
            n_steps=sum(result.n_steps for result in results),
            stopped=max(results, key=lambda result: result.n_steps).stopped,
            seconds_s=time.monotonic() - began,
            why_full=why_full,
        )


@dataclass(frozen=True, kw_only=True)
class SpreadConfig(KeyValueConfig):
    """Settings of the methods that change several layers.

    Args:
        layers: The decoder blocks whose down-projections are changed, counted from 0; None for
            `layers_of_32`.
        layers_of_32: Layers of a host of 32, moved to the depth of the one at hand; the published ones.

    Raises:
        ConfigError: If a value is out of range.
    """

    layers: tuple[int, ...] | None = None
    layers_of_32: tuple[int, ...] = (4, 5, 6, 7, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        for layers in (self.layers, self.layers_of_32):
            if layers is not None and (not layers or len(set(layers)) < len(layers)):
                raise ConfigError(f"layers must name at least one layer, each once, got {list(layers)}")


class SpreadEditor(InsertingEditor):
    """Inserts values by changes spread over several layers: MEMIT and those after it.

    The value is wanted of the last layer's block output, `z = h + vector`. From the first layer to the last,
    each takes an equal share of what is left: keys and the block's output are read again with the changes of
    the layers before in force (Meng et al. 2023, section 4.2 and algorithm 1).
    """

    def __init__(self, host: Host, config: SpreadConfig, *, seed: int = 0):
        n_layers = find_architecture(host.model).n_layers
        layers = config.layers or scaled_layers(config.layers_of_32, of=32, n_layers=n_layers)
        super().__init__(host, config, layers, seed=seed)

    @abstractmethod
    def solve(self, layer: int, keys: Float[Tensor, "edit d_in"], state: State) -> Float[Tensor, "edit d_in"]:
        """`K^T` times the inverse that the method takes: what stands right of the residuals in its change.

        Args:
            layer: The layer.
            keys: One of each edit, in float64.
            state: The table of earlier requests.
        """

    def more(self, layer: int, keys: Float[Tensor, "edit d_in"]) -> Mapping[str, Tensor]:
        """What else the method keeps of a request at a layer; nothing."""
        return {}

    def fit(
        self, request: EditRequest, state: State, on_step: OnStep | None
    ) -> tuple[Mapping[str, Tensor], EditOutcome]:
        """Finds the values of all edits, and solves for the changes layer by layer."""
        began = time.monotonic()
        config, last = self.config, self.sites[-1]
        block, before = self._name_of(last), self.patches(state)
        edits = KeyValues(self.host, self.encoder, config, request.edits, seed=self.seed)
        starts = range(0, len(request.edits), config.edits_at_once)
        steps = Steps(on_step, config.max_steps * len(starts))
        vectors, why = [], None
        for start in starts:
            chunk = request.edits[start : start + config.edits_at_once]
            some = KeyValues(self.host, self.encoder, config, chunk, seed=self.seed)
            found, result, why = some.values(before, block, last, steps)
            vectors.append(found.to("cpu", torch.float64))
            steps.results.append(result)
        wanted = edits.outputs(before, block) + torch.cat(vectors)
        made = dict(state)
        for i, site in enumerate(self.sites):
            now = self.patches(made)
            keys, _ = edits.keys(now, self.modules[site.layer], by_group=True)
            residuals = (wanted - edits.outputs(now, block)) / (len(self.sites) - i)
            down = self.solve(site.layer, keys, state)
            made |= self.pair(f"layer{site.layer}", residuals.T, down)
            made |= self.more(site.layer, keys)
        return made, self.outcome(request, made, steps.results, began, why)

    def _name_of(self, site: Site) -> str:
        block = find_architecture(self.host.model).block(site)
        return next(name for name, module in self.host.model.named_modules() if module is block)
