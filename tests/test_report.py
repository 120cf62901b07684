"""Reports as text and as plain data."""

import dataclasses
import json

import pytest

from baft.report import EditReport, EditRow, clip, table

ROW = EditRow("0f", "The tower is in", "Rome", "Paris and\nmore", " Rome", True, 1.25, 0.875)
FAILED = dataclasses.replace(ROW, edit_id="1e", prompt="x" * 60, after="Berlin", decoded=False, margin=-2.0)
REPORT = EditReport("baft", "default", (ROW,), 7, "margin", 0.0123, 1.26, 12, 11, 12, ())


def test_a_report_is_a_table():
    assert str(REPORT).splitlines() == [
        "prompt           before          after  gate  margin",
        "───────────────  ──────────────  ─────  ────  ──────  ──",
        "The tower is in  Paris and more  Rome   0.88  1.2     ok",
        "",
        "1 edit by baft/default: 7 steps, loss 0.012, stopped at margin, 1.3 s",
        "of 12 unrelated prompts 11 are bit for bit the host's, 12 have its next token",
    ]


def test_a_failed_edit_cannot_be_overlooked():
    report = dataclasses.replace(REPORT, rows=(ROW, FAILED), broken=("Who?", "Where?"))
    text = str(report)
    assert (REPORT.succeeded, report.succeeded) == (True, False)
    assert "2 edits by" in text
    assert text.count("FAILED") == 2
    assert f"FAILED: {'x' * 60!r} does not yield 'Rome'" in text  # in full below the table
    assert text.endswith("earlier edits no longer decoded: 'Who?', 'Where?'")
    assert "x" * 46 not in text.splitlines()[3]
    assert "FAILED" not in str(REPORT)  # control


def test_a_report_is_plain_data():
    report = dataclasses.replace(REPORT, rows=(ROW, FAILED), broken=("Who?",))
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["succeeded"] is False
    assert plain["rows"][1] == dataclasses.asdict(FAILED)
    assert plain["broken"] == ["Who?"]
    assert set(plain) == {field.name for field in dataclasses.fields(EditReport)} | {"succeeded"}


@pytest.mark.parametrize(
    ("text", "clipped"), [("a  b\n c\t", "a b c"), ("x" * 8, "x" * 8), ("x" * 9, "x" * 7 + "…"), ("", "")]
)
def test_clip(text, clipped):
    assert clip(text, 8) == clipped


def test_columns_are_as_wide_as_their_widest_cell():
    lines = table(("a", "long"), [("xyz", "1"), ("", "22")]).splitlines()
    assert lines == ["a    long", "───  ────", "xyz  1", "     22"]
