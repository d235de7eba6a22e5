"""What is said of a run while it goes on."""

import math

import pytest

from tidetable.training.pace import SPEED_WINDOW, Pace


def test_a_constant_loss_is_its_own_average_from_the_first_step():
    pace = Pace(100)
    for step in range(1, 8):
        pace.add(step, 0.25, float(step))
        assert pace.loss == pytest.approx(0.25, abs=1e-12)


def test_the_average_is_the_weighted_mean_and_leaves_out_what_is_not_finite():
    pace, losses = Pace(50), [3.0, math.nan, 1.0, math.inf, 2.0]
    for step, loss in enumerate(losses, 1):
        pace.add(step, loss, float(step))
    weights = [math.exp(-age / 5) for age in (2, 1, 0)]
    expected = sum(w * loss for w, loss in zip(weights, (3.0, 1.0, 2.0), strict=True)) / sum(weights)
    assert pace.loss == pytest.approx(expected)


def test_speed_is_that_of_the_last_seconds_and_gives_the_time_left():
    pace = Pace(1000)
    for step in range(1, 101):
        pace.add(step, 1.0, 10.0 * step)  # slow at first
    for step in range(101, 301):
        pace.add(step, 1.0, 1000.0 + 0.5 * (step - 100))
    assert SPEED_WINDOW < 200 * 0.5
    assert pace.speed == pytest.approx(2.0) and pace.seconds_left == pytest.approx(350.0)


def test_nothing_is_said_before_it_is_known():
    pace = Pace(10)
    assert all(math.isnan(value) for value in (pace.loss, pace.speed, pace.seconds_left))
    pace.add(1, 1.0, 5.0)
    assert math.isnan(pace.speed) and math.isnan(pace.seconds_left)
    pace.add(2, 1.0, 5.0)
    assert math.isnan(pace.speed), "a clock that stands still"


def test_an_earlier_part_of_the_run_is_in_the_average():
    whole, resumed = Pace(100), Pace(100)
    for step in range(1, 11):
        whole.add(step, 1.0 / step, float(step))
    for step in range(1, 6):
        resumed.add_loss(1.0 / step)
    for step in range(6, 11):
        resumed.add(step, 1.0 / step, float(step))
    assert resumed.loss == whole.loss
