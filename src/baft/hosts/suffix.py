"""The cheap pass: only what an edit can change is computed anew, and nothing is approximated.

By causality, edits change no state left of the first edited token, and none below the first edited layer.
So the host runs once over the whole of each text. From that pass stay the keys and values of the tokens
before the edited ones (the prefix), and the output of the first edited block at the others (the trunk). A
step then runs the blocks above that one, over the edited tokens alone, and the head only where a target
token is predicted (METHOD.md, section 4).

Where modules inside a block are patched, all this begins at the block below, and at the first token of a
prompt on which a patch may act.

No architecture is written down here: a step calls the host's own forward on a shallow copy of it, in which
the blocks up to the first edited one hand the trunk through, and the cache hands out the prefix.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from baft.errors import UnsupportedHostError
from baft.hosts.architecture import Architecture, Site, find_architecture, input_device
from baft.hosts.calls import Parts, Recording, hanging
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import EncodedEdit, Encoder
from baft.hosts.kernels import fast_linears
from baft.hosts.models import Host
from baft.hosts.passes import FullPass, Own, Pass, Predictions, Targets, why_full, with_parts
from baft.hosts.patches import Patch
from baft.hosts.positions import PositionSpec

KeysValues = tuple[Float[Tensor, "row head held d_key"], Float[Tensor, "row head held d_value"]]

_ROWS_AT_ONCE = 32  # of the first pass, in order of their length, so that little of it is padding
LEAST_SHARED = 8  # tokens that texts must begin with alike, as chats do, for these to be run but once


class SuffixPass:
    """Runs the host over the edited tokens alone, from the first edited block on.

    Args:
        host: The host.
        encoder: Its encoder.
        positions: Which tokens are edited.
        texts: Prompts with their targets; more than one row where an edit has several renderings.
        sites: Where states are wanted; the first must be the lowest layer that is edited, or the one below
            the lowest that has a module patched.
        reach: How many of a prompt's last tokens patches may act on; those that are edited if left out.
        patches: What is in force already, below the first site too; what acts on every token alike.

    Raises:
        UnsupportedHostError: If the host does not keep keys and values as this pass needs them.

    Attributes:
        targets: The target tokens, `[token]`.
        rows: The text of each, `[token]`.
        edited: The model that it runs, above the first site; what is patched in it is in force.
        n_left_out: How many tokens at each text's beginning a step does not run again, `[row]`.
        state_rows: The text of each edited token, `[state]`.
        state_offsets: Its place in the text, counted from the end of the prompt: the last prompt token is -1.
    """

    def __init__(
        self,
        host: Host,
        encoder: Encoder,
        positions: PositionSpec,
        texts: Sequence[EncodedEdit],
        sites: Sequence[Site],
        *,
        reach: int | None = None,
        patches: Mapping[str, Patch] | None = None,
    ):
        self.sites = tuple(sites)
        architecture = find_architecture(host.model)
        self._trunk_of = _TrunkOf(host.model, architecture, min(sites))
        self.edited = EditedModel(self._trunk_of.view, {}, positions)
        whole = EditedModel(host.model, {}, positions)
        self.edited.patches = whole.patches = patches or {}
        self._takes_positions = "position_ids" in inspect.signature(_inner(host.model).forward).parameters
        device = input_device(host.model)
        n_prompt = torch.tensor([len(text.prompt_ids) for text in texts], device=device)
        # The last prompt token too, edited or not: the first target token is predicted there.
        n_last = max(positions.last_prompt if reach is None else reach, 1)
        n_prefix = (n_prompt - n_last).clamp(min=0)
        rests = [
            (*text.prompt_ids[n:], *text.target_ids[:-1])
            for text, n in zip(texts, n_prefix.tolist(), strict=True)
        ]
        rest = encoder.pad(rests, n_prompt.tolist(), side="right", device=device)
        self._n_prompt, self.n_left_out = n_prompt, n_prefix
        self._ids, self._real = rest.input_ids, rest.attention_mask.bool()
        self._where = Targets.of(texts, device)
        self._prefix, states, self._trunk_of.given.in_tuples = _first_pass(
            whole, encoder, texts, n_prefix, self._real, self.sites
        )
        self._trunk = states[min(sites)]
        self._lay_out()
        edited = self._edited_tokens()
        self._states = {site: found[edited.to(found.device)] for site, found in states.items()}

    def __call__(self, parts: Mapping[Site, Parts], own: Own | None = None) -> Predictions:
        """The predictions with the given interventions in force, and those that act on single rows."""
        edited, seen = with_parts(self.edited, self.sites, parts, own), Recording()
        arguments = {"position_ids": self._positions} if self._takes_positions else {}
        self._trunk_of.set(self._trunk, (self.rows, self._columns))
        with fast_linears():
            output = edited(
                self._ids,
                self._mask.long(),
                n_prompt_tokens=self._n_prompt,
                recording=seen,
                past_key_values=_frozen(self._prefix, int(self.n_left_out.max())),
                use_cache=True,
                **arguments,
            )
        # Of a host on several devices: the copy is without the hook of accelerate that would bring them here.
        logits = output.logits.to(self.targets.device)
        logits = logits.squeeze(0) if self._trunk_of.selects else logits[self.rows, self._columns]
        return Predictions(logits, {site: seen.at(site) for site in self.sites}, self.state_rows)

    def states(self) -> Mapping[Site, Float[Tensor, "state d_model"]]:
        """States at the edited tokens under the patches that were given, and no other edit."""
        return self._states

    def select(self, rows: Int[Tensor, " kept"]) -> "SuffixPass":
        """The same on some of the texts, without what is then mere padding."""
        kept = copy.copy(self)
        kept._n_prompt, kept.n_left_out = self._n_prompt[rows], self.n_left_out[rows]
        width = int(self._real[rows].sum(-1).max())
        kept._ids, kept._real = self._ids[rows, :width], self._real[rows, :width]
        kept._trunk = self._trunk[rows.to(self._trunk.device), :width]
        kept._where = self._where.select(rows)
        spare = int(self.n_left_out.max()) - int(kept.n_left_out.max())
        kept._prefix = {
            layer: (keys[rows.to(keys.device), :, spare:], values[rows.to(values.device), :, spare:])
            for layer, (keys, values) in self._prefix.items()
        }
        kept._lay_out()
        of_states = torch.cat([(self.state_rows == row).nonzero()[:, 0] for row in rows])
        kept._states = {site: found[of_states.to(found.device)] for site, found in self._states.items()}
        return kept

    def _lay_out(self) -> None:
        """What follows from the texts: masks, positions, and where targets are predicted.

        Prefixes end at one column, padded on the left; the edited tokens begin at the next, padded on the
        right.
        """
        longest = int(self.n_left_out.max())
        columns = torch.arange(longest, device=self._ids.device)
        before = columns >= longest - self.n_left_out.unsqueeze(-1)
        self._mask = torch.cat([before, self._real], -1)
        width = torch.arange(self._ids.shape[1], device=self._ids.device)
        self._positions = self.n_left_out.unsqueeze(-1) + width
        self.rows, self.targets = self._where.rows, self._where.ids
        self._columns = (self._n_prompt - self.n_left_out)[self.rows] - 1 + self._where.offsets
        self.state_rows, place = self._edited_tokens().nonzero().unbind(-1)
        self.state_offsets = place - (self._n_prompt - self.n_left_out)[self.state_rows]

    def _edited_tokens(self) -> Bool[Tensor, "row pos"]:
        window = self.edited.window(self._ids, self._mask, self._n_prompt)
        return window.edited[:, self._mask.shape[1] - self._ids.shape[1] :]

    rows: Int[Tensor, " token"]
    targets: Int[Tensor, " token"]
    state_rows: Int[Tensor, " state"]
    state_offsets: Int[Tensor, " state"]


def sites_below(site: Site) -> tuple[Site, ...]:
    """Where a pass may begin in which a module of a block is patched: the block below, if there is one."""
    return (Site(site.layer - 1),) if site.layer else ()


def quickest_pass(
    host: Host,
    encoder: Encoder,
    positions: PositionSpec,
    texts: Sequence[EncodedEdit],
    sites: Sequence[Site],
    *,
    reach: int | None = None,
    patches: Mapping[str, Patch] | None = None,
) -> tuple[Pass, str | None]:
    """The cheapest pass that a host allows, and why it is the whole one, if it is.

    Args:
        host: The host.
        encoder: Its encoder.
        positions: Which tokens are edited.
        texts: Prompts with their targets.
        sites: Where states are wanted, as in `SuffixPass`; none if the host's first block is patched.
        reach: Where modules are patched, and no states are wanted: how many of a prompt's last tokens
            patches may act on.
        patches: What is in force already; what acts on every token alike.
    """
    why = why_full(host, encoder, positions, texts, sites) if sites else "its first block is edited inside"
    if why is None:
        return SuffixPass(host, encoder, positions, texts, sites, reach=reach, patches=patches), None
    whole = FullPass(host, encoder, positions, texts, sites if reach is None else ())
    whole.edited.patches = patches or {}
    return whole, why


# --- the first pass


def _first_pass(
    edited: EditedModel,
    encoder: Encoder,
    texts: Sequence[EncodedEdit],
    n_prefix: Int[Tensor, " row"],
    real: Bool[Tensor, "row pos"],
    sites: Sequence[Site],
) -> tuple[dict[int, KeysValues], dict[Site, Float[Tensor, "row pos d_model"]], bool]:
    """Keys and values of the prefixes above the first site, states of the other tokens at each site, and
    whether blocks put these out in tuples.
    """
    architecture, device = edited.architecture, input_device(edited.host)
    first, longest, width = min(sites).layer, int(n_prefix.max()), real.shape[1]
    prefix: dict[int, list[KeysValues]] = {}
    states: dict[Site, list[Tensor]] = {}
    inputs = [text.prompt_ids + text.target_ids[:-1] for text in texts]
    chunks = _chunks(texts, [len(ids) for ids in inputs])
    for chunk in chunks:
        batch = encoder.pad(
            [inputs[row] for row in chunk],
            [len(texts[row].prompt_ids) for row in chunk],
            side="right",
            device=device,
        )
        n_here = n_prefix[chunk]
        shared = _shared(batch.input_ids, int(n_here.min()))
        with torch.no_grad(), fast_linears():
            cache, shared = _begun(edited, batch.input_ids[:, :shared])
            with _outputs_of(architecture, sites) as caught:
                edited(
                    batch.input_ids[:, shared:],
                    batch.attention_mask,
                    n_prompt_tokens=batch.n_prompt_tokens,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=_one(batch.input_ids),
                )
        columns = torch.arange(longest, device=n_here.device) - (longest - n_here).unsqueeze(-1)
        for layer in range(first + 1, len(architecture.blocks)):
            kept: Any = cache.layers[layer]
            if kept.keys is None or kept.keys.shape[-2] != batch.input_ids.shape[1]:
                raise UnsupportedHostError(f"layer {layer} of this host keeps no keys of every token")
            pair = (_pick(kept.keys, columns), _pick(kept.values, columns))
            prefix.setdefault(layer, []).append(pair)
        after = n_here.unsqueeze(-1) - shared + torch.arange(width, device=n_here.device)
        for site in sites:
            found, in_tuples = caught[site]
            after = after.clamp(max=found.shape[1] - 1).to(found.device)
            states.setdefault(site, []).append(found.take_along_dim(after.unsqueeze(-1), 1))
    back = torch.tensor([row for chunk in chunks for row in chunk]).argsort()
    whole = {
        layer: (torch.cat([k for k, _ in pairs])[back], torch.cat([v for _, v in pairs])[back])
        for layer, pairs in prefix.items()
    }
    return whole, {site: torch.cat(found)[back] for site, found in states.items()}, in_tuples


def _begun(edited: EditedModel, ids: Int[Tensor, "row pos"]) -> tuple[Cache, int]:
    """A cache that holds what all rows begin with, run once, and how much that is.

    Nothing, if there is nothing or a block keeps no keys.
    """
    blocks = edited.architecture.blocks
    layers: Any = [DynamicLayer() for _ in blocks]
    cache = Cache(layers=layers)
    n_rows, n_tokens = ids.shape
    if n_tokens:
        edited(ids[:1], past_key_values=cache, use_cache=True, logits_to_keep=_one(ids))
        if any(layer.get_seq_length() != n_tokens for layer in layers):
            return Cache(layers=[DynamicLayer() for _ in blocks]), 0
        cache.batch_repeat_interleave(n_rows)
    return cache, n_tokens


def _one(ids: Int[Tensor, "row pos"]) -> Int[Tensor, "1"]:
    """The first place alone: the head has nothing to say in this pass."""
    return torch.zeros(1, dtype=torch.long, device=ids.device)


def _chunks(texts: Sequence[EncodedEdit], lengths: Sequence[int]) -> list[list[int]]:
    """Which texts are run together: of one rendering, and of like length."""
    found = []
    for is_chat in (False, True):
        rows = [row for row, text in enumerate(texts) if text.is_chat == is_chat]
        rows.sort(key=lambda row: lengths[row])
        found += [rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE)]
    return found


def _shared(ids: Int[Tensor, "row pos"], most: int) -> int:
    """How many tokens several texts begin with alike, `most` at most; 0 where it is not worth a pass."""
    if len(ids) < 2 or most < LEAST_SHARED:
        return 0
    alike = (ids[:, :most] == ids[:1, :most]).all(0).long().cumprod(0).sum()
    return int(alike) if alike >= LEAST_SHARED else 0


def _pick(
    tensor: Float[Tensor, "row head pos d"], columns: Int[Tensor, "row kept"]
) -> Float[Tensor, "row head kept d"]:
    """Some columns of each row; what is asked for left of the first is any, for a mask hides it."""
    return tensor.take_along_dim(columns.clamp(min=0).to(tensor.device)[:, None, :, None], 2)


_catching: ContextVar[object] = ContextVar("baft_catching", default=None)


@contextlib.contextmanager
def _outputs_of(
    architecture: Architecture, sites: Sequence[Site]
) -> Iterator[dict[Site, tuple[Tensor, bool]]]:
    """What blocks put out in this thread meanwhile, before anyone's hooks, and whether in a tuple."""
    caught: dict[Site, tuple[Tensor, bool]] = {}

    def catch(site: Site) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if _catching.get() is caught:
                in_tuple = isinstance(output, tuple)
                caught[site] = (output[0] if in_tuple else output, in_tuple)

        return hook

    token, handles = _catching.set(caught), []
    try:
        with hanging:
            for site in sites:
                handles.append(architecture.block(site).register_forward_hook(catch(site), prepend=True))
        yield caught
    finally:
        for handle in handles:
            handle.remove()
        _catching.reset(token)


# --- a step


class _PrefixLayer(DynamicLayer):
    """A layer's cache that hands out what it holds with what is new, and keeps nothing of it."""

    def __init__(self, n_tokens: int, held: KeysValues | None):
        super().__init__()  # type: ignore[no-untyped-call]
        self._n_tokens, self._held = n_tokens, held

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self._held is not None, "a block below the first site was run"
        keys, values = self._held
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    def get_seq_length(self) -> int:
        return self._n_tokens


def _frozen(prefix: Mapping[int, KeysValues], n_tokens: int) -> Cache:
    return Cache(
        layers=[_PrefixLayer(n_tokens, prefix.get(layer)) for layer in range(max(prefix, default=0) + 1)]
    )


class _TrunkOf:
    """A shallow copy of a host whose blocks up to a site hand the trunk through.

    Every module but those on the way to the blocks is the host's own.

    Args:
        host: The host.
        architecture: Where its blocks are.
        site: The last block that is left out.

    Attributes:
        view: The copy.
        selects: Whether its head is only asked where target tokens are predicted.
    """

    def __init__(self, host: nn.Module, architecture: Architecture, site: Site):
        way = next(name for name, one in host.named_modules() if one is architecture.blocks).split(".")
        self.given = _Given()
        self.view = inner = _shallow(host)
        head = _output_layer(host)
        self.selects = False
        for name in way[:-1]:
            self._ask_less(inner, head)
            child = _shallow(inner.get_submodule(name))
            inner._modules[name] = child
            inner = child
        self._ask_less(inner, head)
        blocks = list(architecture.blocks)
        passed = [_Passed(block, self.given) for block in blocks[: site.layer + 1]]
        _hang_alike(passed[-1], blocks[site.layer])
        inner._modules[way[-1]] = nn.ModuleList([*passed, *blocks[site.layer + 1 :]])

    def set(
        self,
        trunk: Float[Tensor, "row pos d_model"],
        wanted: tuple[Int[Tensor, " token"], Int[Tensor, " token"]],
    ) -> None:
        """What the next call is to hand through, and the rows and columns where its head is asked."""
        self.given.trunk, self.given.wanted = trunk, wanted

    def _ask_less(self, module: nn.Module, head: nn.Module | None) -> None:
        for name, child in module._modules.items():
            if head is not None and child is head:
                module._modules[name] = _HeadAt(child, self.given)
                self.selects = True


class _Given:
    """What one step hands to the parts of the copy."""

    trunk: Tensor
    wanted: tuple[Tensor, Tensor]
    in_tuples: bool  # whether blocks put out their states with something else


class _StandIn(nn.Module):
    """A module in another's place, which shows the other's attributes."""

    def __init__(self, original: nn.Module, given: _Given):
        super().__init__()
        self.__dict__["_original"], self.__dict__["_given"] = original, given  # not as a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)


class _Passed(_StandIn):
    """Stands for a block that was run before."""

    def forward(self, *_: Any, **__: Any) -> Tensor | tuple[Tensor, None]:
        return (self._given.trunk, None) if self._given.in_tuples else self._given.trunk


class _HeadAt(_StandIn):
    """Stands for the head, and asks it only where target tokens are predicted."""

    def forward(self, hidden: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "1 token vocab"]:
        rows, columns = (one.to(hidden.device) for one in self._given.wanted)
        found: Tensor = self._original(hidden[rows, columns].unsqueeze(0))
        return found


def _shallow(module: nn.Module) -> nn.Module:
    """A copy that shares parameters and submodules, and has a list of submodules and hooks of its own."""
    found = copy.copy(module)
    found.__dict__.pop("forward", None)  # put there by accelerate, and bound to the original
    for name, value in module.__dict__.items():
        if name == "_modules" or (isinstance(value, dict) and "_hooks" in name):
            found.__dict__[name] = copy.copy(value)
    return found


def _hang_alike(module: nn.Module, original: nn.Module) -> None:
    """Hangs on a module what others hung on another's output: an edit comes before it in every pass."""
    for name, value in original.__dict__.items():
        if name.startswith("_forward_hooks"):
            module.__dict__[name] = copy.copy(value)


def _inner(host: Any) -> Any:
    """The model below a PEFT wrapper."""
    return host.get_base_model() if hasattr(host, "get_base_model") else host


def _output_layer(host: Any) -> nn.Module | None:
    found: Any = _inner(host).get_output_embeddings()
    return found if isinstance(found, nn.Module) else None
