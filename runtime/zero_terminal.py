"""Zero terminal SNR on a MODEL: the rescaled noise table, its cap, and the first steps without guidance."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling as host_sampling
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..schedules.ztsnr import (
    PURE_NOISE_SNR,
    TERMINAL_ALPHA_BAR,
    cap_ratios,
    rescale_zero_terminal_snr,
    steps_above,
)
from .model_sampling import Sampling, class_names, has_discrete_table, read_sampling, with_sampling
from .process import in_first_steps, prediction_of


MAX_UNGUIDED = 100
_STEPS = 20
_WASTEFUL = _STEPS // 4
_SCHEDULERS = (
    "simple", "sgm_uniform", "normal", "beta", "ddim_uniform",
    "karras", "exponential", "kl_optimal", "linear_quadratic",
)  # fmt: skip


@dataclass(frozen=True)
class Unguided:
    """`sampler_pre_cfg_function`: the conditional prediction stands in for the unconditional one, so CFG adds nothing.

    During the first `steps` steps of a run that starts at the model's largest sigma. Functions of other nodes see a
    difference of zero and still do their part.
    """

    steps: int

    def __call__(self, args: dict) -> list[Tensor]:
        predictions, sigma = args["conds_out"], float(args["sigma"].reshape(-1)[0])
        if len(predictions) != 2 or args["conds"][1] is None:
            return predictions
        if in_first_steps(args["model"].model_sampling, args["model_options"], sigma, self.steps):
            return [predictions[0], predictions[0]]
        return predictions


def patch_zero_terminal_snr(
    model: ModelPatcher, sigma_cap: float = 0.0, unguided_steps: int = 0
) -> tuple[ModelPatcher, str]:
    """A clone of a MODEL with its noise table rescaled to zero terminal SNR, and what was done, in words.

    `sigma_cap` above 0 cuts the table there; `unguided_steps` above 0 leaves guidance out of so many first steps.
    ValueError for models without a discrete table, and for eps models without a cap.
    """
    if not (math.isfinite(sigma_cap) and sigma_cap >= 0.0):
        raise ValueError(f"sigma_cap must be 0 (off) or a positive sigma, got {sigma_cap}; 160 is usual")
    if not 0 <= unguided_steps <= MAX_UNGUIDED:
        raise ValueError(f"unguided_steps must be 0 (off) to {MAX_UNGUIDED}, got {unguided_steps}; 1 is usual")
    sampling = read_sampling(model)
    _require_rescalable(sampling)
    before = sampling.host.sigmas.cpu().double()
    after = _zero_terminal(sampling.host)
    after = cap_ratios(after, sigma_cap) if sigma_cap else after
    _require_known_picture(sampling, float(after[-1]))
    patched = copy.deepcopy(sampling.host)
    if not torch.equal(after, before):
        patched.set_sigmas(after)
    patched.zsnr = True
    clone = with_sampling(model, patched)
    if unguided_steps:
        clone.set_model_sampler_pre_cfg_function(Unguided(unguided_steps))
    return clone, _report(model, patched, before, unguided_steps)


def _zero_terminal(host: Any) -> Tensor:
    """The table after rescaling, float64 [N]; as it is where it has been rescaled before, and maybe capped."""
    ratios = host.sigmas.cpu().double()
    alpha_bar = 1.0 / (1.0 + ratios**2)
    if getattr(host, "zsnr", False) or float(alpha_bar[-1]) <= 1.001 * TERMINAL_ALPHA_BAR:
        return ratios
    alpha_bar = rescale_zero_terminal_snr(alpha_bar).clamp(min=TERMINAL_ALPHA_BAR)
    return ((1.0 - alpha_bar) / alpha_bar).sqrt()


def _require_rescalable(sampling: Sampling) -> None:
    if sampling.shift is not None:
        raise ValueError(
            "this is a flow model: its last noise level is already pure noise (terminal SNR 0). "
            "To move its noise levels use Flow Shift (Tidetable_FlowShift)"
        )
    known = sampling.prediction is not None or isinstance(sampling.host, host_sampling.EDM)
    if not known or not has_discrete_table(sampling.host):
        raise ValueError(
            "zero terminal SNR is defined for models with a discrete noise table that predict v, x0, velocity or EDM's "
            f"output, not for {class_names(sampling.host)}"
        )


def _require_known_picture(sampling: Sampling, top: float) -> None:
    largest = PURE_NOISE_SNR**-0.5
    if sampling.prediction == "eps" and top > largest:
        raise ValueError(
            "this model predicts noise (eps), and with zero terminal SNR that says nothing about the image: in pure "
            f"noise the denoised image is x - sigma * eps with sigma = {top:.6g}, so an error of 0.001 becomes "
            f"{0.001 * top:.2g}. Use a model trained with v prediction (if this one was, set Prediction "
            f"(Tidetable_Prediction) to v first), or cap sigma: sigma_cap 160, at most {largest:g}"
        )


def _report(model: ModelPatcher, host: Any, before: Tensor, unguided_steps: int) -> str:
    """What the node shows: what the checkpoint says of itself, what was set, and which schedules suit it."""
    top, was = float(host.sigma_max), float(before[-1])
    lines = [
        f"checkpoint: {_checkpoint(model)}",
        f"noise levels: {len(host.sigmas)} rows up to sigma {top:.6g}"
        + (", as the model had them" if math.isclose(top, was, rel_tol=1e-6) else f"; before, up to {was:.6g}"),
        f"guidance: left out of the first {unguided_steps} step(s)" if unguided_steps else "guidance: on every step",
    ]
    if prediction_of(host) == "eps":
        lines.append(
            f"prediction: eps, so an error of 0.001 at the first step is one of {0.001 * top:.3g} in the latent; a "
            "model trained with v prediction does not have this"
        )
    plain = _plain_sigma_max(model)
    return "\n".join([*lines, *_schedulers(host, top, plain)])


def _plain_sigma_max(model: ModelPatcher) -> float:
    """The largest sigma of the model's betas without zero terminal SNR."""
    return float(host_sampling.ModelSamplingDiscrete(model.model.model_config, zsnr=False).sigma_max)


def wasted_steps(model: ModelPatcher, sigmas: Tensor) -> str | None:
    """Words about a schedule that spends over a quarter of its steps where zero terminal SNR decides little, or None.

    `sigmas` [steps + 1]. Two steps are not counted: pure noise needs one, and few steps have nothing to waste.
    """
    sampling = read_sampling(model)
    if sampling.shift is not None or not has_discrete_table(sampling.host):
        return None
    plain, steps = _plain_sigma_max(model), len(sigmas) - 1
    wasted = steps_above(sigmas, plain)
    if wasted <= max(2, steps // 4):
        return None
    return (
        f"{wasted} of {steps} steps start above sigma {plain:.4g}, where zero terminal SNR decides little but the "
        "brightness; trailing wastes fewest, or give Zero Terminal SNR a sigma_cap"
    )


def _checkpoint(model: ModelPatcher) -> str:
    """What ComfyUI found in the file: for SDXL it looks for the keys `v_pred` and `ztsnr`."""
    kind = getattr(getattr(model.model, "model_type", None), "name", "unknown")
    if model.model.model_config.sampling_settings.get("zsnr"):
        return f"marked as zero terminal SNR (loaded as {kind})"
    if kind.startswith("V_PREDICTION"):
        return f"v prediction, not marked as zero terminal SNR (loaded as {kind})"
    return (
        f"neither marked as v prediction nor as zero terminal SNR (loaded as {kind}); converting or merging may have "
        "lost the keys v_pred and ztsnr"
    )


def _schedulers(host: Any, top: float, plain: float) -> list[str]:
    """ComfyUI's schedulers by what 20 steps of each would do, so that nobody finds out by the picture."""
    good, wasteful, low = [], [], []
    for name in (name for name in _SCHEDULERS if name in comfy.samplers.SCHEDULER_NAMES):
        sigmas = comfy.samplers.calculate_sigmas(host, name, _STEPS)
        wasted = steps_above(sigmas, plain)
        if float(sigmas[0]) < 0.99 * top:
            low.append(f"{name} (starts at {float(sigmas[0]):.4g})")
        elif wasted > _WASTEFUL:
            wasteful.append(f"{name} ({wasted} of {_STEPS} steps)")
        else:
            good.append(name)
    rows = {
        "schedulers that suit it": good,
        f"schedulers that waste steps above sigma {plain:.4g}": wasteful,
        "schedulers that never start in pure noise": low,
    }
    return [f"{title}: {', '.join(names)}" for title, names in rows.items() if names]
