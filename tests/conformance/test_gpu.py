"""The core of the conformance suite on an accelerator."""

import pytest
import torch

from baft.hosts.architecture import Site
from baft.hosts.edited_model import EditedModel
from tiny import N_LAYERS, pad_rows, positions_of, random_ids, shut_part, some_interventions, tiny_host

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator"),
]


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
