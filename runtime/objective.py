"""The settings nodes of a training run's objective and timestep density: inputs to settings, and their meaning."""

from dataclasses import replace

import torch
from comfy.model_patcher import ModelPatcher

from ..schedules.families import FLOW_FAMILIES, family_named
from ..schedules.process import Flow, NoiseProcess
from ..training.bridged import BridgedDenoiser
from ..training.config import TrainConfig
from ..training.densities import density_shift, shifted_quantile
from ..training.equivalents import equivalents
from ..training.protocols import TrainableDenoiser
from ..training.recipe import DensityConfig, ObjectiveConfig
from .canvas import COLORS, Figure, Line, Panel
from .images import to_image_tensor
from .model_sampling import detect_family, read_sampling
from .prediction import patch_flow_graft


__all__ = ["DENSITY_FAMILIES", "PRESETS", "DensityConfig", "ObjectiveConfig", "make_density", "show_density"]

DENSITY_FAMILIES = ("auto", *FLOW_FAMILIES)
PRESETS = {
    "custom": {},
    # The article on bigASP v2.5: logit-normal with shift 3.
    "bigASP": {"density": "logit_normal", "mean": 0.0, "std": 1.0, "shift_mode": "shift", "shift": 3.0},
    "Qwen-Image": {
        "density": "logit_normal",
        "mean": 0.0,
        "std": 1.0,
        "shift_mode": "official",
        "family": "qwen_image",
    },
}
BINS = 64
PER_BIN = 64


def make_density(preset: str, family: str, knots: str, **settings) -> DensityConfig:
    """Settings from the node's inputs; what a preset says replaces them. ValueError for what is out of range."""
    given = {**settings, "family": "" if family == "auto" else family}
    if settings["density"] == "piecewise":
        given["knots"] = parse_knots(knots)
    return DensityConfig(**{**given, **PRESETS[preset]})


def parse_knots(text: str) -> tuple[tuple[float, float], ...]:
    """ "0:1, 0.5:2, 1:1" to pairs of t and weight."""
    try:
        pairs = [tuple(float(number) for number in pair.split(":")) for pair in text.split(",") if pair.strip()]
        return tuple((t, weight) for t, weight in pairs)
    except ValueError:
        raise ValueError(
            f"knots {text[:80]!r} are not pairs t:weight with commas between them, like 0:1, 0.5:2, 1:1"
        ) from None


def show_density(
    config: DensityConfig, model: ModelPatcher | None, width: int, height: int
) -> tuple[torch.Tensor, str]:
    """(IMAGE of the density, words): for a model, or for a flow model with shift 1, at a size in pixels."""
    process: NoiseProcess = Flow()
    own = 1.0
    if model is not None:
        sampling = read_sampling(model)
        process, own = sampling.process, sampling.shift or 1.0
        config = with_family(config, model)
    scale = family_named(config.family).pixels_per_latent if config.family else 8
    shift = density_shift(config, (1, height // scale, width // scale), isinstance(process, Flow), own)
    u = (torch.arange(BINS * PER_BIN, dtype=torch.float64) + 0.5) / (BINS * PER_BIN)
    t = shifted_quantile(config, process, shift)(u)
    text = f"{config.density}, shift {shift:.4g} at {width}×{height}, mean t {float(t.mean()):.3f}, "
    text += f"half of all draws above {float(t[len(t) // 2]):.3f}\n"
    text += equivalents(config, shift) if isinstance(process, Flow) else "eps and v models: t is the row of the table."
    return histogram(t, f"{config.density}, shift {shift:.4g}"), text


def histogram(t: torch.Tensor, title: str) -> torch.Tensor:
    """IMAGE of draws as a density over t, as steps; 1 is uniform."""
    counts = torch.histc(t.float(), BINS, 0.0, 1.0)
    heights = (counts * BINS / len(t)).tolist()
    x = [edge / BINS for index in range(BINS) for edge in (index, index + 1)]
    y = [height for height in heights for _ in range(2)]
    panel = Panel("probability density (uniform = 1)", [Line([0.0, *x, 1.0], [0.0, *y, 0.0], COLORS[0])])
    x_label = "t, the noise fraction (0 = data, 1 = noise)"
    return to_image_tensor(Figure([panel], x_label, title, [], 640, 400, whole_x=False).image)


def with_family(config: DensityConfig, model: ModelPatcher) -> DensityConfig:
    """The settings with the model's own family in place of an open one."""
    found = None if config.family else detect_family(model)
    return config if found is None else replace(config, family=found.key)


def prepare(model: ModelPatcher, config: TrainConfig) -> tuple[ModelPatcher, TrainConfig]:
    """The model that is trained (a graft is a clone), and the settings with nothing left open and no data in them."""
    config = replace(config, objective=replace(config.objective, prior_conditioning=None))
    if config.objective.flow == "graft":
        model = patch_flow_graft(model, config.objective.graft_shift)
    if config.timestep_density is not None:
        config = replace(config, timestep_density=with_family(config.timestep_density, model))
    return model, config


def seen_in_flow(denoiser: TrainableDenoiser, objective: ObjectiveConfig) -> TrainableDenoiser:
    """The denoiser itself, or for a bridge the same one in flow time."""
    return BridgedDenoiser(denoiser) if objective.flow == "bridge" else denoiser
