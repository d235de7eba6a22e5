"""Optimizer, learning rate and moving average: torch's own, with the run's defaults."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import TrainConfig
from .optimizers import BETAS, OptimizerConfig, ParameterGroup, adamw, make_optimizer, with_rates


def build_optimizer(
    parameters: Sequence[Tensor], config: TrainConfig, others: Sequence[ParameterGroup] = ()
) -> torch.optim.Optimizer:
    """AdamW over fp32 parameters (Loshchilov and Hutter 2019, arXiv:1711.05101), `others` at their own rates."""
    if config.optimizer is not None:
        return make_optimizer(parameters, config.optimizer, config.learning_rate, others)
    groups = with_rates(parameters, config.learning_rate, others)
    return adamw(groups, lr=config.learning_rate, weight_decay=config.weight_decay, betas=BETAS)


def rate_factors(
    optimizer: torch.optim.Optimizer, config: TrainConfig, others: Sequence[ParameterGroup]
) -> list[float]:
    """What the run's rate is multiplied by in each of the optimizer's groups."""
    own = {id(p): other.learning_rate / config.learning_rate for other in others for p in other.parameters}
    return [own.get(id(group["params"][0]), 1.0) for group in optimizer.param_groups]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step `step` (0-based), by the optimizer's settings or by the run's own schedule and warm-up."""
    course = config.optimizer or OptimizerConfig(lr_schedule=config.lr_schedule, warmup=config.warmup_steps)
    return config.learning_rate * course.rate(step, config.steps, config.batch_size)


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The length of all gradients together, where the first one is: a text encoder's may be on another device."""
    norms = torch._foreach_norm(gradients)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


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
