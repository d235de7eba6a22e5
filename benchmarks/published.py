"""ComfyUI's own models in the shapes of the published checkpoints, with random weights in bfloat16.

Parameters of one shape share their memory, so that a model of 12 billion fits anywhere: Flux takes 0.6 GB. What is
computed is the same; only a processor's cache may notice.
"""

from dataclasses import dataclass, field

import comfy.ldm.modules.attention as comfy_attention
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """A size to run a model at: latent pixels on a side, text tokens, and what its network has in other numbers."""

    side: int
    tokens: int
    network: dict = field(default_factory=dict)
    blocks: str = "auto"
    """Which are perturbed, in the words of our node."""


@dataclass(frozen=True)
class Published:
    """A model: its class in `comfy.supported_models`, its network as ComfyUI detects it, and widths of its inputs."""

    config: str
    network: dict
    latent: tuple[int, ...]
    """Channels, and frames where the model has any."""
    text: int
    pooled: int
    full: Shape
    """The published size at 1024 x 1024 pixels (SD1.5: 512 x 512)."""
    timed: Shape
    """One that a CPU can run in seconds."""
    scheduler: str
    """Of a usual run."""

    @property
    def unet(self) -> bool:
        return "num_res_blocks" in self.network


_UNET = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "legacy": False,
}
_SD15 = {
    **_UNET,
    "adm_in_channels": None,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "num_heads": 8,
}
_SDXL = {
    **_UNET,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "num_head_channels": 64,
}
_FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    **({"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}),  # newer ComfyUI
}
_QWEN = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}

PUBLISHED = {
    "sd15": Published("SD15", _SD15, (4,), 768, 768, Shape(64, 77), Shape(32, 77), "normal"),
    "sdxl": Published("SDXL", _SDXL, (4,), 2048, 1280, Shape(128, 77), Shape(32, 77), "normal"),
    "flux": Published(
        "Flux",
        _FLUX,
        (16,),
        4096,
        768,
        Shape(128, 512, blocks="single 10"),
        Shape(32, 32, {"depth": 2, "depth_single_blocks": 4}, blocks="single 1"),
        "simple",
    ),
    "qwen": Published(
        "QwenImage", _QWEN, (16, 1), 3584, 768, Shape(128, 128), Shape(32, 8, {"num_layers": 6}), "simple"
    ),
}


def build(model: Published, shape: Shape, device: torch.device) -> comfy.model_patcher.ModelPatcher:
    """The MODEL; every row goes into one forward, as if memory always allowed, and attention is torch's, as on GPUs."""
    made = on_meta(model, shape)
    share_weights(made.diffusion_model, device)
    made.memory_usage_factor = 0.0
    patcher = comfy.model_patcher.ModelPatcher(made, load_device=device, offload_device=device)
    options = patcher.model_options["transformer_options"]
    options["optimized_attention_override"] = torch_attention
    return patcher


def on_meta(model: Published, shape: Shape) -> comfy.model_base.BaseModel:
    """The model in bfloat16, its weights shapes without memory."""
    config = getattr(comfy.supported_models, model.config)({**model.network, **shape.network})
    config.set_inference_dtype(torch.bfloat16, None)
    return config.get_model({}, "", device=torch.device("meta"))


def torch_attention(function, *args, **kwargs) -> Tensor:
    """An `optimized_attention_override` that takes ComfyUI's fused attention whatever it would choose on a CPU."""
    return comfy_attention.attention_pytorch(*args, **kwargs)


def share_weights(network: nn.Module, device: torch.device) -> None:
    """Give a network made on the meta device random weights, one tensor for all parameters of a shape."""
    generator, made = torch.Generator().manual_seed(0), {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            key = (parameter.shape, parameter.dtype)
            if key not in made:
                made[key] = random_weight(parameter, generator).to(device)
            # A parameter of its own, so that whoever counts parameters gets the published number.
            module._parameters[name] = nn.Parameter(made[key], requires_grad=False)


def random_weight(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Of unit gain; vectors, which are biases as well as norms, are 0.1 everywhere."""
    if parameter.ndim < 2:
        return torch.full(parameter.shape, 0.1, dtype=parameter.dtype)
    random = torch.randn(parameter.shape, generator=generator, dtype=torch.bfloat16)
    return (random / parameter[0].numel() ** 0.5).to(parameter.dtype)


def make_latent(model: Published, shape: Shape) -> Tensor:
    return torch.randn(1, *model.latent, shape.side, shape.side, generator=torch.Generator().manual_seed(0))


def make_prompt(model: Published, shape: Shape, seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, shape.tokens, model.text, generator=generator)
    return [[text, {"pooled_output": torch.randn(1, model.pooled, generator=generator)}]]
