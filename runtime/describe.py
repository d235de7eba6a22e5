"""What a loaded MODEL is, in words: the node's text, and the facts behind it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from comfy.model_patcher import ModelPatcher

from ..schedules.families import official_shift
from ..schedules.family import Family
from ..schedules.ztsnr import PURE_NOISE_SNR
from .model_sampling import Sampling, class_names, detect_family, has_discrete_table, read_sampling


_EQUATIONS = {
    "eps": "eps, the network predicts the noise",
    "x0": "x0, the network predicts the clean latent",
    "v": "v, the network predicts alpha·noise − sigma·x0",
    "velocity": "velocity, the network predicts noise − x0",
}
_FUNCTIONS = (
    "model_function_wrapper",
    "sampler_cfg_function",
    "sampler_calc_cond_batch_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "denoise_mask_function",
    "context_handler",
)


def describe(model: ModelPatcher) -> str:
    """Lines of `name: value` about a MODEL as it would be sampled now. ValueError where it is no diffusion MODEL."""
    sampling = read_sampling(model)
    family = detect_family(model)
    facts = {
        "family": _family(model, family),
        "prediction": _EQUATIONS.get(
            sampling.prediction or "", f"none of eps, x0, v, velocity ({class_names(sampling.host)})"
        ),
        "process": _process(sampling, family),
        "shift": _shift(sampling, family),
        "timestep": _timestep(sampling),
        "sigma range": _sigma_range(sampling),
        "terminal SNR": f"{sampling.terminal_snr:.3g}"
        + (" (pure noise)" if sampling.terminal_snr < PURE_NOISE_SNR else ""),
        "latent": _latent(model.model.latent_format),
        "patches": "".join(f"\n  {line}" for line in _patches(model)) or "none",
    }
    return "\n".join(f"{name}: {value}" for name, value in facts.items()).replace(": \n", ":\n")


def _family(model: ModelPatcher, family: Family | None) -> str:
    classes = f"{type(model.model.model_config).__name__}, {type(model.model).__name__}"
    return f"{family.title} [{family.key}] ({classes})" if family else f"not in Tidetable's list ({classes})"


def _process(sampling: Sampling, family: Family | None) -> str:
    classes = class_names(sampling.host)
    if sampling.shift is not None:
        grafted = family is not None and family.process != "flow"
        note = "; right for a flow-matching finetune of this family only (Flow Graft)" if grafted else ""
        return f"flow, x = (1 − σ)·x0 + σ·noise ({classes}){note}"
    return (
        f"variance preserving, x = x0 + σ·noise scaled to unit variance, {len(sampling.host.sigmas)} levels ({classes})"
    )


def _shift(sampling: Sampling, family: Family | None) -> str:
    if sampling.shift is None:
        return "none (not a flow model)"
    text = f"α {sampling.shift:.4f} = e^mu, mu {sampling.mu:.4f}"
    if family is None or family.rule is None:
        return text
    shift, mu = official_shift(family, family.default_width, family.default_height, family.default_length)
    frames = f", {family.default_length} frames" if family.default_length > 1 else ""
    size = f"{family.default_width}×{family.default_height}{frames}"
    return f"{text}; official at {size}: α {shift:.4f}, mu {mu:.4f}"


def _timestep(sampling: Sampling) -> str:
    host = sampling.host
    low, high = (float(host.timestep(sigma)) for sigma in (host.sigma_min, host.sigma_max))
    rule = "row of the noise table" if has_discrete_table(host) else "function of σ"
    if sampling.multiplier is not None:
        rule = f"σ·{sampling.multiplier:g}" if sampling.multiplier != 1.0 else "σ itself"
    return f"{rule}, the network sees {low:.4g} to {high:.4g}"


def _sigma_range(sampling: Sampling) -> str:
    host = sampling.host
    extra = [
        f"{name} {getattr(host, name):g}"
        for name in ("noise_scale", "audio_shift")
        if getattr(host, name, None) not in (None, 1.0)
    ]
    return ", ".join([f"{float(host.sigma_min):.6g} to {float(host.sigma_max):.6g}", *extra])


def _latent(latent_format: Any) -> str:
    parts = [
        f"{latent_format.latent_channels} channels",
        f"{latent_format.latent_dimensions}-dimensional",
        f"scale {latent_format.scale_factor:g}",
    ]
    if getattr(latent_format, "shift_factor", None):
        parts.append(f"offset {latent_format.shift_factor:g}")
    if getattr(latent_format, "latents_mean", None) is not None:
        parts.append("mean and std per channel")
    return f"{', '.join(parts)} ({type(latent_format).__name__})"


def _patches(model: ModelPatcher) -> Iterator[str]:
    """One line per kind of change that the patcher carries."""
    for name, patch in model.object_patches.items():
        yield f"object {name}: {class_names(patch)}"
    if model.patches:
        kinds = Counter(_patch_kind(patch[1]) for patches in model.patches.values() for patch in patches)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        yield f"weights: {len(model.patches)} tensors changed ({listed})"
    options = model.model_options
    transformer = options.get("transformer_options", {})
    for title, names in (
        ("weight wrappers", _counts({"layers": model.weight_wrapper_patches})),
        ("sampling functions", [name for name in _FUNCTIONS if options.get(name)]),
        ("attention override", [_name(f) for f in (transformer.get("optimized_attention_override"),) if f]),
        ("attention and block patches", _counts(transformer.get("patches", {}))),
        ("replaced attention and blocks", _counts(transformer.get("patches_replace", {}))),
        ("wrappers", _counts(_by_kind(model.wrappers)) + _counts(_by_kind(transformer.get("wrappers", {})))),
        ("injections", _counts(model.injections)),
        ("weight hooks", _counts({"hooks": model.hook_patches})),
    ):
        if names:
            yield f"{title}: {', '.join(names)}"


def _counts(entries: Mapping[Any, Sized]) -> list[str]:
    return [f"{key} ({len(value)})" for key, value in entries.items() if len(value)]


def _by_kind(wrappers: Mapping[str, Mapping[Any, list]]) -> dict[str, list]:
    """Wrapper functions per kind, whoever added them."""
    return {kind: [f for functions in by_key.values() for f in functions] for kind, by_key in wrappers.items()}


def _patch_kind(patch: Any) -> str:
    """The adapter's name (lora, loha, …), or the kind of a plain patch (diff, set, …)."""
    if isinstance(patch, tuple):
        return str(patch[0]) if patch and isinstance(patch[0], str) else "diff"
    return getattr(patch, "name", type(patch).__name__)


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
