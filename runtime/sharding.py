"""A run in several processes of which each holds its share of the base model only."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import comfy.model_management

from ..training.engine import Trainer
from ..training.memory import MemoryConfig
from ..training.sharding import in_shares, local_bytes
from .gradients import blocks_of
from .trainable import ComfyDenoiser


logger = logging.getLogger(__name__)


@contextmanager
def shared_base(
    denoiser: ComfyDenoiser, trainer: Trainer, memory: MemoryConfig | None, wanted: bool = True
) -> Iterator[None]:
    """The weights in parts from here on; the model is not put back together. One process keeps all of them.

    What reads whole weights (adapters that start from them, the run's fingerprint) comes before. ValueError for a
    network that adds in place, unless all its blocks are recomputed: FSDP2 hands a block views of its inputs.
    """
    world, network = trainer.world, denoiser.real.diffusion_model
    if not wanted or world.size == 1:
        yield
        return
    if denoiser.real.model_lowvram:
        raise ValueError(
            "shard_base spreads the weights over the devices, and some of them are in main memory: set base_weights to "
            "'full' and start ComfyUI without --novram, or turn shard_base off"
        )
    recomputed = memory is not None and memory.gradient_checkpointing == "blocks" and memory.every == 1
    if denoiser.in_place and not recomputed:
        raise ValueError(
            f"{type(network).__name__} adds to tensors in place, which shared weights allow only in recomputed blocks: "
            "connect Training Memory with gradient_checkpointing 'blocks' and every 1, or turn shard_base off"
        )
    whole = local_bytes(network)
    with in_shares(network, blocks_of(network)):
        denoiser.in_place = False  # autograd itself now refuses what is not recomputed and written over
        trainer.world = replace(world, together=True)
        denoiser.passes = trainer.world.most
        comfy.model_management.soft_empty_cache()
        part = local_bytes(network)
        logger.info("each of %d processes holds %.3g of %.3g GB of weights", world.size, part / 1e9, whole / 1e9)
        yield
