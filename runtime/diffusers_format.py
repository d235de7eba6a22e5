"""A LoRA under diffusers' layer names, for diffusers pipelines: ComfyUI's own map of these names, read backwards.

A name can stand for some rows of a fused layer (to_q, to_k and to_v of one qkv): each then gets its rows of `up`, and
`down` whole. U-Nets are written in diffusers' older form (`processor.to_q_lora.up`), which diffusers and ComfyUI both
read; ComfyUI does not know the newer one. lora_alpha / rank is multiplied into `up` and the header (diffusers'
`lora_adapter_metadata`) says lora_alpha = rank, because ComfyUI and older diffusers do not read that header.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.utils
import torch
from torch import Tensor


MAPS: dict[type, tuple[str, Callable[..., dict]]] = {
    comfy.model_base.SD3: ("transformer.", comfy.utils.mmdit_to_diffusers),
    comfy.model_base.AuraFlow: ("transformer.", comfy.utils.auraflow_to_diffusers),
    comfy.model_base.PixArt: ("transformer.", comfy.utils.pixart_to_diffusers),
    comfy.model_base.Flux: ("transformer.", comfy.utils.flux_to_diffusers),
    comfy.model_base.Lumina2: ("diffusion_model.", comfy.utils.z_image_to_diffusers),
}
"""By exact class: FLUX.2, for one, is a Flux to ComfyUI and has other names in diffusers."""
UNETS = (comfy.model_base.BaseModel, comfy.model_base.SDXL)
TEXT_LAYER = re.compile(r"lora_te(?P<model>[12]?)_text_model_encoder_layers_(?P<block>\d+)_(?P<layer>\w+)$")
"""CLIP's layers under kohya's names; diffusers has no LoRA for other text encoders."""
NOT_LORA = {
    ".dora_scale": "DoRA scales by another norm in diffusers than in ComfyUI",
    ".hada_w1_a": "diffusers reads no LoHa",
    ".lokr_w1": "diffusers reads no LoKr for these models",
}


@dataclass(frozen=True, slots=True)
class Part:
    """What one name of diffusers stands for: a layer, or rows of one."""

    module: str
    """The layer in diffusers, without the model's prefix."""
    up: str
    down: str
    """Keys in the file."""
    rows: tuple[int, int] | None
    """First row and number of rows; None is all."""
    reorder: Callable[[Tensor], Tensor] | None
    """What ComfyUI does to the rows of a change on the way in, its own inverse; None is nothing."""


@dataclass(frozen=True, slots=True)
class DiffusersNames:
    prefix: str
    """Of the denoiser in the header: unet or transformer."""
    parts: dict[str, list[Part]]
    """Layer -> parts that make it up. Layers without such parts are missing."""


@torch.inference_mode(False)  # as in `apply_lora`
def diffusers_names(model: comfy.model_base.BaseModel) -> DiffusersNames | None:
    """diffusers' names of a model's layers, or None for a family without a map."""
    known: dict[str, Any] = comfy.lora.model_lora_keys_unet(model, {})
    rows = {key: len(tensor) for key, tensor in model.state_dict().items() if key.endswith(".weight")}
    parts: dict[str, list[Part]] = {}
    for module, name, (up, down), target in _entries(model):
        key, where, reorder = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
        assert isinstance(key, str)
        if key in rows and name in known:
            layer = key.removeprefix("diffusion_model.").removesuffix(".weight")
            parts.setdefault(layer, []).append(Part(module, name + up, name + down, where and where[1:], reorder))
    whole = {layer: _covering(found, rows[f"diffusion_model.{layer}.weight"]) for layer, found in parts.items()}
    whole = {layer: found for layer, found in whole.items() if found}
    return DiffusersNames("unet" if type(model) in UNETS else "transformer", whole) if whole else None


def to_diffusers(lora: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Tensors of the file, and its `lora_adapter_metadata`. ValueError where diffusers has no form for the LoRA."""
    names = getattr(lora, "diffusers", None)
    if names is None:
        family = getattr(lora, "metadata", {}).get("ss_base_model_version", "an unknown family (not from Train LoRA)")
        raise ValueError(f"there is no map of diffusers' layer names for {family}: use format 'comfyui'")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, int]] = {}
    for layer, up, down, scale in _adapters(lora):
        component, parts = _text_part(layer) or (names.prefix, names.parts.get(layer))
        if parts is None:
            raise ValueError(f"diffusers has no name for the layer {layer}: use format 'comfyui', or do not train it")
        for part in parts:
            rows = up * scale if part.rows is None else up.narrow(0, *part.rows) * scale
            tensors[part.up] = rows if part.reorder is None else part.reorder(rows)
            tensors[part.down] = down.clone()
            ranks.setdefault(component, {})[part.module] = len(down)
    settings = {f"{name}.{key}": value for name, own in ranks.items() for key, value in _settings(name, own).items()}
    return tensors, json.dumps(settings)


def _text_part(layer: str) -> tuple[str, list[Part]] | None:
    """(text_encoder or text_encoder_2, what makes up the layer); None where the layer is not one of CLIP."""
    match = TEXT_LAYER.match(layer)
    dotted = {flat: name for name, flat in comfy.lora.LORA_CLIP_MAP.items()}
    if match is None or match["layer"] not in dotted:
        return None
    component = "text_encoder_2" if match["model"] == "2" else "text_encoder"
    module = f"encoder.layers.{match['block']}.{dotted[match['layer']]}"  # inside text_model in older transformers
    up, down = (f"{component}.text_model.{module}.lora_linear_layer.{side}.weight" for side in ("up", "down"))
    return component, [Part(module, up, down, None, None)]


def _settings(component: str, ranks: dict[str, int]) -> dict[str, Any]:
    """Fields of PEFT's LoraConfig. Its patterns are regular expressions on the end of a name: ^ makes them whole."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    start = "" if component.startswith("text_encoder") else "^"
    others = {f"{start}{module}": own for module, own in ranks.items() if own != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
    }


def _adapters(lora: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(layer, up, down, scale) of a LORA_MODEL of ours that has nothing but LoRA."""
    for key in lora:
        reason = next((text for end, text in NOT_LORA.items() if key.endswith(end)), None)
        if reason is not None:
            raise ValueError(f"this LoRA has no diffusers form ({reason}): use format 'comfyui'")
    for key, up in lora.items():
        if key.endswith(".lora_up.weight"):
            name = key.removesuffix(".lora_up.weight")
            down = lora[f"{name}.lora_down.weight"]
            yield name.removeprefix("diffusion_model."), up, down, lora[f"{name}.alpha"].item() / len(down)


def _entries(model: comfy.model_base.BaseModel) -> Iterator[tuple[str, str, tuple[str, str], Any]]:
    """Every weight with a name in diffusers: (module, its name in a file, ends of up and down, ComfyUI's target)."""
    config, kind = model.model_config.unet_config, type(model)
    if kind in UNETS:
        for name, key in comfy.utils.unet_to_diffusers(config).items():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and not module.startswith("class_embedding"):  # of unCLIP models only
                in_file = f"unet.{module}"
                joint = "_" if ".to_" in module else "."
                if ".to_" in module:
                    in_file = in_file.replace(".to_", ".processor.to_").removesuffix(".0")
                yield module, in_file, (f"{joint}lora.up.weight", f"{joint}lora.down.weight"), f"diffusion_model.{key}"
        return
    if kind is comfy.model_base.QwenImage:  # the same names as in ComfyUI
        prefix, found = "transformer.", {key.removeprefix("diffusion_model."): key for key in model.state_dict()}
    elif kind in MAPS and not (kind is comfy.model_base.Lumina2 and not config.get("z_image_modulation")):
        prefix, function = MAPS[kind]
        found = function(config, output_prefix="diffusion_model.")
    else:
        return
    for name, target in found.items():
        if name.endswith(".weight"):
            module = name.removesuffix(".weight")
            yield module, f"{prefix}{module}", (".lora_B.weight", ".lora_A.weight"), target


def _covering(parts: list[Part], rows: int) -> list[Part]:
    """The first of the parts where it is the whole layer, else those that cover it row for row; none where not."""
    if parts[0].rows is None:
        return parts[:1]
    pieces = sorted((part for part in parts if part.rows is not None), key=lambda part: part.rows or (0, 0))
    end = 0
    for part in pieces:
        assert part.rows is not None
        if part.rows[0] != end:
            return []
        end += part.rows[1]
    return pieces if end == rows else []
