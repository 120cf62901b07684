import pytest

from baft.artifact import write
from edit_sets import small


@pytest.fixture
def rome(tmp_path):
    return write(tmp_path / "rome.baft", small())
