"""What a run leaves behind, whatever it was cut off by."""

import json
import random

import pytest

from baft.errors import ConfigError, DataError
from baft.evals import records
from baft.evals.records import MANIFEST, ROWS, Record, read_manifest, read_rows, sole_writer

MANIFEST_A = {"experiment": {"seed": 0}, "host": "a", "created": "today", "machine": {"cores": 2}}


def block(task, method, n=1):
    return [{"task": task, "method": method, "i": i, "text": "naïve\n東京\u2028"} for i in range(n)]


def test_rows_come_back_as_they_were(tmp_path):
    record = Record(tmp_path / "run", MANIFEST_A)
    record.append(block("t0", "baft", 2))
    record.append(block("t0", "reft"))
    assert record.done == {("t0", "baft"), ("t0", "reft")}
    rows = read_rows(tmp_path / "run")
    assert [(row["task"], row["method"], row["i"], row["of"]) for row in rows] == [
        ("t0", "baft", 0, 2),
        ("t0", "baft", 1, 2),
        ("t0", "reft", 0, 1),
    ]
    assert rows[0]["text"] == "naïve\n東京\u2028"
    assert read_manifest(tmp_path / "run") == MANIFEST_A
    assert Record(tmp_path / "run", MANIFEST_A).done == record.done


def test_cut_at_any_byte_only_whole_blocks_are_left_and_nothing_is_lost_for_good(tmp_path):
    plan = [block("t0", "a", 2), block("t0", "b"), block("t1", "a", 3)]
    whole, ends = Record(tmp_path / "whole", MANIFEST_A), [0]
    for rows in plan:
        whole.append(rows)
        ends.append((tmp_path / "whole" / ROWS).stat().st_size)
    text = (tmp_path / "whole" / ROWS).read_bytes()
    anywhere = random.Random(0).sample(range(len(text)), 60)
    for cut in sorted({*anywhere, *ends, *(end - 1 for end in ends[1:])}):
        folder = tmp_path / f"cut{cut}"
        Record(folder, MANIFEST_A)
        (folder / ROWS).write_bytes(text[:cut])
        record = Record(folder, MANIFEST_A)
        assert len(record.done) == sum(end <= cut for end in ends[1:]), cut
        for rows in plan:
            if (rows[0]["task"], rows[0]["method"]) not in record.done:
                record.append(rows)
        assert (folder / ROWS).read_bytes() == text


def test_a_record_of_something_else_is_never_reused(tmp_path):
    Record(tmp_path, MANIFEST_A).append(block("t", "a"))
    before = (tmp_path / ROWS).read_bytes()
    with pytest.raises(ConfigError, match=r'another configuration: host was "a" and is "b". Choose another'):
        Record(tmp_path, {**MANIFEST_A, "host": "b"})
    with pytest.raises(ConfigError, match="git was null"):
        Record(tmp_path, {**MANIFEST_A, "git": "c0ffee"})
    assert Record(tmp_path, {**MANIFEST_A, "created": "later", "machine": {}}).done == {("t", "a")}
    assert (tmp_path / ROWS).read_bytes() == before
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(ConfigError, match=f"holds {ROWS} without {MANIFEST}"):
        Record(tmp_path, MANIFEST_A)


@pytest.mark.parametrize("damage", ["no json", '{"task": "t"}', "[1]", "3"])
def test_a_damaged_row_in_the_middle_is_an_error_and_stays(tmp_path, damage):
    record = Record(tmp_path, MANIFEST_A)
    record.append(block("t0", "a"))
    good = (tmp_path / ROWS).read_text()
    (tmp_path / ROWS).write_text(f"{damage}\n{good}")
    with pytest.raises(DataError, match=f"{ROWS}, line 1: not a row"):
        Record(tmp_path, MANIFEST_A)
    assert (tmp_path / ROWS).read_text() == f"{damage}\n{good}"


def test_a_full_disk_leaves_what_is_there(tmp_path, monkeypatch):
    record = Record(tmp_path, MANIFEST_A)
    record.append(block("t0", "a"))
    before = (tmp_path / ROWS).read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device. What was written before is whole"):
        record.append(block("t1", "a", 3))
    assert (tmp_path / ROWS).read_bytes() == before
    assert record.done == {("t0", "a")}
    with pytest.raises(DataError, match="No space left"):
        record.sort([("t0", "a")])
    assert (tmp_path / ROWS).read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted([MANIFEST, ROWS])
    with pytest.raises(DataError, match="No space left"):
        Record(tmp_path / "new", MANIFEST_A)
    assert list((tmp_path / "new").iterdir()) == []


def test_blocks_are_put_in_the_order_of_the_plan(tmp_path):
    record = Record(tmp_path, MANIFEST_A)
    for task in ("t2", "t0", "t1"):
        record.append(block(task, "a", 2))
    record.sort([(task, "a") for task in ("t0", "t1", "t2")])
    assert [(row["task"], row["i"]) for row in read_rows(tmp_path)] == [
        (task, i) for task in ("t0", "t1", "t2") for i in (0, 1)
    ]


def test_a_record_has_one_writer_at_a_time(tmp_path):
    folder = tmp_path / "runs" / "x"
    with sole_writer(folder):
        with (
            pytest.raises(
                ConfigError, match=r"another process is writing .*x: wait for it, or choose another"
            ),
            sole_writer(folder),
        ):
            pytest.fail("two at once")
        with sole_writer(tmp_path / "runs" / "y"):  # control: of another record
            pass
    with sole_writer(folder):  # and afterwards
        Record(folder, MANIFEST_A).append(block("t", "a"))
    assert len(read_rows(folder)) == 1


def test_what_is_no_record(tmp_path):
    with pytest.raises(ConfigError, match=f"is no record of a run: it has no {MANIFEST}"):
        read_manifest(tmp_path)
    assert read_rows(tmp_path) == []
    (tmp_path / MANIFEST).write_text(json.dumps(MANIFEST_A))
    assert read_manifest(tmp_path)["host"] == "a"
