"""The sentence that the whole thing is about: noise a sample, predict, compare with the target."""

import math
from collections.abc import Sequence

from torch import Tensor

from ..schedules.prediction import target
from ..schedules.process import expand
from .losses import element_loss
from .masked import learned_weight
from .protocols import Condition, TrainableDenoiser
from .recipe import ObjectiveConfig
from .weights import gain, loss_weight


NATIVE = ObjectiveConfig()


def loss_for_batch(
    denoiser: TrainableDenoiser,
    x0: Tensor,
    conditions: Sequence[Condition],
    eps: Tensor,
    t: Tensor,
    config: ObjectiveConfig = NATIVE,
    seen: Tensor | None = None,
    masks: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """Per-sample loss [B] at the model's own noise process: by default the mean squared error of what it predicts.

    x0 and eps are [B, C, ...], t is [B]; `seen` is the noise that the network gets where that is not `eps`. Never an
    x0 loss in disguise: on an eps model that would weight the same error by sigma², a factor of 250 000 between both
    ends of SDXL's schedule (reference/training.md, 0.5). Whoever wants one says so in `config`. `masks` [B, 1, ...]
    say what of it is learned; outside them `base` [B, C, ...], the answer without the adapter, is a second target.
    """
    x_t = denoiser.process.mix(x0, eps if seen is None else seen, t)
    prediction = denoiser.predict(x_t, t, conditions)
    goal = target(denoiser.prediction, x0, eps, t, denoiser.process)
    loss = cost(denoiser, prediction, goal, t, config, learned_weight(masks, config))
    if base is not None and masks is not None:
        loss = loss + config.prior_weight * cost(denoiser, prediction, base, t, config, 1 - masks)
    return loss


def cost(
    denoiser: TrainableDenoiser,
    prediction: Tensor,
    goal: Tensor,
    t: Tensor,
    config: ObjectiveConfig,
    weight: Tensor | None = None,
) -> Tensor:
    """[B] what the difference of two native predictions costs, each element counting `weight` [B, 1, ...]."""
    difference = prediction.float() - goal.float()
    space = config.space(denoiser.prediction)
    if space != denoiser.prediction:
        factor = gain(
            denoiser.prediction, space, denoiser.process.alpha(t.double()), denoiser.process.sigma(t.double())
        )
        bound = math.sqrt(config.max_weight)
        difference = expand(factor.abs().nan_to_num(nan=bound).clamp(max=bound), difference) * difference
    elements = element_loss(difference, config, denoiser.process, t)
    loss = (elements if weight is None else weight * elements).flatten(1).mean(1)
    if config.weighting != "none":
        loss = loss_weight(config, space, denoiser.process, t).to(loss) * loss
    return loss
