"""An edit set as the bytes of its three files, and back with every byte checked."""

import hashlib
import json
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
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
CONFIG, EDITS, STATE = FILES = ("config.json", "edits.jsonl", "state.safetensors")

_RESERVED = "__metadata__"  # the one name that safetensors keeps for itself; ours gets a sign in front
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
    state: dict[str, Tensor]  # what the edits added; read on the CPU, sorted by name

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


def encode(edit_set: EditSet) -> dict[str, bytes]:
    """Returns the content of every file by its name."""
    rows = [
        {"id": one.edit.id, "request": one.request, "decoded": one.decoded, **one.edit.to_dict()}
        for one in edit_set.edits
    ]
    tensors = {  # copies, as safetensors stores no shared memory
        _escape(name): tensor.detach().to("cpu", copy=True).contiguous().resolve_conj()
        for name, tensor in edit_set.state.items()
    }
    edits = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files = {EDITS: edits.encode(), STATE: safetensors.torch.save(tensors)}
    config = _Config(
        schema_version=SCHEMA_VERSION,
        baft_version=WRITER,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        host=edit_set.host.to_dict(),
        n_edits=len(rows),
        files={name: _File(len(raw), _sha256(raw)) for name, raw in files.items()},
        **{name: getattr(edit_set, name) for name in _SHARED},
    )
    return {CONFIG: _sealed(to_dict(config)), **files}


def with_host(raw: bytes, *, name: str, source: str) -> bytes:
    """Returns the content of config.json with another name of the host and another source of it."""
    plain = json.loads(raw)
    plain |= {"host_source": source, "host": plain["host"] | {"name": name}}
    return _sealed({key: value for key, value in plain.items() if key != "sha256"})


def decode(files: dict[str, bytes], where: Path) -> EditSet:
    """Makes an edit set of the content of its files.

    Raises:
        DamagedArtifactError: If something in them is truncated, misshapen, changed or not finite.
        SchemaError: If they were written by another version of the format.
    """
    config = _config(files[CONFIG], str(where / CONFIG))
    for name in (EDITS, STATE):
        n, expected = len(files[name]), config.files[name].size_bytes
        if n != expected:
            what = "is truncated" if n < expected else "is too long"
            raise DamagedArtifactError(f"{where / name} {what}: {n} bytes, expected {expected}")
    lines = files[EDITS].split(b"\n")[:-1]
    edits = tuple(_stored_edit(line, f"{where / EDITS}, line {n}") for n, line in enumerate(lines, start=1))
    if len(edits) != config.n_edits:
        raise DamagedArtifactError(f"{where / EDITS} holds {len(edits)} edits, expected {config.n_edits}")
    for name in (EDITS, STATE):
        _require_sum(_sha256(files[name]), config.files[name].sha256, str(where / name))
    state = _tensors(files[STATE], str(where / STATE))
    try:
        host = HostIdentity.from_dict(config.host)
    except DamagedArtifactError as error:
        raise DamagedArtifactError(f"{where / CONFIG}: {error}") from None
    return EditSet(host=host, edits=edits, state=state, **{name: getattr(config, name) for name in _SHARED})


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
    if set(config.files) != {EDITS, STATE}:
        raise DamagedArtifactError(f"{where}: files: expected {EDITS} and {STATE}, got {list(config.files)}")
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
    if type(request) is not int or request < 0 or type(decoded) is not bool:
        got = f"{request!r} and {decoded!r}"
        raise DamagedArtifactError(
            f"{where}: expected a count as request and true or false as decoded, got {got}"
        )
    if name != edit.id:
        raise DamagedArtifactError(f"{where}: the id of this content is {edit.id}, got {name!r}")
    return StoredEdit(edit, request, decoded)


def _tensors(raw: bytes, where: str) -> dict[str, Tensor]:
    try:
        found = safetensors.torch.load(raw)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise DamagedArtifactError(f"{where}: not a safetensors file: {error}") from None
    state = {_unescape(name): found[name] for name in sorted(found)}
    for name, tensor in state.items():
        is_byte = tensor.is_floating_point() and tensor.element_size() == 1  # a float8 knows no isfinite
        if not torch.isfinite(tensor.float() if is_byte else tensor).all():
            raise DamagedArtifactError(f"{where}: tensor {name!r} holds NaN or infinity")
    return state


def _escape(name: str) -> str:
    return f"+{name}" if name.lstrip("+") == _RESERVED else name


def _unescape(name: str) -> str:
    return name[1:] if name.lstrip("+") == _RESERVED else name


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
