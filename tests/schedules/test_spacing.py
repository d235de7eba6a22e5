"""Spacings: exact step counts, ends, closed forms. (Parity with ComfyUI's: tests/host/test_schedules_nodes.py.)"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidetable.schedules.edit import tail_for_denoise
from tidetable.schedules.process import VP
from tidetable.schedules.shift import shift_t
from tidetable.schedules.spacing import SPACINGS, flow_grid, schedule, table_grid


ROWS = torch.arange(1000, dtype=torch.float64) / 999
VP_SD = VP.from_betas()
# The zero-terminal table as the host holds it: its last row is finite.
ZERO_TERMINAL = torch.cat([VP_SD.zero_terminal().ratio(ROWS[:-1]), torch.tensor([4518.76], dtype=torch.float64)])
GRIDS = {
    "flow": flow_grid(),
    "flow-3": flow_grid(3.0),
    "flux": flow_grid(math.exp(1.15), rows=10_000),
    "vp": table_grid(VP_SD.ratio(ROWS)),
    "vp-zero-terminal": table_grid(ZERO_TERMINAL),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("spacing", SPACINGS)
@settings(deadline=None, max_examples=25)
@given(steps=st.integers(1, 1000))
def test_exactly_the_steps_asked_for(grid, spacing, steps):
    sigmas = schedule(grid, spacing, steps)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float64
    assert float(sigmas[-1]) == 0.0 and (sigmas.diff() < 0).all()
    if spacing == "leading":  # as published: its first row is a stride below the last one
        assert grid.sigma_min <= float(sigmas[0]) <= grid.sigma_max
    else:
        assert float(sigmas[0]) == pytest.approx(grid.sigma_max, rel=1e-12)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_continuous_form_goes_through_the_table(grid):
    rows = len(grid.sigmas)
    t = torch.arange(1, rows + 1, dtype=torch.float64) / rows
    torch.testing.assert_close(grid.sigma_of_t(t), grid.sigmas, rtol=1e-9, atol=0)


@given(shift=st.floats(0.2, 12.0), steps=st.integers(1, 200))
def test_trailing_on_flow_is_equal_steps_before_the_shift(shift, steps):
    sigmas = schedule(flow_grid(shift), "trailing", steps)
    torch.testing.assert_close(shift_t(sigmas, 1.0 / shift), torch.linspace(1, 0, steps + 1, dtype=torch.float64))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("steps", [1, 4, 10, 20, 50, 250])
def test_simple_is_trailing_where_the_rows_divide(grid, steps):
    torch.testing.assert_close(schedule(grid, "simple", steps), schedule(grid, "trailing", steps), rtol=1e-9, atol=0)


def test_trailing_visits_the_papers_rows():
    # Lin et al. 2023, Table 2: with T = 1000 and 10 steps the rows are 1000, 900, … 100, counted from 1.
    grid = GRIDS["vp"]
    rows = torch.arange(1000, 0, -100) - 1
    torch.testing.assert_close(schedule(grid, "trailing", 10)[:-1], grid.sigmas[rows], rtol=1e-9, atol=0)


def test_closed_forms_between_the_ends():
    grid, steps = GRIDS["vp"], 21
    karras = schedule(grid, "karras", steps)[:-1]
    exponential = schedule(grid, "exponential", steps)[:-1]
    linear = schedule(grid, "linear", steps)
    for values in ((karras ** (1 / 7)).diff(), exponential.log().diff(), linear.diff()):
        torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-9, atol=0)
    assert float(karras[-1]) == pytest.approx(float(grid.sigmas[0]))
    assert float(exponential[-1]) == pytest.approx(float(grid.sigmas[0]))


def test_beta_steps_are_quantiles():
    # P(row <= quantile) of Beta(.6, .6) is symmetric: the median step sits in the middle of the table.
    grid = GRIDS["flow"]
    sigmas = schedule(grid, "beta", 20)
    assert float(sigmas[10]) == pytest.approx(0.5, abs=1.1e-3)
    torch.testing.assert_close(sigmas[1:10], 1 + 1e-3 - sigmas[11:20].flip(0), rtol=0, atol=1.1e-3)


def test_beta_keeps_every_step_where_comfyui_drops_some():
    assert len(schedule(GRIDS["flow"], "beta", 150)) == 151
    assert len(schedule(GRIDS["vp"], "beta", 999)) == 1000


@pytest.mark.parametrize("spacing", SPACINGS)
@given(steps=st.integers(1, 40), percent=st.integers(5, 100))
@settings(deadline=None, max_examples=25)
def test_denoise_is_the_tail_of_a_longer_schedule(spacing, steps, percent):
    grid, denoise = GRIDS["flow-3"], percent / 100
    sigmas = schedule(grid, spacing, steps, denoise)
    assert len(sigmas) == steps + 1
    assert torch.equal(sigmas, tail_for_denoise(schedule(grid, spacing, int(steps / denoise)), steps))


def test_spacings_refuse_what_they_cannot_do():
    grid = GRIDS["vp"]
    for steps in (0, -3, 10_001):
        with pytest.raises(ValueError, match=f"steps must be 1 to 10000, got {steps}"):
            schedule(grid, "simple", steps)
    for denoise in (0.0, -0.1, 1.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"denoise must be .*{denoise}"):
            schedule(grid, "simple", 10, denoise)
    with pytest.raises(ValueError, match="unknown spacing 'nope'.*trailing"):
        schedule(grid, "nope", 10)
    with pytest.raises(ValueError, match="1500 different noise levels on this model's 1000 rows"):
        schedule(grid, "simple", 1500)
    with pytest.raises(ValueError, match="raise denoise"):
        schedule(grid, "simple", 1000, 1e-6)
    with pytest.raises(ValueError, match="cannot take 3 steps"):
        tail_for_denoise(torch.tensor([1.0, 0.5, 0.0]), 3)
