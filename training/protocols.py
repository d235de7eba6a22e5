"""What the engine needs of a model. `runtime/trainable.py` implements it for ComfyUI's; a test does in five lines."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from ..schedules.prediction import Prediction
from ..schedules.process import NoiseProcess


Condition = Any
"""One sample's conditioning; opaque to the engine, which only carries it from the data set to `predict`."""


class TrainableDenoiser(Protocol):
    """A network with the process and the prediction type that its own inference uses."""

    process: NoiseProcess
    prediction: Prediction
    shift: float
    """The multiplicative shift of the model's own inference on flow processes; 1 elsewhere."""

    def snap(self, t: Tensor) -> Tensor:
        """The nearest noise level [B] that the network was conditioned on in its own training."""
        ...

    def predict(self, x_t: Tensor, t: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Native prediction for x_t [B, C, ...] of `process` at t [B]; one condition a row, one row a sample."""
        ...

    def gradient_context(self) -> AbstractContextManager:
        """Entered around one forward and backward pass."""
        ...
