"""Faster products on CPUs, for passes whose results are compared only among themselves.

On processors that are not Intel's, torch hands float32 matrix products to a library that uses half of what
they can do; oneDNN, which torch carries as well, uses all of it. On Intel's that library is the faster one,
but for heads, whose many outputs it handles badly (`experiments/LOG.md`, 2026-11-24 and 2026-11-25). Inside
`fast_linears` plain float32 linear layers on the CPU run where they are faster. The two round differently, so
what a user is shown of a model never runs inside: there the edited model must be the host, bit for bit,
wherever no gate opens.
"""

import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PLAIN = (Tensor, nn.Parameter)
_WIDE = 8192  # outputs of a head


@contextlib.contextmanager
def fast_linears() -> Iterator[None]:
    """Runs plain float32 linear layers on the CPU through oneDNN, in this thread, inside the `with` block.

    On Intel's processors it is the wide ones alone. Everything else is left as it is: other devices and
    precisions, quantized weights, and torch builds without oneDNN. Gradients flow to the layer's input alone,
    never to weights or bias: a layer whose weights somebody wants gradients of does not belong inside, or
    else in `plain_linears`.
    """
    kernel = _kernel()
    if kernel is None or _inside.get():
        yield
        return
    token = _inside.set(True)
    try:
        with _Rerouted(kernel):
            yield
    finally:
        _inside.reset(token)


@contextlib.contextmanager
def plain_linears() -> Iterator[None]:
    """Inside `fast_linears`, runs linear layers as torch has them, with gradients for their weights."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def has_fast_linears() -> bool:
    """Whether `fast_linears` changes anything on this machine."""
    return _kernel() is not None


_inside: ContextVar[bool] = ContextVar("baft_fast_linears", default=False)
_plain: ContextVar[bool] = ContextVar("baft_plain_linears", default=False)


@cache
def _kernel() -> Callable[..., Tensor] | None:
    """OneDNN's linear layer, if this torch has one that works; it is not part of torch's public interface."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        kernel = torch.ops.mkldnn._linear_pointwise.default
        x, weight = torch.eye(3, 4), torch.arange(8.0).reshape(2, 4)
        same = torch.allclose(kernel(x, weight, None, "none", [], ""), x @ weight.T)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return kernel if same else None


@cache
def _is_intel() -> bool:
    """Whether the processor is of those that torch's own library for products is made for."""
    try:
        said = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:4096]
    except OSError:  # not Linux
        said = ""
    return "Intel" in said + platform.processor()


class _Rerouted(TorchFunctionMode):
    def __init__(self, kernel: Callable[..., Tensor]):
        super().__init__()
        self._kernel = kernel

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and not _plain.get() and _fits(*args, **kwargs):
            return _linear(self._kernel, *args, **kwargs)
        return func(*args, **kwargs)


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    if weight.ndim != 2 or torch.is_autocast_enabled("cpu"):
        return False
    if _is_intel() and weight.shape[0] < _WIDE:
        return False
    return all(
        type(one) in _PLAIN and one.dtype is torch.float32 and one.device.type == "cpu"
        for one in (input, weight, *([] if bias is None else [bias]))
    )


def _linear(
    kernel: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    if torch.is_grad_enabled() and input.requires_grad:
        found: Tensor = _Linear.apply(input, weight, bias, kernel)  # type: ignore[no-untyped-call]
        return found
    return kernel(input.detach(), weight.detach(), None if bias is None else bias.detach(), "none", [], "")


class _Linear(torch.autograd.Function):
    """`x W^T + bias`, with a gradient for `x` alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*batch n_in"],
        weight: Float[Tensor, "n_out n_in"],
        bias: Float[Tensor, " n_out"] | None,
        kernel: Callable[..., Tensor],
    ) -> Float[Tensor, "*batch n_out"]:
        """The product; the weight is kept for the way back, not the input."""
        ctx.save_for_backward(weight)
        ctx.kernel = kernel
        return kernel(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """`gradient W`; the kernel takes the transposed weight without a copy."""
        (weight,) = ctx.saved_tensors
        if _is_intel():
            return gradient @ weight, None, None, None
        return ctx.kernel(gradient, weight.t(), None, "none", [], ""), None, None, None
