"""The networks of ComfyUI whose attention can be perturbed, as data: their blocks, and where the picture's tokens are.

A family is known by the class name of its network (ComfyUI's modules come and go between versions, so none is
imported). What is said here was read in the networks' own code in ComfyUI 0.3.75 and 0.33.0 and is tested there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Sequence:
    """What is known when an attention is reached; counts are numbers of tokens."""

    length: int
    count: int
    """Of the picture that is sampled."""
    stream: int
    """Of the picture stream: the picture and, in editing models, the reference pictures."""
    network: Any
    conds: dict
    """The tensors the network is called with."""


def at_the_end(s: Sequence) -> slice:
    return slice(s.length - s.count, s.length)


def at_the_start(s: Sequence) -> slice:
    return slice(0, s.count)


def first_of_the_stream_after_text(s: Sequence) -> slice:
    start = s.length - s.stream
    return slice(start, start + s.count)


def the_stream_before_text(s: Sequence) -> slice:
    # HiDream-E1 puts its reference beside the picture, in the same rows of tokens.
    return slice(0, s.stream)


def hunyuan(s: Sequence) -> slice:
    # The reference picture comes first in the stream. ComfyUI has turned the order of text and stream around.
    end = s.stream if getattr(s.network.double_blocks[0], "flipped_img_txt", False) else s.length
    return slice(end - s.count, end)


def padded_at_the_end(s: Sequence) -> slice:
    multiple = s.network.pad_tokens_multiple or 1  # Z-Image
    start = s.length - -(-s.count // multiple) * multiple
    return slice(start, start + s.count)


def after_the_reference_frame(s: Sequence) -> slice:
    reference = s.conds.get("reference_latent") if s.network.ref_conv is not None else None
    _, height, width = s.network.patch_size
    start = 0 if reference is None else (reference.shape[-2] // height) * (reference.shape[-1] // width)
    return slice(start, start + s.count)


def _square(network: Any) -> tuple[int, ...]:
    return (network.patch_size, network.patch_size)


def _as_given(network: Any) -> tuple[int, ...]:
    return tuple(network.patch_size)


@dataclass(frozen=True)
class Family:
    """One kind of diffusion transformer."""

    name: str
    classes: tuple[str, ...]
    """Class names of its networks; those of derived classes too."""
    lists: tuple[str, ...]
    """Its lists of blocks in the order in which a forward goes through them."""
    streams: tuple[tuple[str, ...], ...]
    """For each list, the arguments of a block that the block's outputs replace, in the order of the outputs."""
    picture: Callable[[Sequence], slice]
    """Where in a sequence the picture is."""
    patch: Callable[[Any], tuple[int, ...]] = _square
    """The size of a token in cells of the latent, for the last two or three dimensions."""
    stream: str | None = None
    """The argument of the first block that is the picture stream, where its length is not given otherwise."""
    published: tuple[int, tuple[str, int]] | None = None
    """(number of blocks, block): a choice that was published for a network of that size."""


_FLUX = (("img", "txt"), ("x",))

FAMILIES = (
    # diffusers' PAG for SD3 (huggingface/diffusers#8861) uses 13 of 24.
    Family("SD3", ("MMDiT",), ("joint_blocks",), (("context", "x"),), at_the_end, published=(24, ("joint_blocks", 13))),
    Family("AuraFlow", ("MMDiT",), ("double_layers", "single_layers"), (("c", "x"), ("cx",)), at_the_end),
    Family(
        "Flux",
        ("Flux", "Chroma"),
        ("double_blocks", "single_blocks"),
        _FLUX,
        first_of_the_stream_after_text,
        stream="img",
    ),
    Family(
        "HunyuanVideo", ("HunyuanVideo",), ("double_blocks", "single_blocks"), _FLUX, hunyuan, _as_given, stream="img"
    ),
    Family(
        "Qwen-Image",
        ("QwenImageTransformer2DModel",),
        ("transformer_blocks",),
        (("encoder_hidden_states", "hidden_states"),),
        first_of_the_stream_after_text,
        lambda network: (1, network.patch_size, network.patch_size),
        stream="hidden_states",
    ),
    Family("Lumina2", ("NextDiT",), ("layers",), (("x",),), padded_at_the_end),
    Family("OmniGen2", ("OmniGen2Transformer2DModel",), ("layers",), (("hidden_states",),), at_the_end),
    Family(
        "HiDream",
        ("HiDreamImageTransformer2DModel",),
        ("double_stream_blocks", "single_stream_blocks"),
        (("image_tokens", "text_tokens"), ("image_tokens",)),
        the_stream_before_text,
        stream="image_tokens",
    ),
    Family("Wan", ("WanModel",), ("blocks",), (("x",),), after_the_reference_frame, _as_given),
    Family(
        "Cosmos-Predict2",
        ("MiniTrainDIT",),  # Anima too
        ("blocks",),
        (("x_B_T_H_W_D",),),
        at_the_start,
        lambda network: (network.patch_temporal, network.patch_spatial, network.patch_spatial),
    ),
    Family(
        "Krea2",
        ("SingleStreamDiT",),
        ("blocks",),
        (("x",),),
        first_of_the_stream_after_text,
        lambda network: (network.patch, network.patch),
    ),
)
# Derived from a known network, but their sequences hold more than is known here.
_OTHERS = ("CausalWanModel", "SCAILWanModel", "WanAnimate2Model")


def family_of(network: nn.Module) -> Family | None:
    """The family of a model's `diffusion_model`, by class name and lists of blocks; None for other networks."""
    names = [cls.__name__ for cls in type(network).__mro__]
    if any(name in _OTHERS for name in names):
        return None
    children = dict(network.named_children())
    for family in FAMILIES:
        if any(name in family.classes for name in names) and all(name in children for name in family.lists):
            return family
    return None
