"""Perturbed-attention guidance on a ComfyUI MODEL.

Two functions without state sit on the cloned patcher; what they need and hand on lies in the model options of the run:

- a stage of `sampler_calc_cond_batch_function` (cond_batch.py) evaluates cond, uncond and further copies of cond in one
  batch, one for each kind of perturbation that is due. The copies are the perturbed predictions.
- `sampler_post_cfg_function` adds scale · (cond − perturbed) for every node.

For the length of one evaluation a `model_function_wrapper` weakens the network for the copies' rows alone
(attention_targets.py) and checks afterwards that the network went through it.

The first slot holds one function. Where another pack has it, in guiders that do not ask it, and where another pack may
rearrange the batch or mix its rows, the second function evaluates the perturbed predictions by itself.
"""

import contextlib
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..samplers.guidance.combine import RESCALE_MODES, RescaleMode, relative_difference, rescaled_perturbed_guidance
from ..samplers.guidance.interval import Interval, decayed, step_of
from ..samplers.guidance.perturb import METHODS, Method
from ..schedules.process import Flow
from ..schedules.validate import require_between, require_choice
from . import cond_batch
from .attention_targets import Target, Weakening
from .blocks import AUTO, find_target
from .process import stored_shift
from .shared_prefix import SHARING, Sharing, evaluate_shared, find_prefix, is_wanted


TERMS = "tidetable_perturbed_attention"  # in model_options: the terms that nodes have added, immutable
MAX_SCALE = 100.0
INFINITE_BLUR = -1.0
# Where the log-SNR of flow models, infinite at both ends, is cut off for the decay: t from 0.001 to 0.999.
FLOW_END = 1e-3


@dataclass(frozen=True)
class Perturbation:
    """What a perturbed prediction is. Terms with the same one share a row of the batch."""

    target: Target
    method: Method
    blur_sigma: float
    """In tokens, for "seg"; 0 for the others."""

    @property
    def name(self) -> str:
        return f"{TERMS} {self.target} {self.method} {self.blur_sigma:g}"


@dataclass(frozen=True)
class PerturbedTerm:
    """scale · (cond − perturbed), during `interval` at every `every_nth` step of it, until it hardly matters."""

    scale: float
    interval: Interval
    perturbation: Perturbation
    every_nth: int
    stop_below: float
    rescale: float
    rescale_mode: RescaleMode
    decay: float
    shares_prefix: bool


def perturbed_attention(
    model: ModelPatcher,
    scale: float,
    start_percent: float,
    end_percent: float,
    method: Method = "pag",
    blocks: str = AUTO,
    blur_sigma: float = INFINITE_BLUR,
    every_nth: int = 1,
    stop_below: float = 0.0,
    rescale: float = 0.0,
    rescale_mode: RescaleMode = "full",
    decay: float = 0.0,
    shared_prefix: Sharing = "auto",
) -> ModelPatcher:
    """A clone of `model` with perturbed-attention guidance; `scale` 0 to 100, 0 = off: nothing is installed.

    `shared_prefix`: whether what comes before the perturbed blocks is computed once for cond and the perturbed rows.
    Applied twice, the terms add up; a perturbed prediction that both ask for is computed once. ValueError for bad
    numbers, for models without an attention that could be perturbed and for blocks that do not exist.
    """
    require_between("scale", scale, 0.0, MAX_SCALE, "0 is off, 3 a good start")
    require_between("every_nth", every_nth, 1, 1000, "1 is every step")
    require_between("stop_below", stop_below, 0.0, 1.0, "0 is off")
    require_between("rescale", rescale, 0.0, 1.0, "0 is off")
    require_between("decay", decay, 0.0, 100.0, "0 is constant strength")
    require_choice("method", method, METHODS)
    require_choice("rescale_mode", rescale_mode, RESCALE_MODES)
    require_choice("shared_prefix", shared_prefix, SHARING)
    if blur_sigma != INFINITE_BLUR and not 0.0 < blur_sigma < math.inf:
        raise ValueError(f"blur_sigma must be above 0 tokens, or {INFINITE_BLUR:g} for infinite, got {blur_sigma}")
    interval = Interval(start_percent, end_percent)
    patched = model.clone()
    if scale == 0.0:
        return patched
    blur = math.inf if blur_sigma == INFINITE_BLUR else blur_sigma
    network = patched.get_model_object("diffusion_model")
    target = find_target(network, blocks)
    perturbation = Perturbation(target, method, blur if method == "seg" else 0.0)
    shares = is_wanted(shared_prefix, network, target.places, patched.load_device)
    term = PerturbedTerm(scale, interval, perturbation, every_nth, stop_below, rescale, rescale_mode, decay, shares)
    terms = patched.model_options.get(TERMS, [])
    if not terms:
        patched.set_model_sampler_post_cfg_function(add_perturbed_guidance)
        cond_batch.install(patched, evaluate=predict_with_perturbed)
    patched.model_options[TERMS] = [*terms, term]
    return patched


def predict_with_perturbed(args: dict) -> list[Tensor]:
    """An `Evaluate` stage: [cond, uncond]; where guidance acts, with the perturbed ones in the batch."""
    conds, terms = args["conds"], _active_terms(args)
    if not terms or conds[0] is None or _must_be_apart(conds[0], args["model_options"]):
        return cond_batch.evaluate_plainly(args)
    perturbations = _perturbations(terms)
    predictions = _predict_together(args, terms, perturbations)
    perturbed = dict(zip(perturbations, predictions[len(conds) :], strict=True))
    cond_batch.run_state(args["model_options"])["prediction"] = (args["input"], perturbed)
    return predictions[: len(conds)]


def _predict_together(args: dict, terms: list[PerturbedTerm], perturbations: list[Perturbation]) -> list[Tensor]:
    """Predictions for args["conds"] and for cond under each perturbation: in one batch, or with a shared prefix."""
    conds, run = args["conds"], cond_batch.run_state(args["model_options"])
    wanted = run.get("sharing", all(term.shares_prefix for term in terms))
    places = {place for perturbation in perturbations for place in perturbation.target.places}
    prefix = find_prefix(args, places) if wanted else None
    if prefix is None:
        return _evaluate(args, conds, conds[0], perturbations)

    def perturbing(inner: Callable) -> Callable:
        return _perturbing_wrapper(args["model"], dict(enumerate(perturbations)), inner, run)

    copies = [_perturbed_copy(conds[0], perturbation) for perturbation in perturbations]
    predictions, perturbed = evaluate_shared(args, copies, prefix, perturbing, _apply)
    if perturbed is None:
        run["sharing"] = False
        perturbed = _evaluate(args, [], conds[0], perturbations)
    return [*predictions, *perturbed]


def add_perturbed_guidance(args: dict) -> Tensor:
    """`sampler_post_cfg_function`: the result so far; where guidance acts, with the perturbed terms added."""
    terms = _active_terms(args)
    denoised, cond = args["denoised"], args["cond_denoised"]
    if not terms:
        return denoised
    run = cond_batch.run_state(args["model_options"])
    x, perturbed = run.pop("prediction", (None, {}))
    if x is not args["input"]:
        if args["cond"] is None:
            raise RuntimeError(
                "Perturbed attention: this guider leaves out the conditional prediction that would be perturbed. "
                "Set its cfg to something else than 1, or use CFGGuider or KSampler."
            )
        perturbed = _evaluate_by_itself(args, _perturbations(terms))
    for term in terms:
        worse = perturbed[term.perturbation]
        scale = term.scale * _weight(term, args)
        denoised = rescaled_perturbed_guidance(denoised, cond, worse, scale, term.rescale, term.rescale_mode)
        if term.stop_below > 0.0 and relative_difference(cond, worse) < term.stop_below:
            run.setdefault("stopped", set()).add(term)
    return denoised


# ── when ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _active_terms(args: dict) -> list[PerturbedTerm]:
    stopped = cond_batch.run_state(args["model_options"]).get("stopped", ())
    return [term for term in args["model_options"][TERMS] if term not in stopped and _is_due(term, args)]


def _is_due(term: PerturbedTerm, args: dict) -> bool:
    # The map is read here and not in the node, so that a shift or a noise process set by a later node counts.
    percent_to_sigma = args["model"].model_sampling.percent_to_sigma
    sigma = float(args["sigma"][0])
    if not term.interval.contains(sigma, percent_to_sigma) or _weight(term, args) == 0.0:
        return False
    if term.every_nth == 1:
        return True
    sigmas = args["model_options"]["transformer_options"].get("sample_sigmas")
    if sigmas is None:
        raise RuntimeError(
            f"Perturbed attention: this sampler does not tell its schedule, which every_nth {term.every_nth} is "
            "counted in. Set every_nth to 1."
        )
    schedule = [float(s) for s in sigmas]
    guided = [i for i, s in enumerate(schedule[:-1]) if term.interval.contains(s, percent_to_sigma)]
    step = step_of(sigma, schedule)
    return (step - (guided[0] if guided else step)) % term.every_nth == 0


def _weight(term: PerturbedTerm, args: dict) -> float:
    """The term's decay at this noise level, within [0, 1]."""
    if term.decay == 0.0:
        return 1.0
    sampling = args["model"].model_sampling
    ends = (
        sampling.percent_to_sigma(term.interval.start_percent),
        sampling.percent_to_sigma(term.interval.end_percent),
    )
    log_snr, first, last = (_log_snr(sampling, float(sigma)) for sigma in (args["sigma"][0], *ends))
    return decayed(log_snr, first, last, term.decay)


def _log_snr(model_sampling: Any, sigma: float) -> float:
    """The log-SNR, ln(alpha²/sigma²), at ComfyUI's noise level; kept within the model's own range, so always finite."""
    if stored_shift(model_sampling) is not None:
        t = min(max(sigma, FLOW_END), 1.0 - FLOW_END)
        return float(Flow().log_snr(t))
    return -2.0 * math.log(min(max(sigma, float(model_sampling.sigma_min)), float(model_sampling.sigma_max)))


# ── what ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _perturbations(terms: list[PerturbedTerm]) -> list[Perturbation]:
    return list(dict.fromkeys(term.perturbation for term in terms))


def _perturbed_copy(cond: list[dict], perturbation: Perturbation) -> list[dict]:
    """Cond entries with ids of their own, the same at every step: other packs' caches know predictions by them."""
    return [{**entry, "uuid": uuid.uuid5(entry["uuid"], perturbation.name)} for entry in cond]


def _evaluate(args: dict, conds: list, cond: list[dict], perturbations: list[Perturbation]) -> list[Tensor]:
    """Predictions [B, ...] for `conds` and for `cond` under each perturbation, in one batch where ComfyUI can."""
    options = args["model_options"]
    numbers = {len(conds) + i: perturbation for i, perturbation in enumerate(perturbations)}
    inner, run = options.get("model_function_wrapper", _apply), cond_batch.run_state(options)
    options = {**options, "model_function_wrapper": _perturbing_wrapper(args["model"], numbers, inner, run)}
    conds = [*conds, *(_perturbed_copy(cond, perturbation) for perturbation in perturbations)]
    return comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], options)


def _evaluate_by_itself(args: dict, perturbations: list[Perturbation]) -> dict[Perturbation, Tensor]:
    """The perturbed predictions without the others, in one batch where that may be."""
    apart = _must_be_apart(args["cond"], args["model_options"])
    batches = [[perturbation] for perturbation in perturbations] if apart else [perturbations]
    return {
        perturbation: prediction
        for batch in batches
        for perturbation, prediction in zip(batch, _evaluate(args, [], args["cond"], batch), strict=True)
    }


def _must_be_apart(cond: list[dict], model_options: dict) -> bool:
    """Whether another pack may rearrange or mix the rows of a batch, or the network takes one row at a time."""
    # HunyuanVideo writes into the expanded positions of its reference picture.
    one_row = any("ref_latent" in entry["model_conds"] for entry in cond)
    # ComfyUI's NAG takes the first chunk of cond rows for the only one.
    mixes = bool(model_options["transformer_options"].get("patches", {}).get("attn1_output_patch"))
    return one_row or mixes or "model_function_wrapper" in model_options


def _apply(apply_model: Callable, params: dict) -> Tensor:
    return apply_model(params["input"], params["timestep"], **params["c"])


def _perturbing_wrapper(model: Any, numbers: dict[int, Perturbation], inner: Callable, run: dict) -> Callable:
    """A `model_function_wrapper` around `inner` that perturbs the rows of the cond lists in `numbers`."""

    def wrapper(apply_model: Callable, params: dict) -> Tensor:
        kinds = params["cond_or_uncond"]
        sigma = float(params["timestep"][0])
        weakenings = {
            perturbation: Weakening(perturbation.method, perturbation.blur_sigma, [k == number for k in kinds], sigma)
            for number, perturbation in numbers.items()
            if number in kinds
        }
        network = getattr(apply_model, "__self__", model).diffusion_model

        def weakened_apply(x: Tensor, t: Tensor, **conds: Any) -> Tensor:
            with contextlib.ExitStack() as stack:
                for perturbation, weakening in weakenings.items():
                    options = stack.enter_context(perturbation.target.weakened(network, x, conds, weakening))
                    conds = {**conds, "transformer_options": options}
                return apply_model(x, t, **conds)

        output = inner(weakened_apply, _as_cond_rows(params, numbers))
        for perturbation, weakening in weakenings.items():
            _verify(perturbation, weakening.hits, run)
        return output

    return wrapper


def _as_cond_rows(params: dict, numbers: dict) -> dict:
    # Other patches know two kinds of rows, 0 (cond) and 1 (uncond), and index with them. Ours is a cond row to them.
    kinds = [0 if kind in numbers else kind for kind in params["cond_or_uncond"]]
    options = {**params["c"]["transformer_options"], "cond_or_uncond": kinds}
    return {**params, "c": {**params["c"], "transformer_options": options}, "cond_or_uncond": kinds}


def _verify(perturbation: Perturbation, hits: int, run: dict) -> None:
    """RuntimeError unless the network went through every perturbed place.

    After a forward that did, one that went through none is allowed: caches like EasyCache leave out the network at some
    steps and answer from what the same row gave before.
    """
    target, needed = perturbation.target, perturbation.target.num_hits(perturbation.method)
    verified = run.setdefault("verified", set())
    if hits >= needed:
        verified.add(perturbation)
    elif hits or perturbation not in verified:
        raise RuntimeError(
            f"Perturbed attention was to act on the {target}, but the network went through {hits} of "
            f"{needed} there, so guidance would be wrong or without effect. Another node probably "
            "replaces or skips these blocks: take that node out, or remove the perturbed-attention node."
        )
