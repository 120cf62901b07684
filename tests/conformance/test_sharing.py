"""A host has other users: threads, people's own hooks, adapters, quantizers. None of them may notice."""

import threading
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from torch import nn
from transformers import (
    PreTrainedModel,
)

from baft.errors import UnsupportedHostError
from baft.hosts.architecture import Site
from baft.hosts.calls import Call, current_call, hanging
from baft.hosts.edited_model import EditedModel
from baft.hosts.live_view import live_view
from tiny import (
    N_LAYERS,
    half_open_part,
    open_part,
    pad_rows,
    positions_of,
    random_ids,
    shut_part,
    some_interventions,
    tiny_host,
)

PEFT_IS_BEHIND = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
OPTIONS = {"max_new_tokens": 5, "do_sample": False}


def counts(*numbers):
    return torch.tensor(numbers)


def test_other_people_s_hooks_stay_and_run_once_a_call(host, edited):
    calls = {"block": 0, "before": 0, "host": 0, "stack": 0}
    seen = []

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    block = edited.architecture.blocks[0]
    handles = [
        block.register_forward_hook(count("block")),
        block.register_forward_pre_hook(count("before")),
        host.register_forward_hook(count("host")),
        edited.architecture.stack.register_forward_pre_hook(count("stack")),
        block.register_forward_hook(lambda _, __, out: seen.append(out)),
    ]
    try:
        ids = random_ids(1, 6)
        for run in (lambda: edited(ids), lambda: live_view(edited)(ids), lambda: host(ids)):
            before = dict(calls)
            run()
            assert calls == {name: n + 1 for name, n in before.items()}
        before = dict(calls)
        edited.generate(ids, **OPTIONS)
        assert calls == {name: n + 5 for name, n in before.items()}
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])  # they see the edited output, and without edits the host's


def test_two_edited_models_share_a_host_in_two_threads(host):
    parts = [{Site(i): [open_part(seed=i)], Site(2): [open_part(seed=9 + i)]} for i in (0, 1)]
    models = [EditedModel(host, part) for part in parts]
    ids = [random_ids(1, 8, seed=seed) for seed in (0, 1)]
    jobs = [lambda i=i: models[i].generate(ids[i], **OPTIONS) for i in (0, 1)]
    jobs += [lambda i=i: models[i](ids[i]).logits for i in (0, 1)] + [lambda: host(ids[0]).logits]

    def silent():
        with models[0].disabled():
            return models[0](ids[0]).logits

    jobs.append(silent)
    want = [job() for job in jobs]
    assert torch.equal(want[-1], want[-2])
    barrier = threading.Barrier(len(jobs))

    def often(job):
        barrier.wait()
        return [job() for _ in range(12)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        for results, alone in zip(pool.map(often, jobs), want, strict=True):
            assert all(torch.equal(result, alone) for result in results)
    assert not torch.equal(want[2], models[1](ids[0]).logits)  # control


def test_another_thread_s_hook_may_be_called_late_and_without_keywords(host, edited):
    """Torch looks up whether a hook wants keywords after it has listed the hooks."""
    stack = edited.architecture.stack
    errors, ids = [], random_ids(1, 5)

    def take_down_while_listed(*_):
        handle.remove()
        stack._forward_pre_hooks_with_kwargs.clear()  # as the end of the other call would

    def other():
        try:
            host(ids)
        except TypeError as error:
            errors.append(error)

    handle = stack.register_forward_pre_hook(take_down_while_listed, prepend=True)
    with edited._hooks(edited_call(edited, ids)):
        stack._forward_pre_hooks.move_to_end(handle.id, last=False)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert errors == []


def edited_call(edited, ids):
    return Call(edited.window(ids, torch.ones_like(ids).bool(), None), edited.interventions, None)


def test_hooks_are_hung_one_thread_at_a_time(edited):
    started = threading.Event()

    def run():
        started.set()
        edited(random_ids(1, 4))

    thread = threading.Thread(target=run)
    with hanging:
        thread.start()
        started.wait()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(30)
    assert not thread.is_alive()


def test_an_edited_model_may_run_inside_another_s_call(host):
    outer, inner = (EditedModel(host, {Site(0): [open_part(seed=seed)]}) for seed in (1, 2))
    ids = random_ids(1, 6)
    want, other = outer(ids).logits, inner(ids).logits
    got = []

    def nested(*_):
        if not got:  # the inner call comes by here, too
            got.append(None)
            got[0] = inner(ids).logits

    handle = outer.architecture.blocks[1].register_forward_hook(nested)
    try:
        assert torch.equal(outer(ids).logits, want)
    finally:
        handle.remove()
    assert torch.equal(got[0], other)
    assert not torch.equal(want, other)
    assert current_call.get() is None


def test_swapping_the_interventions_swaps_them_whole(host, edited):
    ids = random_ids(1, 6)
    first = edited(ids).logits
    before = edited.interventions
    edited.interventions = {Site(1): [open_part(seed=4)]}
    assert not torch.equal(edited(ids).logits, first)
    edited.interventions = before
    assert torch.equal(edited(ids).logits, first)
    edited.interventions = {}
    assert not edited.is_enabled
    assert torch.equal(edited(ids).logits, host(ids).logits)


def lora():
    targets = ["q_proj", "v_proj"]
    return peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")


@PEFT_IS_BEHIND
@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_a_host_may_wear_an_adapter(how):
    plain = tiny_host("llama")
    ids = random_ids(2, 8)
    bare = plain(ids).logits
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if how == "add_adapter":
            plain.add_adapter(lora())
            host = plain
        else:
            host = peft.get_peft_model(plain, lora())
    host.double().eval()
    worn = host(input_ids=ids).logits
    assert not torch.equal(worn, bare)  # control: the adapter does something
    edited = EditedModel(host, some_interventions(host))
    n = counts(6, 8)
    acts = edited(ids, n_prompt_tokens=n).logits
    assert not torch.equal(acts, worn)
    with edited.disabled():
        assert torch.equal(edited(ids).logits, worn)
    shut = EditedModel(host, {Site(1): [shut_part()]})
    assert torch.equal(shut(ids).logits, worn)
    got = edited.generate(ids, **OPTIONS)
    assert torch.equal(got, edited.generate(ids, use_cache=False, **OPTIONS))
    assert not torch.equal(got, host.generate(input_ids=ids, **OPTIONS))
    view = live_view(edited)
    assert isinstance(view, PreTrainedModel)
    assert isinstance(view, type(tiny_host("llama")))
    assert torch.equal(view(ids, n_prompt_tokens=n).logits, acts)
    assert torch.equal(view.generate(ids, **OPTIONS), got)


@PEFT_IS_BEHIND
def test_an_adapter_of_learned_tokens_is_refused():
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    host = peft.get_peft_model(tiny_host("llama"), config)
    with pytest.raises(UnsupportedHostError, match="learned tokens"):
        EditedModel(host)


# Torch's own quantization is on its way out, in favor of torchao.
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("kind", ["torchao", "dynamic"])
def test_a_host_may_have_quantized_layers(kind):
    host = tiny_host("llama", dtype=torch.float32)
    ids = random_ids(2, 9)
    exact = host(ids).logits
    if kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(host, torchao.Int8WeightOnlyConfig())
    else:
        host = torch.ao.quantization.quantize_dynamic(host, {nn.Linear}, dtype=torch.qint8)
    rough = host(ids).logits
    assert 0 < (rough - exact).abs().mean() < 0.2  # control: it is quantized
    parts = {Site(1): [half_open_part(host, Site(1))]}
    edited = EditedModel(host, parts)
    assert torch.equal(EditedModel(host, {Site(1): [shut_part(dtype=torch.float32)]})(ids).logits, rough)
    assert (edited(ids).logits - rough).abs().max() > 1e-2
    got = edited.generate(ids, **OPTIONS)
    assert got.shape == (2, 14)
    assert not torch.equal(got, host.generate(ids, **OPTIONS))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_shut_gates_leave_every_bit(family, dtype):
    host = tiny_host(family, dtype=dtype)
    ids, mask = pad_rows([random_ids(1, 9)[0], random_ids(1, 5)[0]], "left")
    given = {"attention_mask": mask, "position_ids": positions_of(mask)}
    want = host(ids, **given).logits
    shut = EditedModel(host, {Site(i): [shut_part(dtype=torch.float32)] for i in range(N_LAYERS)})
    assert torch.equal(shut(ids, **given).logits, want)
    given = {"attention_mask": mask, **OPTIONS}
    assert torch.equal(shut.generate(ids, **given), host.generate(ids, **given))
    given = {"attention_mask": mask, "position_ids": positions_of(mask)}
    acts = EditedModel(host, {Site(0): [half_open_part(host, Site(0))]})(ids, **given).logits
    assert acts.dtype == dtype
    assert (acts - want)[mask.bool()].abs().max() > 1e-2
