"""What is kept of a head comes back, and to its own host alone."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from baft.errors import ArtifactError, DamagedArtifactError, HostMismatchError
from baft.hosts.models import Host
from baft.scope import heads
from baft.scope.heads import cached_at, find_head, read_head, shipped_head, train_head
from baft.scope.training import ScopeConfig
from scope_settings import LITTLE, read_little
from tiny import CHATML, tiny_host, tiny_tokenizer

CONFIG = ScopeConfig(**LITTLE)


def host(seed=0, dtype=torch.float32, **settings):
    model = tiny_host("llama", dtype=dtype, seed=seed, max_position_embeddings=4096)
    return Host("tiny", model, tiny_tokenizer(**settings), "tiny")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BAFT_CACHE", str(tmp_path / "cache"))
    read_little(monkeypatch)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("heads") / "tiny.safetensors"
    return train_head(host(), CONFIG, seed=3, path=path), path


def same(one, other):
    states = [head.net.state_dict() for head in (one, other)]
    return (
        all(torch.equal(values, states[1][name]) for name, values in states[0].items())
        and torch.equal(one.ordinary.vectors, other.ordinary.vectors)
        and (one.ordinary.lengths, one.about) == (other.ordinary.lengths, other.about)
    )


def test_a_head_comes_back_as_it_was(made):
    head, path = made
    assert same(read_head(path, host()), head)
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert load_file(path)["net.projections.0.weight"].dtype == torch.float16
    assert head.about.seed == 3


def test_edits_act_from_one_half_on_and_where_no_ordinary_text_reaches(made):
    head, _ = made
    features = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0))
    keys = head.keys(features, torch.ones(3, 5).bool())
    thresholds = head.thresholds(keys)
    assert (thresholds >= math.log(0.5)).all()
    scores = head.net.midpoints.view(2, 1, 1).expand(2, 4, 3).clone()
    scores[1] += 0.5
    assert (head.log_probability(scores) < math.log(0.5)).all()  # one channel at its midpoint is not enough
    assert torch.equal(head.log_probability(scores), head.net.log_probability(scores))


def test_a_trained_head_is_found_in_the_cache(cache):
    one = host()
    assert find_head(one) is None
    head = train_head(one, CONFIG)
    assert same(find_head(one), head)
    assert cached_at(one).is_relative_to(cache / "scope")
    assert find_head(host(seed=1)) is None


def test_a_head_that_comes_with_baft_goes_first(made, tmp_path, monkeypatch):
    head, path = made
    train_head(host(), CONFIG, seed=5)
    folder = tmp_path / "package" / "shipped"
    folder.mkdir(parents=True)
    monkeypatch.setattr(heads, "files", lambda _: tmp_path / "package")
    assert shipped_head(host()) is None
    assert find_head(host()).about.seed == 5
    shutil.copy(path, folder)
    assert same(find_head(host()), head)
    assert find_head(host(dtype=torch.bfloat16)).about == head.about  # the same weights, rounded
    assert find_head(host(seed=1)) is None


@pytest.mark.parametrize("other", [{"seed": 1}, {"chat_template": CHATML}])
def test_a_head_of_another_host_is_refused(made, other):
    with pytest.raises(HostMismatchError, match="tiny"):
        read_head(made[1], host(**other))


def rewritten(path: Path, to: Path, change):
    with safe_open(path, "pt") as file:
        about = dict(file.metadata())
    tensors = load_file(path)
    change(about, tensors)
    save_file(tensors, to, about)
    return to


DAMAGES = {
    "no scope head: got format 'x'": lambda about, _: about.update(format="x"),
    "cannot be read": lambda about, _: about.update(about="{"),
    "cannot be read: 'host'": lambda about, _: about.update(about="{}"),
    "size mismatch": lambda _, tensors: tensors.update(
        {"net.projections.0.weight": tensors["net.projections.0.weight"][:4].clone()}
    ),
    "Missing key": lambda _, tensors: tensors.pop("net.slopes"),
    "ordinary.vectors has the shape": lambda _, tensors: tensors.update(
        {"ordinary.vectors": tensors["ordinary.vectors"][:, 1:].clone()}
    ),
    "not finite": lambda _, tensors: tensors["net.slopes"].fill_(float("nan")),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_head_is_named(made, tmp_path, message):
    path = rewritten(made[1], tmp_path / "damaged.safetensors", DAMAGES[message])
    with pytest.raises(DamagedArtifactError, match=message) as caught:
        read_head(path, host())
    assert str(path) in str(caught.value)


def test_a_damaged_head_in_the_cache_is_passed_over(cache, caplog):
    path = cached_at(host())
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nothing")
    assert find_head(host()) is None
    assert "passed over" in caplog.text


def test_a_place_that_cannot_be_written_is_named(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot be written to .*file/head.safetensors"):
        heads.write_head(tmp_path / "file" / "head.safetensors", made[0])
