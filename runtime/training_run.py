"""A training run's files: checkpoints and log under output/tidetable, and how a queued graph finds its own again."""

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..training.adapters import as_computed
from ..training.checkpoint import checkpoints, differences, digest, read_newest, write_checkpoint
from ..training.config import LoRAConfig, _require
from ..training.engine import Trainer
from ..training.events import Event, Notice, StepDone
from ..training.guard import Guard, GuardConfig
from .board import require_tensorboard
from .paths import log_file, runs_folder
from .progress import TrainingReporter, finite
from .run_lock import RunLock, is_held
from .trainable import ComfyDenoiser


logger = logging.getLogger(__name__)
FREE_TO_CHANGE = ("steps", "validate_every")
"""Settings that a resumed run may change: they say how long and what is looked at, not what is learned."""
SAMPLED_VALUES = 64
"""Values of each weight tensor that stand for it in the model's fingerprint: hashing all of a large model is slow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """What keeps a run safe. The one home of the defaults of Training Run."""

    checkpoint_every_steps: int = 100
    """0 is none by steps."""
    checkpoint_every_minutes: float = 10.0
    """0 is none by time. There is always one at the end and when a run is cut short."""
    keep: int = 2
    """Checkpoints that stay, at least 1."""
    resume: str = "auto"
    """"auto": go on with the run of the same model, data and settings, where there is one. "off": start anew, beside
    it. Otherwise the name of a run's folder."""
    resume_anyway: bool = False
    """Go on with a named run although something changed."""
    guard: GuardConfig | None = field(default_factory=GuardConfig)
    """None is off."""
    log: str = ""
    """A JSON line for every step goes to this file under the output folder; "" is none."""
    tensorboard: bool = False
    """The same numbers for TensorBoard, which must be installed."""

    def __post_init__(self):
        for name in ("checkpoint_every_steps", "checkpoint_every_minutes"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, value, ">= 0")
        _require(self.keep >= 1, "keep", self.keep, "at least 1")


def fingerprint(denoiser: ComfyDenoiser, trainer: Trainer, lora_config: LoRAConfig, **others: object) -> dict[str, Any]:
    """What makes two runs one: model, data and settings by field. Weights and samples as hashes."""
    found: dict[str, Any] = {
        "model.family": type(denoiser.real).__name__,
        "model.prediction": denoiser.prediction,
        "model.process": denoiser.process.name,
        "model.shift": denoiser.shift,
        "model.weights": digest(_weights(denoiser.real.diffusion_model)),
        "layers": digest([tuple(p.shape) for p in trainer.parameters]),
    }
    for name, data in (("data", trainer.dataset), ("held_out", trainer.held_out)):
        if data is not None:
            found[f"{name}.samples"] = len(data)
            if data.identity:
                found[f"{name}.identity"] = data.identity
                continue
            found[f"{name}.latents"] = digest(data.latents)
            found[f"{name}.conditions"] = digest(data.conditions)
            found[f"{name}.empty"] = digest(data.empty_condition)
            found[f"{name}.masks"] = digest(data.masks)
            found[f"{name}.prior"] = digest(data.prior_conditions)
    for name, settings in {"train": asdict(trainer.config), "lora": asdict(lora_config), **others}.items():
        found.update(_flat(name, settings))
    return {name: value for name, value in found.items() if name not in {f"train.{free}" for free in FREE_TO_CHANGE}}


class RunKeeper:
    """Listens to the reporter: saves what is due, and goes on where the last run of the same kind was.

    Of several processes only the first saves; the others go on where it does, from the same folder.
    """

    def __init__(self, config: RunConfig, trainer: Trainer, reporter: TrainingReporter, identity: dict[str, Any]):
        self.config, self.trainer, self.reporter, self.identity = config, trainer, reporter, identity
        self.log = log_file(config.log) if config.log else None
        self.leads = trainer.world.rank == 0
        self.lock: RunLock | None = None
        with trainer.world.first_before_others():
            self.folder = self._find_folder()
            try:
                self.lock = self._enter_folder() if self.leads else None
                self._resume()
            except BaseException:
                self.close()
                raise
        self.last_saved, self.last_step = time.monotonic(), trainer.step
        if self.leads:
            reporter.listeners.append(self)

    @property
    def name(self) -> str:
        return self.folder.name

    def close(self) -> None:
        """The run is over: the folder is free for another process. Safe to call twice."""
        if self.lock is not None:
            self.lock.release()

    def __call__(self, event: Event) -> None:
        assert self.lock is not None
        self.lock.touch()
        self._write_log(event)
        if isinstance(event, StepDone) and self._is_due(event):
            self.save()

    def save(self) -> None:
        """A checkpoint of this moment. A disk that refuses it costs a warning, not the run.

        ValueError where another process has taken the run's folder meanwhile.
        """
        trainer = self.trainer
        if self.lock is None or trainer.step == self.last_step or not trainer.whole:
            return
        self.lock.check()
        self.last_saved, self.last_step = time.monotonic(), trainer.step
        state = {"identity": self.identity, "trainer": trainer.state(), "history": self.reporter.history(trainer.step)}
        try:
            path = write_checkpoint(self.folder, trainer.step, state, self.config.keep)
        except OSError as error:
            text = (
                f"no checkpoint at step {trainer.step}: could not write to {self.folder} ({error}). Free some space; "
                "the run goes on and tries again, and older checkpoints are still there"
            )
            self.reporter.say(text)
        except TypeError as error:  # an optimizer of another package may keep what no file can hold
            self.reporter.say(f"no checkpoint at step {trainer.step}: {error}. The run goes on without")
        else:
            logger.info("saved %s", path)

    def _is_due(self, event: StepDone) -> bool:
        if event.step >= event.steps:
            return True
        if self.trainer.guard is not None and self.trainer.guard.streak:
            return False  # the weights may be bad; the next healthy step is soon enough
        steps, minutes = self.config.checkpoint_every_steps, self.config.checkpoint_every_minutes
        late = minutes > 0 and time.monotonic() - self.last_saved >= 60 * minutes
        return late or (steps > 0 and event.step % steps == 0)

    def _find_folder(self) -> Path:
        """The folder to go on in. With "off" a new one, where there is a run in the last one."""
        base = runs_folder()
        if self.config.resume not in ("auto", "off"):
            folder = base / self.config.resume
            if folder.parent != base or not checkpoints(folder):
                there = ", ".join(sorted(path.name for path in base.glob("*") if checkpoints(path))) or "none"
                raise ValueError(
                    f"there is no run {self.config.resume!r} with checkpoints in {base} (there: {there}): use one of "
                    "these names, 'auto' or 'off'"
                )
        else:
            stem = f"{self.identity['model.family']}_{digest(self.identity)}"
            taken = [path for path in base.glob(f"{stem}*") if path.is_dir()]
            number = max((int(path.name.removeprefix(f"{stem}_") or 0) for path in taken), default=0)
            last = base / f"{stem}_{number}"
            new = not taken or (self.config.resume == "off" and (bool(checkpoints(last)) or is_held(last)))
            folder = base / f"{stem}_{number + new}"
        return folder

    def _enter_folder(self) -> RunLock:
        """The folder made, locked and so tried: better to hear of a full disk now than at the first checkpoint."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return RunLock(self.folder)
        except OSError as error:
            raise ValueError(
                f"could not write checkpoints to {self.folder}: {error}. Free some space or start ComfyUI with another "
                "--output-directory; without Training Run connected, training writes no checkpoints"
            ) from error

    def _resume(self) -> None:
        if self.config.resume == "off":
            return
        saved, notes = read_newest(self.folder)
        if saved is None:
            return
        changed = differences(saved["identity"], self.identity)
        if changed and not self.config.resume_anyway:
            raise ValueError(
                f"the run {self.name!r} was made with something else:\n  " + "\n  ".join(changed) + "\nSet it back, "
                "turn resume_anyway on to continue with what is connected now, or set resume to 'off' to start anew"
            )
        self.trainer.load_state(saved["trainer"])
        self.reporter.load_history(saved["history"])
        step, steps = self.trainer.step, self.trainer.config.steps
        note = f"resumed {self.name} at step {step} of {steps}"
        if step >= steps:
            note += ": that is all of it. Raise steps to train on"
        for text in [*notes, note]:
            self._write_log(Notice(step, text))
            self.reporter.say(text)

    def _write_log(self, event: Event) -> None:
        if self.log is None or not self.leads:
            return
        more = self.reporter.more(event)
        line = finite({"event": type(event).__name__, **asdict(event), **more, "time": time.time()})
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            logger.warning("no log from step %d on: could not write %s (%s)", event.step, self.log, error)
            self.log = None


def run_config(
    *, guard: bool, guard_threshold: float, snapshot_every: int, rate_factor: float, max_restores: int, **settings: Any
) -> RunConfig:
    """The widgets of Training Run as settings."""
    watch = GuardConfig(
        threshold=guard_threshold,
        snapshot_every=snapshot_every,
        rate_factor=rate_factor,
        max_restores=max_restores,
    )
    if settings["log"]:
        log_file(settings["log"])  # refused here rather than after the model is loaded
    if settings["tensorboard"]:
        require_tensorboard()
    return RunConfig(guard=watch if guard else None, **settings)


def guard_of(run: RunConfig | None) -> Guard | None:
    return Guard(run.guard) if run is not None and run.guard is not None else None


def _weights(network: torch.nn.Module) -> list[torch.Tensor]:
    """Values of every weight as it acts, whether it is on the device or in main memory with its LoRAs still to come."""
    places = [name.rpartition(".") for name, _ in sorted(network.named_parameters())]
    return [sample_values(as_computed(network.get_submodule(module), name)) for module, _, name in places]


def sample_values(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLED_VALUES)][: SAMPLED_VALUES + 1]


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    """Nested settings as dotted names to plain values."""
    if isinstance(value, Mapping):
        return {key: item for name, part in value.items() for key, item in _flat(f"{prefix}.{name}", part).items()}
    return {prefix: value if value is None or isinstance(value, bool | int | float | str) else repr(value)}
