"""The sentence that the whole thing is about: noise a sample, predict, compare with the native target."""

from collections.abc import Sequence

from torch import Tensor

from ..schedules.prediction import target
from .protocols import Condition, TrainableDenoiser


def loss_for_batch(
    denoiser: TrainableDenoiser, x0: Tensor, conditions: Sequence[Condition], eps: Tensor, t: Tensor
) -> Tensor:
    """Per-sample mean squared error [B] in the model's own prediction space, at the model's own noise process.

    x0 and eps are [B, C, ...], t is [B]. Never an x0 loss in disguise: on an eps model that would weight the same
    error by sigma², a factor of 250 000 between both ends of SDXL's schedule (reference/training.md, 0.5).
    """
    x_t = denoiser.process.mix(x0, eps, t)
    prediction = denoiser.predict(x_t, t, conditions)
    goal = target(denoiser.prediction, x0, eps, t, denoiser.process)
    return (prediction.float() - goal.float()).square().flatten(1).mean(1)
