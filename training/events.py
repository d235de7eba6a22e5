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
    """True where loss or gradient was not finite (with a guard: or a spike) and the weights were left alone."""


@dataclass(frozen=True, slots=True)
class Validated:
    """Held-out loss at fixed (t, noise), after `step` steps; `by_t` pairs each t with its mean loss."""

    step: int
    loss: float
    by_t: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that the user should know: what the guard found after `step` steps, and what it did."""

    step: int
    text: str


Event = StepDone | Validated | Notice
