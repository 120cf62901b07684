"""An edit set as the bytes of its files, and back with every byte checked."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from baft.artifact.pieces import Checksum, Piece, read_piece, require_size, require_sum, state_file
from baft.config import canonical_hash, from_dict, to_dict
from baft.errors import BaftError, DamagedArtifactError, SchemaError
from baft.hosts.identity import HostIdentity
from baft.types import Edit, EditRequest

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
try:  # once, for it reads files
    WRITER = version("baft")
except PackageNotFoundError:  # run from its sources
    WRITER = "unknown"
CONFIG: Final = "config.json"
EDITS: Final = "edits.jsonl"
_SHARED = ("method", "preset", "seed", "settings", "layers", "positions", "host_source", "memory")


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
    pieces: tuple[Piece, ...] = ()  # what is known of files that hold these tensors already

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """The calls that made the edits."""
        unrelated, replaces = (self.memory.get(name, {}) for name in ("unrelated", "replaces"))
        return tuple(
            EditRequest(
                tuple(one.edit for one in group),
                tuple(unrelated.get(str(i), ())),
                tuple((new, old) for new, old in replaces.get(str(i), ())),
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
    files: dict[str, Checksum]


def encode_edits(edits: Sequence[StoredEdit]) -> bytes:
    """Makes edits.jsonl.

    Raises:
        DamagedArtifactError: If something in it would not be read again.
    """
    for n, one in enumerate(edits, start=1):
        _require_stored(one.request, one.decoded, f"{EDITS}, line {n}")
    rows = [
        {"id": one.edit.id, "request": one.request, "decoded": one.decoded, **one.edit.to_dict()}
        for one in edits
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def encode_config(edit_set: EditSet, files: Mapping[str, Checksum]) -> bytes:
    """Makes config.json.

    Args:
        edit_set: The set.
        files: What the other files hold.

    Raises:
        DamagedArtifactError: If something in it would not be read again.
        ConfigError: If something in it is not plain data.
    """
    config = _Config(
        schema_version=SCHEMA_VERSION,
        baft_version=WRITER,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        host=edit_set.host.to_dict(),
        n_edits=len(edit_set.edits),
        files=dict(files),
        **{name: getattr(edit_set, name) for name in _SHARED},
    )
    raw = _sealed(to_dict(config))
    _config(raw, CONFIG)
    return raw


def files_of(folder: Path, where: str) -> list[str]:
    """The files that an edit set must have beside its config.json, the pieces last and in order.

    Raises:
        DamagedArtifactError: If config.json is misshapen or changed.
        SchemaError: If it was written by another version of the format.
        OSError: If it cannot be read.
    """
    return [EDITS, *_piece_names(_config((folder / CONFIG).read_bytes(), where))]


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
    require_size(len(raw), config.files[EDITS], str(where / EDITS))
    lines = raw.split(b"\n")[:-1]
    edits = tuple(_stored_edit(line, f"{where / EDITS}, line {n}") for n, line in enumerate(lines, start=1))
    if len(edits) != config.n_edits:
        raise DamagedArtifactError(f"{where / EDITS} holds {len(edits)} edits, expected {config.n_edits}")
    require_sum(Checksum.of(raw).sha256, config.files[EDITS].sha256, str(where / EDITS))
    pieces = [
        read_piece(folder / name, config.files[name], str(where / name)) for name in _piece_names(config)
    ]
    state = {name: tensor for piece in pieces for name, tensor in piece.tensors.items()}
    if len(state) < sum(len(piece.tensors) for piece in pieces):
        raise DamagedArtifactError(f"{where}: two pieces hold a tensor of the same name")
    try:
        host = HostIdentity.from_dict(config.host)
    except DamagedArtifactError as error:
        raise DamagedArtifactError(f"{where / CONFIG}: {error}") from None
    shared = {name: getattr(config, name) for name in _SHARED}
    full = tuple(piece for piece in pieces if piece.checksum.is_full)
    return EditSet(host=host, edits=edits, state=state, pieces=full, **shared)


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
    if config.files.keys() != {EDITS, *_piece_names(config)}:
        expected = f"{EDITS} and {state_file(0)}, then its further pieces"
        raise DamagedArtifactError(f"{where}: files: expected {expected}, got {list(config.files)}")
    require_sum(actual, checksum, where)
    logger.debug("%s: format %d, by baft %s", where, config.schema_version, config.baft_version)
    return config


def _piece_names(config: _Config) -> list[str]:
    return [state_file(number) for number in range(max(1, len(config.files) - 1))]


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
