"""What every editing method offers, and the registry that names them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal

from torch import Tensor

from baft import config
from baft.errors import ConfigError, EditError, UndoError
from baft.hosts.architecture import Site
from baft.hosts.edited_model import EditedModel
from baft.hosts.models import Host
from baft.registry import Registry, unknown_name
from baft.types import Edit, EditRequest

OnStep = Callable[[int, int, float], None]  # step, most steps there can be, loss


class Capability(StrEnum):
    """What a method can do."""

    BATCH = "batch"  # several edits in one optimization
    SEQUENTIAL = "sequential"  # edits on top of edits
    EXACT_UNDO = "exact_undo"  # taking an edit back restores every bit
    INDEPENDENT = "independent"  # edits that do not know each other: any can be removed, sets can be merged
    STACKED = "stacked"  # edits that are each made by themselves, trained and asked in one batch


@dataclass(frozen=True, slots=True)
class EditOutcome:
    """How one optimization went.

    Args:
        edit_ids: The edits it made.
        decoded: Whether each edit's target, and its end where that is trained, is what greedy decoding
            says, in every rendering it was trained on.
        margins: The smallest lead of any target token of each edit over the best other token, in nats.
        losses: The loss at every step.
        n_steps: Steps taken.
        stopped: Why it stopped.
        seconds_s: Wall time; of edits that were made in one batch, each one's share.
        why_full: Why every step ran the whole host, or None if it did not have to.
    """

    edit_ids: tuple[str, ...]
    decoded: tuple[bool, ...]
    margins: tuple[float, ...]
    losses: tuple[float, ...]
    n_steps: int
    stopped: Literal["margin", "loss", "max_steps", "closed_form"]
    seconds_s: float
    why_full: str | None = None

    @classmethod
    def of(
        cls,
        edits: Sequence[Edit],
        margins: Sequence[float],
        *,
        losses: Sequence[float],
        n_steps: int,
        stopped: Literal["margin", "loss", "max_steps", "closed_form"],
        seconds_s: float,
        why_full: str | None = None,
    ) -> "EditOutcome":
        """How edits went whose texts, as many of each edit, stand side by side.

        Args:
            edits: The edits.
            margins: The smallest lead of any target token of each text, in nats.
            losses: As above, like all that follow.
            n_steps: Steps taken.
            stopped: Why it stopped.
            seconds_s: Wall time.
            why_full: Why every step ran the whole host, or None.
        """
        n_rows = len(margins) // len(edits)
        of_edits = tuple(min(margins[i : i + n_rows]) for i in range(0, len(margins), n_rows))
        decoded = tuple(margin > 0 for margin in of_edits)
        ids = tuple(edit.id for edit in edits)
        return cls(ids, decoded, of_edits, tuple(losses), n_steps, stopped, seconds_s, why_full)


@dataclass(frozen=True, slots=True)
class GateReading:
    """The weights of one edit's bases at one token.

    Args:
        layer: Decoder block whose output they act on.
        edit_id: The edit that owns the bases, or None where all edits share them.
        position: Index of the token in the sequence shown.
        weights: `w_k(h)` of every basis, in [0, 1].
    """

    layer: int
    edit_id: str | None
    position: int
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two edits that one prompt could be about, and that say different things.

    Args:
        new: The edit that is to be made.
        old: One that is in force, or made before it in the same call.
    """

    new: Edit
    old: Edit


@dataclass(frozen=True, slots=True)
class Heard:
    """Which edits hear a prompt that is asked in one way.

    Args:
        acting: The edit that acts, or None.
        firing: All that would, were each the only one.
    """

    acting: str | None
    firing: frozenset[str]


@dataclass(frozen=True, slots=True)
class Apart:
    """Edits that were each made by themselves, all on the model as it stood; none of them is in force.

    Args:
        outcomes: How each went, or the error that broke it off.
        alone: The model under one of them, by its number.
        by_row: The model that edits every row of a batch by the edit of that row's number.
        explain: As `Editor.explain`, under one of them.
        n_bytes: What an artifact keeps of one of them.
    """

    outcomes: tuple[EditOutcome | EditError, ...]
    alone: Callable[[int], EditedModel]
    by_row: Callable[[Sequence[int]], EditedModel]
    explain: Callable[[int, Sequence[int], int], tuple[GateReading, ...]]
    n_bytes: Callable[[int], int]


class Editor(ABC):
    """A method at work on one host.

    Args:
        host: The host; its weights are never changed unless the method says so.
        config: The method's settings.
        seed: Of everything random in it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    capabilities: ClassVar[frozenset[Capability]]
    presets: ClassVar[Mapping[str, Any]]
    trains_eos: bool = False  # whether a reply ends after the target, or only begins with it

    def __init__(self, host: Host, config: Any, *, seed: int = 0):
        self.host, self.config, self.seed = host, config, seed
        self.sites: tuple[Site, ...] = ()  # where hidden states are edited
        self.requests: tuple[EditRequest, ...] = ()

    @property
    @abstractmethod
    def edited(self) -> EditedModel:
        """The host with the edits in force."""

    @abstractmethod
    def apply(self, request: EditRequest, *, on_step: OnStep | None = None) -> EditOutcome:
        """Makes the edits of a request on top of those in force.

        Raises:
            InputError: If a prompt or target does not fit the host.
            EditError: If the optimization breaks down; nothing has changed then.
        """

    @abstractmethod
    def undo(self, n: int = 1) -> tuple[EditRequest, ...]:
        """Takes the last `n` requests back, or none of them; taking back all of them always works.

        Returns:
            The requests taken back, newest first.

        Raises:
            UndoError: If there are not that many, or what came before them is no longer known.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """All that the edits added, copied; nothing of the host."""

    def tensors(self) -> dict[str, Tensor]:
        """The same, not copied where that can be: for who reads them, and changes none.

        What an edit added is the same object each time, where it is on the CPU and the method keeps it. What
        undo goes back to is named `before` or `snapshot` with a number (`is_earlier`).
        """
        return self.state_dict()

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor], requests: Sequence[EditRequest]) -> None:
        """Puts saved edits into force in place of the present ones.

        The editor may keep the tensors that it is given: change none of them afterwards.

        Raises:
            DamagedArtifactError: If a tensor is missing, left over, or of the wrong shape.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forgets every edit."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever reads a report should know of how this method works on this host."""
        return ()

    def conflicts(self, edits: Sequence[Edit], unrelated: Sequence[str] = ()) -> tuple[Conflict, ...]:
        """Which edits, in force or earlier among the new ones, stand in the way of new ones.

        None where edits have no scope.

        Args:
            edits: The new ones.
            unrelated: Prompts that shall stay as they are.
        """
        return ()

    def as_here(self, state: Mapping[str, Tensor], requests: Sequence[EditRequest]) -> Mapping[str, Tensor]:
        """A saved table as it comes into force on this host: as it is, or what means nothing here made anew.

        Args:
            state: The table.
            requests: Those that it is of.
        """
        return state

    def conflicts_of_made(
        self, requests: Sequence[EditRequest], state: Mapping[str, Tensor]
    ) -> tuple[Conflict, ...]:
        """As `conflicts`, for edits that were made elsewhere.

        Only those in force stand in their way; what they have among themselves is settled.

        Args:
            requests: Theirs.
            state: A table that has their tensors, as `as_here` gives it.

        Raises:
            DamagedArtifactError: If tensors are missing or misshapen.
        """
        return ()

    def explain(self, ids: Sequence[int], n_prompt_tokens: int) -> tuple[GateReading, ...]:
        """The gates at every edited token of a sequence, open or not; none where the method has none."""
        return ()

    @classmethod
    def preset(cls, name: str) -> Any:
        """The settings of a preset.

        Raises:
            UnknownNameError: If the method has no preset of that name.
        """
        if name not in cls.presets:
            raise unknown_name(f"{cls.name} preset", name, list(cls.presets))
        return cls.presets[name]

    @classmethod
    def configured(cls, preset: str, settings: Mapping[str, Any]) -> Any:
        """The settings of a preset, with single ones replaced.

        Raises:
            UnknownNameError: If the method has no preset of that name.
            ConfigError: If a setting is unknown, or its value wrong.
        """
        chosen = cls.preset(preset)
        if not settings:
            return chosen
        merged = {**config.to_dict(chosen), **settings}
        return config.from_dict(type(chosen), merged, where=f"{cls.name}/{preset}")

    def _taken_back(self, n: int) -> tuple[EditRequest, ...]:
        """The last `n` requests, newest first."""
        if n < 1:
            raise UndoError(f"undo takes back at least one request, got n={n}")
        if n > len(self.requests):
            raise UndoError(f"cannot take back {n} requests: {len(self.requests)} are in force")
        return self.requests[-n:][::-1]


class StackedEditor(Editor):
    """A method that makes edits in one batch that do not see each other; its capability is `STACKED`."""

    @abstractmethod
    def apart(self, requests: Sequence[EditRequest], *, on_step: OnStep | None = None) -> Apart:
        """Makes each of these edits by itself on the model as it stands, and puts none into force.

        Args:
            requests: One edit each.
            on_step: Called after every step.

        Raises:
            ConfigError: If a request holds several edits.
            InputError: If a prompt or target does not fit the host.
        """

    @abstractmethod
    def apply_apart(
        self, requests: Sequence[EditRequest], *, on_step: OnStep | None = None
    ) -> tuple[EditOutcome, ...]:
        """As `apart`, and puts all of them into force together, each as a request of its own.

        Raises:
            ConfigError: If edits of this method do not add up.
            EditError: If one of them breaks down; nothing has changed then.
        """


class ScopedEditor(Editor):
    """A method whose edits know which prompts they are about, and which can be kept from further ones."""

    @abstractmethod
    def heard(self, prompts: Sequence[str]) -> list[tuple[Heard, ...]]:
        """Which edits hear each prompt: raw, and in the chat template where there is one."""

    @abstractmethod
    def separable(self, edit: Edit, prompts: Sequence[str]) -> tuple[str, ...]:
        """Those of some prompts that an edit can have as neighbors and lose none of its own wordings."""


def is_earlier(name: str) -> bool:
    """Whether a tensor of `Editor.tensors` is not in force, and kept for undo to go back to."""
    return re.match(r"(before|snapshot)\d+\.", name) is not None


def single_edits(requests: Sequence[EditRequest]) -> list[Edit]:
    """The one edit of each request.

    Raises:
        ConfigError: If a request holds several, or they differ in their unrelated prompts.
    """
    if any(len(request.edits) != 1 or request.unrelated != requests[0].unrelated for request in requests):
        raise ConfigError(
            "edits that are each made by themselves come one to a request, and with the same unrelated "
            "prompts: split the requests"
        )
    return [request.edits[0] for request in requests]


methods: Registry[type[Editor]] = Registry("method", base=Editor, group="baft.methods")
methods.add("baft", "baft.methods.baft:BaftEditor")
methods.add("baft-bank", "baft.methods.bank:BankEditor")
methods.add("reft", "baft.methods.baft:ReftEditor")
methods.add("ft-l", "baft.methods.ft:FtLEditor")
methods.add("ft-m", "baft.methods.ft:FtMEditor")
methods.add("lora", "baft.methods.lora:LoraEditor")
methods.add("adalora", "baft.methods.lora:AdaLoraEditor")
methods.add("melo", "baft.methods.melo:MeloEditor")
methods.add("ike", "baft.methods.ike:IkeEditor")
methods.add("retrieval", "baft.methods.retrieval:RetrievalEditor")
methods.add("grace", "baft.methods.grace:GraceEditor")
methods.add("wise", "baft.methods.wise:WiseEditor")
methods.add("rome", "baft.methods.rome:RomeEditor")
methods.add("memit", "baft.methods.memit:MemitEditor")
methods.add("alphaedit", "baft.methods.alphaedit:AlphaEditEditor")
methods.add("ultraedit", "baft.methods.ultraedit:UltraEditEditor")
