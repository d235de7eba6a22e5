"""Training the text encoder too: the settings of Train LoRA's input `text_encoder`."""

from comfy_api.latest import io

from ..runtime.text_encoder import TextEncoderConfig, text_encoder


_TEXT = TextEncoderConfig()
TextEncoderSettings = io.Custom("TIDETABLE_TEXT_ENCODER")


class TextEncoderLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Tidetable_TextEncoderLoRA",
            display_name="Text Encoder LoRA",
            category="Tidetable/training",
            description=(
                "Trains a LoRA on the text encoder too, with its own learning rate. Without it the text encoder is "
                "frozen, which is right for most trainings."
            ),
            is_input_list=True,
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of the model that is trained. It is left as it was."),
                io.String.Input(
                    "captions",
                    force_input=True,
                    tooltip=(
                        "One caption per latent, in the same order, or one for all. They replace the text of positive; "
                        "its sizes and guidance stay."
                    ),
                ),
                io.Int.Input(
                    "rank",
                    default=_TEXT.rank,
                    min=1,
                    max=512,
                    tooltip="Inner width of the text encoder's adapters. 0 is not possible; 4 to 32 is typical.",
                ),
                io.Float.Input(
                    "lora_alpha",
                    default=_TEXT.lora_alpha,
                    min=0.01,
                    max=1024.0,
                    step=0.01,
                    tooltip=(
                        "The adapter's output is multiplied by lora_alpha / rank. 0 is not possible; rank is typical."
                    ),
                ),
                io.Float.Input(
                    "learning_rate",
                    default=_TEXT.learning_rate,
                    min=1e-8,
                    max=1.0,
                    step=1e-6,
                    tooltip=(
                        "Peak rate of the text encoder; warm-up, schedule and guard act on it as on the model's. 0 is "
                        "not possible: leave text_encoder of Train LoRA unconnected. 1e-6 to 1e-4 is typical, a tenth "
                        "to a half of the model's."
                    ),
                ),
                io.Combo.Input(
                    "targets",
                    options=["attention", "attention_mlp", "linear"],
                    default=_TEXT.targets,
                    tooltip=(
                        "Layers that get an adapter: attention projections; and their feed-forward layers; all linear"
                        " layers."
                    ),
                ),
                io.String.Input(
                    "encoders",
                    default=_TEXT.encoders,
                    tooltip=(
                        "Text models by name, with commas: clip_l, clip_g, t5xxl. Empty is all CLIP models, and not T5 "
                        "or language models."
                    ),
                ),
            ],
            outputs=[
                TextEncoderSettings.Output(display_name="text_encoder", tooltip="For Train LoRA's input text_encoder.")
            ],
        )

    @classmethod
    def execute(cls, clip, captions, **settings) -> io.NodeOutput:
        single = {name: value[0] for name, value in settings.items()}
        return io.NodeOutput(text_encoder(clip[0], captions, **single))


NODES: list[type[io.ComfyNode]] = [TextEncoderLoRA]
