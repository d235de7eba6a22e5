"""Optimizers by name, learning rates as closed functions of the step, and settings that hold both.

AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101. Adafactor: Shazeer and Stern 2018, arXiv:1804.04235. Muon: Jordan
et al. 2024. Prodigy: Mishchenko and Defazio 2024, arXiv:2306.06101. Schedule-free: Defazio et
al. 2024, arXiv:2405.15682.
"""

import difflib
import importlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .recipe import require


Name = Literal["adamw", "adafactor", "muon", "sgd", "prodigy", "schedule_free_adamw", "adamw_8bit", "other"]
Schedule = Literal["constant", "linear", "cosine", "cosine_restarts", "rex"]
FOREIGN = {
    "prodigy": ("prodigyopt", "prodigyopt", "Prodigy"),
    "schedule_free_adamw": ("schedulefree", "schedulefree", "AdamWScheduleFree"),
    "adamw_8bit": ("bitsandbytes", "bitsandbytes.optim", "AdamW8bit"),
    "other": ("pytorch-optimizer", "pytorch_optimizer", ""),
}
"""name -> (package, module, class); used where they are installed, never installed from here."""
BETAS = (0.9, 0.99)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How the weights move. Checked when the object is made."""

    name: Name = "adamw"
    """torch's adamw, adafactor, muon (with adamw for what is not a matrix) or sgd; or of a package, if installed."""
    class_name: str = ""
    """For "other": a class of the package pytorch-optimizer."""
    lr_schedule: Schedule = "cosine"
    """Course of the rate after the warm-up."""
    restarts: int = 1
    """cosine_restarts: how often the cosine starts anew, at least 1; n restarts make n + 1 cosines."""
    final_rate: float = 0.0
    """The schedule ends at this share of the peak rate, in [0, 1]."""
    warmup: int = 20
    """Linear rise of the rate over this many steps or samples; 0 is none."""
    warmup_unit: Literal["steps", "samples"] = "steps"
    accumulate: int = 1
    """Batches that make one step, at least 1: the same as a batch this many times as large."""
    weight_decay: float = 0.0
    """Decoupled decay where the optimizer has it; 0 is none."""
    max_grad_norm: float = 1.0
    """The gradient's global norm is clipped to this; 0 is off."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, in [0, 1); 0 is off."""
    ema_device: Literal["same", "cpu"] = "same"
    """Where the moving average lies: beside the weights, or in main memory."""

    def __post_init__(self):
        checks = {
            "restarts": (self.restarts >= 1, "at least 1"),
            "accumulate": (self.accumulate >= 1, "at least 1"),
            "warmup": (self.warmup >= 0, ">= 0"),
            "final_rate": (0 <= self.final_rate <= 1, "in [0, 1]"),
            "weight_decay": (math.isfinite(self.weight_decay) and self.weight_decay >= 0, ">= 0"),
            "max_grad_norm": (math.isfinite(self.max_grad_norm) and self.max_grad_norm >= 0, ">= 0"),
            "ema_decay": (0 <= self.ema_decay < 1, "in [0, 1)"),
        }
        for field, (fine, allowed) in checks.items():
            require(fine, field, getattr(self, field), allowed)
        if self.name == "other" and not self.class_name:
            raise ValueError("optimizer 'other' needs class_name: a class of pytorch-optimizer, such as 'Lion'")

    def warmup_steps(self, batch_size: int) -> int:
        """The warm-up in optimizer steps."""
        return self.warmup if self.warmup_unit == "steps" else -(-self.warmup // (batch_size * self.accumulate))

    def check_length(self, steps: int, batch_size: int) -> None:
        """ValueError where the run ends before the warm-up does."""
        warmup = self.warmup_steps(batch_size)
        if warmup >= steps:
            raise ValueError(f"the warm-up takes {warmup} steps of a run of {steps}: lower warmup, or raise steps")

    def rate(self, step: int, steps: int, batch_size: int) -> float:
        """Share of the peak rate at step `step` (0-based) of `steps`."""
        warmup = self.warmup_steps(batch_size)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, steps - warmup)
        return self.final_rate + (1 - self.final_rate) * course(self.lr_schedule, progress, self.restarts)


def course(schedule: Schedule, progress: float, restarts: int = 1) -> float:
    """The rate in [0, 1] at progress in [0, 1] after the warm-up. REX: Chen et al. 2021, arXiv:2107.04197."""
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - progress
    if schedule == "rex":
        return (1 - progress) / (1 - progress / 2)
    cycles = progress * (restarts + 1 if schedule == "cosine_restarts" else 1)
    within = 1.0 if progress == 1 else cycles % 1
    return 0.5 * (1 + math.cos(math.pi * within))


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a peak learning rate of their own, on the course of the run's."""

    parameters: Sequence[Tensor]
    learning_rate: float


def with_rates(parameters: Sequence[Tensor], rate: float, others: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    """torch's parameter groups: `parameters` at `rate`, and each of the others at its own."""
    groups = [ParameterGroup(parameters, rate), *others]
    return [{"params": list(group.parameters), "lr": group.learning_rate} for group in groups]


def make_optimizer(
    parameters: Sequence[Tensor], config: OptimizerConfig, rate: float, others: Sequence[ParameterGroup] = ()
) -> Any:
    """A torch optimizer, or one with the same `param_groups`, `step`, `zero_grad` and `state_dict`."""
    groups = with_rates(parameters, rate, others)
    parameters = [p for group in groups for p in group["params"]]
    rates = [group["lr"] for group in groups]
    if config.name == "prodigy" and len(set(rates)) > 1:
        raise ValueError(f"prodigy finds one rate for all, but these are {rates}: make them equal, or use 'adamw'")
    common: dict[str, Any] = {"lr": rate, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return adamw(groups, betas=BETAS, **common)
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=BETAS[0], **common)
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups, **common)
    if config.name == "muon":
        return _muon(groups, common)
    found = find_class(config)
    known = inspect.signature(found).parameters
    try:
        return found(groups, **{key: value for key, value in common.items() if key in known})
    except Exception as error:  # wrappers of another optimizer, or of a whole model, want other arguments
        raise ValueError(
            f"{found.__name__} cannot be made from parameters and a rate alone ({error}): choose an optimizer that "
            "stands by itself, such as 'adamw', or 'Lion' of pytorch-optimizer"
        ) from error


def adamw(groups: Sequence[dict[str, Any]], **settings: Any) -> torch.optim.AdamW:
    """torch's AdamW; one fused pass over all tensors where their device has it, on a CPU ten times as fast for many."""
    if all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"]):
        try:
            return torch.optim.AdamW(groups, fused=True, **settings)
        except RuntimeError:  # torch before 2.4 has none for the CPU
            pass
    return torch.optim.AdamW(groups, **settings)


def find_class(config: OptimizerConfig) -> Any:
    """The class of an optional package. ValueError names the package that is missing, or classes of a like name."""
    package, module, name = FOREIGN[config.name]
    name = name or config.class_name
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"optimizer {config.name!r} needs the package {package}, which ComfyUI's Python cannot import ({error}): "
            "install it there, or use 'adamw'"
        ) from error
    classes = {key: value for key, value in vars(loaded).items() if inspect.isclass(value)}
    usable = {key: value for key, value in classes.items() if issubclass(value, torch.optim.Optimizer)}
    if name not in usable:
        near = difflib.get_close_matches(name, usable, n=3, cutoff=0.3) or sorted(usable)[:3]
        raise ValueError(f"{package} has no optimizer {name!r}: did you mean {', '.join(near)}?")
    return usable[name]


class Combined:
    """Several optimizers, each over its own parameters, as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts = list(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def _muon(groups: Sequence[dict[str, Any]], common: dict[str, Any]) -> Any:
    """Muon on matrices, AdamW on the rest; steps of Muon are scaled to AdamW's size, so one rate fits both."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch {torch.__version__} has no Muon (2.9 has): update torch, or use 'adamw'")
    matrices, rest = _split(groups, True), _split(groups, False)
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **common))
    if rest:
        parts.append(adamw(rest, betas=BETAS, **common))
    return parts[0] if len(parts) == 1 else Combined(parts)


def _split(groups: Sequence[dict[str, Any]], matrices: bool) -> list[dict[str, Any]]:
    """The groups with their matrices only, or with all but these; none that is empty."""
    chosen = [[p for p in g["params"] if (p.ndim == 2 and min(p.shape) > 1) == matrices] for g in groups]
    return [{**group, "params": kept} for group, kept in zip(groups, chosen, strict=True) if kept]


def set_training_mode(optimizer: Any, training: bool) -> None:
    """Schedule-free optimizers hold other weights while training than those to be used; others have no such mode."""
    switch = getattr(optimizer, "train" if training else "eval", None)
    if callable(switch):
        switch()
