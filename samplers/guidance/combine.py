"""Guidance rules: named predictions in, one prediction out.

Every prediction is the model's estimate of the clean sample (`denoised`), shape [B, ...], unless its function says
otherwise. There a rule is the same for eps, v, x0 and velocity models, since each of those outputs is an affine
function of that estimate.
"""

from typing import Literal, get_args

import torch
from torch import Tensor


RescaleMode = Literal["full", "partial"]
RESCALE_MODES: tuple[RescaleMode, ...] = get_args(RescaleMode)


def classifier_free_guidance(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale · (cond − uncond): Ho & Salimans 2022, arXiv:2207.12598, with `scale` 1 = `cond` alone."""
    return uncond + (cond - uncond) * scale


def perturbed_guidance(denoised: Tensor, cond: Tensor, perturbed: Tensor, scale: float) -> Tensor:
    """denoised + scale · (cond − perturbed): away from what a weakened model predicts. All tensors [B, ...].

    Perturbed-attention guidance, Ahn et al. 2024, arXiv:2403.17377. `denoised` is the result so far: that of
    classifier-free guidance, or `cond` itself. `perturbed` is the weakened prediction for the same condition. `scale` 0
    is off; the authors use 3 together with classifier-free guidance and 5 without.
    """
    return denoised + scale * (cond - perturbed)


def rescaled_guidance(guided: Tensor, cond: Tensor, multiplier: float) -> Tensor:
    """`guided` with its standard deviation moved towards that of `cond`; 0 leaves it, 1 makes them equal.

    Lin et al. 2023, arXiv:2305.08891, section 3.4: φ · guided · std(cond) / std(guided) + (1 − φ) · guided with φ =
    `multiplier`. Both are what the network outputs (v on VP processes, velocity on flow), not the clean sample, whose
    deviations have another ratio. A deviation is over all of a sample. A constant `guided` stays as it is.
    """
    dims = tuple(range(1, guided.ndim))
    own = torch.std(guided, dim=dims, keepdim=True)
    ratio = torch.where(own > 0, torch.std(cond, dim=dims, keepdim=True) / own, 1.0)
    return guided * (multiplier * ratio + (1.0 - multiplier))


def rescaled_perturbed_guidance(
    denoised: Tensor, cond: Tensor, perturbed: Tensor, scale: float, rescale: float, mode: RescaleMode = "full"
) -> Tensor:
    """`perturbed_guidance` with its term made smaller or larger, so that the result keeps the spread of `cond`.

    The term is multiplied by 1 − rescale + rescale · std(cond) / std(guided), stds over everything but the batch.
    `guided` is the result with the whole term ("full") or `cond` with it ("partial"). `rescale` 0 is off, 1 the whole
    correction. After Lin et al. 2023, arXiv:2305.08891, eq. 15 and 16, which scale the result; here classifier-free
    guidance stays as it is, as in pamparamm's sd-perturbed-attention.
    """
    if rescale == 0.0:
        return perturbed_guidance(denoised, cond, perturbed, scale)
    term = scale * (cond - perturbed)
    guided = (denoised if mode == "full" else cond) + term
    dims = tuple(range(1, cond.ndim))
    spread = torch.std(guided, dims, keepdim=True).clamp_min(torch.finfo(guided.dtype).tiny)
    ratio = torch.std(cond, dims, keepdim=True) / spread
    return denoised + (1.0 - rescale + rescale * ratio) * term


def relative_difference(cond: Tensor, perturbed: Tensor) -> float:
    """|cond − perturbed| / |cond|, Euclidean norms over the whole batch: how much the perturbation still changes."""
    return float(torch.linalg.vector_norm(cond - perturbed) / torch.linalg.vector_norm(cond))
