"""Nodes that steer sampling."""

from comfy_api.latest import io

from ..runtime.guidance import AUTO, INFINITE_BLUR, MAX_SCALE, METHODS, RESCALE_MODES, SHARING, perturbed_attention


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
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where it ends, as a fraction, above start_percent (so never 0). 1 = at the finished "
                    "picture. Typical: 0.5 to 1. Steps outside cost nothing extra.",
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


NODES: list[type[io.ComfyNode]] = [PerturbedAttention]
