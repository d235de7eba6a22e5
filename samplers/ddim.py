"""The samplers of denoising diffusion models, for any alpha and sigma."""

import math
from itertools import pairwise

from torch import Tensor

from .steps import Denoise, Noise, Report, Space, finish_step, push_of, split_step, toward


def ddim(
    denoise: Denoise, x: Tensor, sigmas: list[float], space: Space, noise: Noise, report: Report,
    eta: float = 0.0, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """DDIM (Song et al. 2020, arXiv:2010.02502, Eq. 12): alpha·D + sigma_down·eps + sigma_up·noise.

    eta 0 is deterministic and equal to Euler, eta 1 is DDPM.
    """
    for i, (start, end) in enumerate(pairwise(sigmas)):
        guided = denoise(x, start)
        report(i, x, start, guided.denoised)
        if end == 0.0:
            return guided.denoised
        split = split_step(space, start, end, eta)
        x = finish_step(toward(x, guided.base, start, split.down), push_of(guided), split, noise, s_noise)
    return x


def ddpm(
    denoise: Denoise, x: Tensor, sigmas: list[float], space: Space, noise: Noise, report: Report, s_noise: float = 1.0
) -> Tensor:
    """Ancestral sampling from the posterior q(x_s | x_t, x0 = D) (Ho et al. 2020, arXiv:2006.11239, Eq. 6–7).

    With a = alpha_t/alpha_s and v = sigma_t² − a²·sigma_s², its mean is (a·sigma_s²·x + alpha_s·v·D)/sigma_t² and its
    variance v·sigma_s²/sigma_t²: their formulas without the assumption alpha² + sigma² = 1.
    """
    for i, (start, end) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, start).denoised
        report(i, x, start, denoised)
        if end == 0.0:
            return denoised
        a = space.alpha(start) / space.alpha(end)
        v = start**2 - (a * end) ** 2
        x = (a * end**2 * x + space.alpha(end) * v * denoised) / start**2
        x = x + math.sqrt(v) * end / start * s_noise * noise(start, end)
    return x
