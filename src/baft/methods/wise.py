"""WISE, a side memory beside one weight, and a router between the two: `wise`.

Sources: Wang et al. 2024 (arXiv 2405.14768), section 2 and algorithms 1 and 2; EasyEdit
(https://github.com/zjunlp/EasyEdit, `models/wise`, `hparams/WISE/llama-7b.yaml`) for the settings, and where
it says more. Its steps, and where they are done:

1. The main memory is the down-projection `W` of one layer, 27 of 32 moved to the host's depth; the side
   memory is a copy `W'` of it. Kept is the change `W' - W`, so that the host's weight is never touched.
2. The activation of a text is the mean, over the tokens of its *prompt*, of `|| A(x) (W' - W) ||`, `A(x)`
   being the module's input: `activations`. (EasyEdit takes the mean over target and padding, too, and puts
   both outputs through the host's activation function first; the paper has neither.)
3. The loss is the cross-entropy of the target under the side memory, for the prompt by itself and behind
   openings that the host makes up, plus `max(0, act(x_i) - alpha) + max(0, beta - act(x_e)) +
   max(0, gamma - (act(x_e) - act(x_i)))`, averaged over texts `x_e` of the edit and irrelevant ones `x_i`:
   `WiseEditor.fit`, `margin_loss`.
4. Edits go into shards of `save_freq` each. A shard is a side memory of its own, of whose numbers a random
   share `mask_ratio` is trained: `mask_of`, `shard_sizes`.
5. The threshold of a shard is the least activation of its edits, each taken when it was made:
   `WiseEditor.fit`.
6. Full shards are merged by TIES (`baft.nn.ties`): all of them into one memory (`memory="merge"`,
   WISE-Merge), or every `shards` of them (`"retrieve"`, WISE-Retrieve). The shard that is being filled is a
   memory by itself, as in EasyEdit. A merged memory has the least threshold of its shards:
   `WiseEditor.memories`.
7. The router: of the memories whose activation is at least `act_ratio` of their threshold, the one with the
   greatest; where there is none, the host's own output, bit for bit. It decides once for a prompt, and the
   reply follows: `WisePatch`. (EasyEdit decides anew at each token of a cached reply.)

What differs: the threshold is set by the prompts themselves, not by those behind openings, so that they are
routed to their memory. Irrelevant texts are the request's `unrelated` and the project's background prompts;
the authors give one question of a training set with each edit. Each hinge is averaged over all texts, as in
the paper, not over those that miss it, as in EasyEdit. Weight decay (1e-5) and replay (appendix B.3) are left
out. Where shards fill up after a merge, EasyEdit mixes the new with the old at 0.4 to 0.6; here all are
merged anew.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from baft.errors import ConfigError, UnsupportedHostError
from baft.hosts.architecture import find_architecture, intervention_dtype, scaled_layers
from baft.hosts.background import background_text, fitting
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import EncodedEdit
from baft.hosts.models import Host
from baft.hosts.passes import Pass, Predictions, show_prompts
from baft.hosts.patches import DeltaPatch
from baft.hosts.speaking import Speaker
from baft.methods.base import EditOutcome, OnStep
from baft.methods.descent import Descent, bounded
from baft.methods.optimizer import DescentConfig
from baft.methods.stateful import DownProjectionEditor, Layout, State
from baft.methods.texts import renderings
from baft.methods.training import outcome_of
from baft.methods.wise_parts import (
    Memory,
    PromptReader,
    PromptStates,
    WisePatch,
    activations,
    margin_loss,
    mask_of,
    shard_sizes,
)
from baft.nn.ties import ties
from baft.types import EditRequest

THRESHOLDS = "thresholds"
N_BACKGROUND = 64  # background prompts that irrelevant texts are drawn from, raw and chat each
_OPENERS = ("I", "You", "Because", "Yes", "Q:")  # EasyEdit's, and the lengths of what the host adds to them
_OPENING_TOKENS = (5, 10)
_ROWS = 16  # prompts the host reads at once
_CONTENT = 0.02  # what may be left of the margins' loss at the end; EasyEdit's bound of the whole loss


@dataclass(frozen=True, kw_only=True)
class WiseConfig(DescentConfig):
    """Settings of `wise`.

    Args:
        layer: The decoder block whose down-projection has side memories, counted from 0; None for the
            published layer 27 of 32, moved to the host's depth.
        optimizer: By what shards are trained.
        norm_bound: Most that any number of the weight may move in all, or None for no bound.
        alpha: The most that the activation of irrelevant texts shall be.
        beta: The least that that of an edit shall be.
        gamma: The least distance between the two.
        act_ratio: The share of its threshold that an activation must reach to be routed to a memory.
        mask_ratio: The share of a shard's numbers that is trained.
        save_freq: Edits that fill a shard.
        shards: Full shards that make up a memory where memories are retrieved.
        memory: One memory of all full shards, or several.
        density: The share of each shard's numbers that a merge keeps.
        n_openings: Openings behind which an edit's prompt is trained, too; at most 10.
        n_irrelevant: Irrelevant texts beside an edit; the request's own `unrelated` come on top.
        chat: Whether the chat rendering is trained beside the raw one.
        train_eos: Whether the target's end is trained.

    Raises:
        ConfigError: If a value is out of range.
    """

    layer: int | None = None
    optimizer: Literal["adam", "sgd"] = "sgd"
    norm_bound: float | None = 1.0
    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0
    act_ratio: float = 0.88
    mask_ratio: float = 0.2
    save_freq: int = 500
    shards: int = 2
    memory: Literal["merge", "retrieve"] = "merge"
    density: float = 0.53
    n_openings: int = 10
    n_irrelevant: int = 1
    chat: bool = False
    train_eos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("norm_bound", "alpha", "beta", "gamma"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number, got {value}")
        for name, most in (("act_ratio", 0.999), ("mask_ratio", 1.0), ("density", 1.0)):
            if not 0 < getattr(self, name) <= most:  # routing compares rounded numbers: not 1 exactly
                raise ConfigError(f"{name} must be above 0 and at most {most}, got {getattr(self, name)}")
        for name in ("save_freq", "shards", "n_irrelevant"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        most_openings = len(_OPENERS) * len(_OPENING_TOKENS)
        if not 0 <= self.n_openings <= most_openings:
            raise ConfigError(f"n_openings must be from 0 to {most_openings}, got {self.n_openings}")


PAPER = WiseConfig(
    learning_rate=1.0,
    schedule="constant",
    max_steps=70,
    stop_loss=0.02,
    stop_margin=None,
    memory="retrieve",
)


class WiseEditor(DownProjectionEditor):
    """Side memories beside one down-projection.

    Args:
        host: The host; never changed.
        config: The settings.
        seed: Of the masks, and of which irrelevant texts stand beside an edit.

    Raises:
        ConfigError: If the host has no such layer.
        UnsupportedHostError: If the layer has no down-projection of its own.
    """

    name: ClassVar[str] = "wise"
    summary: ClassVar[str] = "side memories beside one matrix, and a router (Wang et al. 2024)"
    presets: ClassVar[Mapping[str, WiseConfig]] = {
        "default": replace(
            PAPER,
            optimizer="adam",
            memory="merge",
            learning_rate=0.03,
            stop_loss=None,
            stop_margin=4.0,
            act_ratio=0.5,
            n_openings=2,
            n_irrelevant=32,
            chat=True,
            train_eos=True,
        ),
        "paper": PAPER,
    }
    config: WiseConfig

    def __init__(self, host: Host, config: WiseConfig, *, seed: int = 0):
        [moved] = scaled_layers((27,), of=32, n_layers=find_architecture(host.model).n_layers)
        super().__init__(host, config, moved if config.layer is None else config.layer, seed=seed)
        self.trains_eos = config.train_eos

    def fit(
        self, request: EditRequest, state: State, on_step: OnStep | None
    ) -> tuple[Mapping[str, Tensor], EditOutcome]:
        """Trains the shard that the edits fall into, going on from the edits that are in it."""
        began = time.monotonic()
        config = self.config
        texts, n_own = self._texts(request)
        n_rows = len(texts) // len(request.edits)
        shown, why = self.pass_over(texts)
        of_texts, irrelevant = self._read(shown), self._irrelevant(request)
        number = len(self._sizes((*self.requests, request))) - 1
        name = _shard(number)
        mask = mask_of(self.shape, config.mask_ratio, self.seed, number).to(of_texts.states.device)
        delta = of_texts.states.new_zeros(self.shape)
        if name in state:
            delta.copy_(state[name])
        delta.requires_grad_().register_hook(lambda gradient: gradient * mask)
        shown.edited.patches = {self.module: DeltaPatch([delta])}
        left = math.inf

        def loss(cross_entropy: Float[Tensor, ""], seen: Predictions) -> Float[Tensor, ""]:
            nonlocal left
            acts = activations(delta, of_texts), activations(delta, irrelevant)
            margins = margin_loss(*acts, config.alpha, config.beta, config.gamma)
            left = margins.item()
            return cross_entropy + margins.to(cross_entropy)

        descent = Descent(
            [delta],
            config,
            loss,
            bounded(delta, config.norm_bound),
            may_stop=lambda: left <= _CONTENT,
            by=config.optimizer,
        )
        result = descent.run(shown, on_step)
        with torch.no_grad():
            least = activations(delta, of_texts).view(-1, n_rows)[:, :n_own].min()
        thresholds = state[THRESHOLDS].tolist() if state else []
        thresholds[number:] = [min([*thresholds[number:], least.item()])]
        made = {**state, name: delta, THRESHOLDS: least.new_tensor(thresholds)}
        return made, outcome_of(request, result, time.monotonic() - began, why)

    def put(self, edited: EditedModel, state: State, requests: Sequence[EditRequest]) -> None:
        """The memories, and the router."""
        edited.patches = {self.module: WisePatch(self.memories(state, requests))} if state else {}

    def layout(self, requests: Sequence[EditRequest], state: State) -> Layout:
        """A matrix of the weight's shape for every shard, and the shards' thresholds."""
        n = len(self._sizes(requests))
        return {THRESHOLDS: (n,), **{_shard(number): self.shape for number in range(n)}}

    def memories(self, state: State, requests: Sequence[EditRequest]) -> list[Memory]:
        """What shards make up: merged ones, and the one that is being filled."""
        config, device = self.config, self.device
        sizes = self._sizes(requests)
        full = [number for number, size in enumerate(sizes) if size >= config.save_freq]
        n_merged = len(full) if config.memory == "merge" else len(full) - len(full) % config.shards
        at_once = max(1, n_merged) if config.memory == "merge" else config.shards
        groups = [full[i : min(i + at_once, n_merged)] for i in range(0, n_merged, at_once)]
        groups += [[number] for number in range(n_merged, len(sizes))]
        found = []
        for group in groups:
            deltas = [state[_shard(number)].to(device) for number in group]
            delta = ties(deltas, config.density) if len(group) > 1 else deltas[0]
            least = min(state[THRESHOLDS][number].item() for number in group)
            found.append(Memory(delta, config.act_ratio * least))
        return found

    def _sizes(self, requests: Sequence[EditRequest]) -> list[int]:
        return shard_sizes([len(one.edits) for one in requests], self.config.save_freq)

    def _texts(self, request: EditRequest) -> tuple[list[EncodedEdit], int]:
        """What each edit is trained on, side by side, and how many of these are its own renderings."""
        config, texts, n_own = self.config, [], 0
        for edit in request.edits:
            own = renderings(self.encoder, [edit], chat=config.chat, eos=config.train_eos)
            behind = [replace(edit, prompt=f"{opening} {edit.prompt}") for opening in self._openings]
            more = renderings(self.encoder, behind, chat=False, eos=config.train_eos) if behind else []
            texts += [*own, *more]
            n_own = len(own)
        return texts, n_own

    @cached_property
    def _openings(self) -> tuple[str, ...]:
        """Beginnings of texts as the host goes on with them, short ones first."""
        if not self.config.n_openings:
            return ()
        speaker = Speaker(self.host)
        rows = [self.encoder.prompt(opener) for opener in _OPENERS]
        replies = speaker.replies(EditedModel(self.host.model), rows, max(_OPENING_TOKENS))
        found = [
            f"{opener}{speaker.text(reply[:n])}".strip()
            for n in _OPENING_TOKENS
            for opener, reply in zip(_OPENERS, replies, strict=True)
        ]
        return tuple(found[: self.config.n_openings])

    @cached_property
    def _background(self) -> PromptStates:
        """What the module is given on background prompts."""
        text = background_text()
        step = max(1, len(text["prompts"]) // N_BACKGROUND)  # all templates, not the first few
        rows = fitting(self.encoder.prompt, text["prompts"][::step][:N_BACKGROUND])
        if self.encoder.has_chat:
            rows += fitting(self._as_chat, text["chat_prompts"][:N_BACKGROUND])
        return self._read_rows(sorted(rows, key=len))

    def _as_chat(self, prompt: str) -> tuple[int, ...]:
        return self.encoder.chat([{"role": "user", "content": prompt}])

    def _irrelevant(self, request: EditRequest) -> PromptStates:
        """What the module is given on texts that the edit is not about."""
        known = self._background
        seed = (self.seed * 0x9E3779B97F4A7C15 + int(request.edits[0].id, 16)) % (1 << 63)
        order = torch.randperm(known.n_rows, generator=torch.Generator().manual_seed(seed))
        drawn = known.select(order[: self.config.n_irrelevant].tolist())
        if not request.unrelated:
            return drawn
        rows = [self.encoder.prompt(text) for text in request.unrelated]
        if self.config.chat and self.encoder.has_chat:
            rows += [self._as_chat(text) for text in request.unrelated]
        return drawn.and_more(self._read_rows(rows))

    @torch.no_grad()
    def _read_rows(self, rows: Sequence[tuple[int, ...]]) -> PromptStates:
        """What the module is given at the tokens of some prompts."""
        found: PromptStates | None = None
        reader = PromptReader()
        watched = EditedModel(self.host.model, positions=self.positions)
        watched.patches = {self.module: reader}
        for start in range(0, len(rows), _ROWS):
            show_prompts(watched, self.encoder, rows[start : start + _ROWS])
            here = self._kept(reader)
            found = here if found is None else found.and_more(here)
        if found is None:
            raise UnsupportedHostError(
                f"this host's context of {self.encoder.max_tokens} tokens is shorter than every background "
                "prompt: wise needs texts that an edit is not about"
            )
        return found

    @torch.no_grad()
    def _read(self, shown: Pass) -> PromptStates:
        """What the module is given at the tokens of the prompts of a pass."""
        reader = PromptReader()
        shown.edited.patches = {self.module: reader}
        shown({})
        return self._kept(reader)

    def _kept(self, reader: PromptReader) -> PromptStates:
        assert reader.seen is not None, "the pass ran the module"
        return reader.seen.to(intervention_dtype(self.host.model))


def _shard(number: int) -> str:
    return f"shard{number}"
