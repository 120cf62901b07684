"""GRACE, a codebook of states and what to put in their place: `grace`.

Sources: Hartvigsen et al. 2023 (arXiv 2211.11031), section 2 and algorithm 1; their code
(https://github.com/Thartvigsen/GRACE, `grace/editors/grace.py`) where it says more; the settings of EasyEdit
(https://github.com/zjunlp/EasyEdit, `hparams/GRACE/llama-7b.yaml`). Its steps, and where they are done:

1. One module of one layer is wrapped: the down-projection of layer 27 of 32, moved to the host's depth.
   `GraceEditor.__init__`.
2. The key of an edit is the *input of that module* at the last prompt token, as in the code; the paper writes
   `h^{l-1}`, the input of the layer. `GraceEditor._queries`.
3. The codebook takes the key in (`taken_in`). With `d` the distance to the nearest key, `r` that key's radius
   and `epsilon` the radius of a new key:
   - add, where `d > r + epsilon`: a new key of radius `epsilon`;
   - expand, where the nearest key has the same target: its radius becomes `max(r, d)`, here with room for
     rounding behind `d`, and no key is added;
   - split, where it has another target: a new key of radius `d / 2`, and the old radius becomes a hair less
     than that (in the code as here, even where it was smaller before).
4. The value, a vector in place of the module's output, begins as random numbers from [0, 1) ("cold") or as
   the module's output ("warm"). Adam trains it on the cross-entropy of the target, through the codebook as it
   then is: an edit that expands a key trains that key's value on. `GraceEditor.fit`.
5. At inference the nearest key is looked up; within its radius the value takes the place of the output, and
   else nothing happens, bit for bit. `Codebook.lookup`, `CodebookPatch`. EasyEdit puts it at the last prompt
   token, the authors' own experiments with GPT-2 XL at the whole prompt: `replacement`.

What differs: targets are compared as text (the code compares the means of their token ids). An edit whose
state is an old key's, to rounding, takes that key over: split by the rule, both would have the radius zero.
All edits asked for are made; the authors make those alone that the model gets wrong. Tokens of the reply are
not looked up: keys are states of last prompt tokens. (The code does look them up in a cached generation, and
does not in training.)
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from baft.errors import ConfigError
from baft.hosts.architecture import find_architecture, intervention_dtype, scaled_layers
from baft.hosts.edited_model import EditedModel
from baft.hosts.models import Host
from baft.hosts.passes import Pass
from baft.hosts.patches import Seen
from baft.hosts.positions import PositionSpec
from baft.methods.base import EditOutcome, OnStep
from baft.methods.descent import Descent
from baft.methods.optimizer import DescentConfig
from baft.methods.stateful import DownProjectionEditor, Layout, State
from baft.methods.texts import renderings
from baft.methods.training import outcome_of
from baft.types import EditRequest

KEYS, VALUES, RADII, OWNERS = "keys", "values", "radii", "owners"
GAP = 1e-5  # by which the radii of two keys that were split stay apart; the published code's
# States of one prompt, alone and in a padded batch, differ by less: by so many times the host's precision,
# and in half precision, where that is more than whole states, by this share of a state's length. SmolLM2's
# differ by 2e-6 in float32, 0.003 in float16 and 0.02 in bfloat16 (log, 2026-11-28).
_ROUNDING, _MOST_ROUNDING = 1e3, 0.05


@dataclass(frozen=True, kw_only=True)
class GraceConfig(DescentConfig):
    """Settings of `grace`.

    Args:
        layer: The decoder block whose down-projection is wrapped, counted from 0; None for the published
            layer 27 of 32, moved to the host's depth; never the last, whence a value reaches one token alone.
        epsilon: The radius of a new key.
        epsilon_unit: Whether that is a Euclidean distance, or a share of the key's length.
        start: What a value is trained from: random numbers from [0, 1), or the module's own output.
        replacement: Where the value is put: at the last prompt token, or at all of the prompt.
        chat: Whether the chat rendering gets a key of its own, beside the raw one.
        train_eos: Whether the target's end is trained.

    Raises:
        ConfigError: If a value is out of range.
    """

    layer: int | None = None
    epsilon: float = 1.0
    epsilon_unit: Literal["distance", "key_length"] = "distance"
    start: Literal["cold", "warm"] = "cold"
    replacement: Literal["last", "prompt"] = "last"
    chat: bool = False
    train_eos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ConfigError(f"epsilon must be a positive number, got {self.epsilon}")


@dataclass(frozen=True, slots=True)
class Codebook:
    """Keys, and what stands in their place.

    Args:
        keys: States, `[key, d_in]`.
        values: What takes the place of the module's output there, `[key, d_out]`.
        radii: How far from each key its value holds, in Euclidean distance, `[key]`.
    """

    keys: Float[Tensor, "key d_in"]
    values: Float[Tensor, "key d_out"]
    radii: Float[Tensor, " key"]

    def nearest(
        self, queries: Float[Tensor, "query d_in"]
    ) -> tuple[Float[Tensor, " query"], Int[Tensor, " query"]]:
        """The distance to the nearest key of each query, and which key that is."""
        # Not by products, which lose the small distances of long vectors.
        apart = torch.cdist(queries, self.keys, compute_mode="donot_use_mm_for_euclid_dist")
        distances, found = apart.min(-1)
        return distances, found

    def lookup(
        self, queries: Float[Tensor, "query d_in"]
    ) -> tuple[Int[Tensor, " query"], Bool[Tensor, " query"]]:
        """The nearest key of each query, and whether the query lies within its radius."""
        distances, found = self.nearest(queries)
        return found, distances <= self.radii[found]


def taken_in(
    book: Codebook,
    key: Float[Tensor, " d_in"],
    value: Float[Tensor, " d_out"],
    epsilon: float,
    rounding: float,
    has_target: Sequence[bool],
) -> tuple[Codebook, int]:
    """The codebook with one more edit, and the key that answers for it; step 3 above.

    Args:
        book: The codebook.
        key: The edit's state.
        value: What its value is trained from, should it get a key of its own.
        epsilon: The radius of a new key.
        rounding: Distance up to which two states are one and the same, however they are batched; a radius
            that is to hold a state reaches as far beyond it.
        has_target: Whether each of the keys has the same target as this edit.
    """
    radius = epsilon
    radii = book.radii
    if len(book.keys):
        distances, places = book.nearest(key.unsqueeze(0))
        distance, place = distances.item(), int(places)
        is_same = distance <= rounding
        if is_same or distance <= radii[place].item() + epsilon:
            radii = radii.clone()
            if is_same or has_target[place]:
                radii[place] = max(radii[place].item(), distance + rounding)
                return Codebook(book.keys, book.values, radii), place
            radius = distance / 2
            radii[place] = radius - GAP
    keys = torch.cat([book.keys, key.unsqueeze(0)])
    values = torch.cat([book.values, value.unsqueeze(0)])
    return Codebook(keys, values, torch.cat([radii, radii.new_tensor([radius])])), len(keys) - 1


class CodebookPatch:
    """Puts values in place of a module's output where a key is near.

    Args:
        book: The codebook.
        replacement: Where: at the token looked up, or at the whole prompt if that is its only one.
    """

    def __init__(self, book: Codebook, replacement: Literal["last", "prompt"] = "last"):
        self.book = book
        self.replacement = replacement

    def __call__(
        self,
        module: nn.Module,
        inputs: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        seen: Seen,
    ) -> Float[Tensor, "*batch d_out"] | None:
        """The output with values where there is a key for the input; None where there is none."""
        book = self.book
        queries, where = _selected(inputs, seen)
        if not len(queries) or not len(book.keys):
            return None
        found, inside = book.lookup(queries.to(book.keys))
        if not bool(inside.any()):
            return None
        where, found = where[inside], found[inside]
        if self.replacement == "prompt":
            where, found = _over_prompts(where, found, seen)
        flat = output.reshape(-1, output.shape[-1])
        values = book.values[found].to(flat)
        return flat.index_copy(0, where.to(flat.device), values).view_as(output)


def _selected(
    inputs: Float[Tensor, "*batch d_in"], seen: Seen
) -> tuple[Float[Tensor, "query d_in"], Int[Tensor, " query"]]:
    """The inputs at the edited tokens, and where these are among all tokens."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    where = seen.edited.flatten().nonzero()[:, 0].to(flat.device)
    return flat[where], where


def _over_prompts(
    where: Int[Tensor, " query"], found: Int[Tensor, " query"], seen: Seen
) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"]]:
    """Every token of the prompts whose one edited token is among these; elsewhere the token itself."""
    width = seen.edited.shape[1]
    row_of_key = where.new_full((seen.edited.shape[0],), -1)
    row_of_key[where // width] = found
    is_known = (seen.edited.sum(-1) == 1).to(where.device) & (row_of_key >= 0)
    tokens = seen.prompt.to(where.device) & is_known.unsqueeze(-1)
    whole = tokens.flatten().nonzero()[:, 0]
    alone = ~is_known[where // width]
    return torch.cat([whole, where[alone]]), torch.cat([row_of_key[whole // width], found[alone]])


class _Reader:
    """Keeps what a module is given and puts out at the edited tokens, and changes nothing."""

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: Tensor, output: Tensor, seen: Seen) -> None:
        self.inputs, where = _selected(inputs, seen)
        self.outputs = output.reshape(-1, output.shape[-1])[where]


class GraceEditor(DownProjectionEditor):
    """A codebook at one layer.

    Args:
        host: The host; never changed.
        config: The settings.
        seed: Of the values' random start.

    Raises:
        ConfigError: If the host has no such layer.
        UnsupportedHostError: If the layer has no down-projection of its own.
    """

    name: ClassVar[str] = "grace"
    summary: ClassVar[str] = "a codebook of states and replaced outputs (Hartvigsen et al. 2023)"
    presets: ClassVar[Mapping[str, GraceConfig]] = {
        "default": GraceConfig(
            learning_rate=3.0,
            schedule="constant",
            max_steps=50,
            stop_margin=4.0,
            epsilon=0.4,
            epsilon_unit="key_length",
            chat=True,
            train_eos=True,
        ),
        "paper": GraceConfig(learning_rate=1.0, schedule="constant", max_steps=50, stop_margin=None),
    }
    positions: ClassVar[PositionSpec] = PositionSpec(last_prompt=1, outputs=False)
    config: GraceConfig

    def __init__(self, host: Host, config: GraceConfig, *, seed: int = 0):
        n_layers = find_architecture(host.model).n_layers
        [moved] = scaled_layers((27,), of=32, n_layers=n_layers)
        below_the_last = min(max(0, n_layers - 2), moved)
        super().__init__(host, config, below_the_last if config.layer is None else config.layer, seed=seed)
        self.trains_eos = config.train_eos

    def fit(
        self, request: EditRequest, state: State, on_step: OnStep | None
    ) -> tuple[Mapping[str, Tensor], EditOutcome]:
        """Takes the edits into the codebook, one after the other, and trains the values they fall to."""
        began = time.monotonic()
        config = self.config
        texts = renderings(self.encoder, request.edits, chat=config.chat, eos=config.train_eos)
        n_rows = len(texts) // len(request.edits)
        shown, why = self.pass_over(texts)
        keys, outputs = self._queries(shown)
        targets = [edit.target.strip() for one in (*self.requests, request) for edit in one.edits]
        n_before = len(targets) - len(request.edits)
        book, owners = self._book(state), state[OWNERS].tolist() if state else []
        starts = self._starts(outputs, n_before)
        for row, key in enumerate(keys):
            edit = n_before + row // n_rows
            same = [targets[int(owner)] == targets[edit] for owner in owners]
            length = key.norm().item()
            epsilon = config.epsilon * (length if config.epsilon_unit == "key_length" else 1.0)
            rounding = min(_ROUNDING * torch.finfo(self.host.model.dtype).eps, _MOST_ROUNDING) * length
            book, place = taken_in(book, key, starts[row], epsilon, rounding, same)
            owners[place:] = [edit, *owners[place + 1 :]]
        values = book.values.clone().requires_grad_()
        trained = Codebook(book.keys, values, book.radii)
        shown.edited.patches = {self.module: CodebookPatch(trained, config.replacement)}
        result = Descent([values], config).run(shown, on_step)
        made = {KEYS: book.keys, VALUES: values, RADII: book.radii}
        made[OWNERS] = torch.tensor(owners, device=values.device)
        return made, outcome_of(request, result, time.monotonic() - began, why)

    def put(self, edited: EditedModel, state: State, requests: Sequence[EditRequest]) -> None:
        """The codebook is looked up at the last prompt token."""
        patch = CodebookPatch(self._book(state), self.config.replacement)
        edited.patches = {self.module: patch} if state else {}

    def layout(self, requests: Sequence[EditRequest], state: State) -> Layout:
        """As many rows of each table as there are keys."""
        d_out, d_in = self.shape
        n = len(state[KEYS]) if KEYS in state and state[KEYS].ndim else None
        return {KEYS: (n, d_in), VALUES: (n, d_out), RADII: (n,), OWNERS: (n,)}

    def _book(self, state: State) -> Codebook:
        """What a table says, where the module runs; an empty codebook of an empty table."""
        if state:
            return Codebook(*(state[name].to(self.device) for name in (KEYS, VALUES, RADII)))
        d_out, d_in = self.shape
        nothing = torch.zeros(0, d_in + d_out, dtype=intervention_dtype(self.host.model), device=self.device)
        return Codebook(nothing[:, :d_in], nothing[:, d_in:], nothing[:, 0])

    @torch.no_grad()
    def _queries(self, shown: Pass) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, "row d_out"]]:
        """What the module is given, and what it puts out, at the last prompt token of every text."""
        reader = _Reader()
        shown.edited.patches = {self.module: reader}
        shown({})
        assert reader.inputs is not None, "the pass ran the module"
        assert reader.outputs is not None, "the pass ran the module"
        dtype = intervention_dtype(self.host.model)
        return reader.inputs.to(dtype), reader.outputs.to(dtype)

    def _starts(self, outputs: Float[Tensor, "row d_out"], n_before: int) -> Float[Tensor, "row d_out"]:
        """What values are trained from; the same for the same seed and number of edits before."""
        if self.config.start == "warm":
            return outputs
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + n_before) % (1 << 63))
        return torch.rand(outputs.shape, generator=generator, dtype=outputs.dtype).to(outputs.device)
