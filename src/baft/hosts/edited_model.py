"""A host with edits in force: hooks that act on the right tokens and leave nothing behind.

`EditedModel` never changes the host. For the length of one call or one generation it hangs forward
hooks on the blocks it edits; a hook acts only for the call that hung it (a context variable says which
that is), so threads and several edited models may share one host, and other people's hooks stay.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache

from baft.errors import InputError, UnsupportedHostError
from baft.hosts.architecture import Architecture, Site, find_architecture, text_config
from baft.hosts.calls import (
    Acting,
    Call,
    Parts,
    Recording,
    Router,
    Stack,
    cached_tokens,
    calling,
    edit_output,
    hanging,
    note_tokens,
    patch_output,
)
from baft.hosts.generation import generation_settings, guess_mask, refuse_unsafe_generation
from baft.hosts.patches import Patch
from baft.hosts.positions import PositionSpec, Window
from baft.hosts.prompting import Prompter, generate_prompted, real_tokens, run_prompted
from baft.nn.fused import FusedIntervention
from baft.nn.interventions import SubspaceIntervention

PromptLengths = int | Sequence[int] | Int[Tensor, " batch"]  # real tokens of every row's prompt, or of each

_disabled: ContextVar[tuple["EditedModel", ...]] = ContextVar("baft_disabled", default=())


class EditedModel:
    """A host with interventions in force; callable like the host.

    While disabled, and wherever no gate opens, its logits are bit for bit the host's. Methods that change
    weights or keep memories put `patches` into force, those that edit by text a `prompter`, and those whose
    edits know their scope a `router`.

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
        self._in_force = Acting({})
        self.interventions = interventions or {}
        self._stack: Stack | None = None

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
        found._stack = Stack(dict(layers), blocks)
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
        self._in_force = Acting(interventions, self.patches, self.prompter, self.router)

    @property
    def patches(self) -> Mapping[str, Patch]:
        """What changes the output of single modules, by the module's name in the host; assigned whole."""
        return self._in_force.patches

    @patches.setter
    def patches(self, patches: Mapping[str, Patch]) -> None:
        for name in patches:
            self.host.get_submodule(name)
        self._in_force = Acting(self.interventions, patches, self.prompter, self.router)

    @property
    def prompter(self) -> Prompter | None:
        """What puts text into prompts before the host sees them, or None."""
        return self._in_force.prompter

    @prompter.setter
    def prompter(self, prompter: Prompter | None) -> None:
        self._in_force = Acting(self.interventions, self.patches, prompter, self.router)

    @property
    def router(self) -> Router | None:
        """What chooses the interventions of each prompt, or None."""
        return self._in_force.router

    @router.setter
    def router(self, router: Router | None) -> None:
        self._in_force = Acting(self.interventions, self.patches, self.prompter, router)

    def follow(self, other: "EditedModel") -> None:
        """Puts into force what is in force in another model of the same host, in place of all there is."""
        self.positions, self._in_force = other.positions, other._in_force

    @property
    def is_enabled(self) -> bool:
        """Whether edits are in force here: not inside `disabled()`, and there are any."""
        return not self.is_disabled and (self._stack is not None or not self._in_force.is_empty)

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
        n_prompt_tokens: PromptLengths | None = None,
        recording: Recording | None = None,
        **arguments: Any,
    ) -> Any:
        """Runs the host with the edits in force.

        Args:
            input_ids: Tokens; with a cache, the new ones.
            attention_mask: One at real tokens, over cached and new ones together.
            n_prompt_tokens: Real tokens of each row's prompt, BOS included, or one number for all rows. Left
                out, the prompt's end is unknown and every token but BOS is edited: the worst case for
                locality. What a router chooses for a prompt goes on to act on what follows in its cache,
                whose rows must stay in their order.
            recording: Receives the states at the edited tokens.
            arguments: Passed to the host.

        Returns:
            The host's own output object.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **arguments}
        return self.run(self.host, given, n_prompt_tokens, recording)

    @calling(None)
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
        in_force = self._in_force
        if in_force.prompter is not None:
            limit = self.architecture.max_positions
            return generate_prompted(host.generate, arguments, settings, in_force.prompter, limit)
        given = (input_ids, mask.bool(), mask.sum(-1))
        if in_force.router is not None:
            stack = in_force.router(real_tokens(input_ids, mask.bool()))
            call = None if stack is None else self._routed(stack, *given)
            with contextlib.nullcontext() if call is None else self._hooks(call):
                output = host.generate(**arguments)
            _note_route(in_force.router, stack, arguments.get("past_key_values"), output)
            return output
        window = self.window(*given)
        call = Call(window, in_force.parts, None, self._stack, in_force.fused, in_force.patches)
        with self._hooks(call):
            return host.generate(**arguments)

    @calling(None)
    def run(
        self,
        run: Any,
        given: dict[str, Any],
        n_prompt_tokens: PromptLengths | None,
        recording: Recording | None = None,
    ) -> Any:
        """As a call of the model, the host being run in a given way.

        Args:
            run: The host, or what runs it.
            given: What that is given, by name.
            n_prompt_tokens: Real tokens of each row's prompt, or one number for all, or None.
            recording: Receives the states at the edited tokens.

        Raises:
            InputError: If the host is shown nothing, or mask or lengths do not fit what it is shown.
        """
        if not self.is_enabled and recording is None:
            return run(**given)
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        shown = ids if ids is not None else given.get("inputs_embeds")
        if shown is None:
            raise InputError("the host was shown nothing: give input_ids")
        total = cached_tokens(given.get("past_key_values")) + shown.shape[1]
        if mask is None:
            real = torch.ones(shown.shape[0], total, dtype=torch.bool, device=shown.device)
        else:
            real = _checked_mask(mask, total).bool()[:, :total]
        lengths = None if n_prompt_tokens is None else _of_each_row(n_prompt_tokens, shown)
        in_force = self._in_force
        if self.is_enabled and in_force.prompter is not None:
            if recording is not None:
                raise InputError("edits that are put into the prompt leave no states to record: ask without")
            limit = self.architecture.max_positions
            return run_prompted(run, given, real, lengths, in_force.prompter, limit)
        if self.is_enabled and in_force.router is not None:
            return self._run_routed(run, given, real, lengths, in_force.router, recording)
        window = self.window(ids, real, lengths)
        if self.is_enabled:
            # With gradients it is training, where parts change at every step.
            fused = {} if torch.is_grad_enabled() else in_force.fused
            call = Call(window, in_force.parts, recording, self._stack, fused, in_force.patches)
        else:
            call = Call(window, dict.fromkeys(in_force.parts, ()), recording)
        with self._hooks(call):
            return run(**given)

    def window(
        self,
        ids: Int[Tensor, "batch pos"] | None,
        real: Bool[Tensor, "known total"],
        n_prompt_tokens: Int[Tensor, " batch"] | None,
        acting: Bool[Tensor, " row"] | None = None,
    ) -> Window:
        """Which tokens a call edits.

        Args:
            ids: The tokens it shows.
            real: Which tokens are no padding, those of a cache included.
            n_prompt_tokens: Real tokens of each row's prompt, or None where nobody knows.
            acting: In which rows anything is edited; None for all.
        """
        bos = getattr(text_config(self.host), "bos_token_id", None)
        starts_with_bos = torch.zeros(real.shape[0], dtype=torch.bool, device=real.device)
        if ids is not None and bos is not None:
            n_cached = real.shape[1] - ids.shape[1]
            first = real.int().argmax(-1) - n_cached  # below zero where the cache holds it
            begins = ids.to(real.device).gather(-1, first.clamp(min=0).unsqueeze(-1)).squeeze(-1) == bos
            starts_with_bos = begins & (first >= 0)
        return Window(
            self.positions,
            real,
            n_prompt_tokens=n_prompt_tokens,
            starts_with_bos=starts_with_bos,
            acting=acting,
        )

    def _run_routed(
        self,
        run: Any,
        given: dict[str, Any],
        real: Bool[Tensor, "batch total"],
        n_prompt_tokens: Int[Tensor, " batch"] | None,
        router: Router,
        recording: Recording | None,
    ) -> Any:
        """Runs the host with what a router chooses for each prompt, or chose when the cache was begun."""
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        route = getattr(cache, _ROUTE, None) if cached_tokens(cache) else None
        stack = None if route is None else route.stack
        if route is None or route.router is not router:
            if ids is None:
                raise InputError("edits that know their scope read the prompt's tokens: give input_ids")
            stack = router(real_tokens(ids, _prompt_part(real, ids.shape[1], n_prompt_tokens)))
        if stack is None and recording is None:
            output = run(**given)
        else:
            call = self._routed(stack, ids, real, n_prompt_tokens, recording)
            with self._hooks(call):
                output = run(**given)
        _note_route(router, stack, cache, output)
        return output

    def _routed(
        self,
        stack: Stack | None,
        ids: Int[Tensor, "batch pos"] | None,
        real: Bool[Tensor, "known total"],
        n_prompt_tokens: Int[Tensor, " batch"] | None,
        recording: Recording | None = None,
    ) -> Call:
        """A call in which a stack acts on the rows that have a block, and nothing on the others."""
        if stack is None:
            return Call(self.window(ids, real, n_prompt_tokens), {}, recording)
        acting = (stack.blocks >= 0).to(real.device)
        if len(real) % len(acting):
            raise InputError(f"the host was shown {len(real)} rows for {len(acting)} prompts")
        acting = acting.repeat_interleave(len(real) // len(acting))
        window = self.window(ids, real, n_prompt_tokens, acting)
        parts: dict[Site, Parts] = {site: (part,) for site, part in stack.layers.items()}
        if any(part.n_blocks > 1 for (part,) in parts.values()) or torch.is_grad_enabled():
            return Call(window, {}, recording, stack)
        fused = {site: FusedIntervention(there) for site, there in parts.items()}
        return Call(window, parts, recording, None, fused)

    @contextlib.contextmanager
    def _hooks(self, call: Call) -> Iterator[None]:
        """Hangs the hooks of one call, and takes down exactly those."""
        handles: list[Any] = []
        try:
            stack = self.architecture.stack
            with hanging:
                note = note_tokens(call)
                handles.append(stack.register_forward_pre_hook(note, with_kwargs=True, prepend=True))
                for site in dict.fromkeys([*call.parts, *(call.stack.layers if call.stack else ())]):
                    block = self.architecture.block(site)
                    # First in line: whoever watches the block's output sees the edited one.
                    handles.append(block.register_forward_hook(edit_output(call, site), prepend=True))
                for name in call.patches:
                    module = self.host.get_submodule(name)
                    handles.append(module.register_forward_hook(patch_output(call, name), prepend=True))
            with calling(call):
                yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True, slots=True)
class _Route:
    """What acts on the rows of a cache; what follows in the cache keeps to it.

    It hangs on the cache, and goes along when that is copied.
    """

    router: Router
    stack: Stack | None

    def __deepcopy__(self, _: Any) -> "_Route":
        return self


_ROUTE = "_baft_route"


def _note_route(router: Router, stack: Stack | None, given: Any, output: Any) -> None:
    """Notes it in the cache that a call was given, and in the one that it gives back."""
    for cache in (given, getattr(output, "past_key_values", None)):
        if isinstance(cache, Cache):
            setattr(cache, _ROUTE, _Route(router, stack))


def _prompt_part(
    real: Bool[Tensor, "batch total"], n_shown: int, n_prompt_tokens: Int[Tensor, " batch"] | None
) -> Bool[Tensor, "batch pos"]:
    """Which of the tokens shown belong to a prompt; all real ones where that is unknown, or none does."""
    shown = real[:, real.shape[1] - n_shown :]
    if n_prompt_tokens is None:
        return shown
    rank = real.cumsum(-1)[:, real.shape[1] - n_shown :]
    inside = shown & (rank <= n_prompt_tokens.to(real.device).unsqueeze(-1))
    return torch.where(inside.any(-1, keepdim=True), inside, shown)


def _of_each_row(given: PromptLengths, shown: Tensor) -> Int[Tensor, " batch"]:
    """The real tokens of each row's prompt."""
    try:
        lengths = torch.as_tensor(given, device=shown.device)
        if lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise ValueError(f"numbers of {lengths.dtype}")
        if lengths.ndim > 0 and lengths.shape != shown.shape[:1]:
            raise ValueError(f"a shape of {list(lengths.shape)}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"n_prompt_tokens was {given!r} for {len(shown)} rows: give one whole number, or one for each row"
        ) from error
    return lengths.expand(len(shown))


def _checked_mask(mask: Tensor, n_tokens: int = 0) -> Tensor:
    if mask.ndim != 2:
        raise InputError(f"edits need a mask of one number a token, got {mask.ndim} axes: give [batch, pos]")
    if mask.shape[1] < n_tokens:
        raise InputError(
            f"the mask covers {mask.shape[1]} tokens; the cache and the new ones are {n_tokens}: cover all"
        )
    return mask
