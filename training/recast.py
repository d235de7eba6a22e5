"""Weights that a layer makes anew in each forward pass, because they are stored in another dtype, in packed bytes or in
another memory: made once more when backward needs them, where autograd would keep all of them for the whole step.

A frozen layer's backward is its input's gradient alone, W^T times that of the output. The layer's own code makes W
both times, so whatever it computes with (a scale, a patch on top) is in the gradient. It does so outside of torch's
dispatch modes, of which torch's guard for saved tensors is one: GGUF's tensor class cannot be converted inside one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from .recompute import replaced_forwards


@contextmanager
def recast(layers: Sequence[nn.Module]) -> Iterator[None]:
    """The layers with such weights for the length of a run; their classes' forwards are back at the end."""
    with replaced_forwards(layers, lambda layer: _recasting(layer, layer.forward)):
        yield


def _recasting(layer: nn.Module, forward: Callable) -> Callable:
    def call(x: Tensor, *others: Any, **kwargs: Any) -> Tensor:
        shape, dtype, device = x.shape, x.dtype, x.device

        def weight() -> Tensor:
            like = torch.zeros((), dtype=dtype, device=device).expand(shape)
            return _weight(lambda: forward(like, *others, **kwargs))

        with _disable_current_modes(), _Replaced(layer, weight):
            return forward(x, *others, **kwargs)

    return call


class _Replaced(TorchFunctionMode):
    """The layer's multiplication, with a backward that asks for the weight."""

    def __init__(self, layer: Any, weight: Callable[[], Tensor]):
        super().__init__()
        self.layer, self.weight = layer, weight

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in _PRODUCTS or self.weight is None or _is(args[1], self.layer.weight) or _trained(args[1:3]):
            return func(*args, **(kwargs or {}))
        again, self.weight = self.weight, None
        x, weight, *others = args
        if func is not nn.functional.linear:
            return _Product.apply(x, _plain(weight), again, func, *others)
        # With rows flat, or the result would be a view made inside a Function, which nobody may add to in place.
        flat = _Product.apply(x.reshape(-1, x.shape[-1]), _plain(weight), again, func, *others)
        return flat.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, again, func, *others):
        ctx.again, ctx.func, ctx.shape, ctx.others = again, func, x.shape, others[1:]  # the first is the bias
        return func(x, weight, *others)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        weight = ctx.again()
        if ctx.func is nn.functional.linear:
            result = gradient @ weight
        else:
            result = _PRODUCTS[ctx.func](ctx.shape, weight, gradient, *ctx.others)
        return result, *[None] * (4 + len(ctx.others))


class _FoundError(BaseException):  # past the layers that catch every Exception
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight


class _Stopped(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS:
            raise _FoundError(_plain(args[1]))
        return func(*args, **(kwargs or {}))


_PRODUCTS = {
    nn.functional.linear: None,
    nn.functional.conv1d: conv1d_input,
    nn.functional.conv2d: conv2d_input,
    nn.functional.conv3d: conv3d_input,
}


def _is(weight: Tensor, own: Tensor) -> bool:
    """One memory, and what it holds are the values."""
    return weight.data_ptr() == own.data_ptr() and not hasattr(weight, "__tensor_flatten__")


def _trained(tensors: Sequence[Tensor | None]) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _plain(weight: Tensor) -> Tensor:
    """Some quantized tensors are multiplied as they are, by kernels that quantize the layer's input too."""
    return weight.dequantize() if hasattr(weight, "__tensor_flatten__") else weight


@torch.no_grad()
def _weight(forward: Callable[[], Any]) -> Tensor:
    """What the layer multiplies with; the multiplication itself is not done."""
    try:
        with _disable_current_modes(), _Stopped():
            forward()
    except _FoundError as found:
        return found.weight
    raise RuntimeError("a layer made its weight in the forward pass and not again in backward")
