"""Files of records: found in the data folder, parsed, and asked for their fields; errors tell the place."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from baft.config import unique_keys
from baft.errors import DataError

_NAMED_BY = "name the data folder with BAFT_DATA or --data"


class Record:
    """A JSON object, and its place for the messages.

    Args:
        fields: What the object holds.
        where: Its place, such as `zsre.json, record 12`.
    """

    def __init__(self, fields: Mapping[str, Any], where: str):
        self._fields = fields
        self._where = where

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def text(self, name: str) -> str:
        """The text in a field, which may be blank.

        Raises:
            DataError: If the field is missing, or holds something else.
        """
        found = self._fields.get(name)
        if not isinstance(found, str):
            self._refuse(name, found, "a text")
        return found

    def texts(self, name: str) -> tuple[str, ...]:
        """The list of texts in a field.

        Raises:
            DataError: If the field is missing, or holds something else.
        """
        found = self._fields.get(name)
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            self._refuse(name, found, "a list of texts")
        return tuple(found)

    def flag(self, name: str) -> bool:
        """The truth value in a field.

        Raises:
            DataError: If the field is missing, or holds something else.
        """
        found = self._fields.get(name)
        if not isinstance(found, bool):
            self._refuse(name, found, "true or false")
        return found

    def record(self, name: str) -> "Record":
        """The object in a field.

        Raises:
            DataError: If the field is missing, or holds something else.
        """
        found = self._fields.get(name)
        if not isinstance(found, dict):
            self._refuse(name, found, "an object")
        return Record(found, f"{self._where}, {name}")

    def records(self, name: str) -> list["Record"]:
        """The list of objects in a field.

        Raises:
            DataError: If the field is missing, or holds something else.
        """
        found = self._fields.get(name)
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            self._refuse(name, found, "a list of objects")
        return [Record(one, f"{self._where}, {name}[{n}]") for n, one in enumerate(found)]

    def answers(self, name: str) -> tuple[str, ...]:
        """All answers in a field, each with its aliases; an empty list of aliases counts as a blank answer.

        An answer is a text; a field holds one, a list of them, or a list of lists that give each its aliases.

        Raises:
            DataError: If the field is missing, or holds something else.
        """
        found = self._fields.get(name)
        several = found if isinstance(found, list) else [found]
        lists = [one if isinstance(one, list) else [one] for one in several]
        flat: list[Any] = [alias for one in lists for alias in one or [""]]
        if not all(isinstance(alias, str) for alias in flat):
            self._refuse(name, found, "a text, a list of texts or a list of lists of texts")
        return tuple(flat)

    def refuse(self, name: str, problem: str) -> NoReturn:
        """Raises a DataError about a field of this record."""
        raise DataError(f"{self._where}, field {name!r}: {problem}")

    def _refuse(self, name: str, found: Any, expected: str) -> NoReturn:
        if name not in self._fields:
            known = ", ".join(self._fields) or "none"
            self.refuse(name, f"is missing; the record has {known}")
        self.refuse(name, f"expected {expected}, got {type(found).__name__}: {shown(found)}")


def find(folder: Path | None, names: Sequence[str], benchmark: str) -> Path:
    """Returns the first of these files that is there.

    Args:
        folder: The data folder, or None where the user named none.
        names: Paths under it, the best first; empty ones are passed over.
        benchmark: Who asks.

    Raises:
        DataError: If the folder or every one of the files is missing.
    """
    if folder is None:
        raise DataError(f"benchmark {benchmark} reads public files, and no folder is given: {_NAMED_BY}")
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise DataError(f"benchmark {benchmark}: the data folder {folder} {what}; {_NAMED_BY}")
    paths = [folder / name for name in names if name]
    for path in paths:
        if path.is_file():
            return path
    missing = " and ".join(str(path) for path in paths)
    raise DataError(
        f"benchmark {benchmark}: {missing} {'is' if len(paths) == 1 else 'are'} missing; {_NAMED_BY}"
    )


def read_records(path: Path) -> list[Record]:
    """Reads a JSON file that holds a list of objects.

    Raises:
        DataError: If it cannot be read, is not JSON, or holds something else.
    """
    found = parse(read_text(path), str(path))
    if not isinstance(found, list):
        raise DataError(f"{path}: expected a list of records, got {type(found).__name__}: {shown(found)}")
    return [as_record(one, f"{path}, record {index}") for index, one in enumerate(found)]


def as_record(plain: object, where: str) -> Record:
    """Makes a record of parsed JSON.

    Raises:
        DataError: If it is no object.
    """
    if not isinstance(plain, dict):
        raise DataError(f"{where}: expected an object, got {type(plain).__name__}: {shown(plain)}")
    return Record(plain, where)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte-order mark
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def parse(text: str, where: str) -> Any:
    """Parses JSON; a key given twice in one object is an error.

    Raises:
        DataError: If it is not JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None


def shown(value: object) -> str:
    """A value for a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
