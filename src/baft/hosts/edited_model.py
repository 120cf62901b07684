"""A host with edits in force: hooks that act on the right tokens and leave nothing behind.

`EditedModel` never changes the host. For the length of one call or one generation it hangs forward
hooks on the blocks it edits; a hook acts only for the call that hung it (a context variable says which
that is), so threads and several edited models may share one host, and other people's hooks stay.
"""

import contextlib
import copy
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from baft.errors import InputError, UnsupportedHostError
from baft.hosts.architecture import Architecture, Site, find_architecture, text_config
from baft.hosts.generation import generation_settings, guess_mask, refuse_unsafe_generation
from baft.hosts.positions import PositionSpec, Shown, Window
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
class _Call:
    """One call of the host, or one generation."""

    window: Window
    parts: Mapping[Site, Parts]
    recording: Recording | None
    stack: "_Stack | None" = None
    fused: Mapping[Site, FusedIntervention] = field(default_factory=dict)
    shown: Shown | None = None


@final
class _InForce:
    """The interventions of one assignment, and their fused forms, made where they are first wanted."""

    def __init__(self, parts: Mapping[Site, Parts]):
        self.parts: Mapping[Site, Parts] = {site: tuple(there) for site, there in parts.items()}

    @functools.cached_property
    def fused(self) -> Mapping[Site, FusedIntervention]:
        """What acts at each site, but where something is still trained."""
        return {
            site: FusedIntervention(parts)
            for site, parts in self.parts.items()
            if parts and not is_trained(parts)
        }


@dataclass(frozen=True, slots=True)
class _Stack:
    """Edits that do not see each other: every row of a batch has a block of its own.

    Args:
        layers: The blocks of all, by site.
        blocks: Which of them edits each row.
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


_current: ContextVar[_Call | None] = ContextVar("baft_call", default=None)
_disabled: ContextVar[tuple["EditedModel", ...]] = ContextVar("baft_disabled", default=())
# Torch numbers its hooks without a lock: two threads could get one number, and one hook replace the other.
hanging = threading.Lock()


class EditedModel:
    """A host with interventions in force; callable like the host.

    While disabled, and wherever no gate opens, its logits are bit for bit the host's.

    Args:
        host: A decoder-only causal language model, or a PEFT model around one; never changed.
        interventions: What acts at each site; all parts of a site read the same state, and add up.
        positions: Which tokens are edited.

    Raises:
        UnsupportedHostError: If the host's decoder blocks cannot be found, or it is itself a live view.
        ConfigError: If a site names a layer that the host does not have.
    """

    def __init__(
        self,
        host: nn.Module,
        interventions: Mapping[Site, Parts] | None = None,
        positions: PositionSpec | None = None,
    ):
        if getattr(type(host), "baft_edited_model", None) is not None:
            raise UnsupportedHostError(
                "this host is the live view of an edited model, whose edits would hide these: give the host "
                "itself, and all interventions to one EditedModel"
            )
        self.host = host
        self.positions = positions or PositionSpec()
        self.architecture: Architecture = find_architecture(host)
        self.interventions = interventions or {}
        self._stack: _Stack | None = None

    def apart(
        self, layers: Mapping[Site, SubspaceIntervention], blocks: Int[Tensor, " row"]
    ) -> "EditedModel":
        """The same with one more block of bases for every row of a batch, which edits that row alone.

        So several models that differ in an edit each are asked in one batch.

        Args:
            layers: The blocks, by site.
            blocks: Which of them edits each row; calls must have that many rows (or beams of them).
        """
        for site in layers:
            self.architecture.block(site)
        found = copy.copy(self)
        found._stack = _Stack(dict(layers), blocks)
        return found

    @property
    def is_disabled(self) -> bool:
        """Whether this is inside `disabled()`."""
        return self in _disabled.get()

    @property
    def interventions(self) -> Mapping[Site, Parts]:
        """What is in force at each site; assigning swaps it whole, calls under way keep the old.

        Parts that take no gradient must not change afterwards.
        """
        return self._in_force.parts

    @interventions.setter
    def interventions(self, interventions: Mapping[Site, Parts]) -> None:
        for site in interventions:
            self.architecture.block(site)
        self._in_force = _InForce(interventions)

    @property
    def is_enabled(self) -> bool:
        """Whether edits are in force here: not inside `disabled()`, and there are any."""
        return not self.is_disabled and (self._stack is not None or any(self.interventions.values()))

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Takes the edits out of force inside the `with` block, in this thread (or task) only."""
        token = _disabled.set((*_disabled.get(), self))
        try:
            yield
        finally:
            _disabled.reset(token)

    def __call__(
        self,
        input_ids: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch total"] | None = None,
        *,
        n_prompt_tokens: Int[Tensor, " batch"] | None = None,
        recording: Recording | None = None,
        **arguments: Any,
    ) -> Any:
        """Runs the host with the edits in force.

        Args:
            input_ids: Tokens; with a cache, the new ones.
            attention_mask: One at real tokens, over cached and new ones together.
            n_prompt_tokens: Real tokens of each row's prompt, BOS included. Left out, the prompt's end
                is unknown and every token but BOS is edited: the worst case for locality.
            recording: Receives the states at the edited tokens.
            arguments: Passed to the host.

        Returns:
            The host's own output object.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **arguments}
        return self.run(self.host, given, n_prompt_tokens, recording)

    def generate(self, input_ids: Int[Tensor, "batch pos"] | None = None, **arguments: Any) -> Any:
        """Runs the host's own `generate` with the edits in force; takes and returns what that does.

        A conversation may go on from the `past_key_values` of an earlier call: what the cache holds stays as
        it was edited then, and all of `input_ids` is the new prompt, earlier replies included.

        Raises:
            InputError: If rows are padded on the right, or there are no token ids.
            GenerationError: For ways of generating that show the host tokens out of order or guess
                them with another model: assisted decoding, prompt lookup, continuous batching, custom code.
        """
        host: Any = self.host
        if not self.is_enabled:
            return host.generate(**arguments, input_ids=input_ids)
        if input_ids is None or input_ids.shape[-1] == 0:
            raise InputError(
                "generate was given no tokens: give input_ids, [batch, pos], a prompt in each row"
            )
        settings = generation_settings(host, arguments)
        refuse_unsafe_generation(settings)
        mask = arguments.get("attention_mask")
        mask = guess_mask(input_ids, settings) if mask is None else _checked_mask(mask)
        if not bool(mask[:, -1].all()):
            raise InputError("generate goes on from the last token: pad on the left (padding_side='left')")
        arguments = {**arguments, "input_ids": input_ids, "attention_mask": mask}
        # A compiled step would have to be compiled anew for every token: the window moves.
        arguments.setdefault("disable_compile", True)
        window = self.window(input_ids, mask.bool(), mask.sum(-1))
        in_force = self._in_force
        with self._hooks(_Call(window, in_force.parts, None, self._stack, in_force.fused)):
            return host.generate(**arguments)

    def run(
        self,
        run: Any,
        given: dict[str, Any],
        n_prompt_tokens: Int[Tensor, " batch"] | None,
        recording: Recording | None = None,
    ) -> Any:
        """As a call of the model, the host being run in a given way.

        Args:
            run: The host, or what runs it.
            given: What that is given, by name.
            n_prompt_tokens: Real tokens of each row's prompt, or None.
            recording: Receives the states at the edited tokens.
        """
        if not self.is_enabled and recording is None:
            return run(**given)
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        shown = ids if ids is not None else given.get("inputs_embeds")
        if shown is None:
            raise InputError("the host was shown nothing: give input_ids")
        total = _cached_tokens(given.get("past_key_values")) + shown.shape[1]
        if mask is None:
            real = torch.ones(shown.shape[0], total, dtype=torch.bool, device=shown.device)
        else:
            real = _checked_mask(mask, total).bool()[:, :total]
        window = self.window(ids, real, n_prompt_tokens)
        in_force = self._in_force
        if self.is_enabled:
            # With gradients it is training, where parts change at every step.
            fused = {} if torch.is_grad_enabled() else in_force.fused
            call = _Call(window, in_force.parts, recording, self._stack, fused)
        else:
            call = _Call(window, dict.fromkeys(in_force.parts, ()), recording)
        with self._hooks(call):
            return run(**given)

    def window(
        self,
        ids: Int[Tensor, "batch pos"] | None,
        real: Bool[Tensor, "known total"],
        n_prompt_tokens: Int[Tensor, " batch"] | None,
    ) -> Window:
        """Which tokens a call edits.

        Args:
            ids: The tokens it shows.
            real: Which tokens are no padding, those of a cache included.
            n_prompt_tokens: Real tokens of each row's prompt, or None where nobody knows.
        """
        bos = getattr(text_config(self.host), "bos_token_id", None)
        starts_with_bos = torch.zeros(real.shape[0], dtype=torch.bool, device=real.device)
        if ids is not None and bos is not None:
            n_cached = real.shape[1] - ids.shape[1]
            first = real.int().argmax(-1) - n_cached  # below zero where the cache holds it
            begins = ids.to(real.device).gather(-1, first.clamp(min=0).unsqueeze(-1)).squeeze(-1) == bos
            starts_with_bos = begins & (first >= 0)
        return Window(self.positions, real, n_prompt_tokens=n_prompt_tokens, starts_with_bos=starts_with_bos)

    @contextlib.contextmanager
    def _hooks(self, call: _Call) -> Iterator[None]:
        """Hangs the hooks of one call, and takes down exactly those."""
        handles: list[Any] = []
        token = _current.set(call)
        try:
            stack = self.architecture.stack
            with hanging:
                note = _note_tokens(call)
                handles.append(stack.register_forward_pre_hook(note, with_kwargs=True, prepend=True))
                for site in dict.fromkeys([*call.parts, *(call.stack.layers if call.stack else ())]):
                    block = self.architecture.block(site)
                    # First in line: whoever watches the block's output sees the edited one.
                    handles.append(block.register_forward_hook(_edit_output(call, site), prepend=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            _current.reset(token)


def _checked_mask(mask: Tensor, n_tokens: int = 0) -> Tensor:
    if mask.ndim != 2:
        raise InputError(f"edits need a mask of one number a token, got {mask.ndim} axes: give [batch, pos]")
    if mask.shape[1] < n_tokens:
        raise InputError(
            f"the mask covers {mask.shape[1]} tokens; the cache and the new ones are {n_tokens}: cover all"
        )
    return mask


def _cached_tokens(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _note_tokens(call: _Call) -> Any:
    """A hook before the stack: which of the tokens shown now are edited ones."""

    def hook(_: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any] | None = None) -> None:
        # Another thread may be running the stack just when this hook is taken down: torch then calls it
        # as one that wants no keywords.
        if _current.get() is not call or arguments is None:
            return
        named = (arguments.get("input_ids"), arguments.get("inputs_embeds"))
        inputs = next(x for x in (*named, *args) if x is not None)
        start = _cached_tokens(arguments.get("past_key_values"))
        call.shown = call.window.shown(start, inputs.shape[1], inputs.shape[0])
        if call.recording is not None:
            call.recording.masks.append(call.shown.mask)

    return hook


def _edit_output(call: _Call, site: Site) -> Any:
    """A hook after a block: its output with the interventions of a site."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if _current.get() is not call:
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


def _edit(
    call: _Call, site: Site, states: Float[Tensor, "token d_model"], mask: Bool[Tensor, "batch pos"]
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
