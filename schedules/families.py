"""What each model family was told about noise by the people who made it, as data.

Shift rules are the official ones of the released inference code; `source` says where. ComfyUI's own default for a
family can differ (Qwen-Image: a fixed 3.158; Wan: a fixed 8) and is what a loaded MODEL has until it is patched.
"""

from dataclasses import dataclass
from typing import Literal

from .prediction import Prediction
from .shift import MuLine, image_tokens, mu_from_image_tokens, mu_from_shift, shift_from_mu


@dataclass(frozen=True)
class StaticShift:
    """The same shift at every size."""

    shift: float


@dataclass(frozen=True)
class MuLineRule:
    """mu linear in image tokens."""

    line: MuLine
    terminal: float | None = None
    """If given, the official scheduler also stretches its steps to end at this sigma (`shift.stretch_terminal`)."""


@dataclass(frozen=True)
class ByPixels:
    """One shift per size class: the first row whose pixel count is not exceeded."""

    rows: tuple[tuple[float, float], ...]
    """(largest width·height, shift), ascending; the last one is inf."""


ShiftRule = StaticShift | MuLineRule | ByPixels


@dataclass(frozen=True)
class Family:
    key: str
    title: str
    """Name for people."""
    prediction: Prediction
    process: Literal["flow", "vp"]
    multiplier: float | None
    """What t is multiplied by for the network's timestep; None where the host passes t itself or a table row."""
    rule: ShiftRule | None
    """None where a shift has no meaning (eps and v models)."""
    source: str
    """Where the rule's numbers were published."""
    model_classes: tuple[str, ...]
    """ComfyUI class names: of the model's config in `comfy.supported_models`, or else of the model in
    `comfy.model_base`."""
    default_width: int = 1024
    default_height: int = 1024


_FAMILIES = (
    Family(
        key="flux",
        title="FLUX.1 dev",
        prediction="velocity",
        process="flow",
        multiplier=None,
        rule=MuLineRule(MuLine(256, 0.5, 4096, 1.15)),
        source="black-forest-labs/flux, src/flux/sampling.py: get_lin_function, get_schedule",
        model_classes=("Flux", "FluxInpaint"),
    ),
    Family(
        key="flux_schnell",
        title="FLUX.1 schnell",
        prediction="velocity",
        process="flow",
        multiplier=1.0,
        rule=StaticShift(1.0),
        source="black-forest-labs/flux, src/flux/cli.py: shift is off for flux-schnell",
        model_classes=("FluxSchnell",),
    ),
    Family(
        key="qwen_image",
        title="Qwen-Image",
        prediction="velocity",
        process="flow",
        multiplier=None,
        rule=MuLineRule(MuLine(256, 0.5, 8192, 0.9), terminal=0.02),
        source="Qwen/Qwen-Image, scheduler_config.json: base_shift, max_shift, max_image_seq_len, shift_terminal",
        model_classes=("QwenImage",),
        default_width=1664,
        default_height=928,
    ),
    Family(
        key="sd3",
        title="Stable Diffusion 3 / 3.5",
        prediction="velocity",
        process="flow",
        multiplier=1000.0,
        rule=StaticShift(3.0),
        source="stabilityai/stable-diffusion-3-medium, scheduler_config.json; arXiv:2403.03206",
        model_classes=("SD3",),
    ),
    Family(
        key="auraflow",
        title="AuraFlow",
        prediction="velocity",
        process="flow",
        multiplier=1.0,
        rule=StaticShift(1.73),
        source="fal/AuraFlow, scheduler_config.json",
        model_classes=("AuraFlow",),
    ),
    Family(
        key="z_image",
        title="Z-Image",
        prediction="velocity",
        process="flow",
        multiplier=1.0,
        rule=StaticShift(3.0),
        source="Tongyi-MAI/Z-Image-Turbo, scheduler_config.json: shift 3, dynamic shifting off",
        model_classes=("ZImage",),
    ),
    Family(
        key="lumina2",
        title="Lumina-Image 2.0",
        prediction="velocity",
        process="flow",
        multiplier=1.0,
        rule=StaticShift(6.0),
        source="Alpha-VLLM/Lumina-Image-2.0, scheduler_config.json: shift 6, dynamic shifting off",
        model_classes=("Lumina2",),
    ),
    Family(
        key="wan",
        title="Wan 2.1 / 2.2",
        prediction="velocity",
        process="flow",
        multiplier=1000.0,
        rule=ByPixels(((832 * 480, 3.0), (float("inf"), 5.0))),
        source="Wan-Video/Wan2.1, generate.py: 5, but 3 for image-to-video at 832×480; diffusers' Wan guide: 3 at "
        "480p, 5 at 720p",
        model_classes=(
            "WAN21_T2V",
            "WAN21_I2V",
            "WAN22_T2V",
            "WAN21_FunControl2V",
            "WAN21_Camera",
            "WAN22_Camera",
            "WAN21",
        ),
        default_width=1280,
        default_height=720,
    ),
    Family(
        key="sdxl",
        title="Stable Diffusion XL",
        prediction="eps",
        process="vp",
        multiplier=None,
        rule=None,
        source="Stability-AI/generative-models, configs/inference/sd_xl_base.yaml",
        model_classes=(
            "SDXL",
            "SDXLRefiner",
            "SSD1B",
            "Segmind_Vega",
            "KOALA_700M",
            "KOALA_1B",
            "SDXL_instructpix2pix",
        ),
    ),
    Family(
        key="sd15",
        title="Stable Diffusion 1.5",
        prediction="eps",
        process="vp",
        multiplier=None,
        rule=None,
        source="CompVis/stable-diffusion, configs/stable-diffusion/v1-inference.yaml",
        model_classes=("SD15", "SD15_instructpix2pix"),
        default_width=512,
        default_height=512,
    ),
    Family(
        key="tidetable_tiny",
        title="Tidetable's embedded models",
        prediction="velocity",
        process="flow",
        multiplier=1000.0,
        rule=StaticShift(1.0),
        source="this pack, models/: the MMDiT is trained at shift 1",
        model_classes=("TinyConfig",),
        default_width=256,
        default_height=256,
    ),
)

FAMILIES: dict[str, Family] = {family.key: family for family in _FAMILIES}


def family_of(class_name: str) -> Family | None:
    """The family that lists this ComfyUI class name, or None."""
    return next((family for family in _FAMILIES if class_name in family.model_classes), None)


def official_shift(family: str | Family, width: int, height: int) -> tuple[float, float]:
    """(shift, mu) that the family's authors use for an image of this size in pixels.

    Raises ValueError for an unknown family, one without a shift, or a size below one token.
    """
    if isinstance(family, str):
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
        family = FAMILIES[family]
    tokens = image_tokens(width, height)
    match family.rule:
        case StaticShift(shift):
            return shift, mu_from_shift(shift)
        case MuLineRule(line):
            mu = mu_from_image_tokens(tokens, line)
            return shift_from_mu(mu), mu
        case ByPixels(rows):
            shift = next(shift for largest, shift in rows if width * height <= largest)
            return shift, mu_from_shift(shift)
    raise ValueError(f"{family.title} ({family.key}) is not a flow model: it has no shift")
