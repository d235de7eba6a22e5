"""Nodes for what a network predicts, and for models whose noise process is not the one that they were born with."""

from comfy_api.latest import io, ui

from ..runtime.prediction import (
    CONVERTIBLE,
    PREDICTION_NAMES,
    PROCESS_NAMES,
    convert_prediction,
    patch_flow_graft,
    patch_prediction,
)
from ..runtime.zero_terminal import MAX_UNGUIDED, patch_zero_terminal_snr


class ZeroTerminalSNR(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_ZeroTerminalSNR",
            display_name="Zero Terminal SNR",
            category="Tidetable/model",
            description="Rescales the noise schedule of a v- or x0-prediction model so that its last step is pure "
            "noise, which lets it make very dark and very bright pictures. For models trained that way.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A model with v, x0 or velocity prediction (eps with a cap only). It is not changed; the "
                    "output is a patched copy.",
                ),
                io.Float.Input(
                    "sigma_cap",
                    default=0.0,
                    min=0.0,
                    max=5000.0,
                    step=1.0,
                    round=False,
                    optional=True,
                    tooltip="Largest sigma (noise over signal, no unit) to sample from. 0 = off, up to 4518.76. "
                    "Typical: 0, or 160 with karras or exponential.",
                ),
                io.Int.Input(
                    "unguided_steps",
                    default=0,
                    min=0,
                    max=MAX_UNGUIDED,
                    optional=True,
                    tooltip="Number of first steps without guidance (CFG), which overexposes most in pure noise. 0 = "
                    "off, guidance on every step. Typical: 0 or 1.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="The model with zero terminal SNR (largest sigma 4518.76, or the cap).",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="The text that the node shows: what the checkpoint says of itself, and which schedulers "
                    "suit the new noise levels.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, sigma_cap=0.0, unguided_steps=0) -> io.NodeOutput:
        patched, report = patch_zero_terminal_snr(model, sigma_cap, unguided_steps)
        return io.NodeOutput(patched, report, ui=ui.PreviewText(report))


class Prediction(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_Prediction",
            display_name="Prediction (eps / v / x0 / velocity / EDM)",
            category="Tidetable/model",
            description="Says what the network of a model predicts, where its checkpoint does not say so. Changes only "
            "how the output is read: noise schedule, shift and sigma range stay as they are.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="Any diffusion model, patched or not. It is not changed; the output is a copy."
                ),
                io.Combo.Input(
                    "prediction",
                    options=list(PREDICTION_NAMES),
                    default="v",
                    tooltip="eps: noise. v: alpha·noise - sigma·x0. x0: clean latent. velocity: noise - x0. edm: "
                    "Karras' preconditioned output. Flow models: velocity (usual), v or x0.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The model with that prediction, for samplers and trainer."
                )
            ],
        )

    @classmethod
    def execute(cls, model, prediction) -> io.NodeOutput:
        return io.NodeOutput(patch_prediction(model, prediction))


class FlowGraft(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_FlowGraft",
            display_name="Flow Graft (flow-matching U-Net)",
            category="Tidetable/model",
            description="Declares a U-Net checkpoint (SD1.5, SD2, SDXL) as a flow model, for those that were finetuned "
            "with flow matching, such as bigASP v2.5 and nyaflow: velocity prediction, timestep t·1000, a shift.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="An SD1.5, SD2 or SDXL checkpoint that was finetuned with flow matching. It is not "
                    "changed; the output is a patched copy.",
                ),
                io.Float.Input(
                    "shift",
                    default=3.0,
                    min=0.01,
                    max=1000.0,
                    step=0.01,
                    round=False,
                    tooltip="Factor on the odds t/(1-t), no unit. 1 = no shift; 0 is not possible. Typical: 3 to 6.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The checkpoint as a flow model.")],
        )

    @classmethod
    def execute(cls, model, shift) -> io.NodeOutput:
        return io.NodeOutput(patch_flow_graft(model, shift))


class ConvertPrediction(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_ConvertPrediction",
            display_name="Convert Prediction",
            category="Tidetable/latent",
            description="Writes a prediction as another one: from the noisy latent and what was predicted at it, the "
            "noise, the clean latent, v, the velocity or the score. For those who study them.",
            inputs=[
                io.Latent.Input("noisy", tooltip="The noisy latent that the prediction was made at."),
                io.Latent.Input("prediction", tooltip="What was predicted there, of the same shape."),
                io.Combo.Input(
                    "source",
                    options=list(CONVERTIBLE),
                    default="velocity",
                    tooltip="What `prediction` is. eps: noise. v: alpha·noise - sigma·x0. velocity: noise - x0. score: "
                    "-noise/sigma.",
                ),
                io.Combo.Input("dest", options=list(CONVERTIBLE), default="x0", tooltip="What to make of it."),
                io.Combo.Input(
                    "process",
                    options=list(PROCESS_NAMES),
                    default="flow",
                    tooltip="How noise was added. flow: (1-t)·x0 + t·noise. vp: scaled to unit variance. ve: x0 + "
                    "sigma·noise. model: as the connected model does.",
                ),
                io.Float.Input(
                    "sigma",
                    default=0.5,
                    min=0.0,
                    max=5000.0,
                    step=0.001,
                    round=False,
                    tooltip="Noise level, no unit. Flow: t, 0 to 1. Others: noise over signal. 0 = no noise, where the "
                    "noise cannot be told. Typical: 0.03 to 14.6.",
                ),
                io.Model.Input("model", optional=True, tooltip="Process model only: the model that made the latents."),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The prediction as `dest`, not a clean latent.")],
        )

    @classmethod
    def execute(cls, noisy, prediction, source, dest, process, sigma, model=None) -> io.NodeOutput:
        return io.NodeOutput(convert_prediction(noisy, prediction, source, dest, process, sigma, model))


NODES: list[type[io.ComfyNode]] = [ZeroTerminalSNR, Prediction, FlowGraft, ConvertPrediction]
