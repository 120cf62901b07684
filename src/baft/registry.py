"""Names for things that are imported only when somebody asks for them."""

import difflib
import importlib
import re
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from baft.errors import ConfigError, UnknownNameError

T = TypeVar("T")


def unknown_name(kind: str, name: str, known: Sequence[str]) -> UnknownNameError:
    """The error for a name that is none of the known ones; suggests the nearest of them."""
    near = difflib.get_close_matches(name.lower(), known, n=1)
    question = f"did you mean {near[0]!r}? The" if near else "the"
    listing = ", ".join(known) or "none yet"
    return UnknownNameError(f"unknown {kind} {name!r}; {question} {kind}s are: {listing}")


_NAME = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")
_TARGET = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")


class Registry(Generic[T]):
    """A table from names to lazy targets, `"module:attribute"`.

    Registering costs nothing: the target's module is imported at the first `get`. Other packages join in by
    an entry point of the group; those are looked up once, when a name is missing or all names are wanted.

    Args:
        kind: What the names stand for, a singular noun for the messages, such as `"method"`.
        base: A class that each target must be a subclass of (where it is a class) or an instance of.
        group: The entry-point group that other packages may use, such as `"baft.methods"`.

    Examples:
        >>> shapes = Registry[object]("shape")
        >>> shapes.add("decimal", "decimal:Decimal")
        >>> shapes.get("decimal")
        <class 'decimal.Decimal'>
    """

    def __init__(self, kind: str, *, base: type[Any] | None = None, group: str | None = None) -> None:
        self._kind = kind
        self._base = base
        self._group = group
        self._targets: dict[str, str] = {}
        self._loaded: dict[str, T] = {}
        self._asked_others = group is None

    def add(self, name: str, target: str) -> None:
        """Registers `target` under `name` and imports nothing.

        Raises:
            ConfigError: If the name or the target is malformed, or the name is taken.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{self._kind} name {name!r} is malformed: use lower-case letters and digits, "
                "with single dots, dashes or underscores between them"
            )
        if not _TARGET.fullmatch(target):
            raise ConfigError(f"{self._kind} {name!r}: expected a target 'module:attribute', got {target!r}")
        if name in self._targets:
            raise ConfigError(
                f"{self._kind} {name!r} is already registered as {self._targets[name]!r}; "
                f"give {target!r} another name"
            )
        self._targets[name] = target

    def get(self, name: str) -> T:
        """Returns what is registered under `name`, importing it the first time.

        Raises:
            UnknownNameError: If nobody registered the name; suggests the nearest one.
            ConfigError: If the target cannot be imported, or is not what the registry holds.
        """
        if name not in self._targets:
            known = self.names()
            if name not in known:
                raise unknown_name(self._kind, name, known)
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def names(self) -> list[str]:
        """Returns all names, sorted, those of other packages included; imports no target."""
        if not self._asked_others:
            for entry in entry_points(group=self._group or ""):
                self._add_foreign(entry)
            self._asked_others = True
        return sorted(self._targets)

    def _add_foreign(self, entry: EntryPoint) -> None:
        target = entry.value.replace(" ", "")
        if self._targets.get(entry.name) == target:
            return  # one package that lies on the path twice, or a pass that an error cut short
        try:
            self.add(entry.name, target)
        except ConfigError as error:
            package = entry.dist.name if entry.dist else "unknown"
            raise ConfigError(f"entry point of package {package!r} in {self._group!r}: {error}") from None

    def _load(self, name: str) -> T:
        target = self._targets[name]
        module, _, attribute = target.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{self._kind} {name!r} cannot be loaded from {target!r}: {error}") from error
        if self._base is not None:
            fits = issubclass(found, self._base) if isinstance(found, type) else isinstance(found, self._base)
            if not fits:
                raise ConfigError(
                    f"{self._kind} {name!r}: {target!r} is no {self._base.__name__}, got {found!r}"
                )
        loaded: T = found
        return loaded
