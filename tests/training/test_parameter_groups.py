"""Parameters with a rate of their own: beside the others, on the same course, and in the same checkpoint."""

import pytest
import torch
from torch import nn

from tidetable.tests.training.solvable import PointDenoiser, point_dataset
from tidetable.training.checkpoint import clone
from tidetable.training.config import TrainConfig
from tidetable.training.engine import Trainer
from tidetable.training.guard import Guard, GuardConfig
from tidetable.training.optim import build_optimizer, learning_rate
from tidetable.training.optimizers import OptimizerConfig, ParameterGroup


NAMES = ["adamw", "adafactor", "sgd", *(["muon"] if hasattr(torch.optim, "Muon") else [])]
each_name = pytest.mark.parametrize("name", NAMES)


def tensors() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (4,), (3, 5), (5,))]


def descend(optimizer, parameters, steps: int = 5):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator) + p.detach()
        optimizer.step()


@each_name
def test_two_groups_of_one_rate_are_one_group(name):
    config = TrainConfig(learning_rate=0.1, optimizer=OptimizerConfig(name=name, weight_decay=0.01))
    together, apart = tensors(), tensors()
    descend(build_optimizer(together, config), together)
    descend(build_optimizer(apart[:2], config, [ParameterGroup(apart[2:], 0.1)]), apart)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    assert not torch.equal(together[0], tensors()[0])


@each_name
def test_the_groups_rates_are_each_what_it_would_be_alone(name):
    """No parameter's update depends on the others, so a group moves as in a run of its own at its rate."""
    config = {rate: TrainConfig(learning_rate=rate, optimizer=OptimizerConfig(name=name)) for rate in (0.1, 0.003)}
    both, first, second = tensors(), tensors(), tensors()
    descend(build_optimizer(both[:2], config[0.1], [ParameterGroup(both[2:], 0.003)]), both)
    for alone, rate in ((first, 0.1), (second, 0.003)):
        descend(build_optimizer(alone, config[rate]), alone)
    expected = [*first[:2], *second[2:]]
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(both, expected, strict=True))


class TwoPoints(PointDenoiser):
    """Half of its point belongs to another group."""

    def __init__(self):
        super().__init__()
        self.other = nn.Parameter(torch.zeros(3))

    def predict(self, x_t, t, conditions):
        scale = t.to(x_t.dtype)[:, None, None, None].clamp_min(0.05)
        return super().predict(x_t, t, conditions) - self.other[:, None, None] / scale


def trainer(name: str, **settings) -> Trainer:
    denoiser = TwoPoints()
    optimizer = OptimizerConfig(name=name, warmup=3, lr_schedule="linear", ema_decay=0.9)
    config = TrainConfig(steps=9, batch_size=4, learning_rate=0.1, optimizer=optimizer, ema_decay=0.9)
    others = [ParameterGroup([denoiser.other], 0.02)]
    return Trainer(config, denoiser, [denoiser.center], point_dataset(), others=others, **settings)


@each_name
def test_every_rate_takes_the_course_of_the_run_and_the_guards_scale(name):
    run = trainer(name)
    run.rate_scale = 0.5
    for step in range(9):
        event = run.train_step()
        rate = learning_rate(step, run.config) * 0.5
        assert event.learning_rate == rate
        assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([rate, rate / 5], rel=1e-12)


@each_name
def test_a_run_with_two_groups_goes_on_bit_for_bit(name):
    complete, first, second = (trainer(name, guard=Guard(GuardConfig(snapshot_every=2))) for _ in range(3))
    list(complete.run())
    for _ in range(4):
        first.train_step()
    second.load_state(clone(first.state()))
    list(second.run())
    assert all(torch.equal(a, b) for a, b in zip(complete.parameters, second.parameters, strict=True))
    assert all(p.any() for p in complete.parameters)
