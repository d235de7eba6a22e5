"""Perturbed-attention guidance on a ComfyUI MODEL.

Two functions without state sit on the cloned patcher; what they need and hand on lies in the model options of the run:

- a stage of `sampler_calc_cond_batch_function` (cond_batch.py) evaluates cond, uncond and a second copy of cond in one
  batch. The copy is the perturbed prediction.
- `sampler_post_cfg_function` adds scale · (cond − perturbed).

For the length of one evaluation a `model_function_wrapper` puts the perturbation into the transformer options, for the
copy's rows alone, and checks afterwards that the network went through it.

The first slot holds one function. Where another pack has it, in guiders that do not ask it, and where another pack's
`model_function_wrapper` may rearrange the batch, the second function evaluates the perturbed prediction by itself.
"""

import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..samplers.guidance.combine import perturbed_guidance
from ..samplers.guidance.interval import Interval
from ..samplers.guidance.perturb import Attention, flagged_rows, identity_attention
from . import cond_batch, shared_prefix
from .blocks import Target, find_target


TERMS = "tidetable_perturbed_attention"  # in model_options: the terms that nodes have added, immutable
MAX_SCALE = 100.0


@dataclass(frozen=True)
class PerturbedTerm:
    """scale · (cond − perturbed), with `target` perturbed, during `interval`."""

    scale: float
    interval: Interval
    target: Target
    shares_prefix: bool


def perturbed_attention(
    model: ModelPatcher, scale: float, start_percent: float, end_percent: float, sharing: str = "auto"
) -> ModelPatcher:
    """A clone of `model` with perturbed-attention guidance; `scale` 0 to 100, 0 = off: nothing is installed.

    `sharing`, "auto", "on" or "off": whether the blocks before the perturbed one are computed once for both rows.

    Applied twice, the terms add up, and the perturbed prediction is still computed once. ValueError for bad numbers and
    for models without an attention that could be perturbed.
    """
    if not (math.isfinite(scale) and 0.0 <= scale <= MAX_SCALE):
        raise ValueError(f"scale must be between 0 (off) and {MAX_SCALE:g}, got {scale}; 3 is a good start")
    interval = Interval(start_percent, end_percent)
    patched = model.clone()
    if scale == 0.0:
        return patched
    network = patched.get_model_object("diffusion_model")
    target = find_target(network)
    shares = shared_prefix.is_wanted(sharing, network, target.places, patched.load_device)
    term = PerturbedTerm(scale, interval, target, shares)
    terms = patched.model_options.get(TERMS, [])
    if not terms:
        patched.set_model_sampler_post_cfg_function(add_perturbed_guidance)
        cond_batch.install(patched, evaluate=predict_with_perturbed)
    patched.model_options[TERMS] = [*terms, term]
    return patched


def predict_with_perturbed(args: dict) -> list[Tensor]:
    """An `Evaluate` stage: [cond, uncond]; inside the interval with the perturbed one in the batch."""
    conds, terms = args["conds"], _active_terms(args)
    if not terms or conds[0] is None or "model_function_wrapper" in args["model_options"]:
        return cond_batch.evaluate_plainly(args)
    *predictions, perturbed = _predict_together(args, _perturbed_copy(conds[0]), terms[0])
    cond_batch.run_state(args["model_options"])["prediction"] = (args["input"], perturbed)
    return predictions


def _predict_together(args: dict, copy: list[dict], term: PerturbedTerm) -> list[Tensor]:
    """Predictions for args["conds"] and then for cond's perturbed `copy`: in one batch, or with a shared prefix."""
    conds, target, run = args["conds"], term.target, cond_batch.run_state(args["model_options"])
    prefix = shared_prefix.find_prefix(args, target.places) if run.get("sharing", term.shares_prefix) else None
    if prefix is None:
        return _evaluate(args, [*conds, copy], target)

    def perturbing(inner: Callable) -> Callable:
        return _perturbing_wrapper(target, 0, inner, run)

    predictions, perturbed = shared_prefix.evaluate(args, [copy], prefix, perturbing, _apply)
    if perturbed is None:
        run["sharing"] = False
        perturbed = _evaluate(args, [copy], target)
    return [*predictions, *perturbed]


def add_perturbed_guidance(args: dict) -> Tensor:
    """`sampler_post_cfg_function`: the result so far; inside the interval with the perturbed term added."""
    terms = _active_terms(args)
    if not terms:
        return args["denoised"]
    x, perturbed = cond_batch.run_state(args["model_options"]).pop("prediction", (None, None))
    if x is not args["input"]:
        if args["cond"] is None:
            raise RuntimeError(
                "Perturbed attention: this guider leaves out the conditional prediction that would be perturbed. "
                "Set its cfg to something else than 1, or use CFGGuider or KSampler."
            )
        (perturbed,) = _evaluate(args, [_perturbed_copy(args["cond"])], terms[0].target)
    return perturbed_guidance(args["denoised"], args["cond_denoised"], perturbed, sum(term.scale for term in terms))


def _active_terms(args: dict) -> list[PerturbedTerm]:
    # The map is read here and not in the node, so that a shift or a noise process set by a later node counts.
    percent_to_sigma = args["model"].model_sampling.percent_to_sigma
    sigma = float(args["sigma"][0])
    return [term for term in args["model_options"][TERMS] if term.interval.contains(sigma, percent_to_sigma)]


def _perturbed_copy(cond: list[dict]) -> list[dict]:
    """Cond entries with ids of their own, the same at every step: other packs' caches know predictions by them."""
    return [{**entry, "uuid": uuid.uuid5(entry["uuid"], TERMS)} for entry in cond]


def _evaluate(args: dict, conds: list, target: Target) -> list[Tensor]:
    """Predictions [B, ...] for `conds`, in one batch where ComfyUI can, the last of them perturbed at `target`."""
    options = args["model_options"]
    run = cond_batch.run_state(options)
    wrapper = _perturbing_wrapper(target, len(conds) - 1, options.get("model_function_wrapper", _apply), run)
    options = {**options, "model_function_wrapper": wrapper}
    return comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], options)


def _apply(apply_model: Callable, params: dict) -> Tensor:
    return apply_model(params["input"], params["timestep"], **params["c"])


def _perturbing_wrapper(target: Target, number: int, inner: Callable, run: dict) -> Callable:
    """A `model_function_wrapper` around `inner` that perturbs the rows of cond list `number`."""

    def wrapper(apply_model: Callable, params: dict) -> Tensor:
        flags = [entry == number for entry in params["cond_or_uncond"]]
        if not any(flags):
            return inner(apply_model, params)
        hits = 0

        def attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor, tokens: slice) -> Tensor:
            nonlocal hits
            hits += 1
            return identity_attention(attention, q, k, v, flagged_rows(len(q), flags), tokens)

        output = inner(apply_model, _with_perturbation(params, target, attend, flags))
        _verify(target, hits, run)
        return output

    return wrapper


def _with_perturbation(params: dict, target: Target, attend: Callable, flags: list[bool]) -> dict:
    # Other patches know two kinds of rows, 0 (cond) and 1 (uncond), and index with them. Ours is a cond row to them.
    kinds = [0 if flag else kind for flag, kind in zip(flags, params["cond_or_uncond"], strict=True)]
    options = {**target.perturb(params["c"]["transformer_options"], attend), "cond_or_uncond": kinds}
    return {**params, "c": {**params["c"], "transformer_options": options}, "cond_or_uncond": kinds}


def _verify(target: Target, hits: int, run: dict) -> None:
    """RuntimeError unless the network went through every perturbed attention.

    After a forward that did, one that went through none is allowed: caches like EasyCache leave out the network at some
    steps and answer from what the same row gave before.
    """
    if hits >= target.num_attentions:
        run["verified"] = True
    elif hits or not run.get("verified"):
        raise RuntimeError(
            f"Perturbed attention was to act on the {target}, but the network went through {hits} of "
            f"{target.num_attentions} there, so guidance would be wrong or without effect. Another node probably "
            "replaces or skips these blocks: take that node out, or remove the perturbed-attention node."
        )
