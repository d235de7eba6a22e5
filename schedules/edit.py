"""Lists of sigmas from lists of sigmas."""

from torch import Tensor


def tail_for_denoise(sigmas: Tensor, steps: int) -> Tensor:
    """The last `steps` steps of a longer schedule: sigmas [n + 1] -> [steps + 1], for n >= steps.

    A denoise of d over s steps is the tail of a schedule of s/d steps, as in ComfyUI's BasicScheduler.
    """
    if not 1 <= steps < len(sigmas):
        raise ValueError(f"cannot take {steps} steps from a schedule that has {len(sigmas) - 1}")
    return sigmas[-(steps + 1) :]
