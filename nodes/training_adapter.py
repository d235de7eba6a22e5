"""What Train LoRA trains and by which optimizer: settings of its inputs `adapter` and `optimizer`."""

from comfy_api.latest import io

from ..runtime.training import AdapterConfig, OptimizerConfig


_ADAPTER, _OPTIMIZER = AdapterConfig(), OptimizerConfig()
AdapterSettings = io.Custom("TIDETABLE_ADAPTER")
OptimizerSettings = io.Custom("TIDETABLE_OPTIMIZER")


class Adapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Tidetable_Adapter",
            display_name="Training Adapter",
            category="Tidetable/training",
            description=(
                "What Train LoRA trains: LoRA, DoRA, LoHa or LoKr, on which layers, with which ranks, and what holds "
                "it back. Takes the place of that node's rank, lora_alpha and targets."
            ),
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=["lora", "dora", "dora_input", "loha", "lokr"],
                    default=_ADAPTER.kind,
                    tooltip=(
                        "lora (with convolutions: LoCon); dora: a norm for each output; dora_input: for each input; "
                        "loha and lokr: LyCORIS products. Every loader of ComfyUI reads all of them."
                    ),
                ),
                io.Int.Input(
                    "rank",
                    default=_ADAPTER.rank,
                    min=1,
                    max=512,
                    tooltip="Inner width of the adapters. 0 is not possible; 4 to 64 is typical, for loha 4 to 16.",
                ),
                io.Float.Input(
                    "lora_alpha",
                    default=_ADAPTER.lora_alpha,
                    min=0.01,
                    max=1024.0,
                    step=0.01,
                    tooltip="The change is multiplied by lora_alpha / rank. 0 is not possible; rank or half is usual.",
                ),
                io.Boolean.Input(
                    "rank_stabilized",
                    default=_ADAPTER.rank_stabilized,
                    tooltip="On: lora_alpha / sqrt(rank), so that high ranks learn as fast (rsLoRA). Off is typical.",
                ),
                io.String.Input(
                    "ranks",
                    default=_ADAPTER.ranks,
                    multiline=True,
                    tooltip=(
                        "Other ranks for some layers: one 'pattern = rank' a line, as '*attn2* = 8'; the first match "
                        "wins. Empty is one rank for all."
                    ),
                ),
                io.Combo.Input(
                    "targets",
                    options=["attention", "attention_mlp", "linear", "linear_conv"],
                    default=_ADAPTER.targets,
                    tooltip=(
                        "Layers that get an adapter: attention projections; and their feed-forward layers; all linear"
                        " layers; and convolutions. Not used where include is given."
                    ),
                ),
                io.String.Input(
                    "include",
                    default=_ADAPTER.include,
                    multiline=True,
                    tooltip=(
                        "Layers by name instead of a preset, one pattern a line: '*attn1*'. The log lists what was "
                        "matched. Empty is the preset."
                    ),
                ),
                io.String.Input(
                    "exclude",
                    default=_ADAPTER.exclude,
                    multiline=True,
                    tooltip="Layers to leave out, one pattern a line. Empty is none.",
                ),
                io.Combo.Input(
                    "initialization",
                    options=["zero", "pissa"],
                    default=_ADAPTER.initialization,
                    tooltip=(
                        "zero is typical. pissa, for lora only: start at the weight's largest directions; learns "
                        "faster, doubles the rank of the file, takes a moment at the start."
                    ),
                ),
                io.Int.Input(
                    "lokr_factor",
                    default=_ADAPTER.lokr_factor,
                    min=1,
                    max=512,
                    tooltip="lokr only: sides of the small factor at most. 0 is not possible; 4 to 16 is typical.",
                ),
                io.Float.Input(
                    "rank_dropout",
                    default=_ADAPTER.rank_dropout,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip="Share of each adapter's directions left out of a step. 0 is off; 0.05 to 0.3 is typical.",
                ),
                io.Float.Input(
                    "module_dropout",
                    default=_ADAPTER.module_dropout,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip="Share of the adapters left out of a step. 0 is off; 0.05 to 0.2 is typical.",
                ),
                io.Float.Input(
                    "max_norm",
                    default=_ADAPTER.max_norm,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="Ceiling of the norm of each weight's change after each step. 0 is off; 1 is typical.",
                ),
                io.String.Input(
                    "continue_from",
                    default=_ADAPTER.continue_from,
                    tooltip=(
                        "Name of a LoRA in the loras folder to go on from (kohya, PEFT, LyCORIS): kind, rank, alpha and"
                        " layers are then the file's. Empty is anew."
                    ),
                ),
            ],
            outputs=[AdapterSettings.Output(display_name="adapter", tooltip="For Train LoRA's input adapter.")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        return io.NodeOutput(AdapterConfig(**settings))


class Optimizer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Tidetable_Optimizer",
            display_name="Training Optimizer",
            category="Tidetable/training",
            description=(
                "How Train LoRA moves weights: optimizer, learning rate, accumulation, decay, clipping "
                "and moving average. Takes the place of that node's warmup_steps, lr_schedule and max_grad_norm."
            ),
            inputs=[
                io.Combo.Input(
                    "name",
                    options=[
                        "adamw",
                        "adafactor",
                        "muon",
                        "sgd",
                        "prodigy",
                        "schedule_free_adamw",
                        "adamw_8bit",
                        "other",
                    ],
                    default=_OPTIMIZER.name,
                    tooltip=(
                        "adamw, adafactor, muon and sgd are torch's. The others need their package (prodigyopt, "
                        "schedulefree, bitsandbytes, pytorch-optimizer), which is never installed for you."
                    ),
                ),
                io.String.Input(
                    "class_name",
                    default=_OPTIMIZER.class_name,
                    tooltip="For other only: a class of pytorch-optimizer, such as Lion. Empty is not possible there.",
                ),
                io.Combo.Input(
                    "lr_schedule",
                    options=["constant", "linear", "cosine", "cosine_restarts", "rex"],
                    default=_OPTIMIZER.lr_schedule,
                    tooltip=(
                        "Course of the rate after the warm-up. rex stays high for longer than linear. constant for "
                        "prodigy and schedule_free_adamw."
                    ),
                ),
                io.Int.Input(
                    "restarts",
                    default=_OPTIMIZER.restarts,
                    min=1,
                    max=1000,
                    tooltip="cosine_restarts only: how often it starts anew. 0 is not possible; 1 to 5 is typical.",
                ),
                io.Float.Input(
                    "final_rate",
                    default=_OPTIMIZER.final_rate,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the peak rate at which the schedule ends. 0 is none; 0 to 0.1 is typical.",
                ),
                io.Int.Input(
                    "warmup",
                    default=_OPTIMIZER.warmup,
                    min=0,
                    max=10_000_000,
                    tooltip="Rise of the rate at the start, in warmup_unit. 0 is none; 10 to 500 steps is typical.",
                ),
                io.Combo.Input(
                    "warmup_unit",
                    options=["steps", "samples"],
                    default=_OPTIMIZER.warmup_unit,
                    tooltip="steps, or samples: then it stays the same when the batch size changes.",
                ),
                io.Int.Input(
                    "accumulate",
                    default=_OPTIMIZER.accumulate,
                    min=1,
                    max=1024,
                    tooltip=(
                        "Batches for each step: trains as a batch this many times as large, in the memory of one. 1 is "
                        "off, 0 is not possible; 1 to 8 is typical."
                    ),
                ),
                io.Float.Input(
                    "weight_decay",
                    default=_OPTIMIZER.weight_decay,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    tooltip="Pulls the adapter's weights to zero. 0 is off; 0.01 is typical.",
                ),
                io.Float.Input(
                    "max_grad_norm",
                    default=_OPTIMIZER.max_grad_norm,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="Longer gradients are shortened to this norm. 0 is off; 1 is typical.",
                ),
                io.Float.Input(
                    "ema_decay",
                    default=_OPTIMIZER.ema_decay,
                    min=0.0,
                    max=0.99999,
                    step=0.0001,
                    tooltip="Decay of the moving average that is the result. 0 is off; 0.99 to 0.999 is typical.",
                ),
                io.Combo.Input(
                    "ema_device",
                    options=["same", "cpu"],
                    default=_OPTIMIZER.ema_device,
                    tooltip="Where the moving average lies: beside the weights, or in main memory (slower).",
                ),
            ],
            outputs=[OptimizerSettings.Output(display_name="optimizer", tooltip="For Train LoRA's input optimizer.")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        return io.NodeOutput(OptimizerConfig(**settings))


NODES: list[type[io.ComfyNode]] = [Adapter, Optimizer]
