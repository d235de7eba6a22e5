"""The loss measures the error in the native prediction, sample by sample."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tidetable.schedules.prediction import target
from tidetable.schedules.process import VP, Flow
from tidetable.training.objective import loss_for_batch


CASES = [
    (Flow(), "velocity"),
    (VP.from_betas(), "eps"),
    (VP.from_betas(), "v"),
    (VP.from_betas(), "x0"),
    (VP.from_betas().zero_terminal(), "v"),
]


def perfect(process, prediction, x0, eps, error):
    """A denoiser that knows the answer and is off by `error` [B]."""

    def predict(x_t, t, conditions):
        return target(prediction, x0, eps, t, process) + error[:, None, None, None]

    return SimpleNamespace(process=process, prediction=prediction, predict=predict, gradient_context=nullcontext)


@pytest.mark.parametrize(("process", "prediction"), CASES)
def test_loss_is_the_squared_native_error_of_each_sample(process, prediction):
    x0, eps = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64)
    error = torch.tensor([0.0, 1.0, -2.0, 0.5], dtype=torch.float64)
    loss = loss_for_batch(perfect(process, prediction, x0, eps, error), x0, [None] * 4, eps, t)
    assert torch.allclose(loss, error.float() ** 2, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 3, 4), (4, 3, 4, 4), (4, 3, 2, 4, 4)])
def test_one_loss_a_sample_for_every_rank_of_latent(shape):
    x0, eps = torch.randn(2, *shape)
    denoiser = SimpleNamespace(process=Flow(), prediction="velocity", predict=lambda x_t, t, c: torch.zeros_like(x_t))
    loss = loss_for_batch(denoiser, x0, [None] * 4, eps, torch.full((4,), 0.5))
    assert torch.allclose(loss, (eps - x0).square().flatten(1).mean(1))
