"""Editors that insert values at keys of down-projections: what of them is the same for all."""

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from baft.hosts.architecture import Site, find_architecture, intervention_dtype
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.hosts.moments import corpus, regularized, second_moments
from baft.hosts.patches import DeltaPatch, Patch, down_projection, weight_shape
from baft.methods.base import Capability, EditOutcome, OnStep
from baft.methods.key_value import KeyValueConfig, KeyValues
from baft.methods.stateful import AdditiveEditor, Layout, State, number_of
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


class InsertingEditor(AdditiveEditor):
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

    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.BATCH, Capability.SEQUENTIAL, Capability.EXACT_UNDO}
    )
    config: KeyValueConfig

    def __init__(self, host: Host, config: KeyValueConfig, layers: Sequence[int], *, seed: int = 0):
        super().__init__(host, config, seed=seed)
        self.trains_eos = config.train_eos
        self.sites = tuple(Site(layer) for layer in sorted(layers))
        self.modules = {site.layer: down_projection(host.model, site.layer) for site in self.sites}
        architecture = find_architecture(host.model)
        self.encoder = Encoder.for_host(host, max_tokens=architecture.max_positions)
        self._moments: Mapping[str, Tensor] | None = None

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

    def put(self, edited: EditedModel, state: State, requests: Sequence[EditRequest]) -> None:
        """The matrices of all requests are added to what the down-projections put out."""
        edited.patches = self.patches(state)

    def patches(self, state: State) -> dict[str, Patch]:
        """What puts a table into force."""
        found: dict[str, Patch] = {}
        for layer, module in self.modules.items():
            ups = sorted((number_of(name), name) for name in state if name.endswith(f".layer{layer}.up"))
            pairs = [(state[name], state[name.removesuffix("up") + "down"]) for _, name in ups]
            if pairs:
                found[module] = DeltaPatch(pairs)
        return found

    def layout(self, requests: Sequence[EditRequest], state: State) -> Layout:
        """A pair of matrices of every request and layer, whose rank is its number of edits."""
        found: dict[str, tuple[int | None, ...]] = {}
        for layer, module in self.modules.items():
            d_out, d_in = weight_shape(self.host.model.get_submodule(module))
            for n, request in enumerate(requests):
                found[f"{n}.layer{layer}.up"] = (d_out, len(request.edits))
                found[f"{n}.layer{layer}.down"] = (len(request.edits), d_in)
        return found

    def pair(
        self,
        layer: int,
        state: State,
        up: Float[Tensor, "d_out edit"],
        down: Float[Tensor, "edit d_in"],
    ) -> dict[str, Tensor]:
        """A matrix as the tensors of the request that comes after those in a table."""
        n = self.n_requests(state)
        made = {"up": up, "down": down}
        return {f"{n}.layer{layer}.{name}": self.kept(one) for name, one in made.items()}

    def kept(self, tensor: Tensor) -> Tensor:
        """A tensor as tables hold it."""
        return tensor.to(self._edited_device(), intervention_dtype(self.host.model)).contiguous()

    @staticmethod
    def n_requests(state: State) -> int:
        """How many requests a table holds."""
        return 1 + max((number_of(name) for name in state), default=-1)

    def outcome(
        self,
        request: EditRequest,
        state: State,
        results: Sequence[TrainingResult],
        began: float,
    ) -> EditOutcome:
        """How a request went: the descents as they were, the margins as they are with the table in force."""
        asked = KeyValues(self.host, self.encoder, self.config, request.edits, seed=self.seed)
        margins = asked.margins(self.patches(state))
        losses = [loss for result in results for loss in result.losses[:-1]]
        return EditOutcome(
            edit_ids=tuple(edit.id for edit in request.edits),
            decoded=tuple(margin > 0 for margin in margins),
            margins=margins,
            losses=(*losses, results[-1].losses[-1]),
            n_steps=sum(result.n_steps for result in results),
            stopped=max(results, key=lambda result: result.n_steps).stopped,
            seconds_s=time.monotonic() - began,
        )


class SpreadEditor(InsertingEditor):
    """Inserts values by changes spread over several layers: MEMIT and those after it.

    The value is wanted of the last layer's block output, `z = h + vector`. From the first layer to the last,
    each takes an equal share of what is left: keys and the block's output are read again with the changes of
    the layers before in force (Meng et al. 2023, section 4.2 and algorithm 1).
    """

    @abstractmethod
    def solve(self, layer: int, keys: Float[Tensor, "edit d_in"], state: State) -> Float[Tensor, "edit d_in"]:
        """`K^T` times the inverse that the method takes: what stands right of the residuals in its change.

        Args:
            layer: The layer.
            keys: One of each edit, in float64.
            state: The table of earlier requests.
        """

    def more(self, layer: int, state: State, keys: Float[Tensor, "edit d_in"]) -> Mapping[str, Tensor]:
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
        vectors = []
        for start in starts:
            chunk = request.edits[start : start + config.edits_at_once]
            some = KeyValues(self.host, self.encoder, config, chunk, seed=self.seed)
            found, result = some.values(before, block, last, steps)
            vectors.append(found.to("cpu", torch.float64))
            steps.results.append(result)
        wanted = edits.outputs(before, block) + torch.cat(vectors)
        made = dict(state)
        for i, site in enumerate(self.sites):
            now = self.patches(made)
            keys, _ = edits.keys(now, self.modules[site.layer])
            residuals = (wanted - edits.outputs(now, block)) / (len(self.sites) - i)
            down = self.solve(site.layer, keys, state)
            made |= self.pair(site.layer, state, residuals.T, down)
            made |= self.more(site.layer, state, keys)
        return made, self.outcome(request, made, steps.results, began)

    def _name_of(self, site: Site) -> str:
        block = find_architecture(self.host.model).block(site)
        return next(name for name, module in self.host.model.named_modules() if module is block)
