"""A run's numbers for TensorBoard, where somebody has installed it."""

from typing import Any

from ..training.events import Event, Notice, StepDone, Validated
from .paths import tensorboard_folder
from .progress import TrainingReporter


def require_tensorboard() -> Any:
    """torch's writer of event files. ValueError where it cannot be imported."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"tensorboard is on, but Python cannot import it ({error}): install the package 'tensorboard' with the pip "
            "of ComfyUI's Python and restart, or turn it off and use `log`, which has the same numbers as JSON lines"
        ) from error
    return SummaryWriter


class Board:
    """Listens to the reporter and writes scalars by step to output/tidetable/tensorboard/<run>."""

    def __init__(self, run: str, reporter: TrainingReporter, step: int):
        """`step` was the last one of an earlier part of the run; what was written beyond it is hidden."""
        self.reporter = reporter
        self.writer = require_tensorboard()(str(tensorboard_folder(run)), purge_step=step + 1)
        reporter.listeners.append(self)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.writer.add_text("notices", event.text, event.step)
            return
        more = self.reporter.more(event)
        if isinstance(event, Validated):
            numbers = {"validation/loss": event.loss, "validation/base": more["base"]}
            numbers |= {f"validation_by_t/{t:g}": loss for t, loss in event.by_t}
        else:
            numbers = {"train/loss": event.loss, "train/smooth": more["smooth"], **_others(event, more)}
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, event.step)

    def close(self) -> None:
        self.writer.close()


def _others(event: StepDone, more: dict[str, float]) -> dict[str, float]:
    return {
        "train/learning_rate": event.learning_rate,
        "train/grad_norm": event.grad_norm,
        "run/steps_per_second": more["speed"],
        "run/memory": more["memory"],
    }
