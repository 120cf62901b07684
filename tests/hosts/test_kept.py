"""What makes room in the cache, and what must not be deleted for it."""

import os
import time

import pytest
import torch
from safetensors.torch import load_file

from baft.hosts.kept import keep

TENSORS = {"states": torch.ones(100)}
HOUR_S = 3600


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "background"
    made.mkdir()
    return made


def laid(folder, name, age_s):
    """A file of another process, last written to so long ago."""
    path = folder / name
    path.write_bytes(b"x" * 1000)
    written = time.time() - age_s
    os.utime(path, (written, written))
    return path


def test_what_another_process_is_writing_is_left_alone(folder):
    half = laid(folder, ".background-abc", HOUR_S / 2)
    whole = laid(folder, "old.safetensors", HOUR_S / 2)
    keep(folder / "new.safetensors", TENSORS, "states", most_bytes=1)
    assert half.read_bytes() == b"x" * 1000
    assert not whole.exists()  # control: as old, and finished
    assert torch.equal(load_file(folder / "new.safetensors")["states"], TENSORS["states"])


def test_what_another_process_is_writing_takes_no_room(folder):
    half = laid(folder, ".background-abc", 0)
    whole = laid(folder, "old.safetensors", 0)
    keep(folder / "new.safetensors", TENSORS, "states", most_bytes=2000)  # room for two, not for three
    assert half.exists()
    assert whole.exists()


def test_what_a_killed_process_left_behind_is_deleted(folder):
    left = laid(folder, ".background-abc", 2 * HOUR_S)
    whole = laid(folder, "old.safetensors", 2 * HOUR_S)
    keep(folder / "new.safetensors", TENSORS, "states", most_bytes=1 << 20)
    assert not left.exists()
    assert whole.exists()  # control: as old, finished, and there is room
