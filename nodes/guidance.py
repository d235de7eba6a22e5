"""Nodes that steer sampling."""

from comfy_api.latest import io

from ..runtime.guidance import MAX_SCALE, perturbed_attention


class PerturbedAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_PerturbedAttention",
            display_name="Perturbed-Attention Guidance (PAG)",
            category="Tidetable/guidance",
            description="Steers sampling away from what the model draws when its picture tokens cannot see each other: "
            "clearer structure, with or without CFG. For U-Nets (SD1.5, SD2, SDXL) and SD3-type MMDiTs.",
            inputs=[
                io.Model.Input("model", tooltip="The model to guide. It is not changed; the output is a patched copy."),
                io.Float.Input(
                    "scale",
                    default=3.0,
                    min=0.0,
                    max=MAX_SCALE,
                    step=0.1,
                    round=0.01,
                    tooltip="Strength, no unit. 0 = off, as if without the node. Typical: 3 with CFG, 5 at CFG 1.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where in the denoising it begins, as a fraction. 0 = at pure noise. Typical: 0 to 0.2.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where it ends, as a fraction, above start_percent (so never 0). 1 = at the finished "
                    "picture. Typical: 0.5 to 1. Steps outside cost nothing extra.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model with guidance, for any sampler node.")],
        )

    @classmethod
    def execute(cls, model, scale, start_percent, end_percent) -> io.NodeOutput:
        return io.NodeOutput(perturbed_attention(model, scale, start_percent, end_percent))


NODES: list[type[io.ComfyNode]] = [PerturbedAttention]
