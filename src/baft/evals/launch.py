"""An experiment over many processes or machines: Ray has blocks made, the driver alone keeps the record.

A worker is a process with a `Bench` and a host of its own. It works on one task at a time, method after
method, so that it asks the untouched host once. No block depends on another, so the record comes out as the
serial run's.
"""

import contextlib
import logging
import os
import platform
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from baft.errors import BaftError, ConfigError, HostError
from baft.evals.experiment import Experiment
from baft.evals.records import Block, Record, Row, difference, sole_writer
from baft.evals.runner import Bench, OnBlock

logger = logging.getLogger(__name__)

_MAX_DEATHS = 3  # at one block, or before the first one: more than bad luck
_PATIENCE_S = 60.0
_REACH_S = 10.0
_LOOPBACK = "127.0.0.1"
_STORE_BYTES = 200 * 2**20  # of shared memory; rows are small


def require_ray() -> ModuleType:
    """The `ray` module, which takes a second to import.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"a run over many processes needs Ray, which cannot be imported ({error}): "
            "pip install 'baft[ray]', or run without it"
        ) from None
    return ray


def run_on_ray(
    bench: Bench,
    folder: Path,
    *,
    address: str | None = None,
    n_workers: int | None = None,
    on_block: OnBlock | None = None,
) -> Record:
    """Runs whatever the record in `folder` does not hold yet, as `Bench.run` does, by many workers.

    Each worker loads the experiment's host by its name. It uses as many threads as torch uses here, so that
    floating point rounds alike. The rows come in any order, and are put into the plan's at the end. A block
    whose worker dies is done again by another one.

    Args:
        bench: What is run.
        folder: Where the record is kept.
        address: Of a running Ray cluster (`host:port`, or `auto`); None starts one on this machine, which is
            reached from nowhere else. Where Ray is connected already, that cluster is used, and left.
        n_workers: How many; None takes as many as fit by their threads.
        on_block: Is told of each block that was kept.

    Raises:
        ConfigError: If Ray is missing or has no such cluster, a worker would not run what this process would,
            or the folder holds a record of something else, or is being written.
        HostError: If workers die again and again.
        BaftError: Whatever a block raises; what was kept before stays.
    """
    if n_workers is not None and n_workers < 1:
        raise ConfigError(f"n_workers must be at least 1, got {n_workers}")
    require_ray()
    with sole_writer(folder):
        record = Record(folder, bench.manifest)
        order = [(task.id, method.called) for task, method in bench.blocks]
        left = [block for block in order if block not in record.done]
        if left:
            with _connected(address, n_workers), _Crew(bench, n_workers) as crew:
                for n, rows in enumerate(crew.rows_of(left), start=len(order) - len(left) + 1):
                    record.append(rows)
                    if on_block:
                        on_block(n, len(order), f"{rows[0]['method']} on {rows[0]['task']}")
        record.sort(order)
    return record


class Worker:
    """What one process does; an actor of Ray.

    Args:
        experiment: What is run.
        data: The folder of the public files.
        folder: Where relative paths begin, if there is such a folder.
        n_threads: Of torch.
    """

    def __init__(self, experiment: Experiment, data: Path | None, folder: Path, n_threads: int):
        self._experiment, self._data, self._folder, self._n_threads = experiment, data, folder, n_threads

    def start(self, manifest: Mapping[str, Any]) -> None:
        """Loads the host and the cases.

        Raises:
            ConfigError: If a row from here would not be one of that manifest's run.
            BaftError: If something cannot be loaded.
        """
        with _told_where():
            if self._folder.is_dir():
                os.chdir(self._folder)
            torch.set_num_threads(self._n_threads)
            self._bench = Bench(self._experiment, data=self._data)
            other = difference(manifest, self._bench.manifest)
            if other is not None:
                raise ConfigError(
                    f"a worker would run something else: {other}. Give every machine of the cluster the same "
                    "host, benchmark files and packages, and the same commit of baft"
                )
            self._blocks = {(task.id, method.called): (task, method) for task, method in self._bench.blocks}

    def block(self, block: Block) -> list[Row]:
        """The rows of a block, as `Bench.block` makes them."""
        with _told_where():
            return self._bench.block(*self._blocks[block])


@contextlib.contextmanager
def _told_where() -> Iterator[None]:
    try:
        yield
    except BaftError as error:
        error.add_note(f"on the worker {platform.node()}, process {os.getpid()}")
        raise


@dataclass(eq=False)
class _Member:
    """A worker as the driver sees it.

    Args:
        actor: Its handle.
        blocks: What is left of its task, the one it is at first; none while it starts or is idle.
    """

    actor: Any
    blocks: deque[Block] = field(default_factory=deque)


class _Crew:
    """The workers of a run; they end with the context.

    Args:
        bench: What is run.
        n_workers: How many; None takes as many as fit.
    """

    def __init__(self, bench: Bench, n_workers: int | None):
        self._ray = require_ray()
        n_threads = torch.get_num_threads()
        claim, fit = _room(self._ray.nodes(), n_threads)
        self._n_workers = fit if n_workers is None else n_workers
        if self._n_workers > fit:
            logger.warning(
                f"{fit} of {self._n_workers} workers of {n_threads} threads fit into the cluster now"
            )
        elif n_workers is None and fit == 1 and n_threads > 1:
            logger.warning(f"one worker takes all {n_threads} threads: OMP_NUM_THREADS=1 makes room for more")
        data = None if bench.data is None else bench.data.absolute()
        kind: Any = self._ray.remote(num_cpus=claim, max_restarts=0)(Worker)
        self._new: Callable[[], Any] = partial(kind.remote, bench.experiment, data, Path.cwd(), n_threads)
        self._manifest = bench.manifest
        self._waiting: deque[deque[Block]] = deque()
        self._busy: dict[Any, _Member] = {}  # by what they were asked for
        self._idle: list[_Member] = []
        self._deaths: Counter[Block | None] = Counter()

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for member in [*self._busy.values(), *self._idle]:
            self._end(member)

    def rows_of(self, left: Sequence[Block]) -> Iterator[list[Row]]:
        """The rows of these blocks, as they come."""
        self._waiting.extend(deque(blocks) for _, blocks in groupby(left, key=lambda block: block[0]))
        for _ in range(min(self._n_workers, len(self._waiting))):
            self._hire()
        started = False
        while self._waiting or any(member.blocks for member in self._busy.values()):
            ready, _ = self._ray.wait(list(self._busy), timeout=None if started else _PATIENCE_S)
            if not ready:
                logger.warning(
                    f"no worker has started in {_PATIENCE_S:.0f} s: is the cluster busy, or the host large?"
                )
                continue
            member = self._busy.pop(ready[0])
            try:
                found = self._ray.get(ready[0])
            except self._ray.exceptions.RayTaskError as error:
                self._end(member)
                if isinstance(error.cause, BaftError):
                    raise error.cause from None
                raise
            except self._ray.exceptions.RayError as error:  # it died, or its node, or the rows on their way
                self._replace(member, error)
                continue
            started = True
            if member.blocks:
                member.blocks.popleft()
                yield found
            else:
                self._deaths[None] = 0
            self._assign(member)

    def _hire(self) -> None:
        member = _Member(self._new())
        self._busy[member.actor.start.remote(self._manifest)] = member

    def _assign(self, member: _Member) -> None:
        """Hands a worker its next block: of its task, or else of another."""
        if not member.blocks and self._waiting:
            member.blocks = self._waiting.popleft()
        if member.blocks:
            self._busy[member.actor.block.remote(member.blocks[0])] = member
        else:
            self._idle.append(member)

    def _replace(self, member: _Member, error: Exception) -> None:
        """Puts another worker in the place of one that is lost, and its blocks back.

        Raises:
            HostError: If that was done often.
        """
        self._end(member)
        block = member.blocks[0] if member.blocks else None
        what = "starting" if block is None else f"at {block[1]} on {block[0]}"
        self._deaths[block] += 1
        if self._deaths[block] >= _MAX_DEATHS:
            raise HostError(
                f"{_MAX_DEATHS} workers died {what}. If memory ran out, take fewer workers or a smaller "
                f"batch_size; what was done is kept. Ray says: {error}"
            ) from None
        logger.info(f"a worker died {what}; another one takes over")
        if member.blocks:
            self._waiting.appendleft(member.blocks)
        if self._idle:
            self._assign(self._idle.pop())
        else:
            self._hire()

    def _end(self, member: _Member) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(member.actor)


def _room(nodes: Sequence[Mapping[str, Any]], n_threads: int) -> tuple[int, int]:
    """How many CPUs a worker claims, and how many such workers fit.

    Raises:
        ConfigError: If there is no CPU.
    """
    n_cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    claim = min(n_threads, max(n_cpus, default=0))
    if claim < 1:
        raise ConfigError(
            "the Ray cluster has no CPUs to work with: add a node, or start one with --num-cpus"
        )
    return claim, sum(n // claim for n in n_cpus)


@contextlib.contextmanager
def _connected(address: str | None, n_workers: int | None) -> Iterator[None]:
    """Connects to a cluster, or starts one on this machine, for as long as it is needed."""
    ray = require_ray()
    if ray.is_initialized():
        if address is not None:
            raise ConfigError(
                f"Ray is connected to a cluster already, got the address {address}: leave it out, or call "
                "ray.shutdown() first"
            )
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            with _on_loopback(ray):
                ray.init(
                    address="local",
                    num_cpus=None if n_workers is None else n_workers * torch.get_num_threads(),
                    object_store_memory=_STORE_BYTES,
                    include_dashboard=False,
                    **options,
                )
        else:
            _require_reachable(address)
            ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster at {address or 'this machine'}: {error}. Give the address that "
            "`ray start --head` printed, or none to start one here"
        ) from error
    try:
        others = {node["NodeManagerAddress"] for node in ray.nodes()} - {_LOOPBACK}
        if address is None and others:
            raise ConfigError(
                f"this Ray ({ray.__version__}) would listen to other machines at {', '.join(others)}: "
                "start a cluster yourself with `ray start --head`, and give its address"
            )
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _on_loopback(ray: ModuleType) -> Iterator[None]:
    """Keeps a cluster to this machine.

    Ray serves whoever reaches it, and listens to every machine where it can have clusters at all; asked for
    the loopback address, it takes the public one instead. On Windows and macOS it has none; so here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it reports to its makers
    constants = ray._private.ray_constants
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def _require_reachable(address: str) -> None:
    """Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
