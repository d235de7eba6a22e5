"""Training data: pictures from a folder or the graph, and their encoding into a cache on disk."""

from comfy_api.latest import io, ui

from ..runtime.dataset import folder_dataset, folder_state, images_dataset
from ..runtime.encoding import BucketConfig, CaptionConfig, encode_node


_BUCKETS, _CAPTIONS = BucketConfig(), CaptionConfig()
MAX_SEED = 0xFFFFFFFFFFFFFFFF
DatasetSocket = io.Custom("TIDETABLE_DATASET")
CaptionSettings = io.Custom("TIDETABLE_CAPTIONS")
EncodedData = io.Custom("TIDETABLE_ENCODED")


class DatasetFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Tidetable_DatasetFolder",
            display_name="Dataset Folder",
            category="Tidetable/training",
            description=(
                "Pictures of a folder and its subfolders, with the captions and masks beside them. Damaged or odd files"
                " are named in the report and stop nothing."
            ),
            inputs=[
                io.String.Input(
                    "folder",
                    default="",
                    tooltip=(
                        "A folder under ComfyUI's input folder by its name, or the path of one that may be read. Empty "
                        "is not possible. Subfolders like 10_name count ten times."
                    ),
                ),
                io.String.Input(
                    "regularization_folder",
                    default="",
                    tooltip=(
                        "Pictures that keep what the model knows: no trigger word, and as many in an epoch as all "
                        "others. Empty is none."
                    ),
                ),
            ],
            outputs=[
                DatasetSocket.Output(display_name="dataset", tooltip="For Encode Dataset."),
                io.String.Output(display_name="report", tooltip="What was found, left out or noticed."),
            ],
        )

    @classmethod
    def execute(cls, folder: str, regularization_folder: str) -> io.NodeOutput:
        return io.NodeOutput(*folder_dataset(folder, regularization_folder))

    @classmethod
    def fingerprint_inputs(cls, folder: str, regularization_folder: str = "", **kwargs) -> str:
        return folder_state(folder, regularization_folder)


class DatasetImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Tidetable_DatasetImages",
            display_name="Dataset from Images",
            category="Tidetable/training",
            description="Images of the graph with their captions as a data set.",
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="One batch, or a list of batches, each of its own size."),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip=(
                        "One caption for each image in the same order (connect a list), or one for all. Empty is no "
                        "caption."
                    ),
                ),
                io.Int.Input(
                    "repeats",
                    default=1,
                    min=1,
                    max=10_000,
                    tooltip="How often each image comes in an epoch. 0 is not possible; 1 to 20 is typical.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One mask for each image, or one for all: 1 where training looks. Not connected: none.",
                ),
            ],
            outputs=[
                DatasetSocket.Output(display_name="dataset", tooltip="For Encode Dataset."),
                io.String.Output(display_name="report", tooltip="What was found, left out or noticed."),
            ],
        )

    @classmethod
    def execute(cls, images, captions, repeats, masks=None) -> io.NodeOutput:
        return io.NodeOutput(*images_dataset(images, captions, masks, repeats[0]))


class CaptionVariations(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Tidetable_CaptionVariations",
            display_name="Caption Variations",
            category="Tidetable/training",
            description=(
                "How captions vary: a trigger word, shuffled and dropped tags, sentences or tags, wildcards. Each "
                "variation is encoded once and found again in the cache."
            ),
            inputs=[
                io.Int.Input(
                    "variants",
                    default=_CAPTIONS.variants,
                    min=1,
                    max=100,
                    tooltip=(
                        "Captions that are encoded for a picture, where something about them is random. 0 is not "
                        "possible; 4 to 16 is typical with shuffling."
                    ),
                ),
                io.String.Input(
                    "trigger",
                    default=_CAPTIONS.trigger,
                    tooltip="Goes before every caption that does not have it. Empty is none.",
                ),
                io.Boolean.Input(
                    "shuffle_tags",
                    default=_CAPTIONS.shuffle_tags,
                    tooltip="Another order of the tags in each variant. Off keeps their order. Sentences stay whole.",
                ),
                io.Int.Input(
                    "keep_tags",
                    default=_CAPTIONS.keep_tags,
                    min=0,
                    max=1000,
                    tooltip="The first so many tags stay in front and are not dropped. 0 is none; 1 to 3 is typical.",
                ),
                io.Float.Input(
                    "tag_dropout",
                    default=_CAPTIONS.tag_dropout,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the other tags that a variant leaves out. 0 is off; 0.05 to 0.3 is typical.",
                ),
                io.Float.Input(
                    "tag_share",
                    default=_CAPTIONS.tag_share,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Where a picture has both a sentence and tags: share of the variants with the tags. 0 is "
                        "sentences only; 0.2 to 0.8 is typical."
                    ),
                ),
                io.Boolean.Input(
                    "wildcards",
                    default=_CAPTIONS.wildcards,
                    tooltip="{a|b} in a caption becomes a or b. Off leaves it as it stands.",
                ),
                io.Boolean.Input(
                    "literal",
                    default=_CAPTIONS.literal,
                    tooltip="Parentheses in captions are text. Off: they are weights, as in ComfyUI's prompts.",
                ),
                io.String.Input(
                    "dropped_text",
                    default=_CAPTIONS.dropped_text,
                    tooltip="What caption_dropout of Train LoRA puts in place of a caption. Empty is the empty prompt.",
                ),
                io.Int.Input(
                    "max_chunks",
                    default=_CAPTIONS.max_chunks,
                    min=1,
                    max=10,
                    tooltip=(
                        "Chunks of 75 tokens that a caption has at most on CLIP text encoders; more are cut and "
                        "reported. 0 is not possible; 1 to 3 is typical."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=_CAPTIONS.seed,
                    min=0,
                    max=MAX_SEED,
                    tooltip="The variants follow from it, their number and the pictures' names. 0 is a seed like any.",
                ),
            ],
            outputs=[CaptionSettings.Output(display_name="captions", tooltip="For 'captions' of Encode Dataset.")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        return io.NodeOutput(CaptionConfig(**settings))


class EncodeDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Tidetable_EncodeDataset",
            display_name="Encode Dataset",
            category="Tidetable/training",
            description=(
                "Sorts pictures into sizes, and encodes them and their captions into a cache on disk. Only what changed"
                " is encoded again; cancelling keeps what is done."
            ),
            hidden=[io.Hidden.unique_id],
            inputs=[
                DatasetSocket.Input("dataset", tooltip="From Dataset Folder or Dataset from Images."),
                io.Vae.Input("vae", tooltip="The VAE of the model that is trained."),
                io.Clip.Input("clip", tooltip="The text encoder of the model that is trained, with its LoRAs."),
                io.String.Input(
                    "cache_name",
                    default="dataset",
                    tooltip=(
                        "Folder in output/tidetable/cache; it may be deleted at any time. Empty is not possible. Data "
                        "sets and models may share one."
                    ),
                ),
                io.Int.Input(
                    "resolution",
                    default=_BUCKETS.resolution,
                    min=8,
                    max=8192,
                    step=8,
                    tooltip=(
                        "Pixels of the side of a square; other shapes have about its area. 0 is not possible; 512 "
                        "(SD1.5) to 1024 (SDXL and later) is typical."
                    ),
                ),
                io.Int.Input(
                    "bucket_step",
                    default=_BUCKETS.step,
                    min=8,
                    max=512,
                    step=8,
                    tooltip="Sides are multiples of this, in pixels. 0 is not possible; 64 is typical.",
                ),
                io.Float.Input(
                    "max_aspect",
                    default=_BUCKETS.max_aspect,
                    min=1.0,
                    max=8.0,
                    step=0.1,
                    tooltip=(
                        "Longer side over shorter side, at most; longer pictures are cut. 1 is squares only; 2 is "
                        "typical."
                    ),
                ),
                io.Float.Input(
                    "max_upscale",
                    default=_BUCKETS.max_upscale,
                    min=1.0,
                    max=16.0,
                    step=0.05,
                    tooltip=(
                        "No picture is enlarged by more than this: small ones are trained at a smaller size. 1 is not "
                        "at all; 1 to 1.5 is typical."
                    ),
                ),
                io.Boolean.Input(
                    "flip",
                    default=_BUCKETS.flip,
                    tooltip="Every picture also mirrored left to right. Off for text, faces and captions with sides.",
                ),
                io.Boolean.Input(
                    "verify",
                    default=True,
                    tooltip=(
                        "Read every sample of the cache once, and encode anew what is damaged. Off trusts the disk: "
                        "faster for very large data."
                    ),
                ),
                CaptionSettings.Input(
                    "captions",
                    optional=True,
                    tooltip="From Caption Variations. Not connected: captions as they stand in their files.",
                ),
            ],
            outputs=[
                EncodedData.Output(display_name="dataset", tooltip="For 'dataset' of Train LoRA."),
                io.String.Output(display_name="report", tooltip="Sizes, statistics, and what was left out or noticed."),
            ],
        )

    @classmethod
    def execute(cls, dataset, vae, clip, cache_name: str, captions=None, **settings) -> io.NodeOutput:
        data, report = encode_node(dataset, vae, clip, cache_name, captions, node_id=cls.hidden.unique_id, **settings)
        return io.NodeOutput(data, report, ui=ui.PreviewText(report))


NODES: list[type[io.ComfyNode]] = [DatasetFolder, DatasetImages, CaptionVariations, EncodeDataset]
