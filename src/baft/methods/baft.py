"""BaFT, and ReFT as the same editor with open gates.

Source: BaFT (arXiv 2503.00306). A request is trained by `CE + lambda_bal R_bal + lambda_loc R_loc` while
the host stays frozen. Edits keep their bases in one of two ways (`bases.py`): shared, the paper's mode, or
own, with gates in closed form.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from baft.errors import ConfigError, DamagedArtifactError, EditError
from baft.hosts.architecture import Site, edited_sites, find_architecture, input_device
from baft.hosts.background import Background, background, prompt_states
from baft.hosts.calls import Parts, Recording
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import EncodedEdit, Encoder
from baft.hosts.models import Host
from baft.hosts.passes import Pass
from baft.hosts.positions import PositionSpec
from baft.hosts.suffix import quickest_pass
from baft.methods.baft_config import DEFAULT, PAPER, BaftConfig
from baft.methods.base import Apart, Capability, EditOutcome, GateReading, OnStep, StackedEditor, single_edits
from baft.methods.bases import Bases, Frame, OwnBases, SharedBases
from baft.methods.optimizer import Layers
from baft.methods.texts import renderings
from baft.methods.training import TrainingResult, outcome_of, train, train_apart, train_in_batches
from baft.nn.interventions import concatenate
from baft.nn.orthonormal import check_rank
from baft.types import Edit, EditRequest


class BaftEditor(StackedEditor):
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
        {Capability.BATCH, Capability.SEQUENTIAL, Capability.EXACT_UNDO, Capability.STACKED}
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
        self.sites = edited_sites(architecture, config.layers, config.deepest_layers)
        check_rank(config.rank, architecture.d_model)
        self.encoder = Encoder.for_host(host, max_tokens=architecture.max_positions)
        self._edited = EditedModel(host.model, {}, PositionSpec(config.last_prompt, config.outputs))
        self._frame = Frame(host, config, self.sites, architecture.d_model, seed)
        self._bases = self._no_bases()
        self._named: tuple[tuple[str, ...], Background] | None = None  # the last unrelated prompts

    @property
    def edited(self) -> EditedModel:
        """The host with the edits in force."""
        return self._edited

    def apply(self, request: EditRequest, *, on_step: OnStep | None = None) -> EditOutcome:
        """Makes the edits of a request; nothing changes unless all of it succeeds."""
        began = time.monotonic()
        texts = self._texts(request.edits)
        run, why = self._run(texts)
        negatives = self._negatives(request.unrelated)
        trained = self._bases.start(request.edits, run, texts, negatives)
        beside, penalty = self._bases.beside(), self._bases.penalty(negatives, len(self.requests) + 1)
        n_rows = len(texts) // len(request.edits)
        if len(request.edits) > self.config.edits_at_once:
            edits = self._numbers(len(request.edits), n_rows)
            result = train_in_batches(
                run, trained, beside, self.config, edits, penalty=penalty, on_step=on_step
            )
        else:
            result = train(run, trained, beside, self.config, penalty=penalty, on_step=on_step)
        with self._all_or_nothing():
            self._bases.commit(run, trained)
            self.requests = (*self.requests, request)
            self._edited.interventions = self._bases.in_force()
        return outcome_of(request, result, time.monotonic() - began, why)

    def apart(self, requests: Sequence[EditRequest], *, on_step: OnStep | None = None) -> Apart:
        """Makes each edit by itself, all in one batch; none is in force afterwards."""
        outcomes, layers = self._train_apart(requests, on_step)
        others, positions = self._bases.beside(), self._edited.positions
        shown = EditedModel(self.host.model, others, positions)
        earlier = self._bases.owners(self.requests) if others else []

        def alone(number: int) -> EditedModel:
            parts: dict[Site, Parts] = {
                site: (*others.get(site, ()), part.select(torch.tensor([number], device=part.R.device)))
                for site, part in layers.items()
            }
            return EditedModel(self.host.model, parts, positions)

        def by_row(numbers: Sequence[int]) -> EditedModel:
            return shown.apart(layers, torch.tensor(numbers, device=input_device(self.host.model)))

        def explain(number: int, ids: Sequence[int], n_prompt_tokens: int) -> tuple[GateReading, ...]:
            owners = [*earlier, *self._bases.owners([requests[number]])]
            return self._readings(alone(number), owners, ids, n_prompt_tokens)

        def n_bytes(number: int) -> int:
            parts = [part for there in alone(number).interventions.values() for part in there]
            return sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())

        return Apart(outcomes, alone, by_row, explain, n_bytes)

    def apply_apart(
        self, requests: Sequence[EditRequest], *, on_step: OnStep | None = None
    ) -> tuple[EditOutcome, ...]:
        """As `apart`, and puts all of them into force together."""
        if self.config.bases == "shared":
            raise ConfigError(
                "edits that share their bases do not add up, and cannot each be trained by itself: edit in a "
                "loop, or several at once as one batch"
            )
        outcomes, layers = self._train_apart(requests, on_step)
        made = []
        for outcome in outcomes:
            if isinstance(outcome, EditError):
                raise outcome
            made.append(outcome)
        with self._all_or_nothing():
            self._bases.commit_apart(layers)
            self.requests = (*self.requests, *requests)
            self._edited.interventions = self._bases.in_force()
        return tuple(made)

    def _train_apart(
        self, requests: Sequence[EditRequest], on_step: OnStep | None
    ) -> tuple[tuple[EditOutcome | EditError, ...], Layers]:
        began = time.monotonic()
        edits = single_edits(requests)
        all_texts = self._texts(edits)  # what is wrong with any of them is known before one is trained
        n_rows = len(all_texts) // len(edits)
        negatives = self._negatives(requests[0].unrelated)
        penalty = self._bases.penalty(negatives, len(self.requests) + 1)
        results: list[TrainingResult | EditError] = []
        stacks: list[Layers] = []
        widths = [self.config.last_prompt + len(text.target_ids) for text in all_texts[::n_rows]]
        stacks_of = alike(widths, self.config.edits_at_once)
        for some in stacks_of:
            texts = [text for i in some for text in all_texts[i * n_rows : (i + 1) * n_rows]]
            run, why = self._run(texts)
            trained = self._bases.start([edits[i] for i in some], run, texts, negatives, apart=True)
            found, trained_apart = train_apart(
                run,
                trained,
                self._bases.beside(),
                self.config,
                self._numbers(len(some), n_rows),
                penalty=penalty,
                on_step=on_step,
            )
            results += found
            stacks.append(trained_apart)
        back = torch.tensor([i for some in stacks_of for i in some]).argsort()
        results = [results[i] for i in back.tolist()]
        layers = {
            site: concatenate([stack[site] for stack in stacks]).select(back.to(self._frame.device(site)))
            for site in self.sites
        }
        share = (time.monotonic() - began) / len(edits)
        outcomes = tuple(
            result if isinstance(result, EditError) else outcome_of(request, result, share, why)
            for request, result in zip(requests, results, strict=True)
        )
        return outcomes, layers

    def _run(self, texts: Sequence[EncodedEdit]) -> tuple[Pass, str | None]:
        return quickest_pass(self.host, self.encoder, self._edited.positions, texts, self.sites)

    def _numbers(self, n_edits: int, n_rows: int) -> Int[Tensor, " row"]:
        """Which edit each text belongs to."""
        return torch.arange(n_edits, device=input_device(self.host.model)).repeat_interleave(n_rows)

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Sets everything back if what is inside breaks off, such as by Ctrl-C between two lines."""
        bases, kept, requests = self._bases, self._bases.state, self.requests
        try:
            yield
        except BaseException:
            bases.state = kept
            self._bases, self.requests = bases, requests
            self._edited.interventions = bases.in_force()
            raise

    def undo(self, n: int = 1) -> tuple[EditRequest, ...]:
        """Takes the last `n` requests back, every bit of them."""
        gone = self._taken_back(n)
        if n == len(self.requests):
            self.reset()
            return gone
        with self._all_or_nothing():
            self._bases.undo(n)
            self.requests = self.requests[:-n]
            self._edited.interventions = self._bases.in_force()
        return gone

    def reset(self) -> None:
        """Forgets every edit."""
        with self._all_or_nothing():
            self._bases.clear()
            self.requests = ()
            self._edited.interventions = {}

    def explain(self, ids: Sequence[int], n_prompt_tokens: int) -> tuple[GateReading, ...]:
        """The gates at every edited token of a sequence, by layer, edit and token."""
        return self._readings(self._edited, self._bases.owners(self.requests), ids, n_prompt_tokens)

    def _readings(
        self, edited: EditedModel, owners: Sequence[str | None], ids: Sequence[int], n_prompt_tokens: int
    ) -> tuple[GateReading, ...]:
        row = torch.tensor([list(ids)], device=input_device(self.host.model))
        seen = Recording()
        with torch.no_grad():
            edited(row, n_prompt_tokens=row.new_tensor([n_prompt_tokens]), recording=seen)
        places = seen.masks[0][0].nonzero().flatten().tolist() if seen.masks else []
        if not places:
            return ()
        readings: list[GateReading] = []
        for site, parts in edited.interventions.items():
            states = seen.at(site)
            of_parts = [part.gate.weights(states.to(part.R.dtype)) for part in parts]
            weights = torch.cat(of_parts, 1)
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
        with self._all_or_nothing():
            self._bases, self.requests = bases, tuple(requests)
            self._edited.interventions = bases.in_force()

    def _no_bases(self) -> Bases:
        return OwnBases(self._frame) if self.config.bases == "own" else SharedBases(self._frame)

    def _texts(self, edits: Sequence[Edit]) -> list[EncodedEdit]:
        """Every rendering of every edit, the renderings of one edit side by side."""
        config = self.config
        return renderings(
            self.encoder,
            edits,
            chat=config.chat,
            eos=config.train_eos,
            max_target_tokens=config.max_target_tokens,
        )

    def _negatives(self, unrelated: Sequence[str]) -> Background | None:
        """States at which gates shall stay shut: the background's, and those of the user's prompts."""
        if self.config.gate == "open":
            return None
        if not unrelated:
            return self._background
        prompts = tuple(unrelated)
        if self._named is None or self._named[0] != prompts:
            more = prompt_states(self.host, self.encoder, self.sites, prompts)
            self._named = (prompts, self._background.with_prompts(more))
        return self._named[1]

    @cached_property
    def _background(self) -> Background:
        return background(self.host, self.encoder, self.sites)


def alike(widths: Sequence[int], most: int) -> list[list[int]]:
    """Stacks of edits whose texts are of like width, so that little of a step is padding.

    Args:
        widths: Of each edit, the tokens that a step runs.
        most: Edits in a stack.
    """
    found: list[list[int]] = [[]]
    order = sorted(range(len(widths)), key=lambda i: widths[i])
    for n, i in enumerate(order):
        stack, left = found[-1], len(order) - n
        is_wider = bool(stack) and widths[i] > _LIKE * widths[stack[0]]
        if len(stack) == most or (is_wider and min(len(stack), left) >= _FEWEST):
            found.append(stack := [])
        stack.append(i)
    return found


_LIKE = 1.4  # widest of a stack against its narrowest
_FEWEST = 8  # so few edits are no stack: each step would read all weights for them alone


class ReftEditor(BaftEditor):
    """Representation fine-tuning (LoReFT): BaFT with every gate open.

    The rate of `default` is the best of three, single edits and sequences of twelve together, on training
    cases of zsRE and CounterFact, on SmolLM2.
    """

    name: ClassVar[str] = "reft"
    summary: ClassVar[str] = "the same without gates: every basis acts on every edited token (Wu et al. 2024)"
    presets: ClassVar[Mapping[str, BaftConfig]] = {
        "default": replace(DEFAULT, bases="shared", gate="open", deepest_layers=None, learning_rate=2e-3),
        "paper": replace(PAPER, gate="open", load_balance=0.0),
    }

    def __init__(self, host: Host, config: BaftConfig, *, seed: int = 0):
        if config.gate != "open":
            raise ConfigError(f"reft has open gates, got gate={config.gate!r}: with gates it is method baft")
        super().__init__(host, config, seed=seed)
