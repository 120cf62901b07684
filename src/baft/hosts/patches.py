"""Edits of what a module of the host puts out: changed weights, memories, routed copies.

Interventions edit the hidden state between blocks. Methods that change weights or keep memories work inside a
block; a `Patch` takes the input and the output of one module and gives another output. The host's own
weights are never touched, so that taking a patch away is exact, and the host stays free for others.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from baft.errors import UnsupportedHostError
from baft.hosts.architecture import Site, find_architecture, text_config

Part = Tensor | tuple[Tensor, Tensor]  # a matrix, whole or as two factors


class EnoughError(Exception):
    """Ends a run of a host of which nothing more is wanted: who reads raises it, who runs it catches it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The tokens that a patch is shown.

    Args:
        edited: Those that the positions of the edited model name, `[batch, pos]`.
        prompt: Those of the prompts, without padding; all real ones where the prompts' ends are unknown.
        memo: Where patches keep what they or others need until the end of the call, or of the generation.
    """

    edited: Bool[Tensor, "batch pos"]
    prompt: Bool[Tensor, "batch pos"]
    memo: dict[str, Any]


@runtime_checkable
class Patch(Protocol):
    """Changes the output of one module."""

    def __call__(
        self,
        module: nn.Module,
        inputs: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        seen: Seen,
    ) -> Float[Tensor, "*batch d_out"] | None:
        """The module's output as edited, or None to leave it, bit for bit."""


def by_row(x: Float[Tensor, "*batch width"], seen: Seen) -> Float[Tensor, "batch pos width"]:
    """What a module takes or gives, by row and token; some hosts (OPT) show their modules one long row."""
    return x.reshape(*seen.edited.shape, x.shape[-1])


class DeltaPatch:
    """What a linear module would put out if a matrix were added to its weight.

    Args:
        parts: The matrix, as a sum: whole ones `[d_out, d_in]`, or pairs `(up, down)` of `[d_out, rank]` and
            `[rank, d_in]`. While parts are trained they are used as they are; else they are put together
            once: into one pair where that is cheaper, or into the matrix.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = tuple(parts)

    def __call__(
        self,
        module: nn.Module,
        inputs: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        seen: Seen,
    ) -> Float[Tensor, "*batch d_out"] | None:
        """The output with the matrix added to the weight."""
        if not self.parts:
            return None
        x = inputs.to(self._dtype)
        more = [_applied(part, x) for part in self._in_use()]
        return output + sum(more[1:], more[0]).to(output)

    @torch.no_grad()
    def whole(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix."""
        pairs = self._one_pair()
        found = [part for part in self.parts if isinstance(part, Tensor)]
        if pairs is not None:
            found.append(pairs[0] @ pairs[1])
        return sum(found[1:], found[0])

    @property
    def _dtype(self) -> torch.dtype:
        part = self.parts[0]
        return (part if isinstance(part, Tensor) else part[0]).dtype

    def _in_use(self) -> Sequence[Part]:
        numbers = (one for part in self.parts for one in (part if isinstance(part, tuple) else (part,)))
        is_trained = torch.is_grad_enabled() and any(one.requires_grad for one in numbers)
        return self.parts if is_trained else (self._together,)

    @functools.cached_property
    def _together(self) -> Part:
        pair = self._one_pair()
        if pair is not None and all(isinstance(part, tuple) for part in self.parts):
            up, down = pair
            if up.numel() + down.numel() < len(up) * down.shape[1]:
                return pair
        return self.whole()

    @torch.no_grad()
    def _one_pair(self) -> tuple[Tensor, Tensor] | None:
        """All pairs as one, or None if there are none."""
        pairs = [part for part in self.parts if isinstance(part, tuple)]
        if not pairs:
            return None
        ups, downs = zip(*pairs, strict=True)
        return torch.cat(ups, dim=1), torch.cat(downs, dim=0)


def _applied(part: Part, x: Float[Tensor, "*batch d_in"]) -> Tensor:
    if isinstance(part, Tensor):
        return F.linear(x, part.to(x.device))
    up, down = part
    return F.linear(F.linear(x, down.to(x.device)), up.to(x.device))


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """`(d_out, d_in)` of a linear module.

    Raises:
        UnsupportedHostError: If it is none.
    """
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    d_out, d_in = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if d_out is None or d_in is None:
        raise UnsupportedHostError(
            f"a linear module was expected, got {type(module).__name__}: this method edits weights of those"
        )
    return int(d_out), int(d_in)


def weight_of(module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """The weight of a plain linear module, outputs first; a view of the host's own.

    Raises:
        UnsupportedHostError: If it is none, or its weight is not in floating point (quantized).
    """
    shape = weight_shape(module)
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise UnsupportedHostError(
            f"the weight of {type(module).__name__} cannot be read as numbers: this method needs a host "
            "that is not quantized"
        )
    return weight.T if isinstance(module, Conv1D) else weight.view(shape)


def down_projection(model: nn.Module, layer: int) -> str:
    """The name of the module by which a block's feed-forward part writes into the hidden state.

    It is found by shape: the last linear module of the block that takes more than it gives, and gives a
    hidden state.

    Raises:
        ConfigError: If the host has no such layer.
        UnsupportedHostError: If the block has no such module (a mixture of experts), or several.
    """
    d_model, width = find_architecture(model).d_model, _feed_forward_width(model)
    found = _linear_modules(
        model,
        layer,
        lambda d_out, d_in: d_out == d_model and (d_in == width if width else d_in > d_out),
    )
    if len(found) != 1:
        raise UnsupportedHostError(
            f"layer {layer} of this host has {len(found)} down-projections of a feed-forward part, and "
            "one was expected: this method edits that one"
        )
    return found[0]


def up_projections(model: nn.Module, layer: int) -> tuple[str, ...]:
    """The names of the modules by which a block's feed-forward part reads the hidden state.

    They are found by shape: the gate and the up-projection, in this order, or the one that is both, or the
    only one of hosts without a gate.

    Raises:
        ConfigError: If the host has no such layer.
        UnsupportedHostError: If the block has no such module, or more than two (a mixture of experts).
    """
    d_model, width = find_architecture(model).d_model, _feed_forward_width(model)
    if width is None:
        found = _linear_modules(model, layer, lambda d_out, d_in: d_in == d_model and d_out > 3 * d_in)
    else:
        found = _linear_modules(model, layer, lambda d_out, d_in: (d_out, d_in) == (width, d_model))
        if not found:  # gate and up-projection are one
            found = _linear_modules(model, layer, lambda d_out, d_in: (d_out, d_in) == (2 * width, d_model))
    if len(found) not in (1, 2):
        raise UnsupportedHostError(
            f"layer {layer} of this host has {len(found)} modules that widen the hidden state for a "
            "feed-forward part, and one or two were expected: this method edits those"
        )
    return found


def _feed_forward_width(model: nn.Module) -> int | None:
    """Width of the feed-forward part, where the config tells it."""
    config = text_config(model)
    return getattr(config, "ffn_dim", None) or getattr(config, "intermediate_size", None)


def _linear_modules(model: nn.Module, layer: int, fits: Callable[[int, int], bool]) -> tuple[str, ...]:
    """The names of a block's linear modules whose `(d_out, d_in)` fit, in their order."""
    block = find_architecture(model).block(Site(layer))
    names = {id(module): name for name, module in model.named_modules()}
    found: list[nn.Module] = []
    for module in block.modules():
        try:
            shape = weight_shape(module)
        except UnsupportedHostError:
            continue
        if fits(*shape) and not _is_inside(module, found):
            found.append(module)
    return tuple(names[id(module)] for module in found)


def up_projection(model: nn.Module, layer: int) -> str:
    """The name of the module by which a block's feed-forward part reads the hidden state.

    Where there are two, one of which gates the other, it is the other.

    Raises:
        ConfigError: If the host has no such layer.
        UnsupportedHostError: If the block has no such module (a mixture of experts).
    """
    down_projection(model, layer)  # one part and no more, which this one belongs to
    return up_projections(model, layer)[-1]


def _is_inside(module: nn.Module, others: Sequence[nn.Module]) -> bool:
    """Whether a module is a part of one found already, such as the linear layer inside an adapter's."""
    return any(module is inner for one in others for inner in one.modules() if inner is not one)
