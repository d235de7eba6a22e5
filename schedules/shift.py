"""Time shift: where a flow model spends its steps, and how resolution moves that.

`shift` is always the factor α of t ↦ α·t / (1 + (α − 1)·t) (Esser et al. 2024, arXiv:2403.03206, Eq. 23). It multiplies
the odds t/(1 − t) by α, moves logit t by mu = ln α and the log-SNR by −2·mu. `mu` is that logarithm; neither adds to
nor scales t itself.
"""

import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor


def require_shift(shift: float) -> float:
    """`shift` if it is finite and above 0, else ValueError."""
    if not (math.isfinite(shift) and shift > 0.0):
        raise ValueError(
            f"shift must be a finite number above 0, got {shift}; 1 means no shift, official values are 1 to 12"
        )
    return shift


@overload
def shift_t(t: float, shift: float) -> float: ...
@overload
def shift_t(t: Tensor, shift: Tensor | float) -> Tensor: ...
def shift_t(t: Tensor | float, shift: Tensor | float) -> Tensor | float:
    """t ↦ shift·t / (1 + (shift − 1)·t) for t in [0, 1]; keeps 0 and 1. A tensor `shift` must broadcast with t."""
    if not isinstance(shift, Tensor):
        require_shift(shift)
    return shift * t / (1 + (shift - 1) * t)


@overload
def unshift_t(t: float, shift: float) -> float: ...
@overload
def unshift_t(t: Tensor, shift: Tensor | float) -> Tensor: ...
def unshift_t(t: Tensor | float, shift: Tensor | float) -> Tensor | float:
    """Inverse of `shift_t`, which is a shift by 1/shift."""
    if not isinstance(shift, Tensor):
        require_shift(shift)
    return t / (shift + (1 - shift) * t)


def shift_from_mu(mu: float) -> float:
    """shift = e^mu. Raises ValueError unless the result is finite and above 0."""
    try:
        return require_shift(math.exp(mu))
    except (OverflowError, ValueError):
        raise ValueError(
            f"mu must be a finite number of moderate size, got {mu}; official values are 0 to 2.5"
        ) from None


def mu_from_shift(shift: float) -> float:
    """mu = ln(shift)."""
    return math.log(require_shift(shift))


@dataclass(frozen=True)
class MuLine:
    """mu linear in image tokens, through (x1, y1) and (x2, y2), not clamped outside."""

    x1: float
    y1: float
    x2: float
    y2: float


def mu_from_image_tokens(tokens: float, line: MuLine) -> float:
    """mu on the line at this number of image tokens (FLUX.1's `get_lin_function`, diffusers' `calculate_shift`)."""
    return line.y1 + (line.y2 - line.y1) * (tokens - line.x1) / (line.x2 - line.x1)


FLUX_LINE = MuLine(256, 0.5, 4096, 1.15)
"""FLUX.1's, the default of diffusers' `calculate_shift`."""


def empirical_mu(tokens: float, steps: int) -> float:
    """FLUX.2's mu: linear in steps between two lines in tokens, one fitted at 10 steps and one at 200.

    Above 4300 tokens the second line alone, so mu jumps there: 50 steps, shift 7.73 at 4300 tokens, 3.27 at 4301. The
    second line is FLUX.1's (`compute_empirical_mu` of black-forest-labs/flux2, src/flux2/sampling.py).
    """
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return at_200 if tokens > 4300 else at_200 + (at_200 - at_10) / 190.0 * (steps - 200.0)


def image_tokens(width: int, height: int, pixels_per_token: int = 16) -> int:
    """Tokens of an image in pixels: whole patches only, as the official pipelines crop. 16 = VAE factor 8 × patch 2."""
    if width < pixels_per_token or height < pixels_per_token:
        raise ValueError(
            f"width and height must be at least {pixels_per_token} pixels (one token), got {width}×{height}"
        )
    return (width // pixels_per_token) * (height // pixels_per_token)


def log_area_mu(width: int, height: int, base: float = 1024 * 1024) -> float:
    """mu = ln(width·height / base): the rule of the article 'Decoding the Shift', 0 at the base area.

    It is an alternative, not where Qwen-Image's 2.2059 at 1664×928 comes from: there it gives mu 0.3871, shift 1.4727.
    The 2.2059 is the official line in image tokens, see `families.py`.
    """
    if width <= 0 or height <= 0:
        raise ValueError(f"width and height must be above 0 pixels, got {width}×{height}")
    return math.log(width * height / base)


def stretch_terminal(sigmas: Tensor, terminal: float) -> Tensor:
    """Stretch flow sigmas [N], descending, so that the last one above 0 is `terminal`; 1 stays 1 and a final 0 stays 0.

    1 − sigma' = (1 − sigma)·(1 − terminal)/(1 − sigma_last): `shift_terminal` of diffusers' FlowMatchEulerDiscrete.
    """
    positive = sigmas[sigmas > 0.0]
    if not 0.0 < terminal < 1.0 or len(positive) == 0 or positive[-1] >= 1.0:
        raise ValueError(f"terminal must lie between 0 and 1 and the last sigma below 1; got terminal {terminal}")
    stretched = 1.0 - (1.0 - positive) * ((1.0 - terminal) / (1.0 - positive[-1]))
    return torch.cat([stretched, sigmas[len(positive) :]])
