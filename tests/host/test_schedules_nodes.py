"""The Schedule node on real ComfyUI models, against ComfyUI's own schedulers."""

import math

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import nodes_custom_sampler
from comfy_extras.nodes_align_your_steps import AlignYourStepsScheduler

from tidetable.nodes.schedules import Schedule
from tidetable.runtime.model_sampling import patch_flow_shift
from tidetable.runtime.schedules import SPACING_NAMES, noise_grid
from tidetable.runtime.tiny import build_patcher
from tidetable.runtime.tiny_text import CONTEXT_WIDTH
from tidetable.schedules.process import VP
from tidetable.tests.host.model_zoo import ZOO, discrete
from tidetable.tests.host.samplings import with_sampling


pytestmark = pytest.mark.usefixtures("in_a_node")
# The names that ComfyUI has too, and on which models its numbers are right.
EVERYWHERE = ("simple", "karras", "exponential", "beta", "kl_optimal")
IN_ROWS = ("normal", "sgm_uniform")  # right where there is no shift to be applied twice
NAMES = (*ZOO, "sdxl-ztsnr", "flux-6")


def schedule(model, spacing="simple", steps=10, denoise=1.0, **options):
    return Schedule.execute(model, spacing, steps, denoise, **options).args[0]


def theirs(model, name, steps):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), name, steps)


def same(model, spacing, steps, rtol=2e-5):
    torch.testing.assert_close(schedule(model, spacing, steps), theirs(model, spacing, steps), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("spacing", EVERYWHERE)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 28, 50, 100])
def test_same_numbers_as_comfyui_has_under_this_name(models, name, spacing, steps):
    if spacing == "kl_optimal" and steps == 1:
        assert theirs(models[name], spacing, 1).isnan().any()  # what ours mends
        assert torch.equal(schedule(models[name], spacing, 1), schedule(models[name], "simple", 1))
    else:  # tan(atan(4518)) in float32 is off by 1e-4
        same(models[name], spacing, steps, rtol=2e-4 if (name, spacing) == ("sdxl-ztsnr", "kl_optimal") else 2e-5)


@pytest.mark.parametrize("spacing", IN_ROWS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 100])
def test_normal_and_sgm_uniform_are_comfyuis_without_a_shift(models, spacing, steps):
    for name in ("sd15", "sdxl", "sdxl-ztsnr", "flux_schnell"):
        same(models[name], spacing, steps, rtol=2e-3 if name == "sdxl-ztsnr" else 1e-4)  # their table is float32
    flux = patch_flow_shift(models["flux"], "mu", 0.0, 0.0, 64, 64)[0]
    same(flux, spacing, steps, rtol=1e-4)


@pytest.mark.parametrize("shift", [3.0, 8.0, 12.0])
def test_comfyuis_normal_shifts_its_low_end_twice_and_ours_does_not(models, shift):
    model = patch_flow_shift(models["sd3"], "shift", shift, 0.0, 64, 64)[0]
    lowest = float(model.get_model_object("model_sampling").sigma_min)
    twice = shift * lowest / (1 + (shift - 1) * lowest)
    assert float(theirs(model, "normal", 20)[-2]) == pytest.approx(twice, rel=1e-4)
    assert float(schedule(model, "normal", 20)[-2]) == pytest.approx(lowest, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 21, 50])
def test_linear_quadratic_is_comfyuis_on_flow(models, steps):
    for name in ("sd3", "flux", "flux_schnell", "wan", "flux-6"):
        same(models[name], "linear_quadratic", steps)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 4, 10, 20, 50])
def test_leading_is_comfyuis_ddim_uniform_where_the_rows_divide(models, name, steps):
    torch.testing.assert_close(
        schedule(models[name], "leading", steps), theirs(models[name], "ddim_uniform", steps), rtol=2e-5, atol=0
    )


@pytest.mark.parametrize("name", ["sd15", "sdxl-ztsnr", "sd3"])
def test_what_is_wrong_with_comfyuis_ddim_uniform(models, name):
    core, ours = (f(models[name], "ddim_uniform", 30) for f in (theirs, schedule))
    sigma_max = float(models[name].get_model_object("model_sampling").sigma_max)
    assert len(core) == 32 and float(core[0]) < 0.998 * sigma_max
    assert len(ours) == 31 and float(ours[0]) == pytest.approx(sigma_max, rel=1e-6)
    assert float(ours[-2]) == pytest.approx(float(core[-2]), rel=1e-5)


def test_steps_wasted_above_the_plain_range_are_logged(models, caplog):
    for name, spacing, steps, words in (
        ("sdxl-ztsnr", "karras", 20, "karras: 13 of 20 steps start above sigma 14.61"),
        ("sdxl-ztsnr", "trailing", 20, ""),
        ("sdxl-ztsnr", "trailing", 2, ""),
        ("sdxl", "karras", 20, ""),
        ("flux_schnell", "karras", 20, ""),
    ):
        caplog.clear()
        schedule(models[name], spacing, steps)
        assert words in caplog.text if words else not caplog.records


@pytest.mark.parametrize(("spacing", "table"), [("ays_sd15", "SD1"), ("ays_sdxl", "SDXL")])
@pytest.mark.parametrize("steps", [1, 4, 10, 15, 28])
def test_align_your_steps_is_comfyuis(models, spacing, table, steps):
    core = AlignYourStepsScheduler.execute(table, steps, 1.0).args[0]
    torch.testing.assert_close(schedule(models["sdxl"], spacing, steps), core, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rho", [1.0, 1.5, 3.0])
def test_karras_and_polyexponential_with_rho_are_comfyuis_nodes(models, rho):
    host = models["sdxl"].get_model_object("model_sampling")
    low, high = float(host.sigma_min), float(host.sigma_max)
    for spacing, node in (
        ("karras", nodes_custom_sampler.KarrasScheduler),
        ("polyexponential", nodes_custom_sampler.PolyexponentialScheduler),
    ):
        core = node.execute(17, high, low, rho).args[0]
        torch.testing.assert_close(schedule(models["sdxl"], spacing, 17, rho=rho), core, rtol=2e-5, atol=0)


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (1.0, 1.0), (0.5, 0.7)])
def test_beta_with_parameters_is_comfyuis_node(models, a, b):
    core = nodes_custom_sampler.BetaSamplingScheduler.execute(models["sd3"], 20, a, b).args[0]
    torch.testing.assert_close(schedule(models["sd3"], "beta", 20, beta_a=a, beta_b=b), core, rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", ["sd3", "flux-6", "wan"])
@pytest.mark.parametrize("denoise", [0.3, 0.6, 0.85])
def test_a_flow_starts_exactly_at_the_noise_level(models, name, denoise):
    sigmas = schedule(models[name], "trailing", 9, denoise, denoise_as="noise_level")
    assert len(sigmas) == 10 and float(sigmas[0]) == pytest.approx(denoise, abs=1e-7)


def test_terminal_is_the_last_level(models):
    sigmas = schedule(models["qwen_image"], "trailing", 20, terminal=0.02)
    assert float(sigmas[0]) == 1.0 and float(sigmas[-2]) == pytest.approx(0.02, abs=1e-7)


def test_levels_that_float32_cannot_tell_apart(models):
    with pytest.raises(ValueError, match="polyexponential puts steps .* of 2000 so close together, at sigma .*float32"):
        schedule(models["flux-6"], "polyexponential", 2000, rho=4.0)


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
    sigma_max = float(models[name].get_model_object("model_sampling").sigma_max)
    assert float(sigmas[0]) == pytest.approx(sigma_max, rel=1e-6) or spacing == "leading"


@pytest.mark.parametrize("spacing", EVERYWHERE)
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
    model = with_sampling(models["sd15"], ModelType[kind])
    if (kind, spacing) == ("STABLE_CASCADE", "linear_quadratic"):  # its table begins with equal rows
        with pytest.raises(ValueError, match="20 different noise levels on this model's 10000 rows"):
            schedule(model, spacing, 20)
        return
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
        ({"spacing": "bong_tangent"}, "unknown spacing 'bong_tangent'"),
        ({"spacing": "x" * 10_000}, "unknown spacing"),
        ({"axis": "lambda"}, "unknown axis 'lambda'"),
        ({"denoise_as": "strength"}, "unknown denoise_as 'strength'"),
        ({"terminal": 0.02}, "terminal 0.02 is for flow models"),
        ({"rho": -1.0}, "rho must be above 0 .*-1.0"),
        ({"laplace_scale": 0.0}, "scale must be above 0 .*0.0"),
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
