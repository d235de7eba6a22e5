"""How a network's output is read: its prediction, set on the noise schedule that the MODEL has now.

ComfyUI writes schedule and prediction into one class, `class ModelSampling(schedule, prediction)`. Here the second half
is exchanged on a copy of the patched object, so shift, multiplier, table and sigma range stay what other nodes made
them. Flow models keep `CONST` among their classes, and all others `EPS`: samplers and other packs ask for these to know
how noise was added.
"""

import copy
import math
from typing import Any

import comfy.model_sampling as host_sampling
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..schedules.prediction import PREDICTIONS, Prediction, convert_at, solve
from ..schedules.shift import require_shift
from ..schedules.validate import require_choice
from ..schedules.ztsnr import PURE_NOISE_SNR
from .model_sampling import (
    Sampling,
    class_names,
    current_sampling,
    has_discrete_table,
    read_sampling,
    with_sampling,
)


class FlowX0(host_sampling.CONST):
    """A flow model whose network predicts the clean latent."""

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_output


class FlowV(host_sampling.CONST):
    """A flow model whose network predicts v = (1 − t)·noise − t·x0."""

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        t = _per_sample(sigma)
        return solve(model_output, "v", model_input, 1.0 - t, t)[0]


class RatioVelocity(host_sampling.EPS):
    """A model with sigma = noise/signal whose network predicts noise − x0. ComfyUI's x is x0 + sigma·noise."""

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        sigma = _per_sample(sigma)
        return solve(model_output, "velocity", model_input, torch.ones_like(sigma), sigma)[0]


def _per_sample(sigma: Tensor) -> Tensor:
    """() or [B], as `expand` asks for; samplers of a single picture pass [1] as well."""
    return sigma.reshape(()) if sigma.nelement() == 1 else sigma


_ON_FLOW = {"v": FlowV, "x0": FlowX0, "velocity": host_sampling.CONST}
_ON_RATIOS = {
    "eps": host_sampling.EPS,
    "v": host_sampling.V_PREDICTION,
    "x0": host_sampling.X0,
    "velocity": RatioVelocity,
    "edm": host_sampling.EDM,
}
PREDICTION_NAMES = tuple(_ON_RATIOS)
# Classes that feed the network in a way of their own, or have no noise at all; some exist in newer ComfyUI only.
_OWN_INPUT = ("COSMOS_RFLOW", "IMG_TO_IMG", "IMG_TO_IMG_FLOW", "V_PREDICTION_DDPM")


def patch_prediction(model: ModelPatcher, prediction: str) -> ModelPatcher:
    """A clone of a MODEL whose network output is read as `prediction`, one of PREDICTION_NAMES.

    ValueError where that reading does not determine the denoised latent, or where the model's class is not one to
    change.
    """
    sampling = read_sampling(model)
    schedule = _schedule_class(sampling.host)
    reading = _require_reading(sampling, prediction)
    patched = copy.deepcopy(sampling.host)
    patched.__class__ = type("ModelSampling", (schedule, reading), {})
    return with_sampling(model, patched)


def _schedule_class(host: Any) -> type:
    """The schedule half of the object's class. ValueError where it is no sum of two halves."""
    names = [cls.__name__ for cls in type(host).__mro__]
    own_input = next((name for name in _OWN_INPUT if name in names), None)
    if own_input or not isinstance(host, host_sampling.EPS | host_sampling.CONST):
        raise ValueError(
            f"this model is {class_names(host)}, which feeds its network in its own way, so another prediction has no "
            "meaning for it. If a model-sampling node made it so, take that node out"
        )
    halves = (host_sampling.EPS, host_sampling.CONST)
    both = [cls for cls in type(host).__mro__ if issubclass(cls, torch.nn.Module) and issubclass(cls, halves)]
    methods = sorted({name for cls in both for name, value in vars(cls).items() if callable(value) and name[0] != "_"})
    if methods:
        raise ValueError(
            f"the model's sampling class {both[0].__module__}.{both[0].__name__} has methods of its own "
            f"({', '.join(methods)}), which setting the prediction would drop. Place Prediction before the node that "
            "installs it"
        )
    return next(cls for cls in type(host).__mro__ if issubclass(cls, torch.nn.Module) and cls not in both)


def _require_reading(sampling: Sampling, prediction: str) -> type:
    """ComfyUI's or our prediction class; ValueError where the denoised latent would not follow from the output."""
    require_choice("prediction", prediction, PREDICTION_NAMES)
    flow = sampling.shift is not None
    if prediction == "eps" and sampling.terminal_snr < PURE_NOISE_SNR:
        way_out = (
            "If the network was trained on flow matching, choose velocity, v or x0"
            if flow
            else "Use v, x0 or velocity, or cap sigma with Zero Terminal SNR (Tidetable_ZeroTerminalSNR, sigma_cap 160)"
        )
        raise ValueError(
            f"this model starts in pure noise (largest sigma {float(sampling.host.sigma_max):.6g}), where a predicted "
            f"noise (eps) says nothing about the picture. {way_out}"
        )
    if flow and prediction == "edm":
        raise ValueError(
            "edm is the preconditioned output of models with sigma = noise/signal (Karras et al. 2022), and this is a "
            f"flow model ({class_names(sampling.host)}). Choose velocity, v or x0"
        )
    return (_ON_FLOW if flow else _ON_RATIOS)[prediction]


def patch_flow_graft(model: ModelPatcher, shift: float) -> ModelPatcher:
    """A clone of an eps or v U-Net as the flow model that it was finetuned to be: velocity, timestep t·1000, `shift`.

    The same model_sampling as ComfyUI's ModelSamplingSD3 makes. ValueError for models that are flow already, that are
    no U-Nets, or that have a continuous range of sigma.
    """
    host = current_sampling(model)
    if isinstance(host, host_sampling.CONST):
        raise ValueError(
            f"this model is flow already ({class_names(host)}). To change its shift use Flow Shift "
            "(Tidetable_FlowShift)"
        )
    network = type(model.model.diffusion_model).__name__
    if not isinstance(model.model.diffusion_model, UNetModel) or not has_discrete_table(host):
        raise ValueError(
            "Flow Graft is for U-Nets with a discrete noise table (SD1.5, SD2, SDXL) that were finetuned with flow "
            f"matching, not for {network} with {class_names(host)}; leave such a model as its loader made it, and take "
            "out the node that changed it"
        )

    class ModelSampling(host_sampling.ModelSamplingDiscreteFlow, host_sampling.CONST):
        pass

    grafted = ModelSampling()
    grafted.set_parameters(shift=require_shift(shift), multiplier=1000)
    return with_sampling(model, grafted)


CONVERTIBLE = PREDICTIONS
PROCESS_NAMES = ("flow", "vp", "ve", "model")


def convert_prediction(
    noisy: dict,
    prediction: dict,
    source: Prediction,
    dest: Prediction,
    process: str,
    sigma: float,
    model: ModelPatcher | None = None,
) -> dict:
    """LATENT `prediction` of kind `source`, made at LATENT `noisy`, as a LATENT of kind `dest`.

    `process` is one of PROCESS_NAMES. `sigma` is t for flow, else noise/signal. With "model" the latent is as ComfyUI's
    samplers hold it: for all but flow models x0 + sigma·noise, and the prediction that of the scaled sample that the
    network sees. ValueError for bad input and where the conversion is singular.
    """
    x_t, value = _samples(noisy, "noisy"), _samples(prediction, "prediction")
    if x_t.shape != value.shape:
        raise ValueError(
            f"noisy has shape {list(x_t.shape)} but prediction has shape {list(value.shape)}; a prediction belongs to "
            "the noisy latent that the model saw"
        )
    alpha, noise, scale = _coefficients(process, sigma, model, x_t)
    result = convert_at(value, source, dest, scale * x_t, alpha, noise)
    if not bool(torch.isfinite(result).all()):
        raise ValueError(
            f"at sigma {sigma:g} of {process} the {source} prediction does not determine {dest}: noise alone (flow at "
            "1) does not tell x0, and the picture alone (sigma 0) does not tell the noise. Choose a sigma in between"
        )
    return {**noisy, "samples": result}


def _samples(latent: dict, name: str) -> Tensor:
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if type(samples) is not Tensor:
        raise ValueError(f"{name} must be a LATENT with one tensor of samples, got {type(samples or latent).__name__}")
    if not bool(torch.isfinite(samples).all()):
        raise ValueError(f"{name} contains nan or inf; look at the node that made it")
    return samples.float()


def _coefficients(process: str, sigma: float, model: ModelPatcher | None, x_t: Tensor) -> tuple[Tensor, Tensor, float]:
    """(alpha_t, sigma_t, what x_t is to be multiplied with), from a process's name or from a MODEL."""
    scale = 1.0
    if process == "model":
        if model is None:
            raise ValueError("process is model, but no model is connected; connect one, or choose flow, vp or ve")
        process, scale = _model_process(model, sigma, x_t)
    require_choice("process", process, PROCESS_NAMES)
    limit = 1.0 if process == "flow" else math.inf
    if not (math.isfinite(sigma) and 0.0 <= sigma <= limit):
        allowed = "0 to 1 for flow" if process == "flow" else f"0 or above for {process}"
        raise ValueError(f"sigma must be {allowed}, got {sigma}; it is the noise level that the prediction was made at")
    level = torch.tensor(sigma, dtype=torch.float64)
    if process == "flow":
        return 1.0 - level, level, scale
    if process == "ve":
        return torch.ones_like(level), level, scale
    alpha = 1.0 / torch.sqrt(1.0 + level**2)
    return alpha, level * alpha, scale


def _model_process(model: ModelPatcher, sigma: float, x_t: Tensor) -> tuple[str, float]:
    """The process of a MODEL and the factor from ComfyUI's sample to the one that the network sees."""
    sampling = read_sampling(model)
    channels = model.model.latent_format.latent_channels
    if x_t.shape[1] != channels:
        raise ValueError(
            f"the latents have {x_t.shape[1]} channels but this model's have {channels}; connect the model that made "
            "them, or choose a process by name"
        )
    if sampling.shift is not None and isinstance(sampling.host, host_sampling.CONST):
        return "flow", 1.0
    if isinstance(sampling.host, host_sampling.EPS) and float(sampling.host.sigma_data) == 1.0:
        return "vp", 1.0 / math.sqrt(1.0 + sigma**2)
    raise ValueError(f"{class_names(sampling.host)} is neither flow nor variance preserving; choose a process by name")
