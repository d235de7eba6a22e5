"""Convert Prediction: every pair, against the host's own denoised latent, and what has no answer."""

import itertools
import math

import pytest
import torch
from comfy.model_base import ModelType

from tidetable.nodes.prediction import ConvertPrediction
from tidetable.schedules.prediction import PREDICTIONS, target
from tidetable.schedules.process import VE, VP, Flow
from tidetable.tests.host.model_zoo import discrete
from tidetable.tests.host.samplings import with_sampling


pytestmark = pytest.mark.usefixtures("in_a_node")
SHAPES = [(2, 4, 6, 6), (1, 16, 2, 4, 4)]
NOISE_LEVELS = {"flow": 0.3, "vp": 1.7, "ve": 12.0}


def coordinates(process, sigma):
    if process == "flow":
        return Flow(), sigma
    if process == "ve":
        ve = VE(0.001, 1000.0)
        return ve, float(ve.t_from_ratio(sigma))
    vp = VP.from_betas()
    return vp, float(vp.t_from_ratio(sigma))


def latents(shape):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))


def converted(noisy, value, source, dest, process, sigma, model=None):
    pair = ({"samples": t} if isinstance(t, torch.Tensor) else t for t in (noisy, value))
    return ConvertPrediction.execute(*pair, source, dest, process, sigma, model).args[0]["samples"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("process", "sigma"), NOISE_LEVELS.items())
def test_every_pair_of_predictions(process, sigma, shape):
    x0, eps = latents(shape)
    noise_process, t = coordinates(process, sigma)
    x_t = noise_process.mix(x0, eps, t)
    values = {kind: target(kind, x0, eps, t, noise_process) for kind in PREDICTIONS}
    for source, dest in itertools.product(PREDICTIONS, repeat=2):
        result = converted(x_t, values[source], source, dest, process, sigma)
        torch.testing.assert_close(result.double(), values[dest], rtol=2e-4, atol=2e-4, msg=f"{source} -> {dest}")


@pytest.mark.parametrize(
    ("name", "native", "row"), [("sd15", "eps", 400), ("sdxl", "v", 700), ("flux", "velocity", 5000)]
)
def test_with_a_model_it_is_the_hosts_denoised(models, name, native, row):
    model = discrete(models[name], "v_prediction") if native == "v" else models[name]
    host = model.get_model_object("model_sampling")
    channels = model.model.latent_format.latent_channels
    x0, noise = (torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    output = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(2))
    sigma = host.sigmas[row]
    x = host.noise_scaling(sigma, noise, x0)
    theirs = host.calculate_denoised(sigma, output, x)
    ours = converted(x, output, native, "x0", "model", float(sigma), model)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_latent_keeps_what_else_it_carries():
    noisy = {"samples": torch.zeros(1, 4, 4, 4), "noise_mask": torch.ones(1, 1, 4, 4), "batch_index": [3]}
    before = {**noisy}
    (result,) = ConvertPrediction.execute(noisy, {"samples": torch.ones(1, 4, 4, 4)}, "eps", "x0", "vp", 1.0).args
    assert result["batch_index"] == [3] and result["samples"] is not noisy["samples"]
    assert noisy == before and not noisy["samples"].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eps", "x0", "flow", 1.0), "at sigma 1 of flow the eps prediction does not determine x0"),
        (("x0", "eps", "vp", 0.0), "at sigma 0 of vp the x0 prediction does not determine eps"),
        (("eps", "x0", "flow", 1.5), "sigma must be 0 to 1 for flow, got 1.5"),
        (("eps", "x0", "vp", -1.0), "sigma must be 0 or above for vp, got -1"),
        (("eps", "x0", "ve", math.nan), "sigma must be 0 or above for ve, got nan"),
        (("eps", "x0", "model", 1.0), "no model is connected"),
        (("eps", "x0", "other", 1.0), "unknown process 'other'"),
        (("edm", "x0", "vp", 1.0), "unknown prediction 'edm'"),
        (("eps", "edm", "vp", 1.0), "unknown prediction 'edm'"),
    ],
)
def test_what_cannot_be_converted_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        converted(torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4), *arguments)


def test_bad_latents_are_named(models):
    good, bad = torch.randn(1, 4, 4, 4), torch.full((1, 4, 4, 4), math.nan)
    for noisy, prediction, message in (
        (good, torch.randn(1, 4, 4, 5), r"\[1, 4, 4, 4\] but prediction has shape \[1, 4, 4, 5\]"),
        (bad, good, "noisy contains nan"),
        (good, bad, "prediction contains nan"),
        ({}, good, "noisy must be a LATENT"),
        (good, {"samples": [good]}, "prediction must be a LATENT.*got list"),
    ):
        with pytest.raises(ValueError, match=message):
            converted(noisy, prediction, "eps", "x0", "vp", 1.0)
    with pytest.raises(ValueError, match="the latents have 4 channels but this model's have 16"):
        converted(good, good, "velocity", "x0", "model", 0.5, models["sd3"])
    cosmos = with_sampling(models["sd15"], ModelType.FLOW_COSMOS)
    with pytest.raises(ValueError, match="neither flow nor variance preserving; choose a process by name"):
        converted(good, good, "velocity", "x0", "model", 0.5, cosmos)
