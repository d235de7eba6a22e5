"""How a sample is drawn, as plain tensor code: integrators here, guidance beside them. No ComfyUI in here.

SAMPLERS lists the integrators; `sample` checks what it is given and runs one. Where ComfyUI has the name, the sampler
does what ComfyUI's does on eps and v models, and the same on flow models, where ComfyUI's does not.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..schedules.validate import require_choice, require_sigmas
from .ddim import ddim, ddpm
from .dpm_solver import dpm_adaptive, dpm_fast
from .euler import euler, heun, reverse_sde
from .exponential import dpmpp_2m, dpmpp_2s, res_multistep
from .multistep import gradient_estimation, ipndm_v
from .steps import SPACES, Denoise, Noise, Report, SpaceName


@dataclass(frozen=True)
class SamplerSpec:
    """What an integrator is, declared once and checked when it meets a model."""

    function: Callable[..., Tensor]
    """(denoise, x, sigmas, space, noise, report, **options) -> x at the last sigma."""
    orders: tuple[int, ...]
    """Orders of convergence to choose from; the last is the usual one. Of a stochastic one: its order at eta 0."""
    stochastic: bool = False
    """Whether it draws noise with its usual options."""
    options: tuple[str, ...] = ()
    """Which of eta, s_noise, churn it takes."""
    cfg_pp: bool = False
    """Whether `denoise` must give the unconditional prediction as base."""
    processes: tuple[SpaceName, ...] = ("flow", "ve")
    """Where it is valid; "ve" is ComfyUI's space of eps, v, x0 and EDM models."""


ANCESTRAL = ("eta", "s_noise")
SAMPLERS: dict[str, SamplerSpec] = {
    "euler": SamplerSpec(euler, (1,), options=("churn", "s_noise")),
    "heun": SamplerSpec(heun, (2,), options=("churn", "s_noise")),
    "ddim": SamplerSpec(ddim, (1,), options=ANCESTRAL),
    "ddpm": SamplerSpec(ddpm, (1,), stochastic=True, options=("s_noise",)),
    "reverse_sde": SamplerSpec(reverse_sde, (1,), stochastic=True, options=ANCESTRAL),
    "ipndm_v": SamplerSpec(ipndm_v, (1, 2, 3, 4)),
    "dpm_fast": SamplerSpec(dpm_fast, (2,)),
    "dpm_adaptive": SamplerSpec(dpm_adaptive, (2, 3)),
    "res_multistep_ancestral": SamplerSpec(res_multistep, (1, 2), stochastic=True, options=ANCESTRAL),
    "dpmpp_2m_cfg_pp": SamplerSpec(dpmpp_2m, (1, 2), cfg_pp=True),
    "dpmpp_2s_ancestral_cfg_pp": SamplerSpec(dpmpp_2s, (2,), stochastic=True, options=ANCESTRAL, cfg_pp=True),
    "res_multistep_cfg_pp": SamplerSpec(res_multistep, (1, 2), cfg_pp=True),
    "res_multistep_ancestral_cfg_pp": SamplerSpec(
        res_multistep, (1, 2), stochastic=True, options=ANCESTRAL, cfg_pp=True
    ),
    "gradient_estimation_cfg_pp": SamplerSpec(gradient_estimation, (1,), cfg_pp=True),
}
MAX_CHURN = 1000.0


def require_sampler(
    name: str, eta: float = 1.0, s_noise: float = 1.0, order: int = 0, churn: float = 0.0
) -> SamplerSpec:
    """The spec of `name` if it exists and the options are legal, else ValueError. `order` 0 is the usual one."""
    require_choice("sampler", name, tuple(SAMPLERS))
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be 0 (no noise) to 1 (the full posterior noise), got {eta}")
    if not 0.0 <= s_noise <= 10.0:
        raise ValueError(f"s_noise must be 0 to 10, got {s_noise}; 1 is right for a perfect model")
    if not 0.0 <= churn <= MAX_CHURN:
        raise ValueError(f"churn must be 0 (off) to {MAX_CHURN:g}, got {churn}; 10 to 40 are usual")
    spec = SAMPLERS[name]
    if order != 0 and order not in spec.orders:
        orders = " or ".join(str(each) for each in spec.orders)
        raise ValueError(f"{name} has order {orders}, not {order}; 0 takes the usual one")
    return spec


def require_levels(sigmas: Tensor, space: SpaceName) -> list[float]:
    """`sigmas` as floats if they are legal noise levels of the space, else ValueError."""
    levels = require_sigmas(sigmas).tolist()
    if space == "flow" and levels[0] > 1.0:
        raise ValueError(
            f"sigmas start at {levels[0]:g}, but a flow model's noise levels are 1 (noise) to 0 (data); they were "
            "probably made for an eps or v model: take the schedule from this model"
        )
    return levels


def sample(
    name: str,
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    space: str | None,
    noise: Noise,
    report: Report = lambda *_: None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    order: int = 0,
    churn: float = 0.0,
) -> Tensor:
    """x [B, …] at sigmas[0] carried to sigmas[-1] by the sampler `name`; options that it does not have are not used.

    ValueError for an illegal option or schedule, and where the sampler is not valid in the model's space (None: the
    model has no noise process).
    """
    spec = require_sampler(name, eta, s_noise, order, churn)
    if space not in spec.processes:
        what = f"this model's process ({space})" if space else "this model, which has no noise process"
        raise ValueError(f"the sampler {name} is for {' and '.join(spec.processes)} models, not for {what}")
    levels = require_levels(sigmas, space)
    given = {"eta": eta, "s_noise": s_noise, "churn": churn}
    options: dict[str, float | int] = {key: given[key] for key in spec.options}
    if len(spec.orders) > 1:
        options["order"] = order or spec.orders[-1]
    return spec.function(denoise, x, levels, SPACES[space], noise, report, **options)
