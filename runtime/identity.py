"""Names for a VAE and a CLIP by what they are: equal for equal weights and settings, in every process."""

from collections.abc import Mapping
from typing import Any

import comfy.model_patcher
import comfy.sd
from torch import Tensor

from ..training.checkpoint import digest
from .training_run import sample_values


def vae_identity(vae: comfy.sd.VAE) -> str:
    """16 hexadecimal digits."""
    return digest([type(vae.first_stage_model).__name__, vae.latent_channels, _weights(vae.patcher)])


def clip_identity(clip: comfy.sd.CLIP) -> str:
    """16 hexadecimal digits. LoRAs and clip skip count; hooks, which change with time, are refused."""
    if clip.patcher.forced_hooks is not None or clip.apply_hooks_to_conds:
        raise ValueError("this CLIP has hooks, which change while sampling: connect one without")
    options = getattr(clip, "tokenizer_options", {})
    kinds = [type(clip.tokenizer).__name__, type(clip.cond_stage_model).__name__]
    return digest([*kinds, clip.layer_idx, dict(options), _weights(clip.patcher), _plain(clip.patcher.patches)])


def _weights(patcher: comfy.model_patcher.ModelPatcher) -> dict[str, Any]:
    """Values of every weight as it was loaded: patches are merged in place, the originals are then in `backup`."""
    found: dict[str, Any] = {}
    for name, tensor in patcher.model.state_dict().items():
        saved = patcher.backup.get(name)
        found[name] = sample_values(tensor if saved is None else saved.weight)
    return found


def _plain(value: Any) -> Any:
    """A nest of patches with sampled tensors; adapter objects by their class and weights."""
    if isinstance(value, Tensor):
        return sample_values(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "weights"):
        return [type(value).__name__, _plain(value.weights)]
    return value if isinstance(value, bool | int | float | str) else type(value).__name__
