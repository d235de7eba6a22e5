"""Adapter factors to and from the names that ComfyUI's own loader understands for every architecture.

`diffusion_model.<module path>.lora_up.weight`, `.lora_down.weight` and `.alpha` (comfy/lora.py loads these for U-Nets
and DiTs alike). alpha is always written: without it loaders assume lora_alpha = rank.
"""

from collections.abc import Iterator
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor, nn

from ..training.adapter_kinds import AdapterNetwork


FIRST_FACTORS = (".lora_up.weight", ".hada_w1_a", ".lokr_w1", ".lokr_w1_a")
"""One of these for each adapter of a file, whatever its kind."""
TEXT = ("lora_te", "text_encoder")
"""How the names begin of what belongs to the text encoder."""


class LoRAModel(dict[str, Tensor]):
    """ComfyUI's LORA_MODEL, a state dict, with the metadata of the run that made it."""

    metadata: dict[str, str]
    diffusers: Any = None
    """`diffusers_format.diffusers_names` of the model it was trained on; None where that is not known."""

    def __init__(self, tensors: dict[str, Tensor], metadata: dict[str, str]):
        super().__init__(tensors)
        self.metadata = metadata


def to_lora_model(network: AdapterNetwork, metadata: dict[str, str]) -> LoRAModel:
    """The trained adapter as LORA_MODEL: fp32, on the CPU, independent of the training run."""
    tensors: dict[str, Tensor] = {}
    with torch.inference_mode(False):
        for name, parts in network.saved():
            tensors.update({f"diffusion_model.{name}.{suffix}": tensor for suffix, tensor in parts.items()})
    return LoRAModel(tensors, metadata)


@torch.inference_mode(False)  # in which the state dict of ComfyUI 0.3.75's quantized layers fails
def apply_lora(
    patcher: comfy.model_patcher.ModelPatcher, lora: dict[str, Tensor], strength: float = 1.0
) -> comfy.model_patcher.ModelPatcher:
    """A clone with the LoRA added by the stock loader's own path. Raises where any adapter found no layer."""
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    return _apply({name: tensor for name, tensor in lora.items() if not name.startswith(TEXT)}, keys, patcher, strength)


def apply_text_lora(clip: comfy.sd.CLIP, lora: dict[str, Tensor], strength: float = 1.0) -> comfy.sd.CLIP:
    """The same for a LoRA's text encoder part on a CLIP."""
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    return _apply({name: tensor for name, tensor in lora.items() if name.startswith(TEXT)}, keys, clip, strength)


def text_tensors(network: AdapterNetwork, clip: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a trained text encoder by the names of a file: kohya's where ComfyUI knows them for the layer.

    lora_te_ where there is one text model, lora_te1_, lora_te2_, … where there are several.
    """
    known: dict[str, list[str]] = {}
    for name, weight in comfy.lora.model_lora_keys_clip(clip, {}).items():
        known.setdefault(weight.removesuffix(".weight"), []).append(name)
    several = len({layer.split(".")[0] for layer in known if ".transformer." in layer}) > 1
    prefixes = ("lora_te3_", "lora_te2_", "lora_te1_") if several else ("lora_te_",)
    for layer, parts in network.saved():
        names = [name for prefix in prefixes for name in known[layer] if name.startswith(prefix)]
        for suffix, tensor in parts.items():
            yield f"{(names or [f'text_encoders.{layer}'])[0]}.{suffix}", tensor


def _apply(lora: dict[str, Tensor], keys: dict, target, strength: float):
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(lora), keys)
    clone = target.clone()
    added = clone.add_patches(patches, strength)
    wanted = sum(name.endswith(FIRST_FACTORS) for name in lora)
    if len(added) != wanted:
        raise ValueError(
            f"{wanted - len(added)} of {wanted} adapters match no layer of this model: it is another architecture"
        )
    return clone
