"""A tiny host that all tests of methods share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from baft.hosts.models import Host
from tiny import CHATML, tiny_host, tiny_tokenizer


@pytest.fixture(autouse=True, scope="package")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Background states are kept here, not in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAFT_CACHE", str(folder))
        patch.setattr("baft.hosts.background._WORTH_KEEPING_S", 0.0)
        yield folder


@pytest.fixture(scope="package")
def host() -> Host:
    """Float64, with a chat template; its context holds every background text."""
    model = tiny_host("llama", max_position_embeddings=512)
    return Host("tiny", model, tiny_tokenizer(chat_template=CHATML), "a tiny random Llama")
