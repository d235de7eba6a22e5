"""The sentence that the whole thing is about: noise a sample, predict, compare with the target."""

import math
from collections.abc import Sequence

from torch import Tensor

from ..schedules.prediction import target
from ..schedules.process import expand
from .losses import element_loss
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
) -> Tensor:
    """Per-sample loss [B] at the model's own noise process: by default the mean squared error of what it predicts.

    x0 and eps are [B, C, ...], t is [B]; `seen` is the noise that the network gets where that is not `eps`. Never an
    x0 loss in disguise: on an eps model that would weight the same error by sigma², a factor of 250 000 between both
    ends of SDXL's schedule (reference/training.md, 0.5). Whoever wants one says so in `config`.
    """
    x_t = denoiser.process.mix(x0, eps if seen is None else seen, t)
    prediction = denoiser.predict(x_t, t, conditions)
    goal = target(denoiser.prediction, x0, eps, t, denoiser.process)
    difference = prediction.float() - goal.float()
    space = config.space(denoiser.prediction)
    if space != denoiser.prediction:
        factor = gain(
            denoiser.prediction, space, denoiser.process.alpha(t.double()), denoiser.process.sigma(t.double())
        )
        bound = math.sqrt(config.max_weight)
        difference = expand(factor.abs().nan_to_num(nan=bound).clamp(max=bound), difference) * difference
    loss = element_loss(difference, config, denoiser.process, t).flatten(1).mean(1)
    if config.weighting != "none":
        loss = loss_weight(config, space, denoiser.process, t).to(loss) * loss
    return loss
