"""The part of a network before its first perturbed block, computed once for cond and its perturbed copy.

Both are the same until there. So cond and uncond are evaluated as without guidance, and what the cond rows are when
they enter the first perturbed block is kept. A second evaluation, of the perturbed copy alone, enters the network there
(reentry.py). Where something known is in the way (`find_prefix`) it is not even tried; where something unknown is, that
is noticed, and the caller evaluates the copy without a shortcut.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal, get_args

import comfy.samplers
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.patcher_extension import WrappersMP, get_all_wrappers, get_wrappers_with_key
from torch import Tensor, nn

from .attention_targets import MIDDLE, UNET_LISTS, Place
from .blocks import block_lists
from .reentry import CannotShare, Prefix, Records, Wrapper, recording, resuming, with_kept_controls


# Patches of other packs that may act on the perturbed rows alone, and not on what comes before.
_PATCHES = {"output_block_patch", "emb_patch", "attn1_patch", "attn2_patch"}
_REPLACEMENTS = {"attn1", "attn2"}

Sharing = Literal["auto", "on", "off"]
SHARING: tuple[Sharing, ...] = get_args(Sharing)
# Parameters from which on "auto" shares. The second call reads the weights once more. Measured on one CPU thread: with
# 2 M parameters slower or even, with 28 M even, with 74 M faster, SD1.5 3 % slower at 256 x 256 and 5 to 12 % faster at
# 512 x 512. A GPU does not compute while a call is prepared, either: not measured, so big models alone.
SMALLEST_ON_CPU, SMALLEST_ON_GPU = 50_000_000, 1_000_000_000


def is_wanted(sharing: Sharing, network: nn.Module, places: Collection[Place], device: torch.device) -> bool:
    """Whether evaluations are to share the prefix before `places`, by the node's input: "on", "off" or "auto".

    "auto" is on where the prefix has a quarter of the parameters or more, of a network that is not too small for a
    second call to pay: a U-Net's input blocks have 0.3 of its parameters and of its FLOPs.
    """
    if sharing != "auto":
        return sharing == "on"
    prefix = prefix_of(network, places)
    size, smallest = _num_parameters([network]), SMALLEST_ON_CPU if device.type == "cpu" else SMALLEST_ON_GPU
    return prefix is not None and size >= smallest and _num_parameters(prefix.before) >= size / 4


def _num_parameters(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def prefix_of(network: nn.Module, places: Collection[Place]) -> Prefix | None:
    """What lies before the first of `places`, (name of a list of blocks, index); None: nothing, or it is not known.

    Nor is it taken of a U-Net's input blocks: little is gained there, and later ones leave tensors for output blocks.
    """
    modules = list(_in_order(network))
    if _is_unet(network):
        entries = [i for i, (place, layer) in enumerate(modules) if place in places and _is_transformer(layer)]
        entries = [] if entries and modules[entries[0]][0][0] == UNET_LISTS[0] else entries
    else:
        entries = [i for i, (place, _) in enumerate(modules) if place in places]
    first = min(entries, default=0)
    return Prefix(tuple(module for _, module in modules[:first]), modules[first][1]) if first else None


def _in_order(network: Any) -> Iterator[tuple[Place, nn.Module]]:
    """(place, module) in execution order: the blocks of a network, the layers of a U-Net's blocks."""
    for name in block_lists(network):
        blocks = getattr(network, name)
        if _is_unet(network):
            blocks = [blocks or ()] if (name, 0) == MIDDLE else blocks
            yield from (((name, i), layer) for i, block in enumerate(blocks) for layer in block)
        else:
            yield from (((name, i), block) for i, block in enumerate(blocks))


def _is_unet(network: nn.Module) -> bool:
    return block_lists(network) == UNET_LISTS


def _is_transformer(layer: nn.Module) -> bool:
    return isinstance(layer, SpatialTransformer)


def find_prefix(args: dict, places: Collection[Place]) -> Prefix | None:
    """What lies before the first of `places`, for an evaluation with the slot's `args`; None where it cannot be shared.

    It cannot where another pack has a say in which rows or which part of the network are computed: context windows,
    several GPUs, block caches, compiled networks, replaced blocks, hooks on modules, patches that mix rows or blocks.
    """
    network, options = args["model"].diffusion_model, args["model_options"]
    if not _is_ordinary(options) or any("hooks" in entry or "gligen" in entry for entry in args["conds"][0]):
        return None
    prefix = prefix_of(network, places)
    return prefix if prefix is not None and all(map(_is_untouched, (network, *prefix.before, prefix.first))) else None


def _is_ordinary(options: dict) -> bool:
    transformer = options.get("transformer_options", {})
    patches = {name for name, functions in transformer.get("patches", {}).items() if functions}
    replaced = {name for name, functions in transformer.get("patches_replace", {}).items() if functions}
    wrappers = [WrappersMP.DIFFUSION_MODEL, WrappersMP.CALC_COND_BATCH]
    return (
        patches <= _PATCHES
        and replaced <= _REPLACEMENTS
        and options.get("context_handler") is None
        and not {"multigpu_clones", "model_function_wrapper"} & options.keys()
        and not any(get_all_wrappers(kind, options, is_model_options=True) for kind in wrappers)
        and not get_wrappers_with_key(WrappersMP.APPLY_MODEL, "torch.compile", options, is_model_options=True)
    )


def _is_untouched(module: nn.Module) -> bool:
    compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return not (compiled or "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def evaluate_shared(
    args: dict, copies: list[list[dict]], prefix: Prefix, perturbing: Callable[[Wrapper], Wrapper], inner: Wrapper
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Predictions for args["conds"], and those for `copies`: of cond's entries, in their order, with other uuids.

    `inner` calls the model; `perturbing` puts the perturbation of each copy, by its number, around such a wrapper. None
    for the copies: they are not to be had with a shared prefix, and have to be computed in another way.
    """
    model, conds, x, sigma, options = (args[key] for key in ("model", "conds", "input", "sigma", "model_options"))
    records: Records = {}
    first = {**options, "model_function_wrapper": recording(inner, prefix, records)}
    predictions = comfy.samplers.calc_cond_batch(model, conds, x, sigma, first)
    of_copies = {
        entry["uuid"]: records.get(origin["uuid"])
        for copy in copies
        for entry, origin in zip(copy, conds[0], strict=True)
    }
    second = {**options, "model_function_wrapper": perturbing(resuming(inner, prefix, of_copies))}
    try:
        perturbed = comfy.samplers.calc_cond_batch(model, with_kept_controls(copies, of_copies), x, sigma, second)
    except CannotShare:
        return predictions, None
    return predictions, None if any(torch.isnan(prediction).any() for prediction in perturbed) else perturbed
