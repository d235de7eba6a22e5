"""Pictures of a run while it trains: the settings of Train LoRA's input `preview`."""

from comfy_api.latest import io

from ..runtime.previews import PreviewConfig, preview_config


PreviewSettings = io.Custom("TIDETABLE_TRAINING_PREVIEW")
MAX_SEED = 0xFFFFFFFFFFFFFFFF
_PREVIEW = PreviewConfig.defaults()


class TrainingPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Tidetable_TrainingPreview",
            display_name="Training Preview",
            category="Tidetable/training",
            description=(
                "Draws pictures while a LoRA trains, with ComfyUI's own sampler on the model in training: each is what "
                "SamplerCustom draws with the LoRA as it would be saved at that step."
            ),
            is_input_list=True,
            inputs=[
                io.Sampler.Input("sampler", tooltip="As for SamplerCustom: Sampler or KSamplerSelect."),
                io.Sigmas.Input("sigmas", tooltip="As for SamplerCustom: Schedule or BasicScheduler. 8 to 30 steps."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="One picture for each conditioning: feed CLIP Text Encode one text, or a list of them.",
                ),
                io.Conditioning.Input("negative", tooltip="For all pictures, as for SamplerCustom."),
                io.Int.Input(
                    "every",
                    default=_PREVIEW["every"],
                    min=0,
                    max=1_000_000,
                    tooltip="Steps between two previews. 0 is only at the end; 50 to 500 is typical.",
                ),
                io.Float.Input(
                    "cfg",
                    default=_PREVIEW["cfg"],
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance scale (no unit). 1 is off, 0 is the negative alone; 1 to 8 is typical.",
                ),
                io.Int.Input(
                    "seed",
                    default=_PREVIEW["seed"],
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=False,  # pictures of different noise cannot be compared
                    tooltip="Of the noise, the same for every picture and step. 0 is a seed like any other.",
                ),
                io.Int.Input(
                    "width",
                    default=_PREVIEW["width"],
                    min=16,
                    max=16384,
                    step=8,
                    tooltip="Pixels, without a latent. 0 is not possible; 256 to 1024 is typical.",
                ),
                io.Int.Input(
                    "height",
                    default=_PREVIEW["height"],
                    min=16,
                    max=16384,
                    step=8,
                    tooltip="Pixels, without a latent. 0 is not possible; 256 to 1024 is typical.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Where to start, one sample. Not connected: an empty one of width by height.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the pictures. Not connected: the rough colors of ComfyUI's own previews.",
                ),
            ],
            outputs=[PreviewSettings.Output(display_name="preview", tooltip="For the input 'preview' of Train LoRA.")],
        )

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        return io.NodeOutput(preview_config(**inputs))


NODES: list[type[io.ComfyNode]] = [TrainingPreview]
