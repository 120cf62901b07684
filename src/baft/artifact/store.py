"""The folder of an edit set, which is there as a whole or not at all.

An artifact is built in a hidden sibling and renamed into place, after the one that it replaces was renamed to
a hidden backup. A process killed in between leaves the backup, which the next `read` or `write` puts back.
A folder cannot be renamed onto one that holds files, so several may write without a lock: the last one wins.
Files are never changed once they are written: models may map them, and an artifact may take over those of the
one that it replaces. Till that one is gone they have two names, and then one again.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from baft.artifact.codec import CONFIG, EDITS, EditSet, decode, encode_config, encode_edits
from baft.artifact.pieces import (
    Checksum,
    KnownPieces,
    Piece,
    Stamp,
    cut,
    is_piece,
    serialize,
    state_file,
)
from baft.errors import ArtifactError, BaftError, DamagedArtifactError

SUFFIX = ".baft"

_ATTEMPTS = 100  # against others who write the same artifact without a pause
_STALE_S = 3600  # a hidden folder left this long ago belongs to a process that was killed
_MENDS = {
    errno.ENOSPC: "make room on the disk, or choose another one",
    errno.ENOENT: "make the folder that it shall stand in",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that can be written"),
}


def write(path: str | Path, edit_set: EditSet) -> tuple[Piece, ...]:
    """Writes an artifact to `path`; one that is there is replaced, or on an error stays.

    Full pieces that stand there already are linked to, not written; all others are written one by one.

    Returns:
        What is known now of files that hold these tensors, for the next time: the full pieces written, and
        files elsewhere in which tensors stand.

    Raises:
        ArtifactError: If the name does not end in `.baft`, the edits are not plain data and finite tensors,
            something else is in the way, or the disk refuses.
        DamagedArtifactError: If a file that was read was changed in place, and with it the edits in force.
    """
    given = Path(path)
    if given.suffix != SUFFIX:
        raise ArtifactError(f"the name of an edit set ends in {SUFFIX}, got {given}: use {given}{SUFFIX}")
    try:
        folder = _real(given)
        _recover(folder)
        require_free(given)
        return _replace(folder, edit_set, given)
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
        require_free(given)
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


def require_free(path: str | Path) -> None:
    """Refuses a place where something stands that is no edit set, or not that alone.

    Raises:
        ArtifactError: If it does.
        OSError: If the place cannot be read.
    """
    given = Path(path)
    folder = _real(given)
    if not os.path.lexists(folder):
        return
    names = {one.name for one in folder.iterdir()} if folder.is_dir() else {"a file"}
    strangers = sorted(name for name in names if name not in (CONFIG, EDITS) and not is_piece(name))
    if not names or strangers:
        what = ", ".join(strangers) or "nothing"
        kind = "no edit set" if EDITS not in names else "more than an edit set"
        raise ArtifactError(f"{given} is {kind} (in it: {what}) and is not replaced: choose another name")


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


def _replace(folder: Path, edit_set: EditSet, given: Path) -> tuple[Piece, ...]:
    """Puts an edit set in the place of another, or of nothing; changes nothing if anything goes wrong."""
    made = _sibling(folder, "tmp")
    try:
        os.mkdir(made)
        pieces = _fill(made, folder, edit_set)
        _sync(made)
        _swap(made, folder)
        _sync(folder.parent)
    except ArtifactError as error:
        raise type(error)(f"{given} was not written: {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
        _recover(folder)
        _sweep(folder)
    return pieces


def _fill(made: Path, folder: Path, edit_set: EditSet) -> tuple[Piece, ...]:
    """Writes the files of an edit set into a new folder, which will stand in the place of another one.

    Returns:
        As `write`.
    """
    known = KnownPieces(edit_set.state, edit_set.pieces)
    files, full, linked = dict[str, Checksum](), list[Piece](), set[Piece]()
    with _storing():
        raw = encode_edits(edit_set.edits)
    files[EDITS] = _put(made / EDITS, raw)
    for number, (tensors, piece) in enumerate(cut(edit_set.state, known.inside(folder))):
        name = state_file(number)
        if piece is not None and _link(piece, made / name):
            linked.add(piece)
            files[name], is_mapped = piece.checksum, piece.is_mapped
        else:
            known.require_as_read(tensors)
            with _storing():
                raw = serialize(tensors)
            files[name], is_mapped = _put(made / name, raw), False
        if files[name].is_full:
            stamp = Stamp.of((made / name).stat())
            full.append(Piece(folder / name, stamp, files[name], tensors, is_mapped))
    with _storing():
        raw = encode_config(edit_set, files)
    _put(made / CONFIG, raw)
    return (*full, *(piece for piece in known.mapped() if piece not in linked))


@contextlib.contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except (
        BaftError,
        SafetensorError,
        ValueError,
        LookupError,
        TypeError,
        RuntimeError,
        AttributeError,
    ) as error:
        raise ArtifactError(f"the edits cannot be stored: {error}") from error


def _put(path: Path, raw: bytes) -> Checksum:
    with path.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    return Checksum.of(raw)


def _link(piece: Piece, path: Path) -> bool:
    """Gives the file of a piece a second name; not if it is no more what it was, or the disk links none."""
    try:
        os.link(piece.path, path)
    except OSError:
        return False
    if Stamp.of(path.lstat()) == piece.stamp:
        return True
    path.unlink()
    return False


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
