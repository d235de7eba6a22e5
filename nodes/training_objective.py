"""What a training run minimizes, and at which noise levels: settings of Train LoRA."""

from typing import Any

from comfy_api.latest import io

from ..runtime.objective import (
    DENSITY_FAMILIES,
    PRESETS,
    DensityConfig,
    ObjectiveConfig,
    make_density,
    show_density,
)


_DENSITY, _OBJECTIVE = DensityConfig(), ObjectiveConfig()
ObjectiveSettings = io.Custom("TIDETABLE_OBJECTIVE")
TimestepDensitySettings = io.Custom("TIDETABLE_TIMESTEP_DENSITY")


def _number(name: str, default: float, low: float, high: float, tooltip: str, step: float = 0.01) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=low, max=high, step=step, tooltip=tooltip)


def _choice(name: str, options: list[str], default: Any, tooltip: str) -> io.Combo.Input:
    return io.Combo.Input(name, options=options, default=default, tooltip=tooltip)


class TimestepDensity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_TimestepDensity",
            display_name="Timestep Density",
            category="Tidetable/training",
            description=(
                "Which noise levels t Train LoRA draws: a density, a shift and a range. Shows the density,"
                " and says how "
                "kohya, musubi, OneTrainer and SimpleTuner are set to the same."
            ),
            inputs=[
                _choice(
                    "preset",
                    list(PRESETS),
                    "custom",
                    "custom: the inputs below. bigASP: logit-normal, shift 3. Qwen-Image: logit-normal, its rule."
                    " A preset replaces density, mean, std and shift.",
                ),
                _choice(
                    "density",
                    [
                        "uniform",
                        "logit_normal",
                        "mode",
                        "cosmap",
                        "beta",
                        "log_snr_normal",
                        "content",
                        "style",
                        "piecewise",
                    ],
                    _DENSITY.density,
                    "Before the shift. logit_normal favors the middle; content favors much noise, style"
                    " little; the others"
                    " are on the help page.",
                ),
                _number(
                    "mean",
                    _DENSITY.mean,
                    -20.0,
                    20.0,
                    "logit_normal: mean of ln(t/(1-t)), above 0 is more noise. log_snr_normal: mean of the log-SNR. 0"
                    " is centered; -1 to 1 is typical.",
                ),
                _number(
                    "std",
                    _DENSITY.std,
                    0.01,
                    20.0,
                    "Width of the same. 0 is not possible; 0.5 to 2 is typical.",
                ),
                _number(
                    "mode_scale",
                    _DENSITY.mode_scale,
                    -1.0,
                    1.75,
                    "mode only: above 0 favors the middle, below 0 the ends. 0 is uniform; 1.29 is typical.",
                ),
                _number(
                    "beta_a", _DENSITY.beta_a, 0.01, 20.0, "beta only: larger is more noise. 0 not possible; 1 to 3."
                ),
                _number(
                    "beta_b", _DENSITY.beta_b, 0.01, 20.0, "beta only: larger is less noise. 0 not possible; 1 to 3."
                ),
                io.String.Input(
                    "knots",
                    default="0:1, 0.5:2, 1:1",
                    tooltip="piecewise only: t:weight pairs with rising t; the density is linear between them and 0"
                    " outside. Empty is not possible.",
                ),
                _choice(
                    "shift_mode",
                    ["auto", "none", "shift", "mu", "resolution", "official", "model"],
                    _DENSITY.shift_mode,
                    "auto: the family's training rule, else the model's own shift, none on eps and v. resolution: shift"
                    " times the root of the area over 1024x1024, for each image.",
                ),
                _number(
                    "shift",
                    _DENSITY.shift,
                    0.01,
                    100.0,
                    "Modes shift and resolution: factor on the odds t/(1-t). 1 is none, 0 not possible; 1"
                    " to 6 is typical.",
                ),
                _number("mu", _DENSITY.mu, -4.6, 4.6, "Mode mu: logarithm of the shift. 0 is none; 0 to 2 is typical."),
                _choice(
                    "family",
                    list(DENSITY_FAMILIES),
                    "auto",
                    "Whose rule official means. auto: that of the model that is trained.",
                ),
                _number("t_min", _DENSITY.t_min, 0.0, 0.99, "Smallest t that is drawn. 0 is off; 0 to 0.2 is typical."),
                _number(
                    "t_max",
                    _DENSITY.t_max,
                    0.01,
                    1.0,
                    "Largest t that is drawn. 0 is not possible, 1 is off; 0.8 to 1.",
                ),
                io.Boolean.Input(
                    "stratified",
                    default=_DENSITY.stratified,
                    tooltip="One draw in each of batch_size equal shares of the probability, for less noise in the"
                    " gradient. Off: independent draws.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Only for the picture and the words: whose shift and noise levels hold.",
                ),
            ],
            outputs=[
                TimestepDensitySettings.Output(
                    display_name="timestep_density", tooltip="For Train LoRA's timestep_density."
                ),
                io.String.Output(display_name="settings", tooltip="The shift, and equal settings of other trainers."),
                io.Image.Output(display_name="histogram", tooltip="The density over t, at 1024x1024 pixels."),
            ],
        )

    @classmethod
    def execute(cls, preset, family, knots, model=None, **settings) -> io.NodeOutput:
        config = make_density(preset, family, knots, **settings)
        image, text = show_density(config, model, 1024, 1024)
        return io.NodeOutput(config, text, image, ui={"text": (text,)})


class Objective(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_Objective",
            display_name="Training Objective",
            category="Tidetable/training",
            description=(
                "How Train LoRA turns an error into a loss: where it is measured, its shape and weight, the noise, and "
                "flow matching for eps and v models."
            ),
            inputs=[
                _choice(
                    "flow",
                    ["off", "graft", "bridge"],
                    _OBJECTIVE.flow,
                    "For eps and v models. graft: becomes a flow model (U-Nets only; the result needs long training)."
                    " bridge: the same model, weighted as a flow model.",
                ),
                _number(
                    "graft_shift",
                    _OBJECTIVE.graft_shift,
                    0.01,
                    100.0,
                    "graft only: the flow model's shift, in training and in the output. 0 is not possible; 3 to 6.",
                ),
                _choice(
                    "prediction",
                    ["native", "eps", "v", "x0", "velocity"],
                    _OBJECTIVE.prediction,
                    "Where the error is measured; the network is asked what it always was. native is the usual choice.",
                ),
                _choice(
                    "loss",
                    ["mse", "huber", "l1"],
                    _OBJECTIVE.loss,
                    "mse: squared error. huber: square up to huber_c, then linear, against outliers. l1:"
                    " absolute error.",
                ),
                _number(
                    "huber_c",
                    _OBJECTIVE.huber_c,
                    0.0001,
                    100.0,
                    "huber only: error at which it turns linear. 0 is not possible; 0.01 to 1 is typical.",
                    0.0001,
                ),
                _choice(
                    "huber_schedule",
                    ["constant", "exponential", "snr"],
                    _OBJECTIVE.huber_schedule,
                    "huber only. exponential: from 1 at t = 0 to huber_c at t = 1. snr: the same by the noise ratio.",
                ),
                _choice(
                    "weighting",
                    ["none", "min_snr", "soft_min_snr", "debiased", "p2", "sigma_sqrt", "cosmap"],
                    _OBJECTIVE.weighting,
                    "Weight of the loss at each noise level, the same training on every kind of model. none is usual on"
                    " flow, min_snr on eps and v.",
                ),
                _number(
                    "gamma",
                    _OBJECTIVE.gamma,
                    0.01,
                    100.0,
                    "min_snr, soft_min_snr: SNR where the weight stops growing; 5 is typical. p2: exponent; 0.5 to 1."
                    " 0 is not possible.",
                ),
                _number(
                    "max_weight",
                    _OBJECTIVE.max_weight,
                    0.01,
                    1e6,
                    "No squared error counts more than this, however near t is to 0. 0 is not possible; 100 to 1000.",
                ),
                _number(
                    "offset_noise",
                    _OBJECTIVE.offset_noise,
                    0.0,
                    1.0,
                    "Noise added to whole channels, for darker and brighter pictures on eps. 0 is off; 0.03 to 0.1.",
                ),
                _number(
                    "pyramid_discount",
                    _OBJECTIVE.pyramid_discount,
                    0.0,
                    0.99,
                    "Coarse noise: half the size counts this much, a quarter its square. 0 is off; 0.1 to 0.4.",
                ),
                _number(
                    "input_perturbation",
                    _OBJECTIVE.input_perturbation,
                    0.0,
                    1.0,
                    "The network sees this much more noise than the target says. 0 is off; 0.05 to 0.1 is typical.",
                ),
                io.Boolean.Input(
                    "ot_pairing",
                    default=_OBJECTIVE.ot_pairing,
                    tooltip="Exchanges noises within a batch so that each goes to a near sample. Works best with large"
                    " batches. Off: at random.",
                ),
                _choice(
                    "masked_loss",
                    ["off", "on", "normalized"],
                    _OBJECTIVE.masked_loss,
                    "Learns inside the latents' masks (Set Latent Noise Mask). off: masks are not used. on: a small"
                    " mask gives a small loss. normalized: every mask counts the same.",
                ),
                _number(
                    "unmasked_weight",
                    _OBJECTIVE.unmasked_weight,
                    0.0,
                    1.0,
                    "masked_loss only: what the error outside the mask counts. 0 is nothing, 1 as much as inside; 0 to"
                    " 0.1 is typical.",
                ),
                _number(
                    "prior_weight",
                    _OBJECTIVE.prior_weight,
                    0.0,
                    1000.0,
                    "Keeps what the model does without the LoRA: what the difference to its own answer counts. 0 is"
                    " off; 0.1 to 1 is typical.",
                ),
                _choice(
                    "prior_on",
                    ["class_prompt", "outside_mask"],
                    _OBJECTIVE.prior_on,
                    "prior_weight only: where nothing shall change. class_prompt: on prior_conditioning, everywhere."
                    " outside_mask: on the sample's own prompt, outside its mask; needs masked_loss.",
                ),
                io.Conditioning.Input(
                    "prior_conditioning",
                    optional=True,
                    tooltip="For class_prompt: what the LoRA shall not change, like 'a photo of a person' for a LoRA of"
                    " one person. A list: one for each latent. Not connected: Train LoRA's empty.",
                ),
            ],
            outputs=[ObjectiveSettings.Output(display_name="objective", tooltip="For Train LoRA's objective.")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        return io.NodeOutput(ObjectiveConfig(**settings))


NODES: list[type[io.ComfyNode]] = [Objective, TimestepDensity]
