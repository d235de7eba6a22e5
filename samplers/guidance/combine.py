"""Guidance rules: named predictions in, one prediction out.

Every prediction is the model's estimate of the clean sample (`denoised`), shape [B, ...]. There a rule is the same for
eps, v, x0 and velocity models, since each of those outputs is an affine function of that estimate.
"""

from torch import Tensor


def perturbed_guidance(denoised: Tensor, cond: Tensor, perturbed: Tensor, scale: float) -> Tensor:
    """denoised + scale · (cond − perturbed): away from what a weakened model predicts. All tensors [B, ...].

    Perturbed-attention guidance, Ahn et al. 2024, arXiv:2403.17377. `denoised` is the result so far: that of
    classifier-free guidance, or `cond` itself. `perturbed` is the weakened prediction for the same condition. `scale` 0
    is off; the authors use 3 together with classifier-free guidance and 5 without.
    """
    return denoised + scale * (cond - perturbed)
