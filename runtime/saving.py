"""LORA_MODEL to a file that any loader reads."""

from torch import Tensor

from .paths import loras_folder, save_lora


MAX_TITLE = 1000


def save_lora_model(lora: dict[str, Tensor], prefix: str, title: str = "") -> str:
    """Save a LORA_MODEL (ours or core's) and return its name relative to the loras folder, as loaders list it."""
    if len(title) > MAX_TITLE:
        raise ValueError(f"the title has {len(title)} characters, but at most {MAX_TITLE} fit: shorten it")
    if not lora:
        raise ValueError("this LORA_MODEL has no tensors: connect the output of Train LoRA")
    header = dict(getattr(lora, "metadata", {}))
    header["ss_output_name"] = prefix
    if title:
        header["modelspec.title"] = title
    tensors = {key: value.detach().cpu() for key, value in lora.items() if isinstance(value, Tensor)}
    return save_lora(tensors, prefix, header).relative_to(loras_folder()).as_posix()
