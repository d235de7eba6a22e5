"""The ways to say how much a flow model's time is shifted, as one choice of numbers."""

import math
from dataclasses import dataclass, replace

from .families import official_shift
from .family import GENERIC, Family
from .shift import FLUX_LINE, MuLine, log_area_mu, mu_from_image_tokens, mu_from_shift, require_shift, shift_from_mu
from .validate import require_choice


SHIFT_MODES = ("official", "shift", "mu", "line", "sqrt area", "log area")
MAX_SHIFT = 1e6
"""Beyond it, and below its inverse, a table in float32 has next to no noise levels left between 0 and 1."""


@dataclass(frozen=True)
class ShiftChoice:
    """A mode and every number that some mode reads."""

    mode: str = "official"
    shift: float = 3.0
    mu: float = 1.15
    width: int = 1024
    """Pixels."""
    height: int = 1024
    length: int = 1
    """Frames."""
    steps: int = 20
    """Only FLUX.2's official rule reads it."""
    line: MuLine = FLUX_LINE
    base_size: int = 1024
    """Edge in pixels of the square picture at which the area modes give shift 1."""

    def resized(self, width: int, height: int, length: int) -> "ShiftChoice":
        return replace(self, width=width, height=height, length=length)


def chosen_shift(choice: ShiftChoice, family: Family = GENERIC) -> tuple[float, float]:
    """(shift, mu) of a choice, if a model can use it. ValueError for an unknown mode and for numbers out of range."""
    require_choice("mode", choice.mode, SHIFT_MODES)
    shift, mu = _unchecked_shift(choice, family)
    if not 1.0 / MAX_SHIFT <= shift <= MAX_SHIFT:
        size = f"{choice.width}×{choice.height}, {choice.length} frame(s)"
        origin = f"mode {choice.mode}" if choice.mode in ("shift", "mu") else f"mode {choice.mode} at {size}"
        raise ValueError(
            f"shift must be {1.0 / MAX_SHIFT:g} to {MAX_SHIFT:g}, got {shift:g} from {origin}: all noise levels would "
            "be the same. Use mode shift with 1 to 16, as official values are"
        )
    return shift, mu


def _unchecked_shift(choice: ShiftChoice, family: Family) -> tuple[float, float]:
    """(shift, mu) of a choice. `family` says how large a token is; mode "official" needs one that has a rule."""
    c = choice
    match c.mode:
        case "shift":
            return c.shift, mu_from_shift(require_shift(c.shift))
        case "mu":
            return shift_from_mu(c.mu), c.mu
        case "line":
            if c.line.x1 == c.line.x2:
                raise ValueError(f"a line needs two different points, but x1 and x2 are both {c.line.x1:g} tokens")
            mu = mu_from_image_tokens(family.tokens(c.width, c.height, c.length), c.line)
        case "sqrt area":
            tokens = family.tokens(c.width, c.height, c.length)
            mu = 0.5 * math.log(tokens / (_base(c) / family.pixels_per_token) ** 2)
        case "log area":
            mu = log_area_mu(c.width, c.height, _base(c) ** 2)
        case _:
            return official_shift(family, c.width, c.height, c.length, c.steps)
    return shift_from_mu(mu), mu


def _base(choice: ShiftChoice) -> int:
    if choice.base_size <= 0:
        raise ValueError(f"base_size must be above 0 pixels, got {choice.base_size}; 256, 512 and 1024 are usual")
    return choice.base_size
