"""UltraEdit: one pass forward and back, and a ridge regression; nothing is trained, no subject is needed.

Source: Gu et al. 2025 (arXiv 2505.14679), section 3, and the published code
(https://github.com/XiaojieGu/UltraEdit). Its steps, and where they are done here:

1. Features: at every token from which a target token is predicted, what goes into each edited module, `h`,
   and the gradient of the target's cross-entropy by what comes out, `g`. `UltraEditEditor._features`.
2. Lifelong normalization: running mean and standard deviation of `(h, g)` over all edits so far, those of
   this request included; `(h', g')` are the features under them. `Running`. As in the code, modules of one
   shape share their statistics.
3. The output that is wanted of a module beyond what it has: `v = -learning_rate |h'|^2 g'`. `shift`.
4. The change, by ridge regression of those on the inputs themselves: with rows `H` and `V`,
   `Delta^T = (H^T H + ridge I)^-1 H^T V`. `shift`.

Statistics of a single edit of few tokens are poor, and what they normalize is hardly a direction any more.
`default` therefore starts them on texts that no edit is about (`warm_up`); `paper` starts from nothing.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from baft.errors import ConfigError, EditError, InputError
from baft.hosts.architecture import Site, find_architecture, scaled_layers
from baft.hosts.background import background_text
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import EncodedEdit
from baft.hosts.models import Host
from baft.hosts.passes import FullPass
from baft.hosts.patches import Patch, Seen, by_row, up_projections, weight_shape
from baft.methods.base import EditOutcome, OnStep
from baft.methods.key_value import with_patch
from baft.methods.stateful import Layout, LowRankEditor, State
from baft.methods.texts import measured, renderings
from baft.nn.losses import row_cross_entropy
from baft.types import EditRequest

_EPS = 1e-8
_TEXTS = 16  # in one pass


@dataclass(frozen=True, kw_only=True)
class UltraEditConfig:
    """Settings of `ultraedit`.

    Args:
        gate_layers: The blocks whose gate is changed, counted from 0 (of hosts without gates: the
            up-projection); None for `gates_of_32`.
        up_layers: The blocks whose up-projection is changed; None for `ups_of_32`.
        gates_of_32: Layers of a host of 32, moved to the depth of the one at hand; those published for
            Llama 3 8B.
        ups_of_32: Likewise.
        learning_rate: How far outputs are moved.
        ridge: Of the regression.
        warm_up: Texts that no edit is about on which the statistics start.
        chat: Whether the chat rendering is edited beside the raw one.
        train_eos: Whether the target's end is edited.

    Raises:
        ConfigError: If a value is out of range, or no module is named.
    """

    gate_layers: tuple[int, ...] | None = None
    up_layers: tuple[int, ...] | None = None
    gates_of_32: tuple[int, ...] = (11, 12, 13, 14, 15)
    ups_of_32: tuple[int, ...] = (18, 19, 20, 21, 22, 23, 24)
    learning_rate: float = 1e-6
    ridge: float = 1.0
    warm_up: int = 0
    chat: bool = False
    train_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("learning_rate", "ridge"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number, got {value}")
        if not 0 <= self.warm_up <= 300:
            raise ConfigError(f"warm_up must be between 0 and 300 texts, got {self.warm_up}")
        gates = self.gates_of_32 if self.gate_layers is None else self.gate_layers
        if not gates and not (self.ups_of_32 if self.up_layers is None else self.up_layers):
            raise ConfigError("ultraedit has nothing to edit: name gate_layers or up_layers")


@dataclass(frozen=True, slots=True)
class Running:
    """Mean and spread of all features seen so far, in float64.

    Args:
        count: How many, `[1]`.
        mean: Their mean, `[width]`.
        squares: Sum of their squared distances from the mean, `[width]`.
    """

    count: Float[Tensor, "1"]
    mean: Float[Tensor, " width"]
    squares: Float[Tensor, " width"]

    @classmethod
    def empty(cls, width: int) -> "Running":
        """Of nothing."""
        zeros = torch.zeros(width, dtype=torch.float64)
        return cls(zeros.new_zeros(1), zeros, zeros)

    def and_also(self, features: Float[Tensor, "token width"]) -> "Running":
        """With some more (Chan et al. 1979, the pairwise update)."""
        n, mean = len(features), features.mean(0)
        apart, count = mean - self.mean, self.count + n
        squares = (features - mean).square().sum(0) + apart.square() * self.count * n / count
        return Running(count, self.mean + apart * n / count, self.squares + squares)

    def normalized(self, features: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """The features less the mean, in standard deviations; zero where there was no spread."""
        deviation = (self.squares / (self.count - 1).clamp(min=1)).sqrt()
        return (features - self.mean) / (deviation + _EPS)


def shift(
    h: Float[Tensor, "token d_in"],
    normalized: Float[Tensor, "token both"],
    learning_rate: float,
    ridge: float,
) -> tuple[Float[Tensor, "d_out token"], Float[Tensor, "token d_in"]]:
    """The change of one module's weight, as two factors.

    Args:
        h: What goes into it.
        normalized: That and the gradients, `d_in + d_out` wide, under the running statistics.
        learning_rate: How far outputs are moved.
        ridge: Of the regression.

    Returns:
        `V^T (H H^T + ridge I)^-1` and `H`, whose product is that of the module's docstring.
    """
    d_in = h.shape[1]
    wanted = -learning_rate * normalized[:, :d_in].square().sum(-1, keepdim=True) * normalized[:, d_in:]
    gram = h @ h.T + ridge * torch.eye(len(h), dtype=h.dtype)
    return torch.linalg.solve(gram, wanted).T, h


class _Probe:
    """Adds nothing to a module's output, but in such a way that the gradient by it can be had."""

    inputs: Tensor
    nothing: Tensor

    def __call__(
        self,
        module: nn.Module,
        inputs: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        seen: Seen,
    ) -> Float[Tensor, "*batch d_out"]:
        self.inputs = by_row(inputs.detach(), seen)
        self.nothing = torch.zeros_like(by_row(output, seen), requires_grad=True)
        return output + self.nothing.view_as(output)


Features = Mapping[str, tuple[Tensor, Tensor]]  # of each module: inputs and gradients, a row a token


class UltraEditEditor(LowRankEditor):
    """Ridge regressions of normalized gradients on a feed-forward part's inputs.

    Args:
        host: The host; never changed.
        config: The settings.
        seed: Without effect: nothing here is random.

    Raises:
        ConfigError: If the host has no such layer.
        UnsupportedHostError: If a layer has no such module.
    """

    name: ClassVar[str] = "ultraedit"
    summary: ClassVar[str] = "one step from normalized gradients, by ridge regression (Gu et al. 2025)"
    presets: ClassVar[Mapping[str, UltraEditConfig]] = {
        "default": UltraEditConfig(
            gates_of_32=(),
            ups_of_32=(26, 27, 28, 29, 30, 31),
            learning_rate=4e-4,
            warm_up=64,
            train_eos=True,
        ),
        "paper": UltraEditConfig(),
    }
    config: UltraEditConfig

    def __init__(self, host: Host, config: UltraEditConfig, *, seed: int = 0):
        super().__init__(host, config, seed=seed)
        self.trains_eos = config.train_eos
        n = find_architecture(host.model).n_layers
        gates, ups = config.gate_layers, config.up_layers
        gates = scaled_layers(config.gates_of_32, of=32, n_layers=n) if gates is None else gates
        ups = scaled_layers(config.ups_of_32, of=32, n_layers=n) if ups is None else ups
        named = {f"layer{layer}.gate": up_projections(host.model, layer)[0] for layer in gates}
        named |= {f"layer{layer}.up": up_projections(host.model, layer)[-1] for layer in ups}
        self.modules = {module: short for short, module in named.items()}  # one that is both stands once
        self.sites = tuple(Site(layer) for layer in sorted({*gates, *ups}))
        self._start: Mapping[str, Running] | None = None

    def fit(
        self, request: EditRequest, state: State, on_step: OnStep | None
    ) -> tuple[Mapping[str, Tensor], EditOutcome]:
        """Reads features of all edits under the edits in force, and solves for each module's change."""
        began = time.monotonic()
        config = self.config
        texts = renderings(self.encoder, request.edits, chat=config.chat, eos=config.train_eos)
        features, before = self._features(self.patches(state), texts)
        if not math.isfinite(before):
            raise EditError(f"the loss on the targets is {before}, where a finite number was expected")
        running = self._merged(self._statistics(state), features)
        made = dict(state)
        for module, (h, g) in features.items():
            normalized = running[self._shape_of(module)].normalized(torch.cat([h, g], -1))
            up, down = shift(h, normalized, config.learning_rate, config.ridge)
            if len(down) > down.shape[1]:  # a batch of many tokens: as many columns as inputs are enough
                up, down = up @ down, torch.eye(down.shape[1], dtype=down.dtype)
            made |= self.pair(self.modules[module], up, down)
        for shape, seen in running.items():
            for name in ("count", "mean", "squares"):
                made[f"{len(self.requests)}.{shape}.{name}"] = getattr(seen, name).to(self.device)
        if on_step is not None:
            on_step(1, 1, before)
        edited = EditedModel(self.host.model)
        edited.patches = self.patches(made)
        margins, after = measured(self.host, self.encoder, edited, texts)
        return made, EditOutcome.of(
            request.edits,
            margins,
            losses=(before, sum(after) / len(after)),
            n_steps=1,
            stopped="closed_form",
            seconds_s=time.monotonic() - began,
        )

    @property
    def named(self) -> Mapping[str, str]:
        """The modules, by `layer{number}.gate` and `layer{number}.up`."""
        return {short: module for module, short in self.modules.items()}

    def layout(self, requests: Sequence[EditRequest], state: State) -> Layout:
        """A pair of matrices of every request and module, and the statistics after it."""
        found: dict[str, tuple[int | None, ...]] = {}
        for module, short in self.modules.items():
            d_out, d_in = weight_shape(self.host.model.get_submodule(module))
            for n in range(len(requests)):
                found[f"{n}.{short}.up"] = (d_out, None)
                found[f"{n}.{short}.down"] = (None, d_in)
                found[f"{n}.{self._shape_of(module)}.count"] = (1,)
                for name in ("mean", "squares"):
                    found[f"{n}.{self._shape_of(module)}.{name}"] = (d_in + d_out,)
        return found

    def _shape_of(self, module: str) -> str:
        d_out, d_in = weight_shape(self.host.model.get_submodule(module))
        return f"shape{d_out}x{d_in}"

    def _statistics(self, state: State) -> Mapping[str, Running]:
        """Those after the requests in a table; before the first, those of the warm-up."""
        if not state:
            if self._start is None:
                self._start = self._warmed_up()
            return self._start
        n = len(self.requests) - 1
        names = ("count", "mean", "squares")
        return {
            shape: Running(*(state[f"{n}.{shape}.{name}"].to("cpu", torch.float64) for name in names))
            for shape in map(self._shape_of, self.modules)
        }

    def _warmed_up(self) -> Mapping[str, Running]:
        running: Mapping[str, Running] = {}
        for module in self.modules:
            width = sum(weight_shape(self.host.model.get_submodule(module)))
            running = {**running, self._shape_of(module): Running.empty(width)}
        texts = []
        for sentence in background_text()["sentences"][: self.config.warm_up]:
            said, _, last = sentence.rpartition(" ")
            try:
                texts.append(self.encoder.edit(said, last, eos=False))
            except InputError:  # longer than the host's context, or one word
                continue
        return self._merged(running, self._features({}, texts)[0]) if texts else running

    def _merged(self, running: Mapping[str, Running], features: Features) -> Mapping[str, Running]:
        found = dict(running)
        for module, (h, g) in features.items():
            shape = self._shape_of(module)
            found[shape] = found[shape].and_also(torch.cat([h, g], -1))
        return found

    def _features(self, patches: Mapping[str, Patch], texts: Sequence[EncodedEdit]) -> tuple[Features, float]:
        """Inputs of every module and gradients by its outputs where target tokens are predicted.

        Of the sum over texts of the mean cross-entropy of each one's target, so that a text's gradient is
        the same whatever it stands beside. Also gives the mean over texts.
        """
        kept: dict[str, list[tuple[Tensor, Tensor]]] = {module: [] for module in self.modules}
        losses: list[float] = []
        for start in range(0, len(texts), _TEXTS):
            shown = FullPass(self.host, self.encoder, self.positions, texts[start : start + _TEXTS], ())
            probes = {module: _Probe() for module in self.modules}
            probed = dict(patches)
            for module, probe in probes.items():
                probed = with_patch(probed, module, probe)
            shown.edited.patches = probed
            with torch.enable_grad():
                each = row_cross_entropy(shown({}).logits, shown.targets, shown.rows)
                found = torch.autograd.grad(each.sum(), [probe.nothing for probe in probes.values()])
            losses += each.tolist()
            for (module, probe), gradient in zip(probes.items(), found, strict=True):
                at = shown.rows.to(gradient.device), shown.columns.to(gradient.device)
                kept[module].append((probe.inputs[at], gradient[at]))
        features = {}
        for module, pieces in kept.items():
            h, g = (torch.cat(parts).to("cpu", torch.float64) for parts in zip(*pieces, strict=True))
            features[module] = (h, g)
        return features, sum(losses) / len(losses)
