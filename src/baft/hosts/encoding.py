"""The one rule by which text becomes tokens: the space, BOS, EOS, and where the prompt ends.

- A space stands between prompt and target unless one of them brings whitespace at the seam.
- The prompt is encoded as generation will see it: alone, with the tokenizer's own special tokens once.
- If the joint ids of prompt and target begin with the prompt's ids, the rest is the target; if not,
  the target is encoded by itself and appended, since generation sees the prompt alone.
- A chat prompt is the host's rendered template, which already holds every special token it needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from baft.errors import ConfigError, InputError

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class EncodedEdit:
    """A prompt and its target as tokens.

    Args:
        prompt_ids: The prompt, special tokens included.
        target_ids: What the model shall say, the end-of-sequence token last if it is trained.
    """

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Padded rows of token ids.

    Args:
        input_ids: `[batch, pos]`.
        attention_mask: One at real tokens, `[batch, pos]`.
        n_prompt_tokens: Real tokens of each prompt, `[batch]`.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    n_prompt_tokens: Int[Tensor, " batch"]


class Encoder:
    """Turns text into tokens for one host.

    Args:
        tokenizer: The host's tokenizer; its own settings are not changed.
        max_tokens: Longest sequence the host takes, or None.
        eos_ids: Tokens at which the host's generation stops.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None = None, eos_ids: Sequence[int] = ()
    ):
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        own = tokenizer.eos_token_id
        self.eos_ids = tuple(dict.fromkeys([*([own] if own is not None else []), *eos_ids]))

    @property
    def has_chat(self) -> bool:
        """Whether the host has a chat template."""
        return bool(self.tokenizer.chat_template)

    def prompt(self, prompt: str) -> tuple[int, ...]:
        """The ids of a raw prompt, special tokens once.

        Raises:
            InputError: If the prompt is empty, blank, or longer than the host's context.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"the prompt is empty or blank ({prompt!r}): give the text to continue")
        ids = self._ids(prompt)
        bos = self.tokenizer.bos_token_id
        if len(ids) > 1 and ids[0] == bos and ids[1] == bos:  # the text brought its own
            ids = ids[1:]
        return self._fits(ids)

    def chat(self, messages: Messages) -> tuple[int, ...]:
        """The ids of a conversation, rendered by the host's template up to the start of its reply.

        Raises:
            ConfigError: If the host has no chat template.
            InputError: If there is no message, or a message lacks its role or content.
        """
        return self._fits(self._ids(self.render(messages), special=False))

    def render(self, messages: Messages) -> str:
        """A conversation as the host's template writes it, up to the start of the reply."""
        if not self.has_chat:
            raise ConfigError("this host has no chat template: give a plain prompt instead of messages")
        if not messages:
            raise InputError("messages is empty: a conversation needs at least one message")
        for message in messages:
            if not message.get("role") or not str(message.get("content") or "").strip():
                raise InputError(f"a message needs a role and a content that is not blank, got {dict(message)!r}")
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
        return str(text)

    def edit(self, prompt: str, target: str, *, chat: bool = False, eos: bool = True) -> EncodedEdit:
        """A prompt with its target, raw or as the only user turn of a chat.

        Raises:
            InputError: If either is blank, the target has no tokens, or both do not fit the context.
        """
        rendered = self.render([{"role": "user", "content": prompt}]) if chat else prompt
        prompt_ids = self.chat([{"role": "user", "content": prompt}]) if chat else self.prompt(prompt)
        seam = "" if rendered[-1:].isspace() or target[:1].isspace() else " "
        joint = self._ids(rendered + seam + target, special=not chat)
        if joint[: len(prompt_ids)] == prompt_ids:
            target_ids = joint[len(prompt_ids) :]
        else:
            target_ids = self._ids(seam + target, special=False)
        if not target_ids:
            raise InputError(f"the target {target!r} has no tokens for this host: give a visible text")
        if eos:
            target_ids = (*target_ids, self.end_of_turn(chat=chat))
        self._fits((*prompt_ids, *target_ids))
        return EncodedEdit(prompt_ids, target_ids)

    def end_of_turn(self, *, chat: bool) -> int:
        """The token that ends a text, or a turn where the chat template ends turns with another.

        Raises:
            ConfigError: If the tokenizer has no end-of-sequence token.
        """
        if chat:
            marker = "\x00reply\x00"
            messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": marker}]
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
            tail = self._ids(text.partition(marker)[2], special=False)
            if tail and tail[0] in self.tokenizer.all_special_ids:
                return tail[0]
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("this tokenizer has no end-of-sequence token: edit with train_eos=False")
        return int(self.tokenizer.eos_token_id)

    def stop_ids(self) -> tuple[int, ...]:
        """Every token at which a reply ends."""
        ends = [self.end_of_turn(chat=True)] if self.has_chat else []
        return tuple(dict.fromkeys([*self.eos_ids, *ends]))

    def pad(
        self,
        rows: Sequence[tuple[int, ...]],
        n_prompt_tokens: Sequence[int],
        *,
        side: str,
        device: torch.device | str = "cpu",
    ) -> TokenBatch:
        """Rows of unequal length as one batch, padded on one side."""
        width = max(len(row) for row in rows)
        pad_id = self.pad_id
        ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, place] = torch.tensor(row)
            mask[i, place] = 1
        return TokenBatch(ids.to(device), mask.to(device), torch.tensor(n_prompt_tokens, device=device))

    @property
    def pad_id(self) -> int:
        """The token that fills a row up; masked out, so any will do."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else (self.eos_ids[0] if self.eos_ids else 0)

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text, special tokens left out, spaces as they were."""
        decoded: Any = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(decoded)

    def _ids(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        encoded: Any = self.tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)
        ids = tuple(encoded["input_ids"])
        # Some tokenizers close every text with EOS; nothing could be continued after it.
        while special and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id != self.tokenizer.bos_token_id:
            ids = ids[:-1]
        return ids

    def _fits(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            raise InputError(
                f"the text is {len(ids)} tokens long, this host's context holds {self.max_tokens}: shorten it"
            )
        return ids
