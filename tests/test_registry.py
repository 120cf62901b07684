"""Names, lazy targets, suggestions, and what other packages register."""

import doctest
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from baft import registry as registry_module
from baft.errors import ConfigError, UnknownNameError
from baft.registry import Registry


class Shape:
    pass


class Square(Shape):
    pass


SQUARE = Square()
HERE = __name__


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that nobody has imported yet."""
    (tmp_path / "a_lazy_shape.py").write_text("class Circle:\n    class Inner:\n        pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "a_lazy_shape"
    sys.modules.pop("a_lazy_shape", None)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Pretends that packages with these entry points were installed; returns the groups asked for."""

    def install(*entries: tuple[str, str]) -> list[str]:
        asked: list[str] = []

        def entry_points(*, group: str) -> list[EntryPoint]:
            asked.append(group)
            return [EntryPoint(name, target, group) for name, target in entries]

        monkeypatch.setattr(registry_module, "entry_points", entry_points)
        return asked

    return install


def test_registering_imports_nothing_and_getting_does(module: str) -> None:
    shapes = Registry[type]("shape")
    shapes.add("circle", f"{module}:Circle")
    assert shapes.names() == ["circle"]
    assert module not in sys.modules
    assert shapes.get("circle").__name__ == "Circle"
    assert module in sys.modules


def test_the_same_object_each_time(module: str) -> None:
    shapes = Registry[type]("shape")
    shapes.add("inner", f"{module}:Circle.Inner")
    first = shapes.get("inner")
    del sys.modules[module]
    assert shapes.get("inner") is first


def test_names_are_sorted() -> None:
    shapes = Registry[type]("shape")
    for name in ("square", "circle", "line-2"):
        shapes.add(name, f"{HERE}:Square")
    assert shapes.names() == ["circle", "line-2", "square"]


@pytest.mark.parametrize("name", ["", "Square", "two words", "-square", "square-", "a--b", "é"])
def test_malformed_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="shape name .* is malformed: use lower-case"):
        Registry[type]("shape").add(name, f"{HERE}:Square")


@pytest.mark.parametrize("target", ["", "module", "module:", ":attribute", "a b:c", "a..b:c", "a:b:c"])
def test_malformed_targets_are_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="expected a target 'module:attribute'"):
        Registry[type]("shape").add("square", target)


def test_a_name_is_given_once() -> None:
    shapes = Registry[type]("shape")
    shapes.add("square", f"{HERE}:Square")
    with pytest.raises(ConfigError, match="'square' is already registered as"):
        shapes.add("square", f"{HERE}:Shape")
    assert shapes.get("square") is Square


def test_an_unknown_name_suggests_the_nearest() -> None:
    shapes = Registry[type]("shape")
    shapes.add("square", f"{HERE}:Square")
    shapes.add("circle", f"{HERE}:Square")
    with pytest.raises(UnknownNameError) as caught:
        shapes.get("Squar")
    assert str(caught.value) == (
        "unknown shape 'Squar'; did you mean 'square'? The shapes are: circle, square"
    )


def test_an_unknown_name_like_none_of_them_gets_the_list() -> None:
    shapes = Registry[type]("shape")
    with pytest.raises(UnknownNameError, match="unknown shape 'zzz'; the shapes are: none yet"):
        shapes.get("zzz")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module_anywhere:x", "No module named"),
        (f"{HERE}:NoSuchThing", "has no attribute 'NoSuchThing'"),
    ],
)
def test_a_target_that_cannot_be_loaded_is_told(target: str, reason: str) -> None:
    shapes = Registry[type]("shape")
    shapes.add("square", target)
    with pytest.raises(ConfigError, match=f"shape 'square' cannot be loaded from '{target}': .*{reason}"):
        shapes.get("square")


def test_the_base_admits_subclasses_and_instances() -> None:
    shapes = Registry[object]("shape", base=Shape)
    shapes.add("class", f"{HERE}:Square")
    shapes.add("object", f"{HERE}:SQUARE")
    assert shapes.get("class") is Square
    assert shapes.get("object") is SQUARE


@pytest.mark.parametrize("attribute", ["HERE", "Path"])
def test_the_base_refuses_the_rest(attribute: str) -> None:
    shapes = Registry[object]("shape", base=Shape)
    shapes.add("odd", f"{HERE}:{attribute}")
    with pytest.raises(ConfigError, match=f"'{HERE}:{attribute}' is no Shape, got "):
        shapes.get("odd")
    anything = Registry[object]("shape")
    anything.add("odd", f"{HERE}:{attribute}")
    anything.get("odd")  # the control: without a base it is let in


def test_other_packages_register_by_entry_points(installed: Callable[..., list[str]]) -> None:
    asked = installed(("theirs", f"{HERE}:Square"))
    shapes = Registry[object]("shape", base=Shape, group="test.shapes")
    shapes.add("ours", f"{HERE}:Shape")
    assert shapes.get("ours") is Shape
    assert asked == [], "nobody is asked about a name that is known"
    assert shapes.get("theirs") is Square
    assert shapes.names() == ["ours", "theirs"]
    assert asked == ["test.shapes"], "asked once"


def test_without_a_group_nobody_is_asked(installed: Callable[..., list[str]]) -> None:
    asked = installed(("theirs", f"{HERE}:Square"))
    assert Registry[object]("shape").names() == []
    assert asked == []


def test_an_entry_point_cannot_take_a_name_that_is_taken(installed: Callable[..., list[str]]) -> None:
    installed(("ours", f"{HERE}:Square"))
    shapes = Registry[object]("shape", group="test.shapes")
    shapes.add("ours", f"{HERE}:Shape")
    message = "entry point of package 'unknown' in 'test.shapes': shape 'ours' is already registered"
    for _ in range(2):
        with pytest.raises(ConfigError, match=message):
            shapes.names()


def test_one_package_found_twice_is_one(installed: Callable[..., list[str]]) -> None:
    installed(("theirs", f"{HERE}:Square"), ("theirs", f"{HERE} : Square"))
    assert Registry[object]("shape", group="test.shapes").names() == ["theirs"]


def test_a_group_that_nobody_uses_is_empty() -> None:
    assert Registry[object]("shape", group="test.a_group_nobody_uses").names() == []


def test_the_example_in_the_docstring_runs() -> None:
    result = doctest.testmod(registry_module)
    assert result.failed == 0
    assert result.attempted > 0
