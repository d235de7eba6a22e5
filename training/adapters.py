"""Which layers can carry an adapter, and the hooks by which it acts. What an adapter is: `adapter_kinds`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import Targets


_ATTENTION = re.compile(r"(attn|attention)[^.]*\.|single_blocks\.\d+\.linear[12]$")
_MLP = re.compile(r"(^|[._])(ff|ffn|mlp|feed_forward)\d*\.|\.proj_(in|out)$|_mlp\.")


def select_targets(modules: Mapping[str, nn.Module], preset: Targets) -> dict[str, nn.Module]:
    """The layers of a preset, by name. Raises ValueError where the network has none of them.

    attention: projections of attention layers (in Flux's single blocks: the fused ones). attention_mlp: and the feed-
    forward layers beside them. linear: every linear layer. linear_conv: and every ungrouped 2-D convolution.
    """
    linear = {name: module for name, module in modules.items() if _is_linear(module)}
    if preset == "attention":
        chosen = {name: module for name, module in linear.items() if _ATTENTION.search(name)}
    elif preset == "attention_mlp":
        chosen = {name: m for name, m in linear.items() if _ATTENTION.search(name) or _MLP.search(name)}
    elif preset == "linear":
        chosen = linear
    else:
        chosen = {name: m for name, m in modules.items() if _is_linear(m) or _is_conv(m)}
    if not chosen:
        kinds = sorted({type(module).__name__ for module in modules.values()})
        raise ValueError(
            f"targets {preset!r} matches no layer of this network (it has {', '.join(kinds)}): try 'linear'"
        )
    return chosen


@contextmanager
def hooked(hooks: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Forward hooks on modules, removed at the end whatever happens."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def weight_of(layer: Any, device: torch.device | None = None) -> Tensor:
    """What a layer multiplies with, in fp32, however and wherever it is stored. ValueError for packed convolutions."""
    weight = layer.weight
    if plain_storage(weight):
        return as_computed(layer, "weight", device).float()
    if _is_linear(layer):  # the layer itself says it, of unit vectors
        unit = torch.eye(layer.in_features, device=device or weight.device)
        columns = layer.forward(unit) if layer.bias is None else layer.forward(unit) - bias_of(layer, device)
        return columns.t().contiguous()
    if type(weight) is nn.Parameter and weight.is_floating_point():
        return as_computed(layer, "weight", device).float()
    raise ValueError(
        f"the weight of this convolution ({type(weight).__name__}, {weight.dtype}) cannot be read as DoRA and PiSSA "
        "need it: use kind 'lora', 'loha' or 'lokr' with start 'zero'"
    )


@torch.no_grad()
def bias_of(layer: Any, device: torch.device | None = None) -> Tensor:
    """The bias of a layer that has one, in a dtype to compute with."""
    if plain_storage(layer.bias) and plain_storage(layer.weight):
        return as_computed(layer, "bias", device)
    if not _is_linear(layer):
        return as_computed(layer, "bias", device).float()
    return layer.forward(torch.zeros(1, layer.in_features, device=device or layer.weight.device))[0]


def as_computed(layer: Any, name: str, device: torch.device | None = None) -> Tensor:
    """A layer's weight or bias as its forward pass has it: ComfyUI patches what stays in main memory in each call."""
    tensor, patches = getattr(layer, name).detach(), getattr(layer, f"{name}_function", ())
    if device is not None:
        tensor = tensor.to(device)
    if patches:
        tensor = tensor.to(torch.float32, copy=True)
    for patch in patches:
        tensor = patch(tensor)
    return tensor


def plain_storage(tensor: Tensor) -> bool:
    """An ordinary tensor of 16 or 32 bit floats."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and tensor.element_size() >= 2


def _is_linear(module: nn.Module) -> bool:
    # Quantized layers of newer ComfyUI are linear by name and interface, not by inheritance.
    return type(module).__name__ == "Linear" and hasattr(module, "in_features")


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1
