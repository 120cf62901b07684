import contextlib
import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from baft.artifact import is_artifact, pieces, read, store, write
from baft.errors import ArtifactError, BaftError, DamagedArtifactError
from edit_sets import FILES, independent, names, same, small


def contents(folder):
    return {one.name: one.read_bytes() for one in folder.iterdir()}


def test_a_link_stays_a_link(rome, tmp_path):
    link = tmp_path / "link.baft"
    link.symlink_to(rome)
    write(link, small(seed=8))
    assert link.is_symlink()
    assert read(rome).seed == 8
    assert names(tmp_path) == {"rome.baft", "link.baft"}


def test_is_artifact(rome, tmp_path):
    assert is_artifact(rome)
    assert is_artifact(str(rome))
    shutil.copytree(rome, tmp_path / "0123abcd")  # as the hub's cache calls it
    assert is_artifact(tmp_path / "0123abcd")
    assert same(read(tmp_path / "0123abcd"), small())
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "config.json").write_text("{}")
    (tmp_path / "file.baft").write_text("")
    for other in ("host", "file.baft", "absent", "absent.baft", "absent/x.baft"):
        assert not is_artifact(tmp_path / other)
    rome.rename(tmp_path / f".rome.baft.old-{time.time_ns()}-01234567")
    assert is_artifact(rome)
    (tmp_path / "empty.baft").mkdir()
    assert is_artifact(tmp_path / "empty.baft")  # it means to be one, and `read` says what is wrong


# What write refuses


@pytest.mark.parametrize("name", ["rome", "rome.zip", ".baft", "rome.baft.d"])
def test_another_name_is_refused(tmp_path, name):
    with pytest.raises(ArtifactError, match=r"ends in \.baft, got .*: use .*\.baft$"):
        write(tmp_path / name, small())
    assert not names(tmp_path)


@pytest.mark.parametrize("kind", ["file", "empty", "host", "with notes"])
def test_what_is_no_artifact_is_not_replaced(rome, tmp_path, kind):
    path = tmp_path / "other.baft"
    if kind == "file":
        path.write_text("mine")
    elif kind == "empty":
        path.mkdir()
    else:
        shutil.copytree(rome, path)
        (path / {"host": "model.safetensors", "with notes": "notes.txt"}[kind]).write_text("mine")
    before = path.read_bytes() if kind == "file" else contents(path)
    what = "no" if kind in ("file", "empty") else "more than an"
    with pytest.raises(ArtifactError, match=rf"other\.baft is {what} edit set .*choose another name"):
        write(path, small())
    assert (path.read_bytes() if kind == "file" else contents(path)) == before
    assert names(tmp_path) == {"rome.baft", "other.baft"}


def test_a_damaged_artifact_is_replaced(rome):
    (rome / "state.safetensors").unlink()
    (rome / "config.json").write_text("{")
    write(rome, small())
    assert same(read(rome), small())


def test_a_missing_parent_is_named(tmp_path):
    with pytest.raises(
        ArtifactError, match=r"absent/x\.baft was not written: No such file.*; make the folder"
    ):
        write(tmp_path / "absent" / "x.baft", small())
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"file/x\.baft was not written: Not a directory"):
        write(tmp_path / "file" / "x.baft", small())
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written(rome, tmp_path, monkeypatch, code):
    def refuse(path):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(
        ArtifactError, match=r"rome\.baft was not written: .*; choose a folder that can be written"
    ):
        write(rome, small(seed=8))
    assert same(read(rome), small())


# Interruptions: whatever happens at whatever step, the old artifact or the new one is there


class Killed(BaseException):
    """What a process that is killed does not get to see."""


class Steps:
    """Counts what is asked of the system, and fails at one step; `for_good`: at all later ones as well."""

    def __init__(self, monkeypatch, fail_at, failure, for_good):
        self.n, self.fail_at, self.failure, self.for_good = 0, fail_at, failure, for_good
        for name in ("rename", "mkdir", "fsync", "link"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        monkeypatch.setattr(shutil, "rmtree", self.rmtree)
        monkeypatch.setattr(Path, "open", lambda *arguments: self.open(*arguments))
        self.real_rmtree, self.real_open = RMTREE, OPEN

    def step(self):
        self.n += 1
        if self.n == self.fail_at or (self.for_good and self.n > self.fail_at):
            raise self.failure

    def counted(self, call):
        def counting(*arguments):
            self.step()
            return call(*arguments)

        return counting

    def rmtree(self, path, ignore_errors=False):
        if isinstance(self.failure, OSError):  # these it ignores
            return self.real_rmtree(path, ignore_errors=ignore_errors)
        self.step()
        for file in sorted(Path(path).iterdir()) if Path(path).is_dir() else ():
            file.unlink()
            self.step()
        return self.real_rmtree(path, ignore_errors=ignore_errors)

    def open(self, path, mode="r", *rest):
        file = self.real_open(path, mode, *rest)
        return Failing(file, self) if "w" in mode else file


class Failing:
    def __init__(self, file, steps):
        self.file, self.steps = file, steps

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, raw):
        half = len(raw) // 2
        self.file.write(raw[:half])
        self.steps.step()
        self.file.write(raw[half:])

    def flush(self):
        self.file.flush()

    def fileno(self):
        return self.file.fileno()


RMTREE, OPEN = shutil.rmtree, Path.open
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(monkeypatch, tmp_path, failure, *, for_good, replaces):
    """Yields an artifact's path after a write that failed at the first step, at the second, and so on."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # there is no power to lose, and it takes long
    old, new = small(), small(seed=8)
    for fail_at in range(1, 100):
        folder = tmp_path / str(fail_at)
        folder.mkdir()
        path = folder / "rome.baft"
        if replaces:
            write(path, old)
        raised = None
        with monkeypatch.context() as patch:
            steps = Steps(patch, fail_at, failure, for_good)
            try:
                write(path, new)
            except (BaftError, KeyboardInterrupt, Killed) as error:
                raised = error
        yield path, raised, steps
        if steps.n < fail_at:
            assert fail_at > 10  # the whole write was gone through
            return


@pytest.mark.parametrize("replaces", [False, True])
def test_a_full_disk_leaves_the_old_artifact(tmp_path, monkeypatch, replaces):
    n_refused = 0
    for path, raised, _ in interrupted(monkeypatch, tmp_path, FULL, for_good=False, replaces=replaces):
        if raised is None:
            assert same(read(path), small(seed=8))
        else:
            assert isinstance(raised, ArtifactError)
            assert "rome.baft was not written: No space left on device; make room" in str(raised)
            assert path.exists() == replaces
            assert not replaces or same(read(path), small())
            n_refused += 1
        write(path, small(seed=9))
        assert names(path.parent) == {"rome.baft"}
    assert n_refused >= 8  # mkdir, and for each file a write and an fsync, and the renames


@pytest.mark.parametrize("replaces", [False, True])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, replaces):
    for n in range(1, 4):
        path = tmp_path / str(n) / "rome.baft"
        path.parent.mkdir()
        if replaces:
            write(path, small())
        count = iter(range(1, 100))

        def full(handle, count=count, n=n):
            if next(count) == n:
                raise FULL

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(ArtifactError, match="make room"):
                write(path, small(seed=8))
        assert names(path.parent) == ({"rome.baft"} if replaces else set())


@pytest.mark.parametrize("replaces", [False, True])
def test_a_keyboard_interrupt_leaves_the_old_or_the_new(tmp_path, monkeypatch, replaces):
    failure = KeyboardInterrupt()
    for path, raised, _ in interrupted(monkeypatch, tmp_path, failure, for_good=False, replaces=replaces):
        assert raised is None or raised is failure
        if replaces:
            assert read(path).seed in (7, 8)
        elif path.exists():
            assert same(read(path), small(seed=8))
        write(path, small(seed=9))
        assert same(read(path), small(seed=9))


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("next_is", ["read", "write"])
def test_a_kill_leaves_the_old_or_the_new(tmp_path, monkeypatch, replaces, next_is):
    n_missing = 0
    for path, raised, _ in interrupted(monkeypatch, tmp_path, Killed(), for_good=True, replaces=replaces):
        assert raised is None or isinstance(raised, Killed)
        n_missing += replaces and not path.exists()
        if next_is == "read" and (replaces or path.exists()):
            found = read(path)
            assert same(found, small()) or same(found, small(seed=8))
            assert path.exists()
        monkeypatch.setattr(store, "_STALE_S", -1)  # as if an hour had passed
        write(path, small(seed=9))
        assert same(read(path), small(seed=9))
        assert names(path.parent) == {"rome.baft"}
    assert n_missing or not replaces  # the step where only the backup is left was among them


def test_a_kill_of_an_append_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 64)
    texts = [(f"{i} is", "x") for i in range(5)]
    old, new = independent(*texts[:4]), independent(*texts)
    outcomes, linked, real = set(), [], os.link
    monkeypatch.setattr(os, "link", lambda *paths: linked.append(paths) or real(*paths))
    for fail_at in range(1, 200):
        path = tmp_path / str(fail_at) / "x.baft"
        path.parent.mkdir()
        write(path, old)
        found = read(path)
        grown = replace(new, state={**new.state, **found.state}, pieces=found.pieces)
        with monkeypatch.context() as patch:
            steps = Steps(patch, fail_at, Killed(), for_good=True)
            with contextlib.suppress(Killed):
                write(path, grown)
        outcomes.add((same(read(path), old), same(read(path), new)))
        if steps.n < fail_at:
            break
    assert outcomes == {(True, False), (False, True)}
    assert len(linked) > 10


def test_the_newest_backup_is_read_even_where_nothing_can_be_moved(rome, tmp_path, monkeypatch):
    write(tmp_path / "new.baft", small(seed=8))
    rome.rename(tmp_path / ".rome.baft.old-1700000000000000000-01234567")
    (tmp_path / "new.baft").rename(tmp_path / ".rome.baft.old-1700000000000000001-00000000")
    (tmp_path / ".rome.baft.old-mine").mkdir()  # no backup of ours

    def refuse(*paths):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        assert same(read(rome), small(seed=8))
    assert not rome.exists()
    assert same(read(rome), small(seed=8))
    assert rome.exists()
    write(rome, small(seed=9))
    assert names(tmp_path) == {"rome.baft", ".rome.baft.old-mine"}


# Several at once


def test_two_writers_and_a_reader_at_once(rome, tmp_path):
    wrong = []
    done = threading.Event()

    def guarded(work):
        try:
            work()
        except Exception as error:
            wrong.append(error)

    def writing(seed):
        made = small(seed=seed)
        for _ in range(12):
            write(rome, made)

    def reading():
        while not done.is_set():
            found = read(rome)
            if not same(found, sets[found.seed]):
                wrong.append(found)

    sets = {seed: small(seed=seed) for seed in (7, 8, 9)}
    writers = [
        threading.Thread(daemon=True, target=guarded, args=(lambda seed=seed: writing(seed),))
        for seed in (8, 9)
    ]
    reader = threading.Thread(daemon=True, target=guarded, args=(reading,))
    reader.start()
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not wrong
    assert names(tmp_path) == {"rome.baft"}
    assert read(rome).seed in (8, 9)


def test_two_processes_that_write_at_once(rome, tmp_path):
    script = (
        "import sys, dataclasses; from baft.artifact import read, write\n"
        "made = dataclasses.replace(read(sys.argv[1]), seed=9)\n"
        "print(); sys.stdout.flush(); sys.stdin.readline()\n"
        "for _ in range(15): write(sys.argv[2], made)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(store.__file__).parents[2])}
    target, made = tmp_path / "target.baft", small(seed=8)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(rome), str(target)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()  # it is ready
        other.stdin.write(b"\n")
        other.stdin.flush()
        for _ in range(15):
            write(target, made)
        assert other.wait(timeout=300) == 0
    assert read(target).seed in (8, 9)
    assert names(tmp_path) == {"rome.baft", "target.baft"}


def test_others_who_never_stop(rome, monkeypatch):
    real = os.rename

    def contested(source, target):
        if target == rome:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_ATTEMPTS", 3)
        patch.setattr(os, "rename", contested)
        with pytest.raises(ArtifactError, match="others write it all the time; try again"):
            write(rome, small(seed=8))
    assert same(read(rome), small())
    (rome / "config.json").write_text("{")
    stamps = iter((n, n) for n in range(10**6))
    monkeypatch.setattr(store, "_version", lambda folder: next(stamps))
    with pytest.raises(ArtifactError, match="others write it all the time: try again"):
        read(rome)


# What read refuses


def test_what_is_not_there(tmp_path):
    with pytest.raises(ArtifactError, match=r"absent\.baft does not exist: check the path") as caught:
        read(tmp_path / "absent.baft")
    assert type(caught.value) is ArtifactError
    (tmp_path / "file.baft").write_text("")
    with pytest.raises(ArtifactError, match=r"file\.baft is a file, and an edit set is a folder"):
        read(tmp_path / "file.baft")


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(rome, name):
    (rome / name).unlink()
    with pytest.raises(DamagedArtifactError, match=rf"{name} is missing; take it from a copy"):
        read(rome)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_that_cannot_be_read_is_named(rome, name):
    (rome / name).unlink()
    (rome / name).mkdir()
    with pytest.raises(ArtifactError, match=r"rome\.baft cannot be read: Is a directory"):
        read(rome)
