"""The tree at the top of errors.py is the tree of the classes."""

import inspect

import pytest

from baft import errors
from baft.errors import BaftError, ConfigError, InputError, UnknownNameError


def drawn() -> dict[str, str]:
    """Each class in the docstring's drawing, with the class that it hangs from."""
    parents: dict[str, str] = {}
    branch = ["BaftError"]
    for line in (errors.__doc__ or "").splitlines():
        bar, found, text = line.partition("── ")
        if found:
            depth = len(bar) // 4 + 1
            name = text.split()[0]
            parents[name] = branch[depth - 1]
            branch[depth:] = [name]
    return parents


def real() -> dict[str, str]:
    classes = [one for _, one in inspect.getmembers(errors, inspect.isclass) if one is not BaftError]
    return {one.__name__: one.__bases__[0].__name__ for one in classes}


def test_the_drawn_tree_is_the_real_one() -> None:
    assert drawn() == real()
    assert len(drawn()) > 10, "the drawing was not read"


def test_also_notes_name_the_second_base() -> None:
    for line in (errors.__doc__ or "").splitlines():
        if "(also a " in line:
            name, second = line.partition("── ")[2].split()[0], line.split("(also a ")[1].rstrip(")")
            assert [base.__name__ for base in getattr(errors, name).__bases__][1:] == [second]


@pytest.mark.parametrize("name", sorted(real()))
def test_one_root_and_a_docstring_for_each(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, BaftError)
    assert error.__doc__
    assert str(error("what went wrong")) == "what went wrong"


def test_the_usual_builtins_catch_them() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(UnknownNameError, KeyError)


def test_an_unknown_name_prints_its_message_without_quotes() -> None:
    assert str(UnknownNameError("no 'x' here")) == "no 'x' here"
    assert str(KeyError("no 'x' here")) != "no 'x' here", "the control: a bare KeyError prints a repr"
    assert str(UnknownNameError()) == ""
