"""An edit set as the bytes of its files, and back with every byte checked.

Tensors stand in pieces, in the order in which edits added them. A piece that is full is never written again:
an artifact that is saved anew links to those that it holds already, so that one more edit is an append.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baft.config import canonical_hash, from_dict, to_dict
from baft.errors import BaftError, DamagedArtifactError, SchemaError
from baft.hosts.identity import HostIdentity
from baft.types import Edit, EditRequest

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
try:  # once, for it reads files
    WRITER = version("baft")
except PackageNotFoundError:  # run from its sources
    WRITER = "unknown"
CONFIG: Final = "config.json"
EDITS: Final = "edits.jsonl"
PIECE_BYTES = 4 << 20  # of tensors: a piece that holds as many is full

_RESERVED = "__metadata__"  # the one name that safetensors keeps for itself; ours gets a sign in front
_SHARED = ("method", "preset", "seed", "settings", "layers", "positions", "host_source", "memory")


def state_file(number: int) -> str:
    """The name of a piece of the tensors, counted from 0."""
    return f"state-{number}.safetensors" if number else "state.safetensors"


def is_file(name: str) -> bool:
    """Whether a file of an artifact can have such a name."""
    return name in (CONFIG, EDITS) or re.fullmatch(r"state(-[1-9]\d*)?\.safetensors", name) is not None


Stamp = tuple[int, int, int, int]  # device, inode, bytes, time of the last change


@dataclass(frozen=True, eq=False)
class Piece:
    """A full piece: tensors as a file holds them, to which nothing is ever added.

    Args:
        path: The file.
        stamp: What tells whether it is still the same.
        size_bytes: Its size.
        sha256: Of its content.
        tensors: The tensors, by name.
        is_mapped: Whether they stand in the file itself.
    """

    path: Path
    stamp: Stamp
    size_bytes: int
    sha256: str
    tensors: Mapping[str, Tensor]
    is_mapped: bool = False


def stamp(file: Path | int) -> Stamp:
    """What tells a file, by its path or as it is open, from another, and from itself once it is changed."""
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class StoredEdit:
    """An edit as an artifact holds it."""

    edit: Edit
    request: int  # which optimization made it, counted from 0
    decoded: bool  # whether the edited host said the target when the edit was made


@dataclass(frozen=True, eq=False)
class EditSet:
    """All that brings a set of edits back on its host; `Any` is plain JSON data, tuples become lists."""

    method: str
    preset: str  # where the settings began
    seed: int
    settings: dict[str, Any]  # the configuration of the method
    layers: tuple[int, ...]
    positions: dict[str, Any]  # which tokens are edited; for readers
    host: HostIdentity
    host_source: str  # name, folder or hub id that loads the host; empty for a live one
    edits: tuple[StoredEdit, ...]  # in order
    memory: dict[str, Any]  # whatever else the method must remember
    state: dict[str, Tensor]  # what the edits added, in the order in which they did; read on the CPU
    pieces: tuple[Piece, ...] = ()  # full ones, from the first on, that hold these tensors already

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """The calls that made the edits."""
        unrelated, replaces = (self.memory.get(name, []) for name in ("unrelated", "replaces"))
        return tuple(
            EditRequest(
                tuple(one.edit for one in group),
                tuple(unrelated[i]) if i < len(unrelated) else (),
                tuple((new, old) for new, old in replaces[i]) if i < len(replaces) else (),
            )
            for i, group in enumerate(self._by_request())
        )

    @property
    def decoded(self) -> tuple[tuple[bool, ...], ...]:
        """Whether each edit was decoded when it was made, by request."""
        return tuple(tuple(one.decoded for one in group) for group in self._by_request())

    def _by_request(self) -> list[list[StoredEdit]]:
        grouped: dict[int, list[StoredEdit]] = {}
        for one in self.edits:
            grouped.setdefault(one.request, []).append(one)
        return list(grouped.values())


@dataclass(frozen=True)
class _File:
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, raw: bytes) -> "_File":
        return cls(len(raw), _sha256(raw))

    @property
    def is_full(self) -> bool:
        return self.size_bytes >= PIECE_BYTES


@dataclass(frozen=True)
class _Config:
    """What config.json holds, besides `sha256`, the canonical hash of the rest."""

    schema_version: int
    baft_version: str
    created: str
    method: str
    preset: str
    seed: int
    settings: dict[str, Any]
    layers: tuple[int, ...]
    positions: dict[str, Any]
    host_source: str
    host: dict[str, Any]
    n_edits: int
    memory: dict[str, Any]
    files: dict[str, _File]


@dataclass(frozen=True)
class Encoded:
    """An edit set as it is to be written.

    Args:
        files: The content of files, by name.
        full: The full pieces, by name, in order: those that are not among the files are there already, the
            others have no stamp yet.
    """

    files: dict[str, bytes]
    full: dict[str, Piece]


def encode(edit_set: EditSet, *, anew: bool = False) -> Encoded:
    """Makes the files of an edit set.

    Args:
        edit_set: The set.
        anew: Whether to make those, too, that are there already.

    Raises:
        DamagedArtifactError: If something in it would not be read again.
        ConfigError: If something in it is not plain data.
    """
    for n, one in enumerate(edit_set.edits, start=1):
        _require_stored(one.request, one.decoded, f"{EDITS}, line {n}")
    rows = [
        {"id": one.edit.id, "request": one.request, "decoded": one.decoded, **one.edit.to_dict()}
        for one in edit_set.edits
    ]
    edits = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    made = Encoded({EDITS: edits.encode()}, {})
    about = {EDITS: _File.of(made.files[EDITS])}
    for number, (tensors, piece) in enumerate(_in_pieces(edit_set.state, () if anew else edit_set.pieces)):
        name = state_file(number)
        if piece is None:
            made.files[name] = raw = _safetensors(tensors, name)
            about[name] = file = _File.of(raw)
            if file.is_full:
                made.full[name] = Piece(Path(name), (0, 0, 0, 0), file.size_bytes, file.sha256, tensors)
        else:
            made.full[name], about[name] = piece, _File(piece.size_bytes, piece.sha256)
    config = _Config(
        schema_version=SCHEMA_VERSION,
        baft_version=WRITER,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        host=edit_set.host.to_dict(),
        n_edits=len(rows),
        files=about,
        **{name: getattr(edit_set, name) for name in _SHARED},
    )
    made.files[CONFIG] = _sealed(to_dict(config))
    _config(made.files[CONFIG], CONFIG)
    return made


def _safetensors(tensors: Mapping[str, Tensor], name: str) -> bytes:
    copies = {  # as safetensors stores no shared memory
        _escape(key): tensor.detach().to("cpu", copy=True).contiguous().resolve_conj()
        for key, tensor in tensors.items()
    }
    _require_finite(copies, name)
    return safetensors.torch.save(copies)


def _in_pieces(
    state: Mapping[str, Tensor], pieces: Sequence[Piece]
) -> Iterator[tuple[dict[str, Tensor], Piece | None]]:
    """Tensors in the order of a table, cut where a piece is full, each cut with the file that holds it."""
    items, start = list(state.items()), 0
    for piece in pieces:
        here = dict(items[start : start + len(piece.tensors)])
        same = here.keys() == piece.tensors.keys() and all(
            piece.tensors[name] is tensor for name, tensor in here.items()
        )
        if not same:
            break
        yield here, piece
        start += len(here)
    here, n_bytes = dict[str, Tensor](), 0
    for name, tensor in items[start:]:
        here[name] = tensor
        n_bytes += tensor.nbytes
        if n_bytes >= PIECE_BYTES:
            yield here, None
            here, n_bytes = {}, 0
    if here or not items:
        yield here, None


def decode(folder: Path, where: Path) -> EditSet:
    """Reads an edit set. Full pieces are mapped, and read from the disk as they are used.

    Args:
        folder: Where its files are.
        where: What messages call that.

    Raises:
        DamagedArtifactError: If something in them is truncated, misshapen, changed or not finite.
        SchemaError: If they were written by another version of the format.
        OSError: If one of them cannot be read.
    """
    raw = (folder / EDITS).read_bytes()  # first, as hosts have a config.json too
    config = _config((folder / CONFIG).read_bytes(), str(where / CONFIG))
    _require_size(len(raw), config.files[EDITS], str(where / EDITS))
    lines = raw.split(b"\n")[:-1]
    edits = tuple(_stored_edit(line, f"{where / EDITS}, line {n}") for n, line in enumerate(lines, start=1))
    if len(edits) != config.n_edits:
        raise DamagedArtifactError(f"{where / EDITS} holds {len(edits)} edits, expected {config.n_edits}")
    _require_sum(_sha256(raw), config.files[EDITS].sha256, str(where / EDITS))
    state, pieces, n = dict[str, Tensor](), list[Piece](), 0
    for name, expected in config.files.items():
        if name != EDITS:
            tensors, found = _tensors(folder / name, expected, str(where / name))
            state.update(tensors)
            n += len(tensors)
            if expected.is_full:
                size_bytes, sha256 = expected.size_bytes, expected.sha256
                pieces.append(Piece(folder / name, found, size_bytes, sha256, tensors, is_mapped=True))
    if len(state) < n:
        raise DamagedArtifactError(f"{where}: two pieces hold a tensor of the same name")
    try:
        host = HostIdentity.from_dict(config.host)
    except DamagedArtifactError as error:
        raise DamagedArtifactError(f"{where / CONFIG}: {error}") from None
    shared = {name: getattr(config, name) for name in _SHARED}
    return EditSet(host=host, edits=edits, state=state, pieces=tuple(pieces), **shared)


def _tensors(path: Path, expected: _File, where: str) -> tuple[dict[str, Tensor], Stamp]:
    """The tensors of a piece, and of which file they are."""
    try:
        with path.open("rb") as file:
            found = stamp(file.fileno())
            _require_size(found[2], expected, where)
            if expected.is_full:
                _require_sum(hashlib.file_digest(file, "sha256").hexdigest(), expected.sha256, where)
                with safe_open(path, "pt") as opened:
                    tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                if stamp(path) != found:
                    raise DamagedArtifactError(f"{where} was replaced while it was read")
            else:
                raw = file.read()
                _require_sum(_sha256(raw), expected.sha256, where)
                tensors = safetensors.torch.load(raw)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise DamagedArtifactError(f"{where}: not a safetensors file: {error}") from None
    state = {_unescape(name): tensors[name] for name in sorted(tensors)}
    _require_finite(state, where)
    return state, found


def _config(raw: bytes, where: str) -> _Config:
    row = _parse(raw, where)
    found = row.get("schema_version")
    if type(found) is not int:
        raise DamagedArtifactError(f"{where}: expected a whole number as schema_version, got {found!r}")
    if found != SCHEMA_VERSION:
        age, mend = ("a newer", "upgrade baft") if found > SCHEMA_VERSION else ("an older", "edit anew")
        raise SchemaError(
            f"{where}: written by {age} baft ({row.get('baft_version')}) in format {found}, but this baft "
            f"({WRITER}) reads format {SCHEMA_VERSION}: {mend}, or use the baft that wrote it"
        )
    checksum = row.pop("sha256", None)
    try:
        config = from_dict(_Config, row, where=where)
        actual = canonical_hash(row)
    except BaftError as error:
        raise DamagedArtifactError(str(error)) from None
    names = [EDITS, *(state_file(number) for number in range(max(1, len(config.files) - 1)))]
    if list(config.files) != names:
        expected = " and ".join(names[:2]) + ", then its further pieces in order"
        raise DamagedArtifactError(f"{where}: files: expected {expected}, got {list(config.files)}")
    _require_sum(actual, checksum, where)
    logger.debug("%s: format %d, by baft %s", where, config.schema_version, config.baft_version)
    return config


def _stored_edit(line: bytes, where: str) -> StoredEdit:
    row = _parse(line, where)
    name, request, decoded = (row.pop(key, None) for key in ("id", "request", "decoded"))
    try:
        edit = Edit.from_dict(row, where=where)
    except BaftError as error:
        raise DamagedArtifactError(str(error)) from None
    _require_stored(request, decoded, where)
    if name != edit.id:
        raise DamagedArtifactError(f"{where}: the id of this content is {edit.id}, got {name!r}")
    return StoredEdit(edit, request, decoded)


def _require_stored(request: object, decoded: object, where: str) -> None:
    if type(request) is not int or request < 0 or type(decoded) is not bool:
        got = f"{request!r} and {decoded!r}"
        raise DamagedArtifactError(
            f"{where}: expected a count as request and true or false as decoded, got {got}"
        )


def _require_finite(state: Mapping[str, Tensor], where: str) -> None:
    by_kind = dict[torch.dtype, list[str]]()
    for name, tensor in state.items():
        by_kind.setdefault(tensor.dtype, []).append(name)
    for names in by_kind.values():
        if not _is_finite(torch.cat([state[name].flatten() for name in names])):  # at once, for speed
            name = next(name for name in names if not _is_finite(state[name]))
            raise DamagedArtifactError(f"{where}: tensor {_unescape(name)!r} holds NaN or infinity")


def _is_finite(tensor: Tensor) -> bool:
    is_byte = tensor.is_floating_point() and tensor.element_size() == 1  # a float8 knows no isfinite
    return bool(torch.isfinite(tensor.float() if is_byte else tensor).all())


def _escape(name: str) -> str:
    return f"+{name}" if name.lstrip("+") == _RESERVED else name


def _unescape(name: str) -> str:
    return name[1:] if name.lstrip("+") == _RESERVED else name


def _require_size(n: int, expected: _File, where: str) -> None:
    if n != expected.size_bytes:
        what = "is truncated" if n < expected.size_bytes else "is too long"
        raise DamagedArtifactError(f"{where} {what}: {n} bytes, expected {expected.size_bytes}")


def _require_sum(actual: str, expected: object, where: str) -> None:
    if actual != expected:
        raise DamagedArtifactError(f"{where} was changed: its sha256 is {actual}, expected {expected!r}")


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise DamagedArtifactError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise DamagedArtifactError(f"{where}: expected a JSON object, got {type(found).__name__}")
    return found


def _sealed(plain: dict[str, Any]) -> bytes:
    return (_pretty(plain | {"sha256": canonical_hash(plain)}) + "\n").encode()


def _pretty(value: Any, line: str = "\n") -> str:
    """JSON with tables over several lines and lists on one."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    rows = [
        f"{json.dumps(key, ensure_ascii=False)}: {_pretty(part, line + '  ')}" for key, part in value.items()
    ]
    return "{" + ",".join(f"{line}  {row}" for row in rows) + line + "}"
