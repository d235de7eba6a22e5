"""The Schedule node on real ComfyUI models, against ComfyUI's own schedulers."""

import math
from types import SimpleNamespace

import comfy.model_base
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import nodes_custom_sampler

from tidetable.nodes.schedules import Schedule
from tidetable.runtime.model_sampling import SPACING_NAMES, noise_grid, patch_flow_shift
from tidetable.runtime.tiny import build_patcher
from tidetable.runtime.tiny_text import CONTEXT_WIDTH
from tidetable.schedules.process import VP
from tidetable.tests.host.model_zoo import ZOO, discrete, zoo


SHARED = ("simple", "karras", "exponential", "beta")  # the names that ComfyUI has too


@pytest.fixture(autouse=True)
def _as_in_a_node():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def models():
    made = {name: zoo(name) for name in ZOO}
    made["sdxl-ztsnr"] = discrete(made["sdxl"], "v_prediction", zsnr=True)
    made["flux-6"] = patch_flow_shift(made["flux"], "shift", 6.0, 0.0, 64, 64)[0]
    return made


NAMES = (*ZOO, "sdxl-ztsnr", "flux-6")


def schedule(model, spacing="simple", steps=10, denoise=1.0):
    return Schedule.execute(model, spacing, steps, denoise).args[0]


def theirs(model, name, steps):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), name, steps)


@pytest.mark.parametrize("spacing", SHARED)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 28, 50, 100])
def test_same_numbers_as_comfyui_has_under_this_name(models, name, spacing, steps):
    torch.testing.assert_close(
        schedule(models[name], spacing, steps), theirs(models[name], spacing, steps), rtol=2e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", NAMES)
def test_trailing_is_comfyuis_simple_where_the_rows_divide(models, name):
    torch.testing.assert_close(
        schedule(models[name], "trailing", 20), theirs(models[name], "simple", 20), rtol=2e-5, atol=0
    )


def test_beta_gives_the_steps_that_comfyui_drops(models):
    # ComfyUI merges steps that round to one row: 149 of 150 remain on a table of 1000.
    assert len(theirs(models["sd3"], "beta", 150)) == 150
    assert len(schedule(models["sd3"], "beta", 150)) == 151


@pytest.mark.parametrize("spacing", SPACING_NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_contract_of_sigmas(models, name, spacing):
    sigmas = schedule(models[name], spacing, 30)
    assert sigmas.dtype == torch.float32 and sigmas.device.type == "cpu" and sigmas.shape == (31,)
    assert (sigmas.diff() < 0).all() and float(sigmas[-1]) == 0.0
    assert float(sigmas[0]) == pytest.approx(float(models[name].get_model_object("model_sampling").sigma_max), rel=1e-6)


@pytest.mark.parametrize("spacing", SHARED)
@pytest.mark.parametrize("denoise", [0.9, 0.5, 0.33, 0.1])
def test_denoise_is_cores_basic_scheduler(models, spacing, denoise):
    core = nodes_custom_sampler.BasicScheduler.execute(models["sd3"], spacing, 9, denoise).args[0]
    torch.testing.assert_close(schedule(models["sd3"], spacing, 9, denoise), core, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_the_float64_grid_is_the_hosts_table(models, name):
    host = models[name].get_model_object("model_sampling")
    torch.testing.assert_close(noise_grid(models[name]).sigmas, host.sigmas.double(), rtol=2e-6, atol=0)


def test_table_of_stable_diffusion_is_ours(models):
    host = models["sd15"].get_model_object("model_sampling")
    rows = torch.arange(1000, dtype=torch.float64) / 999
    torch.testing.assert_close(VP.from_betas().ratio(rows), host.sigmas.double(), rtol=1e-6, atol=0)
    # between the rows, too
    between = torch.tensor([0.3, 17.25, 500.5, 998.9])
    torch.testing.assert_close(
        VP.from_betas().ratio(between.double() / 999), host.sigma(between).double(), rtol=2e-6, atol=0
    )
    zero_terminal = discrete(models["sd15"], "v_prediction", zsnr=True).get_model_object("model_sampling")
    ours = VP.from_betas().zero_terminal().ratio(rows[:-1])
    torch.testing.assert_close(ours, zero_terminal.sigmas[:-1].double(), rtol=2e-4, atol=0)  # theirs is float32


def test_reads_the_patched_model_not_the_checkpoint(models):
    shifted = patch_flow_shift(models["sd3"], "shift", 8.0, 0.0, 64, 64)[0]
    assert float(schedule(shifted)[5]) == pytest.approx(8 / 9, abs=1e-6)
    assert float(schedule(models["sd3"])[5]) == pytest.approx(0.75, abs=1e-6)


@pytest.mark.parametrize("kind", [kind.name for kind in ModelType])
@pytest.mark.parametrize("spacing", SPACING_NAMES)
def test_every_model_type_of_the_host_has_schedules(models, kind, spacing):
    model = models["sd15"].clone()
    sampling = comfy.model_base.model_sampling(SimpleNamespace(sampling_settings={}), ModelType[kind])
    model.add_object_patch("model_sampling", sampling)
    sigmas = schedule(model, spacing, 20)
    assert sigmas.shape == (21,) and (sigmas.diff() < 0).all() and torch.isfinite(sigmas).all()


def test_euler_over_it_is_cores_ksampler():
    model = build_patcher("mmdit-flow")
    noise, text = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for shape in ((1, 3, 8, 8), (1, 4, CONTEXT_WIDTH))
    )
    cond, latent = [[text, {"pooled_output": text.mean(1)}]], torch.zeros(1, 3, 8, 8)
    core = comfy.sample.sample(model, noise, 4, 1.0, "euler", "simple", cond, cond, latent, seed=0)
    euler = comfy.samplers.sampler_object("euler")
    ours = comfy.sample.sample_custom(
        model, noise, 1.0, euler, schedule(model, "simple", 4), cond, cond, latent, seed=0
    )
    torch.testing.assert_close(ours, core, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be 1 to 10000, got 0"),
        ({"steps": -1}, "steps must be .*-1"),
        ({"steps": 10**9}, "steps must be .*1000000000"),
        ({"denoise": 0.0}, "denoise must be .*0.0"),
        ({"denoise": math.nan}, "denoise must be .*nan"),
        ({"denoise": math.inf}, "denoise must be .*inf"),
        ({"denoise": -0.5}, "denoise must be .*-0.5"),
        ({"spacing": "normal"}, "unknown spacing 'normal'"),
        ({"spacing": "x" * 10_000}, "unknown spacing"),
        ({"spacing": "simple", "steps": 1001}, "1001 different noise levels on this model's 1000 rows"),
    ],
)
def test_bad_input_is_named(models, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        schedule(models["sd15"], **arguments)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("thing", [None, "model", 3])
def test_the_wrong_kind_of_thing_is_named(thing):
    with pytest.raises(ValueError, match=f"expected a diffusion MODEL, got {type(thing).__name__}"):
        schedule(thing)
