"""When guidance acts, and how strongly: a part of the denoising in ComfyUI's percent, every n-th step, a decay."""

import math
from collections.abc import Callable, Sequence
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


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """The step of a decreasing schedule `sigmas` that an evaluation at noise level `sigma` belongs to.

    That is the last one that starts at `sigma` or above: samplers with several evaluations in a step make them between
    its ends, and one at its lower end counts as the next step's. Above the whole schedule it is the first step.
    """
    starts = [start for start in sigmas[:-1] if start >= sigma * (1.0 - 1e-5)]
    return max(len(starts) - 1, 0)


def decayed(log_snr: float, first: float, last: float, decay: float) -> float:
    """(1 − u)^decay, where u goes from 0 to 1 as `log_snr` goes from `first` to `last`, both finite; 1 for decay 0.

    An interval without length, `first` = `last`, has nothing to fall over: 1.

    In log-SNR a decay means the same for every noise schedule and every timestep convention.
    """
    if first == last:
        return 1.0
    u = (log_snr - first) / (last - first)
    return (1.0 - min(max(u, 0.0), 1.0)) ** decay
