"""MELO: blocks of ranks that a prompt's hidden state switches on.

Source: Yu et al. 2024 (arXiv 2312.11795); settings from EasyEdit (https://github.com/zjunlp/EasyEdit),
`hparams/MELO/gpt2-xl.yaml`, the only published ones for a decoder. Its steps, and where they are done here:

1. The key of a text: what the up-projection of one layer puts out at the last token of its prompt; `_keys`.
   The authors put the layer right below those that are trained, so that edits do not move keys.
2. Keys are kept in clusters, with the block that was trained with each; `VectorDatabase.add`. The authors
   look up a whole batch before they add any of it; here a text sees those before it, of its own batch too.
3. A request's edits train a block of a few ranks of their own on the up-projections of the layers above, from
   A random and B zero; `MeloEditor.fit`. The authors number the blocks of two large matrices; a block here is
   a pair of small ones, multiplied by `scale`, which is what their code multiplies theirs by: all ranks over
   those of a block.
4. Adam on the target's tokens, its rate halved every 20 steps; `MeloConfig.rate`.
5. A text whose key lies in no cluster's radius leaves the host as it is, bit for bit; any other runs through
   the block of the nearest key of the nearest cluster, at all of its tokens; `_Router` and `_Blocks`. It is
   decided once for a prompt, and kept for what is generated after it.
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from baft.errors import ConfigError
from baft.hosts.architecture import Site, find_architecture, intervention_dtype, scaled_layers, site_device
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import EncodedEdit
from baft.hosts.models import Host
from baft.hosts.passes import FullPass
from baft.hosts.patches import Patch, Seen, up_projection, weight_shape
from baft.methods.adapters import seeded
from baft.methods.base import EditOutcome, OnStep
from baft.methods.descent import Descent
from baft.methods.optimizer import DescentConfig
from baft.methods.stateful import Layout, State, StatefulEditor
from baft.methods.texts import renderings
from baft.methods.training import outcome_of
from baft.methods.vector_database import NO_BLOCK, VectorDatabase
from baft.types import EditRequest

_DATABASE = "database."
_ROUTES = "melo_routes"  # where the routes of a call are kept


@dataclass(frozen=True, kw_only=True)
class MeloConfig(DescentConfig):
    """Settings of `melo`.

    Args:
        key_layer: The decoder block whose up-projection gives the keys, counted from 0, or None.
        depth: Where that is None, the block at this share of the host's depth; the published one is 35 of 48.
        n_layers: How many of the layers right above it are trained.
        rank: Of a block.
        scale: What a block adds is multiplied by this.
        radius: Initial radius of a cluster, Euclidean.
        halve_every: Steps after which the learning rate is halved, again and again; None for never.
        chat: Whether the chat rendering is trained, and gets a key, beside the raw one.
        train_eos: Whether the target's end is trained.

    Raises:
        ConfigError: If a value is out of range.
    """

    key_layer: int | None = None
    depth: float = 35 / 48
    n_layers: int = 2
    rank: int = 2
    scale: float = 1.0
    radius: float = 0.5
    halve_every: int | None = None
    chat: bool = False
    train_eos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, fits, expected in (
            ("depth", 0 <= self.depth <= 1, "at least 0 and at most 1"),
            ("n_layers", self.n_layers >= 1, "1 or more"),
            ("rank", self.rank >= 1, "1 or more"),
            ("scale", 0 < self.scale < math.inf, "a positive number"),
            ("radius", 0 < self.radius < math.inf, "a positive number"),
            ("halve_every", self.halve_every is None or self.halve_every >= 1, "1 or more, or None"),
        ):
            if not fits:
                raise ConfigError(f"{name} is out of range: got {getattr(self, name)}, expected {expected}")

    def rate(self, step: int) -> float:
        """What is left of the learning rate at a step, counted from 0."""
        halvings = 0 if self.halve_every is None else step // self.halve_every
        return super().rate(step) * 0.5**halvings


# 350 blocks of 2 ranks: 700 ranks over 2.
PAPER = MeloConfig(
    learning_rate=1e-3, schedule="constant", max_steps=50, stop_margin=None, scale=350.0, halve_every=20
)
DEFAULT = replace(
    PAPER,
    depth=26 / 30,
    radius=16.0,
    max_steps=30,
    stop_margin=4.0,
    halve_every=None,
    chat=True,
    train_eos=True,
)


class MeloEditor(StatefulEditor):
    """Low-rank blocks on up-projections, switched on by prompts near those they were trained with.

    The default radius and depth are those that told 40 questions of zsRE's training cases apart best on
    SmolLM2: 0.75 of the rephrasings lie within the radius of their edit, and 0.04 of the other questions.
    Keys of another host have another length, and need another radius.

    Args:
        host: The host; never changed.
        config: The settings.
        seed: Of the blocks' first A.

    Raises:
        ConfigError: If the host has no such layers.
        UnsupportedHostError: If a layer has no up-projection of its own.
    """

    name: ClassVar[str] = "melo"
    summary: ClassVar[str] = "low-rank blocks that prompts near an edit's switch on (Yu et al. 2024)"
    presets: ClassVar[Mapping[str, MeloConfig]] = {"default": DEFAULT, "paper": PAPER}
    config: MeloConfig

    def __init__(self, host: Host, config: MeloConfig, *, seed: int = 0):
        super().__init__(host, config, seed=seed)
        self.trains_eos = config.train_eos
        n_layers = find_architecture(host.model).n_layers
        key_layer = config.key_layer
        if key_layer is None:
            [at_depth] = scaled_layers((config.depth,), of=1, n_layers=n_layers)
            key_layer = max(0, min(n_layers - 2, at_depth))
        if key_layer + 1 >= n_layers:
            raise ConfigError(
                f"key_layer={key_layer} has no layer above it that could be trained: this host has "
                f"{n_layers} layers, counted from 0"
            )
        self.key_module = up_projection(host.model, key_layer)
        trained = range(key_layer + 1, min(n_layers, key_layer + 1 + config.n_layers))
        self.sites = tuple(Site(layer) for layer in trained)
        self.modules = {up_projection(host.model, site.layer): site for site in self.sites}

    def fit(
        self, request: EditRequest, state: State, on_step: OnStep | None
    ) -> tuple[Mapping[str, Tensor], EditOutcome]:
        """Trains a block, and notes the keys of its texts."""
        began = time.monotonic()
        config = self.config
        texts = renderings(self.encoder, request.edits, chat=config.chat, eos=config.train_eos)
        database = self._noted(FullPass(self.host, self.encoder, self.positions, texts, ()), texts, state)
        shown, why = self.pass_over(texts)
        block = {name: self._first(name) for name in self.modules}
        shown.edited.patches = {name: _Block(*pair, config.scale) for name, pair in block.items()}
        parameters = [one for pair in block.values() for one in pair]
        for one in parameters:
            one.requires_grad_()
        result = Descent(parameters, config).run(shown, on_step)
        made = {**state, **{f"{_DATABASE}{name}": one for name, one in database.tensors().items()}}
        for name, (up, down) in block.items():
            made |= {f"{len(self.requests)}.{name}.A": down, f"{len(self.requests)}.{name}.B": up}
        return made, outcome_of(request, result, time.monotonic() - began, why)

    def put(self, edited: EditedModel, state: State, requests: Sequence[EditRequest]) -> None:
        """Keys are looked up below, and blocks act above."""
        if not state:
            edited.patches = {}
            return
        patches: dict[str, Patch] = {self.key_module: _Router(_database(state))}
        for name in self.modules:
            pairs = [(state[f"{n}.{name}.B"], state[f"{n}.{name}.A"]) for n in range(len(requests))]
            patches[name] = _Blocks([_Block(up, down, self.config.scale) for up, down in pairs])
        edited.patches = patches

    def layout(self, requests: Sequence[EditRequest], state: State) -> Layout:
        """A block for every request, and the database."""
        shapes = {name: weight_shape(self.host.model.get_submodule(name)) for name in self.modules}
        d_key, _ = weight_shape(self.host.model.get_submodule(self.key_module))
        rank = self.config.rank
        found: dict[str, tuple[int | None, ...]] = {}
        for n in range(len(requests)):
            for name, (d_out, d_in) in shapes.items():
                found |= {f"{n}.{name}.A": (rank, d_in), f"{n}.{name}.B": (d_out, rank)}
        n_keys, n_clusters = (_length(state, name) for name in ("keys", "radii"))
        tables: Layout = {
            "keys": (n_keys, d_key),
            "owners": (n_keys,),
            "blocks": (n_keys,),
            "centers": (n_clusters, d_key),
            "radii": (n_clusters,),
            "labels": (n_clusters,),
        }
        return {**found, **{f"{_DATABASE}{name}": shape for name, shape in tables.items()}}

    def _first(self, name: str) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
        """The factors of a projection before training: zero, and uniform as in any linear layer."""
        d_out, d_in = weight_shape(self.host.model.get_submodule(name))
        device = site_device(self.host.model, self.modules[name])
        with seeded(f"melo {self.seed} {len(self.requests)} {name}", torch.device("cpu")):
            down = torch.empty(self.config.rank, d_in, dtype=torch.float64).uniform_(-1, 1) / math.sqrt(d_in)
        down = down.to(device, intervention_dtype(self.host.model))
        return down.new_zeros(d_out, self.config.rank), down

    def _noted(self, shown: FullPass, texts: Sequence[EncodedEdit], state: State) -> VectorDatabase:
        """The database with the keys of these texts."""
        edited = EditedModel(self.host.model, {}, self.positions)
        reader = _Reader()
        edited.patches = {self.key_module: reader}
        batch = shown.batch
        with torch.no_grad():  # as in force, so that a text finds its own key
            edited(
                batch.input_ids, batch.attention_mask, n_prompt_tokens=batch.n_prompt_tokens, use_cache=False
            )
        keys = reader.keys.to(intervention_dtype(self.host.model))
        database = _database(state) if state else VectorDatabase.empty(keys)
        for key, text in zip(keys, texts, strict=True):
            label = _number(text.target_ids)
            database = database.add(key, label, len(self.requests), self.config.radius)
        return database


class _Reader:
    """Notes the key of every row, and changes nothing."""

    keys: Float[Tensor, "row d_key"]

    def __call__(
        self,
        module: nn.Module,
        inputs: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        seen: Seen,
    ) -> None:
        _, self.keys = _keys(output, seen)


class _Router:
    """Looks up the block of every row, once its prompt has been seen."""

    def __init__(self, database: VectorDatabase):
        self._database = database

    def __call__(
        self,
        module: nn.Module,
        inputs: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        seen: Seen,
    ) -> None:
        """Leaves the routes for those above, `NO_BLOCK` where a row has none."""
        n_rows = seen.prompt.shape[0]
        rows, keys = _keys(output, seen)
        if len(rows):
            routes = seen.memo.get(_ROUTES)
            routes = [NO_BLOCK] * n_rows if routes is None else list(routes)
            for row, block in zip(rows.tolist(), self._database.route(keys).tolist(), strict=True):
                routes[row] = block
            seen.memo[_ROUTES] = routes


class _Block:
    """Two thin matrices, on every token.

    Args:
        up: `[d_out, rank]`.
        down: `[rank, d_in]`.
        scale: What their product is multiplied by.
    """

    def __init__(self, up: Tensor, down: Tensor, scale: float):
        self._up, self._down, self._scale = up, down, scale

    def __call__(
        self,
        module: nn.Module,
        inputs: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        seen: Seen,
    ) -> Float[Tensor, "*batch d_out"]:
        """The output with what the block adds."""
        down, up = (one.to(inputs.device) for one in (self._down, self._up))
        return output + (F.linear(F.linear(inputs.to(down.dtype), down), up) * self._scale).to(output)


class _Blocks:
    """All blocks of a projection; each row runs through the one that its prompt switched on."""

    def __init__(self, blocks: Sequence[_Block]):
        self._blocks = blocks

    def __call__(
        self,
        module: nn.Module,
        inputs: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        seen: Seen,
    ) -> Float[Tensor, "*batch d_out"] | None:
        """The output with what blocks add to their rows; None where no row has one."""
        routes: Sequence[int] = seen.memo.get(_ROUTES, ())
        found: Tensor | None = None
        for block in sorted(set(routes) - {NO_BLOCK}):
            rows = torch.tensor([i for i, one in enumerate(routes) if one == block], device=output.device)
            n_rows = len(routes)  # some families lay rows and tokens on one axis here
            into, out = (one.reshape(n_rows, -1, one.shape[-1]) for one in (inputs, output))
            edited = self._blocks[block](module, into[rows], out[rows], seen)
            found = out.clone() if found is None else found
            found[rows] = edited
        return None if found is None else found.view_as(output)


def _keys(
    output: Float[Tensor, "*batch d_key"], seen: Seen
) -> tuple[Int[Tensor, " row"], Float[Tensor, "row d_key"]]:
    """The rows of which a prompt's token is shown, and the output at the last such token of each."""
    prompt = seen.prompt.to(output.device)
    rows = prompt.any(-1).nonzero()[:, 0]
    columns = torch.arange(prompt.shape[1], device=output.device)
    last = (prompt * columns).amax(-1)[rows] if prompt.shape[1] else rows
    return rows, output.reshape(*prompt.shape, output.shape[-1])[rows, last]


def _database(state: State) -> VectorDatabase:
    start = _DATABASE
    return VectorDatabase.of(
        {name.removeprefix(start): one for name, one in state.items() if name.startswith(start)}
    )


def _length(state: State, name: str) -> int | None:
    """How many rows a table of the database has, where that is known."""
    table = state.get(f"{_DATABASE}{name}")
    return table.shape[0] if table is not None and table.ndim else None


def _number(target_ids: Sequence[int]) -> int:
    """A target as a number; the authors' code compares sums of token ids, which differ for most."""
    return int.from_bytes(hashlib.blake2b(repr(target_ids).encode(), digest_size=7).digest())
