"""The embedded models as ordinary MODEL, CLIP and VAE objects, built from ComfyUI's own classes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .tiny_text import CONTEXT_WIDTH, TinyTextModel, TinyTokenizer


MODELS_DIR = Path(__file__).resolve().parent.parent / "models"
TEXT_FILE = MODELS_DIR / "tiny-text.safetensors"

_UNET = {
    "image_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT_WIDTH,
    "num_classes": "sequential",  # the pooled text joins the time embedding, as in SDXL
    "adm_in_channels": CONTEXT_WIDTH,
    "num_heads": -1,
    "num_head_channels": 16,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    # Without it GroupNorm(32) over 32 channels cancels the time embedding (reference/seams-runtime.md, 1.2).
    "use_scale_shift_norm": True,
    "legacy": False,
}
_MMDIT = {
    "input_size": None,
    "num_patches": None,  # positions are computed, not read from a buffer
    "patch_size": 2,
    "in_channels": 3,
    "out_channels": 3,
    "depth": 2,
    "num_blocks": 3,
    "adm_in_channels": CONTEXT_WIDTH,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": CONTEXT_WIDTH, "out_features": 128},
    },
    "qk_norm": "rms",
}


class TinyUNet(comfy.model_base.BaseModel):
    """ComfyUI's U-Net model with the pooled text [B, 128] as its vector conditioning."""

    def encode_adm(self, **kwargs) -> Tensor:
        pooled = kwargs.get("pooled_output")
        return torch.zeros(1, CONTEXT_WIDTH, device=kwargs["device"]) if pooled is None else pooled


@dataclass(frozen=True)
class TinySpec:
    """What one embedded model is; `sampling` is ComfyUI's `sampling_settings`."""

    file: str
    base: type
    model_type: comfy.model_base.ModelType
    network: dict
    sampling: dict = field(default_factory=dict)


TINY_SPECS = {
    "unet-eps": TinySpec("tiny-unet-eps", TinyUNet, comfy.model_base.ModelType.EPS, _UNET),
    "unet-v": TinySpec("tiny-unet-v", TinyUNet, comfy.model_base.ModelType.V_PREDICTION, _UNET, {"zsnr": True}),
    "mmdit-flow": TinySpec(
        "tiny-mmdit-flow",
        comfy.model_base.SD3,
        comfy.model_base.ModelType.FLOW,
        _MMDIT,
        {"shift": 1.0, "multiplier": 1000},
    ),
    # Looks like an eps checkpoint and was finetuned with flow matching, shift 3: Flow Graft says so.
    "unet-graft": TinySpec("tiny-unet-graft", TinyUNet, comfy.model_base.ModelType.EPS, _UNET),
}
TINY_MODELS = tuple(TINY_SPECS)


class TinyLatent(comfy.latent_formats.LatentFormat):
    """3 channels, unscaled: the latent is the picture at an eighth of its size, in [-1, 1]."""

    latent_channels = 3
    latent_rgb_factors = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


class TinyConfig(comfy.supported_models_base.BASE):
    """A model configuration that ComfyUI's BaseModel classes accept; see reference/seams-runtime.md, 1.2."""

    unet_config: ClassVar[dict] = {}
    unet_extra_config: ClassVar[dict] = {}
    latent_format = TinyLatent
    memory_usage_factor = 0.05
    supported_inference_dtypes = (torch.float32,)

    def __init__(self, spec: TinySpec):
        super().__init__(dict(spec.network))
        self.sampling_settings = dict(spec.sampling)
        self.set_inference_dtype(torch.float32, None)


def load_tiny(name: str):
    """The embedded model `name` as (MODEL, CLIP, VAE). ValueError for an unknown name or a missing file."""
    return load_tiny_model(name), load_tiny_clip(), load_tiny_vae()


def load_tiny_model(name: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Also the reload factory of newer ComfyUI's `cached_patcher_init`, hence the second argument."""
    del disable_dynamic  # the tiny patcher is never dynamic
    spec = tiny_spec(name)
    return build_patcher(name, _load(MODELS_DIR / f"{spec.file}.safetensors"))


def build_patcher(
    name: str, state_dict: dict[str, Tensor] | None = None, seed: int = 0
) -> comfy.model_patcher.ModelPatcher:
    """MODEL `name` from a state dict, or with seeded random weights when there is none.

    Built outside inference mode, so that a trainer can differentiate through its parameters as they are.
    """
    spec = tiny_spec(name)
    with torch.inference_mode(False), torch.no_grad():
        model = spec.base(TinyConfig(spec), spec.model_type, device=torch.device("cpu"))
        if state_dict is None:
            initialize(model.diffusion_model, seed)
        else:
            model.diffusion_model.load_state_dict({key: value.float() for key, value in state_dict.items()})
        model.requires_grad_(False).eval()
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=torch.device("cpu")
    )
    patcher.cached_patcher_init = (load_tiny_model, (name,))
    return patcher


def load_tiny_clip() -> comfy.sd.CLIP:
    """The shared text encoder as a CLIP."""
    sd = _load(TEXT_FILE) if TEXT_FILE.exists() else TinyTextModel().initialize().state_dict()

    class Target:
        params: ClassVar[dict] = {}
        clip = TinyTextModel
        tokenizer = TinyTokenizer

    with torch.inference_mode(False), torch.no_grad():
        clip = comfy.sd.CLIP(Target(), embedding_directory=None, parameters=sum(v.numel() for v in sd.values()))
        clip.cond_stage_model.load_state_dict({key: value.float() for key, value in sd.items()})
    return clip


class _Resample(nn.Module):
    """Eight by eight pixels to one latent pixel and back."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)  # ComfyUI asks a VAE for its dtype and device

    def encode(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 8)

    def decode(self, z: Tensor) -> Tensor:
        return nn.functional.interpolate(z, scale_factor=8, mode="nearest")


class TinyVAE(comfy.sd.VAE):
    """A fixed x8 resampling behind ComfyUI's own VAE class; see reference/seams-runtime.md, 1.5."""

    def __init__(self):
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
        self.first_stage_model = _Resample().eval()
        self.downscale_ratio = self.upscale_ratio = 8
        self.latent_channels = TinyLatent.latent_channels
        self.memory_used_encode = self.memory_used_decode = lambda shape, dtype: 64 * shape[-1] * shape[-2]
        self.size = None
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model,
            load_device=self.device,
            offload_device=comfy.model_management.vae_offload_device(),
        )


def load_tiny_vae() -> comfy.sd.VAE:
    with torch.inference_mode(False), torch.no_grad():
        return TinyVAE()


def tiny_spec(name: str) -> TinySpec:
    if name not in TINY_SPECS:
        raise ValueError(f"there is no embedded model {name!r}: choose one of {', '.join(TINY_MODELS)}")
    return TINY_SPECS[name]


@torch.no_grad()
def initialize(network: nn.Module, seed: int) -> None:
    """Seeded weights for a network that ComfyUI built with uninitialized memory.

    Matrices and kernels: normal with variance 1/fan_in; gains of norms: 1; biases: 0; each residual branch's last
    layer and the output layer: 0.02 times that, so that training starts near the identity (as DiT's adaLN-zero).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            if name.endswith(NEAR_ZERO):
                parameter.mul_(0.02)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.fill_(1.0)


NEAR_ZERO = (
    "out_layers.3.weight",  # U-Net ResBlock
    "proj_out.weight",  # U-Net transformer
    "out.2.weight",  # U-Net output
    "adaLN_modulation.1.weight",  # MMDiT
    "final_layer.linear.weight",
)


def _load(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise ValueError(f"{path.name} is missing from the pack's models folder: reinstall the pack")
    return load_file(path)
