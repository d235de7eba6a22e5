"""LORA_MODEL to a file that any loader reads."""

import json
from collections.abc import Mapping
from typing import Any

from comfy.cli_args import args
from torch import Tensor

from .diffusers_format import to_diffusers
from .paths import loras_folder, save_lora


FORMATS = ("comfyui", "diffusers")
MAX_TITLE = 1000


def save_lora_model(
    lora: dict[str, Tensor],
    prefix: str,
    title: str = "",
    form: str = "comfyui",
    workflow: Mapping[str, Any] | None = None,
) -> str:
    """Save a LORA_MODEL (ours or core's) and return its name relative to the loras folder, as loaders list it.

    `workflow` goes into the header, under the names that ComfyUI's own savers use.
    """
    if len(title) > MAX_TITLE:
        raise ValueError(f"the title has {len(title)} characters, but at most {MAX_TITLE} fit: shorten it")
    if not lora:
        raise ValueError("this LORA_MODEL has no tensors: connect the output of Train LoRA")
    header = dict(getattr(lora, "metadata", {}))
    header["ss_output_name"] = prefix
    if title:
        header["modelspec.title"] = title
    tensors = {key: value.detach().cpu() for key, value in lora.items() if isinstance(value, Tensor)}
    if form == "diffusers":
        tensors, header["lora_adapter_metadata"] = to_diffusers(lora)
    header |= {name: json.dumps(value) for name, value in (workflow or {}).items()}
    return save_lora(tensors, prefix, header).relative_to(loras_folder()).as_posix()


def workflow_of(hidden: Any) -> dict[str, Any]:
    """The graph that is running, as ComfyUI hands it to a node; nothing with its --disable-metadata."""
    if args.disable_metadata or hidden is None or hidden.prompt is None:
        return {}
    return {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
