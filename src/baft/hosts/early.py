"""Early states of a host: what is known of a prompt before any block that an edit changes.

Of a token they are its embedding and the outputs of two early blocks, each normalized, side by side. They are
of the frozen host, whatever edits are in force, so that what is decided on them is decided once and for good.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from baft.hosts.architecture import Architecture, find_architecture, input_device, scaled_layers
from baft.hosts.calls import hanging
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host

Features = Float[Tensor, "row pos n_features"]


def early_layers(n_layers: int) -> tuple[int, ...]:
    """Blocks 4 and 9 of 30, moved to a host of another depth."""
    return scaled_layers((4, 9), of=30, n_layers=n_layers)


def n_features(architecture: Architecture) -> int:
    """How many numbers are read of a token."""
    return (1 + len(early_layers(architecture.n_layers))) * architecture.d_model


class EarlyStates:
    """Receives the early states of one run of a host, block by block.

    Args:
        architecture: Where its blocks are.
    """

    def __init__(self, architecture: Architecture):
        self._architecture = architecture
        self._layers = early_layers(architecture.n_layers)
        self._seen: dict[int, Float[Tensor, "row pos d_model"]] = {}

    def features(self) -> Features:
        """What was received, in float32."""
        device = self._seen[-1].device
        parts = [self._seen[layer].to(device, torch.float32) for layer in (-1, *self._layers)]
        return torch.cat([layer_norm(part, part.shape[-1:]) for part in parts], -1)

    def hang(self, is_ours: Callable[[], bool]) -> list[Any]:
        """Hangs the hooks that receive them, to be taken down by the caller; the last one ends the run.

        Args:
            is_ours: Whether a call under way is the one that is received.
        """

        def before(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any] | None = None) -> None:
            if is_ours():
                self._seen[-1] = args[0] if args else (named or {})["hidden_states"]

        def after(layer: int) -> Any:
            def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
                if is_ours():
                    self._seen[layer] = output[0] if isinstance(output, tuple) else output
                    if layer == self._layers[-1]:
                        raise _EnoughError

            return hook

        blocks = self._architecture.blocks
        handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
        handles += [blocks[layer].register_forward_hook(after(layer), prepend=True) for layer in self._layers]
        return handles


class _EnoughError(Exception):
    """Ends a run of a host of which nothing more is wanted."""


_reading: ContextVar[object] = ContextVar("baft_reading_early", default=None)


@contextlib.contextmanager
def _received(architecture: Architecture) -> Iterator[EarlyStates]:
    states = EarlyStates(architecture)
    token, handles = _reading.set(states), []
    try:
        with hanging:
            handles = states.hang(lambda: _reading.get() is states)
        with contextlib.suppress(_EnoughError):
            yield states
    finally:
        for handle in handles:
            handle.remove()
        _reading.reset(token)


@torch.no_grad()
def early_features(
    host: Host, encoder: Encoder, rows: Sequence[Sequence[int]]
) -> tuple[Features, Bool[Tensor, "row pos"]]:
    """What is read of every token of some rows, and which of the places are no padding.

    Args:
        host: The host; it is run no further than the last early block.
        encoder: Its encoder.
        rows: Tokens.
    """
    batch = encoder.pad(
        [tuple(row) for row in rows],
        [len(row) for row in rows],
        side="right",
        device=input_device(host.model),
    )
    with _received(find_architecture(host.model)) as states:
        host.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return states.features(), batch.attention_mask.bool()
