"""`baft scope train`, on a tiny random host and with next to no text."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import tiny
from baft.cli.app import app
from baft.hosts.models import load_host
from baft.scope import heads
from baft.scope.training import ScopeConfig
from scope_settings import LITTLE, read_little


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host")
    tiny.tiny_host("llama", dtype=torch.float32, max_position_embeddings=4096).save_pretrained(folder)
    tiny.tiny_tokenizer(chat_template=tiny.CHATML).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAFT_CACHE", str(tmp_path / "cache"))
    read_little(monkeypatch)
    monkeypatch.setattr(heads, "ScopeConfig", functools.partial(ScopeConfig, **LITTLE))


def train(*arguments: object, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["scope", "train", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def test_every_option_is_explained() -> None:
    group: Any = typer.main.get_command(app)
    [command] = group.commands["scope"].commands.values()
    assert command.help
    assert all(parameter.help for parameter in command.params)
    help_ = CliRunner().invoke(app, ["scope", "train", "--help"]).stdout
    assert max(map(len, help_.splitlines())) <= 80


def test_a_head_is_trained_once_and_said_to_be_there(host: Path) -> None:
    data = json.loads(train(host, "--json").stdout)
    kept = heads.find_head(load_host(host))
    assert kept is not None
    assert (data["trained_now"], data["seed"], data["settings"]["n_dims"]) == (True, 0, 8)
    assert data["calibration"]["named_bound"] == kept.about.calibration.named_bound
    again = train(host).stdout
    assert f"has a scope head: {data['file']}" in again
    found = kept.about.calibration
    assert f"{found.n_fired} of {found.n_asked} questions about something else fired one" in again
    assert f"at most 1/{data['n_ordinary'] + 1}" in again


def test_another_is_trained_by_force_or_elsewhere(host: Path, tmp_path: Path) -> None:
    train(host)
    out = tmp_path / "head.safetensors"
    said = train(host, "--seed", 4, "--out", out).stdout
    assert f"kept in {out}" in said
    loaded = load_host(host)
    assert heads.read_head(out, loaded).about.seed == 4
    kept = heads.find_head(loaded)
    assert kept is not None
    assert kept.about.seed == 0
    train(host, "--seed", 5, "--force")
    kept = heads.find_head(loaded)
    assert kept is not None
    assert kept.about.seed == 5


def test_a_host_with_a_head_of_baft_has_no_other(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "shipped_head", lambda _: object())
    line = train(host, "--force", code=1).stderr
    assert (
        line == f"error: baft comes with a scope head for {host}, which is used: --out FILE writes another\n"
    )
