"""A LoRA file to an adapter that can be trained on, through the key names that ComfyUI's own loader knows."""

import json
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import folder_paths
import torch
from safetensors import safe_open
from torch import Tensor

from ..training.adapter_kinds import Adapter, AdapterNetwork, DoRA, LoHa, LowRank
from ..training.adapter_settings import AdapterConfig
from .lora_keys import TEXT


FACTORS = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight", "_lora.up.weight", ".hada_w1_a", ".lokr_w1")
"""How the names end that stand for one adapter each."""


def continued_network(model: Any, config: AdapterConfig, device: torch.device) -> AdapterNetwork:
    """The adapters of the file `config.continue_from`, on the layers of the model. ValueError where they do not fit."""
    tensors, alpha = read_lora(config.continue_from)
    keys = comfy.lora.model_lora_keys_unet(model, {})
    with torch.inference_mode(False):
        patches: dict[Any, Any] = comfy.lora.load_lora(
            comfy.lora_convert.convert_lora(dict(tensors)), keys, log_missing=False
        )
    loaded = {name for patch in patches.values() for name in getattr(patch, "loaded_keys", ())}
    wanted = [name for name in tensors if name.endswith(FACTORS) and not name.startswith(TEXT)]
    missing = [name for name in wanted if name not in loaded]
    if missing or not wanted:
        raise ValueError(
            f"{config.continue_from} is not for this model: {len(missing)} of its {len(wanted)} layers are missing "
            f"here, the first is {missing[0] if missing else 'none'}. Load the model it was trained on"
        )
    modules = dict(model.diffusion_model.named_modules())
    adapters: dict[str, Adapter] = {}
    for key, patch in patches.items():
        name = key.removeprefix("diffusion_model.").removesuffix(".weight") if isinstance(key, str) else ""
        if name not in modules:
            raise ValueError(
                f"{config.continue_from} has an adapter on part of a layer ({key}): it cannot be continued"
            )
        adapters[name] = _adapter(name, modules[name], patch, alpha, config)
    return AdapterNetwork({name: modules[name] for name in adapters}, config, device, adapters)


def read_lora(name: str) -> tuple[dict[str, Tensor], float | None]:
    """Tensors of a file of the loras folder, and the alpha that a PEFT file has in its header or beside it."""
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
    beside = Path(path).with_name("adapter_config.json")
    text = header.get("lora_adapter_metadata") or (beside.read_text(encoding="utf-8") if beside.is_file() else "{}")
    settings = json.loads(text)
    found = [value for key, value in settings.items() if key.rsplit(".")[-1] == "lora_alpha"]
    return tensors, float(found[0]) if found else None


def _adapter(name: str, layer: Any, patch: Any, alpha: float | None, config: AdapterConfig) -> Adapter:
    kind: str = getattr(patch, "name", type(patch).__name__)
    weights: Any = getattr(patch, "weights", None)
    generator = torch.Generator().manual_seed(config.seed)
    factors: dict[str, Tensor]
    if kind == "lora" and weights[3] is None and weights[5] is None:
        up, down, own, _, magnitude, _ = weights
        scale = (alpha or len(down) if own is None else own) / len(down)
        by_input = magnitude is not None and magnitude.shape[0] != up.shape[0]
        adapter: Adapter = LowRank(layer, len(down), scale, generator)
        if magnitude is not None:
            adapter = DoRA(layer, len(down), scale, generator, by_input)
        factors = {"up": up, "down": down, **({} if magnitude is None else {"magnitude": magnitude})}
    elif kind == "loha" and weights[5] is None and weights[7] is None:
        scale = 1.0 if weights[2] is None else weights[2] / len(weights[1])
        adapter = LoHa(layer, len(weights[1]), scale, generator)
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        factors = dict(zip(names, (weights[0], weights[1], weights[3], weights[4]), strict=True))
    else:
        raise ValueError(f"{config.continue_from} has an adapter of kind {kind} on {name}: it cannot be continued here")
    for key, value in factors.items():
        parameter = getattr(adapter, key)
        if value.numel() != parameter.numel():
            raise ValueError(
                f"{config.continue_from}: {key} of {name} is {tuple(value.shape)}, the layer needs another"
            )
        parameter.data.copy_(value.reshape(parameter.shape))
    return adapter
