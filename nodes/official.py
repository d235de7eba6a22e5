"""The node that gives a model family's published noise levels."""

from comfy_api.latest import io

from ..runtime.official import MAX_STEPS, RESPACING_NAMES, SCHEDULED_FAMILIES, make_official_schedule


class OfficialSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_OfficialSchedule",
            display_name="Official Schedule (sigmas)",
            category="Tidetable/schedule",
            description="The noise levels that the pipeline published with a model family visits, for a size and a "
            "number of steps. It needs no model: the shift is in the numbers, and the one set on the model does not "
            "count for them.",
            inputs=[
                io.Combo.Input(
                    "family",
                    options=list(SCHEDULED_FAMILIES),
                    default="qwen_image",
                    tooltip="The model family, by Tidetable's key. Describe Model says which one a loaded model is.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="Number of sampling steps. 0 is not possible. Typical: 20 to 50, 1 to 8 for distilled "
                    "models.",
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=16,
                    max=16384,
                    step=8,
                    tooltip="Width of the picture to make, in pixels; counts for families whose shift depends on it. "
                    "0 is not possible. Typical: 512 to 2048.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=16,
                    max=16384,
                    step=8,
                    tooltip="Height of the picture to make, in pixels; counts for families whose shift depends on it. "
                    "0 is not possible. Typical: 512 to 2048.",
                ),
                io.Int.Input(
                    "length",
                    default=1,
                    min=1,
                    max=16384,
                    tooltip="Frames of the video to make; only LTX counts them. 1 = a picture. Typical: 81 to 161.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the noise range to run, always in `steps` steps. 1 = from pure noise; 0 is "
                    "not possible. Typical: 1 for text to image, 0.3 to 0.8 for image to image.",
                ),
                io.Boolean.Input(
                    "shift_once",
                    default=False,
                    tooltip="Only for SD3, AuraFlow, JoyImage and ACE-Step, whose pipelines shift the last steps "
                    "twice, so that the last one does almost nothing. Off = as published; on = shifted once, so that "
                    "every step counts.",
                ),
                io.Combo.Input(
                    "respacing",
                    options=list(RESPACING_NAMES),
                    default="as published",
                    tooltip="Replaces what lies between the first and the last noise level, as diffusers' "
                    "use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas do. as published = off.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(
                    display_name="SIGMAS", tooltip="steps + 1 noise levels ending in 0, for SamplerCustom."
                )
            ],
        )

    @classmethod
    def execute(cls, family, steps, width, height, length, denoise, shift_once, respacing) -> io.NodeOutput:
        return io.NodeOutput(
            make_official_schedule(family, steps, width, height, length, denoise, shift_once, respacing)
        )


NODES: list[type[io.ComfyNode]] = [OfficialSchedule]
