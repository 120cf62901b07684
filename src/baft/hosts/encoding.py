"""The one rule by which text becomes tokens: the space, BOS, EOS, and where the prompt ends.

- A space stands between prompt and target unless one of them brings whitespace at the seam; never two.
- The prompt is encoded as generation will see it: alone, with the tokenizer's own special tokens once.
- If the joint ids of prompt and target begin with the prompt's ids, the rest is the target; if not,
  the target is encoded by itself and appended, since generation sees the prompt alone.
- A chat prompt is the host's rendered template, which already holds every special token it needs, and says
  what stands between it and the reply.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from baft.errors import ConfigError, InputError, UnsupportedHostError
from baft.hosts.models import Host

Messages = Sequence[Mapping[str, str]]
_MARKER = "\x00reply\x00"  # stands for a reply where a template is asked what surrounds one


@dataclass(frozen=True, slots=True)
class EncodedEdit:
    """A prompt and its target as tokens.

    Args:
        prompt_ids: The prompt, special tokens included.
        target_ids: What the model shall say, the end-of-sequence token last if it is trained.
        is_chat: Whether the prompt is rendered as a chat.
    """

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    is_chat: bool = False


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
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int | None = None,
        eos_ids: Sequence[int] = (),
    ):
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        own = tokenizer.eos_token_id
        self.eos_ids = tuple(dict.fromkeys([*([own] if own is not None else []), *eos_ids]))

    @classmethod
    def for_host(cls, host: Host, *, max_tokens: int | None = None) -> "Encoder":
        """The encoder of a host, with the stop tokens that its generation config names."""
        eos = host.model.generation_config.eos_token_id if host.model.generation_config else None
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        return cls(host.tokenizer, max_tokens=max_tokens, eos_ids=eos_ids)

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
        return self._fits(self._ids(prompt))

    def token_at(self, prompt: str, character: int) -> int:
        """Index in `prompt(prompt)` of the token that holds a character.

        Raises:
            UnsupportedHostError: If the tokenizer does not tell where in the text its tokens stand.
            InputError: If no token holds it.
        """
        ids = self.prompt(prompt)
        if not self.tokenizer.is_fast:
            raise UnsupportedHostError(
                f"{type(self.tokenizer).__name__} does not tell where in a text its tokens stand, and this "
                "method looks for one by its place: load the host with its fast tokenizer"
            )
        encoded: Any = self.tokenizer(
            prompt, add_special_tokens=True, return_offsets_mapping=True, truncation=False, verbose=False
        )
        raw = tuple(encoded["input_ids"])
        shift = next(
            i for i in range(len(raw)) if raw[i : i + len(ids)] == ids
        )  # a BOS too many is taken off
        spans = encoded["offset_mapping"][shift : shift + len(ids)]
        found = [i for i, (start, end) in enumerate(spans) if start <= character < end]
        if not found:
            raise InputError(f"no token of {prompt!r} holds its character {character}")
        return found[-1]

    def chat(self, messages: Messages) -> tuple[int, ...]:
        """The ids of a conversation, rendered by the host's template up to the start of its reply.

        Raises:
            ConfigError: If the host has no chat template.
            InputError: If there is no message, a message lacks its role or content, or the template refuses.
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
                raise InputError(
                    f"a message needs a role and a content that is not blank, got {dict(message)!r}"
                )
        return self._rendered([dict(message) for message in messages], add_generation_prompt=True)

    def edit(self, prompt: str, target: str, *, chat: bool = False, eos: bool = True) -> EncodedEdit:
        """A prompt with its target, raw or as the only user turn of a chat.

        Raises:
            InputError: If either is blank, the target has no tokens, or both do not fit the context.
        """
        if not isinstance(target, str) or not target.strip():
            raise InputError(f"the target is empty or blank ({target!r}): give the text that shall follow")
        messages = [{"role": "user", "content": prompt}]
        rendered = self.render(messages) if chat else prompt
        prompt_ids = self.chat(messages) if chat else self.prompt(prompt)
        seam = self._reply_seam(rendered, messages) if chat else None
        if chat or rendered[-1:] == " ":
            target = target.lstrip(" ")
        if seam is None:
            seam = "" if rendered[-1:].isspace() or target[:1].isspace() else " "
        joint = self._ids(rendered + seam + target, special=not chat)
        if joint[: len(prompt_ids)] == prompt_ids:
            target_ids = joint[len(prompt_ids) :]
        else:
            target_ids = self._inside(seam + target)
        if not target_ids:
            raise InputError(f"the target {target!r} has no tokens for this host: give a visible text")
        if eos and target_ids[-1] != (end := self.end_of_turn(chat=chat)):
            target_ids = (*target_ids, end)
        self._fits((*prompt_ids, *target_ids))
        return EncodedEdit(prompt_ids, target_ids, chat)

    def _inside(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that stands inside another.

        Some tokenizers put a space before whatever they are given (SentencePiece's dummy prefix); a digit and
        a line break before the text take it, and are cut off again.
        """
        prefix = "1\n"
        before, joint = (self._ids(one, special=False) for one in (prefix, prefix + text))
        if joint[: len(before)] == before:
            return joint[len(before) :]
        return self._ids(text, special=False)

    def inner(self, text: str) -> tuple[int, ...]:
        """The ids of a text that goes inside another, no special token added; empty for an empty one."""
        return self._ids(text, special=False) if text else ()

    def end_of_turn(self, *, chat: bool) -> int:
        """The token that ends a text, or a turn where the chat template ends turns with another.

        Raises:
            ConfigError: If the tokenizer has no end-of-sequence token.
        """
        end = self._turn_end() if chat else None
        if end is None:
            end = self.tokenizer.eos_token_id
        if end is None:
            raise ConfigError("this tokenizer has no end-of-sequence token: edit with train_eos=False")
        return int(end)

    def stop_ids(self) -> tuple[int, ...]:
        """Every token at which a reply ends."""
        end = self._turn_end() if self.has_chat else None
        return tuple(dict.fromkeys([*self.eos_ids, *([] if end is None else [end])]))

    def pad(
        self,
        rows: Sequence[tuple[int, ...]],
        n_prompt_tokens: Sequence[int],
        *,
        side: str,
        device: torch.device | str = "cpu",
    ) -> TokenBatch:
        """Rows of unequal length as one batch, padded on one side.

        Raises:
            ConfigError: If the side is neither left nor right.
            InputError: If there are no rows.
        """
        if side not in ("left", "right"):
            raise ConfigError(f"rows are padded on the 'left' or the 'right', got {side!r}")
        if not rows:
            raise InputError("there are no rows to pad: give at least one")
        width = max(len(row) for row in rows)
        pad_id = self.pad_id
        ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, place] = torch.tensor(row, dtype=torch.long)
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

    def _rendered(self, messages: list[dict[str, str]], **options: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # a template may raise what it likes
            raise InputError(f"the host's chat template refuses these messages: {error}") from error

    def _reply_seam(self, rendered: str, messages: list[dict[str, str]]) -> str | None:
        """What the template puts between a prompt and its reply, where that is nothing but whitespace."""
        before = self._rendered([*messages, {"role": "assistant", "content": _MARKER}]).partition(_MARKER)[0]
        gap = before.removeprefix(rendered)
        return gap if before.startswith(rendered) and not gap.strip() else None

    def _turn_end(self) -> int | None:
        """The token that the chat template puts after a reply; special or not, text never spells it."""
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": _MARKER}]
        tail = self._ids(self._rendered(messages).partition(_MARKER)[2].lstrip(), special=False)
        known = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder, *self.eos_ids}
        return tail[0] if tail and tail[0] in known else None

    def _ids(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        bare = self._encode(text, special=False)
        if not special:
            return bare
        ids = self._encode(text, special=True)
        starts = range(len(ids) - len(bare) + 1)
        start = next((i for i in starts if ids[i : i + len(bare)] == bare), None)
        if (
            start is not None
        ):  # some tokenizers close every text with EOS; nothing could be continued after it
            ids = ids[: start + len(bare)]
        bos = self.tokenizer.bos_token_id
        if bos is not None and start and ids[:2] == (bos, bos):  # the text brought its own
            ids = ids[1:]
        return ids

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # tokenizers have no words for it
            raise InputError(f"the text {text!r} is not valid Unicode: {error.reason}") from None
        encoded: Any = self.tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)
        return tuple(encoded["input_ids"])

    def _fits(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            raise InputError(
                f"the text is {len(ids)} tokens long, this host's context holds {self.max_tokens}: shorten it"
            )
        return ids
