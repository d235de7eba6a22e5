"""Classifier-free guidance and its refinements on a ComfyUI MODEL, composed in one stated order.

ComfyUI has one slot for the function that combines cond and uncond (`sampler_cfg_function`), so of two nodes that set
it the last one silently wins. This node does all of it in one function (`combine_predictions`), and says when it is not
asked. Beside it stand three more without state of their own; what they need and hand on lies in the model options:

- `without_unused_uncond`, a stage of cond_batch.py: where nobody will use it, uncond is not computed.
- `stand_in_for_uncond`, the first pre-CFG function: there, others find a prediction in its place that changes nothing.
- `hand_on`, the first post-CFG function: passes the result to later terms (perturbed attention) without the rounding of
  the slot, which wants x − denoised, and raises where the slot was not asked.
"""

from dataclasses import dataclass
from typing import Any, Literal

import comfy.model_sampling as host
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..samplers.guidance.combine import classifier_free_guidance, rescaled_guidance
from ..samplers.guidance.interval import Interval
from ..samplers.guidance.momentum import running_average, step_level
from ..samplers.guidance.project import damp_tangential, optimized_scale, projected_guidance
from ..schedules.prediction import convert_at
from ..schedules.process import expand
from ..schedules.validate import require_between
from . import cond_batch
from .model_sampling import class_names
from .process import in_first_steps, prediction_of


RULES = "tidetable_cfg_rules"  # in model_options: the CfgRules of the MODEL
SLOT = "sampler_cfg_function"
MAX_ETA = 10.0
MAX_NORM = 1000.0
MAX_MOMENTUM = 0.99
MAX_ZERO_INIT = 100


@dataclass(frozen=True, kw_only=True)
class CfgRules:
    """What refines classifier-free guidance, in the order in which it acts. The defaults change nothing.

    ValueError for numbers out of range, with the input's name.
    """

    zero_init_steps: int = 0
    """CFG-Zero*: the velocity is zero during so many first steps."""
    cfg_start_percent: float = 0.0
    cfg_end_percent: float = 1.0
    """CFG acts between these, Kynkäänniemi et al. 2024, arXiv:2404.07724; the prediction is cond elsewhere."""
    tangential_damping: bool = False
    """TCFG."""
    zero_star: bool = False
    """CFG-Zero*: the optimized scale."""
    apg_momentum: float = 0.0
    apg_norm_threshold: float = 0.0
    apg_eta: float = 1.0
    """APG: momentum, then length, then the share of the part parallel to cond."""
    rescale: float = 0.0
    """RescaleCFG's multiplier."""

    def __post_init__(self):
        self._require("zero_init_steps", 0, MAX_ZERO_INIT, "0 = off, 1 is usual")
        self._require("cfg_start_percent", 0.0, 1.0, "0 = from pure noise")
        self._require("cfg_end_percent", 0.0, 1.0, "1 = to the finished picture")
        self._require("apg_momentum", -MAX_MOMENTUM, MAX_MOMENTUM, "0 = off, -0.5 is usual")
        self._require("apg_norm_threshold", 0.0, MAX_NORM, "0 = off, 2.5 to 15 is usual")
        self._require("apg_eta", -MAX_ETA, MAX_ETA, "1 = off, 0 is usual")
        self._require("rescale", 0.0, 1.0, "0 = off, 0.7 is usual")
        if self.cfg_start_percent >= self.cfg_end_percent:
            raise ValueError(
                f"cfg_start_percent {self.cfg_start_percent} is not below cfg_end_percent {self.cfg_end_percent}, so "
                "CFG would never act: swap them, or set cfg to 1 in the sampler node to do without it"
            )

    def _require(self, name: str, low: float, high: float, hint: str) -> None:
        require_between(name, getattr(self, name), low, high, hint)

    @property
    def interval(self) -> Interval:
        return Interval(self.cfg_start_percent, self.cfg_end_percent)

    @property
    def projects(self) -> bool:
        return self.apg_eta != 1.0 or self.apg_norm_threshold > 0.0 or self.apg_momentum != 0.0

    def summary(self) -> str:
        """What is on, a line each, in the order in which it acts."""
        lines = ["CFG" if not self.projects else self._apg()]
        if self.zero_star:
            lines.insert(0, "optimized scale of uncond (CFG-Zero*)")
        if self.tangential_damping:
            lines.insert(0, "tangential damping of uncond (TCFG)")
        if (self.cfg_start_percent, self.cfg_end_percent) != (0.0, 1.0):
            lines.insert(0, f"only from {self.cfg_start_percent:g} to {self.cfg_end_percent:g}, cond alone elsewhere:")
        if self.zero_init_steps:
            lines.insert(0, f"zero velocity in the first {self.zero_init_steps} step(s) (CFG-Zero*), then")
        if self.rescale:
            lines.append(f"rescale {self.rescale:g} (RescaleCFG)")
        return "\n".join([*lines, "terms of other nodes, such as perturbed attention"])

    def _apg(self) -> str:
        parts = [f"eta {self.apg_eta:g}"]
        if self.apg_norm_threshold:
            parts.append(f"norm threshold {self.apg_norm_threshold:g}")
        if self.apg_momentum:
            parts.append(f"momentum {self.apg_momentum:g}")
        return f"CFG by projection (APG): {', '.join(parts)}"


def guided_cfg(model: ModelPatcher, rules: CfgRules) -> tuple[ModelPatcher, str]:
    """A clone of `model` whose CFG follows `rules`, and a summary of them. Nothing is installed where all are off.

    ValueError where another node has the slot for combining predictions, be it this one.
    """
    patched = model.clone()
    if rules == CfgRules():
        return patched, rules.summary()
    options = patched.model_options
    _require_free_slot(options)
    patched.set_model_sampler_cfg_function(combine_predictions)
    for name, function in (("pre", stand_in_for_uncond), ("post", hand_on)):
        options[f"sampler_{name}_cfg_function"] = [function, *options.get(f"sampler_{name}_cfg_function", [])]
    cond_batch.install(patched, prepare=without_unused_uncond)
    options[RULES] = rules
    return patched, rules.summary()


def _require_free_slot(options: dict) -> None:
    if RULES in options:
        raise ValueError(
            "this MODEL already has CFG rules from a Guidance node (Tidetable_Guidance): set all of them in one node"
        )
    if SLOT in options:
        raise ValueError(
            f"another node before this one combines the predictions in its own way ({_name(options[SLOT])}), and "
            "ComfyUI has room for one such function. Take that node out (Guidance does CFG, RescaleCFG, APG, TCFG and "
            "CFG-Zero* itself), or this one"
        )


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"


Phase = Literal["still", "cond", "cfg"]


def _phase(args: dict) -> Phase:
    """What this evaluation is: zero velocity, cond alone (outside the interval), or CFG."""
    options, model = args["model_options"], args["model"]
    rules: CfgRules = options[RULES]
    sigma = float(args["sigma"].reshape(-1)[0])
    if rules.zero_init_steps:
        if not isinstance(model.model_sampling, host.CONST):
            raise RuntimeError(
                f"zero_init_steps {rules.zero_init_steps}: starting with zero velocity is defined for flow models, and "
                f"this one has {class_names(model.model_sampling)}. Set zero_init_steps to 0"
            )
        if in_first_steps(model.model_sampling, options, sigma, rules.zero_init_steps):
            return "still"
    # The map is read here and not in the node, so that a shift or a noise process set by a later node counts.
    return "cfg" if rules.interval.contains(sigma, model.model_sampling.percent_to_sigma) else "cond"


def _uncond_is_asked_for(args: dict) -> bool:
    """Whether somebody else uses uncond, as CFG++ samplers do."""
    return bool(args["model_options"].get("disable_cfg1_optimization", False))


def without_unused_uncond(args: dict) -> dict:
    """A `Prepare` stage: outside of CFG's interval the unconditional prediction is not computed."""
    if len(args["conds"]) != 2 or _uncond_is_asked_for(args) or _phase(args) == "cfg":
        return args
    return {**args, "conds": [args["conds"][0], None]}


def stand_in_for_uncond(args: dict) -> list[Tensor]:
    """`sampler_pre_cfg_function`: with cond in the place of an uncond that was left out, what others add is zero.

    While the velocity is zero, it is that of uncond too, so that CFG++ samplers, which step along it, stand still.
    """
    predictions = args["conds_out"]
    if len(predictions) != 2 or args["conds"][1] is None:
        return predictions
    phase = _phase(args)
    if phase == "still":
        return [predictions[0], args["input"]]
    return [predictions[0]] * 2 if phase == "cond" and not _uncond_is_asked_for(args) else predictions


def combine_predictions(args: dict) -> Tensor:
    """`sampler_cfg_function`: x − denoised by the rules of the MODEL, from cond and uncond."""
    x, cond, phase = args["input"], args["cond_denoised"], _phase(args)
    if phase == "still":
        denoised = x
    elif phase == "cond" or args["input_uncond"] is None:
        denoised = cond
    else:
        denoised = _guided(args)
    cond_batch.run_state(args["model_options"])["cfg"] = (x, denoised)
    return x - denoised


def hand_on(args: dict) -> Tensor:
    """`sampler_post_cfg_function`: the result of `combine_predictions` as it was. RuntimeError without one."""
    options = args["model_options"]
    x, denoised = cond_batch.run_state(options).pop("cfg", (None, None))
    now = options.get(SLOT)
    if x is args["input"]:
        return denoised if now is combine_predictions else args["denoised"]  # others may call ours and go on from there
    if now is not combine_predictions:
        raise RuntimeError(
            f"the rules of the Guidance node do not act: a node after it combines the predictions in its own way "
            f"({_name(now)}), and ComfyUI has room for one such function. Take one of the two nodes out"
        )
    raise RuntimeError(
        "the rules of the Guidance node do not act: this guider combines the predictions by itself. Use CFGGuider or "
        "KSampler, or take the Guidance node out"
    )


def _guided(args: dict) -> Tensor:
    """The guided `denoised` [B, ...]: damping, optimized scale, CFG or APG, rescale, in this order."""
    rules: CfgRules = args["model_options"][RULES]
    x, cond, uncond, scale = (args[key] for key in ("input", "cond_denoised", "uncond_denoised", "cond_scale"))
    # x − denoised is sigma times what the sampler integrates: eps on sigma = noise/signal, the velocity on flow.
    if rules.tangential_damping:
        uncond = x - damp_tangential(x - cond, x - uncond)
    if rules.zero_star:
        uncond = x - optimized_scale(x - cond, x - uncond) * (x - uncond)
    if rules.projects:
        update = cond - uncond
        if rules.apg_momentum:
            update = _with_momentum(args, update, rules.apg_momentum)
        guided = projected_guidance(cond, update, scale, rules.apg_eta, rules.apg_norm_threshold)
    else:
        guided = classifier_free_guidance(cond, uncond, scale)
    return _rescaled(args, guided, rules.rescale) if rules.rescale else guided


def _with_momentum(args: dict, update: Tensor, momentum: float) -> Tensor:
    state = cond_batch.run_state(args["model_options"])
    sigmas = args["model_options"]["transformer_options"].get("sample_sigmas")
    sigma = float(args["sigma"].reshape(-1)[0])
    level = step_level(sigma, [] if sigmas is None else sigmas.tolist())
    average, state["cfg_past"] = running_average(update, momentum, sigma, level, state.get("cfg_past", ()))
    return average


def _rescaled(args: dict, guided: Tensor, multiplier: float) -> Tensor:
    """RescaleCFG on what the network outputs: velocity on flow, v on sigma = noise/signal (also for eps models)."""
    x, cond, sigma, sampling = args["input"], args["cond_denoised"], args["sigma"], args["model"].model_sampling
    prediction, flow = prediction_of(sampling), isinstance(sampling, host.CONST)
    if prediction is None:
        raise RuntimeError(
            f"rescale {multiplier:g} needs a model that predicts eps, v, x0 or velocity, not {class_names(sampling)}. "
            "Set rescale to 0"
        )
    kind = prediction if prediction in ("v", "velocity") else "velocity" if flow else "v"
    sigma = sigma.reshape(()) if sigma.nelement() == 1 else sigma
    alpha = 1.0 - sigma if flow else torch.rsqrt(1.0 + sigma**2)
    if not flow:
        x, sigma = x * expand(alpha, x), sigma * alpha
    guided, cond = (convert_at(denoised, "x0", kind, x, alpha, sigma) for denoised in (guided, cond))
    return convert_at(rescaled_guidance(guided, cond, multiplier), kind, "x0", x, alpha, sigma)
