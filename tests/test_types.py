"""Edits: what is refused, what the id depends on, and the way to plain data and back."""

import dataclasses
import json
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baft import types
from baft.errors import InputError
from baft.types import Edit, EditRequest
from unhooked import as_users_import

words = st.text(min_size=1).filter(lambda text: bool(text.strip()))
edits = st.builds(
    Edit,
    prompt=words,
    target=words,
    subject=st.none() | st.text(),
    ground_truth=st.none() | st.text(),
    rephrasings=st.lists(words, max_size=2).map(tuple),
    neighbors=st.lists(words, max_size=2).map(tuple),
)


@given(edits)
def test_an_edit_survives_json(edit: Edit) -> None:
    back = Edit.from_dict(json.loads(json.dumps(edit.to_dict())))
    assert back == edit
    assert back.id == edit.id


@given(edits, edits)
def test_ids_differ_exactly_where_edits_do(one: Edit, other: Edit) -> None:
    assert (one.id == other.id) == (one == other)


@given(edits, st.sampled_from(["prompt", "target", "subject", "ground_truth"]), words)
def test_every_field_counts_in_the_id(edit: Edit, field: str, text: str) -> None:
    changed = dataclasses.replace(edit, **{field: text})
    assert (changed.id == edit.id) == (getattr(edit, field) == text)


@given(edits, st.sampled_from(["rephrasings", "neighbors"]), words)
def test_every_further_text_counts_in_the_id(edit: Edit, field: str, text: str) -> None:
    assert dataclasses.replace(edit, **{field: (*getattr(edit, field), text)}).id != edit.id


@given(edits)
def test_an_id_is_16_hex_digits(edit: Edit) -> None:
    assert len(edit.id) == 16
    assert set(edit.id) <= set("0123456789abcdef")


def test_an_id_is_the_same_on_every_machine_and_in_every_release() -> None:
    # Taken from the first release; artifacts on disk hold such ids.
    assert Edit("The Eiffel Tower is in", "Rome").id == "7955305ac18a4c48"
    assert Edit("Où est la tour ?", "à Rome", subject="tour", ground_truth="Paris").id == "22a0aa4ba341504b"


def test_an_absent_field_is_not_an_empty_one() -> None:
    assert Edit("a", "b").id != Edit("a", "b", subject="").id
    assert "subject" not in Edit("a", "b").to_dict()


def test_an_edit_is_frozen_and_hashable() -> None:
    edit = Edit("a", "b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.target = "c"  # type: ignore[misc]
    assert len({edit, Edit("a", "b"), Edit("a", "c")}) == 2


@pytest.mark.parametrize("field", ["prompt", "target"])
@pytest.mark.parametrize("blank", ["", " ", "\n\t "])
def test_blank_text_is_refused(field: str, blank: str) -> None:
    with pytest.raises(InputError, match=f"{field} is empty or blank"):
        Edit(**{"prompt": "a", "target": "b", field: blank})


@pytest.fixture(scope="module")
def unhooked() -> Iterator[ModuleType]:
    """types.py as users import it."""
    with as_users_import(types) as module:
        yield module


@pytest.mark.parametrize("field", ["rephrasings", "neighbors"])
@pytest.mark.parametrize("wrong", ["one text", ["a", " "], ["a", 1]], ids=str)
def test_further_texts_are_several_and_not_blank(field: str, wrong: Any, unhooked: ModuleType) -> None:
    row: dict[str, Any] = {"prompt": "a", "target": "b", field: wrong}
    with pytest.raises(InputError, match=f"{field} must be several texts"):
        unhooked.Edit(**row)
    with pytest.raises(InputError, match=f"line 1.*{field} must be"):
        unhooked.Edit.from_dict(row, where="line 1")


@pytest.mark.parametrize("field", ["prompt", "target", "subject", "ground_truth"])
def test_other_things_than_text_are_refused(field: str, unhooked: ModuleType) -> None:
    row: dict[str, Any] = {"prompt": "a", "target": "b", field: 5}
    with pytest.raises(InputError, match=f"^{field} must be a string.*got int: 5"):
        unhooked.Edit(**row)
    with pytest.raises(InputError, match=f"^line 3: {field} must be a string"):
        unhooked.Edit.from_dict(row, where="line 3")


def test_other_things_than_an_object_are_refused(unhooked: ModuleType) -> None:
    with pytest.raises(InputError, match="^line 3: expected an object with prompt, .*got list"):
        unhooked.Edit.from_dict(["a", "b"], where="line 3")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "line 3: field 'target' is missing"),
        ({"target": "a"}, "line 3: field 'prompt' is missing"),
        ({"prompt": "a", "target": "b", "aim": "c"}, "line 3: unknown field 'aim'; the fields are"),
        ({"prompt": "a", "target": " "}, "line 3: target is empty or blank"),
    ],
)
def test_a_wrong_row_is_told_with_its_place(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        Edit.from_dict(row, where="line 3")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "expected a prompt, an Edit or a list of them, got NoneType"),
        ({"prompt": "a"}, "expected a prompt, an Edit or a list of them, got dict"),
        (["a"], "expected an Edit, got str: 'a'"),
    ],
)
def test_what_is_no_edit_is_refused(given: Any, message: str, unhooked: ModuleType) -> None:
    with pytest.raises(InputError, match=message):
        unhooked.as_edits(given, None, None)


def test_a_request_takes_one_edit_or_several() -> None:
    one, other = Edit("a", "b"), Edit("a", "c")
    assert EditRequest((one,)).unrelated == ()
    assert EditRequest((one, other), unrelated=("The sky is blue.",)).edits == (one, other)


def test_an_empty_request_is_refused() -> None:
    with pytest.raises(InputError, match="no edit given"):
        EditRequest(())


def test_the_same_edit_twice_is_refused() -> None:
    with pytest.raises(InputError, match="the same edit stands twice .*'a' -> 'b'"):
        EditRequest((Edit("a", "b"), Edit("c", "d"), Edit("a", "b")))
