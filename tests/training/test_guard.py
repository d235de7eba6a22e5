"""The guard against runs that go wrong on purpose: one broken sample, broken weights, and runs that are healthy."""

import math
from collections import deque

import pytest
import torch

from tidetable.tests.training.solvable import CENTER, PointDenoiser, point_dataset
from tidetable.training.config import TrainConfig
from tidetable.training.engine import Trainer
from tidetable.training.events import Notice, StepDone
from tidetable.training.guard import ENOUGH, PATIENCE, Guard, GuardConfig, robust_z


def trainer(guard: bool = True, data=None, denoiser=None, watch=None, **settings):
    denoiser = denoiser or PointDenoiser()
    config = TrainConfig(
        **{"steps": 300, "learning_rate": 0.05, "warmup_steps": 5, "batch_size": 2, "max_grad_norm": 0.0, **settings}
    )
    watch = watch or GuardConfig()
    return Trainer(
        config, denoiser, list(denoiser.parameters()), data or point_dataset(), None, Guard(watch) if guard else None
    )


def distance(run) -> float:
    return (run.denoiser.center.detach() - torch.tensor(CENTER)).norm().item()


def run_with(run, step, change):
    """Consume the run and call `change` after a step."""
    events = []
    for event in run.run():
        events.append(event)
        if isinstance(event, StepDone) and event.step == step:
            change()
    return events


def poisoned(guard: bool):
    """From step 150 on one of the twelve samples is broken; it comes back in every epoch."""
    data = point_dataset()
    run = trainer(guard, data)
    events = run_with(run, 150, lambda: data.latents.__setitem__(3, torch.full((3, 4, 4), 1e4)))
    return run, events


def test_a_broken_sample_ruins_an_unguarded_run_and_not_a_guarded_one():
    clean = trainer(False)
    list(clean.run())
    unguarded, _ = poisoned(False)
    guarded, events = poisoned(True)
    assert distance(clean) < 0.02
    assert distance(unguarded) > 0.3
    assert distance(guarded) < 0.02
    skipped = [event.step for event in events if isinstance(event, StepDone) and event.skipped]
    assert len(skipped) == 25 and min(skipped) > 150, "once in each of the 25 epochs of six steps"
    assert guarded.guard.restores == 0


def test_broken_weights_are_put_back():
    def breaking(guard):
        run = trainer(guard)
        return run, run_with(run, 200, lambda: run.denoiser.center.data.fill_(300.0))

    unguarded, _ = breaking(False)
    guarded, events = breaking(True)
    assert distance(unguarded) > 100
    assert distance(guarded) < 0.2
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert notice.step == 200 + PATIENCE and "the weights are those of step 150 again" in notice.text
    rates = [event.learning_rate for event in events if isinstance(event, StepDone)]
    assert rates[201] > 1.9 * rates[202]


def test_a_snapshot_that_is_too_young_to_be_known_good_is_not_used():
    run = trainer(watch=GuardConfig(snapshot_every=50))
    events = run_with(run, 201, lambda: run.denoiser.center.data.fill_(300.0))
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert "the weights are those of step 150 again" in notice.text


def test_it_stops_after_the_last_restore_with_the_good_weights_in_place():
    run = trainer(watch=GuardConfig(max_restores=2))
    original, reached = run.denoiser.predict, []

    def spoil(x_t, t, conditions):
        return original(x_t, t, conditions) * (1.0 if run.step < 100 else 1e4)

    run.denoiser.predict = spoil
    with pytest.raises(ValueError, match=r"put the weights back 2 times .* lower learning_rate \(now 0\.05\)"):
        reached.extend(run.run())
    assert run.step == 100 + 3 * PATIENCE and run.whole
    assert distance(run) < distance(trainer())


def test_not_finite_in_a_row_is_put_back_too():
    run = trainer()
    events = run_with(run, 120, lambda: run.denoiser.center.data.fill_(float("nan")))
    assert any(isinstance(event, Notice) for event in events)
    assert distance(run) < 0.05


def test_the_statistics_survive_a_checkpoint():
    first = trainer(steps=60)
    list(first.run())
    second = trainer(steps=60)
    second.load_state(first.state())
    assert second.guard.logs == first.guard.logs and len(second.guard.logs["loss"]) == 60


def test_a_healthy_run_is_the_same_with_and_without_a_guard():
    watched, plain = trainer(seed=1), trainer(False, seed=1)
    list(watched.run())
    list(plain.run())
    assert torch.equal(watched.denoiser.center, plain.denoiser.center)


def test_dead_tensors_and_vanishing_updates_are_reported():
    denoiser = PointDenoiser()
    denoiser.unused = torch.nn.Parameter(torch.zeros(4))
    notices = [event.text for event in trainer(denoiser=denoiser).run() if isinstance(event, Notice)]
    assert len(notices) == 1 and "1 of 2 trained tensors are still zero after 100 steps" in notices[0]
    still = trainer(learning_rate=1e-12, steps=60, denoiser=PointDenoiser())
    still.denoiser.center.data.fill_(1.0)
    notices = [event.text for event in still.run() if isinstance(event, Notice)]
    assert len(notices) == 1 and "of their size since step 0: raise learning_rate" in notices[0]


# ── the statistics ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_robust_z_is_the_z_score_of_clean_data_and_ignores_outliers():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4000, generator=generator, dtype=torch.float64).mul(0.5).tolist()
    assert math.isclose(robust_z(1.0, deque(values)), 2.0, rel_tol=0.06)
    spoiled = values + [1e6] * 400
    assert math.isclose(robust_z(1.0, deque(spoiled)), 2.0, rel_tol=0.25)
    assert robust_z(1e9, deque(values[: ENOUGH - 1])) == 0.0


@pytest.mark.parametrize("spread", [0.05, 0.5, 1.5])
def test_false_alarms_on_log_normal_losses_are_rarer_than_one_in_two_thousand(spread):
    """Losses of one sample at random noise levels spread over orders of magnitude; the trend falls a hundredfold."""
    generator = torch.Generator().manual_seed(1)
    run, alarms, count = trainer(), 0, 20_000
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64) * spread
    for step, (loss, norm) in enumerate(noise.tolist()):
        trend = -4.6 * step / count
        alarms += not run.guard.accepts(run, math.exp(trend + loss), math.exp(trend + norm))
    assert alarms / count < 1 / 2000


@pytest.mark.parametrize(
    ("field", "value"),
    [("threshold", 0.0), ("threshold", float("nan")), ("snapshot_every", 0), ("max_restores", 0), ("rate_factor", 0.0),
     ("rate_factor", 1.5), ("dead_after", -1)],
)  # fmt: skip
def test_a_bad_setting_is_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}, but it must be "):
        GuardConfig(**{field: value})
