"""What a run may be told beyond the native objective: how t is drawn, and how an error becomes a loss.

Both are part of `TrainConfig`; their defaults are the run without them.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

from ..schedules.prediction import Prediction
from ..schedules.validate import require_choice


DensityName = Literal[
    "uniform", "logit_normal", "mode", "cosmap", "beta", "log_snr_normal", "content", "style", "piecewise"
]
ShiftMode = Literal["auto", "none", "shift", "mu", "resolution", "official", "model"]
Space = Literal["native", "eps", "v", "x0", "velocity"]
FlowMode = Literal["off", "graft", "bridge"]
LossName = Literal["mse", "huber", "l1"]
HuberSchedule = Literal["constant", "exponential", "snr"]
MaskedLoss = Literal["off", "on", "normalized"]
PriorOn = Literal["class_prompt", "outside_mask"]
Weighting = Literal["none", "min_snr", "soft_min_snr", "debiased", "p2", "sigma_sqrt", "cosmap"]
MODE_SCALE_MAX = 2 / (math.pi - 2)
"""Largest scale of the mode density at which its quantile function still rises (arXiv:2403.03206, section 3.1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DensityConfig:
    """How noise levels t are drawn: a density, then a shift, then a range."""

    density: DensityName = "logit_normal"
    """Before the shift; the formulas are in `training.densities`."""
    mean: float = 0.0
    """Of logit(t) for logit_normal, of the log-SNR for log_snr_normal."""
    std: float = 1.0
    """Of the same, above 0."""
    mode_scale: float = 1.29
    """mode: -1 to 1.75; 0 is uniform, above 0 favors the middle."""
    beta_a: float = 1.0
    """beta: exponent of t plus 1, above 0."""
    beta_b: float = 1.0
    """beta: exponent of 1 - t plus 1, above 0."""
    knots: tuple[tuple[float, float], ...] = ()
    """piecewise: (t, weight) with rising t in [0, 1]; the density is linear between them and 0 outside."""
    shift_mode: ShiftMode = "auto"
    """Where the shift comes from. auto: the family's training rule where there is one, else the model's own."""
    shift: float = 1.0
    """shift: the factor itself. resolution: the factor at 1024 x 1024 pixels. Above 0."""
    mu: float = 0.0
    """mu: logarithm of the shift."""
    t_min: float = 0.0
    t_max: float = 1.0
    """Only t inside this range are drawn; the density keeps its shape in there."""
    stratified: bool = True
    """One draw in each of `batch_size` equal shares of the probability; off: independent draws."""
    family: str = ""
    """Key in `schedules.families` for the shift; empty where it is not known."""

    def __post_init__(self):
        require_choice("density", self.density, get_args(DensityName))
        require_choice("shift_mode", self.shift_mode, get_args(ShiftMode))
        for name in ("mean", "mu"):
            require(math.isfinite(getattr(self, name)), name, getattr(self, name), "finite")
        for name in ("std", "beta_a", "beta_b", "shift"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, name, value, "a finite number above 0")
        require(-1.0 <= self.mode_scale <= MODE_SCALE_MAX, "mode_scale", self.mode_scale, "in -1..1.75")
        require(0 <= self.t_min < self.t_max <= 1, "t_min, t_max", (self.t_min, self.t_max), "0 <= t_min < t_max <= 1")
        if self.density == "piecewise":
            _check_knots(self.knots)


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """How the error of a prediction becomes a loss, and which noise it is made with."""

    flow: FlowMode = "off"
    """For eps and v networks. graft: as a flow model, told 1000·t. bridge: as they are, seen in flow time."""
    graft_shift: float = 3.0
    """graft: the flow model's shift, in training and in the model that comes out; above 0."""
    prediction: Space = "native"
    """Where the error is measured; the network itself is asked what it always was."""
    loss: LossName = "mse"
    huber_c: float = 0.1
    """Where the pseudo-Huber loss turns from square to linear, above 0."""
    huber_schedule: HuberSchedule = "constant"
    """exponential: from 1 at t = 0 down to huber_c at t = 1. snr: from 1 down to huber_c with the noise ratio."""
    weighting: Weighting = "none"
    gamma: float = 5.0
    """min_snr and soft_min_snr: the SNR at which the weight stops growing. p2: the exponent. Above 0."""
    max_weight: float = 1000.0
    """No error is multiplied by more than this; above 0."""
    offset_noise: float = 0.0
    """Standard deviation of what is added to the noise of a whole channel; 0 is off."""
    pyramid_discount: float = 0.0
    """Noise of half the size counts this much, of a quarter its square and so on; below 1, 0 is off."""
    input_perturbation: float = 0.0
    """The network sees noise with this much more of it than the target says; 0 is off."""
    ot_pairing: bool = False
    """Noises are exchanged within the batch, so that each goes to a near sample."""
    masked_loss: MaskedLoss = "off"
    """on: the error is weighted by the samples' masks. normalized: and divided by the mean weight of the sample."""
    unmasked_weight: float = 0.0
    """What the error outside the mask counts, in [0, 1]; 1 is as if there was no mask."""
    prior_weight: float = 0.0
    """What the difference to the network's answer without the adapter counts; 0 is off."""
    prior_on: PriorOn = "class_prompt"
    """Where nothing shall change: on another prompt, or outside the masks. See `training.prior`."""
    prior_conditioning: Any = field(default=None, repr=False, compare=False)
    """How the node hands that prompt over; `runtime.objective.prepare` takes it out, because it is data."""

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            require_choice(name, getattr(self, name), choices)
        for name in ("graft_shift", "huber_c", "gamma", "max_weight"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, name, value, "a finite number above 0")
        for name in ("offset_noise", "input_perturbation", "prior_weight"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, name, value, "finite and >= 0")
        require(0 <= self.pyramid_discount < 1, "pyramid_discount", self.pyramid_discount, "in [0, 1)")
        require(0 <= self.unmasked_weight <= 1, "unmasked_weight", self.unmasked_weight, "in [0, 1]")
        if self.prior_weight:
            allowed = "0 with flow 'graft', where the answer without the adapter is not a flow model's yet"
            require(self.flow != "graft", "prior_weight", self.prior_weight, allowed)
            allowed = "'on' or 'normalized' where prior_weight is above 0 and prior_on is 'outside_mask'"
            require(self.prior_on != "outside_mask" or self.masked_loss != "off", "masked_loss", "'off'", allowed)

    def space(self, native: Prediction) -> Prediction:
        """Where the error is measured on a network with this prediction."""
        return native if self.prediction == "native" else self.prediction


_CHOICES = {
    "flow": get_args(FlowMode),
    "prediction": get_args(Space),
    "loss": get_args(LossName),
    "huber_schedule": get_args(HuberSchedule),
    "weighting": get_args(Weighting),
    "masked_loss": get_args(MaskedLoss),
    "prior_on": get_args(PriorOn),
}


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}, but it must be {allowed}")


def _check_knots(knots: tuple[tuple[float, float], ...]) -> None:
    times = [t for t, _ in knots]
    rising = all(low < high for low, high in pairwise(times))
    inside = all(0 <= t <= 1 and math.isfinite(weight) and weight >= 0 for t, weight in knots)
    require(
        len(knots) >= 2 and rising and inside and any(weight > 0 for _, weight in knots),
        "knots",
        knots,
        "two or more pairs t:weight with rising t in 0..1 and weights of 0 or more, not all 0, like 0:1, 0.5:2, 1:1",
    )
