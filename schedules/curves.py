"""Schedules as named series of numbers: what the plots show."""

from typing import Literal, get_args

import torch
from torch import Tensor

from .process import Flow, NoiseProcess


Quantity = Literal["sigma", "t", "log_snr", "step_size"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)


def t_from_sigma(sigmas: Tensor, process: NoiseProcess) -> Tensor:
    """Time of sigmas on the sampler's axis: t itself for flow, sigma/alpha for vp and ve."""
    return sigmas if isinstance(process, Flow) else process.t_from_ratio(sigmas)


def log_snr_from_sigma(sigmas: Tensor, process: NoiseProcess) -> Tensor:
    """ln(alpha²/sigma²) of sigmas on the sampler's axis: −2·logit sigma for flow, −2·ln sigma for vp and ve."""
    return process.log_snr(sigmas) if isinstance(process, Flow) else -2.0 * torch.log(sigmas)


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
