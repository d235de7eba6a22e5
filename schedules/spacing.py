"""Steps to sigmas: which noise levels a sampler visits.

Every spacing is a function (grid, steps) -> float64 [steps + 1], falling from the grid's largest sigma to a final 0.
Register a new one in SPACINGS. Where ComfyUI has a scheduler of the same name the numbers are the same, except that a
step is never dropped: asking for n steps gives n.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .edit import tail_for_denoise
from .shift import require_shift, shift_t
from .validate import require_steps


@dataclass(frozen=True, eq=False)
class NoiseGrid:
    """The noise levels that a model knows."""

    sigmas: Tensor
    """Table [N], ascending, float64."""
    sigma_of_t: Callable[[Tensor], Tensor]
    """Continuous form of the table, any shift included: sigma_of_t(k/N) is sigmas[k − 1], for t in (0, 1]."""


def flow_grid(shift: float = 1.0, rows: int = 1000) -> NoiseGrid:
    """Shifted rectified flow, N = `rows`: sigma = shift_t(t)."""
    require_shift(shift)
    return NoiseGrid(
        shift_t(torch.arange(1, rows + 1, dtype=torch.float64) / rows, shift), lambda t: shift_t(t.double(), shift)
    )


def table_grid(sigmas: Tensor) -> NoiseGrid:
    """Any ascending table of positive sigmas [N]; ln sigma is linear between rows, and constant below the first one."""
    sigmas = sigmas.detach().cpu().double()
    log_sigmas = sigmas.log()
    last = len(sigmas) - 1

    def sigma_of_t(t: Tensor) -> Tensor:
        row = (t.double() * len(sigmas) - 1.0).clamp(0, last)
        low = row.floor().long().clamp(max=max(last - 1, 0))
        return torch.lerp(log_sigmas[low], log_sigmas[(low + 1).clamp(max=last)], row - low).exp()

    return NoiseGrid(sigmas, sigma_of_t)


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def trailing(grid: NoiseGrid, steps: int) -> Tensor:
    """Equal steps in t from 1: t = 1 − i/steps (Lin et al. 2023, arXiv:2305.08891, Table 2, not rounded to rows)."""
    return _with_zero(grid.sigma_of_t(1.0 - torch.arange(steps, dtype=torch.float64) / steps))


def simple(grid: NoiseGrid, steps: int) -> Tensor:
    """`trailing` rounded up to rows of the table, as ComfyUI's "simple"."""
    stride = len(grid.sigmas) / steps
    rows = [-(1 + int(i * stride)) for i in range(steps)]
    return _with_zero(grid.sigmas[rows])


def karras(grid: NoiseGrid, steps: int, rho: float = 7.0) -> Tensor:
    """sigma^(1/rho) linear between the ends (Karras et al. 2022, arXiv:2206.00364, Eq. 5).

    Made for eps and v models: on flow it ignores the shift and spends about half of the steps below sigma 0.1.
    """
    high, low = float(grid.sigmas[-1]) ** (1.0 / rho), float(grid.sigmas[0]) ** (1.0 / rho)
    return _with_zero(torch.linspace(high, low, steps, dtype=torch.float64) ** rho)


def exponential(grid: NoiseGrid, steps: int) -> Tensor:
    """ln sigma linear between the ends: equal steps in log-SNR for eps and v models; for flow no better than karras."""
    high, low = math.log(float(grid.sigmas[-1])), math.log(float(grid.sigmas[0]))
    return _with_zero(torch.linspace(high, low, steps, dtype=torch.float64).exp())


def beta(grid: NoiseGrid, steps: int, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Rows at quantiles of Beta(a, b): dense at both ends (Lee et al. 2024, arXiv:2407.12173).

    Rounded to rows as in ComfyUI's "beta" while the rows differ; where rounding would merge two steps the quantiles are
    used as they are, instead of dropping one.
    """
    from scipy.stats import beta as beta_distribution

    last = len(grid.sigmas) - 1
    quantiles = 1.0 - torch.arange(steps, dtype=torch.float64) / steps
    positions = torch.as_tensor(beta_distribution.ppf(quantiles.numpy(), a, b), dtype=torch.float64) * last
    rows = positions.round()
    if len(rows.unique()) == steps:
        return _with_zero(grid.sigmas[rows.long()])
    return _with_zero(grid.sigma_of_t((positions + 1.0) / (last + 1.0)))


def linear(grid: NoiseGrid, steps: int) -> Tensor:
    """Equal steps in sigma from the largest to 0, whatever the shift."""
    return torch.linspace(float(grid.sigmas[-1]), 0.0, steps + 1, dtype=torch.float64)


SPACINGS: dict[str, Callable[[NoiseGrid, int], Tensor]] = {
    "trailing": trailing,
    "simple": simple,
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
    "linear": linear,
}


def schedule(grid: NoiseGrid, spacing: str, steps: int, denoise: float = 1.0) -> Tensor:
    """Sigmas of exactly `steps` steps, float64 [steps + 1], strictly falling to 0.

    `denoise` in (0, 1]: below 1 these are the last steps of a schedule of int(steps/denoise) steps, as in ComfyUI.
    Raises ValueError for anything else, and where the grid has too few levels for that many steps.
    """
    require_steps(steps)
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing[:40]!r}; use one of {', '.join(SPACINGS)}")
    if not 0.0 < denoise <= 1.0:
        raise ValueError(
            f"denoise must be above 0 and at most 1, got {denoise}; 1 starts from pure noise, 0 would change nothing"
        )
    total = int(steps / denoise)
    if total > 1_000_000:
        raise ValueError(
            f"{steps} steps at denoise {denoise} are the end of a schedule of {total} steps; raise denoise"
        )
    sigmas = tail_for_denoise(SPACINGS[spacing](grid, total), steps)
    if not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError(
            f"{spacing} cannot place {total} different noise levels on this model's {len(grid.sigmas)} rows; "
            "use fewer steps or another spacing"
        )
    return sigmas
