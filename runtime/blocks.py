"""Which blocks of a ComfyUI network are perturbed: a small grammar, defaults, and errors that list what there is."""

import re
from typing import Any

from torch import nn

from .attention_families import FAMILIES, Family, family_of
from .attention_targets import (
    MIDDLE,
    UNET_LISTS,
    BlockTarget,
    Place,
    Target,
    UNetTarget,
    self_attention_numbers,
    unet_block,
    word_of,
    written,
)


AUTO = "auto"

_PART = re.compile(r"(?:([a-z][a-z_]*?)s?)?\s*(?:(\d+)(?:\s*-\s*(\d+))?)?")


def block_lists(network: nn.Module) -> tuple[str, ...]:
    """The names of the network's lists of blocks in execution order; () where the network is not known."""
    if _is_unet(network):
        return UNET_LISTS
    family = family_of(network)
    return family.lists if family is not None else ()


def find_target(network: nn.Module, blocks: str = AUTO) -> Target:
    """The blocks of a model's `diffusion_model` that are perturbed.

    `blocks` is AUTO, or parts like "middle", "input 4", "single 10-12" with commas between. AUTO is a published choice
    or else the middle; of U-Nets all self-attentions of the middle block (Ahn et al. 2024, arXiv:2403.17377, and
    ComfyUI's own node). ValueError, with the blocks there are, for other networks and for blocks that do not exist.
    """
    there = perturbable_places(network)
    if not there:
        names = ", ".join(["U-Nets", *dict.fromkeys(family.name for family in FAMILIES)])
        raise ValueError(
            f"Perturbed attention: {type(network).__name__} has no blocks that can be perturbed. Supported: {names}. "
            f"Remove the node or set its scale to 0. Blocks of this model: {describe_blocks(network)}."
        )
    wanted = _parsed(blocks, there) if blocks.strip().lower() != AUTO else _automatic(network, there)
    places = tuple(place for place in there if place in wanted)
    if _is_unet(network):
        return UNetTarget(places, tuple(self_attention_numbers(unet_block(network, place)) for place in places))
    family: Any = family_of(network)
    return BlockTarget(family, places, tuple(_num_attentions(network, place) for place in places))


def perturbable_places(network: Any) -> tuple[Place, ...]:
    """All places with attention over the picture, in execution order; () where the network is not known."""
    if _is_unet(network):
        counts = (len(network.input_blocks), 1, len(network.output_blocks))
        places = [(name, i) for name, count in zip(UNET_LISTS, counts, strict=True) for i in range(count)]
        return tuple(place for place in places if self_attention_numbers(unet_block(network, place)))
    family = family_of(network)
    return tuple((name, i) for name in (family.lists if family else ()) for i in range(len(getattr(network, name))))


def describe_blocks(network: nn.Module) -> str:
    """The blocks that can be perturbed, as one writes them: "input 4-5, middle, output 3"; else the lists there are."""
    places = perturbable_places(network)
    if places:
        return written(places)
    if _is_unet(network):
        return "a U-Net without self-attention"
    kinds = (nn.ModuleList, nn.ModuleDict)
    lists = {name: list(c.children()) for name, c in network.named_children() if isinstance(c, kinds) and len(c)}
    return ", ".join(f"{name}: {len(b)} x {type(b[0]).__name__}" for name, b in lists.items()) or "no lists of blocks"


def _is_unet(network: nn.Module) -> bool:
    return all(hasattr(network, name) for name in UNET_LISTS)


def _num_attentions(network: Any, place: Place) -> int:
    block = getattr(network, place[0])[place[1]]
    # SD3.5 medium: a second attention over the picture alone.
    return 2 if getattr(getattr(block, "x_block", None), "x_block_self_attn", False) else 1


def _automatic(network: nn.Module, there: tuple[Place, ...]) -> set[Place]:
    family: Family | None = family_of(network)
    if family is not None:
        size, place = family.published or (0, there[0])
        return {place if len(there) == size else there[len(there) // 2]}
    blocks: Any = network

    def steps_from_the_middle(place: Place) -> int:
        return {"input_blocks": len(blocks.input_blocks) - place[1], "output_blocks": 1 + place[1]}.get(place[0], 0)

    return {min(reversed(there), key=steps_from_the_middle)}  # of two that are as near, the later one


def _parsed(blocks: str, there: tuple[Place, ...]) -> set[Place]:
    """The places that `blocks` names; ValueError for what is not understood or not there."""
    names = list(dict.fromkeys(name for name, _ in there))
    words = {word_of(name): name for name in names}
    if len(names) == 1:
        words |= dict.fromkeys(("block", "layer"), names[0])
    wanted: set[Place] = set()
    word = ""
    for part in blocks.lower().split(","):
        match = _PART.fullmatch(part.strip())
        if not part.strip() or match is None:
            raise _refused(blocks, f"{part.strip()!r} is not a name with a number or a range", there)
        word = match[1] or word
        wanted |= _places_of(word, match[2], match[3], words, there, blocks)
    return wanted


def _places_of(
    word: str, first: str | None, last: str | None, words: dict, there: tuple[Place, ...], blocks: str
) -> set[Place]:
    if word == "middle" and first is None:
        if there[0][0] not in UNET_LISTS:
            return {there[len(there) // 2]}
        if MIDDLE not in there:
            raise _refused(blocks, "this U-Net has no self-attention in its middle", there)
        return {MIDDLE}
    if word not in words:
        raise _refused(blocks, f"there is no {word!r}" if word else "a number needs a name before it", there)
    places = {place for place in there if place[0] == words[word]}
    if first is None:
        return places
    numbers = range(int(first), int(last or first) + 1)
    missing = next((i for i in numbers if (words[word], i) not in places), None)
    if missing is not None or not numbers:
        raise _refused(blocks, f"there is no {word} {f'{first}-{last}' if missing is None else missing}", there)
    return {(words[word], i) for i in numbers}


def _refused(blocks: str, problem: str, there: tuple[Place, ...]) -> ValueError:
    return ValueError(
        f"Perturbed attention: blocks {blocks!r} cannot be perturbed, {problem}. This model has: {written(there)}. "
        f'Write for example "{word_of(there[0][0])} {there[0][1]}", or "{AUTO}".'
    )
