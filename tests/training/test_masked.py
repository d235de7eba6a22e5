"""Masked loss: a rectangle is a crop, the outside has no say, and every sample's weight is what its mask says."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tidetable.schedules.process import VP, Flow
from tidetable.tests.training.solvable import PointDenoiser, point_dataset
from tidetable.training.config import TrainConfig
from tidetable.training.data import Dataset
from tidetable.training.engine import Trainer
from tidetable.training.masked import fit_mask, learned_weight
from tidetable.training.objective import loss_for_batch
from tidetable.training.recipe import ObjectiveConfig
from tidetable.training.validation import validate


T = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
OBJECTIVES = (
    {},
    {"loss": "huber", "weighting": "min_snr"},
    {"loss": "l1", "prediction": "x0", "weighting": "sigma_sqrt"},
)
BOX = (slice(2, 6), slice(1, 4))


class Pointwise(nn.Module):
    """Each element's prediction follows from that element alone."""

    def __init__(self, process=None, prediction="velocity"):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        self.process, self.prediction, self.shift = process or Flow(), prediction, 1.0
        self.gradient_context = nullcontext

    def snap(self, t):
        return t

    def predict(self, x_t, t, conditions):
        scale = torch.tensor([1.0 if condition is None else condition for condition in conditions])
        return self.layer(x_t) * (scale[:, None, None, None] + t.to(x_t)[:, None, None, None])


def samples(count=3, size=8):
    return torch.randn(2, count, 3, size, size, generator=torch.Generator().manual_seed(0))


def box_masks(count=3, size=8):
    masks = torch.zeros(count, 1, size, size)
    masks[..., BOX[0], BOX[1]] = 1
    return masks


def gradients(denoiser, loss):
    return torch.autograd.grad(loss.sum(), list(denoiser.parameters()))


@pytest.mark.parametrize("kind", ["on", "normalized"])
@pytest.mark.parametrize("settings", OBJECTIVES)
@pytest.mark.parametrize("process", [Flow(), VP.from_betas()])
def test_loss_and_gradient_of_a_rectangle_are_those_of_the_crop(process, settings, kind):
    denoiser = Pointwise(process, "velocity" if isinstance(process, Flow) else "eps")
    x0, eps = samples()
    config = ObjectiveConfig(masked_loss=kind, **settings)
    masked = loss_for_batch(denoiser, x0, [None] * 3, eps, T, config, masks=box_masks())
    crop = (..., *BOX)
    cropped = loss_for_batch(denoiser, x0[crop], [None] * 3, eps[crop], T, ObjectiveConfig(**settings))
    share = 12 / 64 if kind == "on" else 1.0
    assert torch.allclose(masked, share * cropped, rtol=1e-4)
    for one, other in zip(gradients(denoiser, masked), gradients(denoiser, cropped), strict=True):
        assert torch.allclose(one, share * other, rtol=1e-4, atol=1e-5)


def test_outside_the_mask_nothing_matters_and_inside_everything_does():
    denoiser, (x0, eps) = Pointwise(), samples()
    config = ObjectiveConfig(masked_loss="on")

    def loss(x0):
        return loss_for_batch(denoiser, x0, [None] * 3, eps, T, config, masks=box_masks())

    other = torch.where(box_masks() > 0, x0, 7.0)
    assert torch.equal(loss(other), loss(x0))
    for one, two in zip(gradients(denoiser, loss(other)), gradients(denoiser, loss(x0)), strict=True):
        assert torch.equal(one, two)
    assert not torch.allclose(loss(torch.where(box_masks() > 0, 7.0, x0)), loss(x0))


def test_the_outside_counts_its_weight():
    denoiser, (x0, eps) = Pointwise(), samples()

    def loss(weight, kind="on", masks=None):
        config = ObjectiveConfig(masked_loss=kind, unmasked_weight=weight)
        return loss_for_batch(denoiser, x0, [None] * 3, eps, T, config, masks=box_masks() if masks is None else masks)

    inside, outside = loss(0.0), loss(0.0, masks=1 - box_masks())
    assert torch.allclose(loss(0.25), inside + 0.25 * outside)
    whole = loss_for_batch(denoiser, x0, [None] * 3, eps, T)
    assert torch.allclose(loss(0.25, "normalized"), (inside + 0.25 * outside) / (12 / 64 + 0.25 * 52 / 64))
    assert torch.equal(loss(1.0), whole) and torch.equal(loss(0.0, masks=torch.ones(3, 1, 8, 8)), whole)
    assert torch.allclose(loss(0.0, masks=torch.full((3, 1, 8, 8), 0.5)), whole / 2)


def test_without_masked_loss_a_mask_is_not_used():
    assert learned_weight(box_masks(), ObjectiveConfig()) is None


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 5, 4, 6)])
def test_a_larger_mask_is_averaged_over_the_area_of_each_latent_pixel(shape):
    mask = torch.rand(32, 48, generator=torch.Generator().manual_seed(1))
    fitted = fit_mask(mask, torch.zeros(shape))
    blocks = mask.unfold(0, 8, 8).unfold(1, 8, 8).mean((-1, -2))
    assert fitted.shape == (*[1] * (len(shape) - 2), 4, 6)
    assert torch.allclose(fitted.flatten(), blocks.flatten())
    assert (fitted * torch.ones(shape)).shape == shape


def test_a_smaller_mask_is_interpolated_within_its_values():
    fitted = fit_mask(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.zeros(3, 8, 8))[0]
    assert torch.equal(fitted[0], fitted[7]) and (fitted[0].diff() >= 0).all()
    assert fitted[0, 0] == 0 and fitted[0, 7] == 1 and fitted.unique().numel() > 2


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_masks_with_other_values_are_refused(value):
    with pytest.raises(ValueError, match=r"must be in 0\.\.1"):
        fit_mask(torch.tensor([[0.0, value]]), torch.zeros(3, 4, 4))


# ── in a run ────────────────────────────────────────────────────────────────────────────────────────────────────────


def half_wrong(count):
    """Samples that show the point on the left, and something else on the right, which is masked out."""
    data = point_dataset(count)
    latents = [torch.cat([latent[..., :2], 9 * torch.ones(3, 4, 2)], -1) for latent in data.latents]
    mask = torch.cat([torch.ones(1, 4, 2), torch.zeros(1, 4, 2)], -1)
    return Dataset(latents, data.conditions, masks=[mask] * count)


def test_the_optimum_is_that_of_the_inside_and_validation_sees_only_it():
    denoiser, masked = PointDenoiser(), ObjectiveConfig(masked_loss="on")
    config = TrainConfig(steps=400, learning_rate=0.05, warmup_steps=5, seed=1, objective=masked)
    events = list(Trainer(config, denoiser, list(denoiser.parameters()), half_wrong(12), half_wrong(4)).run())
    assert torch.allclose(denoiser.center, point_dataset(1).latents[0][:, 0, 0], atol=1e-2)
    assert events[-1].loss < 1e-3 * events[0].loss
    assert validate(denoiser, half_wrong(4), 4, 1, 0).loss > 100 * events[-1].loss


def test_a_subset_takes_each_samples_mask_and_prompt_along():
    data = point_dataset(4)
    masks = [torch.full((1, 4, 4), float(index)) for index in range(4)]
    part = Dataset(data.latents, data.conditions, 0.0, masks=masks, prior_conditions=list("abcd")).subset([3, 1])
    assert [mask.max().item() for mask in part.masks] == [3, 1] and part.prior_conditions == ["d", "b"]
    assert len(part) == 2 and part.empty_condition == 0.0
    assert data.subset([0]).masks is None


def test_masked_loss_without_any_mask_is_refused():
    denoiser = PointDenoiser()
    config = TrainConfig(objective=ObjectiveConfig(masked_loss="on"))
    with pytest.raises(ValueError, match="none of the latents has a mask: put Set Latent Noise Mask"):
        Trainer(config, denoiser, list(denoiser.parameters()), point_dataset())


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_the_weight_outside_is_a_share(weight):
    with pytest.raises(ValueError, match="unmasked_weight"):
        ObjectiveConfig(unmasked_weight=weight)
