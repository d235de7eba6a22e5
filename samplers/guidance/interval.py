"""When guidance acts: a part of the denoising, told in ComfyUI's percent."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """Denoising from `start_percent` to `end_percent`, both within [0, 1] and included; 0 is pure noise, 1 the picture.

    As everywhere in ComfyUI these are fractions (not percent) of the model's own timesteps, not of the sampler's steps.
    ValueError for numbers outside [0, 1] and for an empty interval.
    """

    start_percent: float = 0.0
    end_percent: float = 1.0

    def __post_init__(self):
        for name in ("start_percent", "end_percent"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0.0 <= value <= 1.0):
                raise ValueError(f"{name} must be between 0 (pure noise) and 1 (the finished picture), got {value}")
        if self.start_percent >= self.end_percent:
            raise ValueError(
                f"start_percent {self.start_percent} is not below end_percent {self.end_percent}, so guidance would "
                "never act: swap them, or set the scale to 0 to switch it off"
            )

    def contains(self, sigma: float, percent_to_sigma: Callable[[float], float]) -> bool:
        """Whether noise level `sigma` lies inside, given the model's (decreasing) map from percent to sigma."""
        return percent_to_sigma(self.end_percent) <= sigma <= percent_to_sigma(self.start_percent)
