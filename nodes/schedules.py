"""Nodes that choose the noise levels of a sampling run."""

from comfy_api.latest import io

from ..runtime.schedules import AXES, DENOISE_AS, MAX_STEPS, SPACING_NAMES, make_schedule
from ..runtime.shells import remember


def _number(name: str, default: float, low: float, high: float, tooltip: str) -> io.Float.Input:
    """An input that older saved graphs do not have."""
    return io.Float.Input(name, default=default, min=low, max=high, step=0.01, optional=True, tooltip=tooltip)


class Schedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_Schedule",
            display_name="Schedule (sigmas)",
            category="Tidetable/schedule",
            description="The noise levels that a sampler visits, from the model's own noise schedule with its shift: "
            "exactly as many steps as asked for, starting at the model's largest sigma.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to sample, after Flow Shift or Zero Terminal SNR. It is only read."
                ),
                io.Combo.Input(
                    "spacing",
                    options=list(SPACING_NAMES),
                    default="trailing",
                    tooltip="trailing or simple: equal steps in time, right for every model. beta: dense at both ends. "
                    "karras, exponential: for eps and v models. linear: equal steps in sigma. log_snr: equal steps in "
                    "log-SNR. The help page has the rule of each.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="Number of sampling steps. 0 is not possible. Typical: 20 to 50, 1 to 8 for distilled "
                    "models.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Fraction of the noise range to run, always in `steps` steps; denoise_as says of what. 1 = "
                    "from pure noise; 0 is not possible. Typical: 1 for text to image, 0.3 to 0.8 for image to image.",
                ),
                io.Combo.Input(
                    "axis",
                    options=list(AXES),
                    default="native",
                    optional=True,
                    tooltip="What the spacing's points are fractions of. native: the axis that its rule is made for. "
                    "log_snr, sigma, or t (the model's own time, before its shift): the same fractions of that range.",
                ),
                io.Combo.Input(
                    "denoise_as",
                    options=list(DENOISE_AS),
                    default="steps",
                    optional=True,
                    tooltip="steps: denoise 0.5 runs the second half of a schedule of twice the steps, as in ComfyUI. "
                    "noise_level: it starts exactly at sigma 0.5 on a flow model, at half of the time on others.",
                ),
                _number(
                    "terminal",
                    0.0,
                    0.0,
                    0.99,
                    "Flow models: stretch the schedule so that its last level above 0 is this sigma. 0 = off. "
                    "Official: 0.02 for Qwen-Image, 0.1 for LTX-Video.",
                ),
                _number(
                    "rho",
                    0.0,
                    0.0,
                    100.0,
                    "karras and polyexponential only: exponent, larger spends more steps at low noise. 0 = the usual "
                    "one (karras 7, polyexponential 1). Typical: 3 to 10, and 0.5 to 2.",
                ),
                _number(
                    "beta_a",
                    0.6,
                    0.01,
                    50.0,
                    "beta only: first parameter of Beta(a, b), below 1 is dense at low noise. 0 is not possible. "
                    "Typical: 0.5 to 1.",
                ),
                _number(
                    "beta_b",
                    0.6,
                    0.01,
                    50.0,
                    "beta only: second parameter of Beta(a, b), below 1 is dense at high noise. 0 is not possible. "
                    "Typical: 0.5 to 1.",
                ),
                _number(
                    "laplace_center",
                    0.0,
                    -10.0,
                    10.0,
                    "laplace only: ln(noise/signal) where the steps are densest. 0 = equal parts of both. Typical: -1 "
                    "to 1.",
                ),
                _number(
                    "laplace_scale",
                    0.5,
                    0.01,
                    10.0,
                    "laplace only: how far the steps spread, in ln(noise/signal). 0 is not possible. Typical: 0.5 to "
                    "2.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(
                    display_name="SIGMAS", tooltip="steps + 1 noise levels ending in 0, for SamplerCustom."
                )
            ],
        )

    @classmethod
    def execute(cls, model, spacing, steps, denoise, **options) -> io.NodeOutput:
        return io.NodeOutput(make_schedule(remember(model), spacing, steps, denoise, **options))


NODES: list[type[io.ComfyNode]] = [Schedule]
