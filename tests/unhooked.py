"""Modules as users import them: in tests beartype refuses a wrong type before the code can say why."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def as_users_import(module: ModuleType) -> Iterator[ModuleType]:
    """A second copy of a module, without checks of types."""
    spec = importlib.util.spec_from_file_location(name := f"unhooked_{module.__name__}", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    try:
        spec.loader.exec_module(found)
        yield found
    finally:
        del sys.modules[name]
