"""Nodes that turn SIGMAS into other SIGMAS, or into text and back."""

from comfy_api.latest import io, ui

from ..runtime.schedule_editing import (
    EDIT_AXES,
    LAYOUTS,
    MAX_STEPS,
    OPERATIONS,
    PROCESS_CHOICES,
    SPLIT_BY,
    edit_schedule,
    join_schedules,
    schedule_from_text,
    schedule_to_text,
    split_schedule,
)


LARGEST = 20_000.0


def _sigma(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=LARGEST, step=0.001, round=False, tooltip=tooltip)


def _process() -> io.Combo.Input:
    return io.Combo.Input(
        "process",
        options=list(PROCESS_CHOICES),
        default="auto",
        tooltip="How t and log-SNR follow from sigma where no model is connected. flow: sigma is t. vp: Stable "
        "Diffusion's table. auto: flow where no sigma exceeds 1, else vp; choose vp for the end of an eps schedule.",
    )


def _sigmas_output(tooltip: str, name: str = "SIGMAS") -> io.Sigmas.Output:
    return io.Sigmas.Output(display_name=name, tooltip=tooltip)


class EditSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_EditSchedule",
            display_name="Edit Schedule",
            category="Tidetable/schedule",
            description="One change to a schedule: another number of steps along the same curve, a shift, a factor, "
            "other ends, a cut-out range, one more level, or the reverse for unsampling.",
            inputs=[
                io.Sigmas.Input("sigmas", tooltip="The schedule to change. It is only read."),
                io.Combo.Input(
                    "operation",
                    options=list(OPERATIONS),
                    default="resample",
                    tooltip="resample: same curve, other step count. shift: multiply noise/signal. multiply: multiply "
                    "sigma. set_first, set_last: replace an end. clip: keep a range. insert: add a level. flip: "
                    "reverse.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="resample only: number of steps of the result. 0 is not possible. Typical: 4 to 50.",
                ),
                io.Combo.Input(
                    "axis",
                    options=list(EDIT_AXES),
                    default="log_snr",
                    tooltip="resample only: what runs straight between two old levels. log_snr is smooth for every "
                    "model; on flow models t is sigma.",
                ),
                io.Float.Input(
                    "value",
                    default=1.0,
                    min=0.0,
                    max=LARGEST,
                    step=0.001,
                    round=False,
                    tooltip="shift and multiply: the factor, 1 changes nothing, typical 0.5 to 3. set_first, set_last "
                    "and insert: the sigma; 0 is data.",
                ),
                _sigma("low", 0.0, "clip only: smallest sigma to keep. 0 = no limit. Typical: 0 to 1."),
                _sigma("high", 0.0, "clip only: largest sigma to keep. 0 = no limit. Typical: 0.5 to 14.6."),
                io.Boolean.Input(
                    "keep_ends",
                    default=True,
                    tooltip="shift and multiply only. On: the first and the last level stay, so the run starts with "
                    "the same noise. Off: they move as well.",
                ),
                _process(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Says how t and log-SNR follow from sigma, and how large a sigma may be. Not connected = "
                    "process decides.",
                ),
            ],
            outputs=[_sigmas_output("The changed schedule; flip's rises, all others fall.")],
        )

    @classmethod
    def execute(cls, sigmas, operation, steps, axis, value, low, high, keep_ends, process, model=None) -> io.NodeOutput:
        options = (steps, axis, value, low, high, keep_ends, process, model)
        return io.NodeOutput(edit_schedule(sigmas, operation, *options))


class JoinSchedules(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_JoinSchedules",
            display_name="Join Schedules",
            category="Tidetable/schedule",
            description="Schedules one after the other, from noise to data. Where one ends at the level at which the "
            "next one starts, that level is written once.",
            inputs=[
                io.Sigmas.Input("sigmas_1", tooltip="The noisiest part."),
                io.Sigmas.Input("sigmas_2", tooltip="The next part, which starts where the first one ends or below."),
                *(
                    io.Sigmas.Input(
                        f"sigmas_{slot}", optional=True, tooltip="A further part. Not connected = left out."
                    )
                    for slot in (3, 4)
                ),
            ],
            outputs=[_sigmas_output("All parts as one schedule.")],
        )

    @classmethod
    def execute(cls, **schedules) -> io.NodeOutput:
        return io.NodeOutput(join_schedules(schedules))


class SplitSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_SplitSchedule",
            display_name="Split Schedule",
            category="Tidetable/schedule",
            description="Two parts of a schedule, for two models or two samplers: the noisy steps and the rest. Both "
            "have the level between them.",
            inputs=[
                io.Sigmas.Input("sigmas", tooltip="The schedule to split. It is only read."),
                io.Combo.Input(
                    "by",
                    options=list(SPLIT_BY),
                    default="step",
                    tooltip="What says where: the number of steps, a sigma, a percent or a log-SNR. The other inputs "
                    "are ignored.",
                ),
                io.Int.Input(
                    "step",
                    default=10,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="by step: how many steps the high part has. 0 is not possible. Typical: half of the steps.",
                ),
                _sigma(
                    "sigma",
                    0.875,
                    "by sigma: the low part starts at the first level that is not above it. 0 is not possible. "
                    "Typical: 0.875 or 0.9 for Wan 2.2.",
                ),
                io.Float.Input(
                    "percent",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="by percent, 0 to 1: with a model its progress, as start_percent and end_percent of other "
                    "nodes; without one the fraction of the steps. 0 and 1 are not possible. Typical: 0.2 to 0.8.",
                ),
                io.Float.Input(
                    "log_snr",
                    default=0.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip="by log_snr: ln(signal power / noise power). 0 = equal power. Typical: -6 to 6.",
                ),
                io.Boolean.Input(
                    "exact",
                    default=False,
                    tooltip="by sigma, log_snr, or percent with a model. On: the level itself is inserted, so one step "
                    "becomes two. Off: the split moves to the next level of the schedule.",
                ),
                _process(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Says which sigma a percent or a log-SNR means. Not connected = percent counts steps, "
                    "process decides about log-SNR.",
                ),
            ],
            outputs=[
                _sigmas_output("The noisy steps, from the first level to the split.", "high"),
                _sigmas_output("The rest, from the split to the last level.", "low"),
            ],
        )

    @classmethod
    def execute(cls, sigmas, by, step, sigma, percent, log_snr, exact, process, model=None) -> io.NodeOutput:
        return io.NodeOutput(*split_schedule(sigmas, by, step, sigma, percent, log_snr, exact, process, model))


class ScheduleFromText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_ScheduleFromText",
            display_name="Schedule from Text",
            category="Tidetable/schedule",
            description="Noise levels from a list of numbers, for distilled models that are published with one. The "
            "text is read as numbers and never run as a program.",
            inputs=[
                io.String.Input(
                    "text",
                    default="1.0, 0.75, 0.5, 0.25, 0.0",
                    multiline=True,
                    tooltip="Sigmas from noise to data, between commas, spaces or new lines; # starts a comment. At "
                    "least two, at most 10001. The last one is usually 0, which is not added for you.",
                ),
            ],
            outputs=[_sigmas_output("The levels as written, rounded to float32.")],
        )

    @classmethod
    def execute(cls, text) -> io.NodeOutput:
        return io.NodeOutput(schedule_from_text(text))


class ScheduleToText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_ScheduleToText",
            display_name="Schedule to Text",
            category="Tidetable/schedule",
            description="Shows the noise levels as numbers, to read, copy and keep. Schedule from Text gives exactly "
            "the same levels again.",
            inputs=[
                io.Sigmas.Input("sigmas", tooltip="The schedule to show. It is only read."),
                io.Combo.Input(
                    "layout",
                    options=list(LAYOUTS),
                    default="line",
                    tooltip="line: all in one line with commas. lines: one level a line.",
                ),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="The text that the node shows.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, sigmas, layout) -> io.NodeOutput:
        text = schedule_to_text(sigmas, layout)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


NODES: list[type[io.ComfyNode]] = [EditSchedule, JoinSchedules, SplitSchedule, ScheduleFromText, ScheduleToText]
