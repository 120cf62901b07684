"""Early states of a host: what it knows of a prompt some way below its last block.

Of a token they are its embedding and the outputs of four blocks in the lower two thirds, each normalized,
side by side: the lower ones say whom a prompt is about, the upper ones what it asks. They are of the frozen
host, whatever edits are in force, so that what is decided on them is decided once and for good.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from baft.hosts.architecture import Architecture, find_architecture, input_device, scaled_layers
from baft.hosts.calls import calling, hanging
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.hosts.patches import EnoughError

Features = Float[Tensor, "_ n_features"]


def early_layers(n_layers: int) -> tuple[int, ...]:
    """Blocks 4, 9, 14 and 19 of 30, moved to a host of another depth."""
    return scaled_layers((4, 9, 14, 19), of=30, n_layers=n_layers)


def n_features(architecture: Architecture) -> int:
    """How many numbers are read of a token."""
    return (1 + len(early_layers(architecture.n_layers))) * architecture.d_model


@torch.no_grad()
@calling(None)
def early_features(
    host: Host, encoder: Encoder, rows: Sequence[Sequence[int]], places: Sequence[slice]
) -> list[Features]:
    """What is read of some tokens of each row, in float32.

    Args:
        host: The host; it is run no further than the last early block.
        encoder: Its encoder.
        rows: Tokens.
        places: Which of each row's are read.
    """
    batch = encoder.pad(
        [tuple(row) for row in rows],
        [len(row) for row in rows],
        side="right",
        device=input_device(host.model),
    )
    with _received(find_architecture(host.model)) as seen:
        host.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    device = batch.input_ids.device
    found = []
    for row, place in enumerate(places):
        parts = [state[row, place].to(device, torch.float32) for state in seen]
        found.append(torch.cat([layer_norm(part, part.shape[-1:]) for part in parts], -1))
    return found


_reading: ContextVar[object] = ContextVar("baft_reading_early", default=None)


@contextlib.contextmanager
def _received(architecture: Architecture) -> Iterator[list[Float[Tensor, "row pos d_model"]]]:
    """What goes into the first block and comes out of the early ones, in the one run inside."""
    blocks, layers = architecture.blocks, early_layers(architecture.n_layers)
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any] | None = None) -> None:
        # As in `calls.note_tokens`: in another thread, while it is taken down, it may be given no keywords.
        if _reading.get() is seen and named is not None:
            seen.append(args[0] if args else named["hidden_states"])

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if _reading.get() is seen:
            seen.append(output[0] if isinstance(output, tuple) else output)
            if len(seen) > len(layers):
                raise EnoughError

    token, handles = _reading.set(seen), []
    try:
        with hanging:
            handles.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
            handles += [blocks[layer].register_forward_hook(after, prepend=True) for layer in layers]
        with contextlib.suppress(EnoughError):
            yield seen
    finally:
        for handle in handles:
            handle.remove()
        _reading.reset(token)
