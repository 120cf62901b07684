"""Files that cannot be read are told with their place, and so are fields that are not what they should be."""

from pathlib import Path

import pytest

from baft.data.counterfact import CounterFact
from baft.data.files import Record, find, parse, read_records, read_text
from baft.data.zsre import Zsre
from baft.errors import DataError


def test_the_folder_must_be_named_and_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="benchmark zsre reads .* no folder is given: .*BAFT_DATA or --data"):
        Zsre().cases()
    with pytest.raises(
        DataError, match=r"zsre: the data folder .*/absent does not exist; .*BAFT_DATA or --data"
    ):
        Zsre(tmp_path / "absent").cases()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the data folder .*/file is no folder; .*BAFT_DATA or --data"):
        Zsre(tmp_path / "file").cases()


def test_a_missing_file_is_named_with_what_may_stand_in_for_it(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"benchmark zsre: .*/zsre_inverse_relation\.json is missing; .*--data"
    ):
        Zsre(tmp_path).cases("inverse")
    names = r".*/zsre_mend_train\.json and .*/zsre_mend_train\.1000\.json are missing"
    with pytest.raises(DataError, match=names):
        Zsre(tmp_path).cases("train")


def test_the_original_is_preferred_to_its_stand_in(tmp_path: Path) -> None:
    (tmp_path / "cut").touch()
    assert find(tmp_path, ("whole", "cut"), "x").name == "cut"
    (tmp_path / "whole").touch()
    assert find(tmp_path, ("whole", "cut"), "x").name == "whole"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1},\n {"a" 2}]', "not valid JSON: Expecting ':' delimiter: line 2 column 7"),
        ("", "not valid JSON: Expecting value: line 1 column 1"),
        ('{"a": 1}', "expected a list of records, got dict"),
        ('[{"a": 1}, ["b"]]', r"x\.json, record 1: expected an object, got list: \['b'\]"),
        ('[{"a": 1, "b": 2, "a": 3}]', "not valid JSON: key 'a' is given twice"),
    ],
)
def test_what_is_no_list_of_objects_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=problem) as error:
        read_records(path)
    assert str(path) in str(error.value)


def test_a_file_is_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes("\ufeffÅ".encode())
    assert read_text(path) == "Å"
    path.write_bytes("Å".encode("latin-1"))
    with pytest.raises(DataError, match="/x: not UTF-8 text: .* at byte 0"):
        read_text(path)
    with pytest.raises(DataError, match=r": cannot be read: Is a directory"):
        read_text(tmp_path)


def test_a_nesting_too_deep_is_no_crash() -> None:
    with pytest.raises(DataError, match="x: not valid JSON: maximum recursion"):
        parse("[" * 100_000, "x")


FIELDS = {
    "text": "a",
    "texts": ["a", "b"],
    "record": {"b": 1},
    "records": [{"b": 1}],
    "flag": True,
    "none": None,
}


def test_fields_are_what_they_are() -> None:
    record = Record(FIELDS, "x, record 3")
    assert record.text("text") == "a"
    assert record.texts("texts") == ("a", "b")
    assert list(record.record("record")) == ["b"]
    assert [list(one) for one in record.records("records")] == [["b"]]
    assert record.flag("flag") is True
    assert "text" in record
    assert "other" not in record


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        ("text", "a text"),
        ("texts", "a list of texts"),
        ("record", "an object"),
        ("records", "a list of objects"),
        ("flag", "true or false"),
    ],
)
def test_every_other_field_is_refused(ask: str, expected: str) -> None:
    record = Record(FIELDS, "x, record 3")
    for name in FIELDS:
        if name != ask:
            with pytest.raises(DataError, match=f"^x, record 3, field '{name}': expected {expected}, got "):
                getattr(record, ask)(name)
    with pytest.raises(
        DataError, match="^x, record 3, field 'other': is missing; the record has text, texts, "
    ):
        getattr(record, ask)("other")


def test_the_place_of_a_nested_field_is_told() -> None:
    record = Record({"a": {"b": [{}, {"c": 1}]}}, "x, record 3")
    with pytest.raises(DataError, match=r"^x, record 3, a, b\[1\], field 'c': expected a text, got int: 1$"):
        record.record("a").records("b")[1].text("c")


@pytest.mark.parametrize(
    ("plain", "answers"),
    [
        ("a", ("a",)),
        ("", ("",)),
        ([], ()),
        (["a", "b"], ("a", "b")),
        ([["a", "b"], ["c"]], ("a", "b", "c")),
        ([[]], ("",)),
        ([[], ["c", "d"]], ("", "c", "d")),
        ([["c"], []], ("c", "")),
    ],
)
def test_answers_come_in_three_forms(plain: object, answers: tuple[str, ...]) -> None:
    assert Record({"x": plain}, "").answers("x") == answers


@pytest.mark.parametrize("plain", [None, 3, [3], [["a", None]], [[["a"]]], {"a": "b"}])
def test_other_forms_of_answers_are_refused(plain: object) -> None:
    with pytest.raises(
        DataError, match="field 'x': expected a text, a list of texts or a list of lists of texts"
    ):
        Record({"x": plain}, "").answers("x")


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(DataError, match="…$") as error:
        Record({"x": ["a"] * 500}, "").text("x")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(("reader", "split"), [(Zsre, "test"), (CounterFact, "portability")])
def test_a_record_without_its_fields_is_told_by_index(tmp_path: Path, reader: type, split: str) -> None:
    [path] = [tmp_path / file.path for file in reader.files if file.split == split]
    path.parent.mkdir(parents=True)
    path.write_text("[{}]")
    with pytest.raises(DataError, match=r"\.json, record 0, field '\w+': is missing; the record has none$"):
        reader(tmp_path).cases()
