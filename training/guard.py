"""Watches a run's loss and gradient, leaves out the steps that would harm it, and undoes the harm that is done.

A step is bad when its loss or gradient norm is not finite, or lies `threshold` robust standard deviations above the
median of the last healthy steps, on a logarithmic scale (median absolute deviation; Rousseeuw and Croux 1993,
doi:10.1080/01621459.1993.10476408). Its update is left out: a bad sample does no more than that. Two bad steps in a row
mean that the weights are bad: they go back to the last good snapshot, the rate is lowered, and the run goes on with the
samples that come next. The step count never goes back.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .checkpoint import clone
from .config import _require
from .events import Notice
from .sharding import whole


if TYPE_CHECKING:
    from .engine import Trainer

WINDOW = 100
"""Healthy steps that a new one is compared with."""
ENOUGH = 20
"""Healthy steps before anything is called a spike."""
DEVIATION = (0.1, 1.0)
"""Standard deviation of ln(loss) assumed at least, so that a run without noise has no spikes of nothing, and at most,
so that a steep fall of the loss hides no spike: at a threshold of 8 these are factors of 2.2 and 3000."""
PATIENCE = 2
"""Bad steps in a row after which the weights are taken to be bad."""
SETTLED = 5
"""Age in steps at which a snapshot is known to be good: harm shows in the loss of the steps after it."""
VANISHING = 1e-6
"""Relative change of the weights between two snapshots that is too small to learn anything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """When a step is bad and what is done then."""

    threshold: float = 8.0
    """Robust standard deviations above the median, above 0."""
    snapshot_every: int = 50
    """Healthy steps between two snapshots in memory, at least 1."""
    rate_factor: float = 0.5
    """The learning rate is multiplied by this at each restore, in (0, 1]; 1 leaves it."""
    max_restores: int = 5
    """Restores after which the run stops, at least 1."""
    dead_after: int = 100
    """Steps after which a tensor that is still all zero is reported; 0 is never."""

    def __post_init__(self):
        _require(math.isfinite(self.threshold) and self.threshold > 0, "threshold", self.threshold, "above 0")
        for name in ("snapshot_every", "max_restores"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(0 < self.rate_factor <= 1, "rate_factor", self.rate_factor, "above 0 and at most 1")
        _require(self.dead_after >= 0, "dead_after", self.dead_after, ">= 0")


class Guard:
    """One run's watch. The trainer asks `accepts` before each update and calls `after_step` behind it."""

    def __init__(self, config: GuardConfig):
        self.config = config
        self.logs: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in ("loss", "grad_norm")}
        self.streak = 0
        self.restores = 0
        self.snapshots: list[tuple[int, dict[str, Any]]] = []
        self.notices: list[Notice] = []

    def accepts(self, trainer: "Trainer", loss: float, norm: float) -> bool:
        """Whether the update may be made. The weights before the first one are the first snapshot."""
        if not self.snapshots:
            self.snapshots.append((trainer.step, clone(trainer.weights())))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        values = {"loss": math.log(max(loss, 1e-30)), "grad_norm": math.log(max(norm, 1e-30))}
        if any(robust_z(value, self.logs[name]) > self.config.threshold for name, value in values.items()):
            return False
        for name, value in values.items():
            self.logs[name].append(value)
        return True

    def after_step(self, trainer: "Trainer", healthy: bool) -> None:
        """Snapshot after a healthy step, restore after too many bad ones. ValueError after too many restores."""
        if healthy:
            self.streak = 0
            if trainer.step == self.config.dead_after:
                self._report_dead(trainer)
            if trainer.step - self.snapshots[-1][0] >= self.config.snapshot_every:
                self._take(trainer)
            return
        self.streak += 1
        if self.streak >= PATIENCE:
            self._restore(trainer)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the statistics, not the snapshots. The checkpoint is the first snapshot then."""
        return {"logs": {name: list(log) for name, log in self.logs.items()}, "restores": self.restores}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, log in self.logs.items():
            log.clear()
            log.extend(state["logs"][name])
        self.restores, self.streak = state["restores"], 0
        self.snapshots.clear()

    def _take(self, trainer: "Trainer") -> None:
        new = clone(trainer.weights())
        change = _relative_change(self.snapshots[-1][1]["parameters"], new["parameters"])
        if change < VANISHING:
            self._notice(
                trainer,
                f"the weights changed by {change:.1e} of their size since step {self.snapshots[-1][0]}: raise "
                "learning_rate, or check that the layers you chose take part",
            )
        self.snapshots = [self.snapshots[-1], (trainer.step, new)]

    def _restore(self, trainer: "Trainer") -> None:
        settled = [kept for kept in self.snapshots if trainer.step - PATIENCE - kept[0] >= SETTLED]
        step, weights = settled[-1] if settled else self.snapshots[0]
        trainer.load_weights(clone(weights))
        trainer.rate_scale *= self.config.rate_factor
        self.snapshots = [(step, weights)]
        self.streak, self.restores = 0, self.restores + 1
        if self.restores > self.config.max_restores:
            raise ValueError(
                f"the guard put the weights back {self.config.max_restores} times and step {trainer.step} spikes "
                f"again: lower learning_rate (now {trainer.config.learning_rate}), look for broken samples, or raise "
                f"the guard's threshold (now {self.config.threshold}). The weights are those of step {step}"
            )
        self._notice(
            trainer,
            f"{PATIENCE} bad steps in a row: the weights are those of step {step} again, the learning rate is "
            f"multiplied by {trainer.rate_scale:g} (restore {self.restores} of {self.config.max_restores})",
        )

    def _report_dead(self, trainer: "Trainer") -> None:
        dead = sum(not bool(whole(parameter.detach()).any()) for parameter in trainer.parameters)
        if dead:
            self._notice(
                trainer,
                f"{dead} of {len(trainer.parameters)} trained tensors are still zero after {trainer.step} steps: their "
                "layers take no part in what the network puts out, or the learning rate is too small",
            )

    def _notice(self, trainer: "Trainer", text: str) -> None:
        self.notices.append(Notice(trainer.step, text))


def robust_z(value: float, window: deque[float]) -> float:
    """How many robust standard deviations `value` lies above the median; 0 while there is not enough to tell."""
    if len(window) < ENOUGH:
        return 0.0
    median = statistics.median(window)
    deviation = 1.4826 * statistics.median(abs(other - median) for other in window)
    return (value - median) / min(max(deviation, DEVIATION[0]), DEVIATION[1])


def _relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    change = sum(whole((new - old).square().sum()).item() for old, new in zip(before, after, strict=True))
    size = sum(whole(new.square().sum()).item() for new in after)
    return math.sqrt(change / size) if size else 0.0
