"""Weights of the loss at a noise level, each defined where its paper defines it and carried to where the error is.

At one x_t an error in one prediction is a fixed multiple of the error in another, so L_x0 = sigma²/alpha²·L_eps =
sigma²·L_v = t²·L_u (v on variance-preserving processes, u = eps - x0 with t = sigma/(alpha + sigma)). A weight of
the x0 loss is therefore that multiple of itself as a weight of the eps loss: the same training, whatever the network
says. The SNR counts as at least SNR_FLOOR, so that the last step of a zero-terminal schedule, where min-SNR would be
0 for v and 0/0 for eps, is trained like SDXL's last one.
"""

import math

import torch
from torch import Tensor

from ..schedules.prediction import Prediction, coefficients
from ..schedules.process import NoiseProcess
from .recipe import ObjectiveConfig


SNR_FLOOR = 0.0046
"""Just below SDXL's last row (0.00468)."""


def gain(source: Prediction, dest: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """d(dest)/d(source) at a fixed noisy sample: the error of one prediction in terms of another. May be infinite."""
    if source == dest:
        return torch.ones_like(alpha)
    return _determinant(dest, alpha, sigma) / _determinant(source, alpha, sigma)


def loss_weight(config: ObjectiveConfig, space: Prediction, process: NoiseProcess, t: Tensor) -> Tensor:
    """[B] float64 factors of the loss measured in `space`, at most `max_weight`."""
    t = t.double()
    alpha, sigma = process.alpha(t), process.sigma(t)
    alpha = alpha.maximum(math.sqrt(SNR_FLOOR) * sigma)
    snr = alpha**2 / sigma**2
    time = sigma / (alpha + sigma)
    home, weight = _at_home(config, snr, time)
    carried = weight * gain(space, home, alpha, sigma) ** 2
    # At t = 0 some products are inf·0; the limit of each is at most the bound.
    return torch.nan_to_num(carried, nan=0.0, posinf=config.max_weight).clamp(max=config.max_weight)


def _at_home(config: ObjectiveConfig, snr: Tensor, t: Tensor) -> tuple[Prediction, Tensor]:
    """(where the weight is defined, the weight) for an SNR and the flow time of the same SNR."""
    gamma = config.gamma
    match config.weighting:
        case "min_snr":  # Hang et al. 2023, arXiv:2303.09556, Eq. 5
            return "x0", snr.clamp(max=gamma)
        case "soft_min_snr":  # Crowson et al. 2024, arXiv:2401.11605, section 4.4
            return "x0", 1 / (1 / snr + 1 / gamma)
        case "debiased":  # Yu et al. 2023, arXiv:2310.08442; SNR to 1000 as everybody has it
            return "eps", snr.clamp(max=1000.0).rsqrt()
        case "p2":  # Choi et al. 2022, arXiv:2204.00227, Eq. 8 with k = 1
            return "eps", (1 + snr) ** -gamma
        case "sigma_sqrt":  # Esser et al. 2024, arXiv:2403.03206: the velocity loss over t²
            return "velocity", t**-2
        case "cosmap":  # the same, section 3.1
            return "velocity", 2 / (math.pi * (1 - 2 * t + 2 * t**2))
    raise ValueError(f"weighting {config.weighting!r} has no weight")


def _determinant(kind: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    a, b = coefficients(kind, alpha, sigma)
    return a * sigma - b * alpha
