"""Hosts that accelerate spreads over devices, RAM and disk: they say and learn what the plain host does."""

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import baft
from baft.errors import ConfigError
from baft.hosts.architecture import Site, input_device, site_device
from baft.hosts.background import background
from baft.hosts.encoding import Encoder
from baft.hosts.identity import compare, identify
from baft.hosts.models import load_host
from quick_methods import STEPS, WIDE
from tiny import CHATML, N_LAYERS, random_ids, tiny_host, tiny_tokenizer

CPU = torch.device("cpu")
BLOCKS = [f"model.layers.{i}" for i in range(N_LAYERS)]
AROUND = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
MAPS = {
    "all on cpu": {"": "cpu"},
    "some on disk": dict.fromkeys([*AROUND, BLOCKS[0]], "cpu") | dict.fromkeys(BLOCKS[1:], "disk"),
    "all but the blocks on disk": dict.fromkeys(BLOCKS, "cpu") | dict.fromkeys(AROUND, "disk"),
    "all on disk": {"": "disk"},
}
LIVE = ("some in RAM", "all in RAM", "all on disk, in files of its own")
PROMPT, TARGET = "The tower is in the city of", "Ro"
SETTINGS = {
    "bank": {"method": "baft-bank", "n_others": 1, **STEPS},
    "default": {"method": "baft", **STEPS, **WIDE},
    "paper": {"method": "baft", "preset": "paper", **STEPS},
    "paper-rloc": {"method": "baft", "preset": "paper-rloc", **STEPS},
    "reft": {"method": "reft", **STEPS},
}


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("baft.hosts.background._WORTH_KEEPING_S", 0.0)
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    """A checkpoint; its input and output embeddings are one, or two."""
    path = tmp_path_factory.mktemp("host")
    tiny_host("llama", max_position_embeddings=512, tie_word_embeddings=request.param).save_pretrained(path)
    tiny_tokenizer(chat_template=CHATML).save_pretrained(path)
    return path


@pytest.fixture(params=[*MAPS, *LIVE])
def spread(request, folder, tmp_path):
    """The checkpoint's host, spread in one way or another."""
    if request.param in MAPS:
        host = load_host(folder, device_map=MAPS[request.param], offload_folder=tmp_path / "offloaded")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
        if request.param == "some in RAM":
            for block in model.model.layers[1:]:
                accelerate.cpu_offload(block, CPU)
        elif request.param == "all in RAM":
            accelerate.cpu_offload(model, CPU)
        else:
            accelerate.disk_offload(model, tmp_path / "offloaded", CPU)
        host = load_host((model, AutoTokenizer.from_pretrained(folder)))
    n_away = sum(parameter.is_meta for parameter in host.model.parameters())
    n_all = len(list(host.model.parameters()))
    assert (n_away == 0) == (request.param == "all on cpu")  # or this would be no test
    assert (n_away == n_all) == request.param.startswith(("all on disk", "all in RAM"))
    return host


def test_where_things_are(spread):
    assert input_device(spread.model) == CPU
    assert [site_device(spread.model, Site(i)) for i in range(N_LAYERS)] == [CPU] * N_LAYERS


def test_the_identity_is_that_of_the_plain_host(spread, folder, tmp_path):
    plain = identify(load_host(folder))
    found = identify(spread)
    assert compare(plain, found) == "same"
    assert (found.weights_hash, found.samples) == (plain.weights_hash, plain.samples)
    assert found.n_parameters == plain.n_parameters > 0
    other = tiny_host("llama", seed=1, max_position_embeddings=512)  # control
    assert identify(load_host((other, spread.tokenizer))).weights_hash != found.weights_hash


def test_the_background_is_that_of_the_plain_host(spread, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BAFT_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("baft.hosts.background._WORTH_KEEPING_S", 1e9)  # each computes its own
    sites, plain = (Site(0), Site(2)), load_host(folder)
    want = background(plain, Encoder.for_host(plain, max_tokens=512), sites)
    found = background(spread, Encoder.for_host(spread, max_tokens=512), sites)
    assert torch.equal(found.slots, want.slots)
    for site in sites:
        assert found.states[site].device == CPU
        torch.testing.assert_close(found.states[site], want.states[site], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("spread", "settings"),
    [(way, "default") for way in (*MAPS, *LIVE)]
    + [("all on disk", other) for other in SETTINGS if other != "default"],
    indirect=["spread"],
)
def test_it_learns_and_says_what_the_plain_host_does(spread, folder, tmp_path, settings):
    changes = SETTINGS[settings]
    plain, model = baft.load(folder), baft.load((spread.model, spread.tokenizer))
    untouched, bare = model.logits(PROMPT), plain.logits(PROMPT)
    torch.testing.assert_close(untouched, bare, rtol=0, atol=1e-9)
    reports = [one.edit(PROMPT, TARGET, **changes) for one in (plain, model)]
    assert reports[1].n_steps == reports[0].n_steps > 0
    assert [row.after for row in reports[1].rows] == [row.after for row in reports[0].rows]
    assert reports[1].rows[0].decoded
    # What is trained goes through tens of steps, each with its own rounding.
    edited = model.logits(PROMPT)
    torch.testing.assert_close(edited, plain.logits(PROMPT), rtol=0, atol=1e-6)
    assert float((edited - untouched).abs().max()) > 1e-2  # control
    assert model.generate([PROMPT, "A"], max_new_tokens=6) == plain.generate([PROMPT, "A"], max_new_tokens=6)
    assert model.explain(PROMPT)
    ids = random_ids(2, 9)
    torch.testing.assert_close(model.hf(ids).logits, plain.hf(ids).logits, rtol=0, atol=1e-6)

    # An artifact of the one is one of the other.
    again = baft.load(model.save(tmp_path / "here.baft"), host=folder)
    torch.testing.assert_close(again.logits(PROMPT), edited, rtol=0, atol=1e-9)
    back = baft.load(plain.save(tmp_path / "there.baft"), host=(spread.model, spread.tokenizer))
    torch.testing.assert_close(back.logits(PROMPT), plain.logits(PROMPT), rtol=0, atol=1e-9)

    model.undo()
    assert torch.equal(model.logits(PROMPT), untouched)


def test_a_map_by_the_user_s_object(folder, tmp_path):
    model = baft.load(folder, device_map=MAPS["some on disk"], offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in model.host.parameters())
    assert model.edit(PROMPT, TARGET, **SETTINGS["default"]).rows[0].decoded
    assert not any(parameter.is_meta for parameter in baft.load(folder, device_map="auto").host.parameters())


def test_what_does_not_go_together(folder):
    pair = (tiny_host("llama"), tiny_tokenizer())
    with pytest.raises(ConfigError, match="either device= or device_map="):
        load_host(folder, device="cpu", device_map={"": "cpu"})
    with pytest.raises(ConfigError, match="offload_folder= goes with device_map="):
        load_host(folder, offload_folder="somewhere")
    with pytest.raises(ConfigError, match="keeps its dtype and device"):
        load_host(pair, device_map={"": "cpu"})
