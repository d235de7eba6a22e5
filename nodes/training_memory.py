"""What a training run trades for memory: the settings of Train LoRA's input `memory`."""

from typing import Any

from comfy_api.latest import io

from ..runtime.training import MemoryConfig


_MEMORY = MemoryConfig()
MemorySettings = io.Custom("TIDETABLE_TRAINING_MEMORY")


class TrainingMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Tidetable_TrainingMemory",
            display_name="Training Memory",
            category="Tidetable/training",
            description=(
                "Trades time for memory in training. With gradient checkpointing every block of the network keeps only "
                "its inputs and is computed a second time in the backward pass. With base_weights a MODEL is trained "
                "that does not fit the graphics card as a whole; with offload_activations what is kept waits in main "
                "memory. What is learned stays the same."
            ),
            inputs=[
                io.Combo.Input(
                    "gradient_checkpointing",
                    options=["off", "blocks"],
                    default=_MEMORY.gradient_checkpointing,
                    tooltip=(
                        "blocks: every block is recomputed in the backward pass, about a third more time for a "
                        "fraction of the memory. off: everything is kept."
                    ),
                ),
                io.Int.Input(
                    "every",
                    default=_MEMORY.every,
                    min=1,
                    max=100,
                    tooltip=(
                        "Every so many blocks one is recomputed, the others are kept. 0 is not possible; 1, all of "
                        "them, is typical, 2 or 3 where memory is left."
                    ),
                ),
                io.Combo.Input(
                    "base_weights",
                    options=["full", "auto", "offload"],
                    default=_MEMORY.base_weights,
                    tooltip=(
                        "Where the weights of the MODEL are while it trains. full: all on the graphics card. auto: as "
                        "many as fit beside the activations, as ComfyUI loads a model to sample; the others stay in "
                        "main memory and are copied over for each layer, in the forward and again in the backward "
                        "pass. offload: all of them that can stay there, the least memory and the slowest. A MODEL "
                        "with dynamic VRAM (newer ComfyUI) is loaded once more from its file, without it."
                    ),
                ),
                io.Boolean.Input(
                    "offload_activations",
                    default=_MEMORY.offload_activations,
                    tooltip=(
                        "On: what is kept for the backward pass is kept in main memory, with blocks their inputs. "
                        "Slower by the way there and back; the weights stay on the GPU. Off is typical."
                    ),
                ),
            ],
            outputs=[MemorySettings.Output(display_name="memory", tooltip="For the input 'memory' of Train LoRA.")],
        )

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(MemoryConfig(**settings))


NODES: list[type[io.ComfyNode]] = [TrainingMemory]
