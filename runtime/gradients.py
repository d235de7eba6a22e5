"""Right gradients on ComfyUI's networks: which are known to be right, how others are checked, and their blocks."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import comfy.ldm.modules.attention as host_attention
from torch import nn

from ..training.activations import Offload
from ..training.engine import Trainer
from ..training.gradient_proof import COARSE_TOLERANCE, TOLERANCE, prove_gradients
from ..training.memory import MemoryConfig
from ..training.recompute import recomputed, replaced_forwards
from .quantized import storage_of
from .trainable import ComfyDenoiser


logger = logging.getLogger(__name__)
PROVEN_CLASSES = (
    "UNetModel",
    "MMDiT",
    "OpenAISignatureMMDITWrapper",
    "Flux",
    "Chroma",
    "ChromaRadiance",
    "HunyuanVideo",
    "LTXVModel",
    "QwenImageTransformer2DModel",
    "NextDiT",
    "OmniGen2Transformer2DModel",
    "HiDreamImageTransformer2DModel",
    "WanModel",
    "VaceWanModel",
    "SingleStreamDiT",
)
"""Networks whose gradients are compared with finite differences in the tests, on ComfyUI 0.3.75 and 0.33.0."""
DIFFERENTIABLE_ATTENTION = ("attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic")


def unproven(network: nn.Module) -> str:
    """Why the gradients of a network are not known to be right; "" where they are."""
    name = type(network).__name__.removeprefix("FSDP")  # the class that fully_shard makes of it
    attention = getattr(host_attention.optimized_attention, "__name__", "unknown")
    if name not in PROVEN_CLASSES:
        return f"{name} is not among the networks that are tested ({', '.join(PROVEN_CLASSES)})"
    if attention not in DIFFERENTIABLE_ATTENTION:
        # The override of a session reaches the calls that take transformer_options, and a few do not.
        return f"ComfyUI was started with {attention}, which may have no backward pass"
    storage = storage_of(network)
    return f"its weights are stored as {storage}" if storage else ""


def untested_offload(denoiser: ComfyDenoiser) -> str:
    """Why weights that are cast from main memory are not known to have right gradients; "" where there are none."""
    away = any(parameter.device != denoiser.device for parameter in denoiser.real.diffusion_model.parameters())
    return f"its weights are cast from main memory to {denoiser.device}, which is tested on a CPU only" if away else ""


def require_right_gradients(denoiser: ComfyDenoiser, trainer: Trainer) -> None:
    """Prove them on the first batch where they are not known to be right. ValueError where they are wrong."""
    reason = unproven(denoiser.real.diffusion_model) or untested_offload(denoiser)
    if not reason or trainer.step >= trainer.config.steps:
        return
    real = denoiser.real
    coarse = (real.manual_cast_dtype or real.get_dtype()).itemsize < 4
    try:
        proof = prove_gradients(trainer, COARSE_TOLERANCE if coarse else TOLERANCE)
    except RuntimeError as error:  # autograd's own: an operation without a backward pass, a tensor changed in place
        raise ValueError(_refusal(reason, str(error).split("\n")[0])) from error
    if not proof.holds:
        raise ValueError(_refusal(reason, str(proof)))
    logger.info("%s; its gradients were checked on the first batch: %s", reason, proof)


def _refusal(reason: str, problem: str) -> str:
    return (
        f"this model cannot be trained here: {reason}, and on the first batch its gradients are wrong: {problem}. "
        "Start ComfyUI with --use-pytorch-cross-attention, without torch.compile and other patches on the MODEL, set "
        "base_weights to 'full', or train one of the networks that are tested"
    )


@contextmanager
def memory_saving(network: nn.Module, config: MemoryConfig | None) -> Iterator[None]:
    """What Training Memory asks for, on the network's blocks, for the length of a run."""
    config = config or MemoryConfig()
    with ExitStack() as stack:
        offload = Offload() if config.offload_activations else None
        if offload is not None:
            stack.enter_context(replaced_forwards([network], offload.forward_of))
        if config.gradient_checkpointing == "blocks":
            blocks = blocks_of(network)
            if not blocks:
                raise ValueError(
                    f"{type(network).__name__} has no lists of blocks that could be recomputed: set "
                    "gradient_checkpointing to off"
                )
            stack.enter_context(recomputed(blocks[:: config.every], offload))
        yield


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network in its order: what stands in its lists, of U-Nets the ResBlocks and the transformer
    blocks. A block has at least two layers with weights.
    """
    return [block for child in network.children() if isinstance(child, _CONTAINERS) for block in _inside(child)]


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def _inside(module: nn.Module) -> list[nn.Module]:
    inner = getattr(module, "transformer_blocks", None)  # of a U-Net's SpatialTransformer
    if isinstance(inner, nn.ModuleList):
        return list(inner)
    if isinstance(module, _CONTAINERS):
        return [block for child in module.children() for block in _inside(child)]
    layers = sum(hasattr(m, "in_features") or hasattr(m, "in_channels") for m in module.modules())
    return [module] if layers >= 2 else []
