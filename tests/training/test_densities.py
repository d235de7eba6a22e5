"""Laws of the densities: each quantile function against scipy's or the paper's own distribution."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from scipy import integrate, stats

from tidetable.schedules.process import VP, Flow
from tidetable.training.densities import (
    cdf_of,
    density_shift,
    piecewise_icdf,
    quantile_function,
    shifted_quantile,
)
from tidetable.training.equivalents import equivalents
from tidetable.training.recipe import DensityConfig
from tidetable.training.timesteps import OPEN_INTERVAL, draw_t


KNOTS = ((0.1, 1.0), (0.4, 3.0), (0.5, 3.0), (0.9, 0.0))
SDXL = VP.from_betas()


def mode_pdf(t, scale):
    """By the change of variables at the u that gives t, found by root search."""
    u = cdf_of(quantile_function(DensityConfig(density="mode", mode_scale=scale), Flow()), t)
    return 1 / (1 + scale - scale * math.pi / 2 * math.sin(math.pi * u))


def piecewise_pdf(t):
    area = 0.3 * 2 + 0.1 * 3 + 0.4 * 1.5
    return _interpolate(t) / area


def _interpolate(t):
    for (low, a), (high, b) in pairwise(KNOTS):
        if low <= t <= high:
            return a + (b - a) * (t - low) / (high - low)
    return 0.0


LAWS = [
    (DensityConfig(density="uniform"), lambda t: 1.0),
    (
        DensityConfig(density="logit_normal", mean=0.5, std=0.8),
        lambda t: stats.norm.pdf(math.log(t / (1 - t)), 0.5, 0.8) / (t * (1 - t)),
    ),
    (DensityConfig(density="mode", mode_scale=1.29), lambda t: mode_pdf(t, 1.29)),
    (DensityConfig(density="mode", mode_scale=-0.5), lambda t: mode_pdf(t, -0.5)),
    (DensityConfig(density="cosmap"), lambda t: 2 / (math.pi * (1 - 2 * t + 2 * t * t))),
    (DensityConfig(density="beta", beta_a=2.0, beta_b=1.5), lambda t: stats.beta.pdf(t, 2.0, 1.5)),
    (
        DensityConfig(density="log_snr_normal", mean=-1.0, std=2.0),
        lambda t: stats.norm.pdf(-2 * math.log(t / (1 - t)), -1.0, 2.0) * 2 / (t * (1 - t)),
    ),
    (DensityConfig(density="content"), lambda t: (1 - t) ** (-2 / 3) / 3),
    (DensityConfig(density="style"), lambda t: t ** (-2 / 3) / 3),
    (DensityConfig(density="piecewise", knots=KNOTS), piecewise_pdf),
]
each_law = pytest.mark.parametrize(("config", "pdf"), LAWS, ids=[config.density for config, _ in LAWS])


@each_law
def test_a_quantile_is_where_the_integral_of_the_density_reaches_it(config, pdf):
    quantile = quantile_function(config, Flow())
    u = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.98], dtype=torch.float64)
    t = quantile(u).tolist()
    corners = [knot for knot, _ in KNOTS]
    for (low, high), (a, b) in zip(pairwise(t), pairwise(u), strict=True):
        points = [corner for corner in corners if low < corner < high] or None
        mass = integrate.quad(pdf, low, high, points=points)[0]
        assert mass == pytest.approx(float(b - a), abs=1e-6)


@each_law
def test_quantiles_rise_from_end_to_end_and_bisection_inverts_them(config, pdf):
    quantile = quantile_function(config, Flow())
    u = torch.linspace(1e-6, 1 - 1e-6, 1001, dtype=torch.float64)
    t = quantile(u)
    assert bool((t.diff() >= 0).all())
    assert t[0] >= 0 and t[-1] <= 1
    for place in (0.1, 0.37, 0.9):
        assert cdf_of(quantile, float(quantile(torch.tensor([place], dtype=torch.float64)))) == pytest.approx(place)


@each_law
def test_stratified_draws_fill_the_histogram_evenly(config, pdf):
    t = draw_t(config, 4096, (4, 8, 8), Flow(), 1.0, torch.Generator().manual_seed(1)).sort().values
    quantile = quantile_function(config, Flow())
    t, place = t[::64], torch.arange(0, 4096, 64) / 4096
    inside = (t > OPEN_INTERVAL) & (t < 1 - OPEN_INTERVAL)  # beyond, style and content have 2 % each
    rank = torch.tensor([cdf_of(quantile, float(value)) for value in t[inside]])
    assert inside.float().mean() > 0.95
    assert torch.allclose(rank, place[inside], atol=1.5 / 4096)


def test_a_log_snr_normal_stays_inside_a_table_without_piling_up_at_its_ends():
    config = DensityConfig(density="log_snr_normal", mean=0.0, std=6.0)
    t = draw_t(config, 8192, (4, 8, 8), SDXL, 1.0, torch.Generator().manual_seed(1))
    log_snr = SDXL.log_snr(t).sort().values
    low, high = float(SDXL.log_snr(1.0)), float(SDXL.log_snr(0.0))
    expected = stats.truncnorm(low / 6, high / 6, 0, 6)
    assert stats.kstest(log_snr.numpy(), expected.cdf).statistic < 1e-3


def test_a_log_snr_outside_the_table_is_refused():
    config = DensityConfig(density="log_snr_normal", mean=20.0, std=0.1)
    with pytest.raises(ValueError, match="lies outside this model's range"):
        draw_t(config, 4, (4, 8, 8), SDXL, 1.0, torch.Generator())


def test_shifting_a_logit_normal_moves_its_mean_by_the_logarithm():
    u = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    shifted = shifted_quantile(DensityConfig(), Flow(), 3.0)(u)
    moved = shifted_quantile(DensityConfig(mean=math.log(3.0)), Flow(), 1.0)(u)
    assert torch.allclose(shifted, moved, atol=1e-14)


def test_a_range_keeps_the_shape_of_the_density_inside():
    config = DensityConfig(t_min=0.2, t_max=0.6)
    t = draw_t(config, 4096, (4, 8, 8), Flow(), 2.0, torch.Generator().manual_seed(0))
    ends = stats.norm.cdf([math.log(a / (1 - a)) - math.log(2.0) for a in (0.2, 0.6)])
    rank = (torch.from_numpy(stats.norm.cdf(torch.logit(t).numpy() - math.log(2.0))) - ends[0]) / (ends[1] - ends[0])
    assert t.min() >= 0.2
    assert t.max() <= 0.6
    assert stats.kstest(rank.numpy(), "uniform").statistic < 1e-3


def test_an_empty_range_is_refused():
    config = DensityConfig(density="style", t_min=0.0, t_max=1e-30)
    with pytest.raises(ValueError, match="next to no probability"):
        shifted_quantile(config, Flow(), 1.0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DensityConfig(shift_mode="none"), 1.0),
        (DensityConfig(shift_mode="shift", shift=3.0), 3.0),
        (DensityConfig(shift_mode="mu", mu=1.15), math.exp(1.15)),
        (DensityConfig(shift_mode="model"), 1.82),
        (DensityConfig(shift_mode="auto"), 1.82),
        (DensityConfig(shift_mode="auto", family="qwen_image"), 2.2059),
        (DensityConfig(shift_mode="official", family="qwen_image"), 2.2059),
        # FLUX.2's inference rule would give something else; it was trained with FLUX.1's line.
        (DensityConfig(shift_mode="official", family="flux"), 4.3829),
        (DensityConfig(shift_mode="resolution", shift=2.0), 2.0 * math.sqrt(1664 * 928) / 1024),
    ],
)
def test_the_shift_of_one_image(config, expected):
    assert density_shift(config, (16, 116, 208), True, 1.82) == pytest.approx(expected, rel=1e-4)


def test_flux2_trains_with_another_rule_than_it_samples_with():
    latent = (128, 64, 64)  # 1024 x 1024 pixels
    assert density_shift(DensityConfig(family="flux2"), latent, True, 2.0) == pytest.approx(math.exp(1.15), rel=1e-3)


def test_eps_models_have_no_shift_of_their_own():
    assert density_shift(DensityConfig(family="qwen_image"), (4, 8, 8), False, 1.0) == 1.0
    with pytest.raises(ValueError, match="is for flow models"):
        density_shift(DensityConfig(shift_mode="model"), (4, 8, 8), False, 1.0)


def test_independent_draws_are_of_the_same_density():
    config = replace(DensityConfig(), stratified=False)
    t = draw_t(config, 20_000, (4, 8, 8), Flow(), 1.0, torch.Generator().manual_seed(0))
    assert stats.kstest(torch.logit(t).numpy(), "norm").pvalue > 1e-4
    assert stats.kstest(torch.logit(t).numpy(), "norm").statistic > 1 / 20_000  # strata would be closer


def test_zero_weight_pieces_are_never_drawn():
    knots = ((0.0, 1.0), (0.2, 0.0), (0.8, 0.0), (1.0, 1.0))
    t = piecewise_icdf(torch.linspace(0, 1, 4001, dtype=torch.float64), knots)
    assert not bool(((t > 0.2 + 1e-9) & (t < 0.8 - 1e-9)).any())
    assert float(t[0]) == 0.0
    assert float(t[-1]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"density": "gauss"}, {"std": 0.0}, {"t_min": 0.5, "t_max": 0.5}, {"mode_scale": 2.0}, {"mean": float("nan")},
        {"density": "piecewise"}, {"density": "piecewise", "knots": ((0.5, 1.0), (0.2, 1.0))},
        {"density": "piecewise", "knots": ((0.0, 0.0), (1.0, 0.0))},
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(settings):
    with pytest.raises(
        ValueError,
        match="knots" if "knots" in settings or settings.get("density") == "piecewise" else "|".join(settings),
    ):
        DensityConfig(**settings)


def test_kohyas_words_say_the_same_density():
    """sigmoid(scale·z), then the shift: what kohya does with the numbers in its line."""
    line = equivalents(DensityConfig(mean=0.4, std=0.7), 2.0).splitlines()[0]
    scale, shift = (float(line.split(name)[1].split(",")[0]) for name in ("sigmoid_scale", "discrete_flow_shift"))
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    theirs = torch.sigmoid(scale * torch.special.ndtri(u))
    theirs = shift * theirs / (1 + (shift - 1) * theirs)
    assert torch.allclose(theirs, shifted_quantile(DensityConfig(mean=0.4, std=0.7), Flow(), 2.0)(u), atol=1e-3)
