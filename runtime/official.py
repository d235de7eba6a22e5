"""Official schedules as ComfyUI's SIGMAS."""

import torch

from ..schedules.families import FAMILIES, family_named
from ..schedules.official import RESPACINGS, official_sigmas
from ..schedules.validate import MAX_STEPS as MAX_STEPS
from .schedules import to_sigmas


SCHEDULED_FAMILIES = tuple(key for key, family in FAMILIES.items() if family.placement is not None)
RESPACING_NAMES = tuple(RESPACINGS)


def make_official_schedule(
    family: str,
    steps: int,
    width: int,
    height: int,
    length: int,
    denoise: float,
    shift_once: bool,
    respacing: str,
) -> torch.Tensor:
    """SIGMAS of the family's published pipeline: float32 on the CPU, [steps + 1]. ValueError for bad numbers."""
    chosen = family_named(family)
    sigmas = official_sigmas(chosen, steps, width, height, length, denoise, shift_once, respacing)
    return to_sigmas(sigmas, f"the schedule of {chosen.title}")
