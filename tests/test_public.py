"""The public surface: what `baft` offers, and what importing it costs."""

import subprocess
import sys

import pytest

import baft

PUBLIC = ["AppliedEdit", "Edit", "EditReport", "Model", "TokenGates", "load", "load_from_hub"]
MODEL = [
    "check",
    "disabled",
    "edit",
    "edit_many",
    "edits",
    "explain",
    "generate",
    "hf",
    "host",
    "identity",
    "label",
    "logits",
    "merge",
    "method",
    "push_to_hub",
    "refit",
    "remove",
    "save",
    "subset",
    "tokenizer",
    "undo",
]


def test_the_names_are_these_and_no_others():
    assert sorted(baft.__all__) == baft.__all__ == PUBLIC
    assert dir(baft) == sorted([*PUBLIC, "__version__"])
    for name in PUBLIC:
        found = getattr(baft, name)
        assert found.__name__ == name
        assert found.__doc__
    with pytest.raises(AttributeError, match="module 'baft' has no attribute 'unload'"):
        baft.unload  # noqa: B018


def test_a_model_has_these_and_no_others():
    found = sorted(name for name in vars(baft.Model) if not name.startswith("_"))
    assert found == MODEL
    assert all(getattr(baft.Model, name).__doc__ for name in found)


def test_importing_does_no_work():
    script = (
        "import sys, baft, baft.types, baft.errors, baft.config, baft.registry\n"
        "baft.Edit('a', 'b')\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'typer', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)), end='')\n"
        "baft.Model\n"
        "print('torch' in sys.modules, end='')\n"  # control
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]True"), done.stderr
