"""Lists of sigmas from lists of sigmas. All are float64 [steps + 1] and fall (`validate.require_sigmas`)."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from .curves import log_snr_from_sigma, sigma_from_log_snr, sigma_from_t, t_from_sigma
from .process import Flow, NoiseProcess
from .shift import require_shift, shift_t
from .validate import require_choice, require_sigmas, require_steps


EditAxis = Literal["log_snr", "sigma", "t"]
EDIT_AXES: tuple[EditAxis, ...] = get_args(EditAxis)
FLIPPED_ZERO = 1e-4
"""What a final 0 becomes at the start of a flipped schedule, as in ComfyUI's FlipSigmas: a step divides by it."""
SAME_LEVEL = 1e-6
"""Levels that differ by less than this, relatively, are one level: float32 has about 1e-7."""


def tail_for_denoise(sigmas: Tensor, steps: int) -> Tensor:
    """The last `steps` steps of a longer schedule: sigmas [n + 1] -> [steps + 1], for n >= steps.

    A denoise of d over s steps is the tail of a schedule of s/d steps, as in ComfyUI's BasicScheduler.
    """
    if not 1 <= steps < len(sigmas):
        raise ValueError(f"cannot take {steps} steps from a schedule that has {len(sigmas) - 1}")
    return sigmas[-(steps + 1) :]


def resample(sigmas: Tensor, steps: int, axis: EditAxis, process: NoiseProcess) -> Tensor:
    """The same curve in another number of steps: linear in `axis` over the step number; n to n is the identity.

    Where one end of a step has no finite place on the axis (log-SNR of 0, of a flow's pure noise, t outside a table),
    that step is cut in sigma.
    """
    require_steps(steps)
    require_choice("axis", axis, EDIT_AXES)
    last = len(sigmas) - 1
    position = torch.arange(steps + 1, dtype=torch.float64) * last / steps
    low = position.floor().long().clamp(max=last - 1)
    weight = position - low
    here, there = sigmas[low], sigmas[low + 1]
    cut = torch.lerp(here, there, weight)
    if axis == "sigma":
        return cut
    to_axis, from_axis = _AXES[axis]
    ends = to_axis(here, process), to_axis(there, process)
    placed = from_axis(torch.lerp(*ends, weight), process)
    has_place = torch.ones_like(weight, dtype=torch.bool)
    for level, end in zip((here, there), ends, strict=True):
        has_place &= torch.isfinite(end) & torch.isclose(from_axis(end, process), level, rtol=1e-9, atol=0.0)
    return torch.where(has_place & (weight > 0.0) & (weight < 1.0), placed, cut)


_AXES = {"log_snr": (log_snr_from_sigma, sigma_from_log_snr), "t": (t_from_sigma, sigma_from_t)}


def drag(sigmas: Tensor, shift: float, process: NoiseProcess, keep_ends: bool = True) -> Tensor:
    """Move every level by −2·ln(shift) in log-SNR: `shift_t` for flow, times shift for others.

    `keep_ends` leaves the first and the last level where they are (0 and a flow's 1 never move).
    """
    require_shift(shift)
    moved = shift_t(sigmas, shift) if isinstance(process, Flow) else sigmas * shift
    return _with_ends(moved, sigmas) if keep_ends else moved


def multiply(sigmas: Tensor, factor: float, keep_ends: bool = True) -> Tensor:
    """Every sigma times `factor`, which is finite and above 0."""
    if not (math.isfinite(factor) and factor > 0.0):
        raise ValueError(f"the factor must be a finite number above 0, got {factor}; 1 changes nothing")
    return _with_ends(sigmas * factor, sigmas) if keep_ends else sigmas * factor


def replace_end(sigmas: Tensor, sigma: float, first: bool) -> Tensor:
    """Another first or last level."""
    changed = sigmas.clone()
    changed[0 if first else -1] = sigma
    return changed


def clip(sigmas: Tensor, low: float, high: float) -> Tensor:
    """The part between two levels, which become the ends where the schedule went beyond them. `high` 0 is no limit."""
    high = high or math.inf
    if not 0.0 <= low < high:
        raise ValueError(f"clip needs 0 <= low < high, got low {low:g} and high {high:g}; high 0 is no limit")
    if not (low < float(sigmas[0]) and float(sigmas[-1]) < high):
        raise ValueError(
            f"nothing is left between {low:g} and {high:g}: the schedule runs from {float(sigmas[0]):g} to "
            f"{float(sigmas[-1]):g}"
        )
    return torch.unique_consecutive(sigmas.clamp(low, high))


def insert(sigmas: Tensor, sigma: float) -> Tensor:
    """One more level, between the first and the last."""
    at = int((sigmas > sigma).sum())
    if not 0 < at < len(sigmas) or _same(float(sigmas[at]), sigma) or _same(float(sigmas[at - 1]), sigma):
        raise ValueError(
            f"cannot insert sigma {sigma:g}: it must lie between the first level {float(sigmas[0]):g} and the last "
            f"{float(sigmas[-1]):g}, and not be one of the levels already"
        )
    return torch.cat([sigmas[:at], sigmas.new_tensor([sigma]), sigmas[at:]])


def flip(sigmas: Tensor) -> Tensor:
    """The schedule backwards, for unsampling: rising. A 0 at its start becomes FLIPPED_ZERO."""
    flipped = sigmas.flip(0)
    if float(flipped[0]) == 0.0:
        flipped[0] = min(FLIPPED_ZERO, 0.5 * float(flipped[1]))
    return flipped


def join(schedules: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """One schedule after the other. An end that is the next one's start is written once; a gap becomes a step."""
    joined = schedules[0]
    for (before, after), following in zip(pairwise(names), schedules[1:], strict=True):
        end, start = float(joined[-1]), float(following[0])
        if _same(end, start):
            following = following[1:]
        elif start > end:
            raise ValueError(
                f"{after} starts at sigma {start:g}, above {end:g} where {before} ends: noise would have to be added "
                "in between. Connect them in the other order, or cut the first one with Split Schedule"
            )
        joined = torch.cat([joined, following])
    return joined


def split(sigmas: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """The first `step` steps and the rest; both have the level between them."""
    last = len(sigmas) - 1
    if not 1 <= step < last:
        raise ValueError(
            f"splitting at step {step} leaves one part of the {last} step(s) empty; "
            + (f"split at step 1 to {last - 1}" if last > 1 else "a schedule of one step cannot be split")
        )
    return sigmas[: step + 1], sigmas[step:]


def split_at_level(sigmas: Tensor, sigma: float, exact: bool) -> tuple[Tensor, Tensor]:
    """Split at a noise level: where the schedule first is at it or below, or, with `exact`, at a level inserted there.

    Raises ValueError where one part would be empty.
    """
    at = int((sigmas > sigma * (1.0 + SAME_LEVEL)).sum())
    inside = 0 < at < len(sigmas)
    if inside and exact and not _same(float(sigmas[at]), sigma):
        return split(insert(sigmas, sigma), at)
    if not 1 <= at < len(sigmas) - 1:
        raise ValueError(
            f"splitting at sigma {sigma:g} leaves one part empty: the schedule runs from {float(sigmas[0]):g} over "
            f"{float(sigmas[1]):g} … {float(sigmas[-2]):g} to {float(sigmas[-1]):g}"
        )
    return split(sigmas, at)


OPERATIONS = ("resample", "shift", "multiply", "set_first", "set_last", "clip", "insert", "flip")


def edit(
    sigmas: Tensor,
    operation: str,
    process: NoiseProcess,
    *,
    steps: int = 20,
    axis: EditAxis = "log_snr",
    value: float = 1.0,
    low: float = 0.0,
    high: float = 0.0,
    keep_ends: bool = True,
) -> Tensor:
    """One of OPERATIONS by name. The result falls, but that of "flip"; ValueError where it would not."""
    require_choice("operation", operation, OPERATIONS)
    match operation:
        case "resample":
            result = resample(sigmas, steps, axis, process)
        case "shift":
            result = drag(sigmas, value, process, keep_ends)
        case "multiply":
            result = multiply(sigmas, value, keep_ends)
        case "set_first" | "set_last":
            result = replace_end(sigmas, value, operation == "set_first")
        case "clip":
            result = clip(sigmas, low, high)
        case "insert":
            result = insert(sigmas, value)
        case _:
            return flip(sigmas)
    result = require_sigmas(result, f"{operation}'s result")
    if isinstance(process, Flow) and float(result[0]) > 1.0 + SAME_LEVEL:
        raise ValueError(
            f"{operation} leads to sigma {float(result[0]):g}, but a flow model's pure noise is 1; use a smaller "
            "value, or process vp if this is the end of an eps or v schedule"
        )
    return result


def _with_ends(changed: Tensor, sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas[:1], changed[1:-1], sigmas[-1:]])


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=SAME_LEVEL)
