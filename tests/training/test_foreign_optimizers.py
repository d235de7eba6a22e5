"""Optimizers of other packages, where they are installed: a run that was cut anywhere goes on bit for bit."""

import pytest
import torch

from tidetable.tests.training.solvable import PointDenoiser
from tidetable.training.checkpoint import map_tensors, read_newest, write_checkpoint
from tidetable.training.config import TrainConfig, with_optimizer
from tidetable.training.data import Dataset
from tidetable.training.engine import Trainer
from tidetable.training.events import StepDone, Validated
from tidetable.training.guard import Guard, GuardConfig
from tidetable.training.optimizers import FOREIGN, OptimizerConfig


WIDTH = 256
"""Numbers that are trained: a change of the last bit shows in one in twenty of them."""
WIDE = 8192
"""bitsandbytes keeps the state of fewer than 4096 numbers in 32 bits."""
CASES = {
    "adamw": {"name": "adamw"},
    "prodigy": {"name": "prodigy"},
    "8 bit": {"name": "adamw_8bit"},
    "schedule-free": {"name": "schedule_free_adamw"},
    "schedule-free, averaged": {"name": "schedule_free_adamw", "ema_decay": 0.9, "ema_device": "cpu"},
    "schedule-free, accumulated": {"name": "schedule_free_adamw", "accumulate": 3},
    **{
        name: {"name": "other", "class_name": name}
        for name in ("Lion", "AdaBelief", "CAME", "Adan", "SOAP", "ScheduleFreeAdamW", "ScheduleFreeSGD", "Shampoo")
    },
}


@pytest.fixture(params=CASES)
def settings(request):
    config = OptimizerConfig(warmup=2, **CASES[request.param])
    if config.name in FOREIGN:
        pytest.importorskip(FOREIGN[config.name][1])
    return config


def trainer(optimizer, validate_every=4, guard=True):
    denoiser = PointDenoiser()
    width = WIDE if optimizer.name == "adamw_8bit" else WIDTH
    denoiser.center = torch.nn.Parameter(torch.randn(width, generator=torch.Generator().manual_seed(0)))
    rate = 1.0 if optimizer.name == "prodigy" else 0.01
    config = TrainConfig(steps=14, learning_rate=rate, batch_size=2, seed=1, validate_every=validate_every)
    watch = Guard(GuardConfig(snapshot_every=3)) if guard else None
    point = torch.linspace(-1, 1, width)[:, None, None].expand(width, 2, 2)
    data = [Dataset([point] * count, [1.0] * count) for count in (12, 3)]
    return Trainer(with_optimizer(config, optimizer), denoiser, list(denoiser.parameters()), *data, watch)


def cut(run, step, after):
    """Consume the run up to an event of a kind after `step`; what it yielded is returned."""
    events = []
    for event in run.run():
        events.append(event)
        if event.step == step and isinstance(event, after):
            break
    return events


@pytest.mark.parametrize(("step", "after"), [(3, StepDone), (4, StepDone), (4, Validated), (13, StepDone)])
def test_a_cut_run_goes_on_bit_for_bit(settings, step, after, tmp_path):
    """After a validation too: the checkpoint is then made when the weights have been looked at."""
    complete = trainer(settings)
    expected = list(complete.run())
    first = trainer(settings)
    head = cut(first, step, after)
    write_checkpoint(tmp_path, step, first.state(), 1)
    second = trainer(settings)
    second.load_state(read_newest(tmp_path)[0])
    tail = list(second.run())
    if isinstance(head[-1], Validated):
        assert tail[0] == head.pop(), "the validation of that step is made again, with the same result"
    assert head + tail == expected
    assert torch.equal(second.denoiser.center, complete.denoiser.center)


def test_looking_changes_no_bit_of_what_is_learned(settings):
    runs = [trainer(settings, every) for every in (0, 1)]
    losses = [[event.loss for event in run.run() if isinstance(event, StepDone)] for run in runs]
    assert losses[0] == losses[1] and torch.equal(runs[0].denoiser.center, runs[1].denoiser.center)


def test_an_interrupted_look_gives_the_training_weights_back(settings):
    run, plain = trainer(settings), trainer(settings)
    for each in (run, plain):
        cut(each, 5, StepDone)
    with pytest.raises(KeyboardInterrupt), run.shown():
        raise KeyboardInterrupt
    assert torch.equal(run.denoiser.center, plain.denoiser.center)
    assert run.train_step() == plain.train_step()


def test_weights_that_are_put_back_take_the_optimizer_with_them(settings):
    """The guard restores a snapshot; training from there is what it would have been."""
    run, plain = trainer(settings), trainer(settings, guard=False)
    for each in (run, plain):
        cut(each, 9, StepDone)
    snapshot_step, weights = run.guard.snapshots[-1]
    assert snapshot_step == 9
    for _ in range(2):
        run.train_step()
    run.load_weights(weights)
    run.step = snapshot_step
    assert run.train_step() == plain.train_step()
    assert torch.equal(run.denoiser.center, plain.denoiser.center)


def test_what_is_used_of_a_schedule_free_run_is_its_average():
    """Defazio et al. 2024, equation 5: the average x, not the point y where gradients are taken."""
    pytest.importorskip("schedulefree")
    run = trainer(OptimizerConfig(name="schedule_free_adamw", warmup=0))
    events = list(run.run())
    (state,) = run.optimizer.state_dict()["state"].values()
    beta = run.optimizer.param_groups[0]["betas"][0]
    x = run.denoiser.center.detach().clone()
    run.finish()
    assert torch.equal(x, run.denoiser.center), "finishing twice changes nothing"
    run.optimizer.train()
    assert torch.allclose(run.denoiser.center, (1 - beta) * state["z"] + beta * x, atol=1e-6)
    assert events[-1].step == 14 and isinstance(events[-1], Validated)


def test_an_8_bit_state_is_8_bits_in_the_checkpoint(tmp_path):
    pytest.importorskip("bitsandbytes")
    run = trainer(OptimizerConfig(name="adamw_8bit", warmup=0))
    cut(run, 2, StepDone)
    write_checkpoint(tmp_path, 2, run.state(), 1)
    found = []
    map_tensors(read_newest(tmp_path)[0]["weights"]["optimizer"]["state"], lambda tensor: found.append(tensor))
    assert sum(tensor.dtype == torch.uint8 and tensor.numel() == WIDE for tensor in found) == 2


def test_what_is_shown_with_the_average_is_what_a_run_would_end_with(settings):
    run, plain = trainer(settings, validate_every=0), trainer(settings, validate_every=0)
    for each in (run, plain):
        cut(each, 6, StepDone)
    with run.shown(averaged=True):
        shown = run.denoiser.center.detach().clone()
    assert torch.equal(run.denoiser.center, plain.denoiser.center)
    assert run._validate() == plain._validate(), "a later look is not taken for the end of the run"
    plain.finish()
    assert torch.equal(shown, plain.denoiser.center)


@pytest.mark.parametrize("name", ["SAM", "Lookahead", "AdamMini", "Ranger21"])
def test_an_optimizer_that_wants_more_than_parameters_is_refused(name):
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ValueError, match=f"{name} cannot be made from parameters and a rate alone .* such as 'adamw'"):
        trainer(OptimizerConfig(name="other", class_name=name, warmup=0))
