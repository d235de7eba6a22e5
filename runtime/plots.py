"""The two plots: schedules side by side, and the course of a training run. Numbers in, IMAGE out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ..schedules.curves import PROCESS_CHOICES as PROCESSES
from ..schedules.curves import QUANTITIES as QUANTITIES
from ..schedules.curves import X_AXES as X_AXES
from ..schedules.curves import Quantity, XAxis, positions, process_for, series
from ..schedules.process import VP, NoiseProcess
from ..schedules.validate import require_choice, require_sigmas
from .canvas import COLORS, DASHES, MAX_SIDE, MIN_SIDE, THEMES, Figure, Line, Panel
from .images import to_image_tensor
from .model_sampling import Sampling, read_sampling


__all__ = [
    "MAX_SIDE",
    "MIN_SIDE",
    "PROCESSES",
    "QUANTITIES",
    "THEMES",
    "X_AXES",
    "Y_AXES",
    "XAxis",
    "plot_schedules",
    "plot_training",
]

Y_AXES = ("auto", "linear", "log")
PALE_BLUE = "#9CC6DE"
MAX_LABEL, SHOWN_LABEL = 200, 60
_TITLES: dict[Quantity, tuple[str, str]] = {
    "sigma": ("Noise levels", "sigma, the noise level (no unit)"),
    "t": ("Time", "t, the noise fraction (0 = data, 1 = noise)"),
    "log_snr": ("Signal-to-noise ratio", "log-SNR = ln(alpha^2 / sigma^2) (nats)"),
    "step_size": ("Step sizes", "step size, the fall in sigma per step (no unit)"),
}
_X_TITLES: dict[XAxis, tuple[str, str]] = {
    "step": ("per sampling step", "sampling step"),
    "t": ("over time", "t, the noise fraction (1 = noise, 0 = data)"),
    "percent": ("over percent", "percent: the model's progress, as start_percent (0 to 1)"),
    "log_snr": ("over log-SNR", "log-SNR = ln(alpha^2 / sigma^2) (nats)"),
}


def plot_schedules(
    schedules: Mapping[str, Any],
    quantity: Quantity,
    process: str,
    y_axis: str,
    width: int,
    height: int,
    x_axis: XAxis = "step",
    theme: str = "light",
    model: ModelPatcher | None = None,
) -> torch.Tensor:
    """IMAGE of one curve per schedule over the step number, t, percent or log-SNR; noise is always on the left.

    `schedules` has "sigmas_1" … with "label_1" … beside them; missing sigmas are skipped, missing labels named after
    the input. `process` says how t and log-SNR follow from sigma: "auto" is flow where no sigma exceeds 1, else vp;
    a model says it itself, and what percent means.
    """
    lines, log, notes = schedule_lines(schedules, quantity, process, y_axis, x_axis, theme, model)
    title, unit = _TITLES[quantity]
    figure = Figure(
        [Panel(unit, lines, log)],
        x_label(x_axis, model),
        f"{title} {_X_TITLES[x_axis][0]}",
        notes,
        width,
        height,
        theme=THEMES[theme],
        whole_x=x_axis == "step",
        falling_x=x_axis == "t",
    )
    return to_image_tensor(figure.image)


def schedule_lines(
    schedules: Mapping[str, Any],
    quantity: Quantity,
    process: str,
    y_axis: str,
    x_axis: XAxis = "step",
    theme: str = "light",
    model: ModelPatcher | None = None,
) -> tuple[list[Line], bool, list[str]]:
    """The curves of `plot_schedules` as numbers, whether their y axis is logarithmic, and what the reader must know.

    Every x is finite; y can be infinite.
    """
    for name, value, choices in (
        ("quantity", quantity, QUANTITIES),
        ("process", process, PROCESSES),
        ("y_axis", y_axis, Y_AXES),
        ("x_axis", x_axis, X_AXES),
        ("theme", theme, tuple(THEMES)),
    ):
        require_choice(name, value, choices)
    given = {name: sigmas for name, sigmas in schedules.items() if name.startswith("sigmas_") and sigmas is not None}
    if not given:
        raise ValueError("nothing to plot: connect SIGMAS to sigmas_1, for example from Schedule (Tidetable_Schedule)")
    sampling = None if model is None else read_sampling(model)
    colors = THEMES[theme].lines
    lines, off_axis = [], 0
    for index, (name, sigmas) in enumerate(given.items()):
        sigmas = require_sigmas(sigmas, name, strict=False)
        noise = process_for(sigmas, process) if sampling is None else sampling.process
        points = _points(sigmas, quantity, x_axis, noise, sampling)
        x, y = ([point[i] for point in points if math.isfinite(point[0])] for i in (0, 1))
        off_axis += len(points) - len(x)
        title = f"{_label(schedules.get(name.replace('sigmas_', 'label_')), name)} ({_count(len(sigmas) - 1, 'step')}"
        title += f", {_process_name(noise)})" if {quantity, x_axis} & {"t", "log_snr"} else ")"
        style = {"color": colors[index % len(colors)], "dash": DASHES[index % len(DASHES)], "dots": len(y) <= 61}
        lines.append(Line(x, y, label=title, width=2.2, **style))
    log = _use_log(lines, quantity, y_axis)
    values = [y for line in lines for y in line.y]
    hidden = {
        "infinite log-SNR (sigma 0, or pure noise)": off_axis + sum(not math.isfinite(y) for y in values),
        "0, which a log axis cannot show": sum(log and y <= 0.0 for y in values),
    }
    return lines, log, [f"Not drawn: {_count(count, 'point')} at {what}." for what, count in hidden.items() if count]


def x_label(x_axis: XAxis, model: ModelPatcher | None) -> str:
    """Quantity and unit of the x axis."""
    if x_axis == "percent" and model is None:
        return "fraction of the steps (0 to 1)"
    return _X_TITLES[x_axis][1]


def _points(
    sigmas: torch.Tensor, quantity: Quantity, x_axis: XAxis, process: NoiseProcess, sampling: Sampling | None
) -> list[tuple[float, float]]:
    """(x, y) of one schedule. A step's size stands at the step's number, or where the step begins."""
    x = positions(sigmas, x_axis, process, None if sampling is None else sampling.shift or 1.0)
    if quantity == "step_size":
        # Steps are counted from 1; noise levels stand before, between and after them.
        x = x[1:] if x_axis == "step" else x[:-1]
    return list(zip(x, series(sigmas, quantity, process), strict=True))


def plot_training(loss_map: Mapping[str, Any], width: int, height: int) -> torch.Tensor:
    """IMAGE of a LOSS_MAP: loss and validation, and below them validation by t, learning rate and gradient norm.

    Core's plain {"loss": […]} is enough, what was not recorded is left out; numbers may be Python's or 0-d tensors. A
    running mean stands in for missing smoothed losses.
    """
    if not isinstance(loss_map, Mapping) or "loss" not in loss_map:
        raise ValueError(
            f'expected a LOSS_MAP with a list "loss", as a training node returns it, got {_kind(loss_map)}'
        )
    loss = _numbers(loss_map, "loss")
    if not loss:
        raise ValueError("the LOSS_MAP holds no losses: no training step was finished")
    steps = range(1, len(loss) + 1)
    panels = [Panel("loss per training step (no unit)", _loss_lines(loss_map, loss, steps), _wide(loss), share=3.0)]
    if shares := _by_t_lines(loss_map):
        panels.append(Panel("validation by t, relative to before training", shares, share=2.0))
    for key, title, color in (
        ("lr", "learning rate (per step)", COLORS[2]),
        ("grad_norm", "gradient norm before clipping", COLORS[4]),
    ):
        if values := _numbers(loss_map, key):
            _require_length(key, values, len(loss))
            panels.append(Panel(title, [Line(steps, values, color, width=1.6)], key == "grad_norm" and _wide(values)))
    notes = []
    if broken := sum(not math.isfinite(value) for value in loss):
        notes.append(
            f"{broken} of {len(loss)} losses are not finite numbers and are left as gaps: the run became unstable."
        )
    figure = Figure(panels, "training step", f"Training: {_count(len(loss), 'step')}", notes, width, height)
    return to_image_tensor(figure.image)


def _loss_lines(loss_map: Mapping[str, Any], loss: list[float], steps: range) -> list[Line]:
    """The first panel: every loss (pale once there is a smooth curve over it), then validation."""
    smooth, name = _numbers(loss_map, "loss_smoothed"), "loss, smoothed"
    if smooth:
        _require_length("loss_smoothed", smooth, len(loss))
    elif len(loss) >= 20:
        window = max(5, len(loss) // 20)
        smooth, name = running_mean(loss, window), f"loss, mean of the last {window} steps"
    lines = [
        Line(steps, loss, PALE_BLUE if smooth else COLORS[0], "loss", width=1.2 if smooth else 2.2, dots=len(loss) < 20)
    ]
    if smooth:
        lines.append(Line(steps, smooth, COLORS[0], f"{name} (end {_last(smooth)})", width=2.4))
    at, validation = _numbers(loss_map, "validation_steps"), _numbers(loss_map, "validation_loss")
    _require_length("validation_loss", validation, len(at), "validation_steps")
    if validation:
        lines.append(
            Line(at, validation, COLORS[1], f"validation loss (end {_last(validation)})", width=2.4, dots=True)
        )
    if loss_map.get("validation_base") is not None:
        base = _number(loss_map["validation_base"], "validation_base")
        ends = [min(steps[0], *at, steps[0]), max(steps[-1], *at, steps[-1])]
        lines.append(Line(ends, [base, base], COLORS[1], f"validation before training ({base:.4g})", 1.6, DASHES[1]))
    return lines


def _by_t_lines(loss_map: Mapping[str, Any]) -> list[Line]:
    """One curve for each t: its validation loss as a share of its first one. Below 1 is better than the base model."""
    levels, rows = _numbers(loss_map, "validation_t"), loss_map.get("validation_by_t") or []
    at = _numbers(loss_map, "validation_steps")
    if len(rows) < 2 or not levels:
        return []
    _require_length("validation_by_t", rows, len(at), "validation_steps")
    table = [_numbers({"validation_by_t": row}, "validation_by_t") for row in rows]
    for row in table:
        _require_length("a row of validation_by_t", row, len(levels), "validation_t")
    lines = [Line([at[0], at[-1]], [1.0, 1.0], "#7F7F7F", "before training", 1.6, DASHES[1])]
    for index, (t, first) in enumerate(zip(levels, table[0], strict=True)):
        shares = [row[index] / first if first > 0 else math.nan for row in table]
        lines.append(Line(at, shares, COLORS[index % 6], f"t {t:g} ({_last(shares)})", 2.0, dots=True))
    return lines


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of the last `window` finite values; nan where there is none."""
    means = []
    for end in range(1, len(values) + 1):
        recent = [value for value in values[max(0, end - window) : end] if math.isfinite(value)]
        means.append(math.fsum(recent) / len(recent) if recent else math.nan)
    return means


def _last(values: Sequence[float]) -> str:
    return f"{next((value for value in reversed(values) if math.isfinite(value)), math.nan):.4g}"


def _numbers(loss_map: Mapping[str, Any], key: str) -> list[float]:
    """The list under `key` as floats; empty where there is none."""
    values = loss_map.get(key)
    if values is None:
        return []
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"LOSS_MAP's {key} must be a list of numbers, got {_kind(values)}")
    return [_number(value, key) for value in values]


def _number(value: Any, key: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"LOSS_MAP's {key} must hold numbers, got {_kind(value)}") from None


def _kind(value: Any) -> str:
    """What something is, for an error message."""
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, list(value)[:5])) or 'nothing'}"
    return type(value).__name__


def _require_length(key: str, values: Sequence[float], length: int, other: str = "loss") -> None:
    if len(values) != length:
        raise ValueError(f"LOSS_MAP's {key} has {len(values)} values but {other} has {length}; they must be as many")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _label(label: str | None, name: str) -> str:
    """Legend text of a schedule: its label on one line, or the input's name."""
    label = " ".join((label or "").split()) or name
    if len(label) > MAX_LABEL:
        raise ValueError(f"{name.replace('sigmas_', 'label_')} has {len(label)} characters; use at most {MAX_LABEL}")
    return label if len(label) <= SHOWN_LABEL else f"{label[: SHOWN_LABEL - 3]}..."


def _process_name(process: NoiseProcess) -> str:
    if isinstance(process, VP) and process.alpha_bar[-1] == 0.0:
        return "vp, zero terminal SNR"
    return process.name


def _use_log(lines: Sequence[Line], quantity: Quantity, y_axis: str) -> bool:
    """Auto: a log axis for sigmas beyond flow's 0 to 1, which span decades."""
    if quantity == "log_snr":
        return False
    return y_axis == "log" or (
        y_axis == "auto" and quantity != "t" and any(max(line.y, default=0.0) > 2.0 for line in lines)
    )


def _wide(values: Sequence[float]) -> bool:
    """Whether positive values span more than two decades."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0.0 and max(finite) > 100.0 * min(finite)
