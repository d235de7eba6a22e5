"""Is a sampler right? Every sampler name of the running ComfyUI against exact ground truth, through ComfyUI's own code.

The model is a perfect one of a Gaussian mixture, so what is left is the sampler's error:

- a deterministic sampler must end where the probability-flow ODE ends, with an error that falls with more steps;
- a stochastic one must draw the mixture: sliced Wasserstein distance, mean, covariance, weights of the modes;
- CFG++ at cfg 3 has no truth but its first-order form (Euler, as in the paper), which ComfyUI has right everywhere.

lcm is for consistency models, so it gets a perfect one of these: every prediction is the end of the trajectory.
"""

import warnings
from dataclasses import dataclass
from functools import cache

import comfy.samplers
import torch
from torch import Tensor

from tidetable.runtime.samplers import OUR_NAMES, host_names, make_flow_sampler, make_sampler
from tidetable.samplers import SAMPLERS
from tidetable.samplers.steps import SPACES
from tidetable.tests.gaussians import sliced_wasserstein
from tidetable.tests.host.mixture_model import CONDITIONAL, MIXTURE, draw, exact_model, start_noise


ARMS = {
    "stock-flow": "flow",
    "sampler-safe": "flow",
    "tidetable": "flow",
    "eps": "eps",
    "v": "v",
    "ztsnr": "ztsnr",
    "tidetable-eps": "eps",
    "tidetable-v": "v",
    "tidetable-ztsnr": "ztsnr",
}
"""Arm -> kind of model; what the arm's sampler is, `sampler_of` says. v is Stable Diffusion's table with v prediction,
ztsnr the same rescaled to zero terminal SNR."""
SCHEDULERS = {"eps": "karras", "v": "karras", "ztsnr": "sgm_uniform", "flow": "simple"}
STEPS = (16, 32, 64)
MOST_ERROR = {"distance": 0.09, "mean": 0.1, "covariance": 0.15, "weights": 0.04, "cfg": 0.15}
"""Largest passing values at 32 steps: about 1.5 times what Euler ancestral, right in theory, has there. The data have a
standard deviation of about 1 in each dimension, each mode 0.3."""
TIMES_EULER = 2.0
"""A deterministic sampler may be off by this many times the error of Euler on the same levels."""
UNEVEN = "linear_quadratic"
"""A scheduler of ComfyUI, made for flow, that changes its step size abruptly: bad weights of multistep methods show."""
LEAST_ORDER = 0.6
"""Slope of the error over the steps that a deterministic sampler must reach, unless it is below SMALL already. Euler's
is 0.7 on a zero-terminal table: the last level before 0 does not shrink with the steps there."""
SMALL = 0.01


@dataclass(frozen=True)
class Verdict:
    """How one sampler did."""

    error: float
    """What the method measures first: distance to the ODE's end, or sliced Wasserstein distance to the truth."""
    failures: tuple[str, ...]
    """Which measures were above what passes, with their values."""
    order: float | None = None
    """Fitted order of a deterministic sampler."""

    @property
    def passed(self) -> bool:
        return not self.failures


def is_ours(arm: str) -> bool:
    return arm.startswith("tidetable")


def cases(arm: str) -> list[str]:
    return list(OUR_NAMES) if is_ours(arm) else [name for name in host_names() if not name.endswith("_gpu")]


def sampler_of(arm: str, name: str):
    if is_ours(arm):
        return make_sampler(name, 0.0 if name == "ddim" else 1.0, 1.0, 0, 0.0)
    return make_flow_sampler(name) if arm == "sampler-safe" else comfy.samplers.sampler_object(name)


def host_name(name: str) -> str:
    """The name that KSampler's schedule depends on: our own names without a counterpart take euler's."""
    return name if name in host_names() else "euler"


@cache
def model_of(kind: str, consistency: bool = False):
    return exact_model(kind, consistency)


def sigmas_of(kind: str, name: str, steps: int, scheduler: str | None = None) -> Tensor:
    """What KSampler would use: it drops the next to last level for a few names."""
    model = model_of(kind)
    scheduler = scheduler or SCHEDULERS[kind]
    return comfy.samplers.KSampler(model, steps, "cpu", name, scheduler, model_options=model.model_options).sigmas


def run(arm: str, name: str, steps: int, count: int, seed: int = 0, scheduler: str | None = None, **options) -> Tensor:
    kind = ARMS[arm]
    model = model_of(kind, consistency=name == "lcm")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # stock's own
        return draw(
            model,
            sampler_of(arm, name),
            sigmas_of(kind, host_name(name), steps, scheduler).clone(),  # uni_pc writes into it
            start_noise(count),
            seed=seed,
            **options,
        ).double()


def is_deterministic(arm: str, name: str) -> bool:
    """Whether the seed of the sampler's noise changes nothing: measured, not looked up."""
    return torch.equal(run(arm, name, 6, 8, seed=1), run(arm, name, 6, 8, seed=2))


@cache
def ode_end(kind: str, count: int, start: float) -> Tensor:
    space = SPACES["flow" if kind == "flow" else "ve"]
    sampling = model_of(kind).get_model_object("model_sampling")
    noise = start_noise(count)
    x = sampling.noise_scaling(torch.tensor(start), noise, torch.zeros_like(noise), max_denoise=True).flatten(1)
    return MIXTURE.trajectory(x, start, 0.0, space)


def distance_to_ode(arm: str, name: str, steps: int, count: int, scheduler: str | None = None) -> float:
    start = float(sigmas_of(ARMS[arm], host_name(name), steps, scheduler)[0])
    x = run(arm, name, steps, count, scheduler=scheduler)
    return float((x - ode_end(ARMS[arm], count, start)).norm(dim=1).median())


def judge_deterministic(arm: str, name: str, count: int, steps: tuple[int, ...] = STEPS) -> Verdict:
    """Median distance to the ODE's end at 32 steps, and the order fitted over `steps`."""
    errors = {n: distance_to_ode(arm, name, n, count) for n in steps}
    logs = torch.tensor([[float(n), error] for n, error in errors.items()], dtype=torch.float64).clamp(min=1e-9).log()
    centered = logs - logs.mean(0)
    order = -float((centered[:, 0] * centered[:, 1]).sum() / centered[:, 0].square().sum())
    failures = []
    for scheduler in (None, UNEVEN) if ARMS[arm] == "flow" else (None,):
        error, euler = (distance_to_ode(*which, 32, count, scheduler) for which in ((arm, name), (arm, "euler")))
        if not error <= TIMES_EULER * euler + SMALL:
            failures.append(f"{scheduler or 'ode'} {error:.3g}")
    if not order >= LEAST_ORDER and not errors[steps[-1]] <= SMALL:
        failures.append(f"order {order:.2f}")
    return Verdict(errors[32], tuple(failures), order)


def judge_stochastic(arm: str, name: str, count: int) -> Verdict:
    x = run(arm, name, 8 if name == "lcm" else 32, count)
    measures = {
        "distance": sliced_wasserstein(x, truth_samples(count)),
        "mean": float((x.mean(0) - MIXTURE.mean()).abs().max()),
        "covariance": float((torch.cov(x.T) - MIXTURE.covariance()).abs().max()),
        "weights": float((MIXTURE.mode_weights(x) - MIXTURE.weights).abs().max()),
    }
    return Verdict(measures["distance"], tuple(above(measures)))


def judge_cfg_pp(arm: str, name: str, count: int, cfg: float = 3.0) -> Verdict:
    """Distance to the first-order CFG++ sampler with the same noise in the steps."""
    options = {"cfg": cfg, "positive": CONDITIONAL, "negative": MIXTURE}
    first = "euler_ancestral_cfg_pp" if "ancestral" in name else "euler_cfg_pp"
    stock = "stock-flow" if ARMS[arm] == "flow" else ARMS[arm]
    distance = sliced_wasserstein(run(arm, name, 32, count, **options), run(stock, first, 32, count, **options))
    return Verdict(distance, tuple(above({"cfg": distance})))


@cache
def truth_samples(count: int) -> Tensor:
    """Samples of the mixture with exact weights, so that these cost no distance."""
    generator = torch.Generator().manual_seed(1234)
    counts = (MIXTURE.weights * count).round().long()
    counts[0] += count - counts.sum()
    return torch.cat([MIXTURE.subset([k]).sample(int(n), generator) for k, n in enumerate(counts)])


def above(measures: dict[str, float]) -> list[str]:
    return [f"{key} {value:.3g}" for key, value in measures.items() if not value <= MOST_ERROR[key]]


def judge(arm: str, name: str, count: int = 4096) -> tuple[Verdict, Verdict | None]:
    """(verdict at cfg 1, verdict at cfg 3 for CFG++ samplers)."""
    if is_deterministic(arm, name):
        plain = judge_deterministic(arm, name, count // 4)
    else:
        plain = judge_stochastic(arm, name, count)
    cfg_pp = name.endswith("_cfg_pp") or (name in SAMPLERS and SAMPLERS[name].cfg_pp)
    return plain, judge_cfg_pp(arm, name, count) if cfg_pp else None


def distance_at(way: str, name: str, steps: int, count: int) -> float:
    """Distance of what a sampler draws to the mixture at cfg 1, or of a CFG++ one to its first-order form at cfg 3.

    `way` "stock in ve" is ComfyUI's function in variance-exploding coordinates, at the same noise-to-signal ratios.
    """
    cfg_pp = name.endswith("_cfg_pp")
    options = {"cfg": 3.0, "positive": CONDITIONAL, "negative": MIXTURE} if cfg_pp else {}
    first = "euler_ancestral_cfg_pp" if "ancestral" in name else "euler_cfg_pp"
    truth = run("stock-flow", first, steps, count, **options) if cfg_pp else truth_samples(count)
    if way != "stock in ve":
        return sliced_wasserstein(run(way, name, steps, count, **options), truth)
    t = sigmas_of("flow", name, steps).double()
    t[0] = min(float(t[0]), 0.999)
    sampler, noise = comfy.samplers.sampler_object(name), start_noise(count)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        x = draw(model_of("eps"), sampler, (t / (1.0 - t)).float(), noise, **options)
    return sliced_wasserstein(x, truth)
