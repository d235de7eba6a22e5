"""What a legal sigma list is, and the series that plots show."""

import math

import pytest
import torch

from tidetable.schedules.curves import QUANTITIES, positions, series
from tidetable.schedules.process import VP, Flow
from tidetable.schedules.shift import shift_t
from tidetable.schedules.spacing import flow_grid, schedule
from tidetable.schedules.validate import require_sigmas


GOOD = [1.0, 0.75, 0.5, 0.0]


def test_legal_sigmas_pass_unchanged_as_float64():
    checked = require_sigmas(torch.tensor(GOOD, dtype=torch.float32))
    assert checked.dtype == torch.float64 and checked.tolist() == GOOD
    assert require_sigmas(torch.tensor([14.6, 3.0])).tolist() == pytest.approx([14.6, 3.0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "0 value"),
        ([1.0], "1 value"),
        ([1.0, math.nan, 0.0], r"mine\[1\] is nan"),
        ([math.inf, 1.0, 0.0], r"mine\[0\] is inf"),
        ([1.0, 0.5, -0.25], r"mine\[2\] is -0.25"),
        ([0.0, 0.5, 1.0], r"mine\[0\] = 0 is followed by 0.5"),
        ([1.0, 0.5, 0.5, 0.0], r"mine\[1\] = 0.5 is followed by 0.5"),
        ([[1.0, 0.0]], "one-dimensional"),
    ],
)
def test_illegal_sigmas_say_where(values, message):
    with pytest.raises(ValueError, match=message):
        require_sigmas(torch.tensor(values), "mine")


def test_equal_neighbors_may_be_looked_at():
    assert len(require_sigmas(torch.tensor([1.0, 0.5, 0.5, 0.0]), strict=False)) == 4
    with pytest.raises(ValueError, match="must fall"):
        require_sigmas(torch.tensor([0.5, 1.0]), strict=False)
    with pytest.raises(ValueError, match="one-dimensional tensor .*got list"):
        require_sigmas(GOOD)  # pyright: ignore[reportArgumentType]


def test_series_of_a_shifted_flow_schedule():
    steps, shift = 10, 3.0
    sigmas = schedule(flow_grid(shift), "trailing", steps)
    assert series(sigmas, "sigma", Flow()) == series(sigmas, "t", Flow()) == sigmas.tolist()
    # Unshifted time runs in equal steps; the log-SNR of the shifted one is its own minus 2·ln 3.
    log_snr = series(sigmas, "log_snr", Flow())
    assert log_snr[0] == -math.inf and log_snr[-1] == math.inf
    plain = Flow().log_snr(shift_t(sigmas, 1 / shift))
    assert log_snr[1:-1] == pytest.approx((plain - 2 * math.log(shift)).tolist()[1:-1])
    assert sum(series(sigmas, "step_size", Flow())) == pytest.approx(1.0)


def test_series_of_a_vp_schedule():
    process = VP.from_betas()
    t = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)
    sigmas = process.ratio(t)
    assert series(sigmas, "t", process) == pytest.approx(t.tolist())
    assert series(sigmas, "log_snr", process) == pytest.approx(process.log_snr(t).tolist())
    assert series(torch.cat([sigmas, torch.zeros(1)]), "t", process)[-1] == 0.0


def test_lengths_and_unknown_quantity():
    sigmas = torch.tensor(GOOD, dtype=torch.float64)
    assert [len(series(sigmas, quantity, Flow())) for quantity in QUANTITIES] == [4, 4, 4, 3]
    with pytest.raises(ValueError, match="'snr'.*log_snr"):
        series(sigmas, "snr", Flow())  # pyright: ignore[reportArgumentType]


def test_positions_on_the_x_axes():
    sigmas = schedule(flow_grid(3.0), "trailing", 4)
    assert positions(sigmas, "step", Flow()) == [0, 1, 2, 3, 4]
    assert positions(sigmas, "t", Flow()) == sigmas.tolist()
    assert positions(sigmas, "log_snr", Flow()) == series(sigmas, "log_snr", Flow())
    assert positions(sigmas, "percent", Flow()) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert positions(sigmas, "percent", Flow(), 3.0) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert positions(sigmas, "percent", Flow(), 1.0) == pytest.approx((1 - sigmas).tolist())
    process = VP.from_betas()
    sigmas = process.ratio(torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64))
    assert positions(sigmas, "percent", process, 1.0) == pytest.approx([0.0, 0.6, 1.0])
    with pytest.raises(ValueError, match="unknown x axis 'time'; use one of step, t, percent, log_snr"):
        positions(sigmas, "time", process)  # pyright: ignore[reportArgumentType]
