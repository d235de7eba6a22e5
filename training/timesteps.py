"""Densities over t, through their inverse distribution functions, so that they can be stratified and drawn.

t in [0, 1] is the noise fraction. Shifting by alpha multiplies the odds t/(1-t), so a shifted logit-normal is the
logit-normal whose mean is larger by ln(alpha) (reference: Esser et al. 2024, arXiv:2403.03206, section 3.1 and B.2).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..schedules.process import Flow, NoiseProcess
from ..schedules.shift import shift_t
from .config import TrainConfig
from .densities import density_shift, logit_normal_icdf, shifted_quantile, uniform_icdf
from .recipe import DensityConfig


OPEN_INTERVAL = 1e-5
"""t is kept this far from 0 and 1: the velocity target is finite there, the network's time embedding was trained."""


def stratified_uniform(count: int, generator: torch.Generator) -> Tensor:
    """[count] values in (0, 1), one in each of `count` equal strata, in random order, each uniform by itself."""
    offsets = torch.rand(count, generator=generator, dtype=torch.float64)
    return (torch.randperm(count, generator=generator) + offsets) / count


def sample_t(config: TrainConfig, count: int, flow: bool, shift: float, generator: torch.Generator) -> Tensor:
    """[count] float64 noise levels for one batch: the configured density, then the model's shift on flow models."""
    u = stratified_uniform(count, generator)
    density = config.density if config.density != "auto" else ("logit_normal" if flow else "uniform")
    if density == "logit_normal":
        t = logit_normal_icdf(u, config.logit_mean, config.logit_std)
    else:
        t = uniform_icdf(u)
    return shift_t(t, shift).clamp(OPEN_INTERVAL, 1 - OPEN_INTERVAL) if flow else t


def draw_t(
    config: DensityConfig,
    count: int,
    shape: Sequence[int],
    process: NoiseProcess,
    model_shift: float,
    generator: torch.Generator,
) -> Tensor:
    """[count] float64 noise levels for one batch of latents of `shape` [C, ...], from a density of its own."""
    uniform = stratified_uniform if config.stratified else _independent_uniform
    flow = isinstance(process, Flow)
    t = shifted_quantile(config, process, density_shift(config, shape, flow, model_shift))(uniform(count, generator))
    return t.clamp(OPEN_INTERVAL, 1 - OPEN_INTERVAL) if flow else t.clamp(0, 1)


def _independent_uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
