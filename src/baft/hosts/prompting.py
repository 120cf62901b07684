"""Edits that are read instead of learned: text put into a prompt before the host sees it.

Rows into which nothing is put are run in the batch that was given, and are bit for bit what they would be
without; the others are run once more, longer. What comes back has the shape that was asked for, as if nothing
had been put in.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

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
) -> Any:
    """Runs a host on prompts with what belongs into them, and gives the logits of the tokens that were shown.

    Args:
        run: The host.
        given: What it is given, by name.
        real: Which of the tokens are no padding.
        n_prompt_tokens: Real tokens of each row's prompt; None for all of them.
        prompter: Decides what goes into each.

    Raises:
        InputError: If the host is to go on from a cache or from embeddings, or more than logits is wanted.
    """
    ids = given.get("input_ids")
    refused = [
        name for name in _WITH_CONTEXT_REFUSED if given.get(name) is not None and given[name] is not False
    ]
    if ids is None or real.shape != ids.shape or refused:
        what = refused[0] if refused else "a prompt out of a cache" if ids is not None else "no input_ids"
        raise InputError(
            f"edits that are put into the prompt need the whole of it and give logits alone, got {what}: "
            "call with input_ids and attention_mask"
        )
    rows = [tuple(row[keep].tolist()) for row, keep in zip(ids, real, strict=True)]
    ends = [len(row) for row in rows] if n_prompt_tokens is None else n_prompt_tokens.tolist()
    insertions = prompter([row[:end] for row, end in zip(rows, ends, strict=True)])
    output = run(**given)
    longer = {i: one.into(rows[i]) for i, one in enumerate(insertions) if one is not None}
    if not longer:
        return output
    with_more = _padded(list(longer.values()), ids, left=False)
    logits = run(**with_more, use_cache=False).logits
    found = output.logits.clone()
    kept = _kept(given.get("logits_to_keep", 0), ids.shape[1])
    for place, i in enumerate(longer):
        one = insertions[i]
        assert one is not None, "else its row had not become longer"
        columns = real[i].nonzero()[:, 0]
        moved = torch.arange(len(columns), device=logits.device)
        moved = torch.where(moved >= one.at, moved + len(one.ids), moved)
        whole = logits.new_zeros(ids.shape[1], logits.shape[-1]).index_copy(
            0, columns.to(logits.device), logits[place, moved]
        )
        found[i] = whole[kept].to(found)
    output = copy.copy(output)
    output.logits = found
    if "past_key_values" in output:
        output.past_key_values = None
    return output


def generate_prompted(
    generate: Callable[..., Any],
    arguments: Mapping[str, Any],
    settings: Mapping[str, Any],
    prompter: Prompter,
) -> Tensor:
    """Generates after prompts with what belongs into them, and gives prompts as shown, with the replies.

    Args:
        generate: The host's own.
        arguments: Its arguments, with `input_ids` padded on the left and their `attention_mask`.
        settings: What rules the generation.
        prompter: Decides what goes into each prompt.

    Raises:
        GenerationError: If more than token ids is wanted, or it is to go on from a cache.
    """
    for name in ("return_dict_in_generate", "past_key_values", "streamer"):
        if settings.get(name):
            raise GenerationError(
                f"edits that are put into the prompt generate token ids alone, got {name}: generate without "
                "it, or inside disabled()"
            )
    ids, mask = arguments["input_ids"], arguments["attention_mask"].bool()
    rows = [tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]
    insertions = prompter(rows)
    longer = {i: one.into(rows[i]) for i, one in enumerate(insertions) if one is not None}
    plain = generate(**arguments) if len(longer) < len(rows) else None
    if not longer:
        assert isinstance(plain, Tensor), "generated above, and more than ids was refused"
        return plain
    batch = _padded(list(longer.values()), ids, left=True)
    n_more = batch["input_ids"].shape[1] - ids.shape[1]
    others = {name: value for name, value in arguments.items() if name not in batch}
    if others.get("max_length") is not None:
        others["max_length"] += n_more
    replies = generate(**others, **batch)[:, batch["input_ids"].shape[1] :]
    n_each = len(replies) // len(longer)
    of_row: dict[int, Tensor] = {}
    for place, i in enumerate(longer):
        of_row[i] = replies[place * n_each : (place + 1) * n_each]
    for i in range(len(rows)):
        if plain is not None and i not in of_row:
            of_row[i] = plain[i * n_each : (i + 1) * n_each, ids.shape[1] :]
    width = max(one.shape[1] for one in of_row.values())
    found = ids.new_full((len(rows) * n_each, ids.shape[1] + width), int(settings.get("pad_token_id") or 0))
    for i in range(len(rows)):
        here = slice(i * n_each, (i + 1) * n_each)
        found[here, : ids.shape[1]] = ids[i]
        found[here, ids.shape[1] : ids.shape[1] + of_row[i].shape[1]] = of_row[i]
    return found


_WITH_CONTEXT_REFUSED = (
    "inputs_embeds",
    "labels",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "cache_position",
)


def _kept(logits_to_keep: int | Tensor, width: int) -> Any:
    """Which of a row's logits the host was asked for; 0 for all."""
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    return slice(width - logits_to_keep if logits_to_keep else 0, width)


def _padded(rows: Sequence[Row], like: Tensor, *, left: bool) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = like.new_zeros(len(rows), width), like.new_zeros(len(rows), width)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=ids.dtype, device=ids.device)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}
