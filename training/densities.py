"""Densities over t as inverse distribution functions: u in (0, 1) to t in [0, 1], rising.

Sources: mode, cosmap and the logit-normal are of Esser et al. 2024 (arXiv:2403.03206, section 3.1 and B.4); the log-SNR
normal is Karras et al. 2022's log-normal in sigma (arXiv:2206.00364, Table 1); content and style are ai-toolkit's
`content_or_style`, (1 - t)^(-2/3)/3 and t^(-2/3)/3. t is the noise fraction, 1 is noise.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.special
import torch
from torch import Tensor

from ..schedules.families import family_named, official_shift
from ..schedules.family import GENERIC, Family
from ..schedules.process import NoiseProcess
from ..schedules.shift import shift_from_mu, shift_t
from .recipe import DensityConfig


Quantile = Callable[[Tensor], Tensor]
BASE_AREA = 1024.0 * 1024.0


def uniform_icdf(u: Tensor) -> Tensor:
    return u


def logit_normal_icdf(u: Tensor, mean: float, std: float) -> Tensor:
    """Quantiles [B] of the logit-normal density: sigmoid(mean + std · Phi^-1(u))."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode_icdf(u: Tensor, scale: float) -> Tensor:
    """u - scale·(sin²(pi·u/2) - u): density 1/(1 + scale - scale·pi/2·sin(pi·u)) at t(u)."""
    return u - scale * (torch.sin(0.5 * math.pi * u) ** 2 - u)


def cosmap_icdf(u: Tensor) -> Tensor:
    """Density 2/(pi·(1 - 2t + 2t²)): tan(pi·u/2) are the odds of t."""
    return torch.sin(0.5 * math.pi * u) / (torch.sin(0.5 * math.pi * u) + torch.cos(0.5 * math.pi * u))


def beta_icdf(u: Tensor, a: float, b: float) -> Tensor:
    """Quantiles of Beta(a, b), density proportional to t^(a-1)·(1-t)^(b-1)."""
    return torch.from_numpy(np.asarray(scipy.special.betaincinv(a, b, u.double().cpu().numpy())))


def log_snr_normal_icdf(u: Tensor, mean: float, std: float, process: NoiseProcess) -> Tensor:
    """The log-SNR is normal, cut off at the process's ends, so that no mass piles up there."""
    ends = torch.stack([process.log_snr(torch.tensor(t, dtype=torch.float64)) for t in (1.0, 0.0)])
    low, high = torch.special.ndtr((ends - mean) / std)
    if float(high - low) < 1e-6:
        raise ValueError(
            f"a log-SNR around {mean:g} ± {std:g} lies outside this model's range of {float(ends[0]):.3g} to "
            f"{float(ends[1]):.3g}; choose a mean inside it"
        )
    # A rising t is a falling log-SNR.
    return process.t_from_log_snr(mean + std * torch.special.ndtri(high - u * (high - low)))


def content_icdf(u: Tensor) -> Tensor:
    return 1 - (1 - u) ** 3


def style_icdf(u: Tensor) -> Tensor:
    return u**3


def piecewise_icdf(u: Tensor, knots: Sequence[tuple[float, float]]) -> Tensor:
    """The density is linear between (t, weight) knots, normalized: a quadratic to solve in each piece."""
    t, weight = torch.tensor(knots, dtype=torch.float64).T
    width = t.diff()
    cumulative = torch.cat([t.new_zeros(1), (0.5 * (weight[:-1] + weight[1:]) * width).cumsum(0)])
    mass = u.double() * cumulative[-1]
    piece = (torch.searchsorted(cumulative, mass, right=True) - 1).clamp(0, len(width) - 1)
    slope = (weight.diff() / width)[piece]
    start, rest = weight[:-1][piece], mass - cumulative[piece]
    # The root of slope/2·x² + start·x = rest that stays finite for slope 0.
    x = 2 * rest / (start + torch.sqrt((start**2 + 2 * slope * rest).clamp_min(0)))
    return t[piece] + torch.nan_to_num(x).clamp(min=0).minimum(width[piece])


def quantile_function(config: DensityConfig, process: NoiseProcess) -> Quantile:
    """u -> t of the density alone, before shift and range."""
    match config.density:
        case "uniform":
            return uniform_icdf
        case "logit_normal":
            return lambda u: logit_normal_icdf(u, config.mean, config.std)
        case "mode":
            return lambda u: mode_icdf(u, config.mode_scale)
        case "cosmap":
            return cosmap_icdf
        case "beta":
            return lambda u: beta_icdf(u, config.beta_a, config.beta_b)
        case "log_snr_normal":
            return lambda u: log_snr_normal_icdf(u, config.mean, config.std, process)
        case "content":
            return content_icdf
        case "style":
            return style_icdf
        case "piecewise":
            return lambda u: piecewise_icdf(u, config.knots)


def density_shift(config: DensityConfig, shape: Sequence[int], flow: bool, model_shift: float) -> float:
    """The factor for samples with latents of `shape` [C, (F,) H, W] on a model with `model_shift`."""
    mode, family = config.shift_mode, family_named(config.family) if config.family else None
    if mode == "auto":
        mode = "none" if not flow else "official" if family is not None and family.rule is not None else "model"
    if mode == "none":
        return 1.0
    if mode == "shift":
        return config.shift
    if mode == "mu":
        return shift_from_mu(config.mu)
    if mode == "resolution":
        width, height, _ = (family or GENERIC).pixel_size(shape)
        return config.shift * math.sqrt(width * height / BASE_AREA)
    if not flow:
        raise ValueError(
            f"shift_mode {mode!r} is for flow models, which have a shift; on eps and v models choose auto, none, shift,"
            " mu or resolution"
        )
    if mode == "model":
        return model_shift
    return _official(family, shape)


def _official(family: Family | None, shape: Sequence[int]) -> float:
    if family is None or family.rule is None:
        raise ValueError("this model's family has no published shift: choose shift_mode auto, model or shift")
    # Samples smaller than one token (tiny latents) count as one token.
    width, height, length = family.pixel_size(shape)
    token = family.pixels_per_token
    return official_shift(family, max(width, token), max(height, token), length, training=True)[0]


def shifted_quantile(config: DensityConfig, process: NoiseProcess, shift: float) -> Quantile:
    """u -> t with shift and range: inside t_min..t_max the density keeps its shape."""
    base = quantile_function(config, process)

    def quantile(u: Tensor) -> Tensor:
        return shift_t(base(u), shift)

    if config.t_min <= 0 and config.t_max >= 1:
        return quantile
    low, high = (cdf_of(quantile, t) for t in (config.t_min, config.t_max))
    if high - low < 1e-6:
        raise ValueError(
            f"between t_min {config.t_min:g} and t_max {config.t_max:g} this density has next to no probability "
            f"({high - low:.1e}); widen the range or move the density"
        )
    return lambda u: quantile(low + u * (high - low)).clamp(config.t_min, config.t_max)


def cdf_of(quantile: Quantile, t: float) -> float:
    """Probability of a draw below t, by bisection of a rising quantile function."""
    if t <= 0 or t >= 1:
        return 0.0 if t <= 0 else 1.0
    low, high = 0.0, 1.0
    for _ in range(52):
        middle = 0.5 * (low + high)
        below = float(quantile(torch.tensor([middle], dtype=torch.float64))[0]) < t
        low, high = (middle, high) if below else (low, middle)
    return 0.5 * (low + high)
