"""Texts as points among the host's hidden states, by which like texts are found."""

import re
from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from baft.errors import UnsupportedHostError
from baft.hosts.architecture import Site, find_architecture, intervention_dtype
from baft.hosts.background import background_text, fitting
from baft.hosts.calls import Recording
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.hosts.passes import show_prompts
from baft.hosts.positions import PositionSpec

_ROWS = 32
_SENTENCE_END = re.compile(r"(?<=[.!?\n])\s+")


class StateKeys:
    """Keys of texts: the mean of the hidden states at their tokens, standardized, of length one.

    The mean leaves out the first token, on which attention rests whatever it is. It is standardized by the
    mean and the standard deviation of the background's prompts.

    Args:
        host: The host.
        encoder: Its encoder.
        layer: The block after which states are taken; None for a third of the host's depth.

    Raises:
        ConfigError: If the host has no such layer.
    """

    def __init__(self, host: Host, encoder: Encoder, layer: int | None):
        architecture = find_architecture(host.model)
        self._host, self._encoder = host, encoder
        self.site = Site(architecture.n_layers // 3 if layer is None else layer)
        architecture.block(self.site)
        self.d_model = architecture.d_model

    def keys(self, texts: Sequence[str]) -> Float[Tensor, "text d_model"]:
        """The keys of texts."""
        return self._standardized(self._means([self._encoder.prompt(text) for text in texts]))

    def scores(self, keys: Float[Tensor, "edit d_model"], text: str) -> Float[Tensor, " edit"]:
        """The cosine of each key with a text as a whole or with its last sentence, whichever is greater."""
        last = _SENTENCE_END.split(text.strip())[-1]
        asked = [one for one in dict.fromkeys((text.strip(), last)) if one.strip()]
        if not asked:
            return keys.new_full((len(keys),), -torch.inf)
        return (keys @ self.keys(asked).T).max(-1).values.double()

    def reached(self, keys: Float[Tensor, "edit d_model"]) -> Float[Tensor, "prompt edit"]:
        """The cosines that the background's prompts reach."""
        return (self._standardized(self._background) @ keys.T).double()

    @cached_property
    def _background(self) -> Float[Tensor, "prompt d_model"]:
        rows = fitting(self._encoder.prompt, background_text()["prompts"])
        if len(rows) < 2:
            raise UnsupportedHostError(
                "this host's context is too short for the prompts that states are set against: "
                "use keys='bm25'"
            )
        return self._means(rows)

    def _standardized(self, means: Float[Tensor, "text d_model"]) -> Float[Tensor, "text d_model"]:
        center, spread = self._background.mean(0), self._background.std(0)
        z = (means - center) / spread.clamp(min=1e-6)
        return z / z.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    @torch.no_grad()
    def _means(self, rows: Sequence[tuple[int, ...]]) -> Float[Tensor, "text d_model"]:
        found = []
        for start in range(0, len(rows), _ROWS):
            some = rows[start : start + _ROWS]
            lengths = [len(row) for row in some]
            watched = EditedModel(self._host.model, {self.site: ()}, PositionSpec(last_prompt=max(lengths)))
            seen = Recording()
            show_prompts(watched, self._encoder, some, seen)
            states = seen.at(self.site).to(intervention_dtype(self._host.model))
            row, column = seen.masks[0].to(states.device).nonzero().unbind(-1)
            counts = row.bincount(minlength=len(some))
            keep = (column > 0) | (counts[row] < 2)
            row, states = row[keep], states[keep]
            sums = states.new_zeros(len(some), states.shape[-1]).index_add(0, row, states)
            found.append(sums / row.bincount(minlength=len(some)).unsqueeze(-1))
        return torch.cat(found)
