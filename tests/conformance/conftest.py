"""The host that most tests here edit."""

import pytest

from baft.hosts.edited_model import EditedModel
from tiny import shared_host, some_interventions


@pytest.fixture
def host():
    return shared_host("llama")


@pytest.fixture
def edited(host):
    return EditedModel(host, some_interventions(host))
