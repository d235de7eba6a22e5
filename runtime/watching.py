"""Those who look at a run while it trains: previews and TensorBoard."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ..training.engine import Trainer
from .board import Board
from .previews import PreviewConfig, Previewer
from .progress import TrainingReporter
from .trainable import ComfyDenoiser
from .training_run import RunKeeper


@contextmanager
def watched(
    trainer: Trainer,
    reporter: TrainingReporter,
    denoiser: ComfyDenoiser,
    keeper: RunKeeper | None,
    preview: PreviewConfig | None,
) -> Iterator[Previewer | None]:
    """Let them listen to the reporter, after the checkpoints. What cannot work is refused before the first step.

    TensorBoard listens in the first of several processes only; previews are for one process.
    """
    with ExitStack() as stack:
        if keeper is not None and keeper.config.tensorboard and keeper.leads:
            stack.callback(Board(keeper.name, reporter, trainer.step).close)
        name = None if keeper is None else keeper.name
        if preview is not None and trainer.world.size > 1:
            raise ValueError("previews are drawn by one process, and there are several: disconnect preview")
        yield None if preview is None else Previewer(preview, denoiser, trainer, reporter, name)
