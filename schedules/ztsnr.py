"""Zero terminal SNR: make the last step of a discrete schedule pure noise."""

from torch import Tensor


TERMINAL_ALPHA_BAR = 4.8973451890853435e-08
"""What ComfyUI stores instead of a last alpha_bar of 0, so that sigma/alpha stays finite (4518.76)."""


def rescale_zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) [N] so that the last row is exactly 0 and the first is kept.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv:2305.08891), Algorithm 1.
    Where the paper returns betas this returns alpha_bar, with a true zero: of no use to models that predict noise.
    """
    root = alpha_bar.sqrt()
    return ((root - root[-1]) / (root[0] - root[-1]) * root[0]) ** 2
