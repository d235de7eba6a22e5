"""How a run is doing: its loss without the noise of single steps, its speed, and the time that is left."""

import math
from collections import deque


SPEED_WINDOW = 15.0
"""Seconds over which the speed is measured."""


class Pace:
    """Fed with every step of a run of `steps`, at seconds of any clock."""

    def __init__(self, steps: int):
        self.steps = steps
        # The average's memory in steps.
        self.keep = math.exp(-1 / min(200.0, max(5.0, steps / 25)))
        self._sum = self._weight = 0.0
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, step: int, loss: float, seconds: float) -> None:
        """Step `step`, 1-based, was done at `seconds`."""
        self.add_loss(loss)
        self._seen.append((seconds, step))
        while seconds - self._seen[0][0] > SPEED_WINDOW and len(self._seen) > 2:
            self._seen.popleft()

    def add_loss(self, loss: float) -> None:
        """The loss of a step of which the time is not known, of an earlier part of the run."""
        if math.isfinite(loss):
            self._sum = self.keep * self._sum + (1 - self.keep) * loss
            self._weight = self.keep * self._weight + (1 - self.keep)

    @property
    def loss(self) -> float:
        """Exponential average of the losses, without the bias of its start; nan before the first."""
        return self._sum / self._weight if self._weight else math.nan

    @property
    def speed(self) -> float:
        """Steps per second lately; nan before two steps."""
        if len(self._seen) < 2 or self._seen[-1][0] <= self._seen[0][0]:
            return math.nan
        (start, first), (end, last) = self._seen[0], self._seen[-1]
        return (last - first) / (end - start)

    @property
    def seconds_left(self) -> float:
        """Until the last step at the present speed; nan where that is not known."""
        return (self.steps - self._seen[-1][1]) / self.speed if self._seen else math.nan
