"""Objective and density nodes on real models: what they refuse, what they leave alone, what comes out."""

from dataclasses import replace
from itertools import pairwise

import comfy.model_management
import pytest
import torch

from tidetable.nodes.training_objective import Objective, TimestepDensity
from tidetable.runtime import tiny
from tidetable.runtime.objective import make_density, seen_in_flow
from tidetable.runtime.trainable import training_session
from tidetable.runtime.training import train_lora
from tidetable.schedules.process import Flow
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.test_training import CONFIG, LORA
from tidetable.tests.host.test_training import data as data
from tidetable.training.objective import loss_for_batch
from tidetable.training.recipe import DensityConfig, ObjectiveConfig


EVERYTHING = ObjectiveConfig(
    loss="huber",
    weighting="min_snr",
    offset_noise=0.1,
    pyramid_discount=0.3,
    input_perturbation=0.1,
    ot_pairing=True,
)


def defaults(node) -> dict:
    return {entry.id: entry.default for entry in node.GET_SCHEMA().inputs if not getattr(entry, "optional", False)}


def is_flow(model) -> bool:
    return model.model.model_type.name == "FLOW"


@pytest.fixture(params=tiny.TINY_MODELS)
def model(request):
    return inference_copy(tiny.load_tiny_model(request.param))


def losses(result):
    return [float(loss) for loss in result.loss_map["loss"]]


def test_the_defaults_of_the_objective_change_nothing(model, data):
    plain = train_lora(model, data[0], CONFIG, LORA)
    config = replace(CONFIG, objective=Objective.execute(**defaults(Objective)).args[0])
    assert losses(train_lora(model, data[0], config, LORA)) == losses(plain)


def test_everything_at_once_trains_and_leaves_the_model_alone(model, data):
    before = fingerprint(model)
    density = TimestepDensity.execute(**defaults(TimestepDensity)).args[0]
    config = replace(CONFIG, objective=EVERYTHING, timestep_density=density)
    result = train_lora(model, data[0], config, LORA)
    assert fingerprint(model) == before
    assert all(torch.isfinite(torch.tensor(losses(result))))
    assert result.lora.metadata["ss_loss_type"] == "huber"
    assert result.lora.metadata["ss_min_snr_gamma"] == "5.0"
    assert '"offset_noise": 0.1' in result.lora.metadata["tidetable_config"]


def test_a_graft_gives_a_flow_model_and_refuses_one(model, data):
    config = replace(CONFIG, objective=ObjectiveConfig(flow="graft", graft_shift=2.5))
    if is_flow(model):
        with pytest.raises(ValueError, match="flow already"):
            train_lora(model, data[0], config, LORA)
        return
    before = fingerprint(model)
    result = train_lora(model, data[0], config, LORA)
    # The clone is still loaded; ComfyUI takes its model_sampling off the shared network when another one is.
    comfy.model_management.load_models_gpu([model])
    assert fingerprint(model) == before
    sampling = result.model.get_model_object("model_sampling")
    assert float(sampling.shift) == 2.5
    assert float(sampling.timestep(torch.tensor(0.25))) == 250.0
    assert result.lora.metadata["modelspec.prediction_type"] == "velocity"


def test_a_bridge_is_the_same_model_with_another_weight(model, data):
    """The velocity's error is (1 + sigma) times the eps network's, at the very same noise levels and samples."""
    objective = ObjectiveConfig(flow="bridge")
    with training_session(model) as denoiser, torch.no_grad():
        if is_flow(model):
            with pytest.raises(ValueError, match="flow already|flow\\s+already"):
                seen_in_flow(denoiser, objective)
            return
        if denoiser.prediction == "eps" and float(denoiser.process.ratio(1.0)) > 1000:
            pytest.fail("a tiny eps model is not expected to start in pure noise")
        bridged = seen_in_flow(denoiser, objective)
        x0 = denoiser.latent(data[0].samples()[0])[None].repeat(4, 1, 1, 1)
        row = denoiser.condition(data[0].positive[0], x0[0])
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        t = bridged.snap(torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64))
        native = denoiser.snap(bridged.bridge.native_time(t))
        assert torch.allclose(denoiser.process.log_snr(native), Flow().log_snr(t), atol=1e-9)
        velocity = loss_for_batch(bridged, x0, [row] * 4, eps, t)
        own = loss_for_batch(denoiser, x0, [row] * 4, eps, native)
        sigma = denoiser.process.ratio(native)
        # v is another multiple: (1 + sigma)²/(1 + sigma²).
        factor = (1 + sigma) ** 2 / (1 if denoiser.prediction == "eps" else 1 + sigma**2)
    assert torch.allclose(velocity.double(), factor * own.double(), rtol=1e-3)


def test_a_bridged_run_trains(model, data):
    if is_flow(model):
        pytest.skip("flow models refuse it: see above")
    result = train_lora(model, data[0], replace(CONFIG, objective=ObjectiveConfig(flow="bridge")), LORA)
    assert all(loss > 0 for loss in losses(result))


def test_euler_in_flow_time_over_the_bridge_visits_eulers_samples_in_sigma(model, data):
    with training_session(model) as denoiser, torch.no_grad():
        if is_flow(model):
            pytest.skip("flow models refuse the bridge: see above")
        bridged = seen_in_flow(denoiser, ObjectiveConfig(flow="bridge"))
        row = denoiser.condition(data[0].positive[0], denoiser.latent(data[0].samples()[0]))
        times = bridged.snap(torch.linspace(0.9, 0.1, 9, dtype=torch.float64))
        noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        flow, ratio = noise * times[0], noise * (times / (1 - times))[0]
        for now, after in pairwise(times):
            flow = flow + (after - now).float() * bridged.predict(flow, now[None], [row])
            sigma, lower = now / (1 - now), after / (1 - after)
            native = denoiser.process.t_from_ratio(sigma)[None]
            x_vp = ratio / torch.sqrt(1 + sigma**2).float()
            answer = denoiser.predict(x_vp, denoiser.snap(native), [row])
            if denoiser.prediction == "v":
                alpha, noisy = (1 / torch.sqrt(1 + sigma**2)).float(), (sigma / torch.sqrt(1 + sigma**2)).float()
                answer = noisy * x_vp + alpha * answer
            ratio = ratio + (lower - sigma).float() * answer
        scaled = ratio * (1 - times[-1]).float()
    assert torch.allclose(flow, scaled, atol=1e-5 * float(scaled.abs().max()))


def test_presets_replace_what_they_are_about():
    given = {**defaults(TimestepDensity), "density": "beta", "shift_mode": "none", "t_min": 0.1}
    given.pop("preset")
    assert make_density("bigASP", **given) == DensityConfig(shift_mode="shift", shift=3.0, t_min=0.1)
    assert make_density("Qwen-Image", **given) == DensityConfig(shift_mode="official", family="qwen_image", t_min=0.1)


def test_the_node_says_and_draws_the_density(model):
    given = {**defaults(TimestepDensity), "shift_mode": "shift", "shift": 3.0}
    _, text, image = TimestepDensity.execute(**given).args
    assert "discrete_flow_shift 3" in text
    assert "timestep shift 3" in text
    assert image.shape[-1] == 3
    other = TimestepDensity.execute(**given, model=model).args[1]
    assert ("discrete_flow_shift 3" in other) == is_flow(model)


@pytest.mark.parametrize("knots", ["", "a:b", "0.5", "0:1", "0:1:2, 1:1", "0.5:1, 0.5:2"])
def test_bad_knots_are_refused(knots):
    given = {**defaults(TimestepDensity), "density": "piecewise", "knots": knots}
    with pytest.raises(ValueError, match="knots"):
        TimestepDensity.execute(**given)
