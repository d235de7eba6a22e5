"""Where in a ComfyUI network attention can be perturbed, and how to get there through ComfyUI's own patch points.

A target is plain data, found once when the node runs. Its `perturb` returns a copy of one forward's transformer options
in which the target's attentions go through `attend`. What other packs have put at the same place is called from inside.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import comfy.ldm.modules.attention as comfy_attention
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn

from ..samplers.guidance.perturb import Attention


# attend(attention, q, k, v, tokens) -> output [B, N, C]; `tokens`: where in the sequence the picture is.
Attend = Callable[[Attention, Tensor, Tensor, Tensor, slice], Tensor]


@dataclass(frozen=True)
class UNetMiddle:
    """The self-attentions of a U-Net's middle block, by number of their transformer block (SD1.5 has 1, SDXL 10)."""

    indices: tuple[int, ...]

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        """(list of blocks, index) of the perturbed blocks in execution order; of a U-Net, its middle is one block."""
        return (("middle_block", 0),)

    def __str__(self) -> str:
        return f"self-attention of the U-Net's middle block (transformer blocks {_listed(self.indices)})"

    @property
    def num_attentions(self) -> int:
        return len(self.indices)

    def perturb(self, transformer_options: dict, attend: Attend) -> dict:
        attn1 = transformer_options.get("patches_replace", {}).get("attn1", {})
        keys = [("middle", 0, index) for index in self.indices]
        functions = {key: _unet_attention(attn1.get(key, attn1.get(("middle", 0))), attend) for key in keys}
        return _with_replaced(transformer_options, "attn1", functions)


def _unet_attention(earlier: Callable | None, attend: Attend) -> Callable:
    """A `patches_replace["attn1"]` function around `earlier` or, without one, around the model's own attention."""

    def replacement(q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if earlier is not None:
                return earlier(q, k, v, extra_options)
            heads, precision = extra_options["n_heads"], extra_options["attn_precision"]
            return comfy_attention.optimized_attention(
                q, k, v, heads, attn_precision=precision, transformer_options=extra_options
            )

        return attend(attention, q, k, v, slice(None))

    return replacement


@dataclass(frozen=True)
class JointBlock:
    """A block of an SD3-type MMDiT: attention over text and picture, in SD3.5 medium another over the picture alone."""

    index: int
    num_attentions: int

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        return (("joint_blocks", self.index),)

    def __str__(self) -> str:
        return f"attention of joint block {self.index}"

    def perturb(self, transformer_options: dict, attend: Attend) -> dict:
        key = ("double_block", self.index)
        earlier = transformer_options.get("patches_replace", {}).get("dit", {}).get(key)

        def block(args: dict, extra: dict) -> dict:
            options = _with_override(args["transformer_options"], args["img"].shape[1], attend)
            args = {**args, "transformer_options": options}
            return earlier(args, extra) if earlier is not None else extra["original_block"](args)

        return _with_replaced(transformer_options, "dit", {key: block})


def _with_override(transformer_options: dict, num_picture_tokens: int, attend: Attend) -> dict:
    """The options with an `optimized_attention_override` for one block, around the one that may be there already."""
    earlier = transformer_options.get("optimized_attention_override")

    def override(function: Callable, q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if earlier is not None:
                return earlier(function, q, k, v, *args, **kwargs)
            return function(q, k, v, *args, **kwargs)

        # Text comes first. Counted from the end, one slice fits the attention over the picture alone as well.
        return attend(attention, q, k, v, slice(q.shape[1] - num_picture_tokens, None))

    return {**transformer_options, "optimized_attention_override": override}


def _with_replaced(transformer_options: dict, kind: str, functions: dict) -> dict:
    """A copy of the options with `functions` added to `patches_replace[kind]`."""
    replaced = transformer_options.get("patches_replace", {})
    return {**transformer_options, "patches_replace": {**replaced, kind: {**replaced.get(kind, {}), **functions}}}


Target = UNetMiddle | JointBlock

# The lists of blocks of ComfyUI's networks in the order in which a forward goes through them.
_LISTS = (
    ("input_blocks", "middle_block", "output_blocks"),  # U-Nets
    ("joint_blocks",),  # SD3
    ("double_layers", "single_layers"),  # AuraFlow
    ("double_blocks", "single_blocks"),  # Flux, Flux2, Chroma, HunyuanVideo and HunyuanImage
    ("double_stream_blocks", "single_stream_blocks"),  # HiDream
    ("transformer_blocks",),  # Qwen-Image
    ("layers",),  # Lumina2, Z-Image, OmniGen2
    ("blocks",),  # Wan, Cosmos, Anima, Krea2
)


def block_lists(network: nn.Module) -> tuple[str, ...]:
    """The names of the network's lists of blocks in execution order; () where none is known."""
    children = dict(network.named_children())
    return next((names for names in _LISTS if names[0] in children), ())


def find_target(network: nn.Module) -> Target:
    """The attention of a model's `diffusion_model` that is perturbed: the middle of the network.

    U-Net: all self-attentions of the middle block (Ahn et al. 2024, arXiv:2403.17377, and ComfyUI's own node). MMDiT:
    joint block n // 2 of n; the diffusers example for SD3 has 13 of 24. ValueError, with the blocks there are, for
    other networks.
    """
    blocks: Any = network  # torch types every attribute of a module as Tensor | Module
    if isinstance(network, UNetModel):
        indices = _self_attention_indices(blocks.middle_block)
        if indices:
            return UNetMiddle(indices)
        problem = "this U-Net has no self-attention in its middle block, which is what gets perturbed"
    elif isinstance(network, MMDiT):
        index = len(blocks.joint_blocks) // 2
        return JointBlock(index, 2 if blocks.joint_blocks[index].x_block.x_block_self_attn else 1)
    else:
        problem = f"{type(network).__name__} is not supported"
    raise ValueError(
        f"Perturbed attention: {problem}. Supported are U-Nets with attention in the middle block (SD1.5, SD2, SDXL) "
        "and MMDiTs of the SD3 type (joint_blocks). Remove the node or set its scale to 0. "
        f"Blocks of this model: {describe_blocks(network)}."
    )


def _self_attention_indices(blocks: Any) -> tuple[int, ...]:
    """Numbers of the transformer blocks with self-attention among the layers of one U-Net block (None: no block)."""
    transformers = [layer for layer in blocks or () if isinstance(layer, comfy_attention.SpatialTransformer)]
    blocks = [block for transformer in transformers for block in transformer.transformer_blocks]
    return tuple(index for index, block in enumerate(blocks) if not block.disable_self_attn)


def describe_blocks(network: nn.Module) -> str:
    """The network's lists of blocks in one line, "joint_blocks: 24 x JointBlock"; of a U-Net, which have attention."""
    lists = {name: child for name, child in network.named_children() if isinstance(child, nn.ModuleList) and len(child)}
    if isinstance(network, UNetModel):
        parts = [_describe_unet_blocks(name, lists[name]) for name in ("input_blocks", "output_blocks")]
    else:
        parts = [f"{name}: {len(blocks)} x {type(blocks[0]).__name__}" for name, blocks in lists.items()]
    return ", ".join(parts) or "no lists of blocks"


def _describe_unet_blocks(name: str, blocks: nn.ModuleList) -> str:
    with_attention = [i for i, block in enumerate(blocks) if _self_attention_indices(block)]
    return f"{name}: {len(blocks)}, self-attention in {_listed(with_attention) or 'none'}"


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in numbers)
