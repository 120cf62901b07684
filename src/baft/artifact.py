"""An edit set on disk: a folder `NAME.baft/` of three files, none of which can execute anything.

    config.json         what made the edits, on which host, and the checksums of everything
    edits.jsonl         one edit a line, in the order in which they were made
    state.safetensors   the tensors that the edits added

An artifact is built in a hidden sibling and renamed into place, after the one that it replaces was renamed to
a hidden backup. A process killed in between leaves the backup, which the next `read` or `write` puts back.
A folder cannot be renamed onto one that holds files, so several may write without a lock: the last one wins.
"""

import contextlib
import errno
import hashlib
import html
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
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
from baft.errors import ArtifactError, BaftError, DamagedArtifactError, SchemaError
from baft.hosts.identity import HostIdentity
from baft.types import Edit

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
SUFFIX = ".baft"
CONFIG, EDITS, STATE = FILES = ("config.json", "edits.jsonl", "state.safetensors")

_ATTEMPTS = 100  # against others who write the same artifact without a pause
_STALE_S = 3600  # a hidden folder left this long ago belongs to a process that was killed
_N_LISTED = 200  # edits in a model card
_RESERVED = "__metadata__"  # the one name that safetensors keeps for itself; ours gets a sign in front
_SHARED = ("method", "preset", "seed", "settings", "layers", "positions", "host_source", "memory")
_MENDS = {
    errno.ENOSPC: "make room on the disk, or choose another one",
    errno.ENOENT: "make the folder that it shall stand in",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that can be written"),
}
_CARD = """---
library_name: baft
tags: [baft, knowledge-editing]
{base}---

# {n} knowledge edits for {host}

Made by `baft` with the method {method}. They hold on this model alone; its weights stay as they are.

```python
from baft.artifact import fetch_from_hub, read

edit_set = read(fetch_from_hub({repo_id!r}))
```

| prompt | target | said when edited |
| --- | --- | --- |
{rows}
Whoever sees this repository can read every prompt and target. No license comes with them; the model keeps
its own.
"""


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


def write(path: str | Path, edit_set: EditSet) -> Path:
    """Writes an artifact to `path` and returns it; one that is there is replaced, or on an error stays.

    Raises:
        ArtifactError: If the name does not end in `.baft`, the edits are not plain data and finite tensors,
            something else is in the way, or the disk refuses.
    """
    given = Path(path)
    if given.suffix != SUFFIX:
        raise ArtifactError(f"the name of an edit set ends in {SUFFIX}, got {given}: use {given}{SUFFIX}")
    try:
        files = _encode(edit_set)
        _decode(files, given)  # what is written can be read
    except (BaftError, SafetensorError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ArtifactError(f"{given} was not written, as the edits cannot be stored: {error}") from error
    try:
        folder = _real(given)
        _recover(folder)
        _require_free(folder, given)
        _replace(folder, files)
    except OSError as error:
        mend = _MENDS.get(error.errno or 0, "try again, or choose another place")
        raise ArtifactError(f"{given} was not written: {error.strerror or error}; {mend}") from error
    return given


def read(path: str | Path) -> EditSet:
    """Reads an artifact and checks every byte of it.

    Raises:
        DamagedArtifactError: If a file is missing, truncated, misshapen, changed or not finite.
        SchemaError: If it was written by another version of the format.
        ArtifactError: If there is no such folder, or it cannot be read.
    """
    return _read(Path(path))[0]


def is_artifact(path: str | Path) -> bool:
    """Tells whether a path is meant to be an artifact; only `read` tells whether it is a sound one."""
    folder = _real(Path(path))
    if Path(path).suffix == SUFFIX and (folder.is_dir() or _siblings(folder, "old")):
        return True
    return (folder / EDITS).is_file()  # a copy from the hub is named after its commit


def push_to_hub(
    path: str | Path, repo_id: str, *, token: str | None = None, private: bool | None = None
) -> str:
    """Uploads an artifact with a model card to the hub, where all with access can read prompts and targets.

    Args:
        path: The artifact.
        repo_id: Where to, like "owner/name"; made where there is none.
        token: One that may write; by default that of the login.
        private: Whether a new repository is private; by default what the account says.

    Returns:
        The address of the commit.

    Raises:
        ArtifactError: If the artifact cannot be read, or the hub cannot be reached or refuses.
    """
    edit_set, files = _read(Path(path))
    from huggingface_hub import HfApi

    with _hub(f"{path} could not be pushed to {repo_id}"), tempfile.TemporaryDirectory() as folder:
        card = {"README.md": _model_card(edit_set, repo_id).encode()}
        for name, content in (files | card).items():
            Path(folder, name).write_bytes(content)
        api = HfApi(token=token, library_name="baft")
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload the edits"))


def fetch_from_hub(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Downloads an artifact (its main branch, or a `revision`) and returns its folder, for `read`.

    Raises:
        ArtifactError: If the hub cannot be reached or refuses, or there is no edit set.
    """
    from huggingface_hub import snapshot_download

    with _hub(f"{repo_id} could not be fetched"):
        found = snapshot_download(repo_id, revision=revision, token=token, allow_patterns=list(FILES))
    missing = [name for name in FILES if not Path(found, name).is_file()]
    if missing:
        raise ArtifactError(f"{repo_id} is no edit set: {missing[0]} is missing; check name and revision")
    return Path(found)


def _encode(edit_set: EditSet) -> dict[str, bytes]:
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
        baft_version=_version(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        host=edit_set.host.to_dict(),
        n_edits=len(rows),
        files={name: _File(len(raw), _sha256(raw)) for name, raw in files.items()},
        **{name: getattr(edit_set, name) for name in _SHARED},
    )
    plain = to_dict(config)
    plain["sha256"] = canonical_hash(plain)
    return {CONFIG: (_pretty(plain) + "\n").encode(), **files}


def _decode(files: dict[str, bytes], where: Path) -> EditSet:
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
            f"({_version()}) reads format {SCHEMA_VERSION}: {mend}, or use the baft that wrote it"
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


def _pretty(value: Any, line: str = "\n") -> str:
    """JSON with tables over several lines and lists on one."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    rows = [
        f"{json.dumps(key, ensure_ascii=False)}: {_pretty(part, line + '  ')}" for key, part in value.items()
    ]
    return "{" + ",".join(f"{line}  {row}" for row in rows) + line + "}"


def _version() -> str:
    try:
        return version("baft")
    except PackageNotFoundError:  # run from its sources
        return "unknown"


def _read(given: Path) -> tuple[EditSet, dict[str, bytes]]:
    for attempt in range(_ATTEMPTS):
        folder = _recover(_real(given))
        before = _stamp(folder)
        try:
            files = {name: _content(folder, name, given) for name in FILES}
            return _decode(files, given), files
        except FileNotFoundError:  # for good, or a writer is just between its two renames
            if attempt >= 3:
                raise ArtifactError(f"{given} does not exist: check the path of the edit set") from None
        except DamagedArtifactError as error:
            if _stamp(folder) == before:  # else it was replaced while it was read
                raise DamagedArtifactError(f"{error}; take it from a copy, or save the edits anew") from None
        except OSError as error:
            raise ArtifactError(f"{given} cannot be read: {error.strerror}; mend its permissions") from error
    raise ArtifactError(f"{given} cannot be read, as others write it all the time: try again")


def _content(folder: Path, name: str, given: Path) -> bytes:
    try:
        return (folder / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_dir():
            raise DamagedArtifactError(f"{given / name} is missing") from None
        if folder.exists():
            raise ArtifactError(f"{given} is a file, and an edit set is a folder: check the path") from None
        raise


def _real(given: Path) -> Path:
    return Path(os.path.realpath(given))  # a link stays, and what it leads to is replaced


def _stamp(folder: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        return folder.stat().st_ino, folder.stat().st_ctime_ns
    return None


def _sibling(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}-{time.time_ns()}-{secrets.token_hex(4)}")


def _siblings(folder: Path, kind: str) -> list[Path]:
    """The hidden siblings of a kind, the newest last."""
    name = re.compile(re.escape(f".{folder.name}.{kind}-") + r"\d+-[0-9a-f]{8}")
    with contextlib.suppress(OSError):
        return sorted(one for one in folder.parent.iterdir() if name.fullmatch(one.name))
    return []


def _recover(folder: Path) -> Path:
    """Puts a backup back where its artifact is missing; returns what can be read."""
    if os.path.lexists(folder) or not (backups := _siblings(folder, "old")):
        return folder
    with contextlib.suppress(OSError):  # another process was faster, or the disk is read-only
        os.rename(backups[-1], folder)
    return folder if folder.exists() else backups[-1]


def _require_free(folder: Path, given: Path) -> None:
    if not os.path.lexists(folder):
        return
    names = {one.name for one in folder.iterdir()} if folder.is_dir() else {"a file"}
    if not names or names - set(FILES):
        what = ", ".join(sorted(names - set(FILES))) or "nothing"
        raise ArtifactError(
            f"{given} is no edit set (in it: {what}) and is not replaced: choose another name"
        )


def _replace(folder: Path, files: dict[str, bytes]) -> None:
    made = _sibling(folder, "tmp")
    try:
        os.mkdir(made)
        for name, content in files.items():
            with (made / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _sync(made)
        _swap(made, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        _recover(folder)
        _sweep(folder)


def _swap(made: Path, folder: Path) -> None:
    for _ in range(_ATTEMPTS):
        try:
            os.rename(made, folder)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        with contextlib.suppress(FileNotFoundError):  # another process moved it first
            os.rename(folder, _sibling(folder, "old"))
    raise OSError(errno.EBUSY, "others write it all the time")


def _sweep(folder: Path) -> None:
    """Removes backups of an artifact that is there, and what processes left that were killed long ago."""
    backups = _siblings(folder, "old")
    for backup in backups if folder.exists() else ():  # asked last: each has a successor
        with contextlib.suppress(OSError):
            os.rename(backup, trash := _sibling(folder, "tmp"))  # so that no backup is ever half there
            shutil.rmtree(trash, ignore_errors=True)
    for left in _siblings(folder, "tmp"):
        if time.time_ns() - int(left.name.split("-")[-2]) > _STALE_S * 10**9:
            shutil.rmtree(left, ignore_errors=True)


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _hub(failed: str) -> Iterator[None]:
    """Silences the bars of the hub's client, and makes its errors, which share no root, into one."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    silence = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        yield
    except Exception as error:
        mend = "check the network"
        if constants.HF_HUB_OFFLINE:
            mend = "unset HF_HUB_OFFLINE"
        elif isinstance(error, (errors.RevisionNotFoundError, errors.HFValidationError)):
            mend = "check the name (like owner/name) and the revision"
        elif isinstance(error, errors.HfHubHTTPError):
            mend = "check the name, log in with `hf auth login`, or give a token that may do this"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"{failed}: {reason}; {mend}") from error
    finally:
        if silence:
            enable_progress_bars()


def _model_card(edit_set: EditSet, repo_id: str) -> str:
    source, n = edit_set.host_source, len(edit_set.edits)
    is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII) and not Path(source).exists()
    rows = [
        f"| {_cell(one.edit.prompt)} | {_cell(one.edit.target)} | {'yes' if one.decoded else 'no'} |\n"
        for one in edit_set.edits[:_N_LISTED]
    ]
    return _CARD.format(
        base=f"base_model: {source}\n" if is_hub_id else "",
        n=n,
        host=_cell(edit_set.host.name),
        method=_cell(edit_set.method),
        repo_id=repo_id,
        rows="".join(rows) + (f"\nand {n - _N_LISTED} more\n" if n > _N_LISTED else ""),
    )


def _cell(text: str) -> str:
    words = " ".join(text.split())
    shown = words if len(words) <= 200 else words[:199] + "…"
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(shown, quote=False))
