"""Memory that runs out in a step: fewer samples at once, the same batch, and a last word where that is not enough."""

import pytest
import torch

from tidetable.tests.training.solvable import PointDenoiser, point_dataset
from tidetable.training.config import TrainConfig
from tidetable.training.engine import Trainer
from tidetable.training.events import Notice, StepDone


class Small(PointDenoiser):
    """Holds `room` samples; half of a batch may be done before it is full."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def predict(self, x_t, t, conditions):
        if len(x_t) > self.room:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return super().predict(x_t, t, conditions)


def run(denoiser, batch_size=8):
    config = TrainConfig(steps=6, batch_size=batch_size, learning_rate=0.05, warmup_steps=0)
    trainer = Trainer(config, denoiser, [denoiser.center], point_dataset(16))
    return list(trainer.run()), trainer


@pytest.mark.parametrize(("room", "halvings"), [(8, []), (7, [4]), (3, [4, 2]), (1, [4, 2, 1])])
def test_the_batch_stays_the_same(room, halvings):
    large, small = Small(100), Small(room)
    expected, _ = run(large)
    events, trainer = run(small)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert trainer.rows_at_once == (halvings or [8])[-1] and len(notices) == len(halvings)
    assert all(
        f"going on with {size}, and the same batch of 8" in text for size, text in zip(halvings, notices, strict=True)
    )
    losses = [[e.loss for e in found if isinstance(e, StepDone)] for found in (expected, events)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(small.center, large.center, rtol=1e-5, atol=1e-6)
    assert set(small.batches) == {trainer.rows_at_once}, "and every later step begins with what fits"


def test_an_odd_batch_is_halved_upwards():
    _, trainer = run(Small(2), batch_size=5)
    assert trainer.rows_at_once == 2


def test_one_sample_that_does_not_fit_ends_the_run_in_words():
    with pytest.raises(torch.OutOfMemoryError, match="Training Memory with gradient_checkpointing 'blocks'"):
        run(Small(0))
