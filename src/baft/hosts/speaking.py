"""Text in, text out: asking an edited model in the words of its tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from baft.errors import GenerationError, InputError
from baft.hosts.architecture import find_architecture, input_device
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder, Messages
from baft.hosts.models import Host

Row = tuple[int, ...]


class Speaker:
    """Asks one host, with whatever edits are in force on it.

    Args:
        host: The host.
    """

    def __init__(self, host: Host):
        self.device = input_device(host.model)
        self.encoder = Encoder.for_host(host, max_tokens=find_architecture(host.model).max_positions)

    def rows(self, prompt: str | Sequence[str] | None, messages: Messages | None) -> list[Row]:
        """One or several raw prompts, or one chat, as tokens.

        Raises:
            InputError: If a prompt is blank or too long, or not exactly one of both is given.
        """
        if (prompt is None) == (messages is None):
            got = "neither" if prompt is None else "both"
            raise InputError(f"give either a prompt or messages, got {got}")
        if messages is not None:
            return [self.encoder.chat(messages)]
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        if not prompts:
            raise InputError("no prompt given: the list is empty")
        return [self.encoder.prompt(one) for one in prompts]

    def replies(
        self,
        edited: EditedModel,
        rows: Sequence[Row],
        max_new_tokens: int,
        generation: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        """The reply to each row, up to and with the token that ends it; greedy unless told otherwise.

        A reply ends where the host's context does. Penalties that a host's own settings put on repetition do
        not count unless they are asked for: what an edit is trained to say must be what is said.

        Raises:
            InputError: If no reply is asked for, or a row leaves no room for one.
            GenerationError: If several replies a row are asked for, or settings are not given as keywords.
        """
        generation = dict(generation or {})
        if generation.get("generation_config") is not None:
            raise GenerationError("generation_config= is not taken here: give its settings as keywords")
        if generation.get("num_return_sequences", 1) != 1:
            raise GenerationError(
                "every prompt has one reply, got num_return_sequences="
                f"{generation['num_return_sequences']}: give the prompt that many times"
            )
        if max_new_tokens < 1:
            raise InputError(f"a reply has at least one token, got max_new_tokens={max_new_tokens}")
        longest, limit = max(len(row) for row in rows), self.encoder.max_tokens
        if limit is not None:
            if longest >= limit:
                raise InputError(
                    f"the prompt is {longest} tokens long and fills this host's context of {limit}: shorten "
                    "it, so that a reply fits"
                )
            if len(rows) > 1 and longest + max_new_tokens > limit:  # or a long row would cut the others short
                return [self.replies(edited, [row], max_new_tokens, generation)[0] for row in rows]
            max_new_tokens = min(max_new_tokens, limit - longest)
        batch = self.encoder.pad(rows, [len(row) for row in rows], side="left", device=self.device)
        stops = self.encoder.stop_ids()
        settings = {
            "do_sample": False,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "eos_token_id": list(stops) or None,
            "pad_token_id": self.encoder.pad_id,
        }
        out = edited.generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens,
            **{**settings, **generation},
        )
        sequences = out if isinstance(out, Tensor) else out.sequences
        found = []
        for ids in sequences[:, batch.input_ids.shape[1] :].tolist():
            end = next((i for i, token in enumerate(ids) if token in stops), len(ids) - 1)
            found.append(ids[: end + 1])
        return found

    @torch.no_grad()
    def next_logits(self, edited: EditedModel, rows: Sequence[Row]) -> Float[Tensor, "row vocab"]:
        """The logits of the token after each row."""
        batch = self.encoder.pad(rows, [len(row) for row in rows], side="right", device=self.device)
        # At every position, as whoever calls the host gets them: a product of another shape rounds otherwise.
        output = edited(
            batch.input_ids,
            batch.attention_mask,
            n_prompt_tokens=batch.n_prompt_tokens,
            use_cache=False,
        )
        logits: Tensor = output.logits
        return logits[torch.arange(len(rows), device=logits.device), batch.n_prompt_tokens - 1]

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text."""
        return self.encoder.text(ids)
