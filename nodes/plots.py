"""Nodes that draw: schedules side by side, and the course of a training run."""

from comfy_api.latest import io

from ..runtime.plots import (
    MAX_SIDE,
    MIN_SIDE,
    PROCESSES,
    QUANTITIES,
    THEMES,
    X_AXES,
    Y_AXES,
    XAxis,
    plot_schedules,
    plot_training,
)


SLOTS = range(1, 9)


def _size(name: str, default: int) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=default,
        min=MIN_SIDE,
        max=MAX_SIDE,
        step=8,
        tooltip=f"{name.capitalize()} of the picture in pixels. 0 is not possible. Typical: 512 to 2048.",
    )


def _schedule_inputs(slot: int) -> list[io.Input]:
    return [
        io.Sigmas.Input(f"sigmas_{slot}", optional=True, tooltip="A schedule to draw. Not connected = left out."),
        io.String.Input(
            f"label_{slot}",
            default="",
            optional=True,
            tooltip=f"Name of schedule {slot} in the legend, up to 200 characters. Empty = sigmas_{slot}. Typical: a "
            "few words.",
        ),
    ]


class PlotSchedules(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_PlotSchedules",
            display_name="Plot Schedules",
            category="Tidetable/plot",
            description="Draws up to 8 schedules into one picture: noise level, time, log-SNR or step size over the "
            "sampling step, time, percent or log-SNR.",
            inputs=[
                io.Combo.Input(
                    "quantity",
                    options=list(QUANTITIES),
                    default="sigma",
                    tooltip="sigma: noise level as samplers use it. t: noise fraction, 0 data to 1 noise. log_snr: "
                    "ln(signal power / noise power). step_size: how far sigma falls per step.",
                ),
                io.Combo.Input(
                    "process",
                    options=list(PROCESSES),
                    default="auto",
                    tooltip="How t and log_snr follow from sigma. flow: sigma is t. vp: Stable Diffusion's table (eps "
                    "and v models). auto: flow where no sigma exceeds 1, else vp; choose vp for the tail of an eps "
                    "schedule.",
                ),
                io.Combo.Input(
                    "y_axis",
                    options=list(Y_AXES),
                    default="auto",
                    tooltip="linear or log. auto: log for sigma and step_size beyond 2 (eps and v models), else "
                    "linear. t and log_snr are linear under auto; log_snr always.",
                ),
                _size("width", 1024),
                _size("height", 640),
                *(entry for slot in SLOTS for entry in _schedule_inputs(slot)),
                io.Combo.Input(
                    "x_axis",
                    options=list(X_AXES),
                    default="step",
                    optional=True,
                    tooltip="step: sampling step. t: noise fraction. percent: with a model its progress, as "
                    "start_percent of other nodes, else the fraction of the steps. log_snr: ln(signal power / noise "
                    "power). Noise is always on the left.",
                ),
                io.Combo.Input(
                    "theme",
                    options=list(THEMES),
                    default="light",
                    optional=True,
                    tooltip="light: dark lines on white. dark: light lines on near black.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Says how t, log-SNR and percent follow from sigma, in place of process. Not connected = "
                    "process decides.",
                ),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The plot, for Preview Image or Save Image.")],
        )

    @classmethod
    def execute(
        cls, quantity, process, y_axis, width, height, x_axis: XAxis = "step", theme="light", model=None, **schedules
    ) -> io.NodeOutput:
        return io.NodeOutput(plot_schedules(schedules, quantity, process, y_axis, width, height, x_axis, theme, model))


class PlotTraining(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_PlotTraining",
            display_name="Plot Training",
            category="Tidetable/plot",
            description="Draws the course of a training run: loss, its running mean, validation loss, and below them "
            "validation by t, learning rate and gradient norm where they were recorded. Also takes the loss map of "
            "ComfyUI's own Train LoRA.",
            inputs=[
                io.LossMap.Input("loss_map", tooltip="What a training node returns."),
                _size("width", 1024),
                _size("height", 768),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The plot, for Preview Image or Save Image.")],
        )

    @classmethod
    def execute(cls, loss_map, width, height) -> io.NodeOutput:
        return io.NodeOutput(plot_training(loss_map, width, height))


NODES: list[type[io.ComfyNode]] = [PlotSchedules, PlotTraining]
