"""Zero terminal SNR: make the last step of a discrete schedule pure noise, and what that asks of a schedule."""

import torch
from torch import Tensor


TERMINAL_ALPHA_BAR = 4.8973451890853435e-08
"""What ComfyUI stores instead of a last alpha_bar of 0, so that sigma/alpha stays finite (4518.76)."""
PURE_NOISE_SNR = 1e-6
"""Below this signal-to-noise ratio (sigma/alpha above 1000) a sample counts as pure noise: no eps predictor was ever
trained there, and its error would be multiplied by more than 1000."""


def rescale_zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) [N] so that the last row is exactly 0 and the first is kept.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv:2305.08891), Algorithm 1.
    Where the paper returns betas this returns alpha_bar, with a true zero: of no use to models that predict noise.
    """
    root = alpha_bar.sqrt()
    return ((root - root[-1]) / (root[0] - root[-1]) * root[0]) ** 2


def cap_ratios(ratios: Tensor, cap: float) -> Tensor:
    """The ascending table sigma/alpha [N] cut at `cap`: [M], M <= N, strictly ascending, the last row exactly cap.

    The row nearest to the cap (in log) becomes the cap, and rows above it are dropped. So every other row keeps its
    number, which is the timestep that the network knows it by. A cap at or above the last row changes nothing.
    ValueError where fewer than 2 rows would be left.
    """
    if not cap > float(ratios[1]):
        raise ValueError(
            f"the cap on sigma must be above the second row of the noise table, {float(ratios[1]):.4g}, got {cap}; "
            "160 is usual, 0 is off"
        )
    if cap >= float(ratios[-1]):
        return ratios
    row = int((ratios.double().log() - torch.tensor(cap, dtype=torch.float64).log()).abs().argmin())
    capped = ratios[: row + 1].clone()
    capped[-1] = cap
    return capped


def steps_above(sigmas: Tensor, level: float) -> int:
    """How many of the steps of `sigmas` [steps + 1] start above `level`.

    With zero terminal SNR the range above the old largest sigma is ten percent of the network's timesteps, where little
    more than the brightness is decided: `trailing` spends 3 of 20 steps there, `karras` 13.
    """
    return int((sigmas[:-1] > level * (1.0 + 1e-6)).sum())
