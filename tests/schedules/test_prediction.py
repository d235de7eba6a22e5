"""Predictions: one linear system behind every conversion."""

import itertools

import pytest
import torch

from tidetable.schedules.prediction import PREDICTIONS, coefficients, convert, denoised, target, to_x0_eps
from tidetable.schedules.process import VE, VP, Flow


VP_SD = VP.from_betas()
PROCESSES = {"flow": Flow(), "vp": VP_SD, "vp-zero-terminal": VP_SD.zero_terminal(), "ve": VE(0.002, 80.0)}
BATCH = 4
SHAPES = [(BATCH, 3, BATCH), (BATCH, 3, 5, BATCH), (BATCH, 2, 3, 5, BATCH)]  # the width equals the batch
TIMES = [torch.tensor(0.37, dtype=torch.float64), torch.tensor([0.02, 0.31, 0.5, 0.93], dtype=torch.float64)]


def sample(process, shape, t):
    generator = torch.Generator().manual_seed(sum(shape))
    x0, eps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0, eps, process.mix(x0, eps, t)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("t", TIMES, ids=["t scalar", "t batch"])
def test_every_conversion_inverts_its_inverse(process, shape, t):
    x0, eps, x_t = sample(process, shape, t)
    values = {kind: target(kind, x0, eps, t, process) for kind in PREDICTIONS}
    for source, dest in itertools.product(PREDICTIONS, repeat=2):
        there = convert(values[source], source, dest, x_t, t, process)
        torch.testing.assert_close(there, values[dest], rtol=1e-8, atol=1e-8, msg=f"{source} -> {dest}")
        back = convert(there, dest, source, x_t, t, process)
        torch.testing.assert_close(back, values[source], rtol=1e-8, atol=1e-8, msg=f"{source} -> {dest} -> {source}")


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_perfect_predictions_give_the_sample_back(process, kind):
    t = TIMES[1]
    x0, eps, x_t = sample(process, SHAPES[1], t)
    value = target(kind, x0, eps, t, process)
    solved_x0, solved_eps = to_x0_eps(value, kind, x_t, t, process)
    torch.testing.assert_close(solved_x0, x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(solved_eps, eps, rtol=1e-8, atol=1e-8)


def test_definitions_against_independent_formulas():
    t = TIMES[1]
    column = t.view(-1, 1, 1, 1)
    x0, eps, x_t = sample(Flow(), SHAPES[1], t)
    # velocity is the time derivative of the flow path
    step = 1e-6
    slope = (Flow().mix(x0, eps, t + step) - Flow().mix(x0, eps, t - step)) / (2 * step)
    torch.testing.assert_close(target("velocity", x0, eps, t, Flow()), slope, rtol=1e-8, atol=1e-8)
    # score of N(x_t; alpha·x0, sigma²) in x_t
    torch.testing.assert_close(target("score", x0, eps, t, Flow()), -(x_t - (1 - column) * x0) / column**2)
    # v is the derivative by the angle phi of (alpha, sigma) = (cos phi, sin phi)
    phi = torch.atan2(VP_SD.sigma(t), VP_SD.alpha(t)).view(-1, 1, 1, 1)
    path = [torch.cos(phi + d) * x0 + torch.sin(phi + d) * eps for d in (step, -step)]
    torch.testing.assert_close(target("v", x0, eps, t, VP_SD), (path[0] - path[1]) / (2 * step), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["v", "x0", "velocity"])
def test_pure_noise_is_exact_where_the_prediction_knows_x0(kind):
    process, t = PROCESSES["vp-zero-terminal"], torch.ones(BATCH, dtype=torch.float64)
    x0, eps, x_t = sample(process, SHAPES[1], t)
    assert torch.equal(x_t, eps)
    value = target(kind, x0, eps, t, process)
    torch.testing.assert_close(denoised(value, kind, x_t, t, process), x0, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(convert(value, kind, "eps", x_t, t, process), eps, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", ["eps", "score"])
def test_noise_predictions_know_nothing_of_x0_in_pure_noise(kind):
    process = PROCESSES["vp-zero-terminal"]
    x0, eps, x_t = sample(process, SHAPES[1], torch.tensor(1.0))
    value = target(kind, x0, eps, 1.0, process)
    assert not torch.isfinite(denoised(value, kind, x_t, 1.0, process)).any()


def test_data_end_keeps_the_sample():
    x0, eps, x_t = sample(Flow(), SHAPES[0], torch.tensor(0.0))
    for kind in ("x0", "eps", "v", "velocity"):
        value = target(kind, x0, eps, 0.0, Flow())
        torch.testing.assert_close(denoised(value, kind, x_t, 0.0, Flow()), x0, rtol=0, atol=0)


def test_conversion_keeps_float32():
    x = torch.randn(2, 3, 4, 4)
    t = torch.tensor([0.2, 0.8], dtype=torch.float64)
    assert convert(x, "v", "eps", x, t, VP_SD).dtype == torch.float32
    assert target("velocity", x, x, t, Flow()).dtype == torch.float32


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'flow'.*velocity"):
        coefficients("flow", torch.tensor(1.0), torch.tensor(1.0))  # pyright: ignore[reportArgumentType]
