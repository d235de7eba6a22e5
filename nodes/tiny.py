"""Nodes that need no download: the embedded models and their data."""

from comfy_api.latest import io

from ..runtime.dataset import images_dataset
from ..runtime.tiny import TINY_MODELS, load_tiny
from ..runtime.tiny_data import DATASETS, MAX_COUNT, tiny_dataset
from .dataset import DatasetSocket


class LoadTinyModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Tidetable_LoadTinyModel",
            display_name="Load Tiny Model",
            category="Tidetable/tiny",
            description=(
                "One of four small text-to-image models that come with the pack (about 1.8 million parameters). They"
                " draw one colored letter or digit at 256x256 and behave like any checkpoint, in seconds and without a"
                " GPU."
            ),
            inputs=[
                io.Combo.Input(
                    "name",
                    options=list(TINY_MODELS),
                    default="unet-v",
                    tooltip=(
                        "unet-eps: U-Net, noise prediction. unet-v: U-Net, v-prediction with zero terminal SNR. "
                        "mmdit-flow: MMDiT (as SD3), flow matching. unet-graft: unet-eps finetuned with flow matching; "
                        "use it through Flow Graft, shift 3."
                    ),
                )
            ],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Clip.Output(display_name="CLIP"),
                io.Vae.Output(display_name="VAE"),
            ],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(*load_tiny(name))


class TinyDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Tidetable_TinyDataset",
            display_name="Tiny Dataset",
            category="Tidetable/tiny",
            description=(
                "Captioned 256x256 pictures to try training with: rendered characters (what the tiny models know) "
                "or real handwritten digits (what they do not)."
            ),
            inputs=[
                io.Combo.Input(
                    "which",
                    options=list(DATASETS),
                    default="glyphs",
                    tooltip=(
                        "glyphs: rendered letters and digits. digits: handwritten ones, captioned as such (needs"
                        " scikit-learn); the held-out part is by other draws and for checking."
                    ),
                ),
                io.Int.Input(
                    "count",
                    default=64,
                    min=1,
                    max=MAX_COUNT,
                    tooltip="Number of pictures. 0 is not possible; 16 to 256 is typical.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    tooltip="The pictures follow from it. 0 is a seed like any other.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                io.String.Output(display_name="captions", is_output_list=True),
                DatasetSocket.Output(
                    display_name="dataset", tooltip="The same pictures and captions for Encode Dataset."
                ),
            ],
        )

    @classmethod
    def execute(cls, which: str, count: int, seed: int) -> io.NodeOutput:
        images, captions = tiny_dataset(which, count, seed)
        return io.NodeOutput(images, captions, images_dataset([images], captions)[0])


NODES: list[type[io.ComfyNode]] = [LoadTinyModel, TinyDataset]
