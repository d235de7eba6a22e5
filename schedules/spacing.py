"""Steps to sigmas: which noise levels a sampler visits.

Every spacing is a function (grid, steps) -> float64 [steps + 1], falling from the grid's largest sigma (`leading`
alone starts below it, as published) to a final 0. Register a new one in SPACINGS. Where ComfyUI's scheduler of the
same name is right the numbers are the same; asking for n steps always gives n.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy
import torch
from torch import Tensor

from .edit import tail_for_denoise
from .grid import NoiseGrid as NoiseGrid
from .grid import flow_grid as flow_grid
from .grid import table_grid as table_grid
from .ramps import beta_quantiles, exponential_ramp, karras_ramp, trailing_t
from .shift import stretch_terminal
from .validate import require_choice, require_denoise, require_steps


Axis = Literal["native", "log_snr", "sigma", "t"]
AXES: tuple[Axis, ...] = get_args(Axis)
DenoiseAs = Literal["steps", "noise_level"]
DENOISE_AS: tuple[DenoiseAs, ...] = get_args(DenoiseAs)

# Sabour et al. 2024, "Align Your Steps" (arXiv:2404.14507): the published levels of 10 steps, to ComfyUI's digits.
AYS_LEVELS: dict[str, tuple[float, ...]] = {
    "sd15": (
        14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904,
        0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582,
    ),
    "sdxl": (
        14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141, 0.5550693289,
        0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582,
    ),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}  # fmt: skip


# ── in the model's own time ─────────────────────────────────────────────────────────────────────────


def trailing(grid: NoiseGrid, steps: int) -> Tensor:
    """Equal steps in t from 1: t = 1 − i/steps (Lin et al. 2023, arXiv:2305.08891, Table 2, not rounded to rows)."""
    return _with_zero(grid.sigma_of_t(trailing_t(steps)))


def simple(grid: NoiseGrid, steps: int) -> Tensor:
    """`trailing` rounded up to rows of the table, as ComfyUI's "simple"."""
    stride = len(grid.sigmas) / steps
    rows = [-(1 + int(i * stride)) for i in range(steps)]
    return _with_zero(grid.sigmas[rows])


def leading(grid: NoiseGrid, steps: int) -> Tensor:
    """Every (N // steps)-th row from the second one up (Lin et al. 2023, Table 2; ComfyUI's "ddim_uniform").

    As published it starts below the largest sigma, one stride down: the flaw that `trailing` mends.
    """
    rows = len(grid.sigmas)
    stride = max(rows // steps, 1)
    first = min(1, rows - 1 - (steps - 1) * stride)
    if first < 0:
        raise ValueError(_too_many("leading", steps, grid))
    return _with_zero(grid.sigmas[first : first + (steps - 1) * stride + 1 : stride].flip(0))


def normal(grid: NoiseGrid, steps: int) -> Tensor:
    """Equal steps over the rows, both ends included: "linspace" of Lin et al. 2023, Table 2, not rounded to rows.

    ComfyUI's "normal" where the model has no shift. On a shifted flow that one shifts its lowest level twice.
    """
    return _at_rows(grid, len(grid.sigmas) - 1.0, 0.0, steps)


def ddim_uniform(grid: NoiseGrid, steps: int) -> Tensor:
    """Equal steps over the rows from the top one to the second one, where ComfyUI's "ddim_uniform" ends as well.

    That one starts a stride below the largest sigma, and its number of steps is off where they do not divide the rows.
    """
    return _at_rows(grid, len(grid.sigmas) - 1.0, min(1.0, len(grid.sigmas) - 1.0), steps)


def sgm_uniform(grid: NoiseGrid, steps: int) -> Tensor:
    """steps + 1 equally spaced rows without the lowest, as ComfyUI's "sgm_uniform" where the model has no shift."""
    last = len(grid.sigmas) - 1.0
    return _at_rows(grid, last, last / steps, steps)


def beta(grid: NoiseGrid, steps: int, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Rows at quantiles of Beta(a, b): dense at both ends (Lee et al. 2024, arXiv:2407.12173).

    Rounded to rows as in ComfyUI's "beta" while the rows differ; where rounding would merge two steps the quantiles are
    used as they are, instead of dropping one.
    """
    last = len(grid.sigmas) - 1
    positions = beta_quantiles(trailing_t(steps), a, b) * last
    rows = positions.round()
    if len(rows.unique()) == steps:
        return _with_zero(grid.sigmas[rows.long()])
    return _with_zero(grid.sigma_of_t((positions + 1.0) / (last + 1.0)))


# ── in sigma ────────────────────────────────────────────────────────────────────────────────────────


def linear(grid: NoiseGrid, steps: int) -> Tensor:
    """Equal steps in sigma from the largest to 0, whatever the shift."""
    return torch.linspace(grid.sigma_max, 0.0, steps + 1, dtype=torch.float64)


def karras(grid: NoiseGrid, steps: int, rho: float = 7.0) -> Tensor:
    """sigma^(1/rho) linear between the ends (Karras et al. 2022, arXiv:2206.00364, Eq. 5).

    Made for eps and v models: on flow it ignores the shift and spends about half of the steps below sigma 0.1.
    """
    return _between_ends(grid, karras_ramp(grid.sigma_max, grid.sigma_min, steps, rho))


def polyexponential(grid: NoiseGrid, steps: int, rho: float = 1.0) -> Tensor:
    """ln sigma a power of the step: `exponential` at rho 1, denser at low noise for larger ones (k-diffusion)."""
    return _between_ends(grid, exponential_ramp(grid.sigma_max, grid.sigma_min, steps, rho))


def exponential(grid: NoiseGrid, steps: int) -> Tensor:
    """ln sigma linear between the ends: equal steps in log-SNR for eps and v models; for flow no better than karras."""
    return polyexponential(grid, steps)


def kl_optimal(grid: NoiseGrid, steps: int) -> Tensor:
    """atan(sigma) linear between the ends (Sabour et al. 2024, arXiv:2404.14507); ComfyUI's, and one step too."""
    high, low = math.atan(grid.sigma_max), math.atan(grid.sigma_min)
    return _between_ends(grid, torch.linspace(high, low, steps, dtype=torch.float64).tan())


def linear_quadratic(grid: NoiseGrid, steps: int, threshold: float = 0.025) -> Tensor:
    """Half of the steps linear over the noisiest `threshold`, the rest quadratic without a kink (Genmo's Mochi).

    The rule is made for the noise fraction: sigma itself on flow models, as in ComfyUI. On eps and v models it is the
    time, because `threshold` of a sigma of 14.6 or 4518 has no meaning.
    """
    half = steps // 2
    step = torch.arange(steps, dtype=torch.float64)
    slope = threshold / half if half else 0.0
    bend = (1.0 - slope * steps) / (steps - half) ** 2
    fraction = 1.0 - slope * step - bend * (step - half).clamp(min=0.0) ** 2
    return _with_zero(fraction * grid.sigma_max if grid.is_flow else grid.sigma_of_t(fraction))


# ── in log-SNR ──────────────────────────────────────────────────────────────────────────────────────


def log_snr(grid: NoiseGrid, steps: int) -> Tensor:
    """Equal steps in log-SNR between the ends. A flow's pure noise, at −inf, stands for the highest finite level."""
    return _between_ends(grid, grid.sigma_of_log_snr(torch.linspace(*grid.log_snr_range, steps, dtype=torch.float64)))


def cosine(grid: NoiseGrid, steps: int) -> Tensor:
    """Equal steps in the time of the cosine schedule, noise/signal = tan(pi·t/2), between the ends.

    Nichol & Dhariwal 2021 (arXiv:2102.09672), Eq. 17 without its offset. On eps and v models it is `kl_optimal`.
    """
    high, low = (math.atan(math.exp(-0.5 * end)) for end in _ends(grid))
    return _at_ratios(grid, torch.linspace(high, low, steps, dtype=torch.float64).tan().log())


def laplace(grid: NoiseGrid, steps: int, center: float = 0.0, scale: float = 0.5) -> Tensor:
    """Quantiles of a Laplace distribution of ln(noise/signal), dense around `center` (Hang et al., arXiv:2407.03297).

    Equal probability between neighbors, cut off at the model's ends; ComfyUI's LaplaceScheduler clamps there instead,
    which repeats levels, and leaves out the final 0. In log-SNR the spread is twice `scale`.
    """
    high, low = (_laplace_cdf((-0.5 * end - center) / scale) for end in _ends(grid))
    quantile = torch.linspace(high, low, steps, dtype=torch.float64)
    tail = torch.log(2.0 * torch.minimum(quantile, 1.0 - quantile))
    return _at_ratios(grid, center + scale * torch.where(quantile < 0.5, tail, -tail))


def align_your_steps(grid: NoiseGrid, steps: int, table: str) -> Tensor:
    """A published table of Align Your Steps (arXiv:2404.14507); ln sigma is interpolated for steps other than 10.

    The levels are signal-to-noise ratios, so a flow model visits the same ratios. What lies outside the model's range
    is cut off first.
    """
    levels = -2.0 * numpy.log(AYS_LEVELS[table])
    places = numpy.arange(float(len(levels)))
    start, end = numpy.interp(_ends(grid), levels, places)
    log_snrs = numpy.interp(numpy.linspace(start, end, steps + 1), places, levels)
    return _between_ends(grid, grid.sigma_of_log_snr(torch.as_tensor(log_snrs[:-1])))


@dataclass(frozen=True)
class Spacing:
    """A rule, where it lives, and which of its parameters can be set."""

    place: Callable[..., Tensor]
    """(grid, steps, …) -> sigmas."""
    axis: Axis
    """The axis that the rule is written in."""
    parameters: tuple[str, ...] = ()


SPACINGS: dict[str, Spacing] = {
    "trailing": Spacing(trailing, "t"),
    "simple": Spacing(simple, "t"),
    "karras": Spacing(karras, "sigma", ("rho",)),
    "exponential": Spacing(exponential, "sigma"),
    "beta": Spacing(beta, "t", ("a", "b")),
    "linear": Spacing(linear, "sigma"),
    "sgm_uniform": Spacing(sgm_uniform, "t"),
    "normal": Spacing(normal, "t"),
    "linspace": Spacing(normal, "t"),
    "leading": Spacing(leading, "t"),
    "ddim_uniform": Spacing(ddim_uniform, "t"),
    "linear_quadratic": Spacing(linear_quadratic, "sigma"),
    "kl_optimal": Spacing(kl_optimal, "sigma"),
    "polyexponential": Spacing(polyexponential, "sigma", ("rho",)),
    "log_snr": Spacing(log_snr, "log_snr"),
    "cosine": Spacing(cosine, "log_snr"),
    "laplace": Spacing(laplace, "log_snr", ("center", "scale")),
    "ays_sd15": Spacing(partial(align_your_steps, table="sd15"), "log_snr"),
    "ays_sdxl": Spacing(partial(align_your_steps, table="sdxl"), "log_snr"),
    "ays_svd": Spacing(partial(align_your_steps, table="svd"), "log_snr"),
}


def schedule(
    grid: NoiseGrid,
    spacing: str,
    steps: int,
    denoise: float = 1.0,
    *,
    axis: Axis = "native",
    denoise_as: DenoiseAs = "steps",
    terminal: float = 0.0,
    rho: float | None = None,
    a: float | None = None,
    b: float | None = None,
    center: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Sigmas of exactly `steps` steps, float64 [steps + 1], strictly falling to 0.

    `denoise` in (0, 1] with `denoise_as` "steps": the last steps of a schedule of int(steps/denoise) steps, as in
    ComfyUI. With "noise_level": the spacing is laid over the levels up to sigma = denoise (flow) or t = denoise (eps
    and v models), so it starts exactly there.
    `axis` other than "native" keeps the spacing's points as fractions of the model's range, but measures that range in
    log-SNR, sigma or t. `terminal` above 0 stretches a flow schedule so that its last level above 0 is this one.
    `rho` (karras 7, polyexponential 1), `a` and `b` (beta), `center` and `scale` (laplace): None is the usual value.
    Raises ValueError for anything else, and where the grid has too few levels for that many steps.
    """
    require_steps(steps)
    _require_options(spacing, denoise, axis, denoise_as, terminal)
    given = {"rho": rho, "a": a, "b": b, "center": center, "scale": scale}
    options = {name: _require_parameter(name, value) for name, value in given.items() if value is not None}
    total = steps
    if denoise_as == "noise_level":
        grid = _starting_at(grid, denoise)
    else:
        total = int(steps / denoise)
    if total > 1_000_000:
        raise ValueError(
            f"{steps} steps at denoise {denoise} are the end of a schedule of {total} steps; raise denoise"
        )
    rule = SPACINGS[spacing]
    sigmas = rule.place(grid, total, **{name: options[name] for name in rule.parameters if name in options})
    if axis not in ("native", rule.axis):
        sigmas = _on_axis(grid, sigmas, rule.axis, axis)
    if terminal > 0.0:
        sigmas = _stretched(grid, sigmas, terminal)
    sigmas = tail_for_denoise(sigmas, steps)
    if not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError(_too_many(spacing, total, grid))
    return sigmas


def _require_options(spacing: str, denoise: float, axis: str, denoise_as: str, terminal: float) -> None:
    require_choice("spacing", spacing, tuple(SPACINGS))
    require_choice("axis", axis, AXES)
    require_choice("denoise_as", denoise_as, DENOISE_AS)
    require_denoise(denoise)
    if not 0.0 <= terminal < 1.0:
        raise ValueError(f"terminal must be 0 (off) or a sigma between 0 and 1, got {terminal}; Qwen-Image has 0.02")


def _require_parameter(name: str, value: float) -> float:
    if not math.isfinite(value) or abs(value) > 100.0 or (name != "center" and value <= 0.0):
        limits = "-100 to 100" if name == "center" else "above 0 and at most 100"
        raise ValueError(f"the spacing's {name} must be {limits}, got {value}")
    return value


def _too_many(spacing: str, steps: int, grid: NoiseGrid) -> str:
    return (
        f"{spacing} cannot place {steps} different noise levels on this model's {len(grid.sigmas)} rows; "
        "use fewer steps or another spacing"
    )


def _starting_at(grid: NoiseGrid, denoise: float) -> NoiseGrid:
    """The grid up to sigma = denoise on flow models, up to t = denoise on others."""
    if not grid.is_flow:
        return grid.below(denoise)
    return (
        grid
        if denoise >= grid.sigma_max
        else grid.below(float(grid.t_of_sigma(torch.tensor(denoise, dtype=torch.float64))))
    )


def _stretched(grid: NoiseGrid, sigmas: Tensor, terminal: float) -> Tensor:
    """`stretch_terminal` between the first level, which stays, and the last one above 0."""
    if not grid.is_flow:
        raise ValueError(f"terminal {terminal} is for flow models (sigma 0 to 1); set it to 0 for this model")
    if len(sigmas) < 3 or terminal >= float(sigmas[0]):
        raise ValueError(
            f"cannot stretch {len(sigmas) - 1} step(s) from sigma {float(sigmas[0]):g} to end at terminal {terminal}; "
            "it needs 2 steps and a terminal below the first sigma. Set terminal to 0"
        )
    return stretch_terminal(sigmas / sigmas[0], terminal / float(sigmas[0])) * sigmas[0]


def _on_axis(grid: NoiseGrid, sigmas: Tensor, source: Axis, axis: Axis) -> Tensor:
    """Points at the same fractions of the model's range, measured on another axis."""
    to_axis = {"t": grid.t_of_sigma, "sigma": lambda levels: levels, "log_snr": grid.log_snr}
    from_axis = {"t": grid.sigma_of_t, "sigma": lambda levels: levels, "log_snr": grid.sigma_of_log_snr}

    def ends(name: Axis) -> Tensor:
        return (
            torch.tensor(grid.log_snr_range, dtype=torch.float64)
            if name == "log_snr"
            else to_axis[name](grid.sigmas[[-1, 0]])
        )

    (high, low), (to_high, to_low) = ends(source), ends(axis)
    # Above the highest finite log-SNR there is only the end itself.
    fraction = ((to_axis[source](sigmas[:-1]) - low) / (high - low)).clamp(max=1.0)
    placed = from_axis[axis](to_low + fraction * (to_high - to_low))
    from_the_top = math.isclose(float(sigmas[0]), grid.sigma_max, rel_tol=1e-12)
    return _between_ends(grid, placed) if from_the_top else _with_zero(placed)


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _between_ends(grid: NoiseGrid, sigmas: Tensor) -> Tensor:
    """The levels with the first one exactly the model's largest (rounding, or an infinite log-SNR), and a final 0."""
    return _with_zero(torch.cat([grid.sigmas[-1:], sigmas[1:]]))


def _at_rows(grid: NoiseGrid, first: float, last: float, steps: int) -> Tensor:
    return _with_zero(grid.sigma_of_t((torch.linspace(first, last, steps, dtype=torch.float64) + 1) / len(grid.sigmas)))


def _at_ratios(grid: NoiseGrid, log_ratios: Tensor) -> Tensor:
    """Levels at these ln(noise/signal), the first one moved to the model's largest."""
    return _between_ends(grid, grid.sigma_of_log_snr(-2.0 * log_ratios))


def _ends(grid: NoiseGrid) -> tuple[float, float]:
    """log-SNR of the largest and of the smallest level, −inf for a flow's pure noise."""
    ends = grid.log_snr(grid.sigmas[[-1, 0]])
    return float(ends[0]), float(ends[1])


def _laplace_cdf(x: float) -> float:
    return 0.5 * math.exp(x) if x < 0.0 else 1.0 - 0.5 * math.exp(-x)
