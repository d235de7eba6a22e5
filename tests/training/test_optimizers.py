"""Schedules by their ends and continuity, optimizers by a known optimum, accumulation by equality with one batch."""

import io
import math

import pytest
import torch

from tidetable.tests.training.solvable import CENTER, PointDenoiser, point_dataset
from tidetable.training.config import TrainConfig, with_optimizer
from tidetable.training.engine import Trainer
from tidetable.training.optim import MovingAverage, learning_rate
from tidetable.training.optimizers import BETAS, OptimizerConfig, adamw, course, find_class


SCHEDULES = ("constant", "linear", "cosine", "cosine_restarts", "rex")


def trainer(optimizer, **settings):
    denoiser = PointDenoiser()
    config = TrainConfig(**{"steps": 300, "learning_rate": 0.05, "seed": 1, **settings})
    return Trainer(with_optimizer(config, optimizer), denoiser, list(denoiser.parameters()), point_dataset())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_starts_at_the_peak_ends_where_it_should_and_is_continuous(schedule):
    values = [course(schedule, k / 10_000) for k in range(10_001)]
    assert values[0] == 1 and math.isclose(values[-1], float(schedule == "constant"), abs_tol=1e-12)
    jumps = [k for k in range(10_000) if abs(values[k + 1] - values[k]) > 1e-3]
    restart = [k for k in jumps if values[k + 1] < 0.99]
    assert not restart and len(jumps) == (schedule == "cosine_restarts")  # back to the peak, and nowhere else
    assert all(0 <= value <= 1 for value in values)


def test_the_schedules_at_half_time():
    assert course("linear", 0.5) == 0.5 and math.isclose(course("cosine", 0.5), 0.5)
    assert math.isclose(course("rex", 0.5), 2 / 3) and math.isclose(course("cosine_restarts", 0.25), 0.5)


def test_warm_up_in_steps_and_in_samples_is_the_same_rise():
    by_step = OptimizerConfig(warmup=10, accumulate=2)
    by_sample = OptimizerConfig(warmup=75, warmup_unit="samples", accumulate=2)  # 75 samples at 8 a step: 10 steps
    rates = [[c.rate(step, 50, 4) for step in range(50)] for c in (by_step, by_sample)]
    assert rates[0] == rates[1] and all(a < b for a, b in zip(rates[0][:10], rates[0][1:11], strict=True))
    assert rates[0][10] == 1 and rates[0][0] == 1 / 11


def test_the_cosine_is_the_one_of_a_run_without_settings():
    plain = TrainConfig(steps=40, warmup_steps=5)
    other = with_optimizer(plain, OptimizerConfig(warmup=5))
    for step in range(40):
        assert math.isclose(learning_rate(step, plain), learning_rate(step, other))


def test_final_rate_is_where_the_schedule_ends():
    config = OptimizerConfig(warmup=0, final_rate=0.1, lr_schedule="linear")
    assert config.rate(0, 10, 1) == 1 and math.isclose(config.rate(10, 10, 1), 0.1)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd", "muon"])
def test_torchs_optimizers_find_the_known_optimum(name):
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    rate = {"sgd": 0.02, "adafactor": 0.3}.get(name, 0.05)
    run = trainer(OptimizerConfig(name=name), steps=600, learning_rate=rate)
    start = (run.denoiser.center.detach() - torch.tensor(CENTER)).norm()
    list(run.run())
    assert (run.denoiser.center.detach() - torch.tensor(CENTER)).norm() < 0.05 * start


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd", "muon"])
def test_the_state_goes_through_a_file_and_the_run_goes_on_bit_for_bit(name):
    def quadratic(parameters):
        return sum(((p - 0.3) ** 2).sum() for p in parameters)

    def fresh():
        generator = torch.Generator().manual_seed(0)
        shapes = ((4, 3), (3, 4), (4, 2, 3, 3), (5,))
        parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
        from tidetable.training.optimizers import make_optimizer

        return parameters, make_optimizer(parameters, OptimizerConfig(name=name, weight_decay=0.01), 0.01)

    def advance(parameters, optimizer, steps):
        for _ in range(steps):
            quadratic(parameters).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = fresh()
    advance(whole, optimizer, 6)
    half, optimizer = fresh()
    advance(half, optimizer, 3)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    again, restored = fresh()
    restored.load_state_dict(torch.load(buffer, weights_only=True))  # tensors, numbers, lists and dicts only
    for target, source in zip(again, half, strict=True):
        target.data.copy_(source)
    advance(again, restored, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_the_fused_pass_of_adamw_is_adamw_and_a_device_without_one_gets_the_plain_one():
    gradients = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    plain, ours = (torch.nn.Parameter(torch.ones(7)) for _ in range(2))
    settings = {"lr": 0.1, "betas": BETAS, "weight_decay": 0.01}
    optimizers = torch.optim.AdamW([plain], foreach=False, **settings), adamw([{"params": [ours]}], **settings)
    for gradient in gradients:
        for parameter, optimizer in zip((plain, ours), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert optimizers[1].defaults["fused"] and torch.allclose(plain, ours, rtol=1e-5, atol=1e-6)
    assert not adamw([{"params": [torch.nn.Parameter(torch.ones(7, device="meta"))]}], **settings).defaults["fused"]


def test_k_batches_of_b_are_one_batch_of_k_times_b():
    runs = [trainer(OptimizerConfig(accumulate=4), batch_size=2, steps=30), trainer(None, batch_size=8, steps=30)]
    losses = [[event.loss for event in run.run()] for run in runs]
    assert runs[0].denoiser.batches == [2] * 120 and runs[1].denoiser.batches == [8] * 30
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5)
    assert torch.allclose(runs[0].denoiser.center, runs[1].denoiser.center, atol=1e-5)


def test_the_average_in_main_memory_is_the_average():
    parameter = torch.nn.Parameter(torch.zeros(3))
    averages = [MovingAverage([parameter], 0.9, device) for device in (None, "cpu")]
    for step in range(5):
        parameter.data += step
        for average in averages:
            average.update()
    assert torch.equal(averages[0].average[0], averages[1].average[0])


@pytest.mark.parametrize(("name", "package"), [("prodigy", "prodigyopt"), ("adamw_8bit", "bitsandbytes")])
def test_a_package_that_is_not_installed_is_named(name, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.setitem(__import__("sys").modules, f"{package}.optim", None)
    with pytest.raises(ValueError, match=f"optimizer '{name}' needs the package {package}, .* or use 'adamw'"):
        find_class(OptimizerConfig(name=name))


@pytest.mark.parametrize("name", ["prodigy", "schedule_free_adamw", "other"])
def test_installed_packages_find_the_optimum(name):
    module = {"prodigy": "prodigyopt", "schedule_free_adamw": "schedulefree", "other": "pytorch_optimizer"}[name]
    pytest.importorskip(module)
    rate = 1.0 if name == "prodigy" else 0.05
    run = trainer(OptimizerConfig(name=name, class_name="AdaBelief"), steps=600, learning_rate=rate)
    list(run.run())
    assert torch.allclose(run.denoiser.center, torch.tensor(CENTER), atol=0.1)


def test_an_unknown_class_of_pytorch_optimizer_names_near_ones():
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ValueError, match="pytorch-optimizer has no optimizer 'Lionn': did you mean .*Lion"):
        find_class(OptimizerConfig(name="other", class_name="Lionn"))


def test_a_run_shorter_than_its_warm_up_is_refused():
    with pytest.raises(ValueError, match="the warm-up takes 20 steps of a run of 20: lower warmup, or raise steps"):
        with_optimizer(TrainConfig(steps=20), OptimizerConfig(warmup=20))


@pytest.mark.parametrize(
    ("field", "value"),
    [("accumulate", 0), ("restarts", 0), ("warmup", -1), ("final_rate", 1.1), ("weight_decay", float("nan")),
     ("max_grad_norm", float("inf")), ("ema_decay", 1.0)],
)  # fmt: skip
def test_a_bad_number_is_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}, but it must be "):
        OptimizerConfig(**{field: value})


def test_other_needs_a_name():
    with pytest.raises(ValueError, match="optimizer 'other' needs class_name"):
        OptimizerConfig(name="other")
