"""LoRA files as people have them: what is in one, and the scale that PEFT keeps outside of the tensors."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
import torch
from safetensors import safe_open
from torch import Tensor

from .lora_keys import TEXT


PEFT_UP = re.compile(r"(?P<layer>.+?)(\.lora_B(\.default)?\.weight|_lora\.up\.weight|\.lora\.up\.weight)$")
COMPONENTS = ("transformer.", "unet.", "base_model.model.", "diffusion_model.")


def read_lora(name: str) -> dict[str, Tensor]:
    """Tensors of a file of the loras folder in fp32. ValueError says what is wrong with the file.

    The alpha of PEFT files, from the header or from adapter_config.json beside the file, is among them.
    """
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise ValueError(f"there is no LoRA {name!r} in the loras folder: use a name as Load LoRA lists it")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors has a class of its own for a file that is cut short
        raise ValueError(
            f"{name} cannot be read as safetensors ({error}): the file is damaged or another kind"
        ) from error
    if not tensors:
        raise ValueError(f"{name} is empty: it has no tensors. Use another file")
    settings = _peft_settings(name, header, Path(path))
    if settings.get("peft_type", "LORA") != "LORA" or any("lora_magnitude_vector" in key for key in tensors):
        kind = settings.get("peft_type", "DoRA")
        raise ValueError(f"{name} is PEFT's {kind}, which ComfyUI's loader cannot read: only its LoRA can be continued")
    return tensors | _peft_alphas(tensors, settings)


def _peft_settings(name: str, header: Mapping[str, str], path: Path) -> dict[str, Any]:
    """PEFT's settings of the denoiser's LoRA: fields without the component's name. Empty where there are none."""
    beside = path.with_name("adapter_config.json")
    text = header.get("lora_adapter_metadata") or (beside.read_text(encoding="utf-8") if beside.is_file() else "{}")
    try:
        found = dict(json.loads(text))
    except ValueError as error:
        raise ValueError(f"the PEFT settings of {name} are not JSON ({error}): repair or remove them") from error
    found = {key: value for key, value in found.items() if not key.startswith(TEXT)}
    return {key.removeprefix("transformer.").removeprefix("unet."): value for key, value in found.items()}


def _peft_alphas(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Alphas for layers that have none, so that alpha / rank is PEFT's scale."""
    alphas: dict[str, Tensor] = {}
    for key, up in tensors.items():
        match = PEFT_UP.match(key)
        if match is None or settings.get("lora_alpha") is None or key.startswith(TEXT):
            continue
        layer, rank = match["layer"], up.shape[1]
        if f"{layer}.alpha" not in tensors:
            patterns = settings.get("alpha_pattern") or {}
            module = _module(layer)
            alpha = next((own for pattern, own in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), None)
            alpha = float(settings["lora_alpha"] if alpha is None else alpha)
            alphas[f"{layer}.alpha"] = torch.tensor(alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha)
    return alphas


def _module(layer: str) -> str:
    """The name that PEFT's patterns mean: of the layer inside its model."""
    for component in COMPONENTS:
        layer = layer.removeprefix(component)
    layer = layer.replace(".processor.", ".")
    return f"{layer}.0" if layer.endswith(".to_out") else layer
