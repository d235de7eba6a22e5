"""A LoRA file to an adapter that can be trained on, through the key names that ComfyUI's own loader knows."""

import logging
import re
from dataclasses import replace
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch
from torch import Tensor, nn

from ..training.adapter_formats import Factors, adapter_from, fused, loha_factors, lokr_factors, lora_factors
from ..training.adapter_kinds import Adapter, AdapterNetwork
from ..training.adapter_settings import AdapterConfig
from .lora_files import read_lora
from .lora_keys import TEXT


logger = logging.getLogger(__name__)
WHOLE = (".diff", ".diff_b", ".set_weight", ".w_norm", ".b_norm")
"""How the names end of whole weights and biases; loaders list them apart from adapters."""


def continued_network(model: Any, config: AdapterConfig, device: torch.device) -> AdapterNetwork:
    """The adapters of the file `config.continue_from`, on the layers of the model. ValueError where they do not fit."""
    name = config.continue_from
    tensors = read_lora(name)
    own = {key: tensor for key, tensor in tensors.items() if not key.startswith(TEXT)}
    if not own:
        raise ValueError(
            f"{name} has nothing but a text encoder's layers ({next(iter(tensors))}, …) and none of the model's to"
            " continue. Use another file, or none"
        )
    return _network(name, own, _known_names(model), model.diffusion_model, config, device)


def continued_text(clip: nn.Module, config: AdapterConfig, device: torch.device) -> AdapterNetwork | None:
    """The same for the text encoder's part of the file, on a CLIP's network; None where the file has no such part."""
    own = {key: tensor for key, tensor in read_lora(config.continue_from).items() if key.startswith(TEXT)}
    if not own:
        return None
    return _network(config.continue_from, own, comfy.lora.model_lora_keys_clip(clip, {}), clip, config, device)


def without_text(name: str) -> None:
    """Say that the text encoder's part of a file is not gone on with, where it has one."""
    count = sum(key.startswith(TEXT) for key in read_lora(name))
    if count:
        logger.warning("%s: its %d tensors of the text encoder are not continued", name, count)


def _network(
    name: str,
    tensors: dict[str, Tensor],
    known: dict[str, Any],
    network: nn.Module,
    config: AdapterConfig,
    device: torch.device,
) -> AdapterNetwork:
    modules: dict[str, Any] = dict(network.named_modules())
    adapters: dict[str, Adapter] = {}
    with torch.inference_mode(False):
        patches: dict[Any, Any] = comfy.lora.load_lora(
            comfy.lora_convert.convert_lora(dict(tensors)), known, log_missing=False
        )
        _check_all_read(name, tensors, patches)
        for layer, parts in _by_layer(name, patches).items():
            try:
                factors = _of_layer(parts, len(modules[layer].weight))
                adapters[layer] = adapter_from(modules[layer], factors)
            except ValueError as error:
                raise ValueError(f"{name}: {layer}: {error}") from error
    layers = {layer: modules[layer] for layer in adapters}
    return AdapterNetwork(layers, _settings(config, factors), device, adapters)


def _known_names(model: Any) -> dict[str, Any]:
    """ComfyUI's names of the layers, and PEFT's own names of those that ComfyUI knows by diffusers' older ones."""
    known: dict[str, Any] = comfy.lora.model_lora_keys_unet(model, {})
    for name, target in list(known.items()):
        plain = name.replace(".processor.to_", ".to_")
        if name.startswith(("unet.", "transformer.")):
            plain = f"{plain}.0" if name.endswith(".processor.to_out") else plain
            known.setdefault(plain, target)
            known.setdefault(f"base_model.model.{plain.partition('.')[2]}", target)
    return known


def _check_all_read(name: str, tensors: dict[str, Tensor], patches: dict[Any, Any]) -> None:
    """ValueError where part of the file was not understood: it would be lost in what is saved at the end."""
    loaded = {key for patch in patches.values() for key in getattr(patch, "loaded_keys", ())}
    others = [key for key in tensors if not key.endswith(".alpha")]
    unread = [key for key in others if key not in loaded and not key.endswith(WHOLE)]
    layers = {_layer_of(key) for key in others}
    missing = sorted({_layer_of(key) for key in unread} - {_layer_of(key) for key in loaded})
    if missing:
        raise ValueError(
            f"{name} is not for this model: {len(missing)} of its {len(layers)} layers are missing here, the first is"
            f" {missing[0]}. Load the model it was trained on"
        )
    if unread:
        raise ValueError(
            f"{name} has {len(unread)} tensors that ComfyUI's loader does not read, the first is {unread[0]}: what they"
            " do would be lost. Use another file"
        )


def _layer_of(key: str) -> str:
    return re.split(r"[._]lora[._]|\.hada_|\.lokr_|\.oft_|\.dora_scale$", key)[0]


def _by_layer(name: str, patches: dict[Any, Any]) -> dict[str, list[tuple[Any, Any]]]:
    """Layer -> (rows and reordering, adapter as ComfyUI has it) of each patch on it."""
    found: dict[str, list[tuple[Any, Any]]] = {}
    for target, patch in patches.items():
        key, *where = (target,) if isinstance(target, str) else target
        if not hasattr(patch, "weights"):
            raise ValueError(
                f"{name} has a whole new weight or bias for {key}, which is no adapter: put Load LoRA with this file in"
                " front of the training, and train a new LoRA on top of it"
            )
        layer = key.removeprefix("diffusion_model.").removesuffix(".weight")
        found.setdefault(layer, []).append((where, patch))
    return found


def _of_layer(parts: list[tuple[Any, Any]], outputs: int) -> Factors:
    """One adapter of a layer with `outputs` rows, from what the file has for it."""
    if len(parts) == 1 and not parts[0][0]:
        return _factors(parts[0][1])
    pieces: list[tuple[int, Factors]] = []
    for where, patch in parts:
        rows, reorder = (*where, None, None)[:2]
        factors = _factors(patch)
        if factors.kind != "lora":
            raise ValueError(f"kind {factors.kind} on some rows of a layer cannot be continued, only LoRA can")
        up = factors.tensors["up"]
        start, count = rows[1:] if rows else (0, outputs)
        if len(up) != count:
            raise ValueError(f"up has {len(up)} rows, and {count} belong to it: it is for a model of another size")
        tensors = {**factors.tensors, "up": up if reorder is None else reorder(up)}
        pieces.append((start, Factors("lora", factors.rank, factors.scale, tensors)))
    return fused(pieces, outputs)


def _factors(patch: Any) -> Factors:
    """ComfyUI's adapter, whose weights are a tuple in an order of each kind's own."""
    kind, weights = patch.name, patch.weights
    if kind == "lora" and weights[5] is None:
        up, down, alpha, mid, dora, _ = weights
        return lora_factors(up, down, alpha, mid, dora)
    if kind == "loha" and weights[7] is None:
        w1_a, w1_b, alpha, w2_a, w2_b, t1, t2, _ = weights
        return loha_factors((w1_a, w1_b), (w2_a, w2_b), alpha, None if t1 is None else (t1, t2))
    if kind == "lokr" and weights[8] is None:
        w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, _ = weights
        return lokr_factors((w1_a, w1_b) if w1 is None else w1, (w2_a, w2_b) if w2 is None else w2, alpha, t2)
    extra = " with DoRA" if kind in ("loha", "lokr") else " with another shape" if kind == "lora" else ""
    raise ValueError(
        f"an adapter of kind {kind}{extra} cannot be continued: put Load LoRA with this file in front of the training,"
        " and train a new LoRA on top of it"
    )


def _settings(config: AdapterConfig, factors: Factors) -> AdapterConfig:
    """The settings with what the file says in place of theirs, for the header of what is saved."""
    kind: Any = factors.kind
    rank = min(factors.rank, 512)
    return replace(config, kind=kind, rank=rank, lora_alpha=factors.scale * rank, rank_stabilized=False)
