"""Nodes that choose the noise levels of a sampling run."""

from comfy_api.latest import io

from ..runtime.model_sampling import MAX_STEPS, SPACING_NAMES, make_schedule
from ..runtime.shells import remember


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
                    "karras, exponential: for eps and v models. linear: equal steps in sigma.",
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
                    tooltip="Fraction of the noise range to run, always in `steps` steps. 1 = from pure noise; 0 is "
                    "not possible. Typical: 1 for text to image, 0.3 to 0.8 for image to image.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(
                    display_name="SIGMAS", tooltip="steps + 1 noise levels ending in 0, for SamplerCustom."
                )
            ],
        )

    @classmethod
    def execute(cls, model, spacing, steps, denoise) -> io.NodeOutput:
        return io.NodeOutput(make_schedule(remember(model), spacing, steps, denoise))


NODES: list[type[io.ComfyNode]] = [Schedule]
