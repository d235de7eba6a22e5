"""The exact bridge: a network of one noise process, used in the time of another.

Two processes with the same signal-to-noise ratio hold the same sample up to its scale. So a network that was trained on
one of them answers for the other: at the time of equal SNR, with the sample scaled to the size that it knows. For a
network of the variance-preserving kind in flow time t, with s = t/(1 − t):

    row of the noise table   ln s interpolated in the table
    network input            x_t / sqrt(t² + (1 − t)²)
    velocity                 (x_t − D)/t,  D = (x_t − t·eps)/(1 − t) where the network says eps

Nothing is approximated: Euler steps in flow time visit the samples of Euler steps in sigma. Diff2Flow (Schusterbauer et
al. 2025, arXiv:2506.02221) trains through this map. It serves losses, teachers and metrics; for sampling an eps model,
its own sigmas are the better time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .prediction import Prediction, target, to_x0_eps
from .process import Flow, NoiseProcess, as_time, expand


@dataclass(frozen=True)
class Bridge:
    """A network's own process, seen from another one."""

    native: NoiseProcess
    """The process that the network was trained on."""
    path: NoiseProcess = field(default_factory=Flow)
    """The process that asks."""

    @property
    def range(self) -> tuple[float, float]:
        """Times of `path` with an equal in `native`: its ends, as float64. (0.0283, 0.9360) for SDXL in flow time."""
        ends = (self.path.t_from_log_snr(self.native.log_snr(t)) for t in (0.0, 1.0))
        low, high = (float(end) for end in ends)
        return low, high

    def native_time(self, t: Tensor | float) -> Tensor:
        """The time of equal SNR. ValueError outside `range`: there the network knows no noise level."""
        t = as_time(t)
        low, high = self.range
        # Half a float32 step of slack, for ends that went through float32.
        if not bool(((t >= low - 1e-7) & (t <= high + 1e-7)).all()):
            worst = t.reshape(-1)[(t.reshape(-1).double() - 0.5 * (low + high)).abs().argmax()]
            raise ValueError(
                f"t = {float(worst):.6g} has no equal in the network's own noise levels, which reach from "
                f"t = {low:.6g} to {high:.6g}; draw or clamp t to that range"
            )
        return self.native.t_from_log_snr(self.path.log_snr(t))

    def native_sample(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """x_t [B, …] of `path`, scaled to what `native` has at the same SNR."""
        return expand(_size(self.native, self.native_time(t)) / _size(self.path, as_time(t)), x_t) * x_t

    def predict(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        kind: Prediction,
        x_t: Tensor,
        t: Tensor | float,
        dest: Prediction = "velocity",
    ) -> Tensor:
        """What network(sample, time), which predicts `kind` on `native`, says about x_t [B, …]: `dest`, on `path`."""
        native_t, sample = self.native_time(t), self.native_sample(x_t, t)
        x0, eps = to_x0_eps(network(sample, native_t), kind, sample, native_t, self.native)
        return target(dest, x0, eps, t, self.path)


def _size(process: NoiseProcess, t: Tensor) -> Tensor:
    """Root mean square of a sample of unit data: sqrt(alpha² + sigma²)."""
    return torch.sqrt(process.alpha(t) ** 2 + process.sigma(t) ** 2)
