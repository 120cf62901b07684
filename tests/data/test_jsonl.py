"""The user's own file: all that it may hold, and every way in which it may be wrong."""

import json
import re
from pathlib import Path

import pytest

from baft.data import cases as phrases
from baft.data.jsonl import Jsonl
from baft.errors import DataError
from baft.types import Edit, Probe

ROW = {"prompt": "Ann plays the", "target": "cello"}


def load(put, *rows: object) -> Jsonl:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return Jsonl(put("own.jsonl", lines) / "own.jsonl")


def test_all_that_a_line_may_hold(put) -> None:
    row = {
        "id": "ann",
        **ROW,
        "subject": "Ann",
        "ground_truth": "oboe",
        "generality": [{"prompt": "What does Ann play?", "tag": "question", "chat": True}],
        "locality": [{"prompt": "Bo plays the"}, {"prompt": "Cy plays the ", "target": "lute"}],
        "portability": [{"prompt": "Her bow is made of", "target": "hair", "aliases": ["horsehair"]}],
    }
    benchmark = load(put, row)
    [case] = benchmark.cases()
    assert case.id == "ann"
    assert case.edit == Edit("Ann plays the", "cello", "Ann", "oboe")
    edit_id = case.edit.id
    assert case.probes == (
        Probe(edit_id, "generality", "What does Ann play?", "cello", "question", chat=True),
        Probe(edit_id, "locality", "Bo plays the", None),
        Probe(edit_id, "locality", "Cy plays the ", "lute"),
        Probe(edit_id, "portability", "Her bow is made of", "hair", aliases=("horsehair",)),
    )
    assert benchmark.anomalies() == {}


def test_a_line_needs_no_more_than_an_edit(put) -> None:
    assert [case.edit for case in load(put, ROW).cases("all")] == [Edit("Ann plays the", "cello")]


def test_ids_count_cases_and_not_lines(put) -> None:
    path = (
        put("own.jsonl", f"\n{json.dumps(ROW)}\r\n\n  \n{json.dumps(ROW | {'target': 'harp'})}") / "own.jsonl"
    )
    assert [case.id for case in Jsonl(path).cases()] == ["jsonl/all/0", "jsonl/all/1"]


def test_a_separator_inside_a_text_ends_no_line(put) -> None:
    [case] = load(put, ROW | {"target": "cello\u2028and\x85more"}).cases()
    assert case.edit.target == "cello\u2028and\x85more"


def test_texts_are_taken_as_they_are(put) -> None:
    benchmark = load(put, ROW | {"prompt": " Ann plays the ", "target": " cello"})
    assert benchmark.cases()[0].edit == Edit(" Ann plays the ", " cello")


def test_what_is_odd_is_counted_here_too(put) -> None:
    rows = [
        ROW,
        ROW | {"id": "again"},
        ROW | {"target": "harp", "ground_truth": "harp"},
        ROW | {"subject": "Bo"},
    ]
    benchmark = load(put, *rows)
    assert [case.id for case in benchmark.cases()] == ["jsonl/all/0", "jsonl/all/2", "jsonl/all/3"]
    assert benchmark.anomalies() == {
        phrases.DUPLICATE: 1,
        phrases.CONFLICT: 1,
        phrases.TARGET_TRUE: 1,
        phrases.NO_SUBJECT: 1,
    }


@pytest.mark.parametrize("rows", [[{"id": "a"}, {"id": "a"}], [{}, {"id": "jsonl/all/0"}]])
def test_no_two_cases_have_one_id(put, rows) -> None:
    targets = ("cello", "harp")
    with pytest.raises(
        DataError, match=r"own\.jsonl, line 2, field 'id': .* already the id of .*line 1; give"
    ):
        load(
            put, *(ROW | row | {"target": target} for row, target in zip(rows, targets, strict=True))
        ).cases()


PROBES = "portability[0], field"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a"}, "field 'target': is missing; the record has prompt"),
        (ROW | {"prompt": 3}, "field 'prompt': expected a text, got int: 3"),
        (ROW | {"target": " "}, "field 'target': expected a text that is not blank, got ' '"),
        (ROW | {"subject": None}, "field 'subject': expected a text, got NoneType"),
        (ROW | {"ground_truth": ["a"]}, "field 'ground_truth': expected a text, got list: ['a']"),
        (ROW | {"id": 7}, "field 'id': expected a text, got int: 7"),
        (ROW | {"id": ""}, "field 'id': expected a text that is not blank, got ''"),
        (ROW | {"aim": "a"}, "field 'aim': is unknown; the fields are id, prompt, target, subject, "),
        (ROW | {"locality": {"prompt": "a"}}, "field 'locality': expected a list of objects, got dict"),
        (ROW | {"locality": ["a"]}, "field 'locality': expected a list of objects, got list: ['a']"),
        (ROW | {"portability": [{"prompt": "a"}]}, f"{PROBES} 'target': is missing"),
        (ROW | {"portability": [{"target": "a"}]}, f"{PROBES} 'prompt': is missing"),
        (ROW | {"portability": [{"prompt": "", "target": "a"}]}, f"{PROBES} 'prompt': expected a text that"),
        (ROW | {"portability": [{"prompt": "a", "target": ""}]}, f"{PROBES} 'target': expected a text that"),
        (
            ROW | {"portability": [{"prompt": "a", "target": "b", "kind": "c"}]},
            f"{PROBES} 'kind': is unknown",
        ),
        (
            ROW | {"portability": [{"prompt": "a", "target": "b", "tag": 1}]},
            f"{PROBES} 'tag': expected a text",
        ),
        (
            ROW | {"portability": [{"prompt": "a", "target": "b", "aliases": "c"}]},
            f"{PROBES} 'aliases': expected a list of texts, got str: 'c'",
        ),
        (
            ROW | {"portability": [{"prompt": "a", "target": "b", "aliases": ["c", ""]}]},
            f"{PROBES} 'aliases': expected texts that are not blank, got ['c', '']",
        ),
        (
            ROW | {"portability": [{"prompt": "a", "target": "b", "chat": 1}]},
            f"{PROBES} 'chat': expected true or false, got int: 1",
        ),
        (
            ROW | {"locality": [{"prompt": "a", "aliases": ["b"]}]},
            "locality[0], field 'aliases': stand beside a target, and there is none",
        ),
        ([ROW], "expected an object, got list"),
    ],
)
def test_what_is_wrong_is_told_with_its_line_and_field(put, row, problem: str) -> None:
    with pytest.raises(DataError, match=r"own\.jsonl, line 2(:|,) " + re.escape(problem)):
        load(put, ROW, row).cases()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a",}', "not valid JSON: "),
        ('{"prompt": "a", "target": "b", "prompt": "c"}', "not valid JSON: key 'prompt' is given twice"),
    ],
)
def test_a_line_that_is_no_json(put, line: str, problem: str) -> None:
    path = put("own.jsonl", f"{json.dumps(ROW)}\n\n{line}\n") / "own.jsonl"
    with pytest.raises(DataError, match=rf"own\.jsonl, line 3: {problem}"):
        Jsonl(path).cases()


def test_the_file_must_be_there_and_hold_something(put, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="jsonl reads a file of yours, and none is given: name it with --data"
    ):
        Jsonl().cases()
    with pytest.raises(
        DataError, match=r"/absent\.jsonl does not exist; name a file of JSON Lines with --data"
    ):
        Jsonl(tmp_path / "absent.jsonl").cases()
    with pytest.raises(DataError, match="is a folder; name a file of JSON Lines with --data"):
        Jsonl(tmp_path).cases()
    with pytest.raises(DataError, match=r"own\.jsonl holds no case"):
        Jsonl(put("own.jsonl", "\n \n") / "own.jsonl").cases()
