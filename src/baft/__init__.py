"""baft changes what a language model knows, without touching its weights.

The names below are the public surface; they are imported when first used, so that `import baft` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baft.loading import load, load_from_hub
    from baft.model import Model
    from baft.report import AppliedEdit, EditReport, TokenGates
    from baft.types import Edit

__version__ = "0.1.0"

_HOMES = {
    "AppliedEdit": "baft.report",
    "Edit": "baft.types",
    "EditReport": "baft.report",
    "Model": "baft.model",
    "TokenGates": "baft.report",
    "load": "baft.loading",
    "load_from_hub": "baft.loading",
}

__all__ = ["AppliedEdit", "Edit", "EditReport", "Model", "TokenGates", "load", "load_from_hub"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'baft' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
