"""What a run leaves behind: a manifest that says what was run, and one row of JSON a case as it goes.

A folder `runs/NAME/` holds `record.json`, written before the first row, and `rows.jsonl`. The rows of one
method on one task are a block: they are appended in one write, and each says how many there are, so that a
block cut short by a kill is known and done again. Nothing that is whole is ever done twice.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from baft.config import read_json
from baft.errors import ConfigError, DataError

MANIFEST, ROWS = "record.json", "rows.jsonl"
Row = dict[str, Any]
Block = tuple[str, str]  # task, method

# What may differ between a run and its resumption: it says where and when, and not what.
_PASSING = frozenset({"created", "machine"})


class Record:
    """The rows of one run, on disk.

    Args:
        folder: Where they are kept; made if it is not there.
        manifest: What is run: plain data; whatever a row depends on.

    Raises:
        ConfigError: If the folder holds a record of something else.
        DataError: If a row that is not the last cannot be read, or the disk refuses.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        self.folder = folder
        plain = json.loads(json.dumps(manifest))
        with _disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / MANIFEST).exists():
                _require_same(folder, plain)
            elif (folder / ROWS).exists():
                raise ConfigError(f"{folder} holds {ROWS} without {MANIFEST}: what was run is not known")
            else:
                _write(folder / MANIFEST, json.dumps(plain, indent=1) + "\n")
            self.done = self._mend()

    def append(self, rows: Sequence[Row]) -> None:
        """Adds the rows of one method on one task.

        Raises:
            DataError: If the disk refuses; what was there stays.
        """
        task, method = rows[0]["task"], rows[0]["method"]
        text = "".join(json.dumps({**row, "of": len(rows)}, ensure_ascii=False) + "\n" for row in rows)
        with _disk(self.folder):
            path = self.folder / ROWS
            size = path.stat().st_size if path.exists() else 0
            try:
                with path.open("ab") as file:
                    file.write(text.encode())
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(path, size)
                raise
        self.done.add((task, method))

    def sort(self, order: Sequence[Block]) -> None:
        """Puts the blocks into the order of a plan, whatever order they came in."""
        place = {block: i for i, block in enumerate(order)}
        rows = sorted(read_rows(self.folder), key=lambda row: place[row["task"], row["method"]])
        with _disk(self.folder):
            _write(self.folder / ROWS, _lines(rows))

    def _mend(self) -> set[Block]:
        """Drops what a kill left unfinished, and returns the blocks that are whole."""
        path = self.folder / ROWS
        if not path.exists():
            return set()
        rows = list(_parse(path))
        counts: dict[Block, int] = {}
        for row in rows:
            counts[row["task"], row["method"]] = counts.get((row["task"], row["method"]), 0) + 1
        whole = [row for row in rows if counts[row["task"], row["method"]] == row["of"]]
        text = _lines(whole)
        if text.encode() != path.read_bytes():
            _write(path, text)
        return {(row["task"], row["method"]) for row in whole}


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing the same record meanwhile; a process that dies lets go of it.

    Raises:
        ConfigError: If another is writing it.
        DataError: If the disk refuses.
    """
    with _disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"another process is writing {folder}: wait for it, or choose another folder (--out)"
            ) from None
    try:
        yield
    finally:
        lock.release()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a run was.

    Raises:
        ConfigError: If the folder is no record.
    """
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"{folder} is no record of a run: it has no {MANIFEST}")
    return read_json(folder / MANIFEST)


def read_rows(folder: Path) -> list[Row]:
    """All whole rows of a run, a last one that was cut short left out.

    Raises:
        DataError: If another row cannot be read.
    """
    path = folder / ROWS
    return list(_parse(path)) if path.exists() else []


def _parse(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    for i, line in enumerate(lines[:-1], start=1):  # what follows the last line break was cut short
        try:
            row = json.loads(line)
            if not {"task", "method", "of"} <= set(row):
                raise ValueError("a row has task, method and of")
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}, line {i}: not a row of a record ({error}): restore it, or delete it"
            ) from None
        yield row


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """What another manifest says otherwise, in words; where and when it was run do not count."""
    was, now = (json.loads(json.dumps(one)) for one in (there, here))
    for key in sorted((was.keys() | now.keys()) - _PASSING):
        if was.get(key) != now.get(key):
            return f"{key} was {_short(was.get(key))} and is {_short(now.get(key))}"
    return None


def _require_same(folder: Path, manifest: Mapping[str, Any]) -> None:
    other = difference(read_manifest(folder), manifest)
    if other is not None:
        raise ConfigError(
            f"{folder} holds a record of another configuration: {other}. "
            "Choose another folder (--out), or remove this one"
        )


def _short(value: object, n_chars: int = 300) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= n_chars else text[:n_chars] + " …"


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: the record could not be written: {error.strerror or error}. What was written "
            "before is whole: make room or choose another folder, and run the same command again"
        ) from error
