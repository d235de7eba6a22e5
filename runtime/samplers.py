"""Our integrators as ComfyUI SAMPLERs, and ComfyUI's own made right on flow models.

A SAMPLER here is always a plain `KSAMPLER` around a function. The model stays what it is: noise scaling, inpainting,
guidance and previews are ComfyUI's, and schedules are the model's own.
"""

from collections.abc import Callable
from typing import Any

import comfy.model_sampling as host_sampling
import comfy.samplers
import torch
from comfy.k_diffusion import sampling as host
from comfy.model_patcher import ModelPatcher, set_model_options_post_cfg_function
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from ..samplers import MAX_CHURN as MAX_CHURN
from ..samplers import SAMPLERS, require_sampler, sample
from ..samplers.steps import Denoise, Guided, SpaceName
from .model_sampling import class_names, current_sampling


OUR_NAMES = tuple(SAMPLERS)
# ComfyUI's names whose functions are wrong on flow models, with the reason. Each is also one of SAMPLERS.
CORRECTED = {
    "ddpm": "adds noise as if the signal kept its scale: contrast grows with every step",
    "res_multistep_ancestral": "adds noise as if the signal kept its scale",
    "res_multistep_ancestral_cfg_pp": "adds noise as if the signal kept its scale",
    "dpmpp_2s_ancestral_cfg_pp": "adds noise as if the signal kept its scale and mixes predictions of two noise levels",
    "dpmpp_2m_cfg_pp": "guides more strongly than CFG++ says",
    "res_multistep_cfg_pp": "guides more strongly than CFG++ says",
    "gradient_estimation_cfg_pp": "guides more strongly than CFG++ says",
    "dpm_fast": "stops one step before the end",
    "dpm_adaptive": "stops one step before the end",
    "ipndm_v": "has weights that do not sum to 1 on uneven steps",
}
WRAPPER_KEY = "tidetable_flow_safe"


def make_sampler(name: str, eta: float, s_noise: float, order: int, churn: float) -> comfy.samplers.KSAMPLER:
    """One of SAMPLERS as a SAMPLER. ValueError for an illegal option; the model is checked when sampling starts."""
    require_sampler(name, eta, s_noise, order, churn)
    options = {"name": name, "eta": eta, "s_noise": s_noise, "order": order, "churn": churn}
    return comfy.samplers.KSAMPLER(sample_ours, options)


def host_names() -> list[str]:
    """The sampler names of the running ComfyUI, those of other packs included."""
    return list(comfy.samplers.KSampler.SAMPLERS)


def make_flow_sampler(name: str) -> comfy.samplers.KSAMPLER:
    """ComfyUI's sampler `name`, with its corrected form on flow models where it needs one. ValueError if unknown."""
    if name not in host_names():
        raise ValueError(f"this ComfyUI has no sampler {name[:40]!r}; use one of {', '.join(host_names())}")
    return flow_safe(comfy.samplers.sampler_object(name))


def patch_sampler_safe_flow(model: ModelPatcher) -> tuple[ModelPatcher, str]:
    """A clone of `model` whose samplers are replaced by `flow_safe` ones, and what that changes, in words."""
    sampling = current_sampling(model)
    clone = model.clone()
    if not clone.get_wrappers(WrappersMP.SAMPLER_SAMPLE, WRAPPER_KEY):
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, WRAPPER_KEY, run_flow_safe)
    return clone, _describe_changes(sampling)


def flow_safe(sampler: Any) -> Any:
    """The same SAMPLER with its corrected form on flow models, or the object itself where it needs none.

    Untouched are: what is not a KSAMPLER, functions that are not ComfyUI's, and settings that ours do not have.
    """
    name = _corrected_name(sampler)
    if name is None:
        return sampler
    stock = sampler.sampler_function

    def sample_flow_safe(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        common = {"extra_args": extra_args, "callback": callback, "disable": disable, **options}
        if space_of(model) != "flow":
            return stock(model, x, sigmas, **common)
        return sample_ours(model, x, sigmas, name=name, **common)

    return comfy.samplers.KSAMPLER(sample_flow_safe, sampler.extra_options, sampler.inpaint_options)


def run_flow_safe(executor: WrapperExecutor, *args, **kwargs) -> Tensor:
    """SAMPLER_SAMPLE wrapper: goes on with the corrected form of the sampler that was asked for."""
    sampler = flow_safe(executor.class_obj)
    if sampler is not executor.class_obj:
        executor = WrapperExecutor.new_class_executor(sampler.sample, sampler, executor.wrappers, executor.idx)
    return executor(*args, **kwargs)


@torch.no_grad()
def sample_ours(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, *, name: str, noise_sampler: Callable | None = None, **options,
) -> Tensor:  # fmt: skip
    """A k-diffusion sampler function that runs one of SAMPLERS. Noise is ComfyUI's for the seed; half precision is
    sampled in float32."""
    extra_args = extra_args or {}
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    draw = noise_sampler or host.default_noise_sampler(x, seed=extra_args.get("seed"))
    noise_scale = getattr(model.inner_model.inner_model.model_sampling, "noise_scale", 1.0)

    with host.tqdm(total=max(len(sigmas) - 1, 0), disable=disable) as bar:

        def report(i: int, x: Tensor, sigma: float, denoised: Tensor) -> None:
            if callback is not None:
                level = x.new_tensor(sigma)
                callback({"x": x, "i": i, "sigma": level, "sigma_hat": level, "denoised": denoised})
            bar.update(i + 1 - bar.n)

        def noise(start: float, end: float) -> Tensor:
            return noise_scale * draw(x.new_tensor(start), x.new_tensor(end))

        denoise = _denoiser(model, extra_args, name)
        return sample(name, denoise, x, sigmas, space_of(model), noise, report, **options).to(dtype)


def space_of(model: Any) -> SpaceName | None:
    """How a sampled model (as k-diffusion samplers get it) mixes signal and noise; None where it regresses an image."""
    return _space(model.inner_model.inner_model.model_sampling)


def _space(sampling: Any) -> SpaceName | None:
    if {"IMG_TO_IMG", "IMG_TO_IMG_FLOW"} & {cls.__name__ for cls in type(sampling).__mro__}:
        return None
    return "flow" if isinstance(sampling, host_sampling.CONST) else "ve"


def _denoiser(model: Any, extra_args: dict, name: str) -> Denoise:
    if not SAMPLERS[name].cfg_pp:

        def denoise(x: Tensor, sigma: float) -> Guided:
            denoised = model(x, x.new_full((len(x),), sigma), **extra_args)
            return Guided(denoised, denoised)

        return denoise

    kept: dict[str, Tensor] = {}

    def keep_uncond(args: dict) -> Tensor:
        if args.get("uncond") is not None:
            kept["uncond"] = args["uncond_denoised"]
        return args["denoised"]

    options = {**extra_args.get("model_options", {})}
    options = set_model_options_post_cfg_function(options, keep_uncond, disable_cfg1_optimization=True)

    def denoise_both(x: Tensor, sigma: float) -> Guided:
        denoised = model(x, x.new_full((len(x),), sigma), **{**extra_args, "model_options": options})
        if "uncond" not in kept:
            raise ValueError(
                f"{name} is a CFG++ sampler and needs a negative prompt, but this guider evaluates none; use CFGGuider "
                "or KSampler, or a sampler without cfg_pp"
            )
        return Guided(denoised, kept.pop("uncond"))

    return denoise_both


def _corrected_name(sampler: Any) -> str | None:
    """Which of CORRECTED a SAMPLER is: by the identity of its function, not by what it calls itself."""
    if type(sampler) is not comfy.samplers.KSAMPLER or not set(sampler.extra_options) <= {"eta", "s_noise"}:
        return None
    function = sampler.sampler_function
    for name in CORRECTED:
        # ComfyUI builds these two inside of `ksampler`, anew for every SAMPLER.
        closure = ("comfy.samplers", f"ksampler.<locals>.{name}_function")
        if function is getattr(host, f"sample_{name}", None) or closure == (
            getattr(function, "__module__", None),
            getattr(function, "__qualname__", None),
        ):
            return name
    return None


def _describe_changes(sampling: Any) -> str:
    names = [name for name in host_names() if name in CORRECTED]
    if _space(sampling) != "flow":
        return (
            f"This is not a flow model ({class_names(sampling)}): every sampler runs as it is.\n"
            f"If a later node makes it one, these run in their flow-correct form: {', '.join(names)}."
        )
    lines = [f"{name}: ComfyUI's {CORRECTED[name]}." for name in names]
    rest = len(host_names()) - len(names)
    return "\n".join(["Changed on this flow model:", *lines, f"The other {rest} samplers run as they are."])
