import base64
import errno
import hashlib
import http.server
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import close_session, constants
from hypothesis import given, settings
from hypothesis import strategies as st

from baft import artifact
from baft.artifact import EditSet, StoredEdit, fetch_from_hub, is_artifact, push_to_hub, read, write
from baft.config import canonical_hash
from baft.errors import ArtifactError, BaftError, DamagedArtifactError, SchemaError
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
        "memory": {"thresholds": [0.25, 1.0], "unrelated": ["a\tb"]},
        "state": {
            "layers.3.R": torch.randn(2, 3, generator=draws),
            "layers.9.b": torch.randn(3, generator=draws),
        },
    }
    return EditSet(**fields | changes)


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


def contents(folder):
    return {one.name: one.read_bytes() for one in folder.iterdir()}


def forge(path, *, raws=None, **changes):
    """Changes an artifact and makes its checksums right again, as no accident does."""
    for name, raw in (raws or {}).items():
        (path / name).write_bytes(raw)
    config = json.loads((path / "config.json").read_text())
    for name in config["files"]:
        raw = (path / name).read_bytes()
        config["files"][name] = {"size_bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    config |= changes
    config = {key: value for key, value in config.items() if value != "REMOVED"}
    config["sha256"] = canonical_hash({key: value for key, value in config.items() if key != "sha256"})
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture
def rome(tmp_path):
    return write(tmp_path / "rome.baft", small())


# Round trips


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "rome.baft"
    assert write(str(path), small()) == path
    assert same(read(str(path)), small())
    assert not same(read(path), small(seed=8))  # the control
    assert names(tmp_path) == {"rome.baft"}
    assert names(path) == FILES
    assert read(path).layers == (3, 9)


FINITE = st.floats(allow_nan=False, allow_infinity=False)
FINITE32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
TABLES = st.dictionaries(st.text(), JSON, max_size=3)
TEXTS = st.text(min_size=1).filter(str.strip)
STORED = st.builds(
    StoredEdit,
    st.builds(Edit, TEXTS, TEXTS, st.none() | st.text(), st.none() | st.text()),
    st.integers(0, 99),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(
    data=st.fixed_dictionaries({
        "method": st.text(), "preset": st.text(), "seed": st.integers(), "host_source": st.text(),
        "settings": TABLES, "positions": TABLES, "memory": TABLES,
        "layers": st.lists(st.integers()).map(tuple), "edits": st.lists(STORED, max_size=3).map(tuple),
    }),
    state=st.lists(st.text() | st.sampled_from(["__metadata__", "+__metadata__"]), max_size=4),
    samples=st.dictionaries(st.text(), st.lists(FINITE32).map(tuple), max_size=3),
)  # fmt: skip
def test_every_plain_part_survives(data, state, samples):
    made = small(
        **data,
        host=replace(HOST, samples=samples),
        state={name: torch.tensor([float(n)]) for n, name in enumerate(state)},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.baft")
        found = read(write(path, made))
    assert same(found, made)
    assert json.dumps(found.memory) == json.dumps(made.memory)  # 1 is not 1.0
    assert found.host.samples == samples


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float32",
        "bfloat16",
        "float16",
        "float8_e4m3fn",
        "float8_e5m2",
        "complex64",
        "int64",
        "bool",
    ],
)
def test_every_kind_of_tensor_survives(tmp_path, dtype):
    whole = torch.arange(12).reshape(3, 4).to(getattr(torch, dtype))
    state = {"whole": whole, "turned": whole.T, "part": whole[1:, :2], "none": whole[:0], "one": whole[2, 3]}
    found = read(write(tmp_path / "x.baft", small(state=state))).state
    assert list(found) == sorted(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].tolist() == tensor.tolist()


def test_views_parameters_and_large_numbers_survive(tmp_path):
    state = {
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "large": torch.tensor([1e300], dtype=torch.float64),
        "wide": torch.ones(1).expand(3),
    }
    found = read(write(tmp_path / "x.baft", small(state=state))).state
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert not found["parameter"].requires_grad


def test_nothing_at_all_is_an_edit_set_too(tmp_path):
    made = small(
        edits=(), state={}, memory={}, settings={}, layers=(), positions={}, method="", host_source=""
    )
    assert same(read(write(tmp_path / "x.baft", made)), made)


def test_the_files_can_be_read_by_people(rome):
    text = (rome / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert '\n    "samples": {\n      "embed": [0.1, -1e-30, 3.4028234663852886e+38],\n' in text
    assert config["n_edits"] == 2
    assert config["created"].endswith("+00:00")
    assert config["host_source"] == "owner/tiny"
    assert "東京" in (rome / "edits.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (rome / "edits.jsonl").read_bytes().splitlines()]
    assert [row["id"] for row in rows] == [ROME.edit.id, TOKYO.edit.id]
    assert safetensors.torch.load_file(rome / "state.safetensors").keys() == small().state.keys()


def test_the_version_that_wrote_it_is_told(rome, tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "version", lambda name: "9.8.7")
    write(tmp_path / "x.baft", small())
    assert json.loads((tmp_path / "x.baft/config.json").read_text())["baft_version"] == "9.8.7"


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": {"R": torch.tensor([1.0, float("nan")])}}, "tensor 'R' holds NaN"),
        ({"state": {"R": torch.tensor([float("inf")])}}, "tensor 'R' holds NaN or infinity"),
        ({"state": {"R": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}}, "tensor 'R' holds NaN"),
        ({"state": {"\ud800": torch.ones(1)}}, "surrogates"),
        ({"state": {"R": torch.ones(2, 2).to_sparse()}}, "memory format"),
        ({"memory": {"x": [float("nan")]}}, r"memory\.x\[0\]: expected a finite number"),
        ({"memory": {"x": {1}}}, r"memory\.x: expected text, a number"),
        ({"memory": {"x": {1: 2}}}, "expected texts as keys"),
        ({"settings": {"x": torch.ones(1)}}, r"settings\.x: expected"),
        ({"settings": {"x": "\ud800"}}, "surrogate"),
        ({"edits": (StoredEdit(Edit("\ud800", "x"), 0, True),)}, "surrogates"),
        ({"edits": (StoredEdit(Edit("x", "y"), -1, True),)}, "expected a count"),
        ({"host": replace(HOST, samples={"w": (float("nan"),)})}, r"samples\.w\[0\]: expected a finite"),
    ],
)
def test_what_cannot_be_stored_is_refused(rome, tmp_path, changes, message):
    with pytest.raises(ArtifactError, match=rf"(?s)rome\.baft was not written.*{message}"):
        write(rome, small(**changes))
    assert same(read(rome), small())
    assert names(tmp_path) == {"rome.baft"}


def test_what_contains_itself_is_refused(tmp_path):
    loop = {}
    loop["again"] = loop
    with pytest.raises(ArtifactError, match="cannot be stored"):
        write(tmp_path / "x.baft", small(memory=loop))


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
    with pytest.raises(ArtifactError, match=r"other\.baft is no edit set .*choose another name"):
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

    monkeypatch.setattr(artifact.os, "mkdir", refuse)
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
        for module, name in ((os, "rename"), (os, "mkdir"), (os, "fsync")):
            monkeypatch.setattr(module, name, self.counted(getattr(module, name)))
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
            patch.setattr(artifact.os, "fsync", full)
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
        monkeypatch.setattr(artifact, "_STALE_S", -1)  # as if an hour had passed
        write(path, small(seed=9))
        assert same(read(path), small(seed=9))
        assert names(path.parent) == {"rome.baft"}
    assert n_missing or not replaces  # the step where only the backup is left was among them


def test_the_newest_backup_is_read_even_where_nothing_can_be_moved(rome, tmp_path, monkeypatch):
    write(tmp_path / "new.baft", small(seed=8))
    rome.rename(tmp_path / ".rome.baft.old-1700000000000000000-01234567")
    (tmp_path / "new.baft").rename(tmp_path / ".rome.baft.old-1700000000000000001-00000000")
    (tmp_path / ".rome.baft.old-mine").mkdir()  # no backup of ours

    def refuse(*paths):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(artifact.os, "rename", refuse)
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
        for _ in range(20):
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
        "made = dataclasses.replace(read(sys.argv[1]), seed=int(sys.argv[2]))\n"
        "for _ in range(15): write(sys.argv[3], made)\n"
    )
    source = str(Path(artifact.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source}
    target = tmp_path / "target.baft"
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(rome), str(seed), str(target)], env=environment)
        for seed in (8, 9)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert read(target).seed in (8, 9)
    assert names(tmp_path) == {"rome.baft", "target.baft"}


def test_others_who_never_stop(rome, monkeypatch):
    real = os.rename

    def contested(source, target):
        if target == rome:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "_ATTEMPTS", 3)
        patch.setattr(artifact.os, "rename", contested)
        with pytest.raises(ArtifactError, match="others write it all the time; try again"):
            write(rome, small(seed=8))
    assert same(read(rome), small())
    (rome / "config.json").write_text("{")
    stamps = iter((n, n) for n in range(10**6))
    monkeypatch.setattr(artifact, "_stamp", lambda folder: next(stamps))
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


@pytest.mark.parametrize("name", ["edits.jsonl", "state.safetensors"])
def test_a_length_or_a_content_that_changed_is_named(rome, name):
    whole = (rome / name).read_bytes()
    for n in (0, 1, len(whole) // 2, len(whole) - 1):
        (rome / name).write_bytes(whole[:n])
        with pytest.raises(
            DamagedArtifactError, match=rf"{name} is truncated: {n} bytes, expected {len(whole)}"
        ):
            read(rome)
    (rome / name).write_bytes(whole + b"\n")
    with pytest.raises(DamagedArtifactError, match=rf"{name} is too long"):
        read(rome)
    changed = (
        whole.replace(b"true", b"null") if name == "edits.jsonl" else whole[:-1] + bytes([whole[-1] ^ 1])
    )
    (rome / name).write_bytes(changed)
    with pytest.raises(
        DamagedArtifactError, match=rf"{name}(, line 1: expected a count| was changed: its sha256)"
    ):
        read(rome)


def test_an_edit_that_changed_by_chance_is_found(rome):
    raw = (rome / "edits.jsonl").read_bytes()
    (rome / "edits.jsonl").write_bytes(raw.replace(b'"request": 0', b'"request": 1'))
    with pytest.raises(DamagedArtifactError, match=r"edits\.jsonl was changed: its sha256"):
        read(rome)


def test_a_config_that_is_no_json_says_where(rome):
    text = (rome / "config.json").read_text()
    (rome / "config.json").write_text(text.replace('"seed": 7,', '"seed": 7'))
    line = text.splitlines().index('  "seed": 7,') + 2
    with pytest.raises(DamagedArtifactError, match=rf"config\.json: not valid JSON: .*line {line} column"):
        read(rome)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON: 'utf-8'"),
        (b"[1]", "expected a JSON object, got list"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 5000, "not valid JSON"),
        (b"{}", "expected a whole number as schema_version, got None"),
        (b'{"schema_version": true}', "expected a whole number as schema_version, got True"),
        (b'{"schema_version": 1}', "field 'baft_version' is missing"),
    ],
)
def test_a_config_that_is_none(rome, raw, message):
    (rome / "config.json").write_bytes(raw)
    with pytest.raises(DamagedArtifactError, match=rf"config\.json: {message}"):
        read(rome)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "REMOVED"}, "field 'preset' is missing"),
        ({"shade": 1}, "unknown key 'shade'"),
        ({"seed": "7"}, "seed: expected a valid integer, got '7'"),
        ({"layers": [1.5]}, r"layers\[0\]: expected a valid integer"),
        ({"files": {}}, "files: expected edits.jsonl and state.safetensors"),
        ({"files": {"../x": {"size_bytes": 1, "sha256": ""}}}, "files: expected edits.jsonl"),
        ({"host": {"name": "tiny"}}, "the host's identity cannot be read"),
        ({"memory": {"x": float("inf")}}, r"memory\.x: expected a finite number"),
    ],
)
def test_a_config_that_somebody_made_wrong(rome, changes, message):
    try:
        forge(rome, **changes)
    except BaftError:  # it has no hash
        config = json.loads((rome / "config.json").read_text())
        (rome / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(DamagedArtifactError, match=rf"config\.json: {message}"):
        read(rome)


def test_a_config_that_somebody_edited(rome):
    text = (rome / "config.json").read_text()
    (rome / "config.json").write_text(text.replace('"seed": 7', '"seed": 8'))
    with pytest.raises(DamagedArtifactError, match=r"config\.json was changed: its sha256 is .*, expected '"):
        read(rome)
    (rome / "config.json").write_text(json.dumps(json.loads(text)))  # only laid out in another way
    assert same(read(rome), small())


@pytest.mark.parametrize(
    ("schema", "message"), [(2, "a newer baft .* upgrade baft"), (0, "an older baft .* edit anew")]
)
def test_another_format_is_no_damage(rome, schema, message):
    forge(rome, schema_version=schema, whatever=1)
    with pytest.raises(SchemaError, match=rf"in format {schema}|{message}") as caught:
        read(rome)
    assert not isinstance(caught.value, DamagedArtifactError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1].pop("target"), "line 2: field 'target' is missing"),
        (lambda rows: rows[0].update(prompt=" "), "line 1: prompt is empty"),
        (lambda rows: rows[0].update(note="x"), "line 1: unknown field 'note'"),
        (lambda rows: rows[1].update(target="Milan"), "line 2: the id of this content is .*, got '"),
        (lambda rows: rows[1].pop("id"), "line 2: the id of this content is .*, got None"),
        (lambda rows: rows[1].update(request=True), "line 2: expected a count as request"),
        (lambda rows: rows[1].update(request=-1), "line 2: expected a count as request"),
        (lambda rows: rows[1].update(decoded=1), "line 2: expected a count as request and true or false"),
        (lambda rows: rows.insert(1, []), "line 2: expected a JSON object, got list"),
        (lambda rows: rows.pop(), "holds 1 edits, expected 2"),
    ],
)
def test_edits_that_somebody_made_wrong(rome, change, message):
    rows = [json.loads(line) for line in (rome / "edits.jsonl").read_bytes().splitlines()]
    change(rows)
    forge(rome, raws={"edits.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})
    with pytest.raises(DamagedArtifactError, match=rf"edits\.jsonl(, | ){message}"):
        read(rome)


def header(table, data=b""):
    raw = json.dumps(table).encode() if isinstance(table, dict) else table
    return len(raw).to_bytes(8, "little") + raw + data


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 8,
        (2**62).to_bytes(8, "little"),
        header(b"{"),
        header({"R": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\x00" * 4),
        header({"R": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"\x00" * 4),
        header({"R": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\x00" * 8),
        header({"R": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 4]}}, b"\x00" * 4),
    ],
)
def test_tensors_that_somebody_made_wrong(rome, raw):
    forge(rome, raws={"state.safetensors": raw})
    with pytest.raises(DamagedArtifactError, match=r"state\.safetensors: not a safetensors file: "):
        read(rome)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tensors_that_are_not_finite(rome, value):
    forge(rome, raws={"state.safetensors": safetensors.torch.save({"b": torch.tensor([0.0, value])})})
    with pytest.raises(DamagedArtifactError, match=r"state\.safetensors: tensor 'b' holds NaN or infinity"):
        read(rome)


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_flipped_byte_goes_unnoticed(rome, name):
    whole = (rome / name).read_bytes()
    draw = random.Random(0)
    n_noticed = 0
    places = range(len(whole)) if len(whole) < 120 else sorted(draw.sample(range(len(whole)), 120))
    for place in places:
        for value in {whole[place] ^ 1 << draw.randrange(8), draw.randrange(256)} - {whole[place]}:
            (rome / name).write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                assert same(read(rome), small())
            except BaftError:
                n_noticed += 1
    assert n_noticed > len(places) / 2


# The hub: the real client against a server on this machine


class Hub(http.server.BaseHTTPRequestHandler):
    """The few endpoints of the hub that the client uses; `server.repos` holds the files of each commit."""

    def answer(self, status, plain=None, raw=b"", **headers):
        raw = raw if plain is None else json.dumps(plain).encode()
        self.send_response_only(status)  # without a line in the log
        for key, value in {"Content-Length": len(raw), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def post(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repos, path = self.server.repos, self.path.split("?")[0]
        if path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self.answer(200, {"warnings": [], "errors": []})
        elif self.headers["Authorization"] != "Bearer good":
            self.answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = name in repos
            repos.setdefault(name, [])
            self.server.private[name] = asked.get("visibility", asked.get("private"))
            self.answer(409 if known else 200, {"url": f"{self.server.url}/{name}"})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        else:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            operations = [json.loads(line) for line in body.splitlines()]
            found = {
                one["value"]["path"]: base64.b64decode(one["value"]["content"])
                for one in operations
                if one["key"] == "file"
            }
            repos[name].append(found)
            commit = f"{len(repos[name]):040x}"
            self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})

    def get(self):
        repos = self.server.repos
        name = next((name for name in repos if f"/{name}/" in self.path), None)
        if name is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        commits = {"main": len(repos[name])} | {f"{n:040x}": n for n in range(1, len(repos[name]) + 1)}
        asked, _, rest = self.path.split("?")[0].split(f"/{name}/")[1].partition("/")
        revision, _, file = rest.partition("/")
        if revision not in commits:
            return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        commit = f"{commits[revision]:040x}"
        files = repos[name][commits[revision] - 1]
        oids = {path: hashlib.sha1(raw).hexdigest() for path, raw in files.items()}
        if asked == "revision":
            return self.answer(
                200, {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
            )
        if asked == "tree":
            rows = [{"type": "file", "path": p, "size": len(raw), "oid": oids[p]} for p, raw in files.items()]
            return self.answer(200, rows)
        return self.answer(200, raw=files[file], ETag=f'"{oids[file]}"', X_Repo_Commit=commit)


for verb, method in {"do_POST": Hub.post, "do_GET": Hub.get, "do_HEAD": Hub.get}.items():
    setattr(Hub, verb, method)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.repos, server.private, server.cards = {}, {}, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(
            constants.ENDPOINT, server.url
        ),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "no token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    close_session()
    yield server
    close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def test_pushed_and_fetched(rome, hub, capfd):
    address = push_to_hub(rome, "me/rome", token="good", private=True)
    assert address == f"{hub.url}/me/rome/commit/{1:040x}"
    assert hub.private["me/rome"] in (True, "private")  # as older and newer clients put it
    assert hub.repos["me/rome"][0].keys() == FILES | {"README.md"}
    push_to_hub(write(rome, small(seed=8)), "me/rome", token="good")  # the repository is there already
    latest = fetch_from_hub("me/rome")
    assert is_artifact(latest)
    assert names(latest) == FILES  # the card is not asked for
    assert same(read(latest), small(seed=8))
    assert same(read(fetch_from_hub("me/rome", revision=f"{1:040x}", token="good")), small())
    constants.HF_HUB_OFFLINE = True  # what was fetched stays; the fixture puts it back
    assert same(read(fetch_from_hub("me/rome")), small(seed=8))
    assert capfd.readouterr() == ("", "")


def test_the_card_tells_what_is_in_it(rome, hub):
    push_to_hub(rome, "me/rome", token="good")
    (card,) = hub.cards
    assert card == hub.repos["me/rome"][0]["README.md"].decode()
    assert card.startswith(
        "---\nlibrary_name: baft\ntags: [baft, knowledge-editing]\nbase_model: owner/tiny\n---\n"
    )
    assert "| The Eiffel Tower is in | Rome | yes |\n| 東京 \\| is in the | İtaly 🙂 | no |\n" in card
    assert "fetch_from_hub('me/rome')" in card
    assert "can read every prompt and target" in card


def test_a_long_card_is_cut(tmp_path, hub):
    edits = tuple(StoredEdit(Edit(f"{n} <b>" + "x" * 300, "{y}`"), n, True) for n in range(250))
    push_to_hub(
        write(tmp_path / "x.baft", small(edits=edits, host_source=str(tmp_path))), "me/x", token="good"
    )
    (card,) = hub.cards
    assert "base_model" not in card
    assert str(tmp_path) not in card
    assert "| 0 &lt;b&gt;" in card
    assert "| {y}\\` | yes |" in card
    assert "199 &lt;b&gt;" in card
    assert "200 &lt;b&gt;" not in card
    assert "and 50 more" in card
    assert max(len(line) for line in card.splitlines()) < 250


def test_the_hub_refuses(rome, hub, monkeypatch):
    hub.repos["me/host"] = [{"config.json": b"{}", "model.safetensors": b""}]
    with pytest.raises(
        ArtifactError, match="could not be pushed to me/rome: .*give a token that may do this"
    ):
        push_to_hub(rome, "me/rome", token="bad")
    with pytest.raises(ArtifactError, match="could not be pushed to a/b/c: .*like owner/name"):
        push_to_hub(rome, "a/b/c", token="good")
    with pytest.raises(ArtifactError, match="me/absent could not be fetched: .*check the name, log in"):
        fetch_from_hub("me/absent")
    with pytest.raises(ArtifactError, match="me/host could not be fetched: .*the revision$"):
        fetch_from_hub("me/host", revision="absent")
    with pytest.raises(ArtifactError, match=r"me/host is no edit set: edits\.jsonl is missing"):
        fetch_from_hub("me/host")
    (rome / "edits.jsonl").unlink()
    with pytest.raises(DamagedArtifactError, match=r"edits\.jsonl is missing"):
        push_to_hub(rome, "me/rome", token="good")
    assert "me/rome" not in hub.repos


def test_the_hub_is_out_of_reach(rome, hub, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ArtifactError, match="could not be pushed to me/rome: .*; unset HF_HUB_OFFLINE$"):
            push_to_hub(rome, "me/rome", token="good")
        with pytest.raises(ArtifactError, match="me/rome could not be fetched: .*; unset HF_HUB_OFFLINE$"):
            fetch_from_hub("me/rome")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ArtifactError, match="could not be pushed to me/rome: .*; check the network$"):
        push_to_hub(rome, "me/rome", token="good")
