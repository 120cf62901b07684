"""Edits that are read instead of learned: text put into a prompt before the host sees it.

Rows into which nothing is put are run in the batch that was given, and are bit for bit what they would be
without; the others are run once more, longer. What comes back has the shape that was asked for, as if nothing
had been put in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from baft.errors import GenerationError, InputError

Row = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Insertion:
    """Tokens to be put into a prompt.

    Args:
        at: Before which of the prompt's tokens.
        ids: The tokens.
    """

    at: int
    ids: Row

    def into(self, row: Row) -> Row:
        """A row with the tokens in it."""
        return (*row[: self.at], *self.ids, *row[self.at :])


@runtime_checkable
class Prompter(Protocol):
    """Decides what is put into prompts."""

    def __call__(self, prompts: Sequence[Row]) -> Sequence[Insertion | None]:
        """For each prompt, its real tokens, what goes into it, or None."""


def run_prompted(
    run: Callable[..., Any],
    given: Mapping[str, Any],
    real: Bool[Tensor, "batch pos"],
    n_prompt_tokens: Int[Tensor, " batch"] | None,
    prompter: Prompter,
    limit: int | None = None,
) -> Any:
    """Runs a host on prompts with what belongs into them, and gives the logits of the tokens that were shown.

    Where nothing is put in anywhere, it is the host's own output, whole. Otherwise it holds logits alone; at
    padding of a row that was made longer they are zero.

    Args:
        run: The host.
        given: What it is given, by name.
        real: Which of the tokens are no padding.
        n_prompt_tokens: Real tokens of each row's prompt; None for all of them.
        prompter: Decides what goes into each.
        limit: Longest row that the host takes; what would make a row longer than that is left out.

    Raises:
        InputError: If the host is to go on from a cache or from embeddings, or more than logits is wanted.
    """
    ids = given.get("input_ids")
    refused = [
        name for name in _WITH_CONTEXT_REFUSED if given.get(name) is not None and given[name] is not False
    ]
    if given.get("return_dict") is False:
        refused.append("return_dict=False")
    if ids is None or real.shape != ids.shape or refused:
        what = refused[0] if refused else "a prompt out of a cache" if ids is not None else "no input_ids"
        raise InputError(
            f"edits that are put into the prompt need the whole of it and give logits alone, got {what}: "
            "call with input_ids and attention_mask"
        )
    rows = real_tokens(ids, real)
    ends = [len(row) for row in rows] if n_prompt_tokens is None else n_prompt_tokens.tolist()
    insertions = _fitting(prompter([row[:end] for row, end in zip(rows, ends, strict=True)]), rows, limit)
    if not insertions:
        return run(**given)
    n_all, kept = ids.shape[1], given.get("logits_to_keep", 0)
    columns = torch.arange(n_all, device=real.device)
    if isinstance(kept, Tensor):
        columns = columns[kept.to(real.device)]
    elif kept:
        columns = columns[-kept:]
    places = {i: _moved(real[i], columns, one) for i, one in insertions.items()}
    shown = {
        "use_cache": False,
        **_padded([one.into(rows[i]) for i, one in insertions.items()], ids, left=False),
    }
    if "logits_to_keep" in given:  # the host can do with fewer
        needed = torch.cat([place[place >= 0] for place in places.values()]).unique()
        shown["logits_to_keep"] = needed if len(needed) else torch.zeros_like(columns[:1])
        places = {
            i: torch.where(place >= 0, torch.searchsorted(needed, place), place)
            for i, place in places.items()
        }
    logits = run(**shown).logits
    output = None if len(insertions) == len(rows) else run(**given)
    of_host = logits.new_zeros(len(rows), len(columns), logits.shape[-1]) if output is None else output.logits
    found = of_host.clone()
    for row, (i, place) in enumerate(places.items()):
        place = place.to(logits.device)
        own = logits[row, place.clamp(min=0)].masked_fill((place < 0).unsqueeze(-1), 0.0)
        found[i] = own.to(found)
    return CausalLMOutput(logits=found)


def generate_prompted(
    generate: Callable[..., Any],
    arguments: Mapping[str, Any],
    settings: Mapping[str, Any],
    prompter: Prompter,
    limit: int | None = None,
) -> Tensor:
    """Generates after prompts with what belongs into them, and gives prompts as shown, with the replies.

    Args:
        generate: The host's own.
        arguments: Its arguments, with `input_ids` padded on the left and their `attention_mask`.
        settings: What rules the generation.
        prompter: Decides what goes into each prompt.
        limit: Longest row that the host takes. What would leave no room for a reply is left out; a reply ends
            where the limit is reached.

    Raises:
        GenerationError: If more than token ids is wanted, or it is to go on from a cache.
    """
    for name in ("return_dict_in_generate", "past_key_values", "streamer", "position_ids", "token_type_ids"):
        if settings.get(name) is not None and settings[name] is not False:
            raise GenerationError(
                f"edits that are put into the prompt generate token ids alone, got {name}: generate without "
                "it, or inside disabled()"
            )
    ids, mask = arguments["input_ids"], arguments["attention_mask"].bool()
    rows = real_tokens(ids, mask)
    room = None if limit is None else limit - 1
    insertions = _fitting(prompter(rows), rows, room)
    width = ids.shape[1]
    n_new = settings.get("max_new_tokens")
    if n_new is None and settings.get("max_length") is not None:
        n_new = settings["max_length"] - width
    if not insertions or (n_new is not None and n_new < 1):  # what is wrong then, the host says
        whole = generate(**arguments)
        assert isinstance(whole, Tensor), "more than ids was refused"
        return whole
    # The rows as they were given run as they would by themselves: another batch would round otherwise.
    plain = generate(**arguments)[:, width:] if len(insertions) < len(rows) else None
    longer = {i: one.into(rows[i]) for i, one in insertions.items()}
    longest = max(len(row) for row in longer.values())
    if n_new is not None and limit is not None and longest + n_new > limit:
        batches = [[i] for i in longer]  # or a long row would cut the replies of others short
    else:
        batches = [list(longer)]
    replies: dict[int, Tensor] = {}
    for batch in batches:
        shown = _padded([longer[i] for i in batch], ids, left=True)
        begin = shown["input_ids"].shape[1]
        others = {name: value for name, value in arguments.items() if name not in (*shown, "max_length")}
        if n_new is not None:
            others["max_new_tokens"] = n_new if limit is None else min(n_new, limit - begin)
        if settings.get("min_length"):
            others["min_length"] = settings["min_length"] + begin - width
        made = generate(**others, **shown)[:, begin:]
        replies |= dict(zip(batch, made.chunk(len(batch)), strict=True))
    if plain is not None:
        of_rows = plain.chunk(len(rows))
        replies = {i: replies.get(i, of_rows[i]) for i in range(len(rows))}
    return _rejoined(ids, [replies[i] for i in range(len(rows))], settings)


def real_tokens(ids: Int[Tensor, "batch pos"], kept: Bool[Tensor, "batch pos"]) -> list[Row]:
    """The tokens of each row that are kept, such as those that are no padding."""
    return [tuple(row[keep].tolist()) for row, keep in zip(ids, kept.to(ids.device), strict=True)]


def _rejoined(
    ids: Int[Tensor, "batch pos"], replies: Sequence[Tensor], settings: Mapping[str, Any]
) -> Int[Tensor, "reply total"]:
    """Prompts as they were shown, each with its replies; what is shorter than others is filled up."""
    pad, eos = settings.get("pad_token_id"), settings.get("eos_token_id")
    if pad is None:  # the host's own choice
        pad = eos[0] if isinstance(eos, list | tuple) else eos
    n_each, width = len(replies[0]), max(one.shape[1] for one in replies)
    found = ids.new_full((len(ids) * n_each, ids.shape[1] + width), int(pad or 0))
    found[:, : ids.shape[1]] = ids.repeat_interleave(n_each, 0)
    for i, one in enumerate(replies):
        found[i * n_each : (i + 1) * n_each, ids.shape[1] : ids.shape[1] + one.shape[1]] = one
    return found


def _fitting(
    wanted: Sequence[Insertion | None], rows: Sequence[Row], limit: int | None
) -> dict[int, Insertion]:
    """What is put in, by row; not what would make a row longer than the limit."""
    return {
        i: one
        for i, (one, row) in enumerate(zip(wanted, rows, strict=True))
        if one is not None and one.ids and (limit is None or len(row) + len(one.ids) <= limit)
    }


def _moved(real: Bool[Tensor, " pos"], columns: Int[Tensor, " kept"], one: Insertion) -> Int[Tensor, " kept"]:
    """Where the tokens of some columns stand in the longer row; -1 for padding."""
    place = real.long().cumsum(0) - 1
    place = torch.where(place >= one.at, place + len(one.ids), place)
    return torch.where(real, place, -1)[columns]


_WITH_CONTEXT_REFUSED = (
    "inputs_embeds",
    "labels",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "cache_position",
)


def _padded(rows: Sequence[Row], like: Tensor, *, left: bool) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = like.new_zeros(len(rows), width), like.new_zeros(len(rows), width)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=ids.dtype, device=ids.device)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}
