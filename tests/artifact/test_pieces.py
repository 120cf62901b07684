"""Many edits in one artifact: their tensors stand in pieces, and one more edit is an append."""

import json
import os
import sys
from dataclasses import replace

import pytest
import torch

from baft.artifact import EDITS, codec, read, save, state_file, without, write
from baft.errors import ArtifactError, DamagedArtifactError
from edit_sets import independent, names, same

PIECE = 4096  # with 24 tensors of 512 bytes of three an edit, and the head of a file


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(codec, "PIECE_BYTES", PIECE)


def some(n, **changes):
    """So many edits of six tensors of 128 numbers."""
    made = independent(*((f"The capital of {i} is", f"C{i}") for i in range(n)))
    draws = torch.Generator().manual_seed(0)
    state = {
        f"{one.edit.id}.layer{layer}.{part}": torch.randn(128, generator=draws)
        for one in made.edits
        for layer in (3, 9)
        for part in "RAb"
    }
    return replace(made, state=state, **changes)


def inodes(path):
    return {one.name: one.stat().st_ino for one in path.iterdir() if one.suffix == ".safetensors"}


def kept(before, after):
    """The files that two states of an artifact share."""
    return {name for name, inode in before.items() if after.get(name) == inode}


def grown(found, n):
    """The first `n` edits of a larger set; as in an editor, what is there already is the same object."""
    larger = some(n)
    state = {name: found.state.get(name, tensor) for name, tensor in larger.state.items()}
    return replace(larger, state=state, pieces=found.pieces)


def test_what_is_written_in_pieces_is_read(tmp_path):
    made = some(7)
    path = write(tmp_path / "x.baft", made)
    files = sorted(inodes(path))
    assert files == sorted(state_file(i) for i in range(len(files)))
    assert len(files) > 3
    sizes = [(path / state_file(i)).stat().st_size for i in range(len(files))]
    assert all(PIECE <= size < 3 * PIECE for size in sizes[:-1])
    found = read(path)
    assert same(found, made)
    assert not same(found, some(6))  # the control
    full = [path / state_file(i) for i, size in enumerate(sizes) if size >= PIECE]
    assert [piece.path for piece in found.pieces] == full
    assert all(
        found.state[name] is tensor for piece in found.pieces for name, tensor in piece.tensors.items()
    )


@pytest.mark.parametrize("how", ["read", "written"])
def test_one_more_edit_is_an_append(tmp_path, how):
    path, first = tmp_path / "x.baft", some(5)
    first = replace(first, pieces=save(path, first))
    before = inodes(path)
    full = {state_file(i) for i in range(len(first.pieces))}
    assert len(full) > 2
    more = grown(read(path) if how == "read" else first, 6)
    more = replace(more, pieces=save(path, more))
    assert kept(before, inodes(path)) == full
    assert same(read(path), some(6))
    between = inodes(path)
    save(path, grown(more, 9))  # what was written just now is known as well
    assert kept(before, inodes(path)) == full
    assert kept(between, inodes(path)) > full
    assert same(read(path), some(9))
    assert names(tmp_path) == {"x.baft"}


def test_another_folder_shares_full_pieces_and_outlives_the_first(tmp_path):
    first = write(tmp_path / "x.baft", some(5))
    second = write(tmp_path / "y.baft", grown(read(first), 6))
    assert len(kept(inodes(first), inodes(second))) > 2
    for file in first.iterdir():
        file.unlink()
    assert same(read(second), some(6))


def test_what_an_edit_in_the_middle_leaves_is_written_anew(tmp_path):
    path = write(tmp_path / "x.baft", some(6))
    before, found = inodes(path), read(path)
    gone = found.edits[3].edit.id
    write(path, without(found, [gone]))
    assert kept(before, inodes(path)) == {state_file(i) for i in range(2)}  # up to it
    assert same(read(path), without(some(6), [gone]))


@pytest.mark.parametrize("what", ["replaced", "removed"])
def test_a_piece_that_is_not_what_it_was_is_written_anew(tmp_path, what):
    path = write(tmp_path / "x.baft", some(5))
    found = read(path)
    file = path / state_file(1)
    size = file.stat().st_size
    file.unlink()
    if what == "replaced":
        file.write_bytes(bytes(size))
    write(tmp_path / "y.baft", grown(found, 6))
    assert same(read(tmp_path / "y.baft"), some(6))


@pytest.mark.parametrize("how", ["touched", "changed", "cut"])
def test_a_piece_that_was_changed_in_place_is_not_saved_as_sound(tmp_path, how):
    path = write(tmp_path / "x.baft", some(5))
    found, file = read(path), path / state_file(1)
    with file.open("r+b") as opened:
        if how == "cut":
            opened.truncate(16)
        elif how == "changed":
            opened.seek(-8, os.SEEK_END)
            opened.write(bytes(8))
    os.utime(file, (1, 1))
    if how == "touched":
        write(tmp_path / "y.baft", grown(found, 6))
        assert same(read(tmp_path / "y.baft"), some(6))
        return
    with pytest.raises(DamagedArtifactError, match=rf"{file.name} was changed in place since it was read"):
        write(tmp_path / "y.baft", grown(found, 6))
    assert names(tmp_path) == {"x.baft"}


def test_a_file_that_has_come_in_the_place_of_what_was_written_is_no_damage(tmp_path):
    path, made = tmp_path / "x.baft", some(5)
    made = replace(made, pieces=save(path, made))
    file = path / state_file(1)
    file.write_bytes(bytes(file.stat().st_size))  # even under the same inode
    os.utime(file, (1, 1))
    write(tmp_path / "y.baft", made)
    assert same(read(tmp_path / "y.baft"), some(5))


def test_what_the_hubs_client_keeps_can_be_saved_again(tmp_path):
    """It keeps files in one folder, and a folder of links to them for each commit."""
    blobs, commit = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    write(tmp_path / "x.baft", some(5)).rename(blobs)
    commit.mkdir(parents=True)
    for file in blobs.iterdir():
        (commit / file.name).symlink_to(os.path.join("..", "..", "blobs", file.name))
    path = write(tmp_path / "y.baft", grown(read(commit), 6))
    assert len(kept(inodes(blobs), inodes(path))) > 2
    assert not any(file.is_symlink() for file in path.iterdir())
    for file in blobs.iterdir():
        file.unlink()
    assert same(read(path), some(6))


@pytest.mark.parametrize("n", [5, 2])
def test_a_set_that_is_replaced_between_the_sum_and_the_mapping_is_read_whole(tmp_path, monkeypatch, n):
    path, other = write(tmp_path / "x.baft", some(5)), replace(some(n), seed=8)
    other = replace(other, state={name: tensor + 1 for name, tensor in other.state.items()})
    real, left = codec.safe_open, [3]

    def opened(file, kind):
        left[0] -= 1
        if left[0] == 0:
            write(path, other)
        return real(file, kind)

    monkeypatch.setattr(codec, "safe_open", opened)
    assert same(read(path), other)
    assert left[0] < 0


def test_where_files_cannot_be_linked_they_are_written(tmp_path, monkeypatch):
    path = write(tmp_path / "x.baft", some(5))
    found = read(path)

    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    write(path, grown(found, 6))
    assert same(read(path), some(6))
    assert names(tmp_path) == {"x.baft"}


def test_tensors_that_are_others_are_never_taken_for_those_of_a_file(tmp_path):
    path = write(tmp_path / "x.baft", some(5))
    before, found = inodes(path), read(path)
    name = next(iter(found.pieces[1].tensors))
    changed = replace(found, state={**found.state, name: found.state[name] + 1})
    write(path, changed)
    assert kept(before, inodes(path)) == {state_file(0)}
    assert torch.equal(read(path).state[name], some(5).state[name] + 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc, which tells what is mapped")
def test_full_pieces_are_mapped_and_stay_as_they_were(tmp_path):
    path = write(tmp_path / "x.baft", some(5))
    found = read(path)
    with open("/proc/self/maps") as file:
        mapped = {line.split("/")[-1].strip() for line in file if str(path) in line}
    assert mapped == {state_file(i) for i in range(len(found.pieces))} != set()
    write(path, replace(some(2), seed=1))
    for file in path.iterdir():
        file.unlink()
    assert same(found, some(5))


@pytest.mark.parametrize("number", [0, 2])
def test_a_piece_that_is_damaged_is_named(tmp_path, number):
    path = write(tmp_path / "x.baft", some(5))
    file = path / state_file(number)
    raw = file.read_bytes()
    for damaged, message in (
        (raw[:-1], "is truncated"),
        (raw + b"x", "is too long"),
        (raw[:-1] + bytes([raw[-1] ^ 1]), "was changed: its sha256"),
    ):
        file.unlink()  # others may map it
        file.write_bytes(damaged)
        with pytest.raises(DamagedArtifactError, match=rf"{file.name} {message}"):
            read(path)
    file.unlink()
    with pytest.raises(DamagedArtifactError, match=rf"{file.name} is missing"):
        read(path)


def test_a_tensor_that_two_pieces_hold_is_damage(tmp_path):
    path = write(tmp_path / "x.baft", some(5))
    twin = read(path).pieces[0]
    config = json.loads((path / "config.json").read_text())
    n = len(config["files"]) - 1
    os.link(path / state_file(0), path / state_file(n))
    config["files"][state_file(n)] = {"size_bytes": twin.size_bytes, "sha256": twin.sha256}
    del config["sha256"]
    (path / "config.json").write_bytes(codec._sealed(config))
    with pytest.raises(DamagedArtifactError, match="two pieces hold a tensor of the same name"):
        read(path)
    files = config["files"]
    config["files"] = {EDITS: files.pop(EDITS), "state-7.safetensors": files[state_file(1)]}
    (path / "config.json").write_bytes(codec._sealed(config))
    with pytest.raises(DamagedArtifactError, match="then its further pieces in order, got .*state-7"):
        read(path)


def test_a_strange_file_is_not_taken_for_a_piece(tmp_path):
    path = write(tmp_path / "x.baft", some(5))
    for name in ("state-01.safetensors", "state-1.safetensors.bak", "state--1.safetensors"):
        (path / name).write_text("mine")
        with pytest.raises(ArtifactError, match=f"no edit set .in it: {name}. and is not replaced"):
            write(path, some(6))
        (path / name).unlink()
    write(path, some(6))
    assert same(read(path), some(6))
