"""Low-rank adapters as functions of a layer's input: which layers get one, how they start, and both of their forms.

LoRA (Hu et al. 2021, arXiv:2106.09685): W' = W + lora_alpha / rank · up @ down. The *bypass* form used in training
leaves the layer alone and adds `lora_alpha / rank · up(down(x))` to its output, so the base may be frozen, quantized or
patched.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import LoRAConfig, Targets


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


class LoRA(nn.Module):
    """One layer's adapter: down [r, in, (kh, kw)] and up [out, r, (1, 1)] in fp32; forward gives the bypass term."""

    def __init__(self, layer: Any, config: LoRAConfig, device: torch.device, generator: torch.Generator):
        super().__init__()
        self.convolution: dict[str, Any] | None = None
        if _is_linear(layer):
            inputs, outputs, kernel, ones = layer.in_features, layer.out_features, (), ()
        else:
            inputs, outputs, kernel, ones = layer.in_channels, layer.out_channels, layer.kernel_size, (1, 1)
            self.convolution = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        rank = min(config.rank, inputs * math.prod(kernel), outputs)
        # Kaiming uniform with a = sqrt(5), torch's own default for linear layers: a bound of 1/sqrt(fan_in).
        bound = 1 / math.sqrt(inputs * math.prod(kernel))
        down = (torch.rand(rank, inputs, *kernel, generator=generator) * 2 - 1) * bound
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, *ones, device=device))
        # The strength the user asked for stays lora_alpha / rank where a narrow layer forces a smaller rank.
        self.lora_alpha = config.lora_alpha * rank / config.rank
        self.scale = self.lora_alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if self.convolution is None:
            return nn.functional.linear(nn.functional.linear(x, down), up) * self.scale
        return nn.functional.conv2d(nn.functional.conv2d(x, down, **self.convolution), up) * self.scale


class Switch:
    """Adapters that can be switched off for a forward pass, in which the network is what it is without them."""

    enabled = True

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def while_enabled(self, hook: Any) -> Any:
        """A forward hook that leaves the output alone while they are off."""
        return lambda layer, args, output: hook(layer, args, output) if self.enabled else output


def delta_weight(lora: LoRA) -> Tensor:
    """W' - W of the adapter, in the shape of the layer's weight."""
    return ((lora.up.flatten(1) @ lora.down.flatten(1)) * lora.scale).reshape(lora.up.shape[0], *lora.down.shape[1:])


class LoRANetwork(Switch, nn.Module):
    """Adapters for a set of layers. With `up` at zero it is the identity, bit for bit."""

    def __init__(self, layers: Mapping[str, nn.Module], config: LoRAConfig, device: torch.device):
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        self.layers = dict(layers)
        self.adapters = {name: LoRA(layer, config, device, generator) for name, layer in layers.items()}

    def trainable(self) -> list[nn.Parameter]:
        return [parameter for adapter in self.adapters.values() for parameter in adapter.parameters()]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Forward hooks on the layers, removed at the end whatever happens."""
        hooks = {name: self.while_enabled(_bypass(adapter)) for name, adapter in self.adapters.items()}
        with hooked([(layer, hooks[name]) for name, layer in self.layers.items()]):
            yield

    def saved(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(layer name, suffix -> tensor) of every adapter, as detached fp32 copies on the CPU."""
        for name, adapter in self.adapters.items():
            down, up = (factor.detach().float().cpu().clone() for factor in (adapter.down, adapter.up))
            alpha = torch.tensor(adapter.lora_alpha)
            yield name, {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}


@contextmanager
def hooked(hooks: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Forward hooks on modules, removed at the end whatever happens."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bypass(adapter: LoRA):
    return lambda layer, args, output: output + adapter(args[0])


def _is_linear(module: nn.Module) -> bool:
    # Quantized layers of newer ComfyUI are linear by name and interface, not by inheritance.
    return type(module).__name__ == "Linear" and hasattr(module, "in_features")


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1
