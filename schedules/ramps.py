"""Points from high to low: what spacings of a whole model and re-spacings between two levels have in common."""

import math

import torch
from torch import Tensor


def trailing_t(steps: int) -> Tensor:
    """1, 1 − 1/steps, …, 1/steps: float64 [steps]."""
    return 1.0 - torch.arange(steps, dtype=torch.float64) / steps


def karras_ramp(high: float, low: float, steps: int, rho: float = 7.0) -> Tensor:
    """sigma^(1/rho) linear from `high` to `low`: float64 [steps] (Karras et al. 2022, arXiv:2206.00364, Eq. 5)."""
    return torch.linspace(high ** (1.0 / rho), low ** (1.0 / rho), steps, dtype=torch.float64) ** rho


def exponential_ramp(high: float, low: float, steps: int, rho: float = 1.0) -> Tensor:
    """ln sigma from `high` to `low`, linear at rho 1, else a power of the step (k-diffusion): float64 [steps]."""
    top, bottom = math.log(high), math.log(low)
    ramp = torch.linspace(1.0, 0.0, steps, dtype=torch.float64) ** rho
    return (bottom + ramp * (top - bottom)).exp()


def beta_quantiles(probabilities: Tensor, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Quantiles of Beta(a, b), float64 of the same shape."""
    from scipy.stats import beta

    return torch.as_tensor(beta.ppf(probabilities.numpy(), a, b), dtype=torch.float64)
