"""Second moments of a module's inputs: that they are what they say, and that the cache changes nothing."""

import logging

import pytest
import torch

from baft.errors import ConfigError, UnsupportedHostError
from baft.hosts import moments as module
from baft.hosts.architecture import find_architecture
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.hosts.moments import Corpus, corpus, regularized, second_moments, texts_from
from baft.hosts.patches import down_projection
from tiny import tiny_host, tiny_tokenizer

TEXT = Corpus(
    "some", ("A river runs far from here.", "Bread.", "The tower is in the city of Rome, they say.")
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_WORTH_KEEPING_S", 0.0)
    monkeypatch.delenv("BAFT_DATA", raising=False)
    return tmp_path / "cache" / "moments"


@pytest.fixture(scope="module")
def host():
    return Host("tiny", tiny_host("llama"), tiny_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def encoder(host):
    return Encoder.for_host(host, max_tokens=64)


def inputs_of(host, name, ids):
    """What goes into a module, by a hook of our own."""
    caught = []
    handle = host.model.get_submodule(name).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        with torch.no_grad():
            host.model(torch.tensor([ids]))
    finally:
        handle.remove()
    return caught[0][0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_they_are_the_mean_over_all_tokens(family, monkeypatch):
    host = Host("tiny", tiny_host(family), tiny_tokenizer(), "tiny")
    encoder = Encoder.for_host(host, max_tokens=64)
    monkeypatch.setattr(module, "_ROWS", 2)  # so that there are batches, and padding
    names = [down_projection(host.model, layer) for layer in (0, 2)]
    found = second_moments(host, encoder, names, TEXT, 10_000)
    for name in names:
        keys = torch.cat([inputs_of(host, name, encoder.prompt(piece)) for piece in TEXT.pieces])
        direct = keys.T @ keys / len(keys)
        torch.testing.assert_close(found[name], direct, atol=1e-12, rtol=1e-9)
        centered = (keys - keys.mean(0)).T @ (keys - keys.mean(0)) / len(keys)
        assert not torch.allclose(found[name], centered, atol=1e-3)  # control


def test_the_host_is_run_no_further_than_the_last_module(host, encoder):
    ran = []
    blocks = find_architecture(host.model).blocks
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)
    ]
    try:
        names = [down_projection(host.model, layer) for layer in (1, 0)]  # whichever is named first
        found = second_moments(host, encoder, names, TEXT, 10_000)
    finally:
        for handle in handles:
            handle.remove()
    assert len(blocks) > 2
    assert set(ran) == {0, 1}
    assert set(found) == set(names)
    assert not host.model.get_submodule(names[0])._forward_hooks


def test_no_more_is_read_than_asked_for(host, encoder):
    name = down_projection(host.model, 1)
    few = second_moments(host, encoder, [name], TEXT, 7)[name]
    ids = encoder.prompt(TEXT.pieces[0])[:7]
    keys = inputs_of(host, name, ids)
    torch.testing.assert_close(few, keys.T @ keys / 7, atol=1e-12, rtol=1e-9)


def test_long_pieces_are_read_in_windows(host, encoder, monkeypatch):
    monkeypatch.setattr(module, "_WINDOW_TOKENS", 5)
    name = down_projection(host.model, 1)
    found = second_moments(host, encoder, [name], Corpus("one", TEXT.pieces[:1]), 10)[name]
    ids = encoder.prompt(TEXT.pieces[0])
    keys = torch.cat([inputs_of(host, name, ids[:5]), inputs_of(host, name, ids[5:10])])
    torch.testing.assert_close(found, keys.T @ keys / 10, atol=1e-12, rtol=1e-9)


def test_the_cache_gives_the_same_bits_and_knows_what_they_depend_on(host, encoder, cache, monkeypatch):
    names = [down_projection(host.model, layer) for layer in (0, 1)]
    made = second_moments(host, encoder, names, TEXT, 100)
    assert len(list(cache.iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(module, "_compute", None)  # from here on they are read
        again = second_moments(host, encoder, names, TEXT, 100)
        assert all(torch.equal(made[name], again[name]) for name in names)
        for text, n in ((Corpus("other", TEXT.pieces[:2]), 100), (TEXT, 101)):
            with pytest.raises(TypeError):
                second_moments(host, encoder, names, text, n)
    for path in cache.iterdir():
        path.write_bytes(b"damaged")
    again = second_moments(host, encoder, names, TEXT, 100)
    assert all(torch.equal(made[name], again[name]) for name in names)


def test_regularized_moments_can_be_inverted(host, encoder):
    name = down_projection(host.model, 0)
    few = second_moments(host, encoder, [name], TEXT, 7)[name]
    assert int(torch.linalg.matrix_rank(few)) == 7 < len(few)  # control
    mended = regularized(few, 1e-3)
    assert int(torch.linalg.matrix_rank(mended)) == len(few)
    expected = few + 1e-3 * few.trace() / len(few) * torch.eye(len(few), dtype=few.dtype)
    torch.testing.assert_close(mended, expected)


def test_the_text_is_the_named_one_else_the_validation_text_else_our_own(tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, logger="baft.hosts.moments"):
        assert "background" in corpus(None).name
    assert "small" in caplog.text
    data = tmp_path / "data"
    (data / "general").mkdir(parents=True)
    (data / "general/wikitext-2-valid.txt").write_text(" \n = Heading = \n\n Some words . \n")
    (data / "general/wikitext-2-test.txt").write_text("Never read.\n")
    monkeypatch.setenv("BAFT_DATA", str(data))
    assert corpus(None).pieces == ("Some words .",)
    monkeypatch.delenv("BAFT_DATA")
    with texts_from(data):
        assert corpus(None).pieces == ("Some words .",)
    with texts_from(tmp_path):
        assert "background" in corpus(None).name
    (tmp_path / "b.txt").write_text("B one.\n\nB two.\n")
    assert corpus(str(tmp_path / "b.txt")).pieces == ("B one.", "B two.")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "2.txt").write_text("Two.")
    (folder / "1.txt").write_text("One.")
    assert corpus(str(folder)).pieces == ("One.", "Two.")


def test_bad_texts_and_modules_are_refused(tmp_path, host, encoder):
    with pytest.raises(ConfigError, match="cannot be read"):
        corpus(str(tmp_path / "missing.txt"))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ConfigError, match="holds no text"):
        corpus(str(tmp_path / "empty.txt"))
    with pytest.raises(UnsupportedHostError, match="linear module"):
        second_moments(host, encoder, ["model.embed_tokens"], TEXT, 10)
