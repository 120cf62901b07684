"""BaFT, and ReFT as the same editor with open gates.

Source: BaFT (arXiv 2503.00306). A request is trained by `CE + lambda_bal R_bal + lambda_loc R_loc` while
the host stays frozen. Edits keep their bases in one of two ways (`bases.py`): shared, the paper's mode, or
own, with gates in closed form.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from baft.errors import ConfigError, DamagedArtifactError, InputError
from baft.hosts.architecture import Site, default_layers, find_architecture
from baft.hosts.background import Background, background, prompt_states
from baft.hosts.edited_model import EditedModel, Recording
from baft.hosts.encoding import EncodedEdit, Encoder
from baft.hosts.models import Host
from baft.hosts.positions import PositionSpec
from baft.methods.baft_config import DEFAULT, PAPER, BaftConfig
from baft.methods.base import Capability, Editor, EditOutcome, GateReading, OnStep
from baft.methods.bases import Bases, Frame, OwnBases, SharedBases
from baft.methods.training import FullPass, train
from baft.nn.orthonormal import check_rank
from baft.types import EditRequest


class BaftEditor(Editor):
    """Basis-level representation fine-tuning: gated edits of hidden states.

    Args:
        host: The host; never changed.
        config: The settings.
        seed: Of the random bases.

    Raises:
        ConfigError: If a layer or the rank does not fit the host.
    """

    name: ClassVar[str] = "baft"
    summary: ClassVar[str] = "gated edits of hidden states along a few orthonormal bases (Liu et al. 2025)"
    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.BATCH, Capability.SEQUENTIAL, Capability.EXACT_UNDO}
    )
    presets: ClassVar[Mapping[str, BaftConfig]] = {
        "default": DEFAULT,
        "paper": PAPER,
        "paper-rloc": replace(PAPER, locality=0.1),
    }
    config: BaftConfig

    def __init__(self, host: Host, config: BaftConfig, *, seed: int = 0):
        super().__init__(host, config, seed=seed)
        self.trains_eos = config.train_eos
        architecture = find_architecture(host.model)
        layers = config.layers
        if layers is None:
            layers = default_layers(architecture.n_layers)
            layers = layers[-config.deepest_layers :] if config.deepest_layers else layers
        self.sites = tuple(Site(layer) for layer in sorted(layers))
        for site in self.sites:
            architecture.block(site)
        check_rank(config.rank, architecture.d_model)
        self.encoder = Encoder.for_host(host, max_tokens=architecture.max_positions)
        self._edited = EditedModel(host.model, {}, PositionSpec(config.last_prompt, config.outputs))
        self._frame = Frame(host, config, self.sites, architecture.d_model, seed)
        self._bases = self._no_bases()

    @property
    def edited(self) -> EditedModel:
        """The host with the edits in force."""
        return self._edited

    def apply(self, request: EditRequest, *, on_step: OnStep | None = None) -> EditOutcome:
        """Makes the edits of a request; nothing changes unless all of it succeeds."""
        began = time.monotonic()
        texts = self._texts(request)
        run = FullPass(self.host, self.encoder, self._edited.positions, texts, self.sites)
        negatives = self._negatives(request)
        trained = self._bases.start(request, run, texts, negatives)
        penalty = self._bases.penalty(trained, negatives, len(self.requests) + 1)
        result = train(run, trained, self._bases.beside(), self.config, penalty=penalty, on_step=on_step)
        kept, requests = self._bases.state, self.requests
        try:
            self._bases.commit(run, trained)
            self.requests = (*requests, request)
            self._edited.interventions = self._bases.in_force()
        except BaseException:  # Ctrl-C between two of these lines
            self._bases.state, self.requests = kept, requests
            self._edited.interventions = self._bases.in_force()
            raise
        n_rows = len(texts) // len(request.edits)
        margins = tuple(min(result.margins[i : i + n_rows]) for i in range(0, len(texts), n_rows))
        return EditOutcome(
            edit_ids=tuple(edit.id for edit in request.edits),
            decoded=tuple(margin > 0 for margin in margins),
            margins=margins,
            losses=result.losses,
            n_steps=result.n_steps,
            stopped=result.stopped,
            seconds_s=time.monotonic() - began,
        )

    def undo(self, n: int = 1) -> tuple[EditRequest, ...]:
        """Takes the last `n` requests back, every bit of them."""
        gone = self._taken_back(n)
        if n == len(self.requests):
            self.reset()
            return gone
        self._bases.undo(n)
        self.requests = self.requests[:-n]
        self._edited.interventions = self._bases.in_force()
        return gone

    def reset(self) -> None:
        """Forgets every edit."""
        self._bases.clear()
        self.requests = ()
        self._edited.interventions = {}

    def explain(self, ids: Sequence[int], n_prompt_tokens: int) -> tuple[GateReading, ...]:
        """The gates at every edited token of a sequence, by layer, edit and token."""
        row = torch.tensor([list(ids)], device=self.host.model.device)
        seen = Recording()
        with torch.no_grad():
            self._edited(row, n_prompt_tokens=row.new_tensor([n_prompt_tokens]), recording=seen)
        places = seen.masks[0][0].nonzero().flatten().tolist() if seen.masks else []
        if not places:
            return ()
        owners = self._bases.owners(self.requests)
        readings: list[GateReading] = []
        for site, (part, *_) in self._edited.interventions.items():
            weights = part.gate.weights(seen.at(site).to(part.R.dtype))
            for owner, of_edit in zip(owners, weights.unbind(1), strict=True):
                readings += [
                    GateReading(site.layer, owner, place, tuple(of_token))
                    for place, of_token in zip(places, of_edit.tolist(), strict=True)
                ]
        return tuple(readings)

    def state_dict(self) -> dict[str, Tensor]:
        """Bases and gates of every edit, and the snapshots that undo needs."""
        tensors = self._bases.tensors(self.requests)
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], requests: Sequence[EditRequest]) -> None:
        """Puts saved edits into force in place of the present ones."""
        left, bases = dict(state), self._no_bases()
        bases.load(left, requests)
        if left:
            raise DamagedArtifactError(f"tensor {min(left)!r} belongs to no edit of this set")
        self._bases, self.requests = bases, tuple(requests)
        self._edited.interventions = bases.in_force()

    def _no_bases(self) -> Bases:
        return OwnBases(self._frame) if self.config.bases == "own" else SharedBases(self._frame)

    def _texts(self, request: EditRequest) -> list[EncodedEdit]:
        """Every rendering of every edit, the renderings of one edit side by side."""
        renderings = (False, True) if self.config.chat and self.encoder.has_chat else (False,)
        texts = [
            self.encoder.edit(edit.prompt, edit.target, chat=chat, eos=self.config.train_eos)
            for edit in request.edits
            for chat in renderings
        ]
        longest, limit = max(len(text.target_ids) for text in texts), self.config.max_target_tokens
        if longest > limit:
            raise InputError(
                f"the target is {longest} tokens long, and at most {limit} are edited: shorten it, "
                "split it into several edits, or raise max_target_tokens"
            )
        return texts

    def _negatives(self, request: EditRequest) -> Background | None:
        """States at which gates shall stay shut: the background's, and those of the request's own texts."""
        if self.config.gate == "open":
            return None
        if not request.unrelated:
            return self._background
        more = prompt_states(self.host, self.encoder, self.sites, request.unrelated)
        return self._background.with_prompts(more)

    @cached_property
    def _background(self) -> Background:
        return background(self.host, self.encoder, self.sites)


class ReftEditor(BaftEditor):
    """Representation fine-tuning (LoReFT): BaFT with every gate open."""

    name: ClassVar[str] = "reft"
    summary: ClassVar[str] = "the same without gates: every basis acts on every edited token (Wu et al. 2024)"
    presets: ClassVar[Mapping[str, BaftConfig]] = {
        "default": replace(DEFAULT, bases="shared", gate="open", deepest_layers=None),
        "paper": replace(PAPER, gate="open", load_balance=0.0),
    }

    def __init__(self, host: Host, config: BaftConfig, *, seed: int = 0):
        if config.gate != "open":
            raise ConfigError(f"reft has open gates, got gate={config.gate!r}: with gates it is method baft")
        super().__init__(host, config, seed=seed)
