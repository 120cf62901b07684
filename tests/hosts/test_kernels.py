"""Faster linear layers: the same numbers up to rounding where they fit, and everything else bit for bit."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

from baft.hosts import kernels
from baft.hosts.architecture import Site
from baft.hosts.edited_model import EditedModel
from baft.hosts.kernels import _inside, fast_linears, has_fast_linears
from tiny import open_part, random_ids, shut_part, tiny_host

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN, so there is nothing to test"
)


@pytest.fixture(autouse=True)
def _another_s_processor(monkeypatch):
    monkeypatch.setattr(kernels, "_is_intel", lambda: False)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of what the faster kernel was given; the kernel itself still does the work."""
    seen, kernel = [], kernels._kernel()

    def watched(x, *rest):
        seen.append(tuple(x.shape))
        return kernel(x, *rest)

    if kernel is not None:
        monkeypatch.setattr(kernels, "_kernel", lambda: watched)
    return seen


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layouts(x):
    """The same numbers in several layouts of memory."""
    wide = torch.stack([x, -x], -1)
    return {"plain": x, "every other": wide[..., 0], "turned": x.mT.contiguous().mT, "shifted": shifted(x)}


def shifted(x):
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x)


@needs_onednn
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 40), (2, 7, 40), (1, 1, 40), (3, 2, 2, 40)], ids=str)
def test_forward_and_input_gradient_are_those_of_the_plain_layer(calls, has_bias, shape):
    weight, bias = nn.Parameter(normal(24, 40, seed=1)), nn.Parameter(normal(24, seed=2))
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    given = (weight, bias) if has_bias else (weight,)
    push = normal(*shape[:-1], 24, seed=3)
    for name, x in layouts(normal(*shape)).items():
        x = x.detach().requires_grad_(True)
        want = functional.linear(x, *given)
        (want_gradient,) = torch.autograd.grad(want, x, push)
        calls.clear()
        with fast_linears():
            got = functional.linear(x, *given)
        (got_gradient,) = torch.autograd.grad(got, x, push)
        assert len(calls) == 2, name  # there and back
        # Sums of 40 and of 24 products of about one, added up in another order.
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
        torch.testing.assert_close(got_gradient, want_gradient, rtol=0, atol=2e-5)
        assert got.shape == want.shape
        with torch.no_grad(), fast_linears():
            silent = functional.linear(x, *given)
        assert not silent.requires_grad
        torch.testing.assert_close(silent, want.detach(), rtol=0, atol=2e-5)
        wrong = functional.linear(x + 1e-3, *given)  # control: the tolerance tells inputs apart
        assert (wrong - want).abs().max() > 1e-3


@needs_onednn
def test_gradients_flow_to_the_input_alone(calls):
    layer, x = nn.Linear(8, 5), normal(3, 8).requires_grad_(True)
    with fast_linears():
        loss = layer(x).square().sum()
    loss.backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    layer(x).square().sum().backward()  # control
    assert layer.weight.grad is not None


class Marked(torch.Tensor):
    """A tensor with a class of its own, as quantized weights have."""


@needs_onednn
@pytest.mark.parametrize("what", ["float64", "bfloat16", "float16", "meta", "subclass", "mixed bias"])
def test_everything_else_is_left_alone(calls, what):
    x, weight, bias = normal(3, 8), normal(5, 8, seed=1), normal(5, seed=2)
    with fast_linears():
        functional.linear(x, weight, bias)
    assert calls == [(3, 8)]  # control
    if what == "subclass":
        weight = weight.as_subclass(Marked)
    elif what == "meta":
        x, weight, bias = x.to("meta"), weight.to("meta"), bias.to("meta")
    elif what == "mixed bias":
        bias = bias.as_subclass(Marked)
    else:
        x, weight, bias = (one.to(getattr(torch, what)) for one in (x, weight, bias))
    want = functional.linear(x, weight, bias)
    calls.clear()
    with fast_linears():
        got = functional.linear(x, weight, bias)
        product = x @ weight.T  # what is no linear layer is not touched at all
    assert calls == []
    assert type(got) is type(want)
    assert got.dtype == want.dtype
    if what != "meta":
        assert torch.equal(got, want)
        assert torch.equal(product, x @ weight.T)


@needs_onednn
def test_by_name_too(calls):
    x, weight, bias = normal(3, 8), normal(5, 8, seed=1), normal(5, seed=2)
    with fast_linears():
        got = functional.linear(input=x, weight=weight, bias=bias)
        functional.linear(x, weight=weight)
    assert calls == [(3, 8)] * 2
    torch.testing.assert_close(got, functional.linear(x, weight, bias), rtol=0, atol=1e-5)


@needs_onednn
def test_nested_and_left_by_an_error_it_ends_where_it_began(calls):
    layer, x = nn.Linear(8, 5).requires_grad_(False), normal(3, 8)
    with fast_linears():
        with fast_linears():
            layer(x)
        layer(x)
        assert len(calls) == 2  # once each, and the inner block did not end the outer one
    layer(x)
    assert len(calls) == 2
    with pytest.raises(RuntimeError, match="on purpose"), fast_linears():
        raise RuntimeError("on purpose")
    assert not _inside.get()
    layer(x)
    assert len(calls) == 2
    with fast_linears():
        layer(x)
    assert len(calls) == 3  # control


@needs_onednn
def test_other_threads_do_not_notice(calls):
    layer, x = nn.Linear(8, 5).requires_grad_(False), normal(3, 8)
    want, got = layer(x), []
    thread = threading.Thread(target=lambda: got.append(layer(x)))
    with fast_linears():
        thread.start()
        thread.join()
        assert calls == []
        layer(x)
        assert len(calls) == 1  # control
    assert torch.equal(got[0], want)


@pytest.mark.parametrize("why", ["no oneDNN", "no such kernel", "a kernel that is wrong"])
def test_without_the_kernel_nothing_changes(monkeypatch, why):
    if why == "no oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif why == "no such kernel":
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    else:

        class Wrong:
            class _linear_pointwise:
                @staticmethod
                def default(x, weight, *_):
                    return 2 * x @ weight.T

        monkeypatch.setattr(torch.ops, "mkldnn", Wrong)
    kernels._kernel.cache_clear()
    try:
        assert not has_fast_linears()
        layer, x = nn.Linear(8, 5), normal(3, 8).requires_grad_(True)
        want = layer(x)
        with fast_linears():
            got = layer(x)
            got.sum().backward()
        assert torch.equal(got, want)
        assert layer.weight.grad is not None  # the plain layer, gradients and all
    finally:
        monkeypatch.undo()
        kernels._kernel.cache_clear()
    assert has_fast_linears() == torch.backends.mkldnn.is_available()  # control


@needs_onednn
def test_on_intel_only_wide_layers_are_rerouted_and_only_forward(calls, monkeypatch):
    monkeypatch.setattr(kernels, "_is_intel", lambda: True)
    x = normal(3, 8).requires_grad_(True)
    narrow, wide = normal(kernels._WIDE - 1, 8, seed=1), normal(kernels._WIDE, 8, seed=2)
    with fast_linears():
        assert torch.equal(functional.linear(x, narrow), x @ narrow.T)
        assert calls == []
        said = functional.linear(x, wide)
    (gradient,) = torch.autograd.grad(said.sum(), x)
    assert len(calls) == 1
    torch.testing.assert_close(said, x @ wide.T, rtol=0, atol=2e-5)
    torch.testing.assert_close(gradient, wide.sum(0).expand(3, -1), rtol=1e-4, atol=1e-3)


def test_the_processor_is_told_by_its_name(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(kernels.platform, "processor", lambda: "Intel64 Family 6 Model 85, GenuineIntel")
    kernels._is_intel.cache_clear()
    assert kernels._is_intel()
    kernels._is_intel.cache_clear()
    monkeypatch.setattr(kernels.platform, "processor", lambda: "")
    monkeypatch.setattr(kernels.Path, "read_text", lambda *_, **__: "model name : AMD EPYC")
    assert not kernels._is_intel()
    kernels._is_intel.cache_clear()


def test_what_a_user_is_shown_never_runs_inside(calls):
    """Neither a call of the edited model nor a generation: with shut gates they are the host's bits."""
    host = tiny_host("llama", dtype=torch.float32)
    ids = random_ids(2, 9)
    shut = EditedModel(host, {Site(1): [shut_part(dtype=torch.float32)]})
    acts = EditedModel(host, {Site(1): [open_part(dtype=torch.float32)]})
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    want, said = host(ids).logits, host.generate(ids, **options)
    assert torch.equal(shut(ids).logits, want)
    again = shut.generate(ids, **options)
    assert torch.equal(again.sequences, said.sequences)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, said.logits, strict=True))
    assert not torch.equal(acts(ids).logits, want)
    acts.generate(ids, **options)
    assert calls == []
    if has_fast_linears():  # control
        with fast_linears():
            shut(ids)
        assert len(calls) > 0
