"""Mean and spread of latents by channel: what shows that they were scaled twice, not at all, or for another model.

Latent formats are made so that a model's own latents have a variance near 1 (the constant of Stable Diffusion is one
over the spread of its first batch: Rombach et al. 2022, arXiv:2112.10752, appendix G). A data set is judged by its root
mean square about 0, not by its spread: flat pictures have latents with an offset and without spread.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


LIMIT = 5.0
"""No data of a model has a root mean square above this: SD 1 and SDXL latents without their scale have 5.5 and 7.7."""
USUAL = (0.4, 2.0)
"""Root mean squares outside are unusual. Flux latents without their scale have 2.8; latents of SD 1, SDXL and Flux that
are scaled twice have 0.18, 0.13 and 0.36, but so could pictures of almost no contrast: they are only warned of."""
SCALED = (0.5, 2.0)
"""Spread inside pictures that is usual for latents which are scaled already."""


@dataclass(frozen=True, slots=True)
class LatentStatistics:
    """Of a set of latents [C, ...] of any sizes, every value counted once."""

    count: int
    """Latents."""
    mean: tuple[float, ...]
    """By channel."""
    std: tuple[float, ...]
    """By channel, about that channel's mean over the whole set."""
    texture: float
    """Standard deviation about the mean of each latent's own channel: near 0 for flat pictures."""

    @property
    def rms(self) -> float:
        """Root mean square over all channels."""
        return math.sqrt(sum(m * m + s * s for m, s in zip(self.mean, self.std, strict=True)) / len(self.mean))

    def __str__(self) -> str:
        channels = ", ".join(f"{m:.2f} ± {s:.2f}" for m, s in zip(self.mean, self.std, strict=True))
        return f"{self.count} latents, root mean square {self.rms:.3g}, by channel {channels}"


def latent_statistics(latents: Iterable[Tensor]) -> LatentStatistics:
    """Statistics of latents that are seen one by one, in constant memory. ValueError where their channels differ."""
    count, size, inner = 0, 0, 0.0
    total = square = torch.zeros(0, dtype=torch.float64)
    for latent in latents:
        values = latent.detach().flatten(1).double().cpu()
        if count == 0:
            total, square = torch.zeros(2, len(values), dtype=torch.float64)
        elif len(values) != len(total):
            raise ValueError(
                f"latent {count + 1} has {len(values)} channels but those before it have {len(total)}: encode all "
                "images with one VAE"
            )
        count, size = count + 1, size + values.shape[1]
        total, square = total + values.sum(1), square + values.square().sum(1)
        inner += values.var(1, correction=0).mean().item() * values.shape[1]
    if not size:
        raise ValueError("there are no latents to measure: connect at least one")
    mean = total / size
    std = (square / size - mean.square()).clamp_min(0).sqrt()
    return LatentStatistics(count, tuple(mean.tolist()), tuple(std.tolist()), math.sqrt(inner / size))


@dataclass(frozen=True, slots=True)
class Verdict:
    level: Literal["fine", "notice", "error"]
    text: str = ""
    """What is wrong and the way out; empty where nothing is."""


def judge(seen: LatentStatistics, given: LatentStatistics) -> Verdict:
    """Whether latents are what a network expects: `given` as a VAE or a file had them, `seen` in the network's space.

    Small data that a format does not scale is never called unusual: pictures in [-1, 1] may have little contrast.
    """
    rms, scale = seen.rms, seen.rms / (given.rms or 1)
    if rms == 0:
        return Verdict("notice", "every latent is zero, as Empty Latent Image makes them: connect VAE Encode instead")
    if rms > USUAL[1]:
        text = (
            f"the latents have a root mean square of {rms:.3g} in the model's own space, where data is near 1: they "
            "come from another model's VAE or were not scaled for this one. Encode the images with this model's VAE"
        )
        return Verdict("error" if rms > LIMIT else "notice", text)
    if rms >= USUAL[0] or math.isclose(scale, 1, rel_tol=1e-3):
        return Verdict("fine")
    text = f"the latents have a root mean square of {rms:.3g} in the model's own space, where data is near 1: "
    if SCALED[0] < given.texture < SCALED[1]:
        return Verdict(
            "notice",
            text + f"they look scaled for the model already ({given.rms:.3g} before its own "
            f"scaling). Encode the images with VAE Encode, or undo the first one: Latent Multiply by {1 / scale:.4g}",
        )
    return Verdict("notice", text + "the pictures have almost no contrast, or come from another model's VAE")
