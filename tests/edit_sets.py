"""Small edit sets, and how two of them are compared."""

from dataclasses import replace
from pathlib import Path

import torch

from baft.artifact import EditSet, StoredEdit, write
from baft.hosts.identity import HostIdentity
from baft.types import Edit

FILES = {"config.json", "edits.jsonl", "state.safetensors"}
HOST = HostIdentity(
    name="tiny",
    architecture="LlamaForCausalLM",
    config_hash="c0",
    weights_hash="3e",
    cast_hashes={"bfloat16": "ab", "float16": "cd"},
    n_parameters=2,
    dtype="float32",
    samples={"embed": (0.1, -1e-30, 3.4028234663852886e38), "norm": (1.0,)},
    inexact=(),
    tokenizer_hash="70",
)
ROME = StoredEdit(Edit("The Eiffel Tower is in", "Rome", subject="The Eiffel Tower"), 0, True)
TOKYO = StoredEdit(Edit("東京 | is\nin\u2028the", "İtaly 🙂", ground_truth="Japan"), 1, False)


def small(seed=7, **changes):
    draws = torch.Generator().manual_seed(seed % 2**31)
    fields = {
        "method": "baft",
        "preset": "published",
        "seed": seed,
        "settings": {"rank": 4, "lr": 5e-4, "schedule": ["linear", {"warmup": 0.1}], "bias": None},
        "layers": (3, 9),
        "positions": {"last_prompt": 3, "outputs": True},
        "host": HOST,
        "host_source": "owner/tiny",
        "edits": (ROME, TOKYO),
        "memory": {"thresholds": [0.25, 1.0], "unrelated": {"1": ["a\tb"]}},
        "state": {
            "layers.3.R": torch.randn(2, 3, generator=draws),
            "layers.9.b": torch.randn(3, generator=draws),
        },
    }
    return EditSet(**fields | changes)


def independent(*texts, **changes):
    """A set of edits that do not know each other: each has the same tensors, whichever others there are."""
    edits = [Edit(*one) for one in texts]
    state = {}
    for edit in edits:
        draws = torch.Generator().manual_seed(int(edit.id[:8], 16))
        state |= {f"{edit.id}.layer3.{name}": torch.randn(2, 3, generator=draws) for name in "AR"}
    stored = tuple(StoredEdit(edit, i, True) for i, edit in enumerate(edits))
    memory = {"unrelated": {str(i): [f"near {edit.target}"] for i, edit in enumerate(edits)}, "replaces": {}}
    return small(**{"method": "baft-bank", "edits": stored, "memory": memory, "state": state, **changes})


def some(n, start=0, size=128):
    """So many edits of six tensors of 128 numbers: 512 bytes each."""
    made = independent(*((f"The capital of {i} is", f"C{i}") for i in range(start, start + n)))
    draws = torch.Generator().manual_seed(start)
    state = {
        f"{one.edit.id}.layer{layer}.{part}": torch.randn(size, generator=draws)
        for one in made.edits
        for layer in (3, 9)
        for part in "RAb"
    }
    return replace(made, state=state)


def grown(found, n):
    """The first `n` edits of a larger set; as in an editor, what is there already is the same object."""
    larger = some(n)
    state = {name: found.state.get(name, tensor) for name, tensor in larger.state.items()}
    return replace(larger, state=state, pieces=found.pieces)


def written(path, edit_set):
    """Where an edit set now is."""
    write(path, edit_set)
    return Path(path)


def same(one, other):
    plain = all(
        getattr(one, name) == getattr(other, name)
        for name in ("method", "preset", "seed", "settings", "layers", "positions", "host", "host_source")
    )
    tensors = one.state.keys() == other.state.keys() and all(
        one.state[name].dtype == other.state[name].dtype and torch.equal(one.state[name], other.state[name])
        for name in one.state
    )
    return plain and tensors and one.edits == other.edits and one.memory == other.memory


def names(folder):
    return {one.name for one in folder.iterdir()}
