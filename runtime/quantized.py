"""Base weights that are stored small: in fp8, in ComfyUI's quantized tensors, in the packed bytes of GGUF packs.

An adapter changes a layer's output and leaves the layer alone, so such a base is trained on as it is. For the length of
a session every layer computes with its dequantized weight: the kernels that quantize a layer's input as well have no
backward pass, or one that is not that of their forward pass.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

from ..training.adapters import plain_storage
from ..training.recast import recast


@contextmanager
def dequantizing(model: nn.Module) -> Iterator[None]:
    """Layers that make their weight in forward and once more in backward, and nothing else; undone at the end."""
    with ExitStack() as stack:
        layers = list(model.modules())
        stack.enter_context(_attribute(comfy.ops, "fp8_linear", lambda layer, x: None))  # "not by this kernel"
        for layer in layers:
            stack.enter_context(_attribute(layer, "_full_precision_mm", True))
        stack.enter_context(recast([layer for layer in layers if makes_its_weight(layer)]))
        yield


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute that is there has another value for a while."""
    if name not in vars(owner):
        yield
        return
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def makes_its_weight(layer: nn.Module) -> bool:
    """Whether a linear layer or a convolution dequantizes, casts or fetches its weight in each forward pass."""
    weight = layer._parameters.get("weight")
    if weight is None or not (hasattr(layer, "in_features") or isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))):
        return False
    return getattr(layer, "comfy_cast_weights", False) or not plain_storage(weight)


def storage_of(network: nn.Module) -> str:
    """How weights of a network are stored, where that is not as 16 or 32 bit floats; "" otherwise."""
    kinds: dict[str, None] = {}
    for layer in network.modules():
        weight = layer._parameters.get("weight")
        if weight is not None and not plain_storage(weight):
            packed = type(weight) is not nn.Parameter
            kinds[type(weight).__name__ if packed else str(weight.dtype).removeprefix("torch.")] = None
    return ", ".join(sorted(kinds))


def ordinary(tensor: Tensor) -> Tensor:
    """An inference tensor's memory as a tensor that autograd takes, of the same class and with the same attributes."""
    view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    view.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    if type(tensor) not in (Tensor, nn.Parameter):
        view = view.as_subclass(type(tensor))
        # One dictionary: what is noted on one of them (GGUF's patches) is noted on both.
        object.__setattr__(view, "__dict__", tensor.__dict__)
    return view
