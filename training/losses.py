"""What a difference costs, element by element."""

import math

import torch
from torch import Tensor

from ..schedules.process import NoiseProcess, expand
from .recipe import ObjectiveConfig


def element_loss(difference: Tensor, config: ObjectiveConfig, process: NoiseProcess, t: Tensor) -> Tensor:
    """Squared, absolute or pseudo-Huber differences in the shape of `difference` [B, …].

    pseudo-Huber (Charbonnier et al. 1997; Song and Dhariwal 2023, arXiv:2310.14189): 2c·(sqrt(d² + c²) - c), which is
    d² for |d| far below c and 2c·|d| far above.
    """
    if config.loss == "mse":
        return difference.square()
    if config.loss == "l1":
        return difference.abs()
    c = expand(huber_c(config, process, t), difference)
    # d²/(sqrt(d² + c²) + c) is sqrt(d² + c²) - c without the cancellation.
    return 2 * c * difference.square() / (torch.sqrt(difference.square() + c**2) + c)


def huber_c(config: ObjectiveConfig, process: NoiseProcess, t: Tensor) -> Tensor:
    """c [B] at the noise levels t [B], by `huber_schedule`: kohya's three."""
    t = t.double()
    if config.huber_schedule == "constant":
        return torch.full_like(t, config.huber_c)
    if config.huber_schedule == "exponential":
        return torch.exp(math.log(config.huber_c) * t)
    return (1 - config.huber_c) / (1 + process.ratio(t)) ** 2 + config.huber_c
