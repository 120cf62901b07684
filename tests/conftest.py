"""What every test stands on: no network, and one thread a worker."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported, so before anything else

from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)
        torch.set_num_interop_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny hosts are quickest on one; a test that sets another number keeps it to its module."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the public benchmark files."""
    named = os.environ.get("BAFT_DATA")
    if not named:
        pytest.skip("BAFT_DATA names no folder of benchmark files")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"BAFT_DATA names {named!r}, which is no folder")
    return folder
