"""Many edits in one artifact: their tensors stand in pieces, and one more edit is an append."""

import json
import os
import sys
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baft.artifact import EDITS, codec, pieces, read, without, write
from baft.artifact.pieces import state_file
from baft.errors import ArtifactError, DamagedArtifactError
from edit_sets import grown, names, same, some, written

PIECE = 4096  # eight tensors of 512 bytes; an edit has six of them


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", PIECE)


def inodes(path):
    return {one.name: one.stat().st_ino for one in path.iterdir() if one.suffix == ".safetensors"}


def kept(before, after):
    """The files that two states of an artifact share."""
    return {name for name, inode in before.items() if after.get(name) == inode}


def test_what_is_written_in_pieces_is_read(tmp_path):
    made = some(7)
    path = written(tmp_path / "x.baft", made)
    files = [state_file(i) for i in range(6)]  # of 42 tensors
    assert inodes(path).keys() == set(files)
    sizes = [(path / file).stat().st_size for file in files]
    assert all(PIECE <= size < 2 * PIECE for size in sizes[:-1])
    assert sizes[-1] < PIECE
    found = read(path)
    assert same(found, made)
    assert not same(found, some(6))  # the control
    assert [piece.path for piece in found.pieces] == [path / file for file in files[:-1]]
    assert all(
        found.state[name] is tensor for piece in found.pieces for name, tensor in piece.tensors.items()
    )


@pytest.mark.parametrize("how", ["read", "written"])
def test_one_more_edit_is_an_append(tmp_path, how):
    path, first = tmp_path / "x.baft", some(5)
    first = replace(first, pieces=write(path, first))
    before = inodes(path)
    full = {state_file(i) for i in range(3)}  # of 30 tensors
    more = grown(read(path) if how == "read" else first, 6)
    more = replace(more, pieces=write(path, more))
    assert kept(before, inodes(path)) == full
    assert same(read(path), some(6))
    between = inodes(path)
    write(path, grown(more, 9))  # what was written just now is known as well
    assert kept(before, inodes(path)) == full
    assert kept(between, inodes(path)) == {*full, state_file(3)}  # of 36
    assert same(read(path), some(9))
    assert names(tmp_path) == {"x.baft"}


def test_a_copy_is_a_copy(tmp_path):
    """What is saved elsewhere shares no file: whatever is done to the one leaves the other as it is."""
    first = written(tmp_path / "x.baft", some(5))
    found = read(first)
    second = tmp_path / "y.baft"
    found = replace(found, pieces=write(second, found))
    assert not set(inodes(first).values()) & set(inodes(second).values())
    assert all(file.stat().st_nlink == 1 for folder in (first, second) for file in folder.iterdir())
    before = inodes(first), inodes(second)
    full = {state_file(i) for i in range(3)}
    found = replace(found, pieces=write(second, found))  # what was written there is known
    assert kept(before[1], inodes(second)) == full
    write(first, found)  # and so is what was read
    assert kept(before[0], inodes(first)) == full
    for file in first.iterdir():
        file.write_bytes(b"other")
    assert same(read(second), some(5))


def test_what_an_edit_in_the_middle_leaves_is_written_anew(tmp_path):
    path = written(tmp_path / "x.baft", some(6))
    before, found = inodes(path), read(path)
    gone = found.edits[3].edit.id
    write(path, without(found, [gone]))
    assert kept(before, inodes(path)) == {state_file(i) for i in range(2)}  # up to it
    assert same(read(path), without(some(6), [gone]))


@pytest.mark.parametrize("what", ["replaced", "removed"])
def test_a_piece_that_is_not_what_it_was_is_written_anew(tmp_path, what):
    path = written(tmp_path / "x.baft", some(5))
    found = read(path)
    file = path / state_file(1)
    size = file.stat().st_size
    file.unlink()
    if what == "replaced":
        file.write_bytes(bytes(size))
    before = inodes(path)
    write(path, grown(found, 6))
    assert same(read(path), some(6))
    assert kept(before, inodes(path)) == {state_file(0), state_file(2)}  # this one alone


def test_a_file_that_has_come_in_the_place_of_what_was_written_is_no_damage(tmp_path):
    path, made = tmp_path / "x.baft", some(5)
    made = replace(made, pieces=write(path, made))
    file = path / state_file(1)
    file.write_bytes(bytes(file.stat().st_size))  # even under the same inode
    os.utime(file, (1, 1))
    write(path, made)
    assert same(read(path), some(5))


def test_what_the_hubs_client_keeps_can_be_saved_again(tmp_path):
    """It keeps files in one folder, and a folder of links to them for each commit."""
    blobs, commit = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    written(tmp_path / "x.baft", some(5)).rename(blobs)
    commit.mkdir(parents=True)
    for file in blobs.iterdir():
        (commit / file.name).symlink_to(os.path.join("..", "..", "blobs", file.name))
    link = tmp_path / "x.baft"
    link.symlink_to(commit)
    for path in (tmp_path / "y.baft", link):  # the other is written in the place of the commit
        write(path, grown(read(commit), 6))
        assert not set(inodes(blobs).values()) & set(inodes(path).values())
        assert not any(file.is_symlink() for file in path.iterdir())
    for file in blobs.iterdir():
        file.unlink()
    assert same(read(path), some(6))


@pytest.mark.parametrize("n", [4, 2])
def test_a_set_that_is_replaced_between_the_sum_and_the_mapping_is_read_whole(tmp_path, monkeypatch, n):
    path, other = written(tmp_path / "x.baft", some(4)), replace(some(n), seed=8)
    other = replace(other, state={name: tensor + 1 for name, tensor in other.state.items()})
    real, left = pieces.safe_open, [3]  # the last: what was read before has other names for the rest

    def opened(file, kind):
        left[0] -= 1
        if left[0] == 0:
            write(path, other)
        return real(file, kind)

    monkeypatch.setattr(pieces, "safe_open", opened)
    assert same(read(path), other)
    assert left[0] < 0


def test_where_files_cannot_be_linked_they_are_written_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 20)
    made = some(16, size=1 << 16)  # 24 MB
    path = written(tmp_path / "x.baft", made)
    found, opened, real = read(path), [], Path.open

    def refuse(*_):
        raise PermissionError("no links here")

    def noted(file, mode="r", *rest):
        opened.extend([file.name] if "w" in mode else [])
        return real(file, mode, *rest)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "open", noted)
    tracemalloc.start()
    try:
        write(path, found)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert same(read(path), made)
    assert names(tmp_path) == {"x.baft"}
    assert opened == ["edits.jsonl", *(state_file(i) for i in range(24)), "config.json"]


def test_tensors_that_are_others_are_never_taken_for_those_of_a_file(tmp_path):
    path = written(tmp_path / "x.baft", some(5))
    before, found = inodes(path), read(path)
    name = next(iter(found.pieces[1].tensors))
    changed = replace(found, state={**found.state, name: found.state[name] + 1})
    write(path, changed)
    assert kept(before, inodes(path)) == {state_file(0)}
    assert torch.equal(read(path).state[name], some(5).state[name] + 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc, which tells what is mapped")
def test_full_pieces_are_mapped_and_stay_as_they_were(tmp_path):
    path = written(tmp_path / "x.baft", some(5))
    found = read(path)
    with open("/proc/self/maps") as file:
        mapped = {line.split("/")[-1].strip() for line in file if str(path) in line}
    assert mapped == {state_file(i) for i in range(len(found.pieces))} != set()
    write(path, replace(some(2), seed=1))
    for file in path.iterdir():
        file.unlink()
    assert same(found, some(5))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc, which tells memory apart")
def test_what_is_mapped_takes_no_memory(tmp_path, monkeypatch):
    def own_mb():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) // 1024

    monkeypatch.setattr(pieces, "PIECE_BYTES", 4 << 20)
    path = written(tmp_path / "x.baft", some(20, size=1 << 17))  # 60 MB
    before = own_mb()
    found = read(path)
    assert own_mb() - before < 15
    assert len(found.pieces) == 15


@pytest.mark.parametrize("number", [0, 2])
def test_a_piece_that_is_damaged_is_named(tmp_path, number):
    path = written(tmp_path / "x.baft", some(5))
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
    path = written(tmp_path / "x.baft", some(5))
    config = json.loads((path / "config.json").read_text())
    n = len(config["files"]) - 1
    os.link(path / state_file(0), path / state_file(n))
    config["files"][state_file(n)] = config["files"][state_file(0)]
    del config["sha256"]
    (path / "config.json").write_bytes(codec._sealed(config))
    with pytest.raises(DamagedArtifactError, match="two pieces hold a tensor of the same name"):
        read(path)
    files = config["files"]
    config["files"] = {EDITS: files.pop(EDITS), "state-7.safetensors": files[state_file(1)]}
    (path / "config.json").write_bytes(codec._sealed(config))
    with pytest.raises(DamagedArtifactError, match="then its further pieces, got .*state-7"):
        read(path)


@pytest.mark.parametrize(
    "name",
    [
        "state-01.safetensors",
        "state-0.safetensors",
        "state-1.safetensors.bak",
        "state--1.safetensors",
        "state-1-of-3.safetensors",
        "state-1\u0663.safetensors",  # a digit of Arabic
        "state-1.safetensors\n",
    ],
)
def test_a_strange_file_is_not_taken_for_a_piece(tmp_path, name):
    path = written(tmp_path / "x.baft", some(5))
    (path / name).write_text("mine")
    with pytest.raises(ArtifactError, match=f"more than an edit set .in it: {name}. and is not replaced"):
        write(path, some(6))
    (path / name).unlink()
    write(path, some(6))
    assert same(read(path), some(6))


def test_the_order_of_keys_does_not_matter(tmp_path):
    path = written(tmp_path / "x.baft", some(18))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config, sort_keys=True))
    assert len(config["files"]) > 11  # of which state-10 comes before state-2, and all before state
    found = read(path)
    assert same(found, some(18))
    assert list(found.state)[:8] == sorted(list(some(18).state)[:8])  # as the pieces are numbered


def test_a_path_that_is_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    path = written(folder / "x.baft", some(5))
    found = read(path)
    assert same(found, some(5))
    write(path, grown(found, 6))
    assert same(read(path), some(6))


def test_two_writers_of_many_pieces_at_once(tmp_path):
    """Each links what it wrote last, which the other may have replaced."""
    path, wrong = written(tmp_path / "x.baft", some(5)), []

    def writing(seed):
        try:
            mine = replace(some(5 + seed), seed=seed)
            for _ in range(12):
                mine = replace(mine, pieces=write(path, mine))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=writing, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    found = read(path)
    assert same(found, replace(some(5 + found.seed), seed=found.seed))
    assert found.seed in (1, 2)
    assert names(tmp_path) == {"x.baft"}
