"""Scope heads as they are kept: shipped with the package for some hosts, in the cache for others.

A file holds the head in float16, the ordinary texts that an edit's own threshold is set on, and how it came
about: settings, seed, host, and what is known of its thresholds.
"""

import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baft.errors import ArtifactError, DamagedArtifactError, HostMismatchError
from baft.hosts.architecture import find_architecture, input_device
from baft.hosts.early import n_features
from baft.hosts.encoding import Encoder
from baft.hosts.identity import HostIdentity, compare, identify
from baft.hosts.kept import kept_path, write_whole
from baft.hosts.models import Host
from baft.nn.scope import ScopeHead, ScopeKeys
from baft.scope.calibration import Calibration, Ordinary, calibrate, own_thresholds, read_ordinary
from baft.scope.index import fingerprint
from baft.scope.reading import Reader
from baft.scope.training import ScopeConfig, train_scope

logger = logging.getLogger(__name__)

_FORMAT = "baft-scope-3"
_NET, _VECTORS, _LENGTHS = "net.", "ordinary.vectors", "ordinary.lengths"


@dataclass(frozen=True, slots=True)
class About:
    """How a head came about.

    Args:
        host: The host that it is of.
        config: Settings of the training.
        seed: Of the training.
        calibration: The thresholds, and what is known of them.
        seconds: How long training and calibration took.
    """

    host: HostIdentity
    config: ScopeConfig
    seed: int
    calibration: Calibration
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A trained scope head with its thresholds.

    Args:
        net: Maps what is read of tokens to vectors and weights.
        ordinary: Texts that must fire no edit.
        about: How it came about.
    """

    net: ScopeHead
    ordinary: Ordinary
    about: About

    @property
    def discounts(self) -> Float[Tensor, " channel"]:
        """What 24 tokens of distance from the end of a prompt cost."""
        return self.net.discounts

    @property
    def n_dims(self) -> int:
        """Width of the vectors."""
        return self.ordinary.vectors.shape[-1]

    def keys(
        self, features: Float[Tensor, "edit token n_features"], real: Bool[Tensor, "edit token"]
    ) -> ScopeKeys:
        """What edits are found by, from the words of their prompts; see `ScopeHead.keys`."""
        return self.net.keys(features, real)

    def thresholds(self, keys: ScopeKeys) -> Float[Tensor, " edit"]:
        """The log-probability above which each edit acts; of its own keys and the host, of no other edit."""
        return own_thresholds(self.net, self.ordinary, keys)

    @property
    def fingerprint(self) -> int:
        """A number that tells this head from others."""
        return fingerprint([*self.net.state_dict().values(), self.ordinary.vectors])

    def log_probability(self, scores: Float[Tensor, "channel prompt edit"]) -> Float[Tensor, "prompt edit"]:
        """How sure it is that a prompt is about an edit; see `ScopeHead.log_probability`."""
        return self.net.log_probability(scores)


def find_head(host: Host) -> Head | None:
    """The head of a host: the one that comes with baft, else the one in the cache; None without any.

    Of the shipped ones, a head of the same weights in another precision will do; the cache has one for each
    precision. Files in the cache that cannot be read are passed over with a warning.
    """
    shipped = shipped_head(host)
    if shipped is not None:
        return shipped
    path = cached_at(host)
    if path is None or not path.is_file():
        return None
    try:
        return read_head(path, host)
    except ArtifactError as error:
        logger.warning("the scope head in the cache is passed over: %s", error)
        return None


def shipped_head(host: Host) -> Head | None:
    """The head that comes with baft, if it has one for this host."""
    folder = files("baft.scope").joinpath("shipped")
    for path in sorted(Path(str(folder)).glob("*.safetensors")):
        with suppress(HostMismatchError):
            return read_head(path, host)
    return None


def cached_at(host: Host) -> Path | None:
    """Where a head that was trained here is kept; nowhere while others' hooks may change the host."""
    return kept_path("scope", host, _FORMAT)


def train_head(
    host: Host,
    config: ScopeConfig | None = None,
    *,
    seed: int = 0,
    path: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Head:
    """Trains and calibrates a head, and keeps it.

    Args:
        host: The host; it is not changed.
        config: Settings; by default those of `ScopeConfig`.
        seed: Of all that is drawn.
        path: Where to keep it instead of in the cache, where `find_head` finds it.
        on_step: Called after every step with its number, how many there are, and the loss.

    Raises:
        ArtifactError: If it cannot be written.
    """
    began = time.monotonic()
    config = config or ScopeConfig()
    reader = Reader(host, Encoder.for_host(host))
    net = train_scope(reader, config, seed=seed, on_step=on_step)
    net = net.half().float()  # as it is kept, so that it is calibrated as it is used
    with torch.no_grad():
        ordinary = read_ordinary(reader, net)
        ordinary = Ordinary(ordinary.vectors.half().float(), ordinary.lengths)
        calibration = calibrate(
            reader,
            net,
            ordinary,
            other_subject=config.other_subject_share,
            other_relation=config.other_relation_share,
            n_groups=config.n_calibrate,
            seed=seed,
        )
    head = Head(net, ordinary, About(identify(host), config, seed, calibration, time.monotonic() - began))
    path = path or cached_at(host)
    if path is not None:
        write_head(path, head)
    return head


def write_head(path: Path, head: Head) -> None:
    """Writes a head, all or nothing.

    Raises:
        ArtifactError: If it cannot be written.
    """
    tensors = {_NET + name: one for name, one in head.net.state_dict().items()}
    tensors[_VECTORS] = head.ordinary.vectors
    tensors = {name: _compact(one) for name, one in tensors.items()}
    tensors[_LENGTHS] = torch.tensor(head.ordinary.lengths, dtype=torch.int32)
    about = {"format": _FORMAT, "about": json.dumps(_to_dict(head.about), sort_keys=True)}
    try:
        write_whole(path, tensors, about)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"the scope head cannot be written to {path}: {error}; choose another file, or set BAFT_CACHE to "
            "a folder that can be written"
        ) from error


def read_head(path: Path, host: Host) -> Head:
    """Reads a head and puts it where its host takes its input.

    Raises:
        HostMismatchError: If it is another host's.
        DamagedArtifactError: If it is no head, or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            if (found := str(said.get("format"))) != _FORMAT:
                older = found.startswith(_FORMAT.rstrip("0123456789"))
                what = "an older scope head" if older else "no scope head"
                raise DamagedArtifactError(
                    f"{path} is {what}: got format {found!r}, expected {_FORMAT!r}; train one with "
                    "`baft scope train`"
                )
            about = _from_dict(json.loads(said["about"]))
            require_host(about, host)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _assembled(about, tensors, host)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedArtifactError(
            f"the scope head {path} cannot be read: {error}; delete it and train it anew with "
            "`baft scope train`"
        ) from error


def require_host(about: About, host: Host) -> None:
    """Refuses a host that a head is not of.

    Raises:
        HostMismatchError: If weights, architecture or tokenizer are others.
    """
    actual = identify(host)
    compare(about.host, actual)
    if about.host.tokenizer_hash != actual.tokenizer_hash:
        raise HostMismatchError(
            f"the scope head of {about.host.name} was trained with another tokenizer or chat template than "
            f"{actual.name} has: train one with `baft scope train`"
        )


def _assembled(about: About, tensors: dict[str, Tensor], host: Host) -> Head:
    config, device = about.config, input_device(host.model)
    width = n_features(find_architecture(host.model))
    with torch.device("meta"):
        net = ScopeHead(width, n_dims=config.n_dims, n_hidden=config.n_hidden)
    state = {
        name.removeprefix(_NET): one.to(device, torch.float32)
        for name, one in tensors.items()
        if name.startswith(_NET)
    }
    net.load_state_dict(state, assign=True)
    vectors, lengths = tensors[_VECTORS].to(device, torch.float32), tuple(tensors[_LENGTHS].tolist())
    expected = (len(net.projections), sum(lengths), config.n_dims)
    if vectors.shape != expected:
        raise ValueError(f"{_VECTORS} has the shape {tuple(vectors.shape)}, expected {expected}")
    if not all(bool(one.isfinite().all()) for one in (*state.values(), vectors)):
        raise ValueError("a tensor is not finite")
    return Head(net.requires_grad_(False), Ordinary(vectors, lengths), about)


def _compact(tensor: Tensor) -> Tensor:
    """Large ones in half the bytes."""
    return tensor.to("cpu", torch.float16 if tensor.ndim > 1 else torch.float32).contiguous()


def _to_dict(about: About) -> dict[str, Any]:
    return {**asdict(about), "host": about.host.to_dict()}


def _from_dict(row: dict[str, Any]) -> About:
    return About(
        HostIdentity.from_dict(row["host"]),
        ScopeConfig(**row["config"]),
        row["seed"],
        Calibration(**row["calibration"]),
        row["seconds"],
    )
