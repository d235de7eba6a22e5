"""Between ComfyUI's `model_sampling` objects and our noise processes: read one, or patch a changed copy onto a clone.

Reading and writing always start from the currently patched object (`get_model_object`), so these nodes compose with
each other and with core's. The object's own class is kept: samplers and other packs dispatch on it, and a Flux model
stores mu where an SD3 model stores shift, both under the name `shift`.
"""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling as host_sampling
from comfy.model_patcher import ModelPatcher

from ..schedules.families import FAMILIES, Family, family_of, official_shift
from ..schedules.prediction import Prediction
from ..schedules.process import VP, Flow, NoiseProcess
from ..schedules.shift import mu_from_shift, require_shift, shift_from_mu
from ..schedules.ztsnr import TERMINAL_ALPHA_BAR, rescale_zero_terminal_snr


logger = logging.getLogger(__name__)

SHIFT_MODES = ("official", "shift", "mu")
_FLOW_SCHEDULES = (host_sampling.ModelSamplingDiscreteFlow, host_sampling.ModelSamplingFlux)
_PREDICTIONS: dict[str, Prediction | None] = {
    "EPS": "eps",
    "V_PREDICTION": "v",
    "V_PREDICTION_DDPM": "v",
    "X0": "x0",
    "CONST": "velocity",
    # Derived from the above, but their outputs are none of our predictions.
    "EDM": None,
    "LCM": None,
    "IMG_TO_IMG": None,
    "IMG_TO_IMG_FLOW": None,
    "COSMOS_RFLOW": None,
}


@dataclass(frozen=True)
class Sampling:
    """What a MODEL is told about noise, in our words."""

    host: Any
    """The host object that it was read from."""
    prediction: Prediction | None
    """None where the output is none of our predictions (EDM preconditioning, image-to-image regression, Cosmos)."""
    process: NoiseProcess
    """Flow for flow schedules, VP with the host's own table for all others: a continuous range is a table of 1000 rows
    there, and a zero-terminal one ends at its finite stand-in."""
    shift: float | None
    """α of the time shift; None where the model is not a flow model."""
    multiplier: float | None
    """The network is given sigma times this; None where it is given a table row or another function of sigma."""

    @property
    def mu(self) -> float | None:
        return None if self.shift is None else mu_from_shift(self.shift)

    @property
    def terminal_snr(self) -> float:
        """Signal-to-noise ratio at the noisiest level; 0 is pure noise."""
        return float(self.process.log_snr(1.0).exp())


def current_sampling(model: ModelPatcher) -> Any:
    """The model_sampling object that sampling this MODEL would use now. ValueError where it is no diffusion MODEL."""
    if not isinstance(model, ModelPatcher) or not hasattr(model.model, "model_sampling"):
        raise ValueError(f"expected a diffusion MODEL, got {type(getattr(model, 'model', model)).__name__}")
    return model.get_model_object("model_sampling")


def read_sampling(model: ModelPatcher) -> Sampling:
    """Read the patched model_sampling of a MODEL."""
    host = current_sampling(model)
    # The host derives its classes from each other, so the nearest name in the resolution order decides.
    name = next((cls.__name__ for cls in type(host).__mro__ if cls.__name__ in _PREDICTIONS), "")
    prediction = _PREDICTIONS.get(name)
    if isinstance(host, host_sampling.ModelSamplingFlux):
        return Sampling(host, prediction, Flow(), shift_from_mu(float(host.shift)), 1.0)
    if isinstance(host, host_sampling.ModelSamplingDiscreteFlow):
        return Sampling(host, prediction, Flow(), float(host.shift), float(host.multiplier))
    return Sampling(host, prediction, VP.from_ratios(host.sigmas), None, None)


def detect_family(model: ModelPatcher) -> Family | None:
    """The family of a MODEL by ComfyUI's class names, or None.

    A config class of `comfy.supported_models` decides alone, because families share network classes (FLUX.1 schnell is
    a `Flux`, Z-Image a `Lumina2`). Any other config is known by its own name or by the network's class.
    """
    config = type(model.model.model_config)
    if config.__module__ == "comfy.supported_models":
        return family_of(config.__name__)
    return family_of(config.__name__) or family_of(type(model.model).__name__)


def resolve_shift(
    model: ModelPatcher, mode: str, shift: float, mu: float, width: int, height: int
) -> tuple[float, float]:
    """(shift, mu) that `mode` asks for. ValueError for a bad number, an unknown mode or a family without a rule."""
    if mode == "shift":
        return shift, mu_from_shift(require_shift(shift))
    if mode == "mu":
        return shift_from_mu(mu), mu
    if mode != "official":
        raise ValueError(f"unknown mode {mode[:40]!r}; use one of {', '.join(SHIFT_MODES)}")
    family = detect_family(model)
    if family is None or family.rule is None:
        known = ", ".join(key for key, family in FAMILIES.items() if family.rule is not None)
        name = family.title if family else f"{type(model.model.model_config).__name__} ({type(model.model).__name__})"
        raise ValueError(
            f"no official shift is known for {name}; known are {known}. Use mode shift or mu and give the number"
        )
    return official_shift(family, width, height)


def patch_flow_shift(
    model: ModelPatcher, mode: str, shift: float, mu: float, width: int, height: int
) -> tuple[ModelPatcher, float, float]:
    """A clone of a flow MODEL with another time shift, and that shift and its mu.

    Multiplier, table length, noise scale and audio shift stay as they are. ValueError where it is not a flow model.
    """
    host = current_sampling(model)
    if not isinstance(host, _FLOW_SCHEDULES):
        raise ValueError(_no_shift_message(read_sampling(model)))
    shift, mu = resolve_shift(model, mode, shift, mu, width, height)
    patched = copy.deepcopy(host)
    timesteps = len(host.sigmas)
    if isinstance(host, host_sampling.ModelSamplingFlux):
        patched.set_parameters(shift=mu, timesteps=timesteps)
    else:
        # Left out, multiplier would fall back to 1000 and audio_shift to none.
        audio = {"audio_shift": host.audio_shift} if hasattr(host, "audio_shift") else {}
        patched.set_parameters(shift=shift, timesteps=timesteps, multiplier=host.multiplier, **audio)
    return _with_sampling(model, patched), shift, mu


def patch_zero_terminal_snr(model: ModelPatcher) -> ModelPatcher:
    """A clone of a v or x0 MODEL with its noise table rescaled to zero terminal SNR. ValueError for other models."""
    sampling = read_sampling(model)
    host = sampling.host
    if sampling.shift is not None:
        raise ValueError(
            "this is a flow model: its last noise level is already pure noise (terminal SNR 0). "
            "To move its noise levels use Flow Shift (Tidetable_FlowShift)"
        )
    if sampling.prediction == "eps":
        raise ValueError(
            "this model predicts noise (eps), and with zero terminal SNR that says nothing about the image: in pure "
            "noise the denoised image is x - sigma * eps with sigma = 4518, so an error of 0.001 becomes 4.5. Use a "
            "model trained with v prediction; if this one was, set it with ComfyUI's ModelSamplingDiscrete "
            "(v_prediction) first"
        )
    if sampling.prediction not in ("v", "x0") or not has_discrete_table(host):
        raise ValueError(
            f"zero terminal SNR is defined for v and x0 models with a discrete noise table, not for {class_names(host)}"
        )
    patched = copy.deepcopy(host)
    alpha_bar = 1.0 / (1.0 + host.sigmas.cpu().double() ** 2)
    if float(alpha_bar[-1]) <= 1.001 * TERMINAL_ALPHA_BAR:
        logger.info("the model has zero terminal SNR already; its noise table is kept")
    else:
        alpha_bar = rescale_zero_terminal_snr(alpha_bar).clamp(min=TERMINAL_ALPHA_BAR)
        patched.set_sigmas(((1.0 - alpha_bar) / alpha_bar).sqrt())
    patched.zsnr = True
    return _with_sampling(model, patched)


def has_discrete_table(host: Any) -> bool:
    """Whether the network's timestep is a row of the noise table."""
    continuous = (host_sampling.ModelSamplingDiscreteEDM, host_sampling.StableCascadeSampling)
    return isinstance(host, host_sampling.ModelSamplingDiscrete) and not isinstance(host, continuous)


def _with_sampling(model: ModelPatcher, host: Any) -> ModelPatcher:
    clone = model.clone()
    clone.add_object_patch("model_sampling", host)
    return clone


def class_names(host: Any) -> str:
    """The host's schedule and prediction classes, e.g. "ModelSamplingDiscrete + EPS"."""
    bases = type(host).__bases__
    return " + ".join(base.__name__ for base in bases) if len(bases) > 1 else type(host).__name__


def _no_shift_message(sampling: Sampling) -> str:
    start = f"this is not a flow model but {class_names(sampling.host)}, so it has no shift"
    if sampling.prediction in ("v", "x0"):
        return (
            f"{start}. To fix the noise schedule of a {sampling.prediction} model use "
            "Zero Terminal SNR (Tidetable_ZeroTerminalSNR)"
        )
    if sampling.prediction == "eps":
        return (
            f"{start}. To choose the noise levels of an eps model use Schedule (Tidetable_Schedule); a flow-matching "
            "finetune of such a model must be declared with ComfyUI's ModelSamplingSD3 first"
        )
    return f"{start}. To choose its noise levels use Schedule (Tidetable_Schedule)"
