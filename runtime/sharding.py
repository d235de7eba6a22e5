"""A model whose weights several processes share: a frozen base, or all that is trained."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import comfy.model_management
import torch
from torch import nn

from ..training.distributed import LONG_PATIENCE, PATIENCE, World
from ..training.engine import Trainer
from ..training.memory import MemoryConfig
from ..training.sharding import in_shares, local_bytes
from .gradients import blocks_of
from .offload import require_full
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
    world = trainer.world
    if not wanted or world.size == 1:
        yield
        return
    with _shared(denoiser, memory, "turn shard_base off", PATIENCE):
        trainer.world = replace(world, together=True)
        yield


@contextmanager
def shared_weights(denoiser: ComfyDenoiser, memory: MemoryConfig | None) -> Iterator[list[nn.Parameter]]:
    """Weights to train, all of the network's: this process's shares of them, or copies where it is alone.

    The model's own weights are back at the end where it is alone. ValueError for weights that are not fp32.
    """
    refuse_coarse(denoiser)
    network = denoiser.real.diffusion_model
    if World.current().size == 1:
        with copied(network):
            yield list(network.parameters())
        return
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    with _shared(denoiser, memory, "train in one process", LONG_PATIENCE):
        yield list(network.parameters())


@contextmanager
def copied(network: nn.Module) -> Iterator[None]:
    """Copies that ask for gradients in place of all weights; tied ones stay tied, and the originals come back."""
    copies = {id(old): nn.Parameter(old.detach().clone()) for old in network.parameters()}
    tables = [(module._parameters, dict(module._parameters)) for module in network.modules()]
    try:
        for table, before in tables:
            table.update({name: old if old is None else copies[id(old)] for name, old in before.items()})
        yield
    finally:
        for table, before in tables:
            table.update(before)


def refuse_coarse(denoiser: ComfyDenoiser) -> None:
    """ValueError where small changes of a weight would be rounded away."""
    found = {p.dtype for p in denoiser.real.diffusion_model.parameters()} | {denoiser.real.manual_cast_dtype}
    coarse = sorted(str(dtype) for dtype in found - {torch.float32, None})
    if coarse:
        raise ValueError(
            f"training all weights needs them in fp32, and this model has or computes in {', '.join(coarse)}: load it "
            "with weight_dtype default in a ComfyUI started with --fp32-unet (train.py does that), or train an adapter"
        )


@contextmanager
def _shared(denoiser: ComfyDenoiser, memory: MemoryConfig | None, way_out: str, patience: timedelta) -> Iterator[None]:
    network, world = denoiser.real.diffusion_model, replace(World.current(), together=True)
    require_full(denoiser.real, "shard_base")
    recomputed = memory is not None and memory.gradient_checkpointing == "blocks" and memory.every == 1
    if denoiser.in_place and not recomputed:
        raise ValueError(
            f"{type(network).__name__} adds to tensors in place, which shared weights allow only in recomputed blocks: "
            f"connect Training Memory with gradient_checkpointing 'blocks' and every 1, or {way_out}"
        )
    if memory is not None and memory.offload_activations and not recomputed:
        raise ValueError(
            "offload_activations would send the weights that several processes gather to main memory as well: set "
            f"gradient_checkpointing to 'blocks' and every to 1, turn offload_activations off, or {way_out}"
        )
    whole = local_bytes(network)
    with in_shares(network, blocks_of(network), patience):
        denoiser.in_place = False  # autograd itself now refuses what is not recomputed and written over
        denoiser.passes = world.most
        comfy.model_management.soft_empty_cache()
        part = local_bytes(network)
        logger.info("each of %d processes holds %.3g of %.3g GB of weights", world.size, part / 1e9, whole / 1e9)
        yield
