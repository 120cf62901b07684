"""What the files around the code promise."""

import re
import tomllib
from pathlib import Path

import pytest

import baft

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def lock() -> str:
    return (ROOT / "lock.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, dict[str, object]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_the_lock_names_no_cuda_package_and_no_place_to_fetch_from(lock: str) -> None:
    assert not re.search(r"nvidia|cuda|triton", lock, re.IGNORECASE)
    assert not re.search(r"://|^-|@ ", lock, re.MULTILINE)
    assert re.search(r"^torch==2\.13\.0$", lock, re.MULTILINE)


def test_the_lock_says_how_it_is_made(lock: str) -> None:
    header = "".join(line for line in lock.splitlines() if line.startswith("#"))
    assert "make lock" in header
    assert re.search(r"^lock:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_lock_pins_everything_that_is_asked_for(
    lock: str, pyproject: dict[str, dict[str, object]]
) -> None:
    pinned = {name_of(line) for line in lock.splitlines() if re.match(r"[\w.-]+==", line)}
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    asked = [project["dependencies"], *extras.values()]
    assert {name_of(one) for several in asked for one in several} <= pinned


def test_the_version_is_told_once(pyproject: dict[str, dict[str, object]]) -> None:
    assert baft.__version__ == pyproject["project"]["version"]
