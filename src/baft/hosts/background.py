"""What the host's states look like on text that no edit is about.

Gates are set against these states, and the locality loss is taken on them. They are the states of the
unedited host on a small text of the project's own (`background.toml`), computed once for a host and kept
in the cache when that took long.
"""

import contextlib
import hashlib
import re
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baft.errors import InputError, UnsupportedHostError
from baft.hosts.architecture import Site, find_architecture, input_device, intervention_dtype, site_device
from baft.hosts.calls import Recording
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.hosts.kept import keep, kept_path, read_kept
from baft.hosts.models import Host
from baft.hosts.passes import show_prompts
from baft.hosts.positions import PositionSpec

N_CHAT_PROMPTS = 150  # chat renderings are long; this many tell what the template's tokens look like
_WORTH_KEEPING_S = 1.0
_LAST = 3  # tokens of a prompt
_ROWS = 32
_PIECE = 1024  # states looked at at once
_FORMAT = 2
_KEPT_BYTES = 1 << 30  # of all hosts together


class Slot(IntEnum):
    """Where in its text a state stands; keys of a gate are weighed against their own kind most."""

    TEXT = 0
    LAST_RAW = 1
    LAST_CHAT = 2
    UNRELATED = 3  # one of a prompt that the user named, wherever in it


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Background:
    """States of the unedited host at the sites of an edit.

    Equal to itself alone, so that what is made of it can be kept for as long as it is.

    Args:
        states: By site, `[state, d_model]`, in the precision of interventions.
        slots: Which `Slot` each state stands at, `[state]`.
    """

    states: Mapping[Site, Float[Tensor, "state d_model"]]
    slots: Int[Tensor, " state"]

    def with_prompts(self, more: "Background") -> "Background":
        """The same with further states, such as those of a user's unrelated prompts."""
        joined = {site: torch.cat([states, more.states[site]]) for site, states in self.states.items()}
        return Background(joined, torch.cat([self.slots, more.slots]))


@cache
def background_text() -> Mapping[str, Any]:
    """The text, by kind: `sentences`, `prompts`, `chat_prompts` and `canaries`, each a tuple of strings."""
    raw = tomllib.loads(files("baft.hosts").joinpath("background.toml").read_text(encoding="utf-8"))
    prompts = []
    for template in [*raw["cloze"], *raw["questions"]]:
        kind = re.findall(r"{(\w+)}", template)[0]
        for name in raw["entities"][kind]:
            text = template.replace(f"{{{kind}}}", name)
            prompts.append(text[0].upper() + text[1:])
    prompts += raw["requests"]
    # A fixed spread over all templates and entities.
    ordered = sorted(prompts, key=lambda text: hashlib.sha256(text.encode()).digest())
    return {
        "sentences": tuple(raw["sentences"]),
        "prompts": tuple(prompts),
        "chat_prompts": tuple(ordered[:N_CHAT_PROMPTS]),
        "canaries": tuple(raw["canaries"]),
    }


def background(host: Host, encoder: Encoder, sites: Sequence[Site]) -> Background:
    """The host's background states at the given sites, from the cache where they are there.

    States of running text are taken at every token but the first (it is an attention sink), those of
    prompts at the last three. Texts that do not fit the host's context are left out.

    Raises:
        UnsupportedHostError: If none fits.
    """
    path = _cache_path(host, encoder, sites)
    kept = _read(path, sites)
    if kept is not None:
        dtype = intervention_dtype(host.model)
        states = {
            site: states.to(site_device(host.model, site), dtype) for site, states in kept.states.items()
        }
        return Background(states, kept.slots.to(input_device(host.model)))
    began = time.monotonic()
    made = _compute(host, encoder, sites)
    if time.monotonic() - began > _WORTH_KEEPING_S:
        _write(path, made)
    return made


def fitting(encode: Callable[[str], tuple[int, ...]], texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Those of the project's own texts that fit the host's context, as tokens."""
    rows = []
    for text in texts:
        with contextlib.suppress(InputError):
            rows.append(encode(text))
    return rows


def prompt_states(host: Host, encoder: Encoder, sites: Sequence[Site], prompts: Sequence[str]) -> Background:
    """States at the last three tokens of a user's prompts, raw and, where the host chats, in its template."""
    rows = [encoder.prompt(text) for text in prompts]
    if encoder.has_chat:
        rows += [encoder.chat([{"role": "user", "content": text}]) for text in prompts]
    found = _collect(host, encoder, sites, {Slot.LAST_RAW: rows})
    return Background(found.states, torch.full_like(found.slots, int(Slot.UNRELATED)))


def _compute(host: Host, encoder: Encoder, sites: Sequence[Site]) -> Background:
    def as_chat(prompt: str) -> tuple[int, ...]:
        return encoder.chat([{"role": "user", "content": prompt}])

    text = background_text()
    rows = {
        Slot.TEXT: fitting(encoder.prompt, text["sentences"]),
        Slot.LAST_RAW: fitting(encoder.prompt, text["prompts"]),
        Slot.LAST_CHAT: fitting(as_chat, text["chat_prompts"]) if encoder.has_chat else [],
    }
    if not any(rows.values()):
        raise UnsupportedHostError(
            f"this host's context of {encoder.max_tokens} tokens is shorter than every background text that "
            "gates are set against: use shared bases with open gates (method reft)"
        )
    return _collect(host, encoder, sites, rows)


@torch.no_grad()
def _collect(
    host: Host, encoder: Encoder, sites: Sequence[Site], texts: Mapping[Slot, Sequence[tuple[int, ...]]]
) -> Background:
    """States of texts: at all tokens but the first of running text, at the last three of prompts.

    Memory for them is taken once: put together at the end they would be held twice. It is filled from its
    end, since batches get wider: those to come then fit into what the widest has let go of.

    Args:
        host: The host.
        encoder: Its encoder.
        sites: Where states are taken.
        texts: Tokens, by the slot of the last one.
    """
    ordered = {slot: sorted(rows, key=len) for slot, rows in texts.items()}
    batches = [
        (slot, rows[start : start + _ROWS])
        for slot, rows in ordered.items()
        for start in range(0, len(rows), _ROWS)
    ]
    most = sum(len(row) - 1 if slot is Slot.TEXT else _LAST for slot, rows in batches for row in rows)
    model, dtype = host.model, intervention_dtype(host.model)
    shape = (most, find_architecture(model).d_model)
    states = {site: torch.empty(shape, dtype=dtype, device=site_device(model, site)) for site in sites}
    slots = torch.empty(most, dtype=torch.long, device=input_device(model))
    first = most
    for slot, rows in reversed(batches):
        found = _seen(host, encoder, sites, rows, slot)
        first, end = first - len(found.slots), first
        slots[first:end] = found.slots
        for site in sites:
            states[site][first:end] = found.states[site]
    return Background({site: some[first:] for site, some in states.items()}, slots[first:])


def _seen(
    host: Host, encoder: Encoder, sites: Sequence[Site], rows: Sequence[tuple[int, ...]], slot: Slot
) -> Background:
    """The states of one batch."""
    spec = PositionSpec(last_prompt=len(rows[-1]) if slot is Slot.TEXT else _LAST)
    seen = Recording()
    show_prompts(EditedModel(host.model, dict.fromkeys(sites, ()), spec), encoder, rows, seen)
    place = seen.masks[0].nonzero()
    ends = place.new_tensor([len(row) for row in rows])
    is_first = place[:, 1] == 0
    is_last = place[:, 1] == ends[place[:, 0]] - 1
    keep = ~is_first if slot is Slot.TEXT else torch.ones_like(is_first)
    slots = torch.where(is_last, int(slot), int(Slot.TEXT))[keep]
    return Background({site: seen.at(site)[keep.to(seen.at(site).device)] for site in sites}, slots)


def _cache_path(host: Host, encoder: Encoder, sites: Sequence[Site]) -> Path | None:
    """Named by what the states depend on: the host, and the texts, tokens and layers."""
    texts = (sorted(background_text().items()), encoder.has_chat, encoder.max_tokens)
    return kept_path("background", host, (texts, [site.layer for site in sites], _FORMAT))


def _read(path: Path | None, sites: Sequence[Site]) -> Background | None:
    kept = read_kept(path)
    if kept is None or not kept.keys() >= {"slots", *(f"layer{site.layer}" for site in sites)}:
        return None
    return Background({site: kept[f"layer{site.layer}"] for site in sites}, kept["slots"])


def _write(path: Path | None, made: Background) -> None:
    tensors = {f"layer{site.layer}": _compact(states) for site, states in made.states.items()}
    tensors["slots"] = made.slots.cpu()
    keep(path, tensors, "background states", most_bytes=_KEPT_BYTES)


def _compact(states: Float[Tensor, "state d_model"]) -> Tensor:
    """The states in half the bytes where no bit is lost by it: those of a host in half precision."""
    for half in (torch.bfloat16, torch.float16):
        if all(torch.equal(some.to(half).to(some.dtype), some) for some in states.split(_PIECE)):
            return states.to("cpu", half).contiguous()
    return states.cpu().contiguous()
