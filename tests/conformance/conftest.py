"""The host that most tests here edit, on one thread, where tiny hosts are quickest."""

from collections.abc import Iterator

import pytest
import torch

from baft.hosts.edited_model import EditedModel
from tiny import shared_host, some_interventions


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def host():
    return shared_host("llama")


@pytest.fixture
def edited(host):
    return EditedModel(host, some_interventions(host))
