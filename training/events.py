"""What the engine yields.

Progress bars, previews, files and cancelling are consumers of these, not part of the loop.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step. `loss` is the mean over the batch, `grad_norm` before clipping."""

    step: int
    """1-based."""
    steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    skipped: bool
    """True where loss or gradient was not finite and the weights were left alone."""


@dataclass(frozen=True, slots=True)
class Validated:
    """Held-out loss at fixed (t, noise), after `step` steps; `by_t` pairs each t with its mean loss."""

    step: int
    loss: float
    by_t: tuple[tuple[float, float], ...]


Event = StepDone | Validated
