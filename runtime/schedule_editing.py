"""What the editing nodes do with SIGMAS: check, edit in float64, and hand on float32 as samplers take it."""

from collections.abc import Mapping
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ..schedules import edit
from ..schedules.curves import PROCESS_CHOICES as PROCESS_CHOICES
from ..schedules.curves import process_for, sigma_from_log_snr
from ..schedules.edit import EDIT_AXES as EDIT_AXES
from ..schedules.edit import OPERATIONS as OPERATIONS
from ..schedules.process import NoiseProcess
from ..schedules.text import LAYOUTS as LAYOUTS
from ..schedules.text import format_sigmas, parse_sigmas
from ..schedules.validate import MAX_STEPS as MAX_STEPS
from ..schedules.validate import require_choice, require_sigmas
from .model_sampling import read_sampling
from .schedules import to_sigmas


SPLIT_BY = ("step", "sigma", "percent", "log_snr")


def edit_schedule(
    sigmas: torch.Tensor,
    operation: str,
    steps: int,
    axis: edit.EditAxis,
    value: float,
    low: float,
    high: float,
    keep_ends: bool,
    process: str,
    model: ModelPatcher | None = None,
) -> torch.Tensor:
    """SIGMAS after one of OPERATIONS. A model decides the process and limits the first level to what it knows."""
    if operation == "flip" and _is_rising(sigmas):
        return to_sigmas(require_sigmas(sigmas.flip(0)), operation)
    sigmas = require_sigmas(sigmas)
    noise = _process(sigmas, process, model)
    options = {"steps": steps, "axis": axis, "value": value, "low": low, "high": high, "keep_ends": keep_ends}
    result = edit.edit(sigmas, operation, noise, **options)
    if model is not None:
        _require_known(float(result.max()), model, operation)
    return to_sigmas(result, operation)


def join_schedules(schedules: Mapping[str, Any]) -> torch.Tensor:
    """ "sigmas_1", "sigmas_2", … one after the other; those that are None are left out."""
    given = {name: require_sigmas(sigmas, name) for name, sigmas in schedules.items() if sigmas is not None}
    if len(given) < 2:
        raise ValueError(f"joining needs at least two schedules, got {', '.join(given) or 'none'}; connect sigmas_2")
    return to_sigmas(edit.join(list(given.values()), list(given)), "the joined schedule")


def split_schedule(
    sigmas: torch.Tensor,
    by: str,
    step: int,
    sigma: float,
    percent: float,
    log_snr: float,
    exact: bool,
    process: str,
    model: ModelPatcher | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(high, low) SIGMAS that share the level between them.

    `percent` is ComfyUI's sampling progress of the model (0 noise, 1 image) where there is a model, else the fraction
    of the steps.
    """
    require_choice("by", by, SPLIT_BY)
    sigmas = require_sigmas(sigmas)
    if by == "percent" and not 0.0 <= percent <= 1.0:
        raise ValueError(f"percent must be 0 to 1, got {percent}; 0.5 is half way")
    if by == "step" or (by == "percent" and model is None):
        parts = edit.split(sigmas, step if by == "step" else int(percent * (len(sigmas) - 1) + 0.5))
    else:
        if by == "percent":
            sigma = float(read_sampling(model).host.percent_to_sigma(percent))
        elif by == "log_snr":
            level = torch.tensor(log_snr, dtype=torch.float64)
            sigma = float(sigma_from_log_snr(level, _process(sigmas, process, model)))
        parts = edit.split_at_level(sigmas, sigma, exact)
    return to_sigmas(parts[0], "the high part"), to_sigmas(parts[1], "the low part")


def schedule_from_text(text: str) -> torch.Tensor:
    """SIGMAS from a list of numbers."""
    return to_sigmas(parse_sigmas(text), "the text")


def schedule_to_text(sigmas: torch.Tensor, layout: str) -> str:
    """SIGMAS as text that `schedule_from_text` reads back exactly. Rising lists are shown, too."""
    if _is_rising(sigmas):
        return format_sigmas(require_sigmas(sigmas.flip(0)).flip(0), layout)
    return format_sigmas(require_sigmas(sigmas, strict=False), layout)


def _is_rising(sigmas: Any) -> bool:
    """Whether this is a list of two or more noise levels from data to noise, as FlipSigmas makes them."""
    return isinstance(sigmas, torch.Tensor) and sigmas.ndim == 1 and len(sigmas) > 1 and bool((sigmas.diff() > 0).all())


def _process(sigmas: torch.Tensor, process: str, model: ModelPatcher | None) -> NoiseProcess:
    require_choice("process", process, PROCESS_CHOICES)
    return process_for(sigmas, process) if model is None else read_sampling(model).process


def _require_known(highest: float, model: ModelPatcher, operation: str) -> None:
    sigma_max = float(read_sampling(model).host.sigma_max)
    if highest > sigma_max * (1.0 + edit.SAME_LEVEL):
        raise ValueError(
            f"{operation} leads to sigma {highest:g}, above the model's largest {sigma_max:g}; use a smaller value, "
            "keep_ends, or disconnect the model"
        )
