"""The loop against a problem whose answer is known."""

import math

import pytest
import torch

from tidetable.tests.training.solvable import CENTER, PointDenoiser, point_dataset
from tidetable.training.config import TrainConfig
from tidetable.training.engine import MAX_SKIPPED, Trainer
from tidetable.training.events import StepDone, Validated
from tidetable.training.optim import MovingAverage, learning_rate, total_norm


def trainer(denoiser=None, held_out=None, data=None, **settings):
    denoiser = denoiser or PointDenoiser()
    config = TrainConfig(**{"steps": 200, "learning_rate": 0.05, "warmup_steps": 5, "seed": 1, **settings})
    return Trainer(config, denoiser, list(denoiser.parameters()), data or point_dataset(), held_out)


def test_it_finds_the_known_optimum():
    run = trainer(steps=400)
    list(run.run())
    assert torch.allclose(run.denoiser.center, torch.tensor(CENTER), atol=1e-2)


def test_batch_of_four_means_four_rows_through_the_network():
    run = trainer(batch_size=4, steps=10)
    list(run.run())
    assert run.denoiser.batches == [4] * 10


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    runs = [trainer(seed=seed, steps=50) for seed in (1, 1, 2)]
    losses = [[event.loss for event in run.run()] for run in runs]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(runs[0].denoiser.center, runs[1].denoiser.center)


def test_stopping_the_consumer_keeps_what_was_learned():
    complete, stopped = trainer(steps=50, lr_schedule="constant"), trainer(steps=500, lr_schedule="constant")
    list(complete.run())
    for event in stopped.run():
        if isinstance(event, StepDone) and event.step == 50:
            break
    assert torch.equal(stopped.denoiser.center, complete.denoiser.center)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    run = trainer()
    before = run.denoiser.center.detach().clone()
    original = run.denoiser.predict
    run.denoiser.predict = lambda *args: original(*args) * float("nan")
    event = run.train_step()
    assert event.skipped and torch.equal(run.denoiser.center, before)
    run.denoiser.predict = original
    assert not run.train_step().skipped and run.skipped == 0


def test_a_run_of_bad_steps_is_given_up_with_advice():
    run = trainer()
    run.denoiser.predict = lambda x_t, t, c: x_t * run.denoiser.center.sum() * float("nan")
    with pytest.raises(ValueError, match=rf"not finite in {MAX_SKIPPED} steps in a row .* lower learning_rate"):
        list(run.run())


def test_gradients_are_clipped_to_the_norm():
    run = trainer(max_grad_norm=0.01)
    run._forward_backward(torch.Generator().manual_seed(0))
    norm = run._clip_gradients()
    assert norm > 0.01
    assert math.isclose(run.denoiser.center.grad.norm().item(), 0.01, rel_tol=1e-3)


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e9])
def test_clipping_is_torchs(limit):
    run = trainer(max_grad_norm=limit)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), ())]
    run.parameters = [*parameters, torch.nn.Parameter(torch.zeros(2))]  # the last one gets no gradient
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    expected = [torch.nn.Parameter(torch.zeros_like(p)) for p in parameters]
    for parameter, other in zip(parameters, expected, strict=True):
        other.grad = parameter.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(expected, limit or float("inf"))
    assert math.isclose(run._clip_gradients(), norm.item(), rel_tol=1e-6)
    for parameter, other in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-5)


def test_gradients_on_two_devices_have_one_norm():
    """Torch's meta device stands for a graphics card: like one it refuses tensors from elsewhere."""
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3) + torch.ones(3, device="meta")
    norm = total_norm([torch.ones(3, device="meta"), torch.ones(2, 2), torch.ones((), device="meta")])
    assert norm.shape == () and norm.device.type == "meta"


def test_warmup_rises_and_cosine_falls_to_zero():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[0] > 0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == 1.0 and rates[-1] < 1e-3 and max(rates) == 1.0


def test_moving_average_is_a_weighted_mean_of_the_past():
    parameter = torch.nn.Parameter(torch.zeros(1))
    average = MovingAverage([parameter], 0.9)
    expected = 0.0
    for step in range(50):
        parameter.data.fill_(float(step))
        average.update()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    average.copy_to_parameters()
    assert math.isclose(parameter.item(), expected, rel_tol=1e-5)


def test_validation_is_fixed_comes_first_and_last_and_falls():
    run = trainer(held_out=point_dataset(5), validate_every=80, steps=200)
    validations = [event for event in run.run() if isinstance(event, Validated)]
    assert [event.step for event in validations] == [0, 80, 160, 200]
    assert validations[-1].loss < 0.01 * validations[0].loss
    again = next(iter(trainer(held_out=point_dataset(5)).run()))
    assert again == validations[0]


def test_validation_does_not_depend_on_the_batch_size():
    losses = [next(iter(trainer(held_out=point_dataset(5), batch_size=size).run())).loss for size in (1, 2, 5, 16)]
    assert max(losses) - min(losses) < 1e-6 * losses[0]


def test_caption_dropout_replaces_the_condition_at_its_rate():
    run = trainer(data=point_dataset(12, empty=0.0), caption_dropout=0.25, batch_size=12, steps=300)
    seen = []
    original = run.denoiser.predict
    run.denoiser.predict = lambda x_t, t, conditions: (seen.extend(conditions), original(x_t, t, conditions))[1]
    list(run.run())
    share = seen.count(0.0) / len(seen)
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(seen))


def test_dropout_without_an_empty_conditioning_is_refused():
    with pytest.raises(ValueError, match=r"caption_dropout is 0\.1, but no empty conditioning"):
        trainer(caption_dropout=0.1)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="there is nothing to train"):
        Trainer(TrainConfig(), PointDenoiser(), [], point_dataset())
