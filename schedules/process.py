"""Noise processes: the pair (alpha_t, sigma_t) of x_t = alpha_t·x0 + sigma_t·eps, and its inverses.

Time `t` is the noise fraction: 0 is data, 1 is noise. `t` has shape () or [B] and any floating dtype (a Python number
counts as float64); coefficients come back in that shape and dtype. Only `expand` broadcasts them against x, and only on
the batch dimension.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .ztsnr import TERMINAL_ALPHA_BAR, rescale_zero_terminal_snr


ProcessName = Literal["flow", "vp", "ve"]
BetaKind = Literal["scaled_linear", "linear"]


def as_time(t: Tensor | float) -> Tensor:
    """`t` as a floating tensor: tensors keep their dtype, Python numbers and integer tensors become float64."""
    return t if isinstance(t, Tensor) and t.is_floating_point() else torch.as_tensor(t, dtype=torch.float64)


def expand(t: Tensor | float, x: Tensor) -> Tensor:
    """Reshape per-sample numbers of shape () or [B] to [1 or B, 1, …] so that they multiply x [B, …] sample by sample.

    The dtype becomes x's, but never less than float32: a half-precision 1 − sigma cannot tell small sigmas from 0.
    Raises ValueError for any other shape: a width that happens to equal B must never be mistaken for the batch.
    """
    t = as_time(t)
    if t.ndim > 1 or (t.ndim == 1 and t.shape[0] != x.shape[0]):
        raise ValueError(
            f"per-sample values must have shape () or [{x.shape[0]}] for x of shape {list(x.shape)}, "
            f"not {list(t.shape)}"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    return t.to(dtype).to(x.device).reshape(-1, *[1] * (x.ndim - 1))


class NoiseProcess(ABC):
    """What noise does to data over time. Subclasses are frozen values: compare and hash them freely."""

    name: ClassVar[ProcessName]

    @abstractmethod
    def alpha(self, t: Tensor | float) -> Tensor:
        """Signal coefficient at t."""

    @abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor:
        """Noise coefficient at t."""

    @abstractmethod
    def log_snr(self, t: Tensor | float) -> Tensor:
        """ln(alpha²/sigma²) at t, decreasing; may be ±inf at the ends."""

    @abstractmethod
    def t_from_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """Inverse of `log_snr`."""

    def ratio(self, t: Tensor | float) -> Tensor:
        """sigma/alpha: the noise level where the signal keeps its scale, ComfyUI's sigma for eps and v models."""
        return torch.exp(-0.5 * self.log_snr(t))

    def t_from_ratio(self, ratio: Tensor | float) -> Tensor:
        """Inverse of `ratio`; 0 and inf are legal."""
        return self.t_from_log_snr(-2.0 * torch.log(as_time(ratio)))

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """x_t = alpha·x0 + sigma·eps for x0, eps of shape [B, …]."""
        if x0.shape != eps.shape:
            raise ValueError(
                f"x0 has shape {list(x0.shape)} but the noise has shape {list(eps.shape)}; they must be equal"
            )
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), eps) * eps


@dataclass(frozen=True)
class Flow(NoiseProcess):
    """Rectified flow: alpha = 1 − t, sigma = t (Liu et al. 2022, arXiv:2209.03003)."""

    name: ClassVar[ProcessName] = "flow"

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1.0 - as_time(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_time(t)

    def log_snr(self, t: Tensor | float) -> Tensor:
        return -2.0 * torch.logit(as_time(t))

    def t_from_log_snr(self, log_snr: Tensor | float) -> Tensor:
        return torch.sigmoid(-0.5 * as_time(log_snr))


@dataclass(frozen=True)
class VP(NoiseProcess):
    """Variance preserving with a discrete table, alpha² + sigma² = 1 (Ho et al. 2020, arXiv:2006.11239).

    t is row/(N − 1). Between rows ln(sigma/alpha) is linear in t, as in ComfyUI's ModelSamplingDiscrete; beyond the
    table both directions stay at its ends, also as there. A last alpha_bar of exactly 0 (zero terminal SNR) is honored
    at t = 1, where alpha is 0; inside the last interval the row counts as TERMINAL_ALPHA_BAR, ComfyUI's stand-in.
    """

    alpha_bar: tuple[float, ...]
    """alpha² of each row [N], strictly decreasing from below 1 to 0 or above."""

    name: ClassVar[ProcessName] = "vp"

    def __post_init__(self):
        table = torch.as_tensor(self.alpha_bar, dtype=torch.float64).detach().cpu()
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"alpha_bar must be a list of at least 2 numbers, not of shape {list(table.shape)}")
        if not bool((table[:-1] > table[1:]).all()) or not 0.0 <= float(table[-1]) < float(table[0]) < 1.0:
            raise ValueError(
                "alpha_bar must fall strictly from below 1 to 0 or above; "
                f"got {float(table[0]):g} … {float(table[-1]):g}"
            )
        object.__setattr__(self, "alpha_bar", tuple(table.tolist()))

    @classmethod
    def from_betas(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, num: int = 1000, kind: BetaKind = "scaled_linear"
    ) -> "VP":
        """Table of `num` betas between the ends; the defaults are Stable Diffusion's.

        "scaled_linear" is linear in sqrt(beta) (ComfyUI's "linear"), "linear" is linear in beta (its "sqrt_linear").
        """
        if kind == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, num, dtype=torch.float64) ** 2
        elif kind == "linear":
            betas = torch.linspace(beta_start, beta_end, num, dtype=torch.float64)
        else:
            raise ValueError(f"unknown kind of betas {kind!r}; use 'scaled_linear' or 'linear'")
        return cls(tuple(torch.cumprod(1.0 - betas, dim=0).tolist()))

    @classmethod
    def from_ratios(cls, ratios: Tensor) -> "VP":
        """Table from sigma/alpha per row [N], ascending: ComfyUI's `model_sampling.sigmas` of an eps or v model.

        Equal neighbors become one row: Stable Cascade's table is clamped at both ends.
        """
        ratios = torch.unique_consecutive(ratios.detach().cpu().double())
        return cls(tuple((1.0 / (1.0 + ratios**2)).tolist()))

    def zero_terminal(self) -> "VP":
        """The same table rescaled to zero terminal SNR."""
        return VP(tuple(rescale_zero_terminal_snr(torch.tensor(self.alpha_bar, dtype=torch.float64)).tolist()))

    @cached_property
    def _log_ratios(self) -> Tensor:
        alpha_bar = torch.tensor(self.alpha_bar, dtype=torch.float64).clamp(min=TERMINAL_ALPHA_BAR)
        return -0.5 * torch.logit(alpha_bar)

    def _table(self, like: Tensor) -> Tensor:
        return self._log_ratios.to(like.dtype).to(like.device)

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    def log_snr(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        table = self._table(t)
        last = len(table) - 1
        position = (t * last).clamp(0, last)
        # The integer clamp also keeps nan inside the table; the weight carries it on to the result.
        low = position.floor().long().clamp(0, last - 1)
        log_snr = -2.0 * torch.lerp(table[low], table[low + 1], position - low)
        return torch.where(t >= 1.0, -torch.inf, log_snr) if self.alpha_bar[-1] == 0.0 else log_snr

    def t_from_log_snr(self, log_snr: Tensor | float) -> Tensor:
        log_ratio = -0.5 * as_time(log_snr)
        table = self._table(log_ratio)
        last = len(table) - 1
        log_ratio = log_ratio.clamp(table[0], table[-1])
        low = (torch.searchsorted(table, log_ratio.contiguous(), right=True) - 1).clamp(0, last - 1)
        return (low + (log_ratio - table[low]) / (table[low + 1] - table[low])) / last


@dataclass(frozen=True)
class VE(NoiseProcess):
    """Variance exploding: alpha = 1, ln sigma linear in t (Song et al. 2020, arXiv:2011.13456)."""

    sigma_min: float
    """sigma at t = 0, above 0."""
    sigma_max: float
    """sigma at t = 1, above sigma_min."""

    name: ClassVar[ProcessName] = "ve"

    def __post_init__(self):
        if not 0.0 < self.sigma_min < self.sigma_max < float("inf"):
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    @property
    def _log_ends(self) -> tuple[float, float]:
        ends = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64).log()
        return float(ends[0]), float(ends[1])

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.exp(-0.5 * self.log_snr(t))

    def log_snr(self, t: Tensor | float) -> Tensor:
        low, high = self._log_ends
        return -2.0 * (low + (high - low) * as_time(t))

    def t_from_log_snr(self, log_snr: Tensor | float) -> Tensor:
        low, high = self._log_ends
        return (-0.5 * as_time(log_snr) - low) / (high - low)
