"""Nodes that say, or change, what a model is told about noise."""

from comfy_api.latest import io, ui

from ..runtime.describe import describe
from ..runtime.flow_shift import FAMILY_CHOICES
from ..runtime.model_sampling import SHIFT_MODES, patch_flow_shift
from ..runtime.shells import remember


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
        text = describe(remember(model))
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class FlowShift(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_FlowShift",
            display_name="Flow Shift (shift / mu)",
            category="Tidetable/model",
            description="Sets the time shift of a flow model (FLUX, Qwen-Image, SD3, AuraFlow, Z-Image, Lumina, Wan, "
            "LTX, ...): how many steps it spends at high noise. Keeps everything else about the model, so it is right "
            "for all of them, and says what it did.",
            inputs=[
                io.Model.Input("model", tooltip="A flow model. It is not changed; the output is a patched copy."),
                io.Combo.Input(
                    "mode",
                    options=list(SHIFT_MODES),
                    default="official",
                    tooltip="official: the rule of the model's authors for this size. shift or mu: the number below. "
                    "line: mu from two points. sqrt area, log area: from the size and base_size.",
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
                    tooltip="Width of the picture to make, in pixels. Not read in modes shift and mu, nor where a "
                    "latent is connected. 0 is not possible. Typical: 512 to 2048.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=16,
                    max=16384,
                    step=8,
                    tooltip="Height of the picture to make, in pixels. Not read in modes shift and mu, nor where a "
                    "latent is connected. 0 is not possible. Typical: 512 to 2048.",
                ),
                io.Combo.Input(
                    "family",
                    optional=True,
                    options=list(FAMILY_CHOICES),
                    default="auto",
                    tooltip="Whose rule mode official follows, and whose tokens the other modes count. auto = the "
                    "family of the model.",
                ),
                *_advanced(
                    io.Int.Input(
                        "length",
                        optional=True,
                        default=1,
                        min=1,
                        max=16384,
                        tooltip="Frames of the video to make, where the rule counts them (LTX, line, sqrt area). 1 = a "
                        "picture. Typical: 81 to 161.",
                    ),
                    io.Int.Input(
                        "steps",
                        optional=True,
                        default=20,
                        min=1,
                        max=10000,
                        tooltip="Sampling steps. Only FLUX.2's official rule reads it. 0 is not possible. Typical: 20 "
                        "to 50.",
                    ),
                    *_line_inputs(),
                    io.Int.Input(
                        "base_size",
                        optional=True,
                        default=1024,
                        min=16,
                        max=16384,
                        step=8,
                        tooltip="Modes sqrt area and log area only. Edge, in pixels, of the square picture that gets "
                        "shift 1. 0 is not possible. Typical: 256 (SD3's paper), 512 (Ideogram 4), 1024 (log area).",
                    ),
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="If connected, width, height and length are read from it; pictures and videos. It is only "
                    "read.",
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
    def execute(
        cls, model, mode, shift, mu, width, height, family="auto", length=1, steps=20,
        x1=256.0, y1=0.5, x2=4096.0, y2=1.15, base_size=1024, latent=None,
    ) -> io.NodeOutput:  # fmt: skip
        size = (width, height, family, length, steps)
        *values, text = patch_flow_shift(remember(model), mode, shift, mu, *size, x1, y1, x2, y2, base_size, latent)
        return io.NodeOutput(*values, ui=ui.PreviewText(text))


def _advanced(*inputs: io.Input) -> tuple[io.Input, ...]:
    """Shown on request only, where the page can hide inputs. ComfyUI 0.3.75's inputs have no keyword for it."""
    for entry in inputs:
        entry.extra_dict["advanced"] = True
    return inputs


def _line_inputs() -> list[io.Float.Input]:
    """The two points (tokens, mu) of mode line."""
    inputs = []
    for end, tokens, mu in (("1", 256.0, 0.5), ("2", 4096.0, 1.15)):
        inputs.append(
            io.Float.Input(
                f"x{end}",
                optional=True,
                default=tokens,
                min=0.0,
                max=1_000_000.0,
                step=1.0,
                tooltip=f"Mode line only. Tokens at point {end}; a token is 16×16 pixels for most models. 0 = none. "
                "Typical: 256 and 4096.",
            )
        )
        inputs.append(
            io.Float.Input(
                f"y{end}",
                optional=True,
                default=mu,
                min=-5.0,
                max=7.0,
                step=0.01,
                round=False,
                tooltip=f"Mode line only. mu at point {end}, no unit. 0 = no shift there. Typical: 0.5 and 1.15.",
            )
        )
    return inputs


NODES: list[type[io.ComfyNode]] = [DescribeModel, FlowShift]
