"""What a model family is: how its authors shift time and place its steps, as plain data. The data are in `families`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .prediction import Prediction
from .shift import MuLine, empirical_mu, image_tokens, mu_from_image_tokens, mu_from_shift, shift_from_mu
from .validate import require_steps


# ── how much the time is shifted ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class StaticShift:
    """The same shift at every size."""

    shift: float


@dataclass(frozen=True)
class MuLineRule:
    """mu linear in tokens."""

    line: MuLine


@dataclass(frozen=True)
class EmpiricalMu:
    """FLUX.2's mu, which depends on the number of steps as well (`shift.empirical_mu`)."""


@dataclass(frozen=True)
class ByPixels:
    """One shift per size class: the first row whose pixel count is not exceeded."""

    rows: tuple[tuple[float, float], ...]
    """(largest width·height, shift), ascending; the last one is inf."""


@dataclass(frozen=True)
class SqrtTokens:
    """shift = scale·√(tokens/base) + offset; scale 1 and offset 0 is the rule of Esser et al. 2024, Eq. 23."""

    base: float
    """Tokens, pixels where `of_pixels`."""
    scale: float = 1.0
    offset: float = 0.0
    of_pixels: bool = False
    """Pixels of one frame instead of tokens: exact where a size is no multiple of a token."""


ShiftRule = StaticShift | MuLineRule | EmpiricalMu | ByPixels | SqrtTokens


# ── which noise levels are visited ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Trailing:
    """t = 1 − i/steps, then shifted."""


@dataclass(frozen=True)
class ShiftedTwice:
    """t from 1 to the shift of 1/1000, both included, then shifted again.

    What diffusers' FlowMatchEulerDiscrete does with a static shift when a pipeline hands it no sigmas.
    """


@dataclass(frozen=True)
class Rows:
    """t on whole thousandths from 1 down to 1/1000, rounded down, then shifted."""

    with_end: bool
    """Whether 1/1000 is the last step (else the one after it)."""


@dataclass(frozen=True)
class LogitNormal:
    """Quantiles of a logit-normal distribution with mean mu, inside a range of log-SNR."""

    std: float
    log_snr_min: float
    log_snr_max: float


@dataclass(frozen=True)
class LinearQuadratic:
    """The first half of the steps falls linearly by `threshold`, the rest quadratically to 0. Takes no shift."""

    threshold: float


@dataclass(frozen=True)
class Karras:
    """Karras et al. 2022, Eq. 5 with rho 7, between these noise-to-signal ratios. Takes no shift."""

    high: float
    low: float


@dataclass(frozen=True)
class Leading:
    """Whole rows of Stable Diffusion's table, 1000 // steps apart, from row 1 upwards. Takes no shift."""


Placement = Trailing | ShiftedTwice | Rows | LogitNormal | LinearQuadratic | Karras | Leading


# ── the family ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Family:
    key: str
    title: str
    """Name for people."""
    rule: ShiftRule | None
    """Of the released inference code; None where a shift has no meaning (models that are not flow models)."""
    source: str
    """Where the rule's numbers were published, or "secondary" and from where they were taken."""
    model_classes: tuple[str, ...]
    """ComfyUI class names: of the model's config in `comfy.supported_models`, or else of the model in
    `comfy.model_base`. Empty where ComfyUI has no such model."""
    multiplier: float | None = None
    """What t is multiplied by for the network's timestep; None where the host passes t itself or a table row."""
    prediction: Prediction | None = "velocity"
    """None for EDM preconditioning and Cosmos, which are none of ours."""
    process: Literal["flow", "vp", "ve"] = "flow"
    placement: Placement | None = Trailing()
    """None where no published schedule can be given in these terms."""
    terminal: float | None = None
    """If given, the official scheduler also stretches its steps to end at this sigma (`shift.stretch_terminal`)."""
    training: ShiftRule | None = None
    """Only where the family was trained with another rule than `rule`."""
    default_width: int = 1024
    default_height: int = 1024
    default_length: int = 1
    """Frames; above 1 for families of videos, whose tokens count frames too."""
    pixels_per_token: int = 16
    pixels_per_latent: int = 8
    frames_per_latent: int = 1
    """Frames per latent frame after the first; a latent frame is one layer of tokens."""

    def pixel_size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(width, height, frames) of a latent [C, H, W] or [C, F, H, W] of this family."""
        frames = shape[1] if len(shape) == 4 else 1
        scale = self.pixels_per_latent
        return shape[-1] * scale, shape[-2] * scale, (frames - 1) * self.frames_per_latent + 1

    def tokens(self, width: int, height: int, length: int = 1) -> int:
        """Tokens of a picture or video of this size in pixels and frames. ValueError below one token or frame."""
        if length < 1:
            raise ValueError(f"length must be at least 1 frame, got {length}; 1 is a picture")
        layers = (length - 1) // self.frames_per_latent + 1 if self.default_length > 1 else 1
        return image_tokens(width, height, self.pixels_per_token) * layers


GENERIC = Family("", "unknown family", None, "", ())
"""Sizes of a token where the family is not known: 16 × 16 pixels."""


def rule_shift(
    rule: ShiftRule, family: Family, width: int, height: int, length: int, steps: int
) -> tuple[float, float]:
    """(shift, mu) of a rule for a size in pixels and frames. ValueError below one token and where steps are needed."""
    tokens = family.tokens(width, height, length)
    match rule:
        case StaticShift(shift):
            return shift, mu_from_shift(shift)
        case ByPixels(rows):
            shift = next(shift for largest, shift in rows if width * height <= largest)
            return shift, mu_from_shift(shift)
        case SqrtTokens(base, scale, offset, of_pixels):
            shift = scale * math.sqrt((width * height if of_pixels else tokens) / base) + offset
            return shift, mu_from_shift(shift)
        case MuLineRule(line):
            mu = mu_from_image_tokens(tokens, line)
            return shift_from_mu(mu), mu
        case EmpiricalMu():
            mu = empirical_mu(tokens, require_steps(steps))
            return shift_from_mu(mu), mu
