"""Optimizer, learning rate and moving average: torch's own, with the run's defaults."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .config import TrainConfig
from .optimizers import make_optimizer


def build_optimizer(parameters: Sequence[Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over fp32 parameters (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    if config.optimizer is not None:
        return make_optimizer(parameters, config.optimizer, config.learning_rate)
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step `step` (0-based): linear warm-up, then half a cosine to 0 or constant."""
    if config.optimizer is not None:
        return config.learning_rate * config.optimizer.rate(step, config.steps, config.batch_size)
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class MovingAverage:
    """Exponential moving average of parameters, with the decay ramped up as (1 + n) / (10 + n)."""

    def __init__(self, parameters: Sequence[Tensor], decay: float, device: str | None = None):
        """`device` holds the average; None is where the parameters are."""
        self.decay = decay
        self.parameters = list(parameters)
        self.average = [parameter.detach().to(device, copy=True) for parameter in parameters]
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [p.detach().to(a.device) for p, a in zip(self.parameters, self.average, strict=True)]
        torch._foreach_lerp_(self.average, current, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)
