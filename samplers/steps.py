"""What the integrators here share: the space they work in, what a model call gives, and the ancestral split.

A sampler sees x = alpha(sigma)·x0 + sigma·eps. There are two such spaces: flow, where alpha = 1 − sigma, and ComfyUI's
space of eps, v and EDM models, where alpha = 1. In both, the probability-flow ODE is dx/dsigma = (x − D)/sigma with D
the denoised sample, so a deterministic integrator need not know which one it is in. Adding noise and CFG++ must know:
what matters there is the noise-to-signal ratio sigma/alpha.

Noise levels are Python floats (float64), whatever the dtype of x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor


SpaceName = Literal["flow", "ve"]


@dataclass(frozen=True)
class Space:
    """Signal coefficient as a function of sigma."""

    name: SpaceName
    alpha: Callable[[float], float]
    norm: Callable[[float, float], float]
    """The factor c by which (alpha, sigma) misses this space: (alpha/c, sigma/c) is a point of it."""


SPACES: dict[SpaceName, Space] = {
    "flow": Space("flow", lambda sigma: 1.0 - sigma, lambda alpha, sigma: alpha + sigma),
    "ve": Space("ve", lambda sigma: 1.0, lambda alpha, sigma: alpha),
}


class Guided(NamedTuple):
    """What one model call gives, both [B, …]."""

    denoised: Tensor
    """The guided x0 estimate."""
    base: Tensor
    """The x0 estimate that noise is computed from: the same tensor, or the unconditional one for CFG++."""


Denoise = Callable[[Tensor, float], Guided]
"""(x, sigma) -> Guided."""
Noise = Callable[[float, float], Tensor]
"""(sigma, sigma_next) -> unit noise like x, as k-diffusion's noise samplers."""
Report = Callable[[int, Tensor, float, Tensor], None]
"""(step, x, sigma, denoised): called once per step, for previews and progress."""


@dataclass(frozen=True)
class Split:
    """A step from `start` to `end` as an ODE step to `down` < end and noise that brings x back up to `end`."""

    start: float
    end: float
    down: float
    """Where the ODE step ends, a sigma of the space."""
    scale: float
    """Factor on x(down) that gives the signal its coefficient at `end`."""
    sigma_up: float
    """Standard deviation of the noise to add."""
    alpha_end: float


def split_step(space: Space, start: float, end: float, eta: float = 0.0) -> Split:
    """The ancestral split whose eta = 1 is the DDPM posterior (Song et al. 2020, arXiv:2010.02502, Eq. 16).

    For any alpha and sigma: sigma_up = eta·end/start·sqrt(start² − (alpha_start/alpha_end)²·end²). In flow the ODE then
    ends where the signal is too strong, which `scale` takes back; without it every step adds contrast to the picture.
    """
    alpha_end = space.alpha(end)
    carried = space.alpha(start) / alpha_end * end
    sigma_up = eta * end / start * math.sqrt(max(start**2 - carried**2, 0.0))
    sigma_down = math.sqrt(max(end**2 - sigma_up**2, 0.0))
    scale = space.norm(alpha_end, sigma_down)
    return Split(start, end, sigma_down / scale, scale, sigma_up, alpha_end)


def finish_step(x: Tensor, push: Tensor | None, split: Split, noise: Noise, s_noise: float = 1.0) -> Tensor:
    """x(end) from x(down): scaled, moved by `push` of CFG++ (denoised − base, in units of x0), and with its noise."""
    if split.scale != 1.0:
        x = split.scale * x
    if push is not None:
        x = x + split.alpha_end * push
    if split.sigma_up > 0.0 and s_noise > 0.0:
        x = x + split.sigma_up * s_noise * noise(split.start, split.end)
    return x


def push_of(guided: Guided) -> Tensor | None:
    """CFG++ (Chung et al. 2024, arXiv:2406.08070, Alg. 2): an unconditional step, moved by denoised − uncond.

    Any integrator of the unconditional ODE becomes its CFG++ form that way, and with Euler it is theirs:
    alpha_t·(D − D_u) + (sigma_t/sigma_s)·x + (1 − sigma_t/sigma_s)·D_u = alpha_t·D + sigma_t·eps_u in both spaces.
    """
    return None if guided.base is guided.denoised else guided.denoised - guided.base


def toward(x: Tensor, denoised: Tensor, start: float, end: float) -> Tensor:
    """Exact solution of dx/dsigma = (x − D)/sigma from `start` to `end` for a constant D."""
    ratio = end / start
    return ratio * x + (1.0 - ratio) * denoised
