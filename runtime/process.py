"""Which noise process and which prediction a loaded model has: read from its `model_sampling`, never from its name."""

import math
from typing import Any

import comfy.model_sampling as host

from ..schedules.prediction import Prediction
from ..schedules.process import VP, Flow, NoiseProcess


_PREDICTIONS: dict[str, Prediction] = {"EPS": "eps", "V_PREDICTION": "v", "X0": "x0", "CONST": "velocity"}
_OTHERS = ("EDM", "IMG_TO_IMG", "IMG_TO_IMG_FLOW", "COSMOS_RFLOW", "V_PREDICTION_DDPM", "LCM")


def prediction_of(model_sampling: Any) -> Prediction | None:
    """The native prediction, or None for parametrizations outside {eps, v, x0, velocity} (EDM, Cosmos, image-to-image).

    ComfyUI's classes inherit from each other, so the first known name along the method resolution order decides.
    """
    for cls in type(model_sampling).__mro__:
        if cls.__name__ in _OTHERS:
            return None
        if cls.__name__ in _PREDICTIONS:
            return _PREDICTIONS[cls.__name__]
    return None


def process_of(model_sampling: Any) -> NoiseProcess | None:
    """The noise process in this pack's terms, or None where it has none (EDM's continuous ranges, Cascade)."""
    if isinstance(model_sampling, host.CONST):
        return Flow()
    if isinstance(model_sampling, host.ModelSamplingDiscrete) and float(model_sampling.sigma_data) == 1.0:
        return VP.from_ratios(model_sampling.sigmas)
    return None


def shift_of(model_sampling: Any) -> float:
    """The multiplicative shift of a flow model (Flux-type objects store its logarithm), 1.0 for others."""
    shift = getattr(model_sampling, "shift", None)
    if shift is None or not isinstance(model_sampling, host.CONST):
        return 1.0
    return math.exp(float(shift)) if isinstance(model_sampling, host.ModelSamplingFlux) else float(shift)
