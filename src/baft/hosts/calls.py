"""One call of a host with edits in force: what acts where, and the hooks that do it.

A hook acts only for the call that hung it: a context variable says which that is.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from baft.errors import ConfigError, InputError
from baft.hosts.architecture import Site
from baft.hosts.kernels import plain_linears
from baft.hosts.patches import Patch, Seen
from baft.hosts.positions import Shown, Window
from baft.hosts.prompting import Prompter
from baft.nn.fused import FusedIntervention, is_trained
from baft.nn.interventions import SubspaceIntervention, intervene

Parts = Sequence[SubspaceIntervention]


@dataclass(slots=True)
class Recording:
    """The states that one call edited, or would have edited, at each site.

    Args:
        states: The block's output before the intervention, `[token, d_model]`, rows in batch order.
        masks: Which tokens they are, `[batch, pos]`, one mask for each time the host ran.
    """

    states: dict[Site, list[Float[Tensor, "token d_model"]]] = field(default_factory=dict)
    masks: list[Bool[Tensor, "batch pos"]] = field(default_factory=list)

    def at(self, site: Site) -> Float[Tensor, "token d_model"]:
        """All states of a site, in the order they were seen."""
        return torch.cat(self.states[site])


@dataclass(slots=True)
class Call:
    """One call of the host, or one generation."""

    window: Window
    parts: Mapping[Site, Parts]
    recording: Recording | None
    stack: "Stack | None" = None
    fused: Mapping[Site, FusedIntervention] = field(default_factory=dict)
    patches: Mapping[str, Patch] = field(default_factory=dict)
    shown: Shown | None = None
    prompt: Bool[Tensor, "batch pos"] | None = None
    memo: dict[str, Any] = field(default_factory=dict)


@final
class Acting:
    """All that is in force at one time, and fused forms of it, made where they are first wanted.

    Args:
        parts: Interventions, by site.
        patches: Changed outputs, by the name of the module in the host.
        prompter: What is put into prompts, or None.
        router: What chooses, for every prompt, what acts on it, or None.

    Raises:
        ConfigError: If a prompter or a router is to be in force beside anything else: what a prompter puts in
            the others would not see, and what a router takes for a prompt's own acts alone.
    """

    def __init__(
        self,
        parts: Mapping[Site, Parts],
        patches: Mapping[str, Patch] | None = None,
        prompter: Prompter | None = None,
        router: "Router | None" = None,
    ):
        self.parts: Mapping[Site, Parts] = {site: tuple(there) for site, there in parts.items()}
        self.patches: Mapping[str, Patch] = dict(patches or {})
        self.prompter, self.router = prompter, router
        for name, one, other in (("prompter", prompter, router), ("router", router, prompter)):
            if one is not None and (other or self.patches or any(self.parts.values())):
                raise ConfigError(f"a {name} acts alone: take all else out of force first")

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in force."""
        return not (any(self.parts.values()) or self.patches or self.prompter or self.router)

    @functools.cached_property
    def fused(self) -> Mapping[Site, FusedIntervention]:
        """What acts at each site, but where something is still trained."""
        return {
            site: FusedIntervention(parts)
            for site, parts in self.parts.items()
            if parts and not is_trained(parts)
        }


@dataclass(frozen=True, slots=True)
class Stack:
    """Edits that do not see each other: every row of a batch has a block of its own.

    Args:
        layers: The blocks of all, by site.
        blocks: Which of them edits each row; -1 where none does.
    """

    layers: Mapping[Site, SubspaceIntervention]
    blocks: Int[Tensor, " row"]

    def of_tokens(
        self, site: Site, mask: Bool[Tensor, "batch pos"]
    ) -> tuple[SubspaceIntervention, Int[Tensor, " token"]] | None:
        """What acts on the edited tokens of a site, and which of its blocks on each."""
        if site not in self.layers:
            return None
        if mask.shape[0] % len(self.blocks):
            raise InputError(
                f"the host was shown {mask.shape[0]} rows for {len(self.blocks)} edits: give one row for each"
            )
        blocks = self.blocks.to(mask.device).repeat_interleave(mask.shape[0] // len(self.blocks))
        return self.layers[site], blocks[mask.nonzero()[:, 0]]


@runtime_checkable
class Router(Protocol):
    """Chooses what acts on each prompt, once for the prompt and all that follows it."""

    def __call__(self, prompts: Sequence[tuple[int, ...]]) -> Stack | None:
        """What acts on each row, given its prompt's real tokens; None where nothing acts on any."""


current_call: ContextVar[Call | None] = ContextVar("baft_call", default=None)
# Torch numbers its hooks without a lock: two threads could get one number, and one hook replace the other.
hanging = threading.Lock()


@contextlib.contextmanager
def calling(call: Call | None) -> Iterator[None]:
    """Inside, the hooks of this call act and those of an outer one do not; with None, no call's do.

    So whoever is called in the middle of a generation (a logits processor, a streamer) may ask an edited
    model, inside `disabled()` too, and the edits of that generation keep out of it. The bare host they reach.
    """
    token = current_call.set(call)
    try:
        yield
    finally:
        current_call.reset(token)


def cached_tokens(cache: Any) -> int:
    """How many tokens a cache of the host holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def note_tokens(call: Call) -> Any:
    """A hook before the stack: which of the tokens shown now are edited ones."""

    def hook(_: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any] | None = None) -> None:
        # Another thread may be running the stack just when this hook is taken down: torch then calls it
        # as one that wants no keywords.
        if current_call.get() is not call or arguments is None:
            return
        named = (arguments.get("input_ids"), arguments.get("inputs_embeds"))
        inputs = next(x for x in (*named, *args) if x is not None)
        start = cached_tokens(arguments.get("past_key_values"))
        call.shown = call.window.shown(start, inputs.shape[1], inputs.shape[0])
        if call.patches:
            call.prompt = call.window.prompt_shown(start, inputs.shape[1], inputs.shape[0])
        if call.recording is not None:
            call.recording.masks.append(call.shown.mask)

    return hook


def edit_output(call: Call, site: Site) -> Any:
    """A hook after a block: its output with the interventions of a site."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if current_call.get() is not call:
            return None
        assert call.shown is not None, "the stack ran its blocks without being called itself"
        if not call.shown.any:
            return None
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        whole, mask = call.shown.all and call.recording is None, call.shown.mask.to(hidden.device)
        selected = hidden.flatten(0, 1) if whole else hidden[mask]
        if call.recording is not None:
            call.recording.states.setdefault(site, []).append(selected)
        edited = _edit(call, site, selected, mask)
        if edited is None:
            return None
        hidden = edited.view_as(hidden) if whole else hidden.masked_scatter(mask.unsqueeze(-1), edited)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return hook


def patch_output(call: Call, name: str) -> Any:
    """A hook after a module: its output (of a tuple, the first) under the patch of that name."""
    patch = call.patches[name]

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if current_call.get() is not call:
            return None
        assert call.shown is not None, "the stack ran its blocks without being called itself"
        assert call.prompt is not None, "noted together with what is shown"
        seen = Seen(call.shown.mask, call.prompt, call.memo)
        with plain_linears():  # what a patch multiplies by may be in training
            if not isinstance(output, tuple):
                return patch(module, args[0], output, seen)
            made = patch(module, args[0], output[0], seen)
        return None if made is None else (made, *output[1:])

    return hook


def _edit(
    call: Call, site: Site, states: Float[Tensor, "token d_model"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "token d_model"] | None:
    """The states of the edited tokens as a call edits them at a site, or None where no gate opens."""
    own = call.stack.of_tokens(site, mask) if call.stack else None
    if own is None and site in call.fused:
        found = call.fused[site](states)
        return None if found is None else found[0]
    parts = call.parts.get(site, ())
    if not parts and own is None:
        return None
    edited, is_open = intervene(parts, states, own)
    return edited if bool(is_open.any()) else None
