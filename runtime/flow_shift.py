"""What Flow Shift needs to know beside the shift: the size in a LATENT, and words about what an earlier node did."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import comfy.model_sampling as host_sampling

from ..schedules.families import FLOW_FAMILIES
from ..schedules.family import GENERIC, Family
from ..schedules.shift_modes import ShiftChoice
from .process import stored_shift


FAMILY_CHOICES = ("auto", *FLOW_FAMILIES)
_DEFAULTS = {"noise_scale": 1.0, "audio_shift": None}


def generic_family(latent_format: Any) -> Family:
    """Token sizes for a model of no known family: what ComfyUI says of its latent (newer versions do), 2×2 a token."""
    pixels = int(getattr(latent_format, "spacial_downscale_ratio", GENERIC.pixels_per_latent))
    frames = int(getattr(latent_format, "temporal_downscale_ratio", GENERIC.frames_per_latent))
    video = 2 if latent_format.latent_dimensions == 3 else 1
    return replace(
        GENERIC,
        default_length=video,
        pixels_per_token=2 * pixels,
        pixels_per_latent=pixels,
        frames_per_latent=frames,
    )


def latent_size(latent: dict, channels: int, family: Family) -> tuple[int, int, int]:
    """(width, height, length) in pixels and frames of a LATENT made for a model of `family` with so many channels.

    [B, C, H, W] is a picture, [B, C, F, H, W] a video. ValueError for anything else and for another channel count.
    """
    samples = latent["samples"] if isinstance(latent, dict) and "samples" in latent else None
    if samples is None or not hasattr(samples, "shape"):
        raise ValueError(f"expected a LATENT with samples, got {type(latent).__name__}")
    if nested := bool(getattr(samples, "is_nested", False)):
        samples = samples.unbind()[0]  # newer ComfyUI's video with sound: the picture comes first
    shape = tuple(samples.shape)
    if len(shape) not in (4, 5) or 0 in shape:
        raise ValueError(
            f"the LATENT has shape {list(shape)}; a size can be read from [batch, channels, height, width] or "
            "[batch, channels, frames, height, width]. Disconnect it and give width, height and length"
        )
    if shape[1] != channels and not nested:
        raise ValueError(
            f"the LATENT has {shape[1]} channels, but this model's latents have {channels}: it was made for another "
            "model, and its size in pixels is not known. Use an empty-latent node for this model, or disconnect it and "
            "give width and height"
        )
    return family.pixel_size(shape[1:])


def how_chosen(choice: ShiftChoice, family: Family) -> str:
    """The words that say where a shift comes from."""
    if choice.mode in ("shift", "mu"):
        return f"{choice.mode} as given"
    size = f"{choice.width}×{choice.height}" + (f", {choice.length} frames" if choice.length > 1 else "")
    base = f"{choice.base_size}×{choice.base_size}"
    if choice.mode == "log area":
        return f"width·height of {size} over {base}"
    tokens = family.tokens(choice.width, choice.height, choice.length)
    if choice.mode == "official":
        return f"official for {family.title} at {size} ({tokens} tokens). Source: {family.source}"
    how = "on the line" if choice.mode == "line" else f"√ of the tokens over those of {base}"
    return f"{how}, at {size} ({tokens} tokens)"


def upstream_notes(host: Any, original: Any, family: Family) -> Iterator[str]:
    """What a change of the shift replaces, what it keeps, and what an earlier node may have broken."""
    before, own = stored_shift(host), stored_shift(original)
    if host is original:
        yield f"replaces α {before:.4f} of the checkpoint"
    else:
        checkpoint = "" if own is None else f" (the checkpoint has α {own:.4f})"
        yield f"replaces α {before:.4f} that an earlier model-sampling node set{checkpoint}"
    for name, usual in _DEFAULTS.items():
        if (value := getattr(host, name, usual)) != usual:
            yield f"keeps {name} {value:g}"
    old, new = _time(original), _time(host)
    if old is not None and new != old:
        yield (
            f"WARNING: an earlier node changed the network's time from {old} to {new}; the model was trained with "
            f"{old}. Remove that node, this one does its work"
        )
    for name, usual in _DEFAULTS.items():
        if (lost := getattr(original, name, usual)) != usual and getattr(host, name, usual) == usual:
            yield f"WARNING: an earlier node dropped {name} {lost:g} of the checkpoint. Remove that node"
    if family.terminal is not None:
        yield (
            f"the official steps also end at {family.terminal:g}, which no shift can do: for them use Official "
            "Schedule (Tidetable_OfficialSchedule)"
        )


def _time(host: Any) -> str | None:
    """What a flow network is told of sigma, None for other processes."""
    if isinstance(host, host_sampling.ModelSamplingFlux):
        return "sigma"
    multiplier = getattr(host, "multiplier", None)
    return None if multiplier is None else "sigma" if multiplier == 1.0 else f"sigma·{multiplier:g}"
