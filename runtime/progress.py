"""A training run's events on their way to the user:

ComfyUI's progress bar, the page, and the cancel button on its way back.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
import psutil
import torch
from comfy_execution.utils import get_executing_context
from PIL import Image

from ..training.events import Event, Notice, StepDone, Validated
from ..training.pace import Pace
from .server import prompt_server


logger = logging.getLogger(__name__)
EVENT = "tidetable.train"
SECONDS_BETWEEN_EVENTS = 0.2
SECONDS_BETWEEN_LINES = 10
SHOWN_SIZE = 768
"""Pixels of the longer side of a preview on the page."""


class TrainingReporter:
    """Consumes the engine's events; raises ComfyUI's own exception when the user has cancelled."""

    def __init__(self, steps: int, node_id: str | None):
        self.bar = comfy.utils.ProgressBar(steps, node_id=node_id)
        self.node_id = node_id
        context = get_executing_context()
        self.prompt_id = context.prompt_id if context else None
        self.started = time.monotonic()
        self.pace = Pace(steps)
        self.last_sent = 0.0
        self.losses: list[float] = []
        self.learning_rates: list[float] = []
        self.grad_norms: list[float] = []
        self.validations: list[Validated] = []
        self.listeners: list[Callable[[Event], None]] = []
        """Called with every event that is recorded, before a cancel is noticed: what they save is up to date."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Validated):
            self.validations.append(event)
            self._send({"step": event.step, "validation_loss": event.loss, "by_t": event.by_t, **self.more(event)})
        elif isinstance(event, Notice):
            self.say(event.text)
        else:
            self.losses.append(event.loss)
            self.learning_rates.append(event.learning_rate)
            self.grad_norms.append(event.grad_norm)
            self.pace.add(event.step, event.loss, time.monotonic())
            self.bar.update_absolute(event.step, event.steps)
            self._send_step(event)
        for listener in self.listeners:
            listener(event)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def more(self, event: Event) -> dict[str, float]:
        """What the page and the log say beside the event: where the run is, and what the base model does."""
        if isinstance(event, Validated):
            return {"base": self.validations[0].loss}
        if isinstance(event, Notice):
            return {}
        pace = self.pace
        return {"smooth": pace.loss, "speed": pace.speed, "seconds_left": pace.seconds_left, "memory": memory()}

    def history(self, step: int) -> dict[str, Any]:
        """The course of the run up to `step`, for a checkpoint. A validation at `step` itself is made again."""
        series = [self.losses, self.learning_rates, self.grad_norms]
        validations = [(event.step, event.loss, event.by_t) for event in self.validations if event.step < step]
        return {"series": [torch.tensor(values, dtype=torch.float64) for values in series], "validations": validations}

    def load_history(self, saved: dict[str, Any]) -> None:
        """Go on with the curves of an earlier part of the run."""
        self.losses, self.learning_rates, self.grad_norms = (values.tolist() for values in saved["series"])
        self.validations = [Validated(*values) for values in saved["validations"]]
        for loss in self.losses:
            self.pace.add_loss(loss)

    def loss_map(self) -> dict[str, Any]:
        """ComfyUI's LOSS_MAP, with more series than core's for plots that know them."""
        series: dict[str, Any] = {
            "loss": self.losses,
            "lr": self.learning_rates,
            "grad_norm": self.grad_norms,
        }
        if self.validations:
            series["validation_steps"] = [event.step for event in self.validations]
            series["validation_loss"] = [event.loss for event in self.validations]
            series["validation_base"] = self.validations[0].loss
            series["validation_t"] = [t for t, _ in self.validations[0].by_t]
            series["validation_by_t"] = [[loss for _, loss in event.by_t] for event in self.validations]
        return series

    def _send_step(self, event: StepDone) -> None:
        now = time.monotonic()
        pause = SECONDS_BETWEEN_EVENTS if self.node_id else SECONDS_BETWEEN_LINES
        if now - self.last_sent < pause and event.step < event.steps:
            return
        self.last_sent = now
        if self.node_id is None:  # a script: nobody sees a page
            line = "step %d of %d, loss %.4f, %.3g steps/s, %.0f s left, %.1f GB"
            pace = self.pace
            logger.info(line, event.step, event.steps, pace.loss, pace.speed, pace.seconds_left, memory() / 1e9)
        self._send(
            {
                "step": event.step,
                "steps": event.steps,
                "loss": event.loss,
                "lr": event.learning_rate,
                "grad_norm": event.grad_norm,
                "seconds": now - self.started,
                **self.more(event),
            }
        )

    def show(self, picture: Image.Image) -> None:
        """A picture on the node, until the next one."""
        self.bar.update_absolute(self.bar.current, preview=("JPEG", picture, SHOWN_SIZE))

    def say(self, text: str) -> None:
        """To the log, and to the text below the node."""
        logger.warning("%s", text)
        server = prompt_server()
        if server is not None and self.node_id is not None:
            server.send_progress_text(text, self.node_id)

    def _send(self, payload: dict[str, Any]) -> None:
        server = prompt_server()
        if server is not None and self.node_id is not None:
            server.send_sync(EVENT, {"node": self.node_id, "prompt_id": self.prompt_id, **finite(payload)})


def finite(value: Any) -> Any:
    """The same with None for nan and inf: JSON has none, and a page that cannot parse a message drops it."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def memory() -> int:
    """Bytes: the most that torch had on the graphics card so far, elsewhere what the process has."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
