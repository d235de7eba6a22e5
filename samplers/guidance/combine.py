"""Guidance rules: named predictions in, one prediction out.

Every prediction is the model's estimate of the clean sample (`denoised`), shape [B, ...], unless its function says
otherwise. There a rule is the same for eps, v, x0 and velocity models, since each of those outputs is an affine
function of that estimate.
"""

import torch
from torch import Tensor


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
