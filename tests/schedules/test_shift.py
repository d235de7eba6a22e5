"""Time shift: a group action on the odds of t."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tidetable.schedules.process import Flow
from tidetable.schedules.shift import (
    MuLine,
    image_tokens,
    log_area_mu,
    mu_from_image_tokens,
    mu_from_shift,
    shift_from_mu,
    shift_t,
    stretch_terminal,
    unshift_t,
)


times = st.floats(0.0, 1.0)
inner_times = st.floats(1e-6, 1.0 - 1e-6)
shifts = st.floats(0.05, 20.0)
QWEN = MuLine(256, 0.5, 8192, 0.9)
FLUX = MuLine(256, 0.5, 4096, 1.15)


@given(times, shifts)
def test_unshift_undoes_shift(t, shift):
    assert unshift_t(shift_t(t, shift), shift) == pytest.approx(t, abs=1e-13)
    assert shift_t(unshift_t(t, shift), shift) == pytest.approx(t, abs=1e-13)


@given(times, shifts, shifts)
def test_shifts_compose_by_multiplication(t, a, b):
    assert shift_t(shift_t(t, a), b) == pytest.approx(shift_t(t, a * b), abs=1e-13)


@given(inner_times, shifts)
def test_shift_multiplies_the_odds(t, shift):
    shifted = shift_t(t, shift)
    assert shifted / (1 - shifted) == pytest.approx(shift * t / (1 - t), rel=1e-8)


@given(inner_times, shifts)
def test_log_snr_moves_by_minus_two_mu(t, shift):
    moved = float(Flow().log_snr(shift_t(t, shift)) - Flow().log_snr(t))
    assert moved == pytest.approx(-2.0 * mu_from_shift(shift), abs=1e-8)


@given(shifts)
def test_ends_stay_and_one_is_the_identity(shift):
    assert shift_t(0.0, shift) == 0.0 and shift_t(1.0, shift) == pytest.approx(1.0, abs=1e-15)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(shift_t(t, 1.0), t)


@given(st.floats(-5.0, 5.0))
def test_mu_and_shift_are_one_number(mu):
    assert mu_from_shift(shift_from_mu(mu)) == pytest.approx(mu, abs=1e-14)


@given(inner_times, st.floats(-3.0, 3.0))
def test_exponential_form_of_flux_is_the_same_map(t, mu):
    assert shift_t(t, shift_from_mu(mu)) == pytest.approx(math.exp(mu) / (math.exp(mu) + (1 / t - 1)), abs=1e-12)


@pytest.mark.parametrize("shift", [1.5, 2.205, 3.0, 6.0])
@pytest.mark.parametrize("std", [0.5, 1.0, 1.5])
def test_logit_normal_with_mean_ln_shift_is_the_shifted_logit_normal_path_by_path(shift, std):
    z = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = torch.sigmoid(std * z + mu_from_shift(shift))
    assert float((moved - shift_t(torch.sigmoid(std * z), shift)).abs().max()) < 1e-15


def test_shift_per_sample():
    t = torch.tensor([0.2, 0.6], dtype=torch.float64)
    shift = torch.tensor([1.0, 3.0], dtype=torch.float64)
    expected = torch.stack([shift_t(t[0], 1.0), shift_t(t[1], 3.0)])
    assert torch.equal(shift_t(t, shift), expected)


def test_the_line_goes_through_its_points():
    for line in (QWEN, FLUX):
        assert mu_from_image_tokens(line.x1, line) == line.y1
        assert mu_from_image_tokens(line.x2, line) == pytest.approx(line.y2, abs=1e-15)


def test_tokens_are_whole_patches():
    assert image_tokens(1664, 928) == 104 * 58 == 6032
    assert image_tokens(1679, 943) == 6032
    assert image_tokens(1024, 1024, pixels_per_token=32) == 1024


def test_where_2_205_comes_from_and_where_it_does_not():
    mu = mu_from_image_tokens(image_tokens(1664, 928), QWEN)
    assert mu == pytest.approx(0.79113, abs=5e-6)
    assert shift_from_mu(mu) == pytest.approx(2.2059, abs=5e-5)
    # The article's rule is not the official one, and its printed number is not what its formula gives.
    assert log_area_mu(1664, 928) == pytest.approx(0.3871, abs=5e-5)
    assert shift_from_mu(log_area_mu(1664, 928)) == pytest.approx(1.4727, abs=5e-5)
    assert log_area_mu(1024, 1024) == 0.0


@given(st.floats(0.01, 0.3), st.integers(2, 60), st.floats(1.0, 6.0))
def test_terminal_stretch_is_affine_and_hits_the_terminal(terminal, steps, shift):
    sigmas = shift_t(torch.linspace(1, 1 / steps, steps, dtype=torch.float64), shift)
    stretched = stretch_terminal(sigmas, terminal)
    assert float(stretched[0]) == 1.0 and float(stretched[-1]) == pytest.approx(terminal, abs=1e-12)
    torch.testing.assert_close((1 - stretched) * (1 - sigmas[-1]), (1 - sigmas) * (1 - terminal), rtol=0, atol=1e-12)


def test_terminal_stretch_keeps_a_final_zero_and_matches_published_numbers():
    mu = 0.834
    for steps, last, middle in ((50, 0.0449, 0.689), (20, 0.108, 0.667)):
        sigmas = shift_t(torch.linspace(1, 1 / steps, steps, dtype=torch.float64), shift_from_mu(mu))
        assert float(sigmas[-1]) == pytest.approx(last, abs=5e-4)
        stretched = stretch_terminal(torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)]), 0.02)
        assert float(stretched[-1]) == 0.0 and float(stretched[-2]) == pytest.approx(0.02, abs=1e-12)
        assert float(stretched[steps // 2]) == pytest.approx(middle, abs=1e-3)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_bad_shifts_are_named(shift):
    with pytest.raises(ValueError, match=f"shift must be .*{shift}"):
        shift_t(0.5, shift)
    with pytest.raises(ValueError, match="shift must be"):
        unshift_t(0.5, shift)
    with pytest.raises(ValueError, match="shift must be"):
        mu_from_shift(shift)


@pytest.mark.parametrize("mu", [math.nan, math.inf, -math.inf, 1000.0, -1000.0])
def test_bad_mu_is_named(mu):
    with pytest.raises(ValueError, match=f"mu must be .*{mu}"):
        shift_from_mu(mu)


def test_other_bad_input():
    with pytest.raises(ValueError, match="0×512"):
        image_tokens(0, 512)
    with pytest.raises(ValueError, match="above 0"):
        log_area_mu(0, 512)
    with pytest.raises(ValueError, match="terminal"):
        stretch_terminal(torch.tensor([1.0, 0.5, 0.0]), 0.0)
