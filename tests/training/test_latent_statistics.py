"""Statistics of latents against torch's own on everything at once, and what is said about data of known mistakes."""

import math

import pytest
import torch

from tidetable.training.latent_statistics import judge, latent_statistics


def latents(scale=1.0, offset=0.0, texture=1.0, count=7, channels=4):
    """Pictures whose channels have an offset of their own and a texture, of three sizes."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        height = (8, 12, 16)[index % 3]
        level = 0.3 * torch.randn(channels, 1, 1, generator=generator) + offset
        made.append(scale * (level + texture * torch.randn(channels, height, 10, generator=generator)))
    return made


def verdict(given, factor):
    return judge(latent_statistics([factor * latent for latent in given]), latent_statistics(given))


def test_statistics_are_those_of_all_values_at_once():
    data = [3 * latent + 0.7 for latent in latents()]
    found, every = latent_statistics(iter(data)), torch.cat([latent.flatten(1) for latent in data], 1).double()
    assert found.count == 7
    assert torch.allclose(torch.tensor(found.mean, dtype=torch.float64), every.mean(1), atol=1e-9)
    assert torch.allclose(torch.tensor(found.std, dtype=torch.float64), every.std(1, correction=0), atol=1e-9)
    assert math.isclose(found.rms, every.square().mean().sqrt().item(), rel_tol=1e-9)
    inner = torch.cat([(latent - latent.mean((1, 2), keepdim=True)).flatten(1) for latent in data], 1)
    assert math.isclose(found.texture, inner.square().mean().sqrt().item(), rel_tol=1e-5)
    assert f"root mean square {found.rms:.3g}" in str(found) and str(found).count("±") == 4


@pytest.mark.parametrize("shape", [(4, 8), (4, 8, 8), (16, 5, 8, 8)])
def test_sound_pictures_and_videos_have_the_shape_they_have(shape):
    found = latent_statistics([torch.ones(shape)])
    assert found.rms == 1 and found.texture == 0 and len(found.mean) == shape[0]


def test_another_number_of_channels_is_named():
    with pytest.raises(ValueError, match="latent 2 has 16 channels but those before it have 4"):
        latent_statistics([torch.zeros(4, 8, 8), torch.zeros(16, 8, 8)])
    with pytest.raises(ValueError, match="there are no latents to measure"):
        latent_statistics([])


@pytest.mark.parametrize("factor", [0.18215, 0.13025, 0.3611, 1.5305, 1.0])
@pytest.mark.parametrize("texture", [1.0, 0.6, 1.4])
def test_a_models_own_latents_are_fine_whatever_the_contrast(factor, texture):
    assert verdict(latents(1 / factor, texture=texture), factor).level == "fine"


@pytest.mark.parametrize("factor", [0.18215, 0.13025])
def test_latents_that_are_scaled_twice_are_said_with_the_factor_that_undoes_it(factor):
    found = verdict(latents(), factor)
    assert found.level == "notice" and "scaled for the model already" in found.text
    undo = float(found.text.rsplit(" ", 1)[1])
    assert verdict([undo * latent for latent in latents()], factor).level == "fine"


@pytest.mark.parametrize("factor", [0.18215, 0.13025])
def test_latents_without_their_scale_are_refused(factor):
    found = verdict(latents(1 / factor), 1.0)
    assert found.level == "error" and "Encode the images with this model's VAE" in found.text


def test_what_may_be_meant_is_only_said():
    assert verdict(latents(), 0.3611).level == "notice", "Flux latents, scaled twice"
    assert verdict(latents(1 / 0.3611), 1.0).level == "notice", "Flux latents, not scaled"
    assert verdict(latents(1 / 0.13025, texture=0.02, offset=0.1), 0.13025).level == "notice", "nearly flat pictures"
    assert "every latent is zero" in verdict([torch.zeros(4, 8, 8)], 0.18).text


def test_flat_pictures_and_pictures_as_latents_are_fine():
    assert verdict(latents(1 / 0.18215, offset=0.8, texture=0.0), 0.18215).level == "fine"
    for level in (-1.0, 0.9, 0.05):
        assert verdict([torch.full((3, 8, 8), level)], 1.0).level == "fine", "a white, black or gray picture in [-1, 1]"
