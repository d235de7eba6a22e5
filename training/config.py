"""What a training run is told, and the one home of its defaults: the node, the scripts and the tests read them here."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from .optimizers import OptimizerConfig
from .recipe import DensityConfig, ObjectiveConfig
from .recipe import require as _require


Density = Literal["auto", "uniform", "logit_normal"]
LRSchedule = Literal["cosine", "constant"]
Targets = Literal["attention", "attention_mlp", "linear", "linear_conv"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run. Every field is checked when the object is made; the message names field, value and range."""

    steps: int = 500
    """Optimizer steps, at least 1."""
    batch_size: int = 4
    """Samples per step, each through the network once; at least 1."""
    learning_rate: float = 1e-3
    """Peak rate, above 0 and at most 100."""
    warmup_steps: int = 20
    """Steps over which the rate rises linearly from near 0; 0 is none."""
    lr_schedule: LRSchedule = "cosine"
    """After the warm-up: half a cosine to 0, or constant."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay; 0 is none."""
    max_grad_norm: float = 1.0
    """The gradient's global norm is clipped to this; 0 is off."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights, in [0, 1); 0 is off."""
    density: Density = "auto"
    """How t is drawn: "auto" is logit-normal on flow models, uniform on the others."""
    logit_mean: float = 0.0
    """Mean of logit(t) for the logit-normal density; the model's shift is applied on top."""
    logit_std: float = 1.0
    """Standard deviation of logit(t), above 0."""
    caption_dropout: float = 0.0
    """Probability in [0, 1] that a sample is trained with the empty conditioning."""
    validate_every: int = 0
    """Steps between two validations; 0 validates only before the first and after the last step."""
    seed: int = 0
    """Everything random follows from (seed, step)."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """How an error becomes a loss."""
    timestep_density: DensityConfig | None = None
    """How t is drawn, in place of `density`, `logit_mean` and `logit_std`; None: these three."""
    optimizer: OptimizerConfig | None = None
    """In place of AdamW, lr_schedule and warmup_steps; `with_optimizer` fills in the other fields that it carries."""

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("warmup_steps", "validate_every", "weight_decay", "max_grad_norm"):
            _require(math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        rate = self.learning_rate
        _require(0 < rate <= 100, "learning_rate", rate, "above 0 and at most 100 (AdamW: 1e-5 to 1e-3, Prodigy: 1)")
        std = self.logit_std
        _require(math.isfinite(std) and std > 0, "logit_std", std, "a finite number above 0")
        _require(math.isfinite(self.logit_mean), "logit_mean", self.logit_mean, "finite")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        _require(0 <= self.caption_dropout <= 1, "caption_dropout", self.caption_dropout, "in [0, 1]")
        if self.optimizer is not None:
            self.optimizer.check_length(self.steps, self.batch_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """The adapter: y + lora_alpha / rank · up(down(x)) on every chosen layer."""

    rank: int = 16
    """Inner width, 1 to 512; a layer narrower than this gets its own width."""
    lora_alpha: float = 16.0
    """The adapter's output is multiplied by lora_alpha / rank; above 0."""
    targets: Targets = "attention_mlp"
    """Which layers get an adapter; see `training.adapters.select_targets`."""
    seed: int = 0
    """Of the random half of the initialization; the other half is zero."""

    def __post_init__(self):
        _require(1 <= self.rank <= 512, "rank", self.rank, "in 1..512")
        _require(math.isfinite(self.lora_alpha) and self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "above 0")


def with_optimizer(config: TrainConfig, optimizer: OptimizerConfig | None) -> TrainConfig:
    """The run with the settings of an optimizer in place of its own; None changes nothing."""
    if optimizer is None:
        return config
    shared = {name: getattr(optimizer, name) for name in ("weight_decay", "max_grad_norm", "ema_decay")}
    return replace(config, optimizer=optimizer, **shared)
