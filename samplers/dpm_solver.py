"""DPM-Solver (Lu et al. 2022, arXiv:2206.00927): singlestep integrators that choose their own noise levels.

They solve dx/dsigma = d with d = (x − D)/sigma in −ln sigma, which is the paper's equation with alpha = 1, so both
spaces are served. −ln sigma has no end at 0: the last positive level is left by one denoising.
"""

import math
from bisect import bisect_right
from itertools import pairwise

import torch
from torch import Tensor

from .steps import Denoise, Noise, Report, Space


class Slopes:
    """d(x, sigma) of a model; `report` names the step of the schedule that sigma lies in."""

    def __init__(self, denoise: Denoise, sigmas: list[float], report: Report):
        self.denoise, self.report = denoise, report
        self.levels = [-sigma for sigma in sigmas]

    def denoised(self, x: Tensor, sigma: float, first: bool) -> Tensor:
        denoised = self.denoise(x, sigma).denoised
        if first:
            self.report(min(bisect_right(self.levels, -sigma), len(self.levels) - 1) - 1, x, sigma, denoised)
        return denoised

    def __call__(self, x: Tensor, sigma: float, first: bool = False) -> Tensor:
        """`first`: the call that begins a step, whose denoised sample is worth showing."""
        return (x - self.denoised(x, sigma, first)) / sigma


def second_order(
    x: Tensor, d: Tensor, slopes: Slopes, start: float, end: float, r: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(x at `end`, slope in between) by DPM-Solver-2 (Algorithm 1) with the slope at the fraction r of the way."""
    middle = start * (end / start) ** r
    d_middle = slopes(x - (start - middle) * d, middle)
    return x - (start - end) * (d + (d_middle - d) / (2.0 * r)), d_middle


def third_order(x: Tensor, d: Tensor, d_first: Tensor, slopes: Slopes, start: float, end: float) -> Tensor:
    """x at `end` by DPM-Solver-3 (Algorithm 2) with r1 = 1/3, r2 = 2/3; `d_first` is the slope at r1."""
    h, r1, r2 = math.log(start / end), 1.0 / 3.0, 2.0 / 3.0
    middle = start * math.exp(-r2 * h)
    bend = r2 / r1 * middle * (math.expm1(r2 * h) / (r2 * h) - 1.0)
    d_second = slopes(x - (start - middle) * d - bend * (d_first - d), middle)
    return x - (start - end) * d - end / r2 * (math.expm1(h) / h - 1.0) * (d_second - d)


def fast_orders(calls: int) -> list[int]:
    """Orders of the steps that make exactly `calls` model calls: as many 3 as leave at least one lower order."""
    lower = {0: [2, 1], 1: [1], 2: [2]}[calls % 3] if calls else []
    return [3] * ((calls - sum(lower)) // 3) + lower


def dpm_fast(denoise: Denoise, x: Tensor, sigmas: list[float], space: Space, noise: Noise, report: Report) -> Tensor:
    """DPM-Solver-fast (Section 3.4): equal steps in −ln sigma between the ends of the schedule.

    As many model calls as the schedule has steps; where it ends at 0, the last of them is the denoising.
    """
    slopes = Slopes(denoise, sigmas, report)
    to_zero = sigmas[-1] == 0.0
    high, low = sigmas[0], sigmas[-2] if to_zero else sigmas[-1]
    orders = fast_orders(len(sigmas) - 1 - to_zero)
    levels = [high * (low / high) ** (k / max(len(orders), 1)) for k in range(len(orders) + 1)]
    for order, (start, end) in zip(orders, pairwise(levels), strict=True):
        d = slopes(x, start, first=True)
        if order == 1:
            x = x - (start - end) * d
        elif order == 2:
            x, _ = second_order(x, d, slopes, start, end)
        else:
            _, d_first = second_order(x, d, slopes, start, end, r=1.0 / 3.0)
            x = third_order(x, d, d_first, slopes, start, end)
    return slopes.denoised(x, low, first=True) if to_zero else x


def dpm_adaptive(
    denoise: Denoise, x: Tensor, sigmas: list[float], space: Space, noise: Noise, report: Report, order: int = 3
) -> Tensor:
    """DPM-Solver-12 (`order` 2) or -23 with adaptive steps (Appendix C, with its tolerances).

    Of the schedule only the ends count. A step whose two orders differ by more than the tolerance is taken again,
    shorter, but not below one hundredth of sigma: where a model jumps (a prompt begins), no step is short enough.
    Raises ValueError where the difference is not a number.
    """
    slopes, atol, rtol, h, shortest = Slopes(denoise, sigmas, report), 0.0078, 0.05, 0.05, 0.01
    to_zero = sigmas[-1] == 0.0
    sigma, low = sigmas[0], sigmas[-2] if to_zero else sigmas[-1]
    d, x_old = None, x
    while sigma > low:
        end = max(sigma * math.exp(-h), low)
        d = slopes(x, sigma, first=True) if d is None else d
        lower, d_first = second_order(x, d, slopes, sigma, end, r=1.0 / order)
        higher = third_order(x, d, d_first, slopes, sigma, end) if order == 3 else lower
        lower = lower if order == 3 else x - (sigma - end) * d
        allowed = torch.clamp(rtol * torch.maximum(lower.abs(), x_old.abs()), min=atol)
        error = float(((higher - lower) / allowed).square().mean().sqrt())
        if not math.isfinite(error):
            raise ValueError(f"dpm_adaptive cannot go on: the model's prediction near sigma {sigma:g} is not finite")
        taken = math.log(sigma / end)
        h = max(0.9 * taken * max(error, 1e-6) ** (-1.0 / order), shortest)
        if error <= 1.0 or taken <= shortest * 1.001:
            x, x_old, sigma, d = higher, lower, end, None
    return slopes.denoised(x, low, first=True) if to_zero else x
