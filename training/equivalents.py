"""A timestep density in the words of other trainers, where they can say it (reference/training.md, 1.2)."""

import math

from .recipe import DensityConfig


def equivalents(config: DensityConfig, shift: float) -> str:
    """One line for each trainer that has these settings, for a flow model with this shift; else one that says so."""
    if config.t_min > 0 or config.t_max < 1:
        return "No equal settings elsewhere: other trainers rescale or clip to min and max t, here the shape is kept."
    lines = _WORDS.get(config.density, _none)(config, shift)
    return "\n".join(lines)


def _logit_normal(config: DensityConfig, shift: float) -> list[str]:
    return _from_logit(config.mean, config.std, shift)


def _log_snr_normal(config: DensityConfig, shift: float) -> list[str]:
    # logit t is -1/2 of the log-SNR.
    return _from_logit(-0.5 * config.mean, 0.5 * config.std, shift)


def _from_logit(mean: float, std: float, shift: float) -> list[str]:
    whole = shift * math.exp(mean)
    log_snr = f"{-2 * math.log(whole):.4g}, std {2 * std:.4g}"
    return [
        f"kohya sd-scripts: timestep_sampling shift, sigmoid_scale {std:.4g}, discrete_flow_shift {whole:.4g}",
        f"musubi-tuner: the same; or timestep_sampling logsnr with mean {log_snr}",
        f"OneTrainer: LOGIT_NORMAL, noising bias {mean:.4g}, noising weight {std - 1:.4g}, timestep shift {shift:.4g}",
        f"SimpleTuner: the default sigmoid with scale {std:.4g}, flow_schedule_shift {whole:.4g}",
    ]


def _uniform(config: DensityConfig, shift: float) -> list[str]:
    plain = ["kohya sd-scripts, musubi-tuner: timestep_sampling uniform"] if shift == 1.0 else []
    return [
        *plain,
        f"OneTrainer: UNIFORM, timestep shift {shift:.4g}",
        f"SimpleTuner: flow_use_uniform_schedule, flow_schedule_shift {shift:.4g}",
    ]


def _mode(config: DensityConfig, shift: float) -> list[str]:
    return [
        f"kohya sd-scripts (SD3): weighting_scheme mode, mode_scale {config.mode_scale:.4g}, "
        f"training_shift {shift:.4g}",
        f"OneTrainer: HEAVY_TAIL, noising weight {config.mode_scale:.4g}, timestep shift {shift:.4g}",
    ]


def _cosmap(config: DensityConfig, shift: float) -> list[str]:
    return [f"OneTrainer: COS_MAP, timestep shift {shift:.4g}. In kohya sd-scripts cosmap is a loss weight"]


def _beta(config: DensityConfig, shift: float) -> list[str]:
    return [
        f"OneTrainer: BETA, noising weight {config.beta_a:.4g}, noising bias {config.beta_b:.4g}, timestep shift "
        f"{shift:.4g}",
        f"SimpleTuner: flow_use_beta_schedule, alpha {config.beta_a:.4g}, beta {config.beta_b:.4g}, "
        f"flow_schedule_shift {shift:.4g}",
    ]


def _none(config: DensityConfig, shift: float) -> list[str]:
    return ["No equal settings in kohya sd-scripts, musubi-tuner, OneTrainer or SimpleTuner."]


_WORDS = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
    "log_snr_normal": _log_snr_normal,
    "mode": _mode,
    "cosmap": _cosmap,
    "beta": _beta,
}
