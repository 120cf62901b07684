"""Adapters of peft as edits: trained in the projections' place, and then added to the projections.

Peft puts its modules around stand-ins of the projections, in a model that holds nothing else; while they are
trained, a patch asks them in the projections' place. So the host's own module tree never changes, and it does
not matter how its weights are kept.
"""

import contextlib
import hashlib
import re
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from baft.errors import ConfigError, UnsupportedHostError
from baft.hosts.architecture import Site, find_architecture, intervention_dtype, site_device, text_config
from baft.hosts.edited_model import EditedModel
from baft.hosts.models import Host
from baft.hosts.passes import FullPass, Predictions
from baft.hosts.patches import DeltaPatch, Seen, weight_shape
from baft.methods.base import EditOutcome, OnStep
from baft.methods.descent import Descent
from baft.methods.optimizer import DescentConfig
from baft.methods.stateful import Layout, State, StatefulEditor
from baft.methods.texts import renderings
from baft.methods.training import outcome_of
from baft.types import EditRequest

ADAPTER = "default"  # peft's name for the only adapter of a model
_USUAL_TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(DescentConfig):
    """Settings of `lora`, and of what goes beyond it.

    Args:
        rank: Of the adapter of a projection.
        alpha: What is added to a projection is scaled by `alpha / rank`.
        dropout: Share of a projection's inputs that its adapter does not see at a step.
        chat: Whether the chat rendering is trained beside the raw one.
        train_eos: Whether the target's end is trained.

    Raises:
        ConfigError: If a value is out of range.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    chat: bool = False
    train_eos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, fits, expected in (
            ("rank", self.rank >= 1, "1 or more"),
            ("alpha", 0 < self.alpha < float("inf"), "a positive number"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
        ):
            if not fits:
                raise ConfigError(f"{name} is out of range: got {getattr(self, name)}, expected {expected}")


class AdapterEditor(StatefulEditor):
    """Adapters of peft on the query and value projections of every block.

    Args:
        host: The host; neither its weights nor its modules are changed.
        config: The settings.
        seed: Of the first adapters and of dropout.

    Raises:
        ConfigError: If peft is not installed.
        UnsupportedHostError: If the host has no projections of the names that are looked for.
    """

    config: AdapterConfig

    def __init__(self, host: Host, config: AdapterConfig, *, seed: int = 0):
        super().__init__(host, config, seed=seed)
        self._peft = require_peft()
        self.trains_eos = config.train_eos
        self.modules = projections(host.model)
        self.sites = tuple(dict.fromkeys(self.modules.values()))

    @abstractmethod
    def peft_config(self, targets: list[str]) -> Any:
        """The settings in peft's own form."""

    @abstractmethod
    def parameters(self, layer: Any) -> Mapping[str, Tensor]:
        """What peft trains of one projection, by the name under which it is kept."""

    @abstractmethod
    def shapes(self, d_out: int, d_in: int) -> Mapping[str, tuple[int, int]]:
        """The shapes of these, for a projection of `d_in` numbers to `d_out`."""

    @abstractmethod
    def factors(self, kept: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What is added to a projection's weight, as `[d_out, rank]` and `[rank, d_in]`."""

    def loss(self, adapter: "Adapter", cross_entropy: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What is minimized at a step."""
        return cross_entropy

    def constrain(self, adapter: "Adapter", step: int) -> None:
        """What is done after a step, counted from 1."""

    def fit(
        self, request: EditRequest, state: State, on_step: OnStep | None
    ) -> tuple[Mapping[str, Tensor], EditOutcome]:
        """Trains the adapters, going on from where the last request left them."""
        began = time.monotonic()
        config = self.config
        texts = renderings(self.encoder, request.edits, chat=config.chat, eos=config.train_eos)
        shown = FullPass(self.host, self.encoder, self.positions, texts, ())
        adapter = Adapter(self, state)
        shown.edited.patches = adapter.patches
        steps = iter(range(1, config.max_steps + 1))

        def loss(cross_entropy: Float[Tensor, ""], seen: Predictions) -> Float[Tensor, ""]:
            return self.loss(adapter, cross_entropy)

        def without_dropout() -> Predictions:
            with adapter.resting():
                return shown({})

        descent = Descent(
            [tensor for kept in adapter.parameters.values() for tensor in kept.values()],
            config,
            loss,
            lambda: self.constrain(adapter, next(steps)),
            without_dropout if config.dropout else None,
        )
        result = descent.run(shown, on_step)
        made = {
            f"{name}.{key}": one for name, kept in adapter.parameters.items() for key, one in kept.items()
        }
        return made, outcome_of(request, result, time.monotonic() - began)

    def put(self, edited: EditedModel, state: State, requests: Sequence[EditRequest]) -> None:
        """The adapters' products are added to the projections."""
        edited.patches = {
            name: DeltaPatch([self.factors(_of(state, name))]) for name in self.modules if state
        }

    def layout(self, requests: Sequence[EditRequest], state: State) -> Layout:
        """The factors of every projection."""
        return {
            f"{name}.{key}": shape
            for name in self.modules
            for key, shape in self.shapes(*weight_shape(self.host.model.get_submodule(name))).items()
        }


class AdapterPatch:
    """Asks peft's adapter of a projection in the projection's place.

    Args:
        layer: The adapter, around a stand-in.
        seed: Of dropout; every step has its own.
    """

    def __init__(self, layer: Any, seed: str):
        self.layer, self._seed, self._n_steps = layer, seed, 0

    def __call__(
        self,
        module: nn.Module,
        inputs: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        seen: Seen,
    ) -> Float[Tensor, "*batch d_out"]:
        """The output with what the adapter adds to it."""
        self.layer.get_base_layer().output = output
        if not self.layer.training:
            return self.layer(inputs)
        self._n_steps += 1
        with seeded(f"{self._seed} {self._n_steps}", inputs.device):
            return self.layer(inputs)


class Adapter:
    """The adapters of a request in training.

    Args:
        editor: Whose.
        state: Where they go on from, if it is not empty.

    Attributes:
        tuner: Peft's model of all of them.
        patches: By the name of the projection in the host.
        parameters: What is trained of each.
    """

    def __init__(self, editor: AdapterEditor, state: State):
        model = editor.host.model
        stand_ins = {
            name: _StandIn(
                *weight_shape(model.get_submodule(name)), intervention_dtype(model), site_device(model, site)
            )
            for name, site in editor.modules.items()
        }
        self._tree = _Tree(list(stand_ins.values()))
        targets = [str(i) for i in range(len(stand_ins))]
        seed = f"{editor.name} {editor.seed} {len(editor.requests)}"
        with seeded(seed, torch.device("cpu")):
            wrapped = editor._peft.get_peft_model(self._tree, editor.peft_config(targets))
        self.tuner: Any = wrapped.base_model
        layers = {name: self._tree[i] for i, name in enumerate(stand_ins)}
        self.patches = {name: AdapterPatch(layer, f"{seed} {name}") for name, layer in layers.items()}
        self.parameters = {name: editor.parameters(layer) for name, layer in layers.items()}
        self._tree.train(editor.config.dropout > 0)
        with torch.no_grad():
            for name, kept in self.parameters.items():
                for key, tensor in kept.items():
                    if state:
                        tensor.copy_(state[f"{name}.{key}"])

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Without dropout, inside the `with` block."""
        self._tree.eval()
        try:
            yield
        finally:
            self._tree.train()


class _Tree(nn.ModuleList):
    """What peft takes for the model: the stand-ins alone."""

    def forward(self, output: Any) -> Any:
        """What it is given, to which AdaLoRA's model adds a loss."""
        return output


class _StandIn(nn.Linear):
    """In a projection's place below its adapter; puts out what that did, and has a weight without memory."""

    output: Tensor

    def __init__(self, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device):
        super().__init__(d_in, d_out, bias=False, device="meta")
        nothing = torch.zeros((), dtype=dtype, device=device)
        self.weight = nn.Parameter(nothing.expand(d_out, d_in), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """The projection's own output; a copy, because AdaLoRA adds to it in place."""
        return self.output.clone()


def projections(model: nn.Module) -> dict[str, Site]:
    """The projections that get an adapter, by name, and their blocks: those that peft takes for this family.

    Where peft knows no family of that name, they are the ones called `q_proj` and `v_proj`.

    Raises:
        ConfigError: If peft is not installed.
        UnsupportedHostError: If there are none.
    """
    require_peft()
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as FAMILIES

    targets = FAMILIES.get(text_config(model).model_type, _USUAL_TARGETS)
    names = {id(module): name for name, module in model.named_modules()}
    found = {
        names[id(module)]: Site(layer)
        for layer, block in enumerate(find_architecture(model).blocks)
        for module in block.modules()
        if _is_target(names[id(module)], targets)
    }
    if not found:
        raise UnsupportedHostError(
            f"peft knows no projections for a host of the family {text_config(model).model_type!r}, and it "
            f"has none called {' or '.join(_USUAL_TARGETS)}: choose a method without adapters, such as baft"
        )
    return found


def _is_target(name: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name.endswith(f".{target}") for target in targets)


def _of(state: State, name: str) -> dict[str, Tensor]:
    """What a table keeps of one projection."""
    start = f"{name}."
    return {key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)}


@contextlib.contextmanager
def seeded(seed: str, device: torch.device) -> Iterator[None]:
    """Random numbers of this seed on the CPU and a device, inside the `with` block; then all is as before."""
    number = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=7).digest())
    on_device = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(on_device):
        torch.default_generator.manual_seed(number)
        for one in on_device:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(number)
        yield


def require_peft() -> ModuleType:
    """Peft, which takes seconds to import.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"lora and adalora train with peft, which cannot be imported ({error}): pip install 'baft[lora]'"
        ) from None
    return peft
