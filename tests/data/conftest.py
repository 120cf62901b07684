"""Small handwritten files in the layout of the public ones."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from baft.data.base import Benchmark, benchmarks

Put = Callable[[str, object], Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes plain data, or a text as it is, to a file under the data folder; returns the folder."""

    def write(name: str, content: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tmp_path

    return write


@pytest.fixture(scope="session")
def real(data_dir: Path) -> Callable[[str], Benchmark]:
    """A benchmark of the public files by its name, read once for all tests."""
    return functools.cache(lambda name: benchmarks.get(name)(data_dir))
