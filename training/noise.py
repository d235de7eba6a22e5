"""The noise of a batch: offset, pyramid, pairing with the samples, and what the network sees of it.

Offset noise: Guttenberg 2023, "Diffusion with offset noise". Pyramid noise: Whitaker 2023, "Multi-resolution noise".
Input perturbation: Ning et al. 2023, arXiv:2301.11706. Pairing: minibatch optimal transport, Tong et al. 2023,
arXiv:2302.00482, and Pooladian et al. 2023, arXiv:2304.14772.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .recipe import ObjectiveConfig


def shapes_noise(config: ObjectiveConfig) -> bool:
    """Whether `shape_noise` draws or looks across the rows of the batch, and so needs all of them."""
    return bool(config.pyramid_discount or config.offset_noise or config.ot_pairing or config.input_perturbation)


def shape_noise(eps: Tensor, x0: Tensor, config: ObjectiveConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(noise of the target, noise that the network sees) for a batch [B, C, …], from plain noise `eps`."""
    if config.pyramid_discount:
        eps = pyramid_noise(eps, config.pyramid_discount, generator)
    if config.offset_noise:
        offset = torch.randn(*eps.shape[:2], *[1] * (eps.ndim - 2), generator=generator)
        eps = eps + config.offset_noise * offset.to(eps)
    if config.ot_pairing:
        eps = eps[ot_assignment(x0, eps)]
    seen = eps
    if config.input_perturbation:
        seen = eps + config.input_perturbation * torch.randn(eps.shape, generator=generator).to(eps)
    return eps, seen


def pyramid_noise(eps: Tensor, discount: float, generator: torch.Generator) -> Tensor:
    """Noise at the full size plus discount^i of noise at 1/2^i of it, scaled back to a standard deviation of 1."""
    height, width = eps.shape[-2:]
    flat = eps.reshape(-1, 1, height, width)
    level, strength = 1, discount
    while min(height, width) >> level >= 1:
        size = (height >> level, width >> level)
        coarse = torch.randn(len(flat), 1, *size, generator=generator).to(eps)
        flat = flat + strength * nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        level, strength = level + 1, strength * discount
    noise = flat.reshape(eps.shape)
    return noise / noise.std()


def ot_assignment(x0: Tensor, eps: Tensor) -> Tensor:
    """[B] row of `eps` for each row of `x0`: the pairing with the least sum of squared distances in the batch."""
    cost = torch.cdist(x0.flatten(1).double(), eps.flatten(1).double()).square()
    return torch.from_numpy(linear_sum_assignment(cost.detach().cpu().numpy())[1]).to(eps.device)
