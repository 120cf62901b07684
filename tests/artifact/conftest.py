import pytest

from edit_sets import small, written


@pytest.fixture
def rome(tmp_path):
    return written(tmp_path / "rome.baft", small())
