"""Nodes that choose how a sample is drawn."""

from comfy_api.latest import io, ui

from ..runtime.samplers import (
    MAX_CHURN,
    OUR_NAMES,
    host_names,
    make_flow_sampler,
    make_sampler,
    patch_sampler_safe_flow,
)


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_Sampler",
            display_name="Sampler",
            category="Tidetable/sampling",
            description="A sampler that is right on flow models and on eps and v models alike, each written after its "
            "paper: DDIM, DDPM, the probability-flow ODE, the reverse SDE, CFG++ forms and others.",
            inputs=[
                io.Combo.Input(
                    "sampler_name",
                    options=list(OUR_NAMES),
                    default="euler",
                    tooltip="euler, heun: the probability-flow ODE. ddim, ddpm, reverse_sde and ancestral ones draw "
                    "noise. cfg_pp: CFG++, needs a negative prompt and a CFG of about 1 to 2.",
                ),
                io.Float.Input(
                    "eta",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="ddim, reverse_sde and ancestral samplers only. Share of the full noise that each step "
                    "draws anew, no unit. 0 = off, deterministic. Typical: 0 for ddim, 1 for the others.",
                ),
                io.Float.Input(
                    "s_noise",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Samplers that draw noise only. Factor on that noise, no unit. 1 is right for a perfect "
                    "model, 0 = no noise, which blurs. Typical: 1 to 1.007.",
                ),
                io.Int.Input(
                    "order",
                    default=0,
                    min=0,
                    max=4,
                    tooltip="Order of ipndm_v (1 to 4), dpm_adaptive (2, 3), dpmpp_2m and res_multistep (1, 2). 0 = "
                    "the sampler's usual order. Typical: 0; lower is steadier at high CFG.",
                ),
                io.Float.Input(
                    "churn",
                    default=0.0,
                    min=0.0,
                    max=MAX_CHURN,
                    step=1.0,
                    tooltip="euler and heun only. Noise added and removed again over the whole run, as S_churn of "
                    "Karras et al., no unit. 0 = off, deterministic. Typical: 10 to 40.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="SAMPLER", tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, sampler_name, eta, s_noise, order, churn) -> io.NodeOutput:
        return io.NodeOutput(make_sampler(sampler_name, eta, s_noise, order, churn))


class FlowSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = host_names()
        return io.Schema(
            node_id="Tidetable_FlowSampler",
            display_name="Flow Sampler",
            category="Tidetable/sampling",
            description="ComfyUI's own samplers, right on flow models: those that ComfyUI gets wrong there run in a "
            "corrected form, all others are handed through untouched.",
            inputs=[
                io.Combo.Input(
                    "sampler_name",
                    options=names,
                    default="euler" if "euler" in names else names[0],
                    tooltip="A sampler of this ComfyUI. On models that are not flow models it is always ComfyUI's own.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="SAMPLER", tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, sampler_name) -> io.NodeOutput:
        return io.NodeOutput(make_flow_sampler(sampler_name))


class SamplerSafeFlow(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_SamplerSafeFlow",
            display_name="Sampler-Safe Flow",
            category="Tidetable/sampling",
            description="For KSampler on flow models: the samplers that ComfyUI gets wrong there run in a corrected "
            "form, whichever is chosen. The node says which they are.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to sample. It is not changed; the output is a patched copy."
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model, for any sampler node."),
                io.String.Output(display_name="changes", tooltip="The text that the node shows, one sampler a line."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        patched, text = patch_sampler_safe_flow(model)
        return io.NodeOutput(patched, text, ui=ui.PreviewText(text))


NODES: list[type[io.ComfyNode]] = [Sampler, FlowSampler, SamplerSafeFlow]
