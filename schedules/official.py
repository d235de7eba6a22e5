"""The noise levels that a family's published pipeline visits, in the order its scheduler applies things.

Place the steps in t, shift, stretch to the terminal, re-space between the ends, append 0: the order of diffusers'
FlowMatchEulerDiscrete. tests/golden/make_diffusers_fixtures.py records what diffusers gives; the numbers are equal.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .edit import tail_for_denoise
from .families import official_shift
from .family import Family, Karras, Leading, LinearQuadratic, LogitNormal, Rows, ShiftedTwice, Trailing
from .process import VP
from .ramps import beta_quantiles, exponential_ramp, karras_ramp, trailing_t
from .shift import shift_t, stretch_terminal
from .spacing import flow_grid, leading, linear_quadratic, table_grid
from .validate import require_choice, require_denoise, require_sigmas, require_steps


def shifted_twice(steps: int, shift: float) -> Tensor:
    """As diffusers without explicit sigmas: from 1 to shift(1/1000), both included, shifted once more."""
    return shift_t(torch.linspace(1.0, shift_t(0.001, shift), steps, dtype=torch.float64), shift)


def row_t(steps: int, with_end: bool) -> Tensor:
    """Whole thousandths from 1 down to 1/1000 as NumPy counts them: start + i·step, then rounded down."""
    intervals = max(steps - 1, 1) if with_end else steps
    return (1000.0 + torch.arange(steps, dtype=torch.float64) * (-999.0 / intervals)).floor() / 1000.0


def logit_normal_sigmas(steps: int, mu: float, rule: LogitNormal) -> Tensor:
    """sigmoid(mu + std·probit(u)) for u = 1 … 1/steps, kept inside the rule's range of log-SNR (which is −2·logit)."""
    logit = mu + rule.std * torch.special.ndtri(trailing_t(steps))
    return torch.sigmoid(logit.clamp(-0.5 * rule.log_snr_max, -0.5 * rule.log_snr_min))


def beta_sigmas(high: float, low: float, steps: int) -> Tensor:
    """Quantiles of Beta(0.6, 0.6) between `low` and `high` (Lee et al. 2024, arXiv:2407.12173)."""
    return low + beta_quantiles(1.0 - torch.linspace(0.0, 1.0, steps, dtype=torch.float64)) * (high - low)


def leading_sigmas(steps: int) -> Tensor:
    """Rows (0 … steps − 1)·(1000 // steps) + 1 of Stable Diffusion's table, noisiest first, as SDXL's scheduler."""
    if steps > 999:
        raise ValueError(f"the table has 1000 rows, so at most 999 steps can lead; got {steps}. Use fewer steps")
    rows = torch.arange(1000, dtype=torch.float64) / 999
    return leading(table_grid(VP.from_betas().ratio(rows)), steps)[:-1]


RESPACINGS: dict[str, Callable[[float, float, int], Tensor] | None] = {
    "as published": None,
    "karras": karras_ramp,
    "exponential": exponential_ramp,
    "beta": beta_sigmas,
}


def placed_sigmas(family: Family, shift: float, mu: float, steps: int, shift_once: bool) -> Tensor:
    """The family's noise levels before terminal, re-spacing and the final 0: float64 [steps]."""
    match family.placement:
        case ShiftedTwice() if not shift_once:
            return shifted_twice(steps, shift)
        case Trailing() | ShiftedTwice():
            return shift_t(trailing_t(steps), shift)
        case Rows(with_end):
            return shift_t(row_t(steps, with_end), shift)
        case LogitNormal() as rule:
            return logit_normal_sigmas(steps, mu, rule)
        case LinearQuadratic(threshold):
            return linear_quadratic(flow_grid(), steps, threshold)[:-1]
        case Karras(high, low):
            return karras_ramp(high, low, steps)
        case Leading():
            return leading_sigmas(steps)
    raise ValueError(
        f"no published schedule of {family.title} ({family.key}) can be given here. Load the model and use Schedule "
        "(Tidetable_Schedule) with it instead"
    )


def official_sigmas(
    family: Family,
    steps: int,
    width: int,
    height: int,
    length: int = 1,
    denoise: float = 1.0,
    shift_once: bool = False,
    respacing: str = "as published",
) -> Tensor:
    """Sigmas of the family's published pipeline on ComfyUI's axis: float64 [steps + 1], strictly falling to 0.

    `shift_once` replaces `ShiftedTwice` by `Trailing`. `denoise` below 1 gives the last steps of a longer schedule.
    Raises ValueError for what is out of range, and where the family has no published schedule.
    """
    require_steps(steps)
    require_denoise(denoise)
    require_choice("re-spacing", respacing, tuple(RESPACINGS))
    total = require_steps(int(steps / denoise))
    shift, mu = (1.0, 0.0) if family.rule is None else official_shift(family, width, height, length, total)
    sigmas = placed_sigmas(family, shift, mu, total, shift_once)
    if family.terminal is not None and total > 1:  # one step starts at 1, which no stretch can move
        sigmas = stretch_terminal(sigmas, family.terminal)
    if (respace := RESPACINGS[respacing]) is not None:
        sigmas = respace(float(sigmas[0]), float(sigmas[-1]), total)
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    return require_sigmas(tail_for_denoise(sigmas, steps), f"the schedule of {family.title} with {total} steps")
