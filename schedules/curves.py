"""Schedules as named series of numbers: what the plots show."""

from typing import Literal, get_args

import torch
from torch import Tensor

from .process import VP, Flow, NoiseProcess
from .shift import unshift_t


Quantity = Literal["sigma", "t", "log_snr", "step_size"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)


XAxis = Literal["step", "t", "percent", "log_snr"]
X_AXES: tuple[XAxis, ...] = get_args(XAxis)
ProcessChoice = Literal["auto", "flow", "vp"]
PROCESS_CHOICES: tuple[ProcessChoice, ...] = get_args(ProcessChoice)


def process_for(sigmas: Tensor, process: str) -> NoiseProcess:
    """The process that sigmas [N] belong to, where no model says: "auto" is flow where none exceeds 1, else vp.

    "vp" is Stable Diffusion's table, with zero terminal SNR where the sigmas go beyond it.
    """
    highest = float(sigmas.max())
    if process == "flow" and highest > 1.0 + 1e-6:
        raise ValueError(f"sigma {highest:g} is no flow noise level, which are 0 to 1; use process vp or auto")
    if process == "flow" or (process == "auto" and highest <= 1.0 + 1e-6):
        return Flow()
    table = VP.from_betas()
    return table if highest <= float(table.ratio(1.0)) * 1.001 else table.zero_terminal()


def t_from_sigma(sigmas: Tensor, process: NoiseProcess) -> Tensor:
    """Time of sigmas on the sampler's axis: t itself for flow, sigma/alpha for vp and ve."""
    return sigmas if isinstance(process, Flow) else process.t_from_ratio(sigmas)


def log_snr_from_sigma(sigmas: Tensor, process: NoiseProcess) -> Tensor:
    """ln(alpha²/sigma²) of sigmas on the sampler's axis: −2·logit sigma for flow, −2·ln sigma for vp and ve."""
    return process.log_snr(sigmas) if isinstance(process, Flow) else -2.0 * torch.log(sigmas)


def sigma_from_t(t: Tensor, process: NoiseProcess) -> Tensor:
    """Inverse of `t_from_sigma`."""
    return t if isinstance(process, Flow) else process.ratio(t)


def sigma_from_log_snr(log_snr: Tensor, process: NoiseProcess) -> Tensor:
    """Inverse of `log_snr_from_sigma`."""
    return process.t_from_log_snr(log_snr) if isinstance(process, Flow) else torch.exp(-0.5 * log_snr)


def series(sigmas: Tensor, quantity: Quantity, process: NoiseProcess) -> list[float]:
    """One number per noise level ("sigma", "t", "log_snr": [steps + 1]) or per step ("step_size": [steps]).

    step_size is how far sigma falls; log_snr is +inf where sigma is 0 and −inf where the signal is gone.
    """
    match quantity:
        case "sigma":
            values = sigmas
        case "t":
            values = t_from_sigma(sigmas, process)
        case "log_snr":
            values = log_snr_from_sigma(sigmas, process)
        case "step_size":
            values = sigmas[:-1] - sigmas[1:]
        case _:
            raise ValueError(f"unknown quantity {quantity!r}; use one of {', '.join(QUANTITIES)}")
    return values.tolist()


def positions(sigmas: Tensor, axis: XAxis, process: NoiseProcess, model_shift: float | None = None) -> list[float]:
    """Where each noise level [steps + 1] stands on an x axis.

    percent runs from 0 (noise) to 1 (image): with the shift of a model (1 where it has none) it is ComfyUI's sampling
    progress of that model, with None the fraction of the steps.
    """
    steps = torch.arange(len(sigmas), dtype=torch.float64)
    match axis:
        case "step":
            return steps.tolist()
        case "percent":
            if model_shift is None:
                return (steps / (len(sigmas) - 1)).tolist()
            t = t_from_sigma(sigmas, process)
            return (1.0 - (unshift_t(t, model_shift) if isinstance(process, Flow) else t)).tolist()
        case "t" | "log_snr":
            return series(sigmas, axis, process)
    raise ValueError(f"unknown x axis {axis!r}; use one of {', '.join(X_AXES)}")
