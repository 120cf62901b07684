"""The folder of an edit set, which is there as a whole or not at all.

An artifact is built in a hidden sibling and renamed into place, after the one that it replaces was renamed to
a hidden backup. A process killed in between leaves the backup, which the next `read` or `write` puts back.
A folder cannot be renamed onto one that holds files, so several may write without a lock: the last one wins.
Files are never changed once they are written, so that folders may share them, and models may map them.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from baft.artifact.codec import EDITS, EditSet, Encoded, Piece, decode, encode, is_file, stamp
from baft.errors import ArtifactError, BaftError, DamagedArtifactError

SUFFIX = ".baft"

_ATTEMPTS = 100  # against others who write the same artifact without a pause
_STALE_S = 3600  # a hidden folder left this long ago belongs to a process that was killed
_MENDS = {
    errno.ENOSPC: "make room on the disk, or choose another one",
    errno.ENOENT: "make the folder that it shall stand in",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that can be written"),
}


def write(path: str | Path, edit_set: EditSet) -> Path:
    """As `save`, and returns the path."""
    save(path, edit_set)
    return Path(path)


def save(path: str | Path, edit_set: EditSet) -> tuple[Piece, ...]:
    """Writes an artifact to `path`; one that is there is replaced, or on an error stays.

    Pieces that `edit_set` knows to be full are linked to, not written.

    Returns:
        The full pieces of what was written, for the next time.

    Raises:
        ArtifactError: If the name does not end in `.baft`, the edits are not plain data and finite tensors,
            something else is in the way, or the disk refuses.
        DamagedArtifactError: If a piece was changed in place, and with it the edits that were read from it.
    """
    given = Path(path)
    if given.suffix != SUFFIX:
        raise ArtifactError(f"the name of an edit set ends in {SUFFIX}, got {given}: use {given}{SUFFIX}")
    try:
        encoded = encode(edit_set)
    except (BaftError, SafetensorError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ArtifactError(f"{given} was not written, as the edits cannot be stored: {error}") from error
    try:
        folder = _real(given)
        _recover(folder)
        _require_free(folder, given)
        try:
            return _replace(folder, encoded)
        except _GoneError:
            return _replace(folder, encode(edit_set, anew=True))
    except OSError as error:
        mend = _MENDS.get(error.errno or 0, "try again, or choose another place")
        raise ArtifactError(f"{given} was not written: {error.strerror or error}; {mend}") from error


def read(path: str | Path) -> EditSet:
    """Reads an artifact and checks every byte of it.

    Raises:
        DamagedArtifactError: If a file is missing, truncated, misshapen, changed or not finite.
        SchemaError: If it was written by another version of the format.
        ArtifactError: If there is no such folder, or it cannot be read.
    """
    given = Path(path)
    for attempt in range(_ATTEMPTS):
        folder = _recover(_real(given))
        before = _version(folder)
        try:
            return _decoded(folder, given)
        except FileNotFoundError:  # for good, or a writer is just between its two renames
            if attempt >= 3:
                raise ArtifactError(f"{given} does not exist: check the path of the edit set") from None
        except DamagedArtifactError as error:
            if _version(folder) == before:  # else it was replaced while it was read
                raise DamagedArtifactError(f"{error}; take it from a copy, or save the edits anew") from None
        except OSError as error:
            raise ArtifactError(
                f"{given} cannot be read: {error.strerror or error}; mend its permissions"
            ) from error
    raise ArtifactError(f"{given} cannot be read, as others write it all the time: try again")


def delete(path: str | Path) -> None:
    """Removes an artifact and what was kept of those it replaced; files of others are never removed.

    Raises:
        ArtifactError: If something else is in the folder, or the disk refuses.
    """
    given = Path(path)
    folder = _real(given)
    try:
        _require_free(folder, given)
        for one in (*_siblings(folder, "old"), folder):  # the artifact last: till then it can be read
            with contextlib.suppress(FileNotFoundError):
                os.rename(one, trash := _sibling(folder, "tmp"))
                shutil.rmtree(trash, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(f"{given} was not deleted: {error.strerror or error}") from error


def is_artifact(path: str | Path) -> bool:
    """Tells whether a path is meant to be an artifact; only `read` tells whether it is a sound one."""
    folder = _real(Path(path))
    if Path(path).suffix == SUFFIX and (folder.is_dir() or _siblings(folder, "old")):
        return True
    return (folder / EDITS).is_file()  # a copy from the hub is named after its commit


def _decoded(folder: Path, given: Path) -> EditSet:
    try:
        return decode(folder, given)
    except (FileNotFoundError, NotADirectoryError) as error:
        if folder.is_dir():
            name = Path(error.filename or "a piece").name
            raise DamagedArtifactError(f"{given / name} is missing") from None
        if folder.exists():
            raise ArtifactError(f"{given} is a file, and an edit set is a folder: check the path") from None
        raise


def _real(given: Path) -> Path:
    return Path(os.path.realpath(given))  # a link stays, and what it leads to is replaced


def _version(folder: Path) -> tuple[int, int] | None:
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
    strangers = sorted(name for name in names if not is_file(name))
    if not names or strangers:
        what = ", ".join(strangers) or "nothing"
        raise ArtifactError(
            f"{given} is no edit set (in it: {what}) and is not replaced: choose another name"
        )


class _GoneError(Exception):
    """A file that was to be linked to is no more what it was, or this disk links no files."""


def _replace(folder: Path, encoded: Encoded) -> tuple[Piece, ...]:
    """Puts files in the place of an artifact, or of nothing.

    Returns:
        Its full pieces.

    Raises:
        _GoneError: If a piece cannot be linked to; nothing has changed then.
        OSError: If the disk refuses; nothing has changed then.
    """
    made = _sibling(folder, "tmp")
    try:
        os.mkdir(made)
        for name, content in encoded.files.items():
            with (made / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name, piece in encoded.full.items():
            if name not in encoded.files:
                _link(piece, made / name)
        pieces = tuple(
            replace(piece, path=folder / name, stamp=stamp(made / name))
            for name, piece in encoded.full.items()
        )
        _sync(made)
        _swap(made, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        _recover(folder)
        _sweep(folder)
    return pieces


def _link(piece: Piece, path: Path) -> None:
    try:
        os.link(os.path.realpath(piece.path), path)  # the hub's client keeps links to files
        found = stamp(path)
        if piece.is_mapped and found[:2] == piece.stamp[:2] and found != piece.stamp:  # touched, or worse
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != piece.sha256:
                    raise DamagedArtifactError(
                        f"{piece.path} was changed in place since it was read, and with it the edits in "
                        "force: load them anew from a copy"
                    )
            return
    except OSError as error:
        raise _GoneError from error
    if found != piece.stamp:
        raise _GoneError


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
