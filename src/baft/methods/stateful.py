"""Editors whose edits are one table of named tensors, which every request replaces whole.

Undo, saving, loading and "all or nothing" are the same for all of them, and stand here once. A method says
how a request changes the table (`fit`), what of it is in force (`put`), and what it must hold (`layout`).
"""

import contextlib
import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from baft.errors import DamagedArtifactError, UndoError
from baft.hosts.architecture import Site, find_architecture, input_device, intervention_dtype, site_device
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import EncodedEdit, Encoder
from baft.hosts.models import Host
from baft.hosts.passes import Pass
from baft.hosts.patches import DeltaPatch, Patch, down_projection, weight_shape
from baft.hosts.positions import PositionSpec
from baft.hosts.suffix import quickest_pass, sites_below
from baft.methods.base import Capability, Editor, EditOutcome, OnStep
from baft.types import EditRequest

State = Mapping[str, Tensor]
Layout = Mapping[str, tuple[int | None, ...]]  # shapes by name; None where any length will do


class StatefulEditor(Editor):
    """A method whose edits are one table of tensors.

    Tensors of a table are never changed once it is made, so that tables may share them.

    Args:
        host: The host; never changed.
        config: The method's settings.
        seed: Of everything random in it.
    """

    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.BATCH, Capability.SEQUENTIAL, Capability.EXACT_UNDO}
    )
    # Tables before the present one that undo can go back to, saved ones included.
    n_remembered: ClassVar[int] = 4
    positions: ClassVar[PositionSpec] = PositionSpec()

    def __init__(self, host: Host, config: Any, *, seed: int = 0):
        super().__init__(host, config, seed=seed)
        self._edited = EditedModel(host.model, {}, self.positions)
        self.encoder = Encoder.for_host(host, max_tokens=find_architecture(host.model).max_positions)
        self._state: State = {}
        self._before: tuple[State, ...] = ()

    @abstractmethod
    def fit(
        self, request: EditRequest, state: State, on_step: OnStep | None
    ) -> tuple[Mapping[str, Tensor], EditOutcome]:
        """The table with the edits of a request on top of those in `state`; changes nothing else."""

    @abstractmethod
    def put(self, edited: EditedModel, state: State, requests: Sequence[EditRequest]) -> None:
        """Puts what a table says into force; an empty one is the host."""

    @abstractmethod
    def layout(self, requests: Sequence[EditRequest], state: State) -> Layout:
        """The names and shapes of a table for these requests; `state` may tell what is free to vary."""

    @property
    def edited(self) -> EditedModel:
        """The host with the edits in force."""
        return self._edited

    @property
    def state(self) -> State:
        """The table in force."""
        return self._state

    @property
    def device(self) -> torch.device:
        """Where tables live, unless `held` says otherwise, and what is put together from them."""
        return input_device(self.host.model)

    def apply(self, request: EditRequest, *, on_step: OnStep | None = None) -> EditOutcome:
        """Makes the edits of a request; nothing changes unless all of it succeeds."""
        made, outcome = self.fit(request, self._state, on_step)
        state = {  # those that are held already take no gradient
            name: tensor if self._state.get(name) is tensor else tensor.detach()
            for name, tensor in made.items()
        }
        with self._all_or_nothing():
            self._before = self.remembered((*self._before, self._state))
            self._state, self.requests = state, (*self.requests, request)
            self._put()
        return outcome

    def undo(self, n: int = 1) -> tuple[EditRequest, ...]:
        """Takes the last `n` requests back, every bit of them."""
        gone = self._taken_back(n)
        left = self.requests[: len(self.requests) - n]
        state = self.state_before(n)
        with self._all_or_nothing():
            self._before = self._before[: max(0, len(self._before) - n)]
            self._state, self.requests = state, left
            self._put()
        return gone

    def state_before(self, n: int) -> State:
        """The table before the last `n` requests.

        Raises:
            UndoError: If it is no longer known.
        """
        if n == len(self.requests):
            return {}
        if n > len(self._before):
            raise UndoError(
                f"cannot take back {n} requests: {self.name} remembers what was before the last "
                f"{self.n_remembered}, and of these {len(self._before)} are left; take back no more than "
                "that, or all, or edit the host anew without those that you do not want"
            )
        return self._before[-n]

    def remembered(self, before: tuple[State, ...]) -> tuple[State, ...]:
        """Which of the earlier tables are kept, the latest last."""
        return before[-self.n_remembered :]

    def reset(self) -> None:
        """Forgets every edit."""
        with self._all_or_nothing():
            self._state, self._before, self.requests = {}, (), ()
            self._put()

    def state_dict(self) -> dict[str, Tensor]:
        """The table in force, and those that undo can go back to, copied."""
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """The same, not copied where they are on the CPU."""
        found = {name: tensor.cpu() for name, tensor in self._state.items()}
        first = len(self.requests) - len(self._before)
        for n, earlier in enumerate(self._before, start=first):
            found |= {f"before{n}.{name}": tensor.cpu() for name, tensor in earlier.items()}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor], requests: Sequence[EditRequest]) -> None:
        """Puts saved edits into force in place of the present ones."""
        left = dict(state)
        by_number: dict[int, dict[str, Tensor]] = {}
        for name in sorted(left):
            head, _, rest = name.partition(".")
            number = head.removeprefix("before")
            if head != number and number.isdecimal():
                by_number.setdefault(int(number), {})[rest] = left.pop(name)
        now = self._checked(left, requests, "")
        before: list[State] = []
        for n in range(max(0, len(requests) - self.n_remembered), len(requests)):
            if n == 0:
                before = [{}]
            elif n in by_number:
                before.append(self._checked(by_number.pop(n), requests[:n], f"before{n}."))
            else:
                before = []  # forgotten, and with it the way to all that was earlier
        if by_number:
            stranger = min(by_number)
            raise DamagedArtifactError(
                f"tensor 'before{stranger}.{min(by_number[stranger])}' belongs to no edit of this set"
            )
        with self._all_or_nothing():
            self._state, self._before, self.requests = now, self.remembered(tuple(before)), tuple(requests)
            self._put()

    def _checked(self, given: State, requests: Sequence[EditRequest], prefix: str) -> State:
        layout = self.layout(requests, given) if requests else {}
        for name, shape in layout.items():
            if name not in given:
                raise DamagedArtifactError(f"tensor {prefix + name!r} is missing")
            got = tuple(given[name].shape)
            if len(got) != len(shape) or any(
                want not in (None, n) for n, want in zip(got, shape, strict=True)
            ):
                expected = ", ".join("any" if n is None else str(n) for n in shape)
                raise DamagedArtifactError(
                    f"tensor {prefix + name!r} has shape {list(got)}, expected [{expected}]"
                )
        strangers = sorted(given.keys() - layout.keys())
        if strangers:
            raise DamagedArtifactError(f"tensor {prefix + strangers[0]!r} belongs to no edit of this set")
        return {name: self.held(tensor) for name, tensor in given.items()}

    def held(self, tensor: Tensor) -> Tensor:
        """A saved tensor as tables hold it: a copy of its own.

        It stands where allocations do, for what products give depends on where their numbers stand.
        """
        return tensor.clone().to(self.device)

    def _put(self) -> None:
        self.put(self._edited, self._state, self.requests)

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Sets everything back if what is inside breaks off, such as by Ctrl-C between two lines."""
        kept = self._state, self._before, self.requests
        try:
            yield
        except BaseException:
            self._state, self._before, self.requests = kept
            self._put()
            raise

    def pass_over(self, texts: Sequence[EncodedEdit]) -> tuple[Pass, str | None]:
        """The cheapest pass over some texts, where modules of the sites are patched; why it is the whole one.

        Args:
            texts: Prompts with their targets.
        """
        below = sites_below(min(self.sites))
        reach = max(len(text.prompt_ids) for text in texts)
        return quickest_pass(self.host, self.encoder, self.positions, texts, below, reach=reach)


class DownProjectionEditor(StatefulEditor):
    """A method that edits what one block's down-projection puts out.

    Args:
        host: The host; never changed.
        config: The method's settings.
        layer: The block.
        seed: Of everything random in it.

    Raises:
        ConfigError: If the host has no such layer.
        UnsupportedHostError: If the layer has no down-projection of its own.
    """

    def __init__(self, host: Host, config: Any, layer: int, *, seed: int = 0):
        super().__init__(host, config, seed=seed)
        self.sites = (Site(layer),)
        self.module = down_projection(host.model, layer)

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)` of the down-projection."""
        return weight_shape(self.host.model.get_submodule(self.module))

    @property
    def device(self) -> torch.device:
        """Where the block computes."""
        return site_device(self.host.model, self.sites[0])


class AdditiveEditor(StatefulEditor):
    """A method whose requests add tensors and change none; names begin with the request's number and a dot.

    What was before any of them is known for good, and nothing need be kept twice.
    """

    def state_before(self, n: int) -> State:
        """The table without what the last `n` requests added."""
        left = len(self.requests) - n
        return {name: tensor for name, tensor in self._state.items() if number_of(name) < left}

    def remembered(self, before: tuple[State, ...]) -> tuple[State, ...]:
        """None: the present table tells."""
        return ()


class LowRankEditor(AdditiveEditor):
    """A method whose requests each add a matrix of low rank to the weights of some modules.

    The factors of module `name` stand in the table as `{request}.{name}.up`, `[d_out, rank]`, and
    `{request}.{name}.down`, `[rank, d_in]`.
    """

    @property
    @abstractmethod
    def named(self) -> Mapping[str, str]:
        """The names under which modules stand in tables, and their names in the host."""

    def put(self, edited: EditedModel, state: State, requests: Sequence[EditRequest]) -> None:
        """The matrices of all requests are added to what the modules put out."""
        edited.patches = self.patches(state)

    def patches(self, state: State) -> dict[str, Patch]:
        """What puts a table into force."""
        found: dict[str, Patch] = {}
        for short, module in self.named.items():
            ups = sorted((number_of(name), name) for name in state if name.endswith(f".{short}.up"))
            pairs = [(state[name], state[name.removesuffix("up") + "down"]) for _, name in ups]
            if pairs:
                found[module] = DeltaPatch(pairs)
        return found

    def pair(self, short: str, up: Tensor, down: Tensor) -> dict[str, Tensor]:
        """A matrix as the tensors of the request that comes after those in force."""
        start = f"{len(self.requests)}.{short}"
        return {f"{start}.up": self.kept(up), f"{start}.down": self.kept(down)}

    def kept(self, tensor: Tensor) -> Tensor:
        """A tensor as tables hold it."""
        return tensor.to(self.device, intervention_dtype(self.host.model)).contiguous()


def number_of(name: str) -> int:
    """The number of the request that added a tensor of an additive method; -1 where the name has none."""
    head = "".join(itertools.takewhile(str.isdecimal, name))
    return int(head) if head and name[len(head) : len(head) + 1] == "." else -1
