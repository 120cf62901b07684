"""Small hosts with room for a chat."""

import functools

import pytest

from baft.hosts.models import Host
from tiny import CHATML, tiny_host, tiny_tokenizer


@functools.cache
def _model(family):
    room = {"n_positions": 160} if family == "gpt2" else {"max_position_embeddings": 160}
    return tiny_host(family, **room)


@pytest.fixture(scope="session")
def host_of():
    def make(family="llama", *, side="right", chat=True):
        tokenizer = tiny_tokenizer(chat_template=CHATML if chat else None, side=side)
        return Host(family, _model(family), tokenizer, family)

    return make


@pytest.fixture(scope="session")
def host(host_of):
    return host_of()
