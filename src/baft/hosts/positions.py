"""Which tokens are edited: the last prompt tokens and every output token.

The paper edits "the last 3 tokens of the prompt and every output token". A `Window` holds, for one call
of the host or one generation, what is needed to say that of any token the host may be shown: in one
piece or token by token out of a cache, in padded batches, in beams.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from baft.errors import ConfigError, InputError


@dataclass(frozen=True, slots=True)
class PositionSpec:
    """The rule: the last `last_prompt` tokens of the prompt, and the outputs.

    Args:
        last_prompt: How many prompt tokens; a shorter prompt is edited whole, but for its BOS token.
        outputs: Whether output tokens are edited.

    Raises:
        ConfigError: If nothing would be edited.
    """

    last_prompt: int = 3
    outputs: bool = True

    def __post_init__(self) -> None:
        if self.last_prompt < 0 or (self.last_prompt == 0 and not self.outputs):
            raise ConfigError(
                "positions must name at least one token, "
                f"got last_prompt={self.last_prompt}, outputs={self.outputs}"
            )


@dataclass(frozen=True, slots=True)
class Shown:
    """Which of the tokens shown to the host are edited ones.

    Args:
        mask: Which, `[batch, pos]`.
        any: Whether any is.
        all: Whether all are.
    """

    mask: Bool[Tensor, "batch pos"]
    any: bool
    all: bool


class Window:
    """The edited tokens of one call or one generation.

    Args:
        spec: The rule.
        real: Which of the tokens known now are no padding, `[row, known]`.
        n_prompt_tokens: Real tokens of each row's prompt, BOS included; None where nobody knows, and
            then every token is edited but BOS.
        starts_with_bos: Whether the first real token of each row is the BOS token; it is never edited.
        acting: In which rows anything is edited at all; None for all.

    Raises:
        InputError: If a prompt is longer than its row.
    """

    def __init__(
        self,
        spec: PositionSpec,
        real: Bool[Tensor, "row known"],
        *,
        n_prompt_tokens: Int[Tensor, " row"] | None,
        starts_with_bos: Bool[Tensor, " row"],
        acting: Bool[Tensor, " row"] | None = None,
    ):
        self.spec = spec
        rank = real.cumsum(-1) - 1  # how many real tokens stand before this one
        edited = real & ~(starts_with_bos.unsqueeze(-1) & (rank == 0))
        if n_prompt_tokens is not None:
            n_prompt_tokens = n_prompt_tokens.to(real.device)
            if (n_prompt_tokens > real.sum(-1)).any() or (n_prompt_tokens < 0).any():
                raise InputError(
                    f"n_prompt_tokens {n_prompt_tokens.tolist()} does not fit rows of "
                    f"{real.sum(-1).tolist()} real tokens"
                )
            ends = n_prompt_tokens.unsqueeze(-1)
            edited = edited & (rank >= ends - spec.last_prompt)
            if not spec.outputs:
                edited = edited & (rank < ends)
        if acting is not None:
            edited = edited & acting.to(real.device).unsqueeze(-1)
        self.edited = edited
        self.prompt = real if n_prompt_tokens is None else real & (rank < n_prompt_tokens.unsqueeze(-1))
        self._ends_known = n_prompt_tokens is not None
        edits_new_tokens = spec.outputs or n_prompt_tokens is None
        self._any_new = edits_new_tokens and (acting is None or bool(acting.any()))
        self._all_new = edits_new_tokens and (acting is None or bool(acting.all()))
        self._new = torch.full((len(real), 1), edits_new_tokens, device=real.device)
        if acting is not None:
            self._new = self._new & acting.to(real.device).unsqueeze(-1)

    def shown(self, start: int, length: int, n_rows: int) -> Shown:
        """The edited ones of the tokens `start` to `start + length` of every row.

        Args:
            start: Tokens that the cache holds already.
            length: Tokens shown now.
            n_rows: Rows shown now: a multiple of the rows known, where beams or samples share a prompt.

        Raises:
            InputError: If the rows do not match.
        """
        n_known, width = self.edited.shape
        if n_rows % n_known:
            raise InputError(f"the host was shown {n_rows} rows for {n_known} prompts")
        if start >= width:  # one rule for all, so that no number need be read back from the device
            mask = self._new.repeat_interleave(n_rows // n_known, dim=0).expand(n_rows, length)
            return Shown(mask, self._any_new, self._all_new)
        known = self.edited[:, start : start + length]
        new = self._new.expand(n_known, length - known.shape[1])
        mask = torch.cat([known, new], dim=-1).repeat_interleave(n_rows // n_known, dim=0)
        n_edited = int(mask.sum())
        return Shown(mask, n_edited > 0, n_edited == mask.numel())

    def prompt_shown(self, start: int, length: int, n_rows: int) -> Bool[Tensor, "batch pos"]:
        """Which of the tokens `start` to `start + length` are of a prompt; all real ones if nobody knows."""
        n_known = self.prompt.shape[0]
        known = self.prompt[:, start : start + length]
        new = known.new_full((n_known, length - known.shape[1]), not self._ends_known)
        return torch.cat([known, new], dim=-1).repeat_interleave(n_rows // n_known, dim=0)
