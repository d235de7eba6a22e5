"""The weights that a run would end with now, for a look at them between two steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .engine import Trainer
from .optimizers import set_training_mode


@contextmanager
def finished_weights(trainer: Trainer) -> Iterator[None]:
    """`Trainer.finish` for a moment: the moving average where there is one. At the end all bits are those of before.

    Between two steps only: the optimizer is left in the mode in which it steps.
    """
    kept = [parameter.detach().clone() for parameter in trainer.parameters]
    try:
        trainer.finish()
        yield
    finally:
        # Schedule-free optimizers compute the way back, which rounds.
        set_training_mode(trainer.optimizer, True)
        with torch.no_grad():
            for parameter, before in zip(trainer.parameters, kept, strict=True):
                parameter.copy_(before)
