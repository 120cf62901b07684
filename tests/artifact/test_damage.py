"""Files that are changed in place while a model maps them: what that did to edits is never saved as sound."""

import os
import shutil
from dataclasses import replace

import pytest

from baft.artifact import merge, pieces, read, without, write
from baft.artifact.pieces import Stamp, state_file
from baft.errors import DamagedArtifactError
from edit_sets import grown, names, same, some, written

CHANGED = r"y\.baft was not written: .*state-1\.safetensors was changed in place since it was read"


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 14)  # more than a page: what is cut off is gone


def many(n, start=0):
    """So many edits, each of which is more than a piece."""
    return some(n, start, size=1024)


def spoil(file, how):
    """Changes a file under its inode, as `cp` does and programs that rewrite their files."""
    with file.open("r+b") as opened:
        if how == "cut":
            opened.truncate(16)
        elif how == "changed":
            opened.seek(-8, os.SEEK_END)
            opened.write(bytes(8))
        elif how == "not finite":
            opened.seek(-4, os.SEEK_END)
            opened.write(b"\x00\x00\xc0\x7f")
    os.utime(file, (1, 1))


def appended(found):
    more = many(7)
    return replace(more, state={**more.state, **found.state}, pieces=found.pieces)


def first_removed(found):
    return without(found, [found.edits[0].edit.id])


def cut_short(found):
    """Without what stands behind the middle of the second piece."""
    return replace(found, state=dict(list(found.state.items())[:6]))


def merged(found):
    return merge(many(2, start=20), found)


def as_it_is(found):
    return found


WAYS = [appended, first_removed, cut_short, merged, as_it_is]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["touched", "changed", "cut"])
def test_what_was_changed_in_place_is_not_saved_as_sound(tmp_path, way, how):
    path = written(tmp_path / "y.baft", many(6))
    found, file = read(path), path / state_file(1)
    truth = way(replace(many(6), state={name: tensor.clone() for name, tensor in found.state.items()}))
    spoil(file, how)
    if how == "touched":
        before = (path / state_file(0)).stat().st_ino, file.stat().st_ino
        known = write(path, way(found))
        assert known[1].stamp.changed_ns == 10**9 or way not in (appended, as_it_is)
        assert same(read(path), truth)
        linked = (path / state_file(0)).stat().st_ino, file.stat().st_ino
        assert (linked == before) == (way in (appended, as_it_is))
        return
    left = {one.name: Stamp.of(one.stat()) for one in path.iterdir()}
    with pytest.raises(DamagedArtifactError, match=CHANGED):
        write(path, way(found))
    assert {one.name: Stamp.of(one.stat()) for one in path.iterdir()} == left
    assert names(tmp_path) == {"y.baft"}


@pytest.mark.parametrize("how", ["changed", "not finite"])
@pytest.mark.parametrize("then", ["removed", "replaced", "moved"])
@pytest.mark.parametrize("way", WAYS)
def test_what_was_changed_before_its_file_went_is_not_saved_as_sound(tmp_path, way, then, how):
    path = written(tmp_path / "y.baft", many(6))
    found, sound, file = read(path), many(6), path / state_file(1)
    spoil(file, how)
    if then == "removed":
        shutil.rmtree(path)
    elif then == "replaced":
        write(path, sound)
    else:
        path.rename(tmp_path / "z.baft")
    with pytest.raises(DamagedArtifactError, match=CHANGED):
        write(path, way(found))
    assert path.exists() == (then == "replaced")


@pytest.mark.parametrize("way", WAYS)
def test_what_was_not_changed_before_its_file_went_is_saved(tmp_path, way):
    path = written(tmp_path / "y.baft", many(6))
    found = read(path)
    truth = way(replace(many(6), state={name: tensor.clone() for name, tensor in found.state.items()}))
    shutil.rmtree(path)
    write(path, way(found))
    assert same(read(path), truth)


def test_damage_is_found_where_files_cannot_be_linked(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    path = written(tmp_path / "y.baft", many(6))
    found = read(path)
    spoil(path / state_file(1), "changed")
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(DamagedArtifactError, match=CHANGED):
        write(path, found)


def test_files_elsewhere_are_looked_at_for_as_long_as_tensors_stand_in_them(tmp_path):
    first = written(tmp_path / "x.baft", many(6))
    found = read(first)
    second = tmp_path / "y.baft"
    found = replace(found, pieces=write(second, found))
    found = replace(found, pieces=write(second, found))  # linked this time
    spoil(first / state_file(1), "cut")
    with pytest.raises(DamagedArtifactError, match=CHANGED):
        write(second, first_removed(found))
    n = len(found.pieces)
    gone = {
        name.partition(".")[0]
        for one in found.pieces
        if one.path.name == "state-1.safetensors"
        for name in one.tensors
    }
    left = without(found, gone)  # what stands in it is in force no more
    left = replace(left, pieces=write(second, left))
    assert same(read(second), without(many(6), gone))
    assert len(left.pieces) < n


def test_what_is_linked_is_not_read_again(tmp_path, monkeypatch):
    """Where another process replaced what was read, one more edit is an append all the same."""
    first, second = written(tmp_path / "x.baft", many(6)), tmp_path / "y.baft"
    found = read(first)
    write(first, many(6))
    found = replace(found, pieces=write(second, found))
    made, real = [], pieces._content
    monkeypatch.setattr(pieces, "_content", lambda tensors: made.append(len(tensors)) or real(tensors))
    before = {file.name: file.stat().st_ino for file in second.iterdir()}
    write(second, appended(found))
    assert same(read(second), many(7))
    assert len(made) == 2  # what was begun, and one more
    assert sum((second / name).stat().st_ino == inode for name, inode in before.items()) == 9


def test_a_tensor_in_memory_may_be_of_any_file(tmp_path):
    """What was written, not read, is no business of who changes the file."""
    path, made = tmp_path / "y.baft", many(6)
    made = replace(made, pieces=write(path, made))
    spoil(path / state_file(1), "cut")
    write(path, made)
    assert same(read(path), many(6))


def test_two_sets_that_grow_apart(tmp_path):
    path = written(tmp_path / "y.baft", some(50))
    one, other = read(path), read(path)
    write(path, grown(one, 60))
    write(path, grown(other, 70))
    assert same(read(path), some(70))
