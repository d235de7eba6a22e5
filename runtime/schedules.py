"""Schedules of a loaded MODEL: its noise levels as a grid, and SIGMAS made from them."""

import logging

import torch
from comfy.model_patcher import ModelPatcher

from ..schedules.spacing import AXES as AXES
from ..schedules.spacing import DENOISE_AS as DENOISE_AS
from ..schedules.spacing import SPACINGS, Axis, DenoiseAs, NoiseGrid, flow_grid, schedule, table_grid
from ..schedules.validate import MAX_STEPS as MAX_STEPS
from .model_sampling import read_sampling
from .zero_terminal import wasted_steps


logger = logging.getLogger(__name__)

SPACING_NAMES = tuple(SPACINGS)


def noise_grid(model: ModelPatcher) -> NoiseGrid:
    """The noise levels of a MODEL, in float64: recomputed from the shift for flow, else the host's table."""
    sampling = read_sampling(model)
    if sampling.shift is not None:
        return flow_grid(sampling.shift, len(sampling.host.sigmas))
    return table_grid(sampling.host.sigmas)


def make_schedule(
    model: ModelPatcher,
    spacing: str,
    steps: int,
    denoise: float = 1.0,
    axis: Axis = "native",
    denoise_as: DenoiseAs = "steps",
    terminal: float = 0.0,
    rho: float = 0.0,
    beta_a: float = 0.6,
    beta_b: float = 0.6,
    laplace_center: float = 0.0,
    laplace_scale: float = 0.5,
) -> torch.Tensor:
    """SIGMAS for a MODEL as samplers take them: float32 on the CPU, [steps + 1]. `rho` 0 is the spacing's usual one."""
    sigmas = schedule(
        noise_grid(model),
        spacing,
        steps,
        denoise,
        axis=axis,
        denoise_as=denoise_as,
        terminal=terminal,
        rho=None if rho == 0.0 else rho,
        a=beta_a,
        b=beta_b,
        center=laplace_center,
        scale=laplace_scale,
    )
    if warning := wasted_steps(model, sigmas):
        logger.warning("Schedule: %s: %s", spacing, warning)
    return to_sigmas(sigmas, spacing)


def to_sigmas(sigmas: torch.Tensor, what: str) -> torch.Tensor:
    """float32 on the CPU, as samplers take it; ValueError where that makes two neighbors equal."""
    rounded = sigmas.float()
    if equal := (rounded[1:] == rounded[:-1]).nonzero().flatten().tolist():
        raise ValueError(
            f"{what} puts steps {equal[0]} and {equal[0] + 1} of {len(sigmas) - 1} so close together, at sigma "
            f"{float(sigmas[equal[0]]):.9g}, that float32 cannot tell them apart; use fewer steps or another spacing"
        )
    return rounded
