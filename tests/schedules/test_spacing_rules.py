"""What each spacing promises, the axis it can be placed on, and the ways to start below pure noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidetable.schedules.shift import shift_t, stretch_terminal, unshift_t
from tidetable.schedules.spacing import AXES, AYS_LEVELS, SPACINGS, flow_grid, schedule, table_grid
from tidetable.tests.schedules.test_spacing import GRIDS


FLOWS = ("flow", "flow-3", "flux")
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
each_spacing = pytest.mark.parametrize("spacing", SPACINGS)
some_steps = st.integers(1, 60)


def equal_steps(values):
    torch.testing.assert_close(values.diff(), values.diff()[:1].expand(len(values) - 1), rtol=1e-7, atol=1e-9)


def log_ratio(grid, sigmas):
    return -0.5 * grid.log_snr(sigmas)


# ── grids ───────────────────────────────────────────────────────────────────────────────────────────


@each_grid
@given(t=st.floats(1e-3, 1.0))
def test_time_and_sigma_are_inverses(grid, t):
    times = torch.tensor([t], dtype=torch.float64)
    torch.testing.assert_close(grid.t_of_sigma(grid.sigma_of_t(times)), times, rtol=1e-9, atol=0)


@each_grid
def test_log_snr_and_sigma_are_inverses(grid):
    inside = grid.sigmas[:-1]
    torch.testing.assert_close(grid.sigma_of_log_snr(grid.log_snr(inside)), inside, rtol=1e-9, atol=0)
    high, low = grid.log_snr_range
    assert math.isfinite(high) and high < low


@each_grid
@given(t=st.floats(0.02, 1.0))
def test_a_part_of_a_grid_is_a_grid(grid, t):
    part = grid.below(t)
    rows = torch.arange(1, len(part.sigmas) + 1, dtype=torch.float64) / len(part.sigmas)
    torch.testing.assert_close(part.sigma_of_t(rows), part.sigmas, rtol=1e-9, atol=0)
    assert part.sigma_max == pytest.approx(float(grid.sigma_of_t(torch.tensor(t, dtype=torch.float64))), rel=1e-12)
    assert part.is_flow == grid.is_flow
    # Its lowest level stays about the model's own: one row of t.
    assert part.sigma_min == pytest.approx(grid.sigma_min, rel=0.6)


# ── rules ───────────────────────────────────────────────────────────────────────────────────────────


@each_grid
def test_leading_is_the_papers_and_trailing_mends_it(grid):
    # Lin et al. 2023, Table 2: with T = 1000 and 10 steps the rows are 901, 801, … 1, counted from 1, with an offset
    # of 1 in Stable Diffusion.
    rows = len(grid.sigmas)
    sigmas = schedule(grid, "leading", 10)
    torch.testing.assert_close(sigmas[:-1], grid.sigmas[torch.arange(9, -1, -1) * (rows // 10) + 1])
    assert float(sigmas[0]) < 0.999 * float(schedule(grid, "trailing", 10)[0])


def test_linspace_visits_the_papers_rows():
    grid = GRIDS["vp"]
    sigmas = schedule(grid, "linspace", 10)
    assert torch.equal(sigmas, schedule(grid, "normal", 10))
    rows = grid.t_of_sigma(sigmas[:-1]) * 1000
    assert rows.tolist() == pytest.approx([1000, 889, 778, 667, 556, 445, 334, 223, 112, 1])


@pytest.mark.parametrize("spacing", ["normal", "sgm_uniform", "ddim_uniform", "trailing", "linspace"])
@given(shift=st.floats(0.3, 15.0), steps=st.integers(2, 100))
def test_no_double_shift(spacing, shift, steps):
    """A shifted model visits the shifted levels of an unshifted one, down to the lowest."""
    plain, shifted = (schedule(flow_grid(s), spacing, steps) for s in (1.0, shift))
    torch.testing.assert_close(shifted, shift_t(plain, shift), rtol=1e-9, atol=0)
    equal_steps(unshift_t(shifted[:-1], shift))


def test_low_ends():
    for grid in GRIDS.values():
        for spacing in ("normal", "karras", "exponential", "kl_optimal", "log_snr", "cosine", "laplace"):
            assert float(schedule(grid, spacing, 12)[-2]) == pytest.approx(grid.sigma_min, rel=1e-6), spacing
        assert float(schedule(grid, "ddim_uniform", 12)[-2]) == pytest.approx(float(grid.sigmas[1]), rel=1e-9)


@each_grid
def test_polyexponential_is_exponential_at_rho_1(grid):
    assert torch.equal(schedule(grid, "polyexponential", 17), schedule(grid, "exponential", 17))
    steep = schedule(grid, "polyexponential", 17, rho=2.0)[:-1].log()
    ramp = (steep - steep[-1]) / (steep[0] - steep[-1])
    equal_steps(ramp.sqrt())


@each_grid
def test_karras_with_rho(grid):
    for rho in (1.0, 3.0, 7.0):
        equal_steps(schedule(grid, "karras", 13, rho=rho)[:-1] ** (1 / rho))
    assert torch.equal(schedule(grid, "karras", 13, rho=7.0), schedule(grid, "karras", 13))


@each_grid
def test_log_snr_is_equal_steps_and_cosine_its_schedules_time(grid):
    levels = schedule(grid, "log_snr", 20)[1:-1]
    equal_steps(grid.log_snr(levels))
    equal_steps(log_ratio(grid, schedule(grid, "cosine", 20)[:-1]).exp().atan())
    equal_steps(schedule(grid, "kl_optimal", 20)[:-1].atan())


@pytest.mark.parametrize("name", ["vp", "vp-zero-terminal"])
def test_eps_and_v_models_have_two_names_for_some_rules(name):
    grid = GRIDS[name]
    torch.testing.assert_close(schedule(grid, "log_snr", 30), schedule(grid, "exponential", 30))
    torch.testing.assert_close(schedule(grid, "cosine", 30), schedule(grid, "kl_optimal", 30))


@each_grid
@given(center=st.floats(-1.0, 1.0), scale=st.floats(0.3, 3.0))
@settings(max_examples=25, deadline=None)
def test_laplace_steps_have_equal_probability(grid, center, scale):
    ratios = log_ratio(grid, schedule(grid, "laplace", 15, center=center, scale=scale)[:-1]).numpy()
    from scipy.stats import laplace

    equal_steps(torch.as_tensor(laplace.cdf(ratios, center, scale)))


def test_half_of_the_laplace_steps_lie_on_either_side_of_its_center():
    for center in (-1.0, 0.0, 1.0):
        sigmas = schedule(GRIDS["flow"], "laplace", 21, center=center, scale=1.0)
        assert float(torch.logit(sigmas[10])) == pytest.approx(center, abs=1e-2)


@given(a=st.floats(0.3, 3.0), b=st.floats(0.3, 3.0))
@settings(max_examples=30, deadline=None)
def test_beta_with_parameters_is_its_quantiles(a, b):
    from scipy.stats import beta

    grid = flow_grid(1.0, 10_000)
    sigmas = schedule(grid, "beta", 16, a=a, b=b)[:-1]
    quantiles = beta.ppf([1 - i / 16 for i in range(16)], a, b)
    assert sigmas.tolist() == pytest.approx(quantiles.tolist(), abs=2e-4)  # rounded to rows


@given(steps=st.integers(2, 300))
def test_linear_quadratic_is_smooth_and_linear_at_first(steps):
    noise = 1.0 - schedule(flow_grid(3.0), "linear_quadratic", steps)
    half = steps // 2
    assert float(noise[half]) == pytest.approx(0.025)
    equal_steps(noise[: half + 1])
    equal_steps(noise[half:].diff()) if steps - half > 2 else None
    torch.testing.assert_close(noise, 1.0 - schedule(flow_grid(1.0), "linear_quadratic", steps))  # absolute in sigma


@pytest.mark.parametrize("table", AYS_LEVELS)
def test_align_your_steps_visits_the_published_levels(table):
    levels = torch.tensor(AYS_LEVELS[table], dtype=torch.float64)
    grid = table_grid(torch.exp(torch.linspace(math.log(levels[-1]), math.log(levels[0]), 1000, dtype=torch.float64)))
    sigmas = schedule(grid, f"ays_{table}", 10)
    torch.testing.assert_close(sigmas[:-1], levels[:-1], rtol=1e-9, atol=0)
    # log-linear between them: twice the steps pass through the same levels
    torch.testing.assert_close(schedule(grid, f"ays_{table}", 20)[:-1:2], levels[:-1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("table", AYS_LEVELS)
def test_align_your_steps_on_other_models_keeps_the_ratios(table):
    vp, zero_terminal = (schedule(GRIDS[name], f"ays_{table}", 10) for name in ("vp", "vp-zero-terminal"))
    if table != "svd":
        torch.testing.assert_close(vp[1:], zero_terminal[1:], rtol=1e-5, atol=0)
    flow = schedule(GRIDS["flow"], "ays_sdxl", 10)
    torch.testing.assert_close((flow / (1 - flow))[1:-1], GRIDS["vp"].sigmas.new_tensor(AYS_LEVELS["sdxl"][1:-1]))


# ── axis ────────────────────────────────────────────────────────────────────────────────────────────


@each_grid
@each_spacing
@pytest.mark.parametrize("axis", AXES)
def test_every_spacing_on_every_axis(grid, spacing, axis):
    for steps in (1, 2, 9, 40):
        sigmas = schedule(grid, spacing, steps, axis=axis)
        assert len(sigmas) == steps + 1 and float(sigmas[-1]) == 0.0
        assert float(sigmas[0]) == pytest.approx(grid.sigma_max, rel=1e-12) or spacing == "leading"


@each_grid
@each_spacing
def test_its_own_axis_is_native(grid, spacing):
    own = SPACINGS[spacing].axis
    assert torch.equal(schedule(grid, spacing, 25, axis=own), schedule(grid, spacing, 25))


@each_grid
def test_equal_steps_stay_equal_steps_on_another_axis(grid):
    torch.testing.assert_close(
        schedule(grid, "normal", 30, axis="log_snr")[1:], schedule(grid, "log_snr", 30)[1:], rtol=1e-7, atol=0
    )
    torch.testing.assert_close(schedule(grid, "log_snr", 30, axis="t"), schedule(grid, "normal", 30), rtol=1e-6, atol=0)
    equal_steps(schedule(grid, "normal", 30, axis="sigma")[:-1])


def test_karras_placed_in_t_respects_the_shift():
    plain, shifted = (schedule(flow_grid(s), "karras", 20, axis="t") for s in (1.0, 6.0))
    rounded = schedule(flow_grid(1.0), "karras", 20)
    torch.testing.assert_close(plain, rounded)
    # The points stay put only if sigma_min is the same fraction of t, which is what the axis is measured in.
    assert (shifted > schedule(flow_grid(6.0), "karras", 20)).sum() >= 18


# ── starting below pure noise ───────────────────────────────────────────────────────────────────────


@each_spacing
@pytest.mark.parametrize("name", FLOWS)
@given(percent=st.integers(25, 100), steps=some_steps)
@settings(max_examples=20, deadline=None)
def test_a_noise_level_is_where_a_flow_starts(name, spacing, percent, steps):
    denoise = percent / 100
    sigmas = schedule(GRIDS[name], spacing, steps, denoise, denoise_as="noise_level")
    assert len(sigmas) == steps + 1
    assert float(sigmas[0]) == pytest.approx(denoise, abs=1e-12) or (spacing == "leading" and sigmas[0] < denoise)


@each_spacing
@pytest.mark.parametrize("name", ["vp", "vp-zero-terminal"])
def test_a_noise_level_is_a_time_of_other_models(name, spacing):
    grid = GRIDS[name]
    sigmas = schedule(grid, spacing, 7, 0.6, denoise_as="noise_level")
    start = float(grid.sigma_of_t(torch.tensor(0.6, dtype=torch.float64)))
    assert float(sigmas[0]) == pytest.approx(start, rel=1e-12) or (spacing == "leading" and float(sigmas[0]) < start)
    assert torch.equal(schedule(grid, spacing, 7, 1.0, denoise_as="noise_level"), schedule(grid, spacing, 7))


@given(steps=st.integers(2, 50), shift=st.floats(0.5, 12.0), terminal=st.floats(0.001, 0.3))
def test_terminal_is_the_last_level(steps, shift, terminal):
    grid = flow_grid(shift)
    sigmas = schedule(grid, "trailing", steps, terminal=terminal)
    assert float(sigmas[-2]) == pytest.approx(terminal) and float(sigmas[0]) == 1.0
    torch.testing.assert_close(sigmas, stretch_terminal(schedule(grid, "trailing", steps), terminal))
    half = schedule(grid, "trailing", steps, 0.5, denoise_as="noise_level", terminal=terminal)
    assert float(half[0]) == pytest.approx(0.5) and float(half[-2]) == pytest.approx(terminal)


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("spacing", "options", "message"),
    [
        ("trailing", {"axis": "snr"}, "unknown axis 'snr'; use one of native, log_snr, sigma, t"),
        ("trailing", {"denoise_as": "strength"}, "unknown denoise_as 'strength'; use one of steps, noise_level"),
        ("trailing", {"terminal": 1.0}, "terminal must be 0 .* got 1.0; Qwen-Image has 0.02"),
        ("trailing", {"terminal": -0.1}, "terminal must be 0 .*-0.1"),
        ("trailing", {"terminal": math.nan}, "terminal must be 0 .*nan"),
        ("karras", {"rho": 0.0}, "the spacing's rho must be above 0 and at most 100, got 0.0"),
        ("karras", {"rho": math.nan}, "the spacing's rho must be .*nan"),
        ("karras", {"rho": 1e9}, "the spacing's rho must be .*1000000000"),
        ("beta", {"a": -1.0}, "the spacing's a must be .*-1.0"),
        ("beta", {"b": math.inf}, "the spacing's b must be .*inf"),
        ("laplace", {"center": 1000.0}, "the spacing's center must be -100 to 100, got 1000.0"),
        ("laplace", {"scale": 0.0}, "the spacing's scale must be above 0"),
        ("beta", {"a": 0.01, "steps": 500}, "cannot place 500 different noise levels"),
        ("leading", {"steps": 1200}, "leading cannot place 1200 different noise levels on this model's 1000 rows"),
    ],
)
def test_bad_options_are_named(spacing, options, message):
    steps = options.pop("steps", 10)
    with pytest.raises(ValueError, match=message) as caught:
        schedule(GRIDS["flow"], spacing, steps, **options)
    assert len(str(caught.value)) < 300


def test_ten_thousand_steps_where_the_levels_are_continuous():
    for spacing in ("trailing", "karras", "beta", "log_snr", "kl_optimal", "cosine", "linear"):
        assert len(schedule(GRIDS["flow-3"], spacing, 10_000)) == 10_001
    with pytest.raises(ValueError, match="simple cannot place 10000 different noise levels on this model's 1000 rows"):
        schedule(GRIDS["vp"], "simple", 10_000)


def test_terminal_needs_a_flow_and_two_steps():
    with pytest.raises(ValueError, match="terminal 0.02 is for flow models"):
        schedule(GRIDS["vp"], "trailing", 10, terminal=0.02)
    with pytest.raises(ValueError, match="cannot stretch 1 step.*terminal 0.02"):
        schedule(GRIDS["flow"], "trailing", 1, terminal=0.02)
    with pytest.raises(ValueError, match="from sigma 0.2 to end at terminal 0.3"):
        schedule(GRIDS["flow"], "trailing", 10, 0.2, denoise_as="noise_level", terminal=0.3)
