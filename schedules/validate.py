"""The only place that knows what a legal list of sigmas is."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


MAX_STEPS = 10_000


def require_steps(steps: int) -> int:
    """`steps` if it is 1 to MAX_STEPS, else ValueError."""
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be 1 to {MAX_STEPS}, got {steps}; 20 to 50 are usual")
    return steps


def require_denoise(denoise: float) -> float:
    """`denoise` if it is above 0 and at most 1, else ValueError."""
    if not 0.0 < denoise <= 1.0:
        raise ValueError(
            f"denoise must be above 0 and at most 1, got {denoise}; 1 starts from pure noise, 0 would change nothing"
        )
    return denoise


def require_between(name: str, value: float, low: float, high: float, hint: str) -> None:
    """ValueError unless `value` is a finite number from `low` to `high`."""
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must be between {low:g} and {high:g} ({hint}), got {value}")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value[:40]!r}; use one of {', '.join(choices)}")


def require_sigmas(sigmas: Tensor, name: str = "sigmas", strict: bool = True) -> Tensor:
    """`sigmas` as a float64 CPU tensor [steps + 1], or ValueError saying what is wrong with it and where.

    Legal: one dimension, at least two finite numbers, none negative, each below the one before. `strict=False` also
    accepts equal neighbors, which are harmless to look at but useless to sample.
    """
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1:
        shape = f"a tensor of shape {list(sigmas.shape)}" if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise ValueError(f"{name} must be a one-dimensional tensor of noise levels (SIGMAS), got {shape}")
    if len(sigmas) < 2:
        raise ValueError(
            f"{name} has {len(sigmas)} value(s), so no step; a schedule needs at least 2 (was denoise 0, "
            "or the split at an end?)"
        )
    sigmas = sigmas.detach().cpu().double()
    bad = ~torch.isfinite(sigmas)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"{name}[{at}] is {float(sigmas[at])}; every noise level must be a finite number")
    if sigmas.min() < 0.0:
        at = int(sigmas.argmin())
        raise ValueError(f"{name}[{at}] is {float(sigmas[at]):g}; noise levels cannot be negative")
    falls = sigmas[1:] < sigmas[:-1] if strict else sigmas[1:] <= sigmas[:-1]
    if not falls.all():
        at = int((~falls).nonzero()[0])
        raise ValueError(
            f"{name} must fall from noise to data, but {name}[{at}] = {float(sigmas[at]):g} is followed by "
            f"{float(sigmas[at + 1]):g}; if they were flipped for unsampling, plot or use them before FlipSigmas"
        )
    return sigmas
