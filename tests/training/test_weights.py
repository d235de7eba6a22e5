"""Laws of the weights, losses, conversions and noises of an objective."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tidetable.schedules.prediction import convert, target
from tidetable.schedules.process import VP, Flow
from tidetable.training.losses import element_loss, huber_c
from tidetable.training.noise import ot_assignment, pyramid_noise, shape_noise
from tidetable.training.objective import loss_for_batch
from tidetable.training.recipe import ObjectiveConfig
from tidetable.training.weights import SNR_FLOOR, gain, loss_weight


SDXL = VP.from_betas()
KINDS = ("eps", "v", "x0", "velocity")
T = torch.tensor([0.02, 0.146, 0.4, 0.8, 1.0], dtype=torch.float64)
INSIDE = torch.tensor([0.02, 0.1, 0.4, 0.8, 0.95], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def wrong_by(process, kind, error):
    """A denoiser that is off by `error` [B, C, H, W] in its own prediction."""

    def predict(x_t, t, conditions):
        return conditions[0] + error

    return SimpleNamespace(process=process, prediction=kind, predict=predict)


# ── conversions ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("process", [SDXL, Flow()], ids=["vp", "flow"])
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("dest", KINDS)
def test_the_gain_is_how_a_converted_error_grows(process, source, dest):
    x_t, value, error = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64, generator=generator())
    moved = convert(value + error, source, dest, x_t, INSIDE, process) - convert(
        value, source, dest, x_t, INSIDE, process
    )
    factor = gain(source, dest, process.alpha(INSIDE), process.sigma(INSIDE))
    assert torch.allclose(moved, factor[:, None, None, None] * error, rtol=1e-8, atol=1e-8)


def test_l_x0_is_sigma_squared_l_eps_and_t_squared_l_velocity():
    x0, eps, error = torch.randn(3, 5, 2, 4, 4, generator=generator())

    def losses(process, kind, space):
        denoiser = wrong_by(process, kind, error)
        goal = target(kind, x0, eps, INSIDE, process)
        return loss_for_batch(denoiser, x0, [goal], eps, INSIDE, ObjectiveConfig(prediction=space)).double()

    sigma = SDXL.ratio(INSIDE)
    assert torch.allclose(losses(SDXL, "eps", "x0"), sigma**2 * losses(SDXL, "eps", "eps"), rtol=1e-4)
    assert torch.allclose(losses(SDXL, "eps", "v"), (1 + sigma**2) * losses(SDXL, "eps", "native"), rtol=1e-4)
    assert torch.allclose(losses(SDXL, "eps", "velocity"), (1 + sigma) ** 2 * losses(SDXL, "eps", "eps"), rtol=1e-4)
    flow = losses(Flow(), "velocity", "native")
    assert torch.allclose(losses(Flow(), "velocity", "x0"), INSIDE**2 * flow, rtol=1e-4)
    assert torch.allclose(losses(Flow(), "velocity", "eps"), (1 - INSIDE) ** 2 * flow, rtol=1e-4)


def test_a_conversion_without_bound_stops_at_max_weight():
    """x0 to eps is 1/t² in flow: infinite at t = 0."""
    x0, eps = torch.randn(2, 3, 2, 4, 4, generator=generator())
    t = torch.tensor([0.0, 1e-6, 0.5], dtype=torch.float64)
    config = ObjectiveConfig(prediction="eps", max_weight=50.0)
    loss = loss_for_batch(wrong_by(Flow(), "x0", torch.ones_like(x0)), x0, [x0], eps, t, config)
    assert torch.allclose(loss, torch.tensor([50.0, 50.0, 1.0]), rtol=1e-5)


# ── closed form on Gaussian data ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("space", KINDS)
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_the_best_denoiser_of_gaussian_data_leaves_the_loss_of_the_closed_form(space, scale):
    """x0 ~ N(0, s²): E|x0 - E[x0|x_t]|² is s²·t²/(s²(1-t)² + t²), and the other spaces follow by their gains."""
    t, count = 0.4, 200_000
    x0, eps = torch.randn(2, 1, 1, count, generator=generator())
    x0 = scale * x0
    variance = scale**2 * (1 - t) ** 2 + t**2

    def best(x_t, time, conditions):
        return (x_t - scale**2 * (1 - t) / variance * x_t) / t  # the velocity of the posterior mean

    denoiser = SimpleNamespace(process=Flow(), prediction="velocity", predict=best)
    time = torch.tensor([t], dtype=torch.float64)
    loss = loss_for_batch(denoiser, x0, [None], eps, time, ObjectiveConfig(prediction=space))
    least_x0 = scale**2 * t**2 / variance
    noise_power = (1 - t) ** 2 + t**2
    expected = {
        "x0": least_x0,
        "eps": least_x0 * ((1 - t) / t) ** 2,
        "velocity": least_x0 / t**2,
        "v": least_x0 * (noise_power / t) ** 2,
    }[space]
    assert float(loss) == pytest.approx(expected, rel=0.02)


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def snr():
    return torch.exp(SDXL.log_snr(T))


@pytest.mark.parametrize(
    ("weighting", "gamma", "space", "expected"),
    [
        ("min_snr", 5.0, "eps", lambda snr: snr.clamp(max=5) / snr),
        ("min_snr", 5.0, "v", lambda snr: snr.clamp(max=5) / (snr + 1)),
        ("min_snr", 5.0, "x0", lambda snr: snr.clamp(max=5)),
        ("soft_min_snr", 4.0, "x0", lambda snr: 4 * snr / (4 + snr)),
        ("soft_min_snr", 4.0, "eps", lambda snr: 4 / (4 + snr)),
        ("debiased", 5.0, "eps", lambda snr: snr.clamp(max=1000) ** -0.5),
        ("p2", 0.5, "eps", lambda snr: (1 + snr) ** -0.5),
        ("p2", 1.0, "v", lambda snr: snr / (1 + snr) ** 2),
    ],
)
def test_a_weight_is_the_papers(weighting, gamma, space, expected):
    found = loss_weight(ObjectiveConfig(weighting=weighting, gamma=gamma), space, SDXL, T)
    assert torch.allclose(found, expected(snr()), rtol=1e-9)


def test_min_snr_of_sdxl_as_measured():
    """reference/training.md, 2.3: 0.0043, 0.59 and 1 at rows 0, 100 and 300."""
    rows = torch.tensor([0, 100, 300], dtype=torch.float64) / 999
    weight = loss_weight(ObjectiveConfig(weighting="min_snr"), "eps", SDXL, rows)
    assert torch.allclose(weight, torch.tensor([0.0043, 0.59, 1.0], dtype=torch.float64), atol=5e-3)


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_flow_weights_are_esser_et_als(weighting):
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = t**-2 if weighting == "sigma_sqrt" else 2 / (math.pi * (1 - 2 * t + 2 * t**2))
    assert torch.allclose(loss_weight(ObjectiveConfig(weighting=weighting), "velocity", Flow(), t), expected)


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "debiased", "p2", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("space", KINDS)
def test_a_weight_is_the_same_training_in_every_space(weighting, space):
    """w_space · L_space is one number, whatever the space, on both processes."""
    config = ObjectiveConfig(weighting=weighting, max_weight=1e30)
    for process in (SDXL, Flow()):
        t = INSIDE[:4]
        carried = gain("x0", space, process.alpha(t), process.sigma(t)) ** 2
        ours = loss_weight(config, space, process, t) * carried
        assert torch.allclose(ours, loss_weight(config, "x0", process, t), rtol=1e-9)


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "debiased", "p2", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("space", KINDS)
@pytest.mark.parametrize("process", [SDXL, SDXL.zero_terminal(), Flow()], ids=["vp", "zero-terminal", "flow"])
def test_no_weight_blows_up_at_the_ends(weighting, space, process):
    config = ObjectiveConfig(weighting=weighting, max_weight=100.0)
    weight = loss_weight(config, space, process, torch.tensor([0.0, 1e-5, 1 - 1e-5, 1.0], dtype=torch.float64))
    assert bool(torch.isfinite(weight).all())
    assert bool((weight >= 0).all())
    assert weight.max() <= 100.0


@pytest.mark.parametrize("space", ["eps", "v"])
def test_min_snr_trains_the_last_step_of_a_zero_terminal_schedule(space):
    weight = loss_weight(ObjectiveConfig(weighting="min_snr"), space, SDXL.zero_terminal(), torch.ones(1).double())
    expected = 1.0 if space == "eps" else SNR_FLOOR / (SNR_FLOOR + 1)
    assert float(weight) == pytest.approx(expected, rel=0.01)


# ── losses ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pseudo_huber_is_square_for_small_and_linear_for_large_errors():
    config = ObjectiveConfig(loss="huber", huber_c=0.5)
    small, large = torch.full((1, 4), 1e-3), torch.full((1, 4), 1e4)
    t = torch.tensor([0.5], dtype=torch.float64)
    assert torch.allclose(element_loss(small, config, Flow(), t), small**2, rtol=1e-4)
    assert torch.allclose(element_loss(large, config, Flow(), t), 2 * 0.5 * large, rtol=1e-3)
    wide = replace(config, huber_c=100.0)
    noise = torch.randn(1, 100, generator=generator())
    assert torch.allclose(element_loss(noise, wide, Flow(), t), noise**2, rtol=2e-3)
    assert torch.equal(element_loss(-noise, replace(config, loss="l1"), Flow(), t), noise.abs())


@pytest.mark.parametrize("schedule", ["exponential", "snr"])
def test_a_huber_schedule_falls_from_one_to_c(schedule):
    config = ObjectiveConfig(loss="huber", huber_c=0.2, huber_schedule=schedule)
    c = huber_c(config, Flow(), torch.linspace(0, 1, 11, dtype=torch.float64))
    assert bool((c.diff() < 0).all())
    assert float(c[0]) == pytest.approx(1.0)
    assert float(c[-1]) == pytest.approx(0.2)


# ── noise ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_offset_noise_adds_its_variance_to_the_channel_means():
    eps, x0 = torch.randn(2, 4000, 2, 8, 8, generator=generator())
    shaped, seen = shape_noise(eps, x0, ObjectiveConfig(offset_noise=0.5), generator(1))
    assert float(shaped.mean((2, 3)).var()) == pytest.approx(0.25 + 1 / 64, rel=0.1)
    assert torch.equal(shaped, seen)


def test_pyramid_noise_keeps_its_size_and_moves_power_to_coarse_scales():
    eps = torch.randn(500, 2, 16, 16, generator=generator())
    noise = pyramid_noise(eps, 0.6, generator(1))
    assert float(noise.std()) == pytest.approx(1.0)
    assert noise.mean((2, 3)).var() > 3 * eps.mean((2, 3)).var()


def test_input_perturbation_is_seen_but_not_in_the_target():
    eps, x0 = torch.randn(2, 500, 2, 8, 8, generator=generator())
    shaped, seen = shape_noise(eps, x0, ObjectiveConfig(input_perturbation=0.3), generator(1))
    assert torch.equal(shaped, eps)
    assert float((seen - eps).std()) == pytest.approx(0.3, rel=0.02)


def test_pairing_is_the_best_of_all_permutations():
    from itertools import permutations

    eps, x0 = torch.randn(2, 6, 3, 4, generator=generator(3))
    rows = ot_assignment(x0, eps)
    costs = [float((x0 - eps[list(order)]).square().sum()) for order in permutations(range(6))]
    assert sorted(rows.tolist()) == list(range(6))
    assert float((x0 - eps[rows]).square().sum()) == pytest.approx(min(costs))


@pytest.mark.parametrize(
    ("field", "value"),
    [("huber_c", 0.0), ("gamma", -1.0), ("pyramid_discount", 1.0), ("offset_noise", -0.1), ("loss", "cube"),
     ("weighting", "some"), ("flow", "on"), ("max_weight", float("inf"))],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        ObjectiveConfig(**{field: value})
