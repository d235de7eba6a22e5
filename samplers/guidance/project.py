"""Guidance rules that compare the directions of two predictions, sample by sample. All tensors are [B, ...].

Inner products are over all of a sample and summed in float32 or better. A zero vector has no direction: nothing is
projected on it, and no result is nan.
"""

import torch
from torch import Tensor


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each sample, [B, 1, ...]."""
    precise = torch.promote_types(a.dtype, torch.float32)
    product = a.to(precise) * b.to(precise)
    return product.sum(dim=tuple(range(1, a.ndim)), keepdim=True)


def damp_tangential(cond: Tensor, uncond: Tensor) -> Tensor:
    """`uncond` projected on the direction that it and `cond` share most: the first right singular vector of both.

    TCFG, Kwon et al. 2025, arXiv:2503.18137. Both are scores up to one common factor: eps, or the velocity of
    a flow. Two vectors need no decomposition of the [2, N] matrix: with the angle θ of the leading eigenvector
    (cos θ, sin θ) of their 2×2 Gram matrix, tan 2θ = 2⟨u, c⟩ / (⟨u, u⟩ − ⟨c, c⟩), the projection of u is
    cos²θ · u + sin θ cos θ · c.
    """
    double_angle = torch.atan2(2.0 * inner(uncond, cond), inner(uncond, uncond) - inner(cond, cond))
    return (0.5 * (1.0 + double_angle.cos()) * uncond + 0.5 * double_angle.sin() * cond).to(uncond.dtype)


def optimized_scale(cond: Tensor, uncond: Tensor) -> Tensor:
    """s = ⟨cond, uncond⟩ / ‖uncond‖², [B, 1, ...], which makes ‖cond − s · uncond‖ smallest.

    CFG-Zero*, Fan et al. 2025, arXiv:2503.18886; both are velocities. Guidance is then (1 − w) · s · uncond +
    w · cond, that is classifier-free guidance with s · uncond.
    """
    square = inner(uncond, uncond)
    return torch.where(square > 0, inner(cond, uncond) / square, 1.0).to(uncond.dtype)


def projected_guidance(cond: Tensor, update: Tensor, scale: float, eta: float, norm_threshold: float = 0.0) -> Tensor:
    """cond + (scale − 1) · (orthogonal + eta · parallel): what is parallel to `cond` counts `eta` times as much.

    APG, Sadat et al. 2024, arXiv:2410.02416; predictions are `denoised`. `update` is cond − uncond, or its running
    average (momentum.py). `norm_threshold` above 0 first shortens it to that length where it is longer. With `eta` 1
    and no threshold this is classifier-free guidance; the authors use `eta` 0.
    """
    if norm_threshold > 0.0:
        length = inner(update, update).sqrt()
        update = update * (norm_threshold / length.clamp(min=norm_threshold)).to(update.dtype)
    square = inner(cond, cond)
    share = torch.where(square > 0, inner(update, cond) / square, 0.0).to(cond.dtype)
    return cond + (scale - 1.0) * (update + (eta - 1.0) * share * cond)
