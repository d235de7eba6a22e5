"""One small MODEL per family, made by ComfyUI's own config and network classes, as its checkpoint loader makes them."""

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

from tidetable.runtime.tiny import initialize


_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 32,
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "legacy": False,
}
_SDXL = {**_UNET, "num_classes": "sequential", "adm_in_channels": 32 + 6 * 256, "model_channels": 64}
_SD3 = {
    "input_size": None,
    "num_patches": None,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "depth": 1,
    "num_blocks": 2,
    "adm_in_channels": 32,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 64}},
    "qk_norm": "rms",
    "pos_embed_scaling_factor": None,
}
_FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 32,
    "context_in_dim": 32,
    "hidden_size": 96,
    "mlp_ratio": 2.0,
    "num_heads": 3,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    **({"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}),  # newer ComfyUI
}
_QWEN = {
    "image_model": "qwen_image",
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": 32,
    "axes_dims_rope": (8, 12, 12),
}
_NEXTDIT = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 256,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 8,
    "n_kv_heads": 8,
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.0,
    "qk_norm": True,
    "cap_feat_dim": 32,
    "axes_dims": [8, 12, 12],
    "axes_lens": [64, 64, 64],
    "rope_theta": 256.0,
}
_AURA = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "dim": 64,
    "n_layers": 2,
    "n_double_layers": 1,
    "n_heads": 2,
    "global_conddim": 64,
    "cond_seq_dim": 32,
    "max_seq": 64,
}
_WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "in_dim": 16,
    "out_dim": 16,
    "dim": 96,
    "ffn_dim": 128,
    "freq_dim": 32,
    "text_dim": 32,
    "num_heads": 3,
    "num_layers": 1,
}
# Name -> (config class in comfy.supported_models, network).
ZOO = {
    "sd15": ("SD15", _UNET),
    "sdxl": ("SDXL", _SDXL),
    "sd3": ("SD3", _SD3),
    "auraflow": ("AuraFlow", _AURA),
    "flux": ("Flux", _FLUX),
    "flux_schnell": ("FluxSchnell", _FLUX),
    "qwen_image": ("QwenImage", _QWEN),
    "z_image": ("ZImage", {**_NEXTDIT, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}),
    "lumina2": ("Lumina2", _NEXTDIT),
    "wan": ("WAN21_T2V", _WAN),
}
FLOW = tuple(name for name in ZOO if name not in ("sd15", "sdxl"))
LATENT = {
    "sd15": (1, 4, 8, 8),
    "sdxl": (1, 4, 8, 8),
    "auraflow": (1, 4, 8, 8),
    "qwen_image": (1, 16, 1, 8, 8),
    "wan": (1, 16, 1, 8, 8),
}


def zoo(name: str, keys: dict[str, torch.Tensor] | None = None, **changed) -> comfy.model_patcher.ModelPatcher:
    """The family's MODEL with seeded random weights, in float32 on the CPU; `keys` are what its checkpoint holds.

    `changed` are fields of the network with other values than in `ZOO`.
    """
    config_class, network = ZOO[name]
    config = getattr(comfy.supported_models, config_class)({**network, **changed})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(keys or {}, "", device=torch.device("cpu"))
    initialize(model.diffusion_model, seed=0)
    model.requires_grad_(False).eval()
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def discrete(model, sampling: str, zsnr: bool = False):
    """`model` after ComfyUI's own ModelSamplingDiscrete node."""
    return ModelSamplingDiscrete().patch(model, sampling, zsnr)[0]
