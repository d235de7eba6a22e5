"""The probability-flow ODE in sigma, with churn, and the reverse SDE (Song et al. 2020, arXiv:2011.13456)."""

import math
from itertools import pairwise

from torch import Tensor

from .steps import Denoise, Noise, Report, Space, finish_step, push_of, split_step, toward


def churned(x: Tensor, sigma: float, gamma: float, space: Space, noise: Noise, s_noise: float) -> tuple[Tensor, float]:
    """(x, sigma) moved up to a noise-to-signal ratio 1 + gamma times as large, by noise that keeps the marginal.

    Karras et al. add the noise without touching the signal, which is right where alpha is 1. In flow the signal must
    shrink along with it, and pure noise has nowhere to go.
    """
    alpha = space.alpha(sigma)
    if gamma <= 0.0 or alpha <= 0.0:
        return x, sigma
    scale = 1.0 / space.norm(alpha, sigma * (1.0 + gamma))
    raised = scale * sigma * (1.0 + gamma)
    added = math.sqrt(raised**2 - (scale * sigma) ** 2)
    return scale * x + added * s_noise * noise(raised, sigma), raised


def churn_gamma(churn: float, steps: int) -> float:
    return min(churn / steps, math.sqrt(2.0) - 1.0)


def euler(
    denoise: Denoise, x: Tensor, sigmas: list[float], space: Space, noise: Noise, report: Report,
    churn: float = 0.0, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Euler steps with churn (Karras et al. 2022, arXiv:2206.00364, Algorithm 2 without its correction)."""
    gamma = churn_gamma(churn, len(sigmas) - 1)
    for i, (start, end) in enumerate(pairwise(sigmas)):
        x, raised = churned(x, start, gamma, space, noise, s_noise)
        guided = denoise(x, raised)
        report(i, x, start, guided.denoised)
        if end == 0.0:
            return guided.denoised
        x = finish_step(toward(x, guided.base, raised, end), push_of(guided), split_step(space, raised, end), noise)
    return x


def heun(
    denoise: Denoise, x: Tensor, sigmas: list[float], space: Space, noise: Noise, report: Report,
    churn: float = 0.0, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Heun steps with churn (Karras et al. 2022, arXiv:2206.00364, Algorithm 2), two model calls each but the last."""
    gamma = churn_gamma(churn, len(sigmas) - 1)
    for i, (start, end) in enumerate(pairwise(sigmas)):
        x, raised = churned(x, start, gamma, space, noise, s_noise)
        denoised = denoise(x, raised).denoised
        report(i, x, start, denoised)
        if end == 0.0:
            return denoised
        d = (x - denoised) / raised
        x_euler = x + (end - raised) * d
        d_end = (x_euler - denoise(x_euler, end).denoised) / end
        x = x + (end - raised) * (d + d_end) / 2.0
    return x


def reverse_sde(
    denoise: Denoise, x: Tensor, sigmas: list[float], space: Space, noise: Noise, report: Report,
    eta: float = 1.0, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Euler–Maruyama steps of dx = (d + eta·eps) dsigma + sqrt(2·eta·sigma) dw, run from noise to data.

    Where alpha is 1, eta = 1 is the reverse SDE of Song et al. (Eq. 6 with their VE process). In flow theirs would be
    infinite at pure noise; this one has the right marginals there too, as any diffusion has (Ma et al. 2024,
    arXiv:2401.08740, Section 2.3, with w = 2·eta·sigma). eta = 0 is Euler. First order: use many steps.
    """
    for i, (start, end) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, start).denoised
        report(i, x, start, denoised)
        if end == 0.0:
            return denoised
        eps = (x - space.alpha(start) * denoised) / start
        d = (x - denoised) / start
        x = x + (end - start) * d
        if eta > 0.0:
            variance = eta * (start**2 - end**2)
            x = x - variance / (2.0 * start) * eps + math.sqrt(variance) * s_noise * noise(start, end)
    return x
