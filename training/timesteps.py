"""Densities over t, through their inverse distribution functions, so that they can be stratified and drawn.

t in [0, 1] is the noise fraction. Shifting by alpha multiplies the odds t/(1-t), so a shifted logit-normal is the
logit-normal whose mean is larger by ln(alpha) (reference: Esser et al. 2024, arXiv:2403.03206, section 3.1 and B.2).
"""

import torch
from torch import Tensor

from ..schedules.shift import shift_t
from .config import TrainConfig


OPEN_INTERVAL = 1e-5
"""t is kept this far from 0 and 1: the velocity target is finite there, the network's time embedding was trained."""


def stratified_uniform(count: int, generator: torch.Generator) -> Tensor:
    """[count] values in (0, 1), one in each of `count` equal strata, in random order, each uniform by itself."""
    offsets = torch.rand(count, generator=generator, dtype=torch.float64)
    return (torch.randperm(count, generator=generator) + offsets) / count


def uniform_icdf(u: Tensor) -> Tensor:
    return u


def logit_normal_icdf(u: Tensor, mean: float, std: float) -> Tensor:
    """Quantiles [B] of the logit-normal density: sigmoid(mean + std · Phi^-1(u))."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def sample_t(config: TrainConfig, count: int, flow: bool, shift: float, generator: torch.Generator) -> Tensor:
    """[count] float64 noise levels for one batch: the configured density, then the model's shift on flow models."""
    u = stratified_uniform(count, generator)
    density = config.density if config.density != "auto" else ("logit_normal" if flow else "uniform")
    if density == "logit_normal":
        t = logit_normal_icdf(u, config.logit_mean, config.logit_std)
    else:
        t = uniform_icdf(u)
    return shift_t(t, shift).clamp(OPEN_INTERVAL, 1 - OPEN_INTERVAL) if flow else t
