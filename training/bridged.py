"""An eps or v network trained in flow time without a change to what it is told: the exact bridge as a denoiser."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from ..schedules.bridge import Bridge
from ..schedules.prediction import Prediction
from ..schedules.process import VP, NoiseProcess
from .protocols import Condition, TrainableDenoiser


MAX_RATIO = 1000.0
"""Largest noise-to-signal ratio at which an eps network's velocity is worth a loss: its error counts (1 + ratio)²."""


class BridgedDenoiser:
    """`TrainableDenoiser` in flow time over one of a variance-preserving process (see `schedules.bridge`).

    The velocity's error is 1 + sigma times the eps network's own, sigma its noise-to-signal ratio: a weighting of the
    same training. ValueError for networks that are flow already and for eps networks that start in pure noise.
    """

    process: NoiseProcess
    prediction: Prediction = "velocity"
    shift: float = 1.0

    def __init__(self, inner: TrainableDenoiser):
        if not isinstance(inner.process, VP):
            raise ValueError(
                f"flow 'bridge' is for eps and v models with a noise table, and this one is {inner.process.name} "
                "already: choose flow 'off'"
            )
        if inner.prediction == "eps" and float(inner.process.ratio(1.0)) > MAX_RATIO:
            raise ValueError(
                "this eps model's table ends in pure noise, where eps says nothing about the velocity: cap it with Zero"
                " Terminal SNR (Tidetable_ZeroTerminalSNR, sigma_cap 160), or choose flow 'off'"
            )
        self.inner = inner
        self.bridge = Bridge(inner.process)
        self.process = self.bridge.path

    def snap(self, t: Tensor) -> Tensor:
        """The flow time of the network's nearest level; beyond both ends of its table, that of the end."""
        native = self.inner.snap(self.bridge.native_time(t.clamp(*self.bridge.range)))
        return self.process.t_from_log_snr(self.inner.process.log_snr(native))

    def predict(self, x_t: Tensor, t: Tensor, conditions: Sequence[Condition]) -> Tensor:
        def network(sample: Tensor, native_t: Tensor) -> Tensor:
            return self.inner.predict(sample, self.inner.snap(native_t), conditions)

        return self.bridge.predict(network, self.inner.prediction, x_t, t)

    def gradient_context(self) -> AbstractContextManager:
        return self.inner.gradient_context()
