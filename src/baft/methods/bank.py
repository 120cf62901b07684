"""`baft-bank`: every edit has bases of its own, acts on prompts inside its scope, and on nothing else.

BaFT's intervention (arXiv 2503.00306, section 3) with `w_k(h | prompt) = scope(prompt)`, one or zero: which
edit a prompt is about, if any, is decided once, on early states of the frozen host (`baft.scope`), and held
for all that is said in reply. So edits do not know each other: each is trained alone, on the bare host; where
several could be meant, the likeliest acts; where none is, the host runs as if there were no edits. Our own
construction, after the trial in METHOD.md, section 5.
"""

import dataclasses
import logging
import random
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar, final

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from baft.errors import DamagedArtifactError, EditError, InputError
from baft.hosts.architecture import Site, edited_sites, find_architecture, input_device, site_device
from baft.hosts.background import background_text
from baft.hosts.calls import Stack
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import EncodedEdit
from baft.hosts.models import Host
from baft.hosts.positions import PositionSpec
from baft.hosts.suffix import quickest_pass
from baft.hosts.turns import Row
from baft.methods.baft import alike
from baft.methods.bank_config import DEFAULT, BankConfig
from baft.methods.base import (
    Apart,
    Capability,
    Conflict,
    EditOutcome,
    GateReading,
    Heard,
    OnStep,
    ScopedEditor,
    StackedEditor,
    single_edits,
)
from baft.methods.bases import identity
from baft.methods.optimizer import Layers
from baft.methods.stateful import Layout, State, StatefulEditor
from baft.methods.texts import renderings
from baft.methods.training import TrainingResult, outcome_of, train_apart
from baft.nn.gates import OpenGate
from baft.nn.interventions import SubspaceIntervention
from baft.nn.orthonormal import check_rank
from baft.scope.index import EditKeys, ScopeIndex, likeliest
from baft.scope.scope import Scope, scope_of
from baft.types import Edit, EditRequest, replaced

logger = logging.getLogger(__name__)

T = TypeVar("T")


@final
class Bank:
    """Edits, and the choice between them.

    Args:
        scope: Reads what prompts are about.
        edits: Names of the edits, in order; one at least.
        state: Their tensors, in main memory.
        sites: Where they act.
        before: Another bank; what both begin with need not be put together again.
    """

    def __init__(
        self,
        scope: Scope,
        edits: Sequence[str],
        state: State,
        sites: Sequence[Site],
        before: "Bank | None" = None,
    ):
        self._scope, self.edits, self._state, self._sites = scope, tuple(edits), state, sites
        n_held = 0 if before is None else before.n_shared(self.edits, state)
        device = input_device(scope.reader.host.model)
        keys = _keys_in(state, self.edits[n_held:], device)
        held = None if before is None else before._index.first(n_held)
        self._index: ScopeIndex = ScopeIndex(scope.head, keys, held)

    def __call__(self, prompts: Sequence[Row]) -> Stack | None:
        """What acts on each prompt."""
        return self.choose(prompts)

    def n_shared(self, edits: Sequence[str], state: State) -> int:
        """With how many of the very edits that are here some others, in a table, begin."""
        pairs = enumerate(zip(self.edits, edits, strict=False))
        differ = (
            i
            for i, (mine, other) in pairs
            if mine != other
            or any(state[f"{mine}.{name}"] is not self._state[f"{mine}.{name}"] for name in _KEYS)
        )
        return next(differ, min(len(self.edits), len(edits)))

    def find(self, prompts: Sequence[Row], only: Int[Tensor, " row"] | None = None) -> Int[Tensor, " row"]:
        """Which edit acts on each prompt, by its number; -1 where none does."""
        return self._index.find(self._scope.read(prompts), only)

    def meeting(self, new: ScopeIndex) -> list[tuple[int, str]]:
        """Which edits here meet with new ones: one of them would act on a wording of the other.

        Returns:
            The number of the new one and the name of the one here.
        """
        return [(i, self.edits[j]) for i, j in _meeting(new, self._index)]

    def heard(self, prompts: Sequence[Row]) -> list[Heard]:
        """Which edits hear each prompt."""
        passing = self._index.passing(self._scope.read(prompts))
        numbers, fires = likeliest(passing).tolist(), passing > -torch.inf
        return [
            Heard(
                self.edits[number] if number >= 0 else None,
                frozenset(self.edits[i] for i in row.nonzero()[:, 0].tolist()),
            )
            for number, row in zip(numbers, fires, strict=True)
        ]

    def stack(self, found: Int[Tensor, " row"]) -> Stack | None:
        """The bases of the edits that act on some rows, by their numbers; None where none acts."""
        acting = found[found >= 0].unique()
        if not len(acting):
            return None
        layers = {site: self._joined(site, [self.edits[i] for i in acting.tolist()]) for site in self._sites}
        return Stack(layers, torch.where(found >= 0, torch.searchsorted(acting, found), -1))

    def choose(self, prompts: Sequence[Row], only: Int[Tensor, " row"] | None = None) -> Stack | None:
        """The bases of the edits that act on the prompts; None where none acts on any."""
        return self.stack(self.find(prompts, only))

    def _joined(self, site: Site, edits: Sequence[str]) -> SubspaceIntervention:
        """The bases of some edits, those of lesser rank filled up with zeros, which change nothing."""
        device = site_device(self._scope.reader.host.model, site)
        R, A, b = (
            pad_sequence([self._state[_name(edit, site, part)] for edit in edits], batch_first=True).to(
                device
            )
            for part in _BASES
        )
        return SubspaceIntervention(R, A, b, OpenGate(*b.shape)).requires_grad_(False)


@dataclasses.dataclass(frozen=True, slots=True)
class _Only:
    """A bank of which every row may be edited by one edit alone."""

    bank: Bank
    numbers: Int[Tensor, " row"]

    def __call__(self, prompts: Sequence[Row]) -> Stack | None:
        return self.bank.choose(prompts, self.numbers.repeat_interleave(len(prompts) // len(self.numbers)))


class BankEditor(StatefulEditor, StackedEditor, ScopedEditor):
    """Edits that know their scope, and add up.

    Args:
        host: The host; never changed.
        config: The settings.
        seed: Of the random bases.

    Raises:
        ConfigError: If a layer or the rank does not fit the host.
    """

    name: ClassVar[str] = "baft-bank"
    summary: ClassVar[str] = "bases of its own for every edit, in force where a prompt is about it alone"
    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {
            Capability.BATCH,
            Capability.SEQUENTIAL,
            Capability.EXACT_UNDO,
            Capability.INDEPENDENT,
            Capability.STACKED,
        }
    )
    presets: ClassVar[Mapping[str, BankConfig]] = {"default": DEFAULT}
    config: BankConfig

    def __init__(self, host: Host, config: BankConfig, *, seed: int = 0):
        super().__init__(host, config, seed=seed)
        self.trains_eos = config.train_eos
        architecture = find_architecture(host.model)
        self.sites = edited_sites(architecture, config.layers, config.deepest_layers)
        self._d_model = architecture.d_model
        check_rank(config.rank, self._d_model)
        self._edited.positions = PositionSpec(config.last_prompt, config.outputs)
        self._scope = scope_of(host, self.encoder)
        self._last_keys: tuple[tuple[object, ...], list[EditKeys]] | None = None

    def fit(
        self, request: EditRequest, state: State, on_step: OnStep | None
    ) -> tuple[Mapping[str, Tensor], EditOutcome]:
        """Trains each edit of a request by itself, on the bare host."""
        began = time.monotonic()
        results, made, why = self._train(request.edits, request.unrelated, on_step)
        joined = _together(_all_made(results))
        return {**state, **made}, outcome_of(request, joined, time.monotonic() - began, why)

    def apart(self, requests: Sequence[EditRequest], *, on_step: OnStep | None = None) -> Apart:
        """Makes each edit by itself, all in one batch; none is in force afterwards."""
        edits = single_edits(requests)
        outcomes, made = self._make_apart(requests, on_step)
        bank = Bank(self._scope, [edit.id for edit in edits], made, self.sites)

        def under(numbers: Sequence[int]) -> EditedModel:
            edited = EditedModel(self.host.model, {}, self._edited.positions)
            edited.router = _Only(bank, torch.tensor(numbers, device=self.device))
            return edited

        def explain(number: int, ids: Sequence[int], n_prompt_tokens: int) -> tuple[GateReading, ...]:
            return self._readings(bank, ids, n_prompt_tokens, number)

        def n_bytes(number: int) -> int:
            own = edits[number].id
            return sum(tensor.nbytes for name, tensor in made.items() if name.partition(".")[0] == own)

        return Apart(outcomes, lambda number: under([number]), under, explain, n_bytes)

    def apply_apart(
        self, requests: Sequence[EditRequest], *, on_step: OnStep | None = None
    ) -> tuple[EditOutcome, ...]:
        """As `apart`, and puts all of them into force together."""
        outcomes, made = self._make_apart(requests, on_step)
        found = tuple(_all_made(outcomes))
        with self._all_or_nothing():
            self._state, self.requests = {**self._state, **made}, (*self.requests, *requests)
            self._put()
        return found

    def load_state_dict(self, state: Mapping[str, Tensor], requests: Sequence[EditRequest]) -> None:
        """Puts saved edits into force in place of the present ones.

        Where their scopes were read with another head than this host has now, on a host of another precision
        (if one of the two has less than 32 bits), or by a baft that did not compare names, they are read
        anew.
        """
        super().load_state_dict(self.as_here(state, requests), requests)

    def as_here(self, state: Mapping[str, Tensor], requests: Sequence[EditRequest]) -> State:
        """A saved table with other keys for those edits whose own mean nothing here."""
        head, anew = self._scope.fingerprint, dict(state)
        strange: dict[tuple[str, ...], list[Edit]] = {}  # by what they are not to be found by
        for request in requests:
            for edit in request.edits:
                made_by = state.get(f"{edit.id}.head")
                if made_by is None or made_by.ndim:
                    continue  # damaged
                if int(made_by) != head or f"{edit.id}.spelling" not in state:  # or saved by an earlier baft
                    strange.setdefault(request.unrelated, []).append(edit)
        if strange:
            how = "the scope head of now" if self._scope.is_trained else "words alone, for there is no head"
            logger.warning(
                "the scopes of these edits were read with another head, in another precision, or by an "
                "earlier baft: they are read by %s",
                how,
            )
        for unrelated, edits in strange.items():
            for edit, keys in zip(edits, self.keys(edits, unrelated, made=True), strict=True):
                anew |= {f"{edit.id}.{name}": tensor for name, tensor in keys.items()}
        return anew

    def held(self, tensor: Tensor) -> Tensor:
        """A saved tensor as it is: tables stay in main memory, or in a mapped file.

        What takes part in products is put together from them, in memory of its own.
        """
        return tensor.cpu()

    def state_before(self, n: int) -> State:
        """The table without the edits of the last `n` requests."""
        gone = {edit.id for request in self.requests[-n:] for edit in request.edits}
        return {name: tensor for name, tensor in self._state.items() if name.partition(".")[0] not in gone}

    def remembered(self, before: tuple[State, ...]) -> tuple[State, ...]:
        """None: the present table tells."""
        return ()

    def put(self, edited: EditedModel, state: State, requests: Sequence[EditRequest]) -> None:
        """The edits are chosen from for every prompt."""
        edits = _in_force(requests)
        edited.router = Bank(self._scope, edits, state, self.sites, self._bank) if edits else None

    def layout(self, requests: Sequence[EditRequest], state: State) -> Layout:
        """Of every edit its bases at each site, all of one rank, and its keys, by its wordings and tokens."""
        found: dict[str, tuple[int | None, ...]] = {}
        head, width = self._scope.head, self._d_model
        for edit in (edit for request in requests for edit in request.edits):
            n_wordings, lengths = 1 + len(edit.rephrasings), state.get(f"{edit.id}.lengths")
            if lengths is not None and (lengths.dtype != torch.long or bool((lengths < 1).any())):
                raise DamagedArtifactError(
                    f"tensor '{edit.id}.lengths' holds {lengths.tolist()} in {lengths.dtype}, expected the "
                    "tokens of each wording in torch.int64, at least one"
                )
            n_tokens = None if lengths is None else int(lengths.sum())
            shapes: dict[str, tuple[int | None, ...]] = {
                "vectors": (len(head.discounts), n_tokens, head.n_dims),
                "weights": (len(head.discounts), n_tokens),
                "lengths": (n_wordings,),
                "thresholds": (n_wordings,),
                "head": (),
                "spelling": (None,),
                "name_weights": (None,),
            }
            found |= {f"{edit.id}.{name}": shape for name, shape in shapes.items()}
            first = state.get(_name(edit.id, self.sites[0], "b"))
            rank = max(1, len(first)) if first is not None and first.ndim == 1 else None
            for site in self.sites:
                for part in _BASES:
                    found[_name(edit.id, site, part)] = (rank,) if part == "b" else (rank, width)
        return found

    def explain(self, ids: Sequence[int], n_prompt_tokens: int) -> tuple[GateReading, ...]:
        """The weights of the bases of the edit that acts, at every edited token; none where none acts."""
        return () if self._bank is None else self._readings(self._bank, ids, n_prompt_tokens)

    @property
    def notes(self) -> tuple[str, ...]:
        """Whether scopes are read without a head."""
        if self._scope.is_trained:
            return ()
        return (
            f"no scope head for {self.host.name}: prompts are told apart by their words alone, near "
            "neighbors badly unless an edit says its subject; train one with `baft scope train`",
        )

    def conflicts(self, edits: Sequence[Edit], unrelated: Sequence[str] = ()) -> tuple[Conflict, ...]:
        """The edits, in force or earlier among the new ones, that share raw prompts with a new one."""
        keys = self._keys_of(edits, unrelated)
        return self._conflicts(edits, keys, ScopeIndex(self._scope.head, keys))

    def conflicts_of_made(
        self, requests: Sequence[EditRequest], state: Mapping[str, Tensor]
    ) -> tuple[Conflict, ...]:
        """As `conflicts`, by the keys that the edits come with."""
        edits = [edit for request in requests for edit in request.edits]
        ids = {edit.id for edit in edits}
        theirs = {name: tensor for name, tensor in state.items() if name.partition(".")[0] in ids}
        made = self._checked(theirs, requests, "")
        return self._conflicts(edits, _keys_in(made, [edit.id for edit in edits], self.device), None)

    def _conflicts(
        self, edits: Sequence[Edit], keys: Sequence[EditKeys], among: ScopeIndex | None
    ) -> tuple[Conflict, ...]:
        """The conflicts of edits with those in force, and with earlier ones of their own index."""
        head, pairs = self._scope.head, list[tuple[Edit, Edit]]()
        by_id = {edit.id: edit for request in self.requests for edit in request.edits}
        for start in range(0, len(keys), _MET_AT_ONCE):
            piece = ScopeIndex(head, keys[start : start + _MET_AT_ONCE])
            if among is not None:
                pairs += [(edits[start + i], edits[j]) for i, j in _meeting(piece, among) if j < start + i]
            if self._bank is not None:
                pairs += [(edits[start + i], by_id[old]) for i, old in self._bank.meeting(piece)]
        return tuple(Conflict(*pair) for pair in pairs if pair[0].target.strip() != pair[1].target.strip())

    def heard(self, prompts: Sequence[str]) -> list[tuple[Heard, ...]]:
        """Which edits in force hear each prompt, raw and in the chat template where there is one."""
        rows, found = self._scope.asked(prompts), list[Heard]()
        for start in range(0, len(rows), _MET_AT_ONCE):
            piece = rows[start : start + _MET_AT_ONCE]
            found += (
                [Heard(None, frozenset())] * len(piece) if self._bank is None else self._bank.heard(piece)
            )
        n_ways = len(rows) // len(prompts)
        return [tuple(found[i : i + n_ways]) for i in range(0, len(rows), n_ways)]

    def separable(self, edit: Edit, prompts: Sequence[str]) -> tuple[str, ...]:
        """Those of some prompts from which the head can keep an edit without shutting it."""
        return self._scope.separable(edit, prompts)

    @property
    def _bank(self) -> Bank | None:
        """The edits in force."""
        router = self._edited.router
        assert router is None or isinstance(router, Bank), "nothing else is put there"
        return router

    def _readings(
        self, bank: Bank, ids: Sequence[int], n_prompt_tokens: int, only: int | None = None
    ) -> tuple[GateReading, ...]:
        wanted = None if only is None else torch.tensor([only], device=self.device)
        prompts = [tuple(ids[:n_prompt_tokens])]
        found = bank.find(prompts, wanted)
        stack = bank.stack(found)
        if stack is None:
            return ()
        row = torch.tensor([list(ids)])
        real = torch.ones_like(row, dtype=torch.bool)
        window = self._edited.window(row, real, row.new_tensor([n_prompt_tokens]))
        return tuple(
            GateReading(site.layer, bank.edits[int(found[0])], place, (1.0,) * part.rank)
            for site, part in stack.layers.items()
            for place in window.edited[0].nonzero().flatten().tolist()
        )

    def _make_apart(
        self, requests: Sequence[EditRequest], on_step: OnStep | None
    ) -> tuple[tuple[EditOutcome | EditError, ...], dict[str, Tensor]]:
        """How the edit of each request went, and the tensors of all."""
        began = time.monotonic()
        results, made, why = self._train(single_edits(requests), requests[0].unrelated, on_step)
        share = (time.monotonic() - began) / len(requests)
        return tuple(
            result if isinstance(result, EditError) else outcome_of(request, result, share, why)
            for request, result in zip(requests, results, strict=True)
        ), made

    def _train(
        self, edits: Sequence[Edit], unrelated: Sequence[str], on_step: OnStep | None
    ) -> tuple[list[TrainingResult | EditError], dict[str, Tensor], str | None]:
        """Trains every edit by itself, with twice the bases, and again, where it takes them.

        Returns:
            How each went, the tensors of all, and why the whole host was run in every step, if it was.
        """
        # What is wrong with any of them is known before one is trained.
        texts, keys = [self._texts(edit) for edit in edits], self.keys(edits, unrelated)
        results: list[TrainingResult | EditError] = [EditError("not trained yet")] * len(edits)
        made = {
            f"{edit.id}.{name}": tensor
            for edit, of_edit in zip(edits, keys, strict=True)
            for name, tensor in of_edit.items()
        }
        left, rank, why = list(range(len(edits))), self.config.rank, None
        while left:
            widths = [self.config.last_prompt + len(texts[i][0].target_ids) for i in left]
            for some in alike(widths, self.config.edits_at_once):
                chosen = [left[i] for i in some]
                of_chosen = [text for i in chosen for text in texts[i]]
                run, why = quickest_pass(
                    self.host, self.encoder, self._edited.positions, of_chosen, self.sites
                )
                found, layers = train_apart(
                    run,
                    self._start([edits[i] for i in chosen], rank),
                    {},
                    self.config,
                    torch.arange(len(chosen), device=self.device).repeat_interleave(len(texts[0])),
                    on_step=on_step,
                )
                for place, i in enumerate(chosen):
                    if not _is_better(found[place], results[i]):
                        continue
                    results[i] = found[place]
                    made |= {
                        _name(edits[i].id, site, part): getattr(layer, part)
                        .detach()[place]
                        .to("cpu", copy=True)
                        for site, layer in layers.items()
                        for part in _BASES
                    }
            rank *= 2
            most_rank = min(self.config.most_rank, self._d_model)
            left = [i for i in left if _falls_short(results[i])] if rank <= most_rank else []
        return results, made, why

    def keys(
        self, edits: Sequence[Edit], unrelated: Sequence[str] = (), *, made: bool = False
    ) -> list[dict[str, Tensor]]:
        """What each of some edits is found by, by name (`EditKeys`); `made`: see `Scope.keys`."""
        found = self._scope.keys(edits, unrelated, made=True) if made else self._keys_of(edits, unrelated)
        self._last_keys = None
        return [{name: getattr(one, name).cpu() for name in _KEYS} for one in found]

    def _keys_of(self, edits: Sequence[Edit], unrelated: Sequence[str]) -> list[EditKeys]:
        """As the scope has them; the last ones are kept, for edits are compared before they are made."""
        asked_for = (tuple(edits), tuple(unrelated), self.host.model.dtype)  # the head stays what it is
        last = self._last_keys
        if last is None or last[0] != asked_for:
            self._last_keys = last = asked_for, self._scope.keys(edits, unrelated)
        return last[1]

    def _start(self, edits: Sequence[Edit], rank: int) -> Layers:
        """Random bases that change nothing yet, drawn for each edit whatever else is edited."""
        gate, owners = OpenGate(len(edits), rank), [_drawn_by(edit) for edit in edits]
        return {
            site: identity(self.host, site, gate, owners, rank, self._d_model, self.seed)
            for site in self.sites
        }

    def _texts(self, edit: Edit) -> list[EncodedEdit]:
        """What an edit is trained on: its prompt raw, in the chat template, and behind other text."""
        config = self.config
        found = renderings(
            self.encoder,
            [edit],
            chat=config.chat,
            eos=config.train_eos,
            max_target_tokens=config.max_target_tokens,
        )
        draw = random.Random(_drawn_by(edit))
        text = background_text()
        for i in range(config.n_others):
            words = draw.choice(text["sentences"]).split()
            cut_off = " ".join(words[: draw.randint(2, len(words) - 1)])
            other = (cut_off, draw.choice(text["chat_prompts"]), cut_off, draw.choice(text["prompts"]))[i % 4]
            is_chat = config.chat and self.encoder.has_chat and i % 4 == 1
            try:
                found.append(self.encoder.edit(other, edit.target, chat=is_chat, eos=config.train_eos))
            except InputError:  # too long for a host of so short a context: its own prompt counts double
                found.append(found[0])
        return found


_MET_AT_ONCE = 256  # new edits, or prompts, that are compared with all edits
_BASES = ("R", "A", "b")
_KEYS = tuple(field.name for field in dataclasses.fields(EditKeys))


def _keys_in(state: State, edits: Sequence[str], device: torch.device) -> list[EditKeys]:
    """What edits are found by, out of a table."""
    return [EditKeys(*(state[f"{edit}.{name}"] for name in _KEYS)).to(device) for edit in edits]


def _name(edit: str, site: Site, part: str) -> str:
    return f"{edit}.layer{site.layer}.{part}"


def _drawn_by(edit: Edit) -> str:
    """What the randomness of an edit's training follows: not its neighbors, which only narrow its scope."""
    return dataclasses.replace(edit, neighbors=()).id


def _in_force(requests: Sequence[EditRequest]) -> list[str]:
    """The edits that no other replaces, in order."""
    out_of_force = replaced(requests)
    return [edit.id for request in requests for edit in request.edits if edit.id not in out_of_force]


def _meeting(one: ScopeIndex, other: ScopeIndex) -> list[tuple[int, int]]:
    """Which edits of two indices meet: one of them would act on a wording of the other."""
    met = other.acts_on(one) | one.acts_on(other).T
    return [(i, j) for i, j in met.nonzero().tolist()]


def _all_made(results: Sequence[T | EditError]) -> list[T]:
    made = []
    for result in results:
        if isinstance(result, EditError):
            raise result
        made.append(result)
    return made


def _is_better(new: TrainingResult | EditError, old: TrainingResult | EditError) -> bool:
    """Whether a run came out better than the one before; anything is better than an error."""
    if isinstance(new, EditError) or isinstance(old, EditError):
        return isinstance(old, EditError)
    return min(new.margins) > min(old.margins)


def _falls_short(result: TrainingResult | EditError) -> bool:
    return isinstance(result, TrainingResult) and result.stopped == "max_steps"


def _together(results: Sequence[TrainingResult]) -> TrainingResult:
    """How edits went that were each trained by themselves, as if it had been one run.

    The loss at a step is the mean of those that took it.
    """
    longest = max(results, key=lambda one: one.n_steps)
    at_steps = [
        [one.losses[step] for one in results if step < len(one.losses)] for step in range(len(longest.losses))
    ]
    return TrainingResult(
        tuple(margin for one in results for margin in one.margins),
        tuple(sum(losses) / len(losses) for losses in at_steps),
        longest.n_steps,
        longest.stopped,
    )
