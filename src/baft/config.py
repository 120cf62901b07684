"""Settings: frozen dataclasses read strictly from plain data, and a hash that names them."""

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import GenericAlias
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from baft.errors import ConfigError

C = TypeVar("C")

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def from_dict(cls: type[C], data: object, *, where: str = "config") -> C:
    """Reads a dataclass from plain data, such as a parsed JSON or TOML document.

    Nothing is guessed: every key must be a field, and every value must have the field's type. Only what the
    formats themselves cannot tell apart is taken as meant: an array for a tuple, an integer for a float.

    Args:
        cls: The dataclass; its fields may be further dataclasses, tuples, literals and unions.
        data: The mapping from field names to values.
        where: The place of the data, such as a file's name, for the messages.

    Raises:
        ConfigError: If a key is unknown or missing, or a value has the wrong type or is not finite.
    """
    plain = _plain(data, where)
    # A tuple of one, since pydantic takes no configuration beside a bare dataclass but hands it down to one
    # inside; and JSON, since its strict mode takes an array for a tuple only there.
    one: Any = GenericAlias(tuple, (cls,))
    adapter: TypeAdapter[tuple[C]] = TypeAdapter(one, config=_STRICT)
    try:
        return adapter.validate_json(json.dumps([plain]))[0]
    except ValidationError as error:
        raise ConfigError("\n".join(_messages(cls, plain, error, where))) from None


def to_dict(config: object) -> dict[str, Any]:
    """Returns a dataclass as plain data: dictionaries, lists, texts and finite numbers.

    Raises:
        ConfigError: If it is no dataclass, or holds something else than plain data.
    """
    if not _is_instance(config):
        raise ConfigError(f"expected a dataclass instance, got {_got(config)}")
    return dict(_plain(config, type(config).__name__))


def canonical_hash(config: object) -> str:
    """Returns the SHA-256, in hex, of a dataclass or of plain data.

    It does not depend on the order of keys, nor on how a number was written: `1`, `1.0` and `1e0` are one
    number, and so are `0.0` and `-0.0`. `True` is not `1`. The name of the class does not count.

    Raises:
        ConfigError: If there is something else in it than plain data.
    """
    canonical = _canonical(_plain(config, "config"))
    return hashlib.sha256(json.dumps(canonical, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_toml(path: str | Path) -> dict[str, Any]:
    """Returns the content of a TOML file.

    Raises:
        ConfigError: If the file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(_read(path))
    except ValueError as error:  # TOMLDecodeError, or an integer of too many digits
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Returns the object in a JSON file; a key given twice is an error, and so are NaN and infinity.

    Raises:
        ConfigError: If the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        found = json.loads(_read(path), object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {_got(found)}")
    return found


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a byte-order mark
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `object_pairs_hook`.

    Raises:
        ValueError: If a key is given twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


def _is_instance(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _plain(value: Any, where: str, path: str = "") -> Any:
    """Returns `value` as JSON data; `where` and `path` are its place, for the message about what is not."""
    if _is_instance(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            raise ConfigError(_at(where, path, f"expected texts as keys, got {_got(odd[0])}"))
        return {key: _plain(part, where, _step(path, key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, where, _step(path, index)) for index, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(_at(where, path, f"expected a finite number, got {value}"))
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ConfigError(_at(where, path, f"expected text, a number, a list or a table, got {_got(value)}"))


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_canonical(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _messages(cls: type, plain: Any, error: ValidationError, where: str) -> Iterator[str]:
    """Yields one line for each place in `plain` that is wrong; the branches of a union share a line."""
    expected: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        location = detail["loc"][1:]
        match detail["type"]:
            case "unexpected_keyword_argument":
                path, _ = _resolve(plain, location[:-1])
                yield _at(where, path, _unknown_key(cls, [str(step) for step in location]))
            case "missing":
                path, _ = _resolve(plain, location)
                yield _at(where, path, f"field {location[-1]!r} is missing")
            case "value_error":  # raised by the dataclass itself
                path, _ = _resolve(plain, location)
                yield _at(where, path, str(detail["ctx"]["error"]))
            case _:
                path, value = _resolve(plain, location)
                expected.setdefault(path, []).append(detail["msg"].removeprefix("Input should be "))
                got[path] = _got(value)
    for path, wanted in expected.items():
        yield _at(where, path, f"expected {' or '.join(dict.fromkeys(wanted))}, got {got[path]}")


def _resolve(plain: Any, location: tuple[int | str, ...]) -> tuple[str, Any]:
    """Follows pydantic's location through the data; steps that are not in it name branches of unions."""
    path = ""
    for step in location:
        in_table = isinstance(plain, dict) and step in plain
        if in_table or (isinstance(plain, list) and isinstance(step, int) and step < len(plain)):
            plain, path = plain[step], _step(path, step)
    return path, plain


def _step(path: str, step: int | str) -> str:
    if isinstance(step, int):
        return f"{path}[{step}]"
    return f"{path}.{step}" if path else step


def _at(where: str, path: str, message: str) -> str:
    return f"{where}: {path}: {message}" if path else f"{where}: {message}"


def _unknown_key(cls: type, location: list[str]) -> str:
    *above, key = location
    classes = [cls]
    for step in above:
        named = [one for one in classes if one.__name__ == step]
        hints = [typing.get_type_hints(one).get(step) for one in classes]
        classes = named or [found for hint in hints for found in _dataclasses_in(hint)] or classes
    allowed = sorted({field.name for one in classes for field in dataclasses.fields(one) if field.init})
    near = difflib.get_close_matches(key, allowed, n=1)
    question = f"did you mean {near[0]!r}? The" if near else "the"
    return f"unknown key {key!r}; {question} keys are: {', '.join(allowed) or 'none'}"


def _dataclasses_in(hint: Any) -> list[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    return [found for part in typing.get_args(hint) for found in _dataclasses_in(part)]


def _got(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
