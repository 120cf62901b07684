"""Where the blocks of a decoder are: found by structure, never by the model's name.

A host's stack is the outermost `ModuleList` with as many members as the config has hidden layers. That
holds for every decoder-only family in transformers (`model.layers`, `transformer.h`, `gpt_neox.layers`,
`model.decoder.layers`) and below the wrappers of peft.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from baft.errors import ConfigError, UnsupportedHostError


class Site(NamedTuple):
    """Where an intervention acts: the output of decoder block `layer`, counted from 0."""

    layer: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """The facts about a host that an intervention needs.

    Args:
        stack: The module whose forward runs the blocks; it sees the token ids and the cache.
        blocks: The decoder blocks, in order.
        d_model: Width of the hidden state.
        max_positions: Longest sequence the host takes, in tokens, or None where it has no bound.
    """

    stack: nn.Module
    blocks: nn.ModuleList
    d_model: int
    max_positions: int | None

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    def block(self, site: Site) -> nn.Module:
        """The module whose output a site edits.

        Raises:
            ConfigError: If the host has no such layer.
        """
        if not 0 <= site.layer < self.n_layers:
            raise ConfigError(
                f"layer {site.layer} is out of range: this host has {self.n_layers} layers, counted from 0"
            )
        return self.blocks[site.layer]


def text_config(model: nn.Module) -> Any:
    """The config of the language model itself, below any multi-modal wrapper."""
    config: Any = getattr(model, "config", None)
    if config is None:
        raise UnsupportedHostError(
            f"{type(model).__name__} has no config: a host is a Hugging Face causal language model"
        )
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def find_architecture(model: nn.Module) -> Architecture:
    """Finds the decoder blocks of a host.

    Raises:
        UnsupportedHostError: If the host is an encoder-decoder, keeps no cache of keys and values, puts
            learned tokens before the text, or no single stack of blocks fits.
    """
    config = text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedHostError(
            f"{type(model).__name__} is an encoder-decoder; edits need a decoder-only language model"
        )
    adapters = getattr(model, "peft_config", None) or {}
    if any(adapter.is_prompt_learning for adapter in adapters.values()):
        raise UnsupportedHostError(
            f"{type(model).__name__} puts learned tokens before each text, and edits would miss theirs: "
            "use an adapter on the weights, such as LoRA"
        )
    n_layers, d_model = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if n_layers is None or d_model is None:
        raise UnsupportedHostError(
            f"{type(model).__name__} has no config that tells its layers and width: a host is a Hugging Face "
            "causal language model"
        )
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    depth = min((name.count(".") for name, _ in lists), default=0)
    outermost = [(name, module) for name, module in lists if name.count(".") == depth]
    if len(outermost) != 1:
        found = ", ".join(name for name, _ in outermost) or "none"
        raise UnsupportedHostError(
            f"cannot tell the decoder blocks of {type(model).__name__}: expected one list of "
            f"{n_layers} modules, found {found}"
        )
    name, blocks = outermost[0]
    stack = model.get_submodule(name.rpartition(".")[0])
    if "past_key_values" not in inspect.signature(stack.forward).parameters:
        raise UnsupportedHostError(
            f"{type(model).__name__} keeps no cache of keys and values, so that an edit could not count the "
            "tokens seen before: only attention hosts are supported"
        )
    return Architecture(stack, blocks, d_model, getattr(config, "max_position_embeddings", None))


def default_layers(n_layers: int) -> tuple[int, ...]:
    """The paper's layers 9, 18, 24 and 28 of 32, moved to a host of another depth."""
    return scaled_layers((9, 18, 24, 28), of=32, n_layers=n_layers)


def edited_sites(
    architecture: Architecture, layers: Sequence[int] | None, deepest: int | None = None
) -> tuple[Site, ...]:
    """Where an intervention acts: the layers that are named, or the paper's.

    Args:
        architecture: The host's.
        layers: Decoder blocks, 0-based; None for the paper's, moved to the depth.
        deepest: Of the paper's, keep this many of the deepest; None for all.

    Raises:
        ConfigError: If the host has no such layer.
    """
    if layers is None:
        layers = default_layers(architecture.n_layers)[-deepest if deepest else 0 :]
    sites = tuple(Site(layer) for layer in sorted(layers))
    for site in sites:
        architecture.block(site)
    return sites


def scaled_layers(layers: Iterable[int] | Iterable[float], *, of: int, n_layers: int) -> tuple[int, ...]:
    """Layers of a host of `of` layers, moved to one of `n_layers`; of one layer, shares of the depth.

    `min(n - 1, floor(k n / of + 0.5))` for each of them, in order, duplicates dropped.
    """
    return tuple(sorted({min(n_layers - 1, int(k * n_layers / of + 0.5)) for k in layers}))


def intervention_dtype(model: nn.Module) -> torch.dtype:
    """Precision of everything an intervention computes: float32, or float64 on a float64 host."""
    dtypes = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def input_device(model: nn.Module) -> torch.device:
    """Where a host takes token ids: where its embedding runs, though the weights may be kept elsewhere."""
    host: Any = model
    return _runs_on(host.get_input_embeddings()) or torch.device(host.device)


def site_device(model: nn.Module, site: Site) -> torch.device:
    """Where a site's states live: where its block runs, though the weights may be kept elsewhere."""
    return _runs_on(find_architecture(model).block(site)) or input_device(model)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Which adapters of a PEFT host act, how strongly, and whether they are off: no parameter says it."""
    tuned: list[Any] = [module for module in model.modules() if hasattr(module, "merged_adapters")]
    return tuple(
        sorted(
            {
                f"{sorted(one.active_adapters)}, disabled: {bool(one.disable_adapters)}, "
                f"scaling: {sorted(getattr(one, 'scaling', {}).items())}"
                for one in tuned
            }
        )
    )


def n_hooks(model: nn.Module) -> int:
    """How many hooks others have hung on a host that may change what it computes.

    Those of transformers only watch; those of edited models act in their own calls alone.
    """
    hung = (
        hook
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in list(hooks.values())
    )
    return sum(
        not str(getattr(hook, "__module__", "")).startswith(("transformers.", "baft.hosts.")) for hook in hung
    )


def accelerate_hooks(module: nn.Module) -> tuple[Any, ...]:
    """What accelerate hung on a module to place or offload its weights; empty without it."""
    hook: Any = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _runs_on(module: nn.Module) -> torch.device | None:
    """Where a module computes; accelerate knows it, where it brings weights there only for the time."""
    for hook in (hook for one in module.modules() for hook in accelerate_hooks(one)):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((p.device for p in module.parameters() if not p.is_meta), None)
