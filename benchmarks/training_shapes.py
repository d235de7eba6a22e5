"""Networks in a published size that `bench training --shape` trains, what a sample of them costs, what GPUs can do.

Weights are random, in bfloat16, each parameter with memory of its own. They wait on the CPU and every trainer loads
them itself, as in ComfyUI.
"""

import dataclasses
from collections.abc import Callable

import comfy.model_patcher
import torch
from torch import Tensor, nn

from tidetable.runtime.gradients import memory_saving

from . import published
from .counting import LiveBytes, flop_counter
from .published import PUBLISHED, Published, Shape, torch_attention
from .training_arms import How, WholeNetwork
from .training_cases import Data, Passes


SAMPLES = 16
_SDXL = PUBLISHED["sdxl"]
_SMALL = {
    **_SDXL.network,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 32,
    "num_head_channels": 32,
}
SHAPES = {
    "sdxl": _SDXL,
    "tiny-sdxl": dataclasses.replace(_SDXL, network=_SMALL, text=32, full=Shape(8, 7)),
}
"""`tiny-sdxl`: SDXL's class and kinds of blocks at a size that a CPU trains in a second."""

PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}
"""torch's name of a GPU -> FLOP/s of dense bfloat16 products summed in float32, as NVIDIA's data sheets have them (for
the GeForce cards: the white papers on GA102 and Ada). Exact names: a part of an H100 has another one, and no entry."""


def peak_flops(device: torch.device) -> float | None:
    """What the device can do at most, None where this is not known."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def build(name: str, device: torch.device, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """MODEL of a shape for `device`, its weights on the CPU. Its own reload factory, as newer ComfyUI's node needs."""
    del disable_dynamic
    model, cpu = SHAPES[name], torch.device("cpu")
    with torch.inference_mode(False), torch.no_grad():
        shared = published.build(model, model.full, cpu)
        own_weights(shared.model.diffusion_model)
    shared.model.diffusion_model.register_forward_pre_hook(Passes.note)
    patcher = comfy.model_patcher.ModelPatcher(shared.model, load_device=device, offload_device=cpu)
    patcher.model_options = shared.model_options
    patcher.cached_patcher_init = (build, (name, device))
    return patcher


def own_weights(network: nn.Module) -> None:
    """Memory of its own for each parameter, as a checkpoint's have: how much of it there is counts here."""
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()


def bytes_of(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


def make_data(name: str) -> Data:
    """Latents of the full size, as nodes hand them over: made in inference mode."""
    model, generator = SHAPES[name], torch.Generator().manual_seed(1)
    side = model.full.side
    with torch.inference_mode():
        latents = torch.randn(SAMPLES, *model.latent, side, side, generator=generator)
        positive = [published.make_prompt(model, model.full, seed) for seed in range(SAMPLES)]
    return Data([{"samples": latent[None]} for latent in latents], positive)


def flops_per_sample(model: Published) -> int:
    """Model FLOPs of a LoRA step for one sample: what MFU counts (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    Counted by torch over a forward and a backward pass on shapes alone: the network once; the gradient of every
    activation that has one, but none of the frozen weights (so twice the forward pass, not three times; three times for
    the products inside attention, where both factors are activations); the adapters with their own gradients. Attention
    is counted in its plain form: what fused kernels and gradient checkpointing compute again is no model FLOP. Norms,
    the loss and the optimizer are not counted.
    """
    meta = torch.device("meta")
    network = published.on_meta(model, model.full).diffusion_model.requires_grad_(False)
    x, t, conditions = meta_inputs(model)
    with flop_counter() as counter, WholeNetwork(dict(network.named_modules()), meta).installed():
        output = network(x, t, **conditions)
        output.backward(torch.empty_like(output))
    return counter.get_total_flops()


def bytes_of_step(model: Published, rows: int, blocks: bool) -> int:
    """The most bytes of a LoRA step with `rows` rows, on shapes alone: weights, adapters with gradients and AdamW's two
    moments, and what a forward and a backward pass keep. What kernels use for themselves comes on top.
    """
    network = published.on_meta(model, model.full).diffusion_model.requires_grad_(False)
    adapters = WholeNetwork(dict(network.named_modules()), torch.device("meta"))
    x, t, conditions = meta_inputs(model, rows, fused_attention)
    memory = memory_saving(network, How(checkpointing=blocks).memory())
    with LiveBytes(meta=True) as live, adapters.installed(), memory:
        network(x, t, **conditions).float().square().mean().backward()
    return bytes_of(network) + 3 * sum(parameter.nbytes for parameter in adapters.trainable()) + live.peak


def meta_inputs(
    model: Published, rows: int = 1, attention: Callable[..., Tensor] = torch_attention
) -> tuple[Tensor, Tensor, dict]:
    """(x_t, t, the rest) that the network takes, as shapes."""

    def shape(*sizes: int) -> Tensor:
        return torch.empty(rows, *sizes, dtype=torch.bfloat16, device="meta")

    conditions = {
        "context": shape(model.full.tokens, model.text),
        "y": shape(model.network["adm_in_channels"]),
        "transformer_options": {"optimized_attention_override": attention},
    }
    return shape(*model.latent, model.full.side, model.full.side), torch.empty(rows, device="meta"), conditions


def fused_attention(function, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **kwargs) -> Tensor:
    """An `optimized_attention_override` that keeps for the backward pass what fused kernels keep. On the meta device
    torch itself would choose the plain form, which writes the whole matrix out."""
    q, k, v = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0].transpose(1, 2).flatten(-2)
