"""Between ComfyUI's `model_sampling` objects and our noise processes: read one, or patch a changed copy onto a clone.

Reading and writing always start from the currently patched object (`get_model_object`), so these nodes compose with
each other and with core's. The object's own class is kept: samplers and other packs dispatch on it, and a Flux model
stores mu where an SD3 model stores shift, both under the name `shift`.
"""

import copy
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling as host_sampling
from comfy.model_patcher import ModelPatcher

from ..schedules.families import family_named, family_of
from ..schedules.family import Family
from ..schedules.prediction import Prediction
from ..schedules.process import VP, Flow, NoiseProcess
from ..schedules.shift import FLUX_LINE, MuLine, mu_from_shift
from ..schedules.shift_modes import SHIFT_MODES as SHIFT_MODES
from ..schedules.shift_modes import ShiftChoice, chosen_shift
from .flow_shift import generic_family, how_chosen, latent_size, upstream_notes
from .process import prediction_of, stored_shift


_FLOW_SCHEDULES = (host_sampling.ModelSamplingDiscreteFlow, host_sampling.ModelSamplingFlux)


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
    prediction = prediction_of(host)
    if isinstance(host, _FLOW_SCHEDULES):
        return Sampling(host, prediction, Flow(), stored_shift(host), float(getattr(host, "multiplier", 1.0)))
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


def rule_family(model: ModelPatcher, mode: str, key: str = "auto") -> Family:
    """The family whose rule and token sizes hold: `key`, or for "auto" the detected one, or else sizes alone.

    ValueError for an unknown key, and where mode "official" finds no rule.
    """
    family = detect_family(model) if key == "auto" else family_named(key)
    if mode == "official" and (family is None or family.rule is None):
        name = family.title if family else f"{type(model.model.model_config).__name__} ({type(model.model).__name__})"
        raise ValueError(
            f"no official shift is known for {name}. Set family to the one whose rule it should follow, or use mode "
            "shift or mu and give the number"
        )
    return family or generic_family(model.model.latent_format)


def patch_flow_shift(
    model: ModelPatcher,
    mode: str,
    shift: float,
    mu: float,
    width: int,
    height: int,
    family: str = "auto",
    length: int = 1,
    steps: int = 20,
    x1: float = FLUX_LINE.x1,
    y1: float = FLUX_LINE.y1,
    x2: float = FLUX_LINE.x2,
    y2: float = FLUX_LINE.y2,
    base_size: int = 1024,
    latent: dict | None = None,
) -> tuple[ModelPatcher, float, float, str]:
    """A clone of a flow MODEL with another time shift, that shift and its mu, and words about what was done.

    Multiplier, table length, noise scale and audio shift stay as they are. A LATENT replaces width, height and length.
    ValueError where it is not a flow model, and for numbers out of range.
    """
    host, original = current_sampling(model), model.model.model_sampling
    if not isinstance(host, _FLOW_SCHEDULES):
        raise ValueError(_no_shift_message(read_sampling(model), isinstance(original, _FLOW_SCHEDULES)))
    rule = rule_family(model, mode, family)
    choice = ShiftChoice(mode, shift, mu, width, height, length, steps, MuLine(x1, y1, x2, y2), base_size)
    if latent is not None:
        latent_format = model.model.latent_format
        own = detect_family(model) or generic_family(latent_format)
        choice = choice.resized(*latent_size(latent, latent_format.latent_channels, own))
    shift, mu = chosen_shift(choice, rule)
    notes = [f"α {shift:.4f}, mu {mu:.4f}: {how_chosen(choice, rule)}", *upstream_notes(host, original, rule)]
    return with_sampling(model, _reshifted(host, shift, mu)), shift, mu, "\n".join(notes)


def _reshifted(host: Any, shift: float, mu: float) -> Any:
    """A copy of a flow schedule with this shift and everything else as it was."""
    patched = copy.deepcopy(host)
    timesteps = len(host.sigmas)
    if isinstance(host, host_sampling.ModelSamplingFlux):
        patched.set_parameters(shift=mu, timesteps=timesteps)
    else:
        # Left out, multiplier would fall back to 1000 and audio_shift to none.
        audio = {"audio_shift": host.audio_shift} if hasattr(host, "audio_shift") else {}
        patched.set_parameters(shift=shift, timesteps=timesteps, multiplier=host.multiplier, **audio)
    return patched


def has_discrete_table(host: Any) -> bool:
    """Whether the network's timestep is a row of the noise table."""
    continuous = (host_sampling.ModelSamplingDiscreteEDM, host_sampling.StableCascadeSampling)
    return isinstance(host, host_sampling.ModelSamplingDiscrete) and not isinstance(host, continuous)


def with_sampling(model: ModelPatcher, host: Any) -> ModelPatcher:
    clone = model.clone()
    clone.add_object_patch("model_sampling", host)
    return clone


def class_names(host: Any) -> str:
    """The host's schedule and prediction classes, e.g. "ModelSamplingDiscrete + EPS"."""
    bases = type(host).__bases__
    return " + ".join(base.__name__ for base in bases) if len(bases) > 1 else type(host).__name__


def _no_shift_message(sampling: Sampling, was_flow: bool) -> str:
    start = f"this is not a flow model but {class_names(sampling.host)}, so it has no shift"
    if was_flow:
        return f"{start}; its checkpoint is one, so an earlier model-sampling node made it so. Remove that node"
    if sampling.prediction in ("v", "x0"):
        return (
            f"{start}. To fix the noise schedule of a {sampling.prediction} model use "
            "Zero Terminal SNR (Tidetable_ZeroTerminalSNR)"
        )
    if sampling.prediction == "eps":
        return (
            f"{start}. To choose the noise levels of an eps model use Schedule (Tidetable_Schedule); a flow-matching "
            "finetune of such a model is declared with Flow Graft (Tidetable_FlowGraft) first"
        )
    return f"{start}. To choose its noise levels use Schedule (Tidetable_Schedule)"
