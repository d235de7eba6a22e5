"""What a network predicts, and how one prediction becomes another.

Every prediction is linear in the clean sample and the noise: value = a·x0 + b·eps. Together with x_t = alpha·x0 +
sigma·eps that is a 2×2 system, so one solve converts between all of them, for every process:

    eps       noise                    x0        clean sample
    v         alpha·eps − sigma·x0     velocity  eps − x0              score     −eps/sigma

`v` is from Salimans & Ho 2022 (arXiv:2202.00512), `velocity` is dx/dt of rectified flow (arXiv:2209.03003).

A conversion is singular where x_t and the value hold the same information: eps and score say nothing about x0 where
alpha is 0, x0 says nothing about eps where sigma is 0. The result is then inf or nan, never a made-up number.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from .process import NoiseProcess, as_time, expand


Prediction = Literal["eps", "x0", "v", "velocity", "score"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def coefficients(kind: Prediction, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of value = a·x0 + b·eps, in the shape of alpha and sigma."""
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    match kind:
        case "eps":
            return zero, one
        case "x0":
            return one, zero
        case "v":
            return -sigma, alpha
        case "velocity":
            return -one, one
        case "score":
            return zero, -1.0 / sigma
    raise ValueError(f"unknown prediction {kind!r}; use one of {', '.join(PREDICTIONS)}")


def target(kind: Prediction, x0: Tensor, eps: Tensor, t: Tensor | float, process: NoiseProcess) -> Tensor:
    """What a perfect network of this kind would output: a·x0 + b·eps. x0, eps [B, …]; t () or [B]."""
    t = as_time(t)
    a, b = coefficients(kind, process.alpha(t), process.sigma(t))
    return expand(a, x0) * x0 + expand(b, eps) * eps


def solve(value: Tensor, kind: Prediction, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, eps) from a prediction and the noisy sample it was made at, both [B, …]; alpha, sigma () or [B]."""
    a, b = coefficients(kind, alpha, sigma)
    determinant = expand(a * sigma - b * alpha, x_t)
    alpha, sigma, a, b = (expand(c, x_t) for c in (alpha, sigma, a, b))
    # What the network said outright is not solved for again: that would divide 0 by 0 where the other is unknowable.
    x0 = value if kind == "x0" else (sigma * value - b * x_t) / determinant
    eps = value if kind == "eps" else (a * x_t - alpha * value) / determinant
    return x0, eps


def to_x0_eps(
    value: Tensor, kind: Prediction, x_t: Tensor, t: Tensor | float, process: NoiseProcess
) -> tuple[Tensor, Tensor]:
    """`solve` at time t of a process."""
    t = as_time(t)
    return solve(value, kind, x_t, process.alpha(t), process.sigma(t))


def convert_at(
    value: Tensor, source: Prediction, dest: Prediction, x_t: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """A prediction of kind `source` expressed as kind `dest`, at x_t = alpha·x0 + sigma·eps [B, …]."""
    if source == dest:
        return value
    x0, eps = solve(value, source, x_t, alpha, sigma)
    if dest == "x0":
        return x0
    if dest == "eps":
        return eps
    a, b = coefficients(dest, alpha, sigma)
    return expand(a, x0) * x0 + expand(b, eps) * eps


def convert(
    value: Tensor, source: Prediction, dest: Prediction, x_t: Tensor, t: Tensor | float, process: NoiseProcess
) -> Tensor:
    """`convert_at` time t of a process."""
    t = as_time(t)
    return convert_at(value, source, dest, x_t, process.alpha(t), process.sigma(t))


def denoised(value: Tensor, kind: Prediction, x_t: Tensor, t: Tensor | float, process: NoiseProcess) -> Tensor:
    """The x0 estimate in a prediction: what samplers consume."""
    return convert(value, kind, "x0", x_t, t, process)
