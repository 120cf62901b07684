"""Ways of running a host on the texts of an edit, for training: what it predicts where target tokens come.

`FullPass` runs the whole host over the whole of every text. `SuffixPass` (`suffix.py`) gives the same
numbers for a fraction of the work. A loop that trains knows only `TargetPass`, or `Predicting`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baft.errors import UnsupportedHostError
from baft.hosts.architecture import Site, active_adapters, input_device, n_hooks
from baft.hosts.calls import Parts, Recording
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import EncodedEdit, Encoder
from baft.hosts.kernels import fast_linears
from baft.hosts.models import Host
from baft.hosts.positions import PositionSpec
from baft.nn.interventions import SubspaceIntervention

logger = logging.getLogger(__name__)

Own = tuple[Mapping[Site, SubspaceIntervention], Int[Tensor, " row"]]  # blocks, and which edits each row


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the host predicts, under edits in training, where target tokens come next.

    Args:
        logits: `[token, vocab]`.
        states: States at the edited tokens of each trained site, before its intervention, `[state, d_model]`.
        state_rows: Which text each of these states belongs to, `[state]`.
    """

    logits: Float[Tensor, "token vocab"]
    states: Mapping[Site, Float[Tensor, "state d_model"]]
    state_rows: Int[Tensor, " state"]


@runtime_checkable
class Predicting(Protocol):
    """What tells the host's predictions of target tokens, as often as it is asked.

    Attributes:
        targets: The target tokens, all texts one after the other, `[token]`.
        rows: Which text each of them belongs to, `[token]`.
    """

    targets: Int[Tensor, " token"]
    rows: Int[Tensor, " token"]

    def __call__(self, parts: Mapping[Site, Parts], own: Own | None = None) -> Predictions:
        """The predictions with the given interventions in force, and those that act on single rows."""


@runtime_checkable
class TargetPass(Predicting, Protocol):
    """A way of running the host on the texts of a request."""

    def select(self, rows: Int[Tensor, " kept"]) -> "TargetPass":
        """The same on some of the texts."""


@runtime_checkable
class Pass(TargetPass, Protocol):
    """A target pass that knows the edited tokens before anything is trained.

    Attributes:
        edited: The model that it runs; what is patched in it is in force.
        n_left_out: How many tokens at each text's beginning a step does not run again, `[row]`.
        state_rows: The text of each edited token, `[state]`.
        state_offsets: Its place in the text, counted from the end of the prompt: the last prompt token is -1.
    """

    edited: EditedModel
    n_left_out: Int[Tensor, " row"]
    state_rows: Int[Tensor, " state"]
    state_offsets: Int[Tensor, " state"]

    def states(self) -> Mapping[Site, Float[Tensor, "state d_model"]]:
        """States at the edited tokens, under patches and no other edit."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Where target tokens are predicted, and what they are; all texts one after the other.

    Args:
        rows: Which text each belongs to, `[token]`.
        offsets: How many tokens of the text's target stand before it, `[token]`.
        ids: The tokens, `[token]`.
    """

    rows: Int[Tensor, " token"]
    offsets: Int[Tensor, " token"]
    ids: Int[Tensor, " token"]

    @classmethod
    def of(cls, texts: Sequence[EncodedEdit], device: torch.device) -> "Targets":
        """Those of some texts."""
        place = [(row, i, token) for row, text in enumerate(texts) for i, token in enumerate(text.target_ids)]
        return cls(*torch.tensor(place, device=device).unbind(-1))

    def select(self, rows: Int[Tensor, " kept"]) -> "Targets":
        """Those of some of the texts, in their new order."""
        found = [(self.rows == row).nonzero()[:, 0] for row in rows]
        kept = torch.cat(found)
        counts = torch.tensor([len(one) for one in found], device=kept.device)
        new = torch.arange(len(rows), device=kept.device).repeat_interleave(counts)
        return Targets(new, self.offsets[kept], self.ids[kept])


class FullPass:
    """Runs the whole host over the whole of every text.

    Args:
        host: The host.
        encoder: Its encoder.
        positions: Which tokens are edited.
        texts: Prompts with their targets; more than one row where an edit has several renderings.
        sites: Where states are wanted; without any, none are recorded.

    Attributes:
        edited: The model that it runs; what is patched in it is in force.
        targets: The target tokens, `[token]`.
        rows: The text of each, `[token]`.
        columns: Where in the batch each is predicted, `[token]`.
        n_left_out: None of any text, `[row]`.
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
    ):
        self._host, self._encoder, self._texts = host, encoder, texts
        self.sites = tuple(sites)
        self.edited = EditedModel(host.model, {}, positions)
        device = input_device(host.model)
        # The last target token is only ever predicted, so the host need not see it.
        inputs = [text.prompt_ids + text.target_ids[:-1] for text in texts]
        n_prompt = [len(text.prompt_ids) for text in texts]
        self.batch = encoder.pad(inputs, n_prompt, side="right", device=device)
        where = Targets.of(texts, device)
        self.rows, self.targets = where.rows, where.ids
        self.n_left_out = torch.zeros_like(self.batch.n_prompt_tokens)
        # The host computes logits for these positions of every row, and for no others.
        self.columns = self.batch.n_prompt_tokens[where.rows] - 1 + where.offsets
        self._keep, self._kept = torch.unique(self.columns, return_inverse=True)
        window = self.edited.window(
            self.batch.input_ids, self.batch.attention_mask.bool(), self.batch.n_prompt_tokens
        )
        self.state_rows, place = window.edited.nonzero().unbind(-1)
        self.state_offsets = place - self.batch.n_prompt_tokens[self.state_rows]

    def __call__(self, parts: Mapping[Site, Parts], own: Own | None = None) -> Predictions:
        """The predictions with the given interventions in force, and those that act on single rows."""
        edited, seen = with_parts(self.edited, self.sites, parts, own), Recording()
        with fast_linears():
            output = edited(
                self.batch.input_ids,
                self.batch.attention_mask,
                n_prompt_tokens=self.batch.n_prompt_tokens,
                recording=seen if self.sites else None,
                use_cache=False,
                logits_to_keep=self._keep,
            )
        logits = output.logits[self.rows, self._kept]
        return Predictions(logits, {site: seen.at(site) for site in self.sites}, self.state_rows)

    def states(self) -> Mapping[Site, Float[Tensor, "state d_model"]]:
        """States at the edited tokens, under patches and no other edit."""
        with torch.no_grad():
            return self({}).states

    def select(self, rows: Int[Tensor, " kept"]) -> "FullPass":
        """The same on some of the texts."""
        texts = [self._texts[row] for row in rows.tolist()]
        found = FullPass(self._host, self._encoder, self.edited.positions, texts, self.sites)
        found.edited.patches = self.edited.patches
        return found


def show_prompts(
    edited: EditedModel,
    encoder: Encoder,
    prompts: Sequence[tuple[int, ...]],
    recording: Recording | None = None,
) -> None:
    """Runs prompts through an edited model for what its patches, or a recording, see of them.

    Args:
        edited: The model.
        encoder: Its host's encoder.
        prompts: The prompts, padded to one batch.
        recording: Receives the states at the edited tokens.
    """
    lengths = [len(prompt) for prompt in prompts]
    batch = encoder.pad(prompts, lengths, side="right", device=input_device(edited.host))
    edited(
        batch.input_ids,
        batch.attention_mask,
        n_prompt_tokens=batch.n_prompt_tokens,
        recording=recording,
        use_cache=False,
        logits_to_keep=1,  # they are of no interest
    )


def with_parts(
    edited: EditedModel, sites: Sequence[Site], parts: Mapping[Site, Parts], own: Own | None
) -> EditedModel:
    """The model with these interventions, and the others that a row has to itself."""
    edited.interventions = {site: parts.get(site, ()) for site in sites}
    return edited if own is None else edited.apart(*own)


_verdicts: "WeakKeyDictionary[Any, dict[object, str | None]]" = WeakKeyDictionary()


def why_full(
    host: Host, encoder: Encoder, positions: PositionSpec, texts: Sequence[EncodedEdit], sites: Sequence[Site]
) -> str | None:
    """Why a host cannot be run by `SuffixPass`, or None if it can.

    It is tried out against the full pass, on two prompts of unequal length that begin alike, so that there
    are prefixes, shared ones, and padding among them: once for a host, the first edited layer, and what
    others have hung on the host. Patches of single modules make no difference. What broke off for a reason
    that may pass is tried again.
    """
    from baft.hosts.suffix import LEAST_SHARED, SuffixPass

    known = _verdicts.setdefault(host.model, {})
    asked = (min(sites).layer, active_adapters(host.model), n_hooks(host.model))
    if asked in known:
        return known[asked]
    ids = (*texts[0].prompt_ids, *texts[0].target_ids)
    n = LEAST_SHARED + positions.last_prompt + 2
    target = texts[0].target_ids[:2]
    trial = [EncodedEdit(tuple(islice(cycle(ids), longer)), target) for longer in (n, n + 3)]
    given = (host, encoder, positions, trial, sites)
    try:
        with torch.no_grad():
            full, quick = (one(*given)({}).logits.float().cpu() for one in (FullPass, SuffixPass))
        apart = ((full - quick).abs().max() / full.std()).item()
        why = None if apart < _tolerance(host) else f"both passes differ by {apart:.2g} of the spread"
        known[asked] = why
    except torch.OutOfMemoryError:
        raise  # it says nothing about the host
    except UnsupportedHostError as error:
        why = known[asked] = f"{type(error).__name__}: {error}"
    except Exception as error:  # whatever a host's own code may say to being run in parts
        why = f"{type(error).__name__}: {error}"
    if why is not None:
        logger.info("%s is trained by full passes: %s", host.name, why)
    return why


def _tolerance(host: Host) -> float:
    """Of the logits' standard deviation; a wrong mask or position is off by a hundredth at least."""
    return 0.1 if host.model.dtype.itemsize < 4 else 1e-3
