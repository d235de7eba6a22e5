"""A running average over the steps of one run, right also for samplers that call the model several times a step."""

from typing import NamedTuple

from torch import Tensor


class Average(NamedTuple):
    """The average as it was at one step, [B, ...]."""

    level: float
    """Sigma at which the step begins."""
    sigma: float
    """Sigma at which the model was called."""
    value: Tensor


# heunpp2 looks two steps ahead before it goes back.
_KEPT = 4


def step_level(sigma: float, sigmas: list[float]) -> float:
    """The sigma at which the step that `sigma` lies in begins, for decreasing `sigmas`; `sigma` itself above them."""
    return min((level for level in sigmas if level >= sigma * (1.0 - 1e-6)), default=sigma)


def running_average(
    value: Tensor, momentum: float, sigma: float, level: float, past: tuple[Average, ...] = ()
) -> tuple[Tensor, tuple[Average, ...]]:
    """(average, past from now on): value + momentum · average of the step before, Sadat et al. 2024, arXiv:2410.02416.

    A call counts for later steps when it is the latest at the beginning of its step. Calls further down in a step use
    the steps before it and leave no trace, and going back up to a level forgets what came after it.
    """
    before = tuple(entry for entry in past if entry.level > level)
    average = value + momentum * before[-1].value if before else value
    begun = tuple(entry for entry in past if entry.level == level and entry.sigma > sigma * (1.0 + 1e-6))
    return average, (*before, *(begun or (Average(level, sigma, average),)))[-_KEPT:]
