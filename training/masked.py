"""Masked loss: which part of a sample is learned. A mask is 1 where it is, 0 where it is not, on the latent's grid."""

from torch import Tensor, nn

from .recipe import ObjectiveConfig


def fit_mask(mask: Tensor, latent: Tensor) -> Tensor:
    """A mask [H, W] of any size as one that multiplies a latent [C, ..., h, w]: [1, ..., h, w], frames alike.

    Smaller by area, so that the share of a latent pixel that is masked stays; larger by bilinear interpolation.
    ValueError for values that are not in 0..1.
    """
    if not bool(((mask >= 0) & (mask <= 1)).all()):  # nan is not either
        raise ValueError(
            f"its mask has values from {float(mask.min()):.3g} to {float(mask.max()):.3g}, but they must be in 0..1"
        )
    size = latent.shape[-2:]
    smaller = mask.shape[-2] >= size[0] and mask.shape[-1] >= size[1]
    fitted = nn.functional.interpolate(mask.to(latent)[None, None], size, mode="area" if smaller else "bilinear")
    return fitted.reshape(*[1] * (latent.ndim - 2), *size)


def learned_weight(masks: Tensor | None, config: ObjectiveConfig) -> Tensor | None:
    """Weights [B, 1, ..., h, w] of the loss of the data, from such masks: 1 inside, `unmasked_weight` outside.

    With "normalized" each sample's weights have mean 1, whatever the area of its mask. None: no mask is used.
    """
    if masks is None or config.masked_loss == "off":
        return None
    weight = config.unmasked_weight + (1 - config.unmasked_weight) * masks
    if config.masked_loss == "normalized":
        weight = weight / weight.flatten(1).mean(1).reshape(-1, *[1] * (weight.ndim - 1))
    return weight
