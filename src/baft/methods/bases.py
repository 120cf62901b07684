"""Two ways of keeping the bases of edits: one set that all share, or a set for every edit.

Both begin an edit (what is trained), commit it, take it back, and write themselves down as tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baft.errors import ConfigError, DamagedArtifactError, UndoError
from baft.hosts.architecture import Site, intervention_dtype, site_device
from baft.hosts.background import Background
from baft.hosts.calls import Parts
from baft.hosts.encoding import EncodedEdit
from baft.hosts.models import Host
from baft.hosts.passes import Pass, Predictions, TargetPass
from baft.methods.baft_config import BaftConfig
from baft.methods.closed_form import ClosedFormGates, edit_keys
from baft.methods.optimizer import Layers
from baft.methods.training import Penalty, pieces
from baft.nn.gates import ConditionedGate, Gate, LogisticGate, OpenGate
from baft.nn.interventions import SubspaceIntervention, concatenate
from baft.nn.losses import accumulate_load, load_balance, locality
from baft.nn.orthonormal import random_orthonormal
from baft.types import Edit, EditRequest

Loads = Mapping[Site, Float[Tensor, "block rank"]]

N_SNAPSHOTS_SAVED = 10  # further back, shared bases cannot be undone from an artifact


@dataclass(frozen=True)
class Frame:
    """What bases need to know of their host and settings."""

    host: Host
    config: BaftConfig
    sites: tuple[Site, ...]
    d_model: int
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        """Precision of every number of an intervention."""
        return intervention_dtype(self.host.model)

    def device(self, site: Site) -> torch.device:
        """Where the states of a site live."""
        return self._devices[site]

    @cached_property
    def _devices(self) -> Mapping[Site, torch.device]:
        return {site: site_device(self.host.model, site) for site in self.sites}

    def identity(self, site: Site, gate: Gate, owners: Sequence[str | None]) -> SubspaceIntervention:
        """Random bases that change nothing yet; see `identity`."""
        return identity(self.host, site, gate, owners, self.config.rank, self.d_model, self.seed)

    def read(self, left: dict[str, Tensor], owner: str) -> dict[Site, SubspaceIntervention]:
        """One block at every site, taken out of the tensors that are left to read.

        Raises:
            DamagedArtifactError: If a tensor is missing or has the wrong shape.
        """
        rank, d = self.config.rank, self.d_model
        layers = {}
        for site in self.sites:
            R, A = (self.take(left, owner, site, name, (rank, d)) for name in ("R", "A"))
            gate: Gate = OpenGate(1, rank)
            if self.config.gate != "open":
                U = self.take(left, owner, site, "U", (rank, d))
                c = self.take(left, owner, site, "c", (rank,))
                gate = LogisticGate(U, c, threshold=self.config.hard_zero)
            part = SubspaceIntervention(R, A, self.take(left, owner, site, "b", (rank,)), gate)
            layers[site] = part.requires_grad_(False)
        return layers

    def take(
        self, left: dict[str, Tensor], owner: str, site: Site, name: str, shape: tuple[int, ...]
    ) -> Tensor:
        """One tensor, removed from those that are left to read; a block axis is put before its own."""
        key = f"{owner}.layer{site.layer}.{name}"
        if key not in left:
            raise DamagedArtifactError(f"tensor {key!r} is missing from the saved edits")
        tensor = left.pop(key)
        if tuple(tensor.shape) != shape:
            raise DamagedArtifactError(
                f"tensor {key!r} has shape {list(tensor.shape)}, expected {list(shape)}"
            )
        # A copy: on the address of a tensor, which inside a file is any, depends how products are rounded.
        return tensor.to(self.device(site), self.dtype, copy=True).unsqueeze(0)


def identity(
    host: Host,
    site: Site,
    gate: Gate,
    owners: Sequence[str | None],
    rank: int,
    d_model: int,
    seed: int,
) -> SubspaceIntervention:
    """Random bases that change nothing yet: `A = R`, `b = 0`.

    The bases that an edit owns are drawn from the seed, the layer and the edit, so that they do not depend on
    what else is edited.

    Args:
        host: The host, for its precision and where the site's states live.
        site: Where they will act.
        gate: With as many blocks as there are owners.
        owners: The edit that owns each block; None where all share it.
        rank: Bases of a block.
        d_model: Width of the host's states.
        seed: Of the drawing.
    """
    dtype, device, drawn = intervention_dtype(host.model), site_device(host.model, site), []
    for owner in owners:
        mixed = int(owner or "0", 16) ^ (seed * 0x9E3779B97F4A7C15) ^ (site.layer * 0xBF58476D1CE4E5B9)
        generator = torch.Generator().manual_seed(mixed % (1 << 63))
        drawn.append(random_orthonormal(1, rank, d_model, generator=generator, dtype=dtype))
    R = torch.cat(drawn).to(device)
    return SubspaceIntervention(R, R.clone(), torch.zeros(R.shape[:2], dtype=dtype, device=device), gate)


class Bases(ABC):
    """The bases of all edits in force, and how a request changes them."""

    def __init__(self, frame: Frame):
        self.frame = frame

    @property
    @abstractmethod
    def state(self) -> Any:
        """All that a commit changes; it makes a new one and leaves this as it is, which can be put back."""

    @state.setter
    @abstractmethod
    def state(self, state: Any) -> None: ...

    @abstractmethod
    def start(
        self,
        edits: Sequence[Edit],
        run: Pass,
        texts: Sequence[EncodedEdit],
        negatives: Background | None,
        *,
        apart: bool = False,
    ) -> dict[Site, SubspaceIntervention]:
        """What edits train: in one optimization, or each by itself in a block of its own."""

    @abstractmethod
    def beside(self) -> Mapping[Site, Parts]:
        """What is in force beside it meanwhile."""

    @abstractmethod
    def penalty(self, negatives: Background | None, n_requests: int) -> Penalty | None:
        """Terms of the loss beside cross-entropy."""

    @abstractmethod
    def commit(self, run: TargetPass, trained: Layers) -> None:
        """Puts what was trained among the edits in force."""

    @abstractmethod
    def commit_apart(self, trained: Layers) -> None:
        """Puts blocks that were trained apart among the edits in force, each as a request of its own."""

    @abstractmethod
    def undo(self, n: int) -> None:
        """Takes the last `n` commits back, every bit of them, or none."""

    @abstractmethod
    def clear(self) -> None:
        """Takes everything back; what was learned of the host alone is kept."""

    @abstractmethod
    def in_force(self) -> Mapping[Site, Parts]:
        """The interventions of all edits."""

    @abstractmethod
    def owners(self, requests: Sequence[EditRequest]) -> list[str | None]:
        """Which edit owns each block, in order; None where all share it."""

    @abstractmethod
    def tensors(self, requests: Sequence[EditRequest]) -> dict[str, Tensor]:
        """Everything, by name."""

    @abstractmethod
    def load(self, left: dict[str, Tensor], requests: Sequence[EditRequest]) -> None:
        """The inverse of `tensors`; takes what it reads out of `left`."""


@final
class OwnBases(Bases):
    """Every edit has bases of its own, behind closed-form gates; edits add up."""

    def __init__(self, frame: Frame):
        super().__init__(frame)
        self._by_request: list[Layers] = []  # blocks in the order of the request's edits
        self._fitted: WeakKeyDictionary[Background, Mapping[Site, ClosedFormGates]] = WeakKeyDictionary()
        self._fused: Mapping[Site, Parts] = {}

    @property
    def state(self) -> Any:
        """The blocks, by request and joined."""
        return self._by_request, self._fused

    @state.setter
    def state(self, state: Any) -> None:
        self._by_request, self._fused = state

    def start(
        self,
        edits: Sequence[Edit],
        run: Pass,
        texts: Sequence[EncodedEdit],
        negatives: Background | None,
        *,
        apart: bool = False,
    ) -> dict[Site, SubspaceIntervention]:
        """Random bases behind gates that open at each edit's own states, as the unedited host has them."""
        assert negatives is not None
        frame, started = self.frame, {}
        owners = [edit.id for edit in edits]
        for site in frame.sites:
            keys = edit_keys(run, texts, len(owners), site)
            gate = self._gates(negatives)[site].gate(keys, frame.dtype)
            started[site] = frame.identity(site, gate, owners)
        return started

    def beside(self) -> Mapping[Site, Parts]:
        """All earlier edits."""
        return self._fused

    def penalty(self, negatives: Background | None, n_requests: int) -> Penalty | None:
        """None: the gates are not trained."""
        return None

    def commit(self, run: TargetPass, trained: Layers) -> None:
        """Adds a block for every edit."""
        self._hold([*self._by_request, {site: part.frozen() for site, part in trained.items()}])

    def commit_apart(self, trained: Layers) -> None:
        """Adds a block for every edit."""
        n_blocks = next(iter(trained.values())).n_blocks
        one_each = [
            {site: part.select(torch.tensor([i], device=part.R.device)) for site, part in trained.items()}
            for i in range(n_blocks)
        ]
        self._hold([*self._by_request, *one_each])

    def undo(self, n: int) -> None:
        """Removes the blocks of the last requests; what is left is as it was."""
        self._hold(self._by_request[:-n])

    def clear(self) -> None:
        """Removes all blocks; the background's statistics stay."""
        self._hold([])

    def in_force(self) -> Mapping[Site, Parts]:
        """One intervention a site, with the blocks of all edits."""
        return self._fused

    def owners(self, requests: Sequence[EditRequest]) -> list[str | None]:
        """The edits, in order."""
        return [edit.id for request in requests for edit in request.edits]

    def tensors(self, requests: Sequence[EditRequest]) -> dict[str, Tensor]:
        """By edit and layer."""
        return {
            f"{edit.id}.layer{site.layer}.{name}": tensor[block]
            for request, layers in zip(requests, self._by_request, strict=True)
            for site, part in layers.items()
            for name, tensor in _tensors(part).items()
            for block, edit in enumerate(request.edits)
        }

    def load(self, left: dict[str, Tensor], requests: Sequence[EditRequest]) -> None:
        """Reads a block for every edit."""
        by_request = []
        for request in requests:
            blocks = [self.frame.read(left, edit.id) for edit in request.edits]
            by_request.append(self._joined(blocks))
        self._hold(by_request)

    def _hold(self, by_request: list[Layers]) -> None:
        joined = self._joined(by_request) if by_request else {}
        fused = {site: (part,) for site, part in joined.items()}
        self._by_request, self._fused = by_request, fused  # at once: what breaks off above changes nothing

    def _gates(self, negatives: Background) -> Mapping[Site, ClosedFormGates]:
        """What makes the gates; kept for as long as the background is, for its statistics take a while."""
        if negatives not in self._fitted:
            frame = self.frame
            self._fitted[negatives] = {
                site: ClosedFormGates(frame.config, negatives, site, frame.device(site))
                for site in frame.sites
            }
        return self._fitted[negatives]

    def _joined(self, several: Sequence[Layers]) -> Layers:
        return {site: concatenate([layers[site] for layers in several]) for site in self.frame.sites}


@final
class SharedBases(Bases):
    """The paper's mode: one block a layer, trained on by every edit; undo restores a snapshot."""

    def __init__(self, frame: Frame):
        super().__init__(frame)
        self._now: tuple[Layers, Loads] | None = None
        self._before: list[tuple[Layers, Loads] | None] = []

    @property
    def state(self) -> Any:
        """The block in force and the snapshots before it."""
        return self._now, self._before

    @state.setter
    def state(self, state: Any) -> None:
        self._now, self._before = state

    def start(
        self,
        edits: Sequence[Edit],
        run: Pass,
        texts: Sequence[EncodedEdit],
        negatives: Background | None,
        *,
        apart: bool = False,
    ) -> dict[Site, SubspaceIntervention]:
        """A trainable copy of what is in force, or the identity before the first edit; apart, one each."""
        frame, started, n_blocks = self.frame, {}, len(edits) if apart else 1
        for site in frame.sites:
            gate: Gate = OpenGate(n_blocks, frame.config.rank)
            copies = torch.zeros(n_blocks, dtype=torch.long, device=frame.device(site))
            now = None if self._now is None else self._now[0][site].select(copies)
            if frame.config.gate == "logistic":
                assert negatives is not None
                states = negatives.states[site].to(frame.device(site))
                scale = states.std(0).clamp_min(1e-6)
                gate = ConditionedGate(n_blocks, frame.config.rank, mean=states.mean(0), scale=scale)
                if now is not None:
                    assert isinstance(now.gate, LogisticGate)
                    gate.load(now.gate)
            if now is None:
                started[site] = frame.identity(site, gate, [None] * n_blocks)
            else:
                started[site] = SubspaceIntervention(now.R.data, now.A.data, now.b.data, gate)
        return started

    def beside(self) -> Mapping[Site, Parts]:
        """Nothing: what was in force is what is trained on."""
        return {}

    def penalty(self, negatives: Background | None, n_requests: int) -> Penalty | None:
        """`lambda_bal R_bal + lambda_loc R_loc`, each the mean over layers."""
        config = self.frame.config
        if not (config.load_balance or config.locality):
            return None
        loads = {} if self._now is None else self._now[1]

        def penalty(
            step: int, predictions: Predictions, trained: Layers, blocks: Int[Tensor, " row"] | None
        ) -> Tensor | None:
            terms = []
            for site, part in trained.items():
                if config.load_balance:
                    now = _mean_weights(part, site, predictions, blocks)
                    times = n_requests if config.balance_form == "running_times_t" else 1
                    balance = load_balance(now, loads.get(site, torch.zeros_like(now)).expand_as(now))
                    terms.append(config.load_balance * times * balance)
                if config.locality and step >= config.locality_from_step and negatives is not None:
                    unrelated = negatives.states[site].to(part.R)
                    terms.append(config.locality * locality(part.gate.soft(unrelated)))
            if not terms:
                return None
            return torch.stack([term.to(terms[0].device) for term in terms]).sum(0) / len(trained)

        return penalty

    @torch.no_grad()
    def commit(self, run: TargetPass, trained: Layers) -> None:
        """Puts the trained block in the place of the old, and adds its load to the bases' account."""
        layers = {site: part.frozen() for site, part in trained.items()}
        loads: dict[Site, Tensor] = {}
        if self.frame.config.gate == "logistic":
            past = {} if self._now is None else self._now[1]
            for site, now in self._used(run, layers).items():
                before = past.get(site, torch.zeros_like(now))
                loads[site] = accumulate_load(before, now, self.frame.config.balance_form)
        self._before, self._now = [*self._before, self._now], (layers, loads)

    def _used(self, run: TargetPass, layers: Layers) -> Loads:
        """The mean weights of trained blocks over all texts, no more of them at once than in a step."""
        texts = torch.arange(int(run.rows.max()) + 1, device=run.rows.device)
        found: dict[Site, Tensor] = {}
        for here in pieces(run, texts, self.frame.config.edits_at_once):
            seen = here({site: (part,) for site, part in layers.items()})
            share = (int(here.rows.max()) + 1) / len(texts)
            for site, part in layers.items():
                mean = share * _mean_weights(part, site, seen)
                found[site] = found[site] + mean if site in found else mean
        return found

    def commit_apart(self, trained: Layers) -> None:
        """Never: what was trained apart on one shared block cannot be put together."""
        raise ConfigError(
            "edits with shared bases are made one after another or in one batch: edits that were each "
            "trained by themselves cannot be put together (use bases='own')"
        )

    def undo(self, n: int) -> None:
        """Restores the snapshot taken before the last `n` requests.

        Raises:
            UndoError: If the set was loaded from an artifact that no longer holds it.
        """
        if n > len(self._before):
            raise UndoError(
                f"cannot take back {n} requests: an artifact with shared bases remembers what was before "
                f"the last {N_SNAPSHOTS_SAVED}, and of these {len(self._before)} are left; take back no more "
                "than that, or all, or edit the host anew without those that you do not want (edits.jsonl "
                "holds them, config.json the seed)"
            )
        self._before, self._now = self._before[:-n], self._before[-n]

    def clear(self) -> None:
        """Forgets the block and its snapshots."""
        self._now, self._before = None, []

    def in_force(self) -> Mapping[Site, Parts]:
        """The shared block of every site."""
        return {} if self._now is None else {site: (part,) for site, part in self._now[0].items()}

    def owners(self, requests: Sequence[EditRequest]) -> list[str | None]:
        """Nobody owns the one block."""
        return [None]

    def tensors(self, requests: Sequence[EditRequest]) -> dict[str, Tensor]:
        """The block in force, and the last snapshots by the number of requests that were in force then."""
        kept = self._before[-N_SNAPSHOTS_SAVED:]
        first = len(requests) - len(kept)
        states = {f"snapshot{n}": state for n, state in enumerate(kept, start=first)} | {"shared": self._now}
        found: dict[str, Tensor] = {}
        for owner, state in states.items():
            if state is None:
                continue  # the host itself, before the first edit
            for site, part in state[0].items():
                for name, tensor in (_tensors(part) | ({"load": state[1][site]} if state[1] else {})).items():
                    found[f"{owner}.layer{site.layer}.{name}"] = tensor[0]
        return found

    def load(self, left: dict[str, Tensor], requests: Sequence[EditRequest]) -> None:
        """Reads the block in force and its snapshots."""
        now: tuple[Layers, Loads] | None = None
        before: list[tuple[Layers, Loads] | None] = []
        if requests:
            now = self._read(left, "shared")
            for n in range(max(0, len(requests) - N_SNAPSHOTS_SAVED), len(requests)):
                if n == 0:
                    before = [None]  # the host itself
                elif any(name.startswith(f"snapshot{n}.") for name in left):
                    before.append(self._read(left, f"snapshot{n}"))
                else:
                    before = []  # forgotten, and with it the way to all that was earlier
        self._now, self._before = now, before

    def _read(self, left: dict[str, Tensor], owner: str) -> tuple[Layers, Loads]:
        layers = self.frame.read(left, owner)
        if self.frame.config.gate == "open":
            return layers, {}
        shape = (self.frame.config.rank,)
        return layers, {site: self.frame.take(left, owner, site, "load", shape) for site in self.frame.sites}


def _tensors(part: SubspaceIntervention) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {"R": part.R, "A": part.A, "b": part.b}
    if isinstance(part.gate, LogisticGate):
        tensors |= {"U": part.gate.U, "c": part.gate.c}
    return tensors


def _mean_weights(
    part: SubspaceIntervention, site: Site, seen: Predictions, blocks: Int[Tensor, " row"] | None = None
) -> Float[Tensor, "block rank"]:
    """`m`: weights before any hard zero, averaged over the edited tokens of each text, then over texts.

    Where blocks are trained apart, each over its own texts.
    """
    states, rows = seen.states[site].to(part.R.dtype), seen.state_rows.to(part.R.device)
    counts = rows.bincount()
    if blocks is None:
        w = part.gate.soft(states)
        sums = w.new_zeros(len(counts), *w.shape[1:]).index_add(0, rows, w)
        return (sums / counts[:, None, None]).mean(0)
    blocks = blocks.to(rows.device)
    w = part.soft_each(states, blocks[rows])
    of_texts = w.new_zeros(len(counts), w.shape[-1]).index_add(0, rows, w) / counts[:, None]
    sums = w.new_zeros(part.n_blocks, w.shape[-1]).index_add(0, blocks, of_texts)
    return sums / blocks.bincount(minlength=part.n_blocks)[:, None]
