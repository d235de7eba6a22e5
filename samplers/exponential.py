"""Exponential integrators of dx/dsigma = (x − D)/sigma in −ln sigma, with data prediction, ancestral noise and CFG++.

The linear part is solved exactly, so a step of length h = ln(sigma/sigma_next) is
x(h) = e^−h·x + (1 − e^−h)·D̄ with D̄ some estimate of D over the step. The integrators differ in D̄ alone.
"""

import math
from itertools import pairwise

from torch import Tensor

from .steps import Denoise, Noise, Report, Space, finish_step, push_of, split_step, toward


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: list[float], space: Space, noise: Noise, report: Report, order: int = 2
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, Algorithm 2); its CFG++ form extrapolates the base."""
    old, h_old = None, 0.0
    for i, (start, end) in enumerate(pairwise(sigmas)):
        guided = denoise(x, start)
        report(i, x, start, guided.denoised)
        if end == 0.0:
            return guided.denoised
        h = math.log(start / end)
        mean = guided.base if old is None or order < 2 else guided.base + h / (2.0 * h_old) * (guided.base - old)
        x = finish_step(toward(x, mean, start, end), push_of(guided), split_step(space, start, end), noise)
        old, h_old = guided.base, h
    return x


def res_multistep(
    denoise: Denoise, x: Tensor, sigmas: list[float], space: Space, noise: Noise, report: Report,
    eta: float = 0.0, s_noise: float = 1.0, order: int = 2,
) -> Tensor:  # fmt: skip
    """Multistep form of the refined exponential solver (Zhang et al. 2023, arXiv:2308.02157), with ancestral noise.

    D̄ is the mean of the line through D here and D one step before, under the step's weight e^−(h − s). Steps with noise
    are as long as their ODE part.
    """
    old, h_old = None, 0.0
    for i, (start, end) in enumerate(pairwise(sigmas)):
        guided = denoise(x, start)
        report(i, x, start, guided.denoised)
        if end == 0.0:
            return guided.denoised
        split = split_step(space, start, end, eta)
        h = math.log(start / split.down) if split.down > 0.0 else math.inf
        mean = guided.base
        if old is not None and order > 1 and math.isfinite(h):
            mean = mean + (h / -math.expm1(-h) - 1.0) / h_old * (guided.base - old)
        x = finish_step(toward(x, mean, start, split.down), push_of(guided), split, noise, s_noise)
        old, h_old = guided.base, h
    return x


def dpmpp_2s(
    denoise: Denoise, x: Tensor, sigmas: list[float], space: Space, noise: Noise, report: Report,
    eta: float = 0.0, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S) with r = 1/2 (Lu et al. 2022, arXiv:2211.01095, Algorithm 1), with ancestral noise.

    Each of the two model calls pushes by its own denoised − base, in the shares 1 − w and w that D has in them.
    """
    for i, (start, end) in enumerate(pairwise(sigmas)):
        guided = denoise(x, start)
        report(i, x, start, guided.denoised)
        if end == 0.0:
            return guided.denoised
        split = split_step(space, start, end, eta)
        if split.down == 0.0:
            x = finish_step(guided.base, push_of(guided), split, noise, s_noise)
            continue
        middle = math.sqrt(start * split.down)
        x_middle = toward(x, guided.base, start, middle)
        x_middle = finish_step(x_middle, push_of(guided), split_step(space, start, middle), noise)
        second = denoise(x_middle, middle)
        push, push_middle, w = push_of(guided), push_of(second), 1.0 - split.down / start
        if push is not None and push_middle is not None:
            push = (1.0 - w) * push + w * push_middle
        x = finish_step(toward(x, second.base, start, split.down), push, split, noise, s_noise)
    return x
