"""A MODEL whose weights do not all fit: ComfyUI's own low VRAM path, with a backward pass.

There a layer whose weight stays in main memory casts it to the device for each call. Autograd would keep every such
copy until backward, so that nothing is saved, and newer ComfyUI writes the next layer's weight over it. Here a layer
keeps no weight: its backward casts it once more, with the LoRAs of the MODEL on it, and forgets it again.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.ops
import torch
import torch.nn.grad
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..training.memory import BaseWeights
from ..training.recompute import replaced_forwards


logger = logging.getLogger(__name__)
ALL, NONE = 1e32, 0.1
"""Bytes, as ComfyUI itself says all there is, and no room for weights (0 is full load)."""


def load(patcher: ModelPatcher, beside: Sequence[ModelPatcher], memory_required: float, base: BaseWeights) -> None:
    """Load them for training after everything else has left the device.

    The others (text encoder, VAE, ControlNets) come back by themselves when a node next uses them. `memory_required`
    are bytes that the weights shall leave free; 'full' loads them all the same.
    """
    wanted = [patcher, *beside]
    if base == "offload" and patcher.load_device.type != "cpu" and patcher.load_device == patcher.offload_device:
        raise ValueError(
            "base_weights is 'offload', but ComfyUI was started with --highvram or --gpu-only, which keep weights on "
            "the graphics card: start it without, or set base_weights to 'full'"
        )
    free_others(wanted)
    with torch.no_grad():  # merging a DoRA into weights that ask for gradients fails, and ComfyUI only logs it
        comfy.model_management.load_models_gpu(wanted, memory_required=memory_required, force_full_load=base == "full")
        if base == "offload":
            patcher.unpatch_model(patcher.offload_device)
            patcher.partially_load(patcher.load_device, NONE)
    if patcher.model.model_lowvram:
        away = (patcher.model_size() - patcher.loaded_size()) / 2**20
        logger.info("%.0f MB of the model's weights stay in main memory while it trains", away)


def free_others(wanted: Sequence[ModelPatcher]) -> None:
    """Unload what is on the device of the first and is none of these, nor a clone of one, nor attached to one."""
    kept = {
        id(model.model) for one in wanted for model in (one, *one.model_patches_models()) if hasattr(model, "model")
    }
    entries = comfy.model_management.current_loaded_models
    keep = [entry for entry in entries if entry.model is not None and id(entry.model.model) in kept]
    comfy.model_management.free_memory(ALL, wanted[0].load_device, keep_loaded=keep)


@contextmanager
def recast(models: Sequence[nn.Module]) -> Iterator[None]:
    """Layers that cast their weights for a call cast them again in backward; every forward is back at the end."""
    layers = [module for model in models for module in model.modules() if hasattr(module, "comfy_cast_weights")]
    with replaced_forwards(layers, lambda layer: _recasting(layer, layer.forward)):
        yield


def _recasting(layer: Any, forward: Callable) -> Callable:
    gradient = _gradient_of(layer)

    def call(*args, **kwargs):
        x = args[0] if args else None
        if not (torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad and _casts(layer)):
            return forward(*args, **kwargs)
        if gradient is not None and len(args) == 1 and not kwargs:
            return _Recast.apply(x, layer, forward, gradient)
        return _Recomputed.apply(x, lambda given: forward(given, *args[1:], **kwargs))

    return call


def _casts(layer: Any) -> bool:
    return bool(layer.comfy_cast_weights or layer.weight_function or layer.bias_function)


class _Recast(torch.autograd.Function):
    """A layer that is linear in its input: the gradient needs the weight, and nothing of what the layer computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, forward: Callable, gradient: Callable) -> Tensor:
        ctx.layer, ctx.gradient, ctx.given = layer, gradient, (x.shape, x.dtype, x.device)
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        shape, dtype, device = ctx.given
        how = {"dtype": dtype, "device": device, "bias_dtype": dtype, "offloadable": True}
        weight, bias, stream = comfy.ops.cast_bias_weight(ctx.layer, **how)
        try:
            return ctx.gradient(ctx.layer, shape, weight, grads[0]), None, None, None
        finally:
            comfy.ops.uncast_bias_weight(ctx.layer, weight, bias, stream)


class _Recomputed(torch.autograd.Function):
    """Any other layer, a norm for example: computed once more from its input when backward reaches it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable) -> Tensor:
        ctx.call = forward
        ctx.save_for_backward(x)
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.call(x)
        return torch.autograd.grad(output, x, grads[0])[0], None


def _gradient_of(layer: Any) -> Callable | None:
    """The input's gradient of a layer that computes as ComfyUI's own Linear or convolution does; else None."""
    own, cls = comfy.ops.disable_weight_init, type(layer)
    names = ("forward", "forward_comfy_cast_weights", "_conv_forward")
    for name, gradient in _GRADIENTS.items():
        kind = getattr(own, name)
        if isinstance(layer, kind) and all(getattr(cls, n, None) is getattr(kind, n, None) for n in names):
            plain = getattr(layer, "padding_mode", "zeros") == "zeros" and not isinstance(
                getattr(layer, "padding", 0), str
            )
            return gradient if plain and "forward" not in vars(layer) else None
    return None


def _linear(layer: Any, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
    del layer, shape
    return grad @ weight


def _convolution(function: Callable) -> Callable:
    def gradient(layer: Any, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
        how = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        return function(shape, weight, grad, **how)

    return gradient


_GRADIENTS = {
    "Linear": _linear,
    "Conv1d": _convolution(torch.nn.grad.conv1d_input),
    "Conv2d": _convolution(torch.nn.grad.conv2d_input),
    "Conv3d": _convolution(torch.nn.grad.conv3d_input),
}
