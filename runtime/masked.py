"""What of the samples is learned, and what shall stay: the latents' masks and the objective's prompt, as data."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..training.data import Dataset
from ..training.masked import fit_mask
from ..training.recipe import ObjectiveConfig
from .trainable import ComfyDenoiser, Row


logger = logging.getLogger(__name__)


def with_masks_and_prior(
    denoiser: ComfyDenoiser, dataset: Dataset, latents: Sequence[dict], empty: list | None, objective: ObjectiveConfig
) -> Dataset:
    """The data set with what the objective uses: masks of the LATENTs, and the conditioning that shall not change.

    ValueError for masks that do not fit, and for a sample of which nothing would be learned.
    """
    masks = conditions = None
    found = sample_masks(latents)
    if any(mask is not None for mask in found):
        if objective.masked_loss == "off":
            logger.warning("the latents have masks, but masked_loss of Training Objective is off: they are not used")
        else:
            masks = [
                fitted(mask, latent, number, objective)
                for number, (mask, latent) in enumerate(zip(found, dataset.latents, strict=True), 1)
            ]
    prompt = empty if objective.prior_conditioning is None else objective.prior_conditioning
    if objective.prior_weight and objective.prior_on == "class_prompt" and prompt is not None:
        with torch.no_grad():
            conditions = prior_rows(denoiser, dataset.latents, prompt)
    return replace(dataset, masks=masks, prior_conditions=conditions)


def refuse_encoded_prompt(objective: ObjectiveConfig) -> None:
    """For runs that train the text encoder. ValueError where a prompt of the objective would not follow it."""
    if objective.prior_weight and objective.prior_on == "class_prompt":
        raise ValueError(
            f"prior_weight is {objective.prior_weight}, but prior_conditioning was encoded before this run, which"
            " trains the text encoder too: use prior_on 'outside_mask', or leave text_encoder unconnected"
        )


def prior_rows(denoiser: ComfyDenoiser, latents: Sequence[Tensor], prompt: list | tuple) -> list[Row]:
    """What shall not change for each latent: one CONDITIONING for all of them, or a tuple with one each."""
    if isinstance(prompt, list):  # sizes are part of some models' conditioning
        rows = {latent.shape: denoiser.condition(prompt, latent) for latent in latents}
        return [rows[latent.shape] for latent in latents]
    if len(prompt) != len(latents):
        raise ValueError(
            f"{len(latents)} latents but {len(prompt)} conditionings at prior_conditioning of Training Objective:"
            " connect one for each latent, or a single one"
        )
    return [denoiser.condition(part, latent) for part, latent in zip(prompt, latents, strict=True)]


def one_objective(connected: Sequence[ObjectiveConfig | None] | None) -> list[ObjectiveConfig]:
    """What is connected to Train LoRA as a list of at most one.

    Training Objective runs once for each of a list of conditionings; what comes out differs in these alone.
    """
    found = [objective for objective in connected or () if objective is not None]
    if any(objective != found[0] for objective in found):
        raise ValueError(f"objective got {len(found)} different settings, but a run has one: connect one")
    if len(found) > 1 and found[0].prior_conditioning is not None:
        return [replace(found[0], prior_conditioning=tuple(objective.prior_conditioning for objective in found))]
    return found[:1]


def sample_masks(latents: Sequence[dict]) -> list[Tensor | None]:
    """The mask [H, W] of every sample of LATENTs, or None, in the order of the samples."""
    found: list[Tensor | None] = []
    for latent in latents:
        count, mask = len(latent["samples"]), latent.get("noise_mask")
        if mask is None:
            found += [None] * count
            continue
        shape = tuple(mask.shape)
        flat = mask.ndim in (2, 3) or (mask.ndim == 4 and shape[1] == 1)
        rows = list(mask.reshape(-1, *shape[-2:]))
        if not flat or len(rows) not in (1, count):
            raise ValueError(
                f"a noise mask of shape {shape} does not fit latents of {count} samples: give Set Latent Noise Mask one"
                f" mask, or {count}"
            )
        found += rows if len(rows) == count else rows * count
    return found


def fitted(mask: Tensor | None, latent: Tensor, number: int, objective: ObjectiveConfig) -> Tensor:
    """The mask on the latent's grid; a sample without one counts fully."""
    mask = torch.ones(latent.shape[-2:]) if mask is None else mask.reshape(mask.shape[-2:])
    try:
        result = fit_mask(mask.detach().to(latent.device, copy=True).float(), latent)
    except ValueError as error:
        raise ValueError(f"sample {number}: {error}") from None
    if objective.unmasked_weight == 0 and not bool((result > 0).any()):
        raise ValueError(
            f"the mask of sample {number} is empty and unmasked_weight is 0, so nothing of it would be learned: leave"
            " it out, mask a part of it, or raise unmasked_weight"
        )
    return result
