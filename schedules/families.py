"""What each model family was told about noise by the people who made it: look-up, and the image models' data.

Shift rules are the official ones of the released inference code; `source` says where. ComfyUI's own default for a
family can differ (Qwen-Image: a fixed 3.158; Wan: a fixed 8) and is what a loaded MODEL has until it is patched.
"""

import math

from .families_other import OTHER_FAMILIES
from .family import (
    EmpiricalMu,
    Family,
    LogitNormal,
    MuLineRule,
    Rows,
    ShiftedTwice,
    SqrtTokens,
    StaticShift,
    rule_shift,
)
from .shift import FLUX_LINE, MuLine


_IMAGE_FAMILIES = (
    Family(
        key="flux",
        title="FLUX.1 dev",
        multiplier=None,
        rule=MuLineRule(FLUX_LINE),
        source="black-forest-labs/flux, src/flux/sampling.py: get_lin_function, get_schedule",
        model_classes=("Flux", "FluxInpaint"),
    ),
    Family(
        key="flux_schnell",
        title="FLUX.1 schnell",
        multiplier=1.0,
        rule=StaticShift(1.0),
        source="black-forest-labs/flux, src/flux/cli.py: shift is off for flux-schnell",
        model_classes=("FluxSchnell",),
    ),
    Family(
        key="flux2",
        title="FLUX.2",
        multiplier=None,
        rule=EmpiricalMu(),
        training=MuLineRule(FLUX_LINE),
        source="black-forest-labs/flux2, src/flux2/sampling.py: compute_empirical_mu. Trained with FLUX.1's line: "
        "OneTrainer pull request 1516 and musubi-tuner's flux2_shift, who say they have it from the authors",
        model_classes=("Flux2",),
        pixels_per_latent=16,
    ),
    Family(
        key="chroma",
        title="Chroma",
        multiplier=None,
        rule=MuLineRule(FLUX_LINE),
        source="secondary: defaults of diffusers' pipelines/chroma/pipeline_chroma.py, which are FLUX.1's",
        model_classes=("Chroma",),
    ),
    Family(
        key="chroma_radiance",
        title="Chroma Radiance",
        multiplier=None,
        rule=MuLineRule(FLUX_LINE),
        source="secondary: as Chroma",
        model_classes=("ChromaRadiance",),
        pixels_per_latent=1,
    ),
    Family(
        key="longcat_image",
        title="LongCat-Image",
        multiplier=None,
        rule=StaticShift(math.exp(1.15)),
        source="secondary: ComfyUI's mu 1.15; diffusers' pipeline draws a line whose two ends are both 1.15",
        model_classes=("LongCatImage",),
    ),
    Family(
        key="qwen_image",
        title="Qwen-Image",
        multiplier=None,
        rule=MuLineRule(MuLine(256, 0.5, 8192, 0.9)),
        terminal=0.02,
        source="Qwen/Qwen-Image, scheduler_config.json: base_shift, max_shift, max_image_seq_len, shift_terminal",
        model_classes=("QwenImage",),
        default_width=1664,
        default_height=928,
        frames_per_latent=4,
    ),
    Family(
        key="krea2",
        title="Krea 2",
        multiplier=None,
        rule=MuLineRule(MuLine(256, 0.5, 6400, 1.15)),
        source="krea/Krea-2, scheduler_config.json: max_image_seq_len 6400; diffusers' pipelines/krea2. The distilled "
        "Turbo model has mu 1.15 at every size: use mode mu",
        model_classes=("Krea2",),
        frames_per_latent=4,
    ),
    Family(
        key="lens",
        title="Lens",
        multiplier=None,
        rule=StaticShift(math.exp(1.829)),
        placement=None,
        source="secondary: ComfyUI, comfy/supported_models.py: mu 1.829",
        model_classes=("Lens",),
        pixels_per_latent=16,
    ),
    Family(
        key="sd3",
        title="Stable Diffusion 3 / 3.5",
        multiplier=1000.0,
        rule=StaticShift(3.0),
        placement=ShiftedTwice(),
        source="stabilityai/stable-diffusion-3-medium, scheduler_config.json; Stability-AI/sd3.5, sd3_infer.py: "
        "get_sigmas starts at the shifted sigma_min too; arXiv:2403.03206",
        model_classes=("SD3",),
    ),
    Family(
        key="auraflow",
        title="AuraFlow",
        multiplier=1.0,
        rule=StaticShift(1.73),
        placement=ShiftedTwice(),
        source="fal/AuraFlow, scheduler_config.json; diffusers' pipelines/aura_flow",
        model_classes=("AuraFlow",),
    ),
    Family(
        key="z_image",
        title="Z-Image",
        multiplier=1.0,
        rule=StaticShift(3.0),
        source="Tongyi-MAI/Z-Image-Turbo, scheduler_config.json: shift 3, dynamic shifting off",
        model_classes=("ZImage",),
    ),
    Family(
        key="z_image_pixel",
        title="Z-Image in pixel space",
        multiplier=1.0,
        rule=StaticShift(3.0),
        placement=None,
        source="secondary: ComfyUI, comfy/supported_models.py: ZImagePixelSpace",
        model_classes=("ZImagePixelSpace",),
        pixels_per_latent=1,
    ),
    Family(
        key="lumina2",
        title="Lumina-Image 2.0",
        multiplier=1.0,
        rule=StaticShift(6.0),
        source="Alpha-VLLM/Lumina-Image-2.0, scheduler_config.json: shift 6, dynamic shifting off",
        model_classes=("Lumina2",),
    ),
    Family(
        key="hidream",
        title="HiDream-I1",
        multiplier=1000.0,
        rule=StaticShift(3.0),
        source="HiDream-ai/HiDream-I1, inference.py: 3 for Full and Fast, 6 for Dev (use mode shift)",
        model_classes=("HiDream",),
    ),
    Family(
        key="hidream_o1",
        title="HiDream-O1",
        multiplier=1000.0,
        rule=StaticShift(3.0),
        placement=None,
        source="secondary: ComfyUI, comfy/supported_models.py: shift 3, noise scale 8",
        model_classes=("HiDreamO1",),
        pixels_per_latent=1,
    ),
    Family(
        key="hunyuan_image",
        title="HunyuanImage 2.1",
        multiplier=1000.0,
        rule=StaticShift(5.0),
        source="Tencent-Hunyuan/HunyuanImage-2.1, README: shift 5, and 4 for the distilled model (use mode shift)",
        model_classes=("HunyuanImage21",),
        default_width=2048,
        default_height=2048,
        pixels_per_token=32,
        pixels_per_latent=32,
    ),
    Family(
        key="hunyuan_image_refiner",
        title="HunyuanImage 2.1 refiner",
        multiplier=1000.0,
        rule=StaticShift(4.0),
        source="Tencent-Hunyuan/HunyuanImage-2.1, hunyuanimage_refiner_pipeline.py: shift 4",
        model_classes=("HunyuanImage21Refiner",),
        default_width=2048,
        default_height=2048,
    ),
    Family(
        key="omnigen2",
        title="OmniGen2",
        multiplier=1.0,
        rule=SqrtTokens(base=320 * 320, of_pixels=True),
        training=MuLineRule(FLUX_LINE),
        source="VectorSpaceLab/OmniGen2, omnigen2/schedulers/scheduling_flow_match_euler_discrete.py: √(latent pixels)/"
        "40; ComfyUI has 2.6. Trained with a logit-normal on FLUX.1's line (secondary)",
        model_classes=("Omnigen2",),
    ),
    Family(
        key="boogu",
        title="Boogu-Image",
        multiplier=1.0,
        rule=StaticShift(math.exp(1.15)),
        source="Boogu-Image-0.1-Base, scheduler_config.json as vllm-omni's tests quote it: dynamic_time_shift off, "
        "seq_len 4096 on FLUX.1's line",
        model_classes=("Boogu",),
    ),
    Family(
        key="mage_flow",
        title="MageFlow",
        multiplier=1.0,
        rule=StaticShift(6.0),
        placement=None,
        source="secondary: ComfyUI, comfy/supported_models.py: MageFlow",
        model_classes=("MageFlow",),
        pixels_per_latent=16,
    ),
    Family(
        key="ideogram4",
        title="Ideogram 4",
        multiplier=1.0,
        rule=SqrtTokens(base=512 * 512, of_pixels=True),
        placement=LogitNormal(std=1.5, log_snr_min=-18.0, log_snr_max=15.0),
        source="diffusers' pipelines/ideogram4: mu ½·ln(pixels/512²), std 1.5; musubi-tuner, training/timesteps.py: "
        "trained with the same logit-normal density",
        model_classes=("Ideogram4",),
        pixels_per_latent=16,
    ),
    Family(
        key="joyimage",
        title="JoyImage",
        multiplier=1000.0,
        rule=StaticShift(1.5),
        placement=ShiftedTwice(),
        source="diffusers' scripts/convert_joyimage_edit_to_diffusers.py: flow_shift 1.5; pipelines/joyimage",
        model_classes=("JoyImage",),
        frames_per_latent=4,
    ),
    Family(
        key="ernie_image",
        title="ERNIE-Image",
        multiplier=1000.0,
        rule=StaticShift(3.0),
        source="secondary: ComfyUI, comfy/supported_models.py: ErnieImage; steps as diffusers' pipelines/ernie_image",
        model_classes=("ErnieImage",),
        pixels_per_latent=16,
    ),
    Family(
        key="kandinsky5_image",
        title="Kandinsky 5 image",
        multiplier=1000.0,
        rule=StaticShift(3.0),
        source="kandinskylab/kandinsky-5, kandinsky/t2i_pipeline.py: scheduler_scale; generation_utils.py",
        model_classes=("Kandinsky5Image",),
    ),
    Family(
        key="anima",
        title="Anima",
        multiplier=1.0,
        rule=StaticShift(3.0),
        source="diffusers' scripts/convert_anima_to_diffusers.py: shift 3; modular_pipelines/anima",
        model_classes=("Anima",),
        frames_per_latent=4,
    ),
    Family(
        key="pixeldit",
        title="PixelDiT",
        multiplier=1000.0,
        rule=StaticShift(4.0),
        placement=None,
        source="secondary: ComfyUI, comfy/supported_models.py: PixelDiTT2I",
        model_classes=("PixelDiTT2I",),
        pixels_per_latent=1,
    ),
    Family(
        key="pid",
        title="PiD",
        multiplier=1000.0,
        rule=StaticShift(1.5),
        placement=None,
        source="secondary: ComfyUI, comfy/supported_models.py: PiD",
        model_classes=("PiD",),
        pixels_per_latent=1,
    ),
    Family(
        key="cogview4",
        title="CogView4",
        multiplier=1000.0,
        rule=SqrtTokens(base=256, scale=0.75, offset=0.25),
        placement=Rows(with_end=True),
        source="diffusers' pipelines/cogview4: calculate_shift with time_shift_type linear, so this is the shift",
        model_classes=(),
    ),
    Family(
        key="glm_image",
        title="GLM-Image",
        multiplier=1000.0,
        rule=SqrtTokens(base=256, scale=0.75, offset=0.25),
        placement=Rows(with_end=False),
        source="diffusers' pipelines/glm_image: as CogView4",
        model_classes=(),
    ),
)

FAMILIES: dict[str, Family] = {family.key: family for family in (*_IMAGE_FAMILIES, *OTHER_FAMILIES)}
FLOW_FAMILIES: tuple[str, ...] = tuple(key for key, family in FAMILIES.items() if family.rule is not None)

NOT_FAMILIES: dict[str, str] = {
    "LotusD": "depth and normal maps in one step, by regression from an image",
    "WAN21_FlowRVS": "segmentation by a flow from a video to its mask: it adds no noise",
    "RT_DETR_v4": "object detection",
    "SAM3": "segmentation",
    "SAM31": "segmentation",
    "DepthAnything3": "depth estimation",
}
"""ComfyUI config classes that are no diffusion models in our sense, and why."""


def family_of(class_name: str) -> Family | None:
    """The family that lists this ComfyUI class name, or None."""
    return next((family for family in FAMILIES.values() if class_name in family.model_classes), None)


def family_named(key: str) -> Family:
    """FAMILIES[key], or ValueError that lists the keys."""
    if key not in FAMILIES:
        raise ValueError(f"unknown family {key[:40]!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[key]


def official_shift(
    family: str | Family, width: int, height: int, length: int = 1, steps: int = 50, training: bool = False
) -> tuple[float, float]:
    """(shift, mu) that the family's authors use for a size in pixels and frames; for training the model's own rule.

    `steps` matters for FLUX.2 alone. ValueError for an unknown family, one without a shift, or a size below one token.
    """
    family = family_named(family) if isinstance(family, str) else family
    rule = family.training if training and family.training is not None else family.rule
    if rule is None:
        raise ValueError(f"{family.title} ({family.key}) is not a flow model: it has no shift")
    return rule_shift(rule, family, width, height, length, steps)
