"""Which noise process and which prediction a loaded model has: read from its `model_sampling`, never from its name."""

from typing import Any

import comfy.model_sampling as host

from ..schedules.prediction import Prediction
from ..schedules.process import VP, Flow, NoiseProcess
from ..schedules.shift import shift_from_mu


_PREDICTIONS: dict[str, Prediction | None] = {
    "EPS": "eps",
    "V_PREDICTION": "v",
    "V_PREDICTION_DDPM": "v",
    "X0": "x0",
    "CONST": "velocity",
    # Ours, for what ComfyUI has no class for (prediction.py).
    "FlowX0": "x0",
    "FlowV": "v",
    "RatioVelocity": "velocity",
    # Derived from the above, but their outputs are none of our predictions.
    "EDM": None,
    "LCM": None,
    "IMG_TO_IMG": None,
    "IMG_TO_IMG_FLOW": None,
    "COSMOS_RFLOW": None,
}


def prediction_of(model_sampling: Any) -> Prediction | None:
    """The native prediction, or None for parametrizations outside {eps, v, x0, velocity} (EDM, Cosmos, image-to-image).

    ComfyUI's classes inherit from each other, so the first known name along the method resolution order decides.
    """
    name = next((cls.__name__ for cls in type(model_sampling).__mro__ if cls.__name__ in _PREDICTIONS), "")
    return _PREDICTIONS.get(name)


def process_of(model_sampling: Any) -> NoiseProcess | None:
    """The noise process in this pack's terms, or None where it has none (EDM's continuous ranges, unscaled inputs)."""
    if isinstance(model_sampling, host.CONST):
        return Flow()
    discrete = isinstance(model_sampling, host.ModelSamplingDiscrete) and isinstance(model_sampling, host.EPS)
    if discrete and float(model_sampling.sigma_data) == 1.0:
        return VP.from_ratios(model_sampling.sigmas)
    return None


def stored_shift(model_sampling: Any) -> float | None:
    """The multiplicative shift of a flow schedule (Flux-type objects store its logarithm), None for others."""
    shift = getattr(model_sampling, "shift", None)
    if shift is None:
        return None
    return shift_from_mu(float(shift)) if isinstance(model_sampling, host.ModelSamplingFlux) else float(shift)


def in_first_steps(model_sampling: Any, model_options: dict, sigma: float, steps: int) -> bool:
    """Whether `sigma` belongs to the first `steps` steps of a sampling run that begins in the model's purest noise."""
    sigmas = model_options["transformer_options"].get("sample_sigmas")
    if sigmas is None or float(sigmas[0]) < float(model_sampling.sigma_max) * (1.0 - 1e-4):
        return False
    return sigma > float(sigmas[min(steps, len(sigmas) - 1)]) * (1.0 + 1e-6)
