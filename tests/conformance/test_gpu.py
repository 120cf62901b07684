"""The core of the conformance suite on an accelerator; test_precision.py makes the same checks on the CPU."""

from dataclasses import replace

import accelerate
import pytest
import torch

import baft
from baft.hosts.architecture import Site, input_device, site_device
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.methods.baft import ReftEditor
from baft.methods.base import methods
from baft.scope.reading import Reader
from baft.scope.training import ScopeConfig, train_scope
from baft.types import Edit, EditRequest
from tiny import (
    N_LAYERS,
    pad_rows,
    positions_of,
    random_ids,
    shut_part,
    some_interventions,
    tiny_host,
    tiny_tokenizer,
)
from training_checks import (
    PRESETS,
    check_background,
    check_editing,
    check_method,
    check_saving_across,
    check_scopes,
    check_shut_gates_in_batches,
    learn,
    loaded,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator"),
]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("baft.hosts.background._WORTH_KEEPING_S", 0.0)
        yield


def on_gpu(parts):
    return {site: [part.to("cuda") for part in there] for site, there in parts.items()}


@pytest.fixture(params=["gpt2", "llama", "mistral", "gemma3_text"])
def family(request):
    return request.param


@pytest.fixture
def batch():
    ids, mask = pad_rows([random_ids(1, 12)[0], random_ids(1, 5)[0]], "left")
    return ids.to("cuda"), mask.to("cuda")


def test_the_gpu_says_what_the_cpu_says(family, batch):
    ids, mask = batch
    host = tiny_host(family)
    parts = some_interventions(host)
    cpu = EditedModel(host, parts)
    given = {"attention_mask": mask.cpu(), "position_ids": positions_of(mask.cpu())}
    n = torch.tensor([9, 3])  # left on the CPU on purpose
    want = cpu(ids.cpu(), n_prompt_tokens=n, **given).logits
    bare = host(ids.cpu(), **given).logits
    tokens = cpu.generate(ids.cpu(), attention_mask=mask.cpu(), max_new_tokens=5, do_sample=False)
    gpu = EditedModel(host.to("cuda"), on_gpu(parts))
    got = gpu(ids, mask, n_prompt_tokens=n, position_ids=positions_of(mask)).logits.cpu()
    real = mask.bool().cpu()
    assert (got - want)[real].abs().max() < 1e-9
    assert (got - bare)[real].abs().max() > 1e-2  # control
    for arguments in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        said = gpu.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **arguments)
        assert torch.equal(said.cpu(), tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shut_gates_leave_every_bit(family, dtype, batch):
    ids, mask = batch
    host = tiny_host(family, dtype=dtype, device="cuda")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shut = EditedModel(host, on_gpu({Site(i): [shut_part(dtype=wide)] for i in range(N_LAYERS)}))
    given = {"attention_mask": mask, "position_ids": positions_of(mask)}
    assert torch.equal(shut(ids, **given).logits, host(ids, **given).logits)
    acts = EditedModel(host, on_gpu(some_interventions(host)))
    assert not torch.equal(acts(ids, **given).logits, host(ids, **given).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS, ids="/".join)
def test_an_edit_is_learned_and_taken_back(preset, dtype):
    check_editing(*preset, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", methods.names())
def test_every_method_learns_and_takes_back(method, dtype):
    check_method(method, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_edits_with_a_scope_do_not_know_each_other(monkeypatch, dtype):
    check_scopes(monkeypatch, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prompts_on_which_no_gate_opens_keep_every_bit_in_a_batch(dtype):
    check_shut_gates_in_batches(dtype=dtype, device="cuda")


@pytest.mark.parametrize(("made_on", "read_on"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_an_artifact_goes_from_one_device_to_another(tmp_path, made_on, read_on):
    check_saving_across(tmp_path, made_on, read_on)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_background_stands_where_its_site_does(tmp_path, monkeypatch, dtype):
    check_background(tmp_path, monkeypatch, dtype=dtype, device="cuda")


@pytest.mark.parametrize("where", ["a map", "in RAM, run on the accelerator"])
def test_weights_that_are_kept_in_ram_run_on_the_accelerator(tmp_path, where):
    """Blocks in RAM have their interventions on the accelerator, and learn what a host all there does."""
    plain = loaded(torch.float64, "cuda")
    folder = tmp_path / "host"
    plain.host.save_pretrained(folder)
    plain.tokenizer.save_pretrained(folder)
    if where == "a map":
        blocks = {f"model.layers.{i}": "cpu" for i in range(1, N_LAYERS)}
        around = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), 0)
        model = baft.load(folder, device_map={**around, **blocks, "model.layers.0": 0})
    else:
        host = loaded(torch.float64, "cpu").host
        accelerate.cpu_offload(host, torch.device("cuda", 0))
        model = baft.load((host, plain.tokenizer))
    assert any(parameter.is_meta for parameter in model.host.parameters())
    assert input_device(model.host).type == "cuda"
    assert {site_device(model.host, Site(i)).type for i in range(N_LAYERS)} == {"cuda"}
    untouched = model.logits("A")
    reports = [learn(one) for one in (plain, model)]
    assert reports[0].succeeded
    assert reports[1].succeeded
    torch.testing.assert_close(model.logits("A").cpu(), plain.logits("A").cpu(), rtol=0, atol=1e-6)
    assert model.identity.weights_hash == plain.identity.weights_hash
    model.undo()
    assert torch.equal(model.logits("A"), untouched)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two accelerators")
def test_a_host_on_two_devices_is_trained_by_the_cheap_pass():
    host = tiny_host("llama")
    last = "cuda:1"
    where = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": last}
    where |= {"model.layers.2": last, "model.norm": last, "lm_head": last}
    accelerate.dispatch_model(host, where)
    settings = replace(ReftEditor.preset("default"), max_steps=3, layers=(0, 2))
    edits = EditRequest((Edit("The tower is in the city of", "Ro"),))
    outcome = ReftEditor(Host("tiny", host, tiny_tokenizer(), "on two devices"), settings).apply(edits)
    assert outcome.why_full is None
    assert outcome.n_steps > 0


def test_a_scope_is_learned_where_the_host_is():
    host = Host("tiny", tiny_host("llama", dtype=torch.float32, device="cuda"), tiny_tokenizer(), "tiny")
    config = ScopeConfig(n_uses=2, n_groups=2, n_at_once=2, n_dims=8, n_hidden=8)
    losses = []
    reader = Reader(host, Encoder(host.tokenizer))
    head = train_scope(reader, config, on_step=lambda *told: losses.append(told[2]))
    assert {one.device.type for one in head.parameters()} == {"cuda"}
    assert all(0 < one < float("inf") for one in losses)
