"""A MODEL whose weights do not all fit: ComfyUI's own low VRAM path, with a backward pass.

There a layer whose weight stays in main memory casts it to the device for each call. Autograd would keep every such
copy until backward, so that nothing is saved, and newer ComfyUI writes the next layer's weight over it. In training no
layer keeps one. Linear layers and convolutions make theirs again for backward (quantized.py); here are the others.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..training.memory import BaseWeights, MemoryConfig
from ..training.recompute import replaced_forwards
from .quantized import makes_its_weight


logger = logging.getLogger(__name__)
ALL, NONE = 1e32, 0.1
"""Bytes, as ComfyUI itself says all there is, and no room for weights (0 is full load)."""
MEMORY_FACTOR, KEPT_FACTOR = 4.0, 30.0
"""What a step keeps for its backward pass, relative to ComfyUI's estimate of a forward pass: with every block
recomputed, and with none. Counted on shapes at published sizes in bf16: 2.9 and 11 for SD 1.5, 2.8 and 25 for SDXL, 4.1
and 74 for Qwen-Image.
"""


def step_factor(memory: MemoryConfig | None) -> float:
    """Between the two by how many blocks are recomputed. Where weights need not make room, it decides nothing."""
    if memory is None or memory.base_weights != "auto" or memory.offload_activations:
        return MEMORY_FACTOR
    kept = 1 - 1 / memory.every if memory.gradient_checkpointing == "blocks" else 1.0
    return MEMORY_FACTOR + kept * (KEPT_FACTOR - MEMORY_FACTOR)


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
    try:
        with torch.no_grad():  # merging a DoRA into weights that ask for gradients fails, and ComfyUI only logs it
            comfy.model_management.load_models_gpu(
                wanted, memory_required=memory_required, force_full_load=base == "full"
            )
            if base == "offload":
                patcher.unpatch_model(patcher.offload_device)
                patcher.partially_load(patcher.load_device, NONE)
    except torch.OutOfMemoryError as error:
        size, less = patcher.model_size() / 2**30, "'auto' or 'offload'" if base == "full" else "'offload'"
        raise torch.OutOfMemoryError(
            f"the MODEL's weights, {size:.1f} GB, do not fit {patcher.load_device} with base_weights '{base}': set "
            f"base_weights of Training Memory to {less}, load it with a smaller weight_dtype, or close what else uses "
            f"the graphics card ({error})"
        ) from error
    if patcher.model.model_lowvram:
        _refuse_left_out(patcher)
        away = (patcher.model_size() - patcher.loaded_size()) / 2**20
        logger.info("%.0f MB of the model's weights stay in main memory while it trains", away)


def require_full(model: Any, purpose: str) -> None:
    """ValueError where some weights of a loaded model are in main memory."""
    if model.model_lowvram:
        raise ValueError(
            f"{purpose} needs all weights on the device, and some of them are in main memory: set base_weights to "
            "'full', and start ComfyUI without --novram"
        )


def free_others(wanted: Sequence[ModelPatcher]) -> None:
    """Unload what is on the device of the first and is none of these, nor a clone of one, nor attached to one."""
    kept = {
        id(model.model) for one in wanted for model in (one, *one.model_patches_models()) if hasattr(model, "model")
    }
    entries = comfy.model_management.current_loaded_models
    keep = [entry for entry in entries if entry.model is not None and id(entry.model.model) in kept]
    comfy.model_management.free_memory(ALL, wanted[0].load_device, keep_loaded=keep)


def _refuse_left_out(patcher: ModelPatcher) -> None:
    """ValueError for a LoRA on a layer that cannot cast: ComfyUI applies it only to a model that is loaded in full."""
    modules = dict(patcher.model.named_modules())
    for key in patcher.patches:
        module = modules.get(key.rpartition(".")[0])
        alone = module is not None and not any(True for child in module.children() for _ in child.parameters())
        if alone and not hasattr(module, "comfy_cast_weights") and key not in patcher.backup:
            raise ValueError(
                f"a LoRA on the MODEL changes {key}, and ComfyUI leaves that out of a model that is loaded in part: "
                "set base_weights to 'full', or take the LoRA off"
            )


@contextmanager
def recomputing(models: Sequence[nn.Module]) -> Iterator[None]:
    """Norms and whatever else casts its weight are computed again in backward; every forward is back at the end."""
    modules = [module for model in models for module in model.modules()]
    layers = [m for m in modules if hasattr(m, "comfy_cast_weights") and not makes_its_weight(m)]
    with replaced_forwards(layers, lambda layer: _recomputing(layer, layer.forward)):
        yield


def _recomputing(layer: Any, forward: Callable) -> Callable:
    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        casts = layer.comfy_cast_weights or layer.weight_function or layer.bias_function
        if not (casts and torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad):
            return forward(x, *args, **kwargs)
        return _Recomputed.apply(x, lambda given: forward(given, *args, **kwargs))

    return call


class _Recomputed(torch.autograd.Function):
    """A layer that keeps its input and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable) -> Tensor:
        ctx.call = forward
        ctx.save_for_backward(x)
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.call(x)
        return torch.autograd.grad(output, x, grads[0])[0], None
