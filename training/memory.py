"""What a run trades for memory. None of it changes what is learned."""

from dataclasses import dataclass
from typing import Literal

from .recipe import require


Checkpointing = Literal["off", "blocks"]
BaseWeights = Literal["full", "auto", "offload"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """The one home of the defaults of Training Memory. Every field is checked when the object is made."""

    gradient_checkpointing: Checkpointing = "off"
    """"blocks": a block of the network keeps its inputs only, and is computed once more in backward."""
    every: int = 1
    """Of the blocks, every so many is recomputed, the others are kept; at least 1."""
    base_weights: BaseWeights = "full"
    """Where the weights of the MODEL are: all on the device, as many as fit, or none ("offload")."""
    offload_activations: bool = False
    """What is kept for the backward pass is kept in main memory: with "blocks" the inputs of the blocks."""

    def __post_init__(self):
        known = ("off", "blocks")
        require(
            self.gradient_checkpointing in known, "gradient_checkpointing", self.gradient_checkpointing, "off or blocks"
        )
        require(self.every >= 1, "every", self.every, "at least 1")
        require(
            self.base_weights in ("full", "auto", "offload"), "base_weights", self.base_weights, "full, auto or offload"
        )
