"""Flow Graft on real ComfyUI models, and the bridge between eps and flow time on a real network."""

import itertools
import math

import comfy.sample
import pytest
import torch
from comfy_extras import nodes_model_advanced

from tidetable.nodes.model_sampling import DescribeModel, FlowShift
from tidetable.nodes.prediction import FlowGraft, Prediction, ZeroTerminalSNR
from tidetable.runtime.process import prediction_of
from tidetable.runtime.tiny import load_tiny_model
from tidetable.runtime.tiny_text import CONTEXT_WIDTH
from tidetable.runtime.trainable import training_session
from tidetable.schedules.bridge import Bridge
from tidetable.tests.host.comparing import fingerprint
from tidetable.tests.host.model_zoo import discrete
from tidetable.tests.host.samplings import sample, sampling, without_class


pytestmark = pytest.mark.usefixtures("in_a_node")


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("born", ["eps", "v_prediction"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_graft_is_what_cores_sd3_node_makes(models, name, born, shift):
    model = discrete(models[name], born)
    before = fingerprint(model)
    ours = sampling(FlowGraft.execute(model, shift).args[0])
    theirs = sampling(nodes_model_advanced.ModelSamplingSD3().patch(model, shift)[0])
    assert type(ours).__bases__ == type(theirs).__bases__
    assert without_class(ours) == without_class(theirs)
    sigma = ours.sigmas[[0, 300, -1]]
    x, output, noise = (torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for method, arguments in {
        "timestep": (sigma,),
        "sigma": (1000.0 * sigma,),
        "calculate_input": (sigma, x),
        "calculate_denoised": (sigma, output, x),
        "noise_scaling": (sigma, noise, x),
    }.items():
        assert torch.equal(getattr(ours, method)(*arguments), getattr(theirs, method)(*arguments)), method
    assert ours.percent_to_sigma(0.3) == theirs.percent_to_sigma(0.3)
    assert fingerprint(model) == before


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_graft_draws_what_cores_sd3_node_draws(sampler):
    model = load_tiny_model("unet-eps")
    ours = sample(FlowGraft.execute(model, 3.0).args[0], sampler)
    theirs = sample(nodes_model_advanced.ModelSamplingSD3().patch(model, 3.0)[0], sampler)
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, sample(model, sampler), atol=1e-2)


def test_graft_composes(models):
    grafted = FlowGraft.execute(models["sdxl"], 3.0).args[0]
    moved = FlowShift.execute(grafted, "shift", 6.0, 0.0, 64, 64).args[0]
    assert without_class(sampling(moved)) == without_class(sampling(FlowGraft.execute(models["sdxl"], 6.0).args[0]))
    assert prediction_of(sampling(Prediction.execute(moved, "x0").args[0])) == "x0"
    ranged = nodes_model_advanced.ModelSamplingContinuousEDM().patch(models["sdxl"], "eps", 200.0, 0.01)[0]
    # Another noise process replaces the one before: nothing of it could be kept.
    for upstream in (ranged, models["sd3"], models["flux"], grafted):
        with pytest.raises(ValueError, match=r"Flow Graft is for U-Nets|flow already.*Tidetable_FlowShift"):
            FlowGraft.execute(upstream, 3.0)
    with pytest.raises(ValueError, match="flow model.*Tidetable_FlowShift"):
        ZeroTerminalSNR.execute(grafted)


def test_describe_model_names_the_graft(models):
    before, after = (
        dict(line.split(": ", 1) for line in DescribeModel.execute(m).args[0].splitlines() if ": " in line)
        for m in (models["sdxl"], FlowGraft.execute(models["sdxl"], 3.0).args[0])
    )
    assert before["family"] == after["family"] and "SDXL" in after["family"]
    assert before["prediction"].startswith("eps") and after["prediction"].startswith("velocity")
    assert before["process"].startswith("variance preserving") and after["process"].startswith("flow")
    assert "flow-matching finetune" in after["process"] and "finetune" not in before["process"]
    assert after["shift"].startswith("α 3.0000") and after["terminal SNR"] == "0 (pure noise)"
    assert after["timestep"] == "σ·1000, the network sees 2.994 to 1000"
    assert "finetune" not in DescribeModel.execute(models["flux"]).args[0]


@pytest.mark.parametrize("shift", [0.0, -3.0, math.nan, math.inf])
def test_graft_refuses_bad_numbers(models, shift):
    with pytest.raises(ValueError, match=f"shift must be .*{shift}"):
        FlowGraft.execute(models["sdxl"], shift)


# ── the bridge, on a real network ───────────────────────────────────────────────────────────────────


def test_the_bridge_takes_the_steps_of_comfyuis_euler():
    """At rows of the table, where ComfyUI's rounding of timesteps does nothing: the same pictures in flow time."""
    model = load_tiny_model("unet-eps")
    host = model.model.model_sampling
    sigmas = torch.cat([host.sigmas[[999, 870, 700, 480, 250, 60, 0]]])
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 4, CONTEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    cond = [[text, {"pooled_output": text.mean(1)}]]
    sampler = comfy.samplers.sampler_object("euler")
    empty = torch.zeros(2, 3, 8, 8)
    theirs = comfy.sample.sample_custom(model, noise, 1.0, sampler, sigmas, cond, cond, empty, seed=0)

    ratios = sigmas.double().tolist()
    times = [s / (1.0 + s) for s in ratios]
    with training_session(model) as denoiser, torch.no_grad():
        bridge = Bridge(denoiser.process)
        conditions = [denoiser.condition(cond, empty[0].clone())] * 2
        start = noise.clone() * math.sqrt(1.0 + ratios[0] ** 2)  # ComfyUI's start from the largest sigma
        x = start * (1.0 - times[0])
        for t, after in itertools.pairwise(times):
            t_of_batch = torch.full((2,), t, dtype=torch.float64)
            network = lambda sample, row: denoiser.predict(sample, row, conditions)  # noqa: E731
            x = x + (after - t) * bridge.predict(network, denoiser.prediction, x, t_of_batch)
    ours = model.model.process_latent_out(x / (1.0 - times[-1]))
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=2e-5)
    assert float(theirs.std()) > 0.1
