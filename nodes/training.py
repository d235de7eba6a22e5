"""LoRA training on the MODEL that is already loaded."""

from comfy_api.latest import io

from ..runtime.masked import one_objective
from ..runtime.saving import FORMATS, save_lora_model, workflow_of
from ..runtime.training import LoRAConfig, TrainConfig, train_lora
from ..runtime.training_data import training_data
from .dataset import EncodedData
from .training_adapter import AdapterSettings, OptimizerSettings
from .training_memory import MemorySettings
from .training_objective import ObjectiveSettings, TimestepDensitySettings
from .training_preview import PreviewSettings
from .training_run import RunSettings
from .training_text import TextEncoderSettings


_TRAIN, _LORA = TrainConfig(), LoRAConfig()
MAX_SEED = 0xFFFFFFFFFFFFFFFF


class TrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Tidetable_TrainLoRA",
            display_name="Train LoRA",
            category="Tidetable/training",
            description=(
                "Trains a LoRA in this process, on the model as it is loaded and patched: its own prediction type, "
                "noise process and shift. The input model is left as it was. Cancelling saves what was learned so far."
            ),
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to train on, with any model sampling node applied. Its LoRAs stay active.",
                ),
                io.Latent.Input(
                    "latents",
                    optional=True,
                    tooltip="Latents of the training images (VAE Encode): one batch, or a list of batches. Not with "
                    "dataset.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip=(
                        "One conditioning per latent, in the same order (feed CLIP Text Encode a list), or one for all."
                        " Not with dataset."
                    ),
                ),
                io.Int.Input(
                    "steps",
                    default=_TRAIN.steps,
                    min=1,
                    max=1_000_000,
                    tooltip="Optimizer steps. 0 is not possible; 200 to 5000 is typical.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=_TRAIN.batch_size,
                    min=1,
                    max=1024,
                    tooltip=(
                        "Samples per step; each goes through the network once. 0 is not possible; 1 to 16 is typical."
                    ),
                ),
                io.Int.Input(
                    "rank",
                    default=_LORA.rank,
                    min=1,
                    max=512,
                    tooltip=(
                        "Inner width of the adapters: file size and capacity. 0 is not possible; 4 to 64 is typical."
                    ),
                ),
                io.Float.Input(
                    "lora_alpha",
                    default=_LORA.lora_alpha,
                    min=0.01,
                    max=1024.0,
                    step=0.01,
                    tooltip=(
                        "The adapter's output is multiplied by lora_alpha / rank. 0 is not possible; rank or rank / 2"
                        " is typical."
                    ),
                ),
                io.Float.Input(
                    "learning_rate",
                    default=_TRAIN.learning_rate,
                    min=1e-8,
                    max=1.0,
                    step=1e-6,
                    tooltip=(
                        "Peak learning rate of AdamW. 0 is not possible; 1e-5 to 1e-3 is typical (tiny models: 1e-3)."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=_TRAIN.seed,
                    min=0,
                    max=MAX_SEED,
                    tooltip="Order, noise, t and initialization follow from it. 0 is a seed like any other.",
                ),
                io.Combo.Input(
                    "targets",
                    options=["attention", "attention_mlp", "linear", "linear_conv"],
                    default=_LORA.targets,
                    tooltip=(
                        "Layers that get an adapter: attention projections; and their feed-forward layers; all linear"
                        " layers; and convolutions."
                    ),
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=_TRAIN.warmup_steps,
                    min=0,
                    max=100_000,
                    tooltip="Steps over which the learning rate rises. 0 is none; 10 to 500 is typical.",
                ),
                io.Combo.Input(
                    "lr_schedule",
                    options=["cosine", "constant"],
                    default=_TRAIN.lr_schedule,
                    tooltip="After the warm-up: half a cosine down to 0, or constant.",
                ),
                io.Float.Input(
                    "max_grad_norm",
                    default=_TRAIN.max_grad_norm,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip=(
                        "Longer gradients are shortened to this norm: protection against loss spikes. 0 is off; 1 is"
                        " typical."
                    ),
                ),
                io.Combo.Input(
                    "density",
                    options=["auto", "uniform", "logit_normal"],
                    default=_TRAIN.density,
                    tooltip=(
                        "Which noise levels t are trained: auto is logit-normal on flow models, uniform on others. A"
                        " flow model's shift is applied on top."
                    ),
                ),
                io.Float.Input(
                    "logit_mean",
                    default=_TRAIN.logit_mean,
                    min=-5.0,
                    max=5.0,
                    step=0.01,
                    tooltip=(
                        "Logit-normal only: above 0 visits more noise, below 0 more detail. 0 is centered; -1 to 1 is"
                        " typical."
                    ),
                ),
                io.Float.Input(
                    "logit_std",
                    default=_TRAIN.logit_std,
                    min=0.01,
                    max=5.0,
                    step=0.01,
                    tooltip="Logit-normal only: width of the density. 0 is not possible; 0.5 to 1.5 is typical.",
                ),
                io.Float.Input(
                    "caption_dropout",
                    default=_TRAIN.caption_dropout,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Share of samples trained with the empty prompt, so that CFG keeps working. 0 is off; 0.05 to"
                        " 0.15 is typical. Needs 'empty'."
                    ),
                ),
                io.Int.Input(
                    "validation_percent",
                    default=10,
                    min=0,
                    max=50,
                    tooltip=(
                        "Percent of the samples held out to measure the loss at fixed noise, before and after. 0 is"
                        " none; 5 to 10 is typical."
                    ),
                ),
                io.Int.Input(
                    "validate_every",
                    default=_TRAIN.validate_every,
                    min=0,
                    max=100_000,
                    tooltip=(
                        "Steps between two validations. 0 is only before the first and after the last step; 50 to 500"
                        " is typical."
                    ),
                ),
                io.Conditioning.Input(
                    "empty", optional=True, tooltip="Conditioning of the empty prompt, for caption_dropout."
                ),
                ObjectiveSettings.Input(
                    "objective",
                    optional=True,
                    tooltip="From Training Objective: loss, weights, noise, flow matching. Not connected: the model's"
                    " own prediction, mean squared error.",
                ),
                TimestepDensitySettings.Input(
                    "timestep_density",
                    optional=True,
                    tooltip="From Timestep Density, in place of density, logit_mean and logit_std. Not connected: these"
                    " three.",
                ),
                AdapterSettings.Input(
                    "adapter",
                    optional=True,
                    tooltip=(
                        "From Training Adapter; rank, lora_alpha and targets here are then not used. Not connected: "
                        "plain LoRA."
                    ),
                ),
                OptimizerSettings.Input(
                    "optimizer",
                    optional=True,
                    tooltip=(
                        "From Training Optimizer; warmup_steps, lr_schedule and max_grad_norm here are then not used. "
                        "Not connected: AdamW."
                    ),
                ),
                RunSettings.Input(
                    "run",
                    optional=True,
                    tooltip="From Training Run: checkpoints, resuming, guard and log. Not connected: none of them.",
                ),
                PreviewSettings.Input(
                    "preview",
                    optional=True,
                    tooltip="From Training Preview: pictures drawn while the run trains. Not connected: none.",
                ),
                TextEncoderSettings.Input(
                    "text_encoder",
                    optional=True,
                    tooltip=(
                        "From Text Encoder LoRA: trains the text encoder too, on its captions. Not connected: it is "
                        "frozen."
                    ),
                ),
                EncodedData.Input(
                    "dataset",
                    optional=True,
                    tooltip="From Encode Dataset, in place of latents, positive and empty: any number of pictures, read"
                    " from disk as they are needed.",
                ),
                MemorySettings.Input(
                    "memory",
                    optional=True,
                    tooltip=(
                        "From Training Memory: what is computed twice, and what waits in main memory. Not connected: "
                        "nothing, all of it stays on the device."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="A clone of the input with the LoRA applied at strength 1."
                ),
                io.LoraModel.Output(display_name="LORA_MODEL"),
                io.LossMap.Output(display_name="LOSS_MAP"),
                io.Clip.Output(
                    display_name="CLIP",
                    tooltip=(
                        "The CLIP of Text Encoder LoRA with its LoRA at strength 1. Without text_encoder, nodes "
                        "behind it do not run, and it says so."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, model, validation_percent, latents=None, positive=None, empty=None, **settings) -> io.NodeOutput:
        # An optional input that is not connected is missing, or a list of one None.
        settings["objective"] = one_objective(settings.get("objective"))
        single = {name: value[0] for name, value in settings.items() if value and value[0] is not None}
        names = ("adapter", "optimizer", "run", "preview", "text_encoder", "memory")
        nodes = {name: single.pop(name, None) for name in names}
        plain = {name: single.pop(name) for name in ("rank", "lora_alpha", "targets")}
        lora_config = LoRAConfig(**plain, seed=single["seed"])
        data = training_data(latents, positive, empty, validation_percent[0], single.pop("dataset", None))
        result = train_lora(model[0], data, TrainConfig(**single), lora_config, cls.hidden.unique_id, **nodes)
        return io.NodeOutput(result.model, result.lora, result.loss_map, result.clip, ui=result.ui)


class SaveLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Tidetable_SaveLoRA",
            display_name="Save LoRA",
            category="Tidetable/training",
            description=(
                "Writes a LoRA into the loras folder, with its training settings in the header; any LoRA loader"
                " reads it."
            ),
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                io.LoraModel.Input("lora", tooltip="From Train LoRA; ComfyUI's own trainer's output works too."),
                io.String.Input(
                    "filename_prefix",
                    default="tidetable/lora",
                    tooltip=(
                        "Name inside the loras folder; a counter is added, nothing is overwritten. sub/name makes a"
                        " folder. Empty is not possible."
                    ),
                ),
                io.String.Input(
                    "title",
                    default="",
                    tooltip="modelspec.title in the header. Empty keeps the title that training wrote.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="comfyui",
                    optional=True,
                    tooltip=(
                        "Names of the layers in the file. comfyui: every LoRA loader of ComfyUI. diffusers: also"
                        " diffusers pipelines; LoRA only, and only for families whose names ComfyUI knows."
                    ),
                ),
                io.Boolean.Input(
                    "include_workflow",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Put this graph with its captions and file names into the header, so that the file opens as a"
                        " workflow. Off: settings only. ComfyUI's --disable-metadata wins."
                    ),
                ),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="As LoRA loaders list it.")],
        )

    @classmethod
    def execute(
        cls, lora, filename_prefix: str, title: str, format: str = "comfyui", include_workflow: bool = False
    ) -> io.NodeOutput:
        workflow = workflow_of(cls.hidden) if include_workflow else None
        name = save_lora_model(lora, filename_prefix, title, format, workflow)
        return io.NodeOutput(name, ui={"text": (name,)})


NODES: list[type[io.ComfyNode]] = [TrainLoRA, SaveLoRA]
