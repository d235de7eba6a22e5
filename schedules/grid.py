"""The noise levels that a model knows, as a table and as a continuous function."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from .process import Flow
from .shift import require_shift, shift_t, unshift_t


@dataclass(frozen=True, eq=False)
class NoiseGrid:
    """The noise levels that a model knows. Here t is the model's own time, before any shift: row k of N is at k/N."""

    sigmas: Tensor
    """Table [N], ascending, float64."""
    sigma_of_t: Callable[[Tensor], Tensor]
    """Continuous form of the table, any shift included: sigma_of_t(k/N) is sigmas[k − 1], for t in (0, 1]."""
    t_of_sigma: Callable[[Tensor], Tensor]
    """Inverse of `sigma_of_t`."""
    is_flow: bool = False
    """Whether sigma is the noise fraction of a flow model (alpha = 1 − sigma), else it is noise over signal."""

    @property
    def sigma_min(self) -> float:
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[-1])

    def log_snr(self, sigmas: Tensor) -> Tensor:
        """ln(signal power / noise power); −inf for a flow's pure noise."""
        return Flow().log_snr(sigmas) if self.is_flow else -2.0 * torch.log(sigmas)

    def sigma_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return Flow().t_from_log_snr(log_snr) if self.is_flow else torch.exp(-0.5 * log_snr)

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """log-SNR of the highest and of the lowest level. Pure noise of a flow counts as the row below it."""
        ends = self.log_snr(self.sigmas[[-2 if self.is_flow and self.sigma_max >= 1.0 else -1, 0]])
        return float(ends[0]), float(ends[1])

    def below(self, t: float) -> "NoiseGrid":
        """The levels from 0 to that of time `t`, as a grid of their own whose time runs to 1 again."""
        if t >= 1.0:
            return self
        rows = max(2, round(len(self.sigmas) * t))
        return NoiseGrid(
            self.sigma_of_t(t * torch.arange(1, rows + 1, dtype=torch.float64) / rows),
            lambda part: self.sigma_of_t(t * part),
            lambda sigmas: self.t_of_sigma(sigmas) / t,
            self.is_flow,
        )


def flow_grid(shift: float = 1.0, rows: int = 1000) -> NoiseGrid:
    """Shifted rectified flow, N = `rows`: sigma = shift_t(t)."""
    require_shift(shift)
    return NoiseGrid(
        shift_t(torch.arange(1, rows + 1, dtype=torch.float64) / rows, shift),
        lambda t: shift_t(t.double(), shift),
        lambda sigmas: unshift_t(sigmas.double(), shift),
        is_flow=True,
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

    def t_of_sigma(levels: Tensor) -> Tensor:
        rows = numpy.interp(levels.double().log().numpy(), log_sigmas.numpy(), numpy.arange(1.0, last + 2.0))
        return torch.as_tensor(rows, dtype=torch.float64) / len(sigmas)

    return NoiseGrid(sigmas, sigma_of_t, t_of_sigma)
