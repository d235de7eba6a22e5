"""Nodes that say, or change, what a model is told about noise."""

from comfy_api.latest import io, ui

from ..runtime.describe import describe
from ..runtime.model_sampling import SHIFT_MODES, patch_flow_shift


class DescribeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_DescribeModel",
            display_name="Describe Model",
            category="Tidetable/model",
            description="Says what a loaded model is told about noise: family, prediction, process, shift and mu, "
            "timesteps, sigma range, terminal SNR, latent format, and which patches it carries.",
            inputs=[
                io.Model.Input("model", tooltip="The model to describe, with all its patches. It is not changed."),
            ],
            outputs=[
                io.String.Output(display_name="description", tooltip="The text that the node shows, one fact a line.")
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        text = describe(model)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class FlowShift(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_FlowShift",
            display_name="Flow Shift (shift / mu)",
            category="Tidetable/model",
            description="Sets the time shift of a flow model (FLUX, Qwen-Image, SD3, AuraFlow, Z-Image, Lumina, Wan, "
            "...): how many steps it spends at high noise. Keeps everything else about the model, so it is right for "
            "all of them.",
            inputs=[
                io.Model.Input("model", tooltip="A flow model. It is not changed; the output is a patched copy."),
                io.Combo.Input(
                    "mode",
                    options=list(SHIFT_MODES),
                    default="official",
                    tooltip="official: the rule of the model's authors for this width and height. shift or mu: the "
                    "number below.",
                ),
                io.Float.Input(
                    "shift",
                    default=3.0,
                    min=0.01,
                    max=1000.0,
                    step=0.01,
                    round=False,
                    tooltip="Mode shift only. Factor on the odds t/(1-t), no unit. 1 = no shift; 0 is not possible. "
                    "Typical: 1 to 12.",
                ),
                io.Float.Input(
                    "mu",
                    default=1.15,
                    min=-5.0,
                    max=7.0,
                    step=0.01,
                    round=False,
                    tooltip="Mode mu only. Natural logarithm of the shift, no unit. 0 = no shift. Typical: 0.5 to 2.5.",
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=16,
                    max=16384,
                    step=8,
                    tooltip="Mode official only. Width of the picture to make, in pixels. 0 is not possible. Typical: "
                    "512 to 2048.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=16,
                    max=16384,
                    step=8,
                    tooltip="Mode official only. Height of the picture to make, in pixels. 0 is not possible. Typical: "
                    "512 to 2048.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The model with this shift, for samplers, schedules and trainers."
                ),
                io.Float.Output(display_name="shift", tooltip="The shift that was set, e to the power of mu."),
                io.Float.Output(display_name="mu", tooltip="Its natural logarithm, what FLUX-type models store."),
            ],
        )

    @classmethod
    def execute(cls, model, mode, shift, mu, width, height) -> io.NodeOutput:
        return io.NodeOutput(*patch_flow_shift(model, mode, shift, mu, width, height))


NODES: list[type[io.ComfyNode]] = [DescribeModel, FlowShift]
