"""Nodes that steer sampling."""

from comfy_api.latest import io

from ..runtime.guidance import AUTO, INFINITE_BLUR, MAX_SCALE, METHODS, RESCALE_MODES, SHARING, perturbed_attention
from ..runtime.guided_cfg import MAX_ETA, MAX_MOMENTUM, MAX_NORM, MAX_ZERO_INIT, CfgRules, guided_cfg


class PerturbedAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_PerturbedAttention",
            display_name="Perturbed-Attention Guidance (PAG)",
            category="Tidetable/guidance",
            description="Steers sampling away from what the model draws when its picture tokens cannot see each other: "
            "clearer structure, with or without CFG. Also SEG, token shuffling, skipped layers. For U-Nets and DiTs.",
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
                    default=0.55,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where it ends, as a fraction, above start_percent (so never 0). 1 = at the finished "
                    "picture. Typical: 0.5 to 1. Steps outside cost nothing extra; structure is decided early.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="What weakens the prediction to steer away from. pag: picture tokens see only themselves. "
                    "seg: their queries are blurred. shuffle: their attention results are shuffled. skip: the blocks "
                    "are left out. Typical: pag.",
                ),
                io.String.Input(
                    "blocks",
                    default=AUTO,
                    tooltip='Which blocks are weakened. "auto" = the published ones or the middle. Else names with '
                    'numbers, as in "middle", "input 4, output 3-5" or "double 8, single 10-12"; a wrong one lists '
                    "what the model has. Typical: auto.",
                ),
                io.Float.Input(
                    "blur_sigma",
                    default=INFINITE_BLUR,
                    min=INFINITE_BLUR,
                    max=1000.0,
                    step=0.5,
                    round=0.01,
                    tooltip="For seg: how far queries are blurred, in tokens. -1 = infinitely, every query becomes the "
                    "mean; not 0. Typical: -1, or 1 to 10. The other methods do not use it.",
                ),
                io.Int.Input(
                    "every_nth",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="Acts on every n-th sampling step, counted from the first one inside the percents; the "
                    "others cost nothing extra. 1 = every step. Typical: 1 to 3.",
                ),
                io.Float.Input(
                    "stop_below",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="Once the weakened prediction differs from the normal one by less than this fraction of "
                    "its size, it is left out for the rest of the run. 0 = never. Typical: 0, or 0.005 to 0.05.",
                ),
                io.Float.Input(
                    "rescale",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Scales the added term so that contrast stays that of the normal prediction, as a fraction "
                    "of the correction. 0 = off, 1 = whole. Typical: 0 to 0.7, with high scales.",
                ),
                io.Combo.Input(
                    "rescale_mode",
                    options=list(RESCALE_MODES),
                    default=RESCALE_MODES[0],
                    tooltip="What rescale measures. full: the result with CFG and this term. partial: the normal "
                    "prediction with this term, leaving CFG out of account. No effect at rescale 0.",
                ),
                io.Float.Input(
                    "decay",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How fast the strength falls to 0 from start to end: (1 - u) to this power, u linear in "
                    "log-SNR. 0 = constant, 1 = linear. Typical: 0 to 2.",
                ),
                io.Combo.Input(
                    "shared_prefix",
                    options=list(SHARING),
                    default=SHARING[0],
                    tooltip="Whether what comes before the perturbed blocks is computed once for the normal and the "
                    "weakened prediction. The same result up to rounding. off: one batch. on: wherever possible. auto: "
                    "for big models, where it saves most. Typical: auto.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model with guidance, for any sampler node.")],
        )

    @classmethod
    def execute(cls, model, scale, start_percent, end_percent, **options) -> io.NodeOutput:
        return io.NodeOutput(perturbed_attention(model, scale, start_percent, end_percent, **options))


class Guidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Tidetable_Guidance",
            display_name="Guidance (CFG rules)",
            category="Tidetable/guidance",
            description="Refines CFG with any of these, in one fixed order: an interval, TCFG, CFG-Zero*, APG, "
            "RescaleCFG. A fresh node changes nothing. The strength stays the sampler's cfg.",
            inputs=[
                io.Model.Input("model", tooltip="The model to guide. It is not changed; the output is a patched copy."),
                io.Float.Input(
                    "cfg_start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where in the denoising CFG begins, as a fraction. 0 = at pure noise. Typical: 0 to 0.2.",
                ),
                io.Float.Input(
                    "cfg_end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where CFG ends, as a fraction, above cfg_start_percent (so never 0). 1 = at the finished "
                    "picture. Typical: 0.6 to 1. Outside, the negative prompt is not computed.",
                ),
                io.Boolean.Input(
                    "tangential_damping",
                    default=False,
                    tooltip="TCFG: keeps of the negative prompt's prediction only the direction that it "
                    "shares most with the positive one. Off = as predicted. No unit; typical with any model.",
                ),
                io.Boolean.Input(
                    "zero_star",
                    default=False,
                    tooltip="CFG-Zero*: scales the negative prompt's prediction to the least distance from the "
                    "positive one. Off = as predicted. No unit; typical: on for flow models.",
                ),
                io.Int.Input(
                    "zero_init_steps",
                    default=0,
                    min=0,
                    max=MAX_ZERO_INIT,
                    tooltip="CFG-Zero*, flow models only: during so many first steps of a run from pure noise the "
                    "latent stands still. In steps; 0 = off. Typical: 1, or 4 % of the steps.",
                ),
                io.Float.Input(
                    "apg_eta",
                    default=1.0,
                    min=-MAX_ETA,
                    max=MAX_ETA,
                    step=0.05,
                    round=0.001,
                    tooltip="APG: share of guidance along the prediction itself, the part that oversaturates. 1 = "
                    "off, as CFG; 0 = none of it. Typical: 0, with cfg up to 15.",
                ),
                io.Float.Input(
                    "apg_norm_threshold",
                    default=0.0,
                    min=0.0,
                    max=MAX_NORM,
                    step=0.5,
                    round=0.01,
                    tooltip="APG: longest that cond minus uncond may be, as the Euclidean length of one whole latent. "
                    "0 = off. Typical: 2.5 to 15 for 64x64 latents, more for larger ones.",
                ),
                io.Float.Input(
                    "apg_momentum",
                    default=0.0,
                    min=-MAX_MOMENTUM,
                    max=MAX_MOMENTUM,
                    step=0.05,
                    round=0.001,
                    tooltip="APG: weight of the steps before in cond minus uncond, no unit. 0 = off; below 0 it pushes "
                    "away from them. Typical: -0.75 to -0.5.",
                ),
                io.Float.Input(
                    "rescale",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="RescaleCFG: how far the contrast of the network's output goes back to that without CFG, "
                    "no unit. 0 = off, 1 = all the way. Typical: 0.7 for v-prediction models.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with these rules, for any sampler node."),
                io.String.Output(display_name="summary", tooltip="What is on, a line each, in the order it acts."),
            ],
        )

    @classmethod
    def execute(cls, model, **rules) -> io.NodeOutput:
        return io.NodeOutput(*guided_cfg(model, CfgRules(**rules)))


NODES: list[type[io.ComfyNode]] = [PerturbedAttention, Guidance]
