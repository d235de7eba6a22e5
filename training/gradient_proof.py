"""Are the gradients right? Autograd's against finite differences of the loss, on the batch that is trained first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import step_generator
from .engine import Trainer
from .sharding import like, whole


TOLERANCE = 0.03
"""Relative difference between autograd's slope and the finite difference that passes."""
COARSE_TOLERANCE = 0.25
"""The same for networks that compute in 16 bits, whose rounding is in the finite difference."""
NUM_TENSORS = 8
"""Single tensors that are checked, besides all of them together."""
CHANGES = (1e-2, 2.5e-3, 4e-2)
"""Expected relative changes of the loss for the difference, one must do: small ones drown in bf16, large ones bend."""
PROBE = 0.1
"""Standard deviation of the noise on weights without a gradient: the loss must not see it."""
NOTICED = 1e-4
"""Relative change of the loss from which it does."""


@dataclass(frozen=True)
class GradientProof:
    worst: float
    """Largest relative difference of a slope."""
    num_directions: int
    unnoticed: int
    """Tensors without a gradient that change the loss: 0 where all is well."""
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        return self.num_directions > 0 and self.worst <= self.tolerance and not self.unnoticed

    def __str__(self) -> str:
        if not self.num_directions:
            return "no gradient reaches the adapters"
        if self.unnoticed:
            return f"weights without a gradient ({self.unnoticed} tensors) change the loss"
        return (
            f"the worst of {self.num_directions} slopes differs by {100 * self.worst:.2g} % from finite differences "
            f"(limit {100 * self.tolerance:g} %)"
        )


def prove_gradients(trainer: Trainer, tolerance: float = TOLERANCE) -> GradientProof:
    """Compare the slopes of the loss along the gradient, of all tensors together and of single ones, with central
    finite differences, in up to 58 forward passes. The parameters are the same bits afterwards.

    Slopes along single tensors see what the whole, which is mostly right, would hide.
    """
    loss, parameters = _loss(trainer), trainer.parameters
    gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
    trainer.optimizer.zero_grad(set_to_none=True)
    live = [i for i, g in enumerate(gradients) if g is not None and bool(whole(g).any())]
    if not live or not math.isfinite(loss):
        return GradientProof(math.inf, 0, 0)
    directions = [[i] for i in _spread(live, gradients)]
    directions = [live, *directions]
    worst = 0.0
    for rows in directions:
        chosen = [(parameters[i], g) for i in rows if (g := gradients[i]) is not None]
        worst = max(worst, _difference(trainer, chosen, loss, tolerance))
    still = [p for i, p in enumerate(parameters) if i not in set(live)]
    return GradientProof(worst, len(directions), len(still) if _noticed(trainer, still) else 0, tolerance)


def _loss(trainer: Trainer) -> float:
    return trainer._forward_backward(step_generator(trainer.config.seed, trainer.step)).item()


def _spread(live: list[int], gradients: Sequence[Tensor | None]) -> list[int]:
    """Of the tensors with the larger half of the gradients, NUM_TENSORS evenly from the first to the last."""
    norms = {i: whole(g.norm()).item() for i in live if (g := gradients[i]) is not None}
    median = sorted(norms.values())[len(norms) // 2]
    large = [i for i in live if norms[i] >= median]
    count = min(NUM_TENSORS, len(large))
    return sorted({large[round(k * (len(large) - 1) / max(count - 1, 1))] for k in range(count)})


@torch.no_grad()
def _difference(trainer: Trainer, chosen: list[tuple[Tensor, Tensor]], loss: float, tolerance: float) -> float:
    """|finite difference / slope - 1| along a gradient, the best of CHANGES."""
    slope = math.sqrt(sum(whole(g.double().square().sum()).item() for _, g in chosen))
    best = math.inf
    for change in CHANGES:
        step, values = change * abs(loss) / slope, []
        for sign in (1.0, -1.0):
            values.append(_moved(trainer, [(p, g * (sign * step / slope)) for p, g in chosen]))
        difference = abs((values[0] - values[1]) / (2 * step * slope) - 1)
        best = min(best, difference if math.isfinite(difference) else math.inf)
        if best <= tolerance:
            break
    return best


@torch.no_grad()
def _noticed(trainer: Trainer, still: list[Tensor]) -> bool:
    generator = torch.Generator().manual_seed(trainer.config.seed)
    noise = [(p, like(PROBE * torch.randn(p.shape, generator=generator).to(p.device, p.dtype), p)) for p in still]
    base = _loss(trainer)
    return abs(_moved(trainer, noise) - base) > NOTICED * abs(base)


def _moved(trainer: Trainer, changes: list[tuple[Tensor, Tensor]]) -> float:
    """The loss with something added to parameters, which are as before afterwards."""
    before = [p.clone() for p, _ in changes]
    try:
        for p, change in changes:
            p.add_(change)
        return _loss(trainer)
    finally:
        for (p, _), old in zip(changes, before, strict=True):
            p.copy_(old)
