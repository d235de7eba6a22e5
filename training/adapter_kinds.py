"""Adapters of several kinds, as ComfyUI's loaders read them: the change of a layer's weight, and its bypass form.

LoRA: Hu et al. 2021, arXiv:2106.09685. DoRA: Liu et al. 2024, arXiv:2402.09353. LoHa: Hyeon-Woo et al. 2021 (FedPara),
arXiv:2108.06098. LoKr: Yeh et al. 2023 (LyCORIS), arXiv:2309.14859. Parameters are fp32 whatever the layer computes in.
The *bypass* form used in training leaves the layer alone and changes its output: the base may be quantized or patched.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_settings import AdapterConfig
from .adapters import _is_linear, bias_of, hooked, weight_of
from .data import step_generator


DROPOUT_STREAM = 3
"""Of `step_generator`; sets the dropouts apart from the noise of the same (seed, step)."""


class Adapter(nn.Module):
    """One layer's adapter. Subclasses say what `delta` is; `layer_shape` is the weight's [out, in, (kh, kw)]."""

    last: str
    """The parameter that starts at zero; scaling it scales the change of the weight."""

    def __init__(self, layer: Any, rank: int, scale: float):
        super().__init__()
        self.convolution: dict[str, Any] | None = None
        if _is_linear(layer):
            self.layer_shape = (layer.out_features, layer.in_features)
        else:
            self.layer_shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
            self.convolution = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self.rank, self.scale = rank, scale
        self.mask: Tensor | None = None
        """[rank] factors of this step's rank dropout; None is off."""
        self.dropped = False

    def forward(self, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        """The layer's output with the adapter, from its input and its own output."""
        del layer
        return output + self._through(x, self.delta())

    def delta(self) -> Tensor:
        """Change of the weight, in its shape, with this step's dropout."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Suffix -> tensor, as the file has them."""
        names = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return {**names, "alpha": torch.tensor(self.scale * self.rank)}

    def shorten(self, max_norm: float) -> None:
        """Bring the norm of the change of the weight down to max_norm, where it is longer."""
        norm = self.delta().norm().item()
        if norm > max_norm:
            getattr(self, self.last).mul_(max_norm / norm)

    def _through(self, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        return nn.functional.linear(x, weight) if self.convolution is None else self._convolve(x, weight)

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        assert self.convolution is not None
        return nn.functional.conv2d(x, weight, **self.convolution)

    def _masked(self, factor: Tensor) -> Tensor:
        return factor if self.mask is None else factor * self.mask.to(factor).reshape(-1, *[1] * (factor.ndim - 1))


def add_product(
    output: Tensor, x: Tensor, up: Tensor, down: Tensor, scale: float, convolution: dict[str, Any] | None
) -> Tensor:
    """output + scale · up(down(x)), with sum and scale in the pass that needs them anyway; in x's dtype."""
    up, down = up.to(x.dtype), down.to(x.dtype)
    if convolution is not None:
        term = nn.functional.conv2d(nn.functional.conv2d(x, down, **convolution), up)
    elif output.dtype == x.dtype:
        inner = nn.functional.linear(x, down).reshape(-1, down.shape[0])
        return torch.addmm(output.reshape(-1, up.shape[0]), inner, up.t(), alpha=scale).view(output.shape)
    else:
        term = nn.functional.linear(nn.functional.linear(x, down), up)
    return torch.add(output, term, alpha=scale)


class LowRank(Adapter):
    """scale · up @ down; with PiSSA less the product at the start, so that the change begins at zero."""

    last = "up"
    start_up: Tensor | None
    start_down: Tensor | None

    def __init__(self, layer: Any, rank: int, scale: float, generator: torch.Generator, pissa: bool = False):
        super().__init__(layer, rank, scale)
        out, inputs, kernel = self.layer_shape[0], self.layer_shape[1], self.layer_shape[2:]
        ones = (1,) * len(kernel)
        bound = 1 / math.sqrt(inputs * math.prod(kernel))
        # Kaiming uniform with a = sqrt(5), torch's own default for linear layers: a bound of 1/sqrt(fan_in).
        down = (torch.rand(rank, inputs, *kernel, generator=generator) * 2 - 1) * bound
        up = torch.zeros(out, rank, *ones)
        start = None
        if pissa:
            u, s, v = torch.linalg.svd(weight_of(layer).flatten(1).cpu(), full_matrices=False)
            root = (s[:rank] / scale).sqrt()
            up = (u[:, :rank] * root).reshape(up.shape).contiguous()
            down = (v[:rank] * root[:, None]).reshape(down.shape).contiguous()
            start = up.clone(), down.clone()
        for name, value in zip(("start_up", "start_down"), start or (None, None), strict=True):
            self.register_buffer(name, value)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """What PiSSA subtracts: up and down as they began."""
        return None if self.start_up is None or self.start_down is None else (self.start_up, self.start_down)

    def term(self, x: Tensor) -> Tensor:
        """`delta` applied to x, without forming it."""
        out = self._product(x, self.up, self.down)
        return (out if self.start is None else out - self._product(x, *self.start)) * self.scale

    def forward(self, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        del layer
        if self.start is not None:  # the difference of both products comes first: it is 0 at the start, bit for bit
            return output + self.term(x)
        return add_product(output, x, self.up, self._masked(self.down), self.scale, self.convolution)

    def delta(self) -> Tensor:
        product = self.up.flatten(1) @ self._masked(self.down).flatten(1)
        if self.start is not None:
            product = product - self.start[0].flatten(1) @ self._masked(self.start[1]).flatten(1)
        return (product * self.scale).reshape(self.layer_shape)

    def tensors(self) -> dict[str, Tensor]:
        up, down = self.up.detach(), self.down.detach()
        if self.start is not None:  # the subtracted start is a second half of the rank
            up, down = torch.cat([up, -self.start[0]], 1), torch.cat([down, self.start[1]], 0)
        alpha = torch.tensor(self.scale * down.shape[0])
        return {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}

    def _product(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        inner = self._through(x, self._masked(down))
        up = up.to(x.dtype)
        return nn.functional.linear(inner, up) if self.convolution is None else nn.functional.conv2d(inner, up)


class DoRA(LowRank):
    """(W + delta) · magnitude / norm, as ComfyUI reads `dora_scale`.

    Of each output, its norm is that of W; of each input, that of W + delta. These are the loader's two conventions: the
    first differs from the paper's, which has the norm of W + delta for each output.
    """

    norm: Tensor

    def __init__(self, layer: Any, rank: int, scale: float, generator: torch.Generator, by_input: bool):
        super().__init__(layer, rank, scale, generator)
        self.by_input = by_input
        if by_input and self.layer_shape[0] == 1:
            raise ValueError("a layer with one output has no norm of each input in a LoRA file: use kind 'dora'")
        norm = self._norm(weight_of(layer))
        self.register_buffer("norm", norm)
        self.magnitude = nn.Parameter(norm.clone())

    def forward(self, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        if self.by_input:
            weight = weight_of(layer, x.device)
            changed = weight + self.delta()
            return output + self._through(x, changed * (self.magnitude / self._norm(changed)) - weight)
        ratio = (self.magnitude / self.norm).flatten().to(x.dtype)
        shape = (-1,) if self.convolution is None else (-1, 1, 1)
        without_bias = output if layer.bias is None else output - bias_of(layer, x.device).to(output).reshape(shape)
        ratio = ratio.reshape(shape)
        return output + (ratio - 1) * without_bias + ratio * self.term(x)

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "dora_scale": self.magnitude.detach()}

    def _norm(self, weight: Tensor) -> Tensor:
        kept = 1 if self.by_input else 0
        axes = [axis for axis in range(weight.ndim) if axis != kept]
        return torch.linalg.vector_norm(weight, dim=axes, keepdim=True) + torch.finfo(torch.float32).eps


class LoHa(Adapter):
    """scale · (w1_a @ w1_b) * (w2_a @ w2_b)."""

    last = "hada_w2_a"

    def __init__(self, layer: Any, rank: int, scale: float, generator: torch.Generator):
        super().__init__(layer, rank, scale)
        out, inputs = self.layer_shape[0], math.prod(self.layer_shape[1:])
        self.hada_w1_a = nn.Parameter(torch.randn(out, rank, generator=generator) * 0.1)
        self.hada_w1_b = nn.Parameter(torch.randn(rank, inputs, generator=generator))
        self.hada_w2_a = nn.Parameter(torch.zeros(out, rank))
        self.hada_w2_b = nn.Parameter(torch.randn(rank, inputs, generator=generator))

    def delta(self) -> Tensor:
        first = self.hada_w1_a @ self._masked(self.hada_w1_b)
        return (first * (self.hada_w2_a @ self.hada_w2_b) * self.scale).reshape(self.layer_shape)


class LoKr(Adapter):
    """scale · kron(w1, w2_a @ w2_b), with the sides of w1 at most `factor`."""

    last = "lokr_w2_a"

    def __init__(self, layer: Any, rank: int, scale: float, generator: torch.Generator, factor: int):
        super().__init__(layer, rank, scale)
        rows, columns = (_side(size, factor) for size in self.layer_shape[:2])
        out, inputs = self.layer_shape[0] // rows, math.prod(self.layer_shape[1:]) // columns
        rank = self.rank = min(rank, out, inputs)
        uniform = (torch.rand(*shape, generator=generator) * 2 - 1 for shape in ((rows, columns), (rank, inputs)))
        self.lokr_w1 = nn.Parameter(next(uniform) / math.sqrt(columns))
        self.lokr_w2_a = nn.Parameter(torch.zeros(out, rank))
        self.lokr_w2_b = nn.Parameter(next(uniform) / math.sqrt(inputs))

    def delta(self) -> Tensor:
        second = self.lokr_w2_a @ self._masked(self.lokr_w2_b)
        return (torch.kron(self.lokr_w1, second) * self.scale).reshape(self.layer_shape)


def build_adapter(name: str, layer: Any, config: AdapterConfig, generator: torch.Generator) -> Adapter:
    """The adapter of a layer. Its strength stays what was asked for where a narrow layer forces a smaller rank."""
    wanted = config.rank_of(name)
    rank = min(wanted, widest(layer))
    scale = config.scale_of(wanted)
    if config.kind == "lora":
        return LowRank(layer, rank, scale, generator, config.initialization == "pissa")
    if config.kind == "loha":
        return LoHa(layer, rank, scale, generator)
    if config.kind == "lokr":
        return LoKr(layer, rank, scale, generator, config.lokr_factor)
    return DoRA(layer, rank, scale, generator, config.kind == "dora_input")


def widest(layer: Any) -> int:
    """The rank of a layer's weight at most."""
    if _is_linear(layer):
        return min(layer.in_features, layer.out_features)
    return min(layer.in_channels * math.prod(layer.kernel_size), layer.out_channels)


class AdapterNetwork:
    """Adapters for a set of layers; `adapters` are existing ones to go on with.

    With the zero or the PiSSA start it is the identity, bit for bit.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        config: AdapterConfig,
        device: torch.device,
        adapters: Mapping[str, Adapter] | None = None,
    ):
        generator = torch.Generator().manual_seed(config.seed)
        self.config, self.layers, self.enabled = config, dict(layers), True
        if adapters is not None:
            self.adapters = {name: adapter.to(device) for name, adapter in adapters.items()}
            return
        self.adapters = {
            name: build_adapter(name, layer, config, generator).to(device) for name, layer in layers.items()
        }

    def trainable(self) -> list[nn.Parameter]:
        return [parameter for adapter in self.adapters.values() for parameter in adapter.parameters()]

    def saved(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(layer name, suffix -> tensor) of every adapter, as fp32 copies on the CPU."""
        for name, adapter in self.adapters.items():
            yield name, {key: value.float().cpu().clone() for key, value in adapter.tensors().items()}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Forward hooks on the layers, removed at the end whatever happens."""
        hooks = [(layer, self._hook(self.adapters[name])) for name, layer in self.layers.items()]
        with hooked(hooks):
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switched off, for a forward pass of the network as it is without them."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def _hook(self, adapter: Adapter) -> Callable[[Any, tuple, Tensor], Tensor]:
        hook = _bypass(adapter)
        return lambda layer, args, output: hook(layer, args, output) if self.enabled else output

    @contextmanager
    def dropout(self, step: int) -> Iterator[None]:
        """The dropouts of a training step, a function of (seed, step); off again at the end."""
        generator, config = step_generator(self.config.seed, step, DROPOUT_STREAM), self.config
        if not (config.rank_dropout or config.module_dropout):
            yield
            return
        try:
            for adapter in self.adapters.values():
                adapter.dropped = torch.rand((), generator=generator).item() < config.module_dropout
                kept = torch.rand(adapter.rank, generator=generator) >= config.rank_dropout
                adapter.mask = kept / (1 - config.rank_dropout) if config.rank_dropout else None
            yield
        finally:
            for adapter in self.adapters.values():
                adapter.mask, adapter.dropped = None, False

    @torch.no_grad()
    def limit_norms(self) -> None:
        """Scale every change of a weight that is longer than max_norm down to it. 0 is off."""
        for adapter in self.adapters.values() if self.config.max_norm else ():
            adapter.shorten(self.config.max_norm)

    def listing(self) -> str:
        """Every layer with its rank, one a line, and where it is smaller than asked for."""
        lines = []
        for name, adapter in self.adapters.items():
            wanted = 0 if self.config.continue_from else self.config.rank_of(name)
            note = f" (rank {wanted} is more than this layer has)" if adapter.rank < wanted else ""
            lines.append(f"  {name}: rank {adapter.rank}{note}")
        return "\n".join(lines)


def _bypass(adapter: Adapter):
    def hook(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        changed = adapter(layer, args[0], output)
        # A dropped adapter stays in the graph: with every one of them dropped, backward would have nothing to do.
        return output + 0 * (changed - output) if adapter.dropped else changed

    return hook


def _side(size: int, factor: int) -> int:
    """The largest divisor of size that is at most factor and sqrt(size)."""
    return max(d for d in range(1, min(factor, math.isqrt(size)) + 1) if size % d == 0)
