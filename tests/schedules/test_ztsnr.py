"""Zero terminal SNR."""

import math

import pytest
import torch

from tidetable.schedules.process import VP
from tidetable.schedules.ztsnr import TERMINAL_ALPHA_BAR, rescale_zero_terminal_snr


TABLES = {
    "scaled_linear": torch.tensor(VP.from_betas().alpha_bar, dtype=torch.float64),
    "linear": torch.tensor(VP.from_betas(1e-4, 0.02, kind="linear").alpha_bar, dtype=torch.float64),
}


@pytest.mark.parametrize("alpha_bar", TABLES.values(), ids=TABLES)
def test_keeps_the_first_and_zeroes_the_last(alpha_bar):
    rescaled = rescale_zero_terminal_snr(alpha_bar)
    assert float(rescaled[0]) == pytest.approx(float(alpha_bar[0]), rel=1e-15)
    assert float(rescaled[-1]) == 0.0
    assert (rescaled.diff() < 0).all() and (rescaled[1:] < alpha_bar[1:]).all()


@pytest.mark.parametrize("alpha_bar", TABLES.values(), ids=TABLES)
def test_is_affine_in_the_signal_coefficient_and_idempotent(alpha_bar):
    rescaled = rescale_zero_terminal_snr(alpha_bar)
    slope = rescaled.sqrt().diff() / alpha_bar.sqrt().diff()
    torch.testing.assert_close(slope, slope[0].expand_as(slope), rtol=1e-9, atol=0)
    torch.testing.assert_close(rescale_zero_terminal_snr(rescaled), rescaled, rtol=1e-14, atol=0)


def test_stand_in_is_the_hosts_largest_sigma():
    assert math.sqrt((1 - TERMINAL_ALPHA_BAR) / TERMINAL_ALPHA_BAR) == pytest.approx(4518.76, abs=0.01)
