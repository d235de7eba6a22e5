"""Zero Terminal SNR on real ComfyUI models: the table, its cap, the steps without guidance, and what the node says."""

import math

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import nodes_model_advanced

from tidetable.nodes.prediction import Prediction, ZeroTerminalSNR
from tidetable.runtime.guidance import perturbed_attention
from tidetable.runtime.model_sampling import read_sampling
from tidetable.runtime.tiny import build_patcher, load_tiny_model, load_tiny_vae
from tidetable.runtime.tiny_text import CONTEXT_WIDTH
from tidetable.tests.host.comparing import fingerprint
from tidetable.tests.host.model_zoo import discrete, zoo
from tidetable.tests.host.samplings import sampling, with_sampling


pytestmark = pytest.mark.usefixtures("in_a_node")


# ── the table ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sampling", ["v_prediction", "x0"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_zero_terminal_snr_is_cores_schedule_with_the_same_prediction(models, name, sampling):
    model = discrete(models[name], sampling)
    before = fingerprint(model)
    patched = ZeroTerminalSNR.execute(model).args[0]
    new, old = patched.get_model_object("model_sampling"), model.get_model_object("model_sampling")
    theirs = discrete(models[name], sampling, zsnr=True).get_model_object("model_sampling")
    assert type(new) is type(old) and new.zsnr is True
    torch.testing.assert_close(new.sigmas, theirs.sigmas, rtol=2e-4, atol=0)  # they subtract in float32
    torch.testing.assert_close(new.log_sigmas, new.sigmas.log(), rtol=1e-6, atol=1e-6)
    assert float(new.sigma_min) == pytest.approx(float(old.sigma_min), rel=1e-6)
    assert float(new.sigma_max) == pytest.approx(4518.76, abs=0.01)
    assert int(new.timestep(new.sigma_max)) == 999
    assert fingerprint(model) == before


def test_zero_terminal_snr_twice_is_once(models):
    once = ZeroTerminalSNR.execute(discrete(models["sd15"], "v_prediction")).args[0]
    twice = ZeroTerminalSNR.execute(once).args[0]
    assert torch.equal(*(m.get_model_object("model_sampling").sigmas for m in (once, twice)))


def test_a_model_that_was_trained_so_keeps_its_table():
    model = build_patcher("unet-v")
    patched = ZeroTerminalSNR.execute(model).args[0]
    assert torch.equal(patched.get_model_object("model_sampling").sigmas, model.model.model_sampling.sigmas)


def test_zero_terminal_snr_refuses_eps_with_the_reason(models):
    for model in (models["sd15"], models["sdxl"], build_patcher("unet-eps")):
        before = fingerprint(model)
        with pytest.raises(
            ValueError, match=r"predicts noise \(eps\).*4518.*v prediction.*Tidetable_Prediction.*sigma_cap 160"
        ):
            ZeroTerminalSNR.execute(model)
        assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_zero_terminal_snr_sends_flow_models_to_flow_shift(models, name):
    with pytest.raises(ValueError, match="flow model.*Tidetable_FlowShift"):
        ZeroTerminalSNR.execute(models[name])


@pytest.mark.parametrize("kind", ["EDM", "V_PREDICTION_EDM", "V_PREDICTION_CONTINUOUS", "IMG_TO_IMG", "FLOW_COSMOS"])
def test_zero_terminal_snr_refuses_other_processes(models, kind):
    model = with_sampling(models["sd15"], ModelType[kind])
    with pytest.raises(ValueError, match="defined for models with a discrete noise table"):
        ZeroTerminalSNR.execute(model)


@pytest.mark.parametrize("prediction", ["v", "x0", "velocity", "edm"])
def test_it_does_not_ask_for_v(models, prediction):
    declared = Prediction.execute(models["sdxl"], prediction).args[0]
    patched = ZeroTerminalSNR.execute(declared).args[0]
    assert float(sampling(patched).sigma_max) == pytest.approx(4518.76, abs=0.01)
    assert type(sampling(patched)) is type(sampling(declared))
    # The other order asks for a prediction that can stand there, which eps cannot.
    other = Prediction.execute(ZeroTerminalSNR.execute(discrete(models["sdxl"], "v_prediction")).args[0], prediction)
    assert torch.equal(sampling(other.args[0]).sigmas, sampling(patched).sigmas)


def test_the_wrong_kind_of_thing_is_named():
    for thing, name in ((None, "NoneType"), ("model", "str"), (load_tiny_vae().patcher, "_Resample")):
        with pytest.raises(ValueError, match=f"expected a diffusion MODEL, got {name}"):
            ZeroTerminalSNR.execute(thing)


# ── the cap ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cap", [20.0, 160.0, 1000.0])
def test_the_cap_cuts_the_table_and_moves_no_timestep(models, cap):
    model = discrete(models["sdxl"], "v_prediction")
    before = fingerprint(model)
    full, capped = (sampling(ZeroTerminalSNR.execute(model, c).args[0]) for c in (0.0, cap))
    assert float(capped.sigma_max) == cap and (capped.sigmas.diff() > 0).all()
    levels = torch.linspace(math.log(0.03), math.log(float(capped.sigmas[-2])), 200).exp()
    levels = torch.cat([levels, torch.tensor([cap])])
    assert torch.equal(full.timestep(levels), capped.timestep(levels))
    assert capped.percent_to_sigma(0.5) == pytest.approx(full.percent_to_sigma(0.5), rel=1e-6)
    assert fingerprint(model) == before


def test_capped_once_is_capped_for_good(models):
    model = discrete(models["sdxl"], "v_prediction")
    once = ZeroTerminalSNR.execute(model, 160.0).args[0]
    for cap, top in ((0.0, 160.0), (1000.0, 160.0), (160.0, 160.0), (40.0, 40.0)):
        again = sampling(ZeroTerminalSNR.execute(once, cap).args[0])
        assert float(again.sigma_max) == top
        assert torch.equal(again.sigmas[:-1], sampling(once).sigmas[: len(again.sigmas) - 1])


@pytest.mark.parametrize("scheduler", ["simple", "karras", "normal", "sgm_uniform", "beta", "ddim_uniform"])
def test_every_scheduler_runs_from_the_cap(models, scheduler):
    patched = ZeroTerminalSNR.execute(discrete(models["sdxl"], "v_prediction"), 160.0).args[0]
    sigmas = comfy.samplers.calculate_sigmas(sampling(patched), scheduler, 20)
    assert (sigmas.diff() < 0).all() and float(sigmas[-1]) == 0.0
    assert float(sigmas[0]) == pytest.approx(160.0, rel=1e-5) or scheduler == "ddim_uniform"


def test_a_capped_eps_model_is_allowed_and_told_what_it_costs(models):
    patched, report = ZeroTerminalSNR.execute(models["sdxl"], 160.0).args
    assert float(sampling(patched).sigma_max) == 160.0 and read_sampling(patched).prediction == "eps"
    assert "an error of 0.001 at the first step is one of 0.16" in report
    assert torch.equal(sampling(ZeroTerminalSNR.execute(patched).args[0]).sigmas, sampling(patched).sigmas)
    with pytest.raises(ValueError, match=r"predicts noise \(eps\).*sigma = 2000, .*becomes 2.*at most 1000"):
        ZeroTerminalSNR.execute(models["sdxl"], 2000.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((math.nan, 0), "sigma_cap must be 0 .*nan"),
        ((math.inf, 0), "sigma_cap must be 0 .*inf"),
        ((-160.0, 0), "sigma_cap must be 0 .*-160"),
        ((0.01, 0), "above the second row of the noise table, 0.04207, got 0.01; 160 is usual"),
        ((0.0, -1), r"unguided_steps must be 0 \(off\) to 100, got -1"),
        ((0.0, 101), r"unguided_steps must be 0 \(off\) to 100, got 101"),
    ],
)
def test_bad_numbers_are_named(models, arguments, message):
    model = discrete(models["sdxl"], "v_prediction")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        ZeroTerminalSNR.execute(model, *arguments)
    assert fingerprint(model) == before


# ── what the node says ──────────────────────────────────────────────────────────────────────────────


def lines(report):
    return dict(line.split(": ", 1) for line in report.splitlines())


def test_the_report_counts_the_steps_that_a_scheduler_would_waste(models):
    output = ZeroTerminalSNR.execute(discrete(models["sdxl"], "v_prediction"))
    report = lines(output.args[1])
    assert output.ui.as_dict() == {"text": (output.args[1],)}
    wasteful = report["schedulers that waste steps above sigma 14.61"]
    assert "karras (13 of 20 steps)" in wasteful and "exponential (10 of 20 steps)" in wasteful
    assert report["schedulers that suit it"].startswith("simple, sgm_uniform, normal, beta")
    assert "ddim_uniform" in report["schedulers that never start in pure noise"]
    assert "karras (8 of 20 steps)" in ZeroTerminalSNR.execute(discrete(models["sdxl"], "v_prediction"), 160.0).args[1]


def test_the_report_says_what_the_checkpoint_says(models):
    assert lines(ZeroTerminalSNR.execute(build_patcher("unet-v")).args[1])["checkpoint"].startswith(
        "marked as zero terminal SNR (loaded as V_PREDICTION)"
    )
    declared = discrete(models["sdxl"], "v_prediction")
    assert "have lost the keys v_pred and ztsnr" in ZeroTerminalSNR.execute(declared).args[1]


def test_the_keys_in_a_checkpoint_are_what_comfyui_found():
    """The loader's own reading of a state dict with the keys, down to the node's text."""
    import comfy.supported_models

    for keys, said in (
        ({"v_pred": torch.zeros(0)}, "v prediction, not marked as zero terminal SNR"),
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, "marked as zero terminal SNR"),
    ):
        model = zoo("sdxl", keys)
        assert isinstance(model.model.model_config, comfy.supported_models.SDXL)
        patched, report = ZeroTerminalSNR.execute(model).args
        assert lines(report)["checkpoint"].startswith(said)
        assert float(sampling(patched).sigma_max) == pytest.approx(4518.76, abs=0.01)


# ── the steps without guidance ──────────────────────────────────────────────────────────────────────


def sample(model, cfg=7.0, steps=4, sampler="euler", start=None, seen=None):
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    conds = []
    for seed in (1, 2):
        text = torch.randn(1, 4, CONTEXT_WIDTH, generator=torch.Generator().manual_seed(seed))
        conds.append([[text, {"pooled_output": text.mean(1)}]])
    model = model.clone()
    if seen is not None:
        model.set_model_sampler_post_cfg_function(lambda args: seen.append(args) or args["denoised"])
    arguments = {"start_step": start} if start else {}
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "simple", *conds, torch.zeros(2, 3, 8, 8), seed=0, **arguments
    )


def guided(seen):
    gaps = [float((args["denoised"] - args["cond_denoised"]).abs().max()) for args in seen]
    assert not any(1e-2 < gap < 0.1 for gap in gaps), gaps  # rounding at sigma 4518, or guidance: nothing between
    return [gap > 1e-2 for gap in gaps]


def test_the_first_steps_have_no_guidance_and_the_others_all_of_it():
    model = load_tiny_model("unet-v")
    for steps, expected in ((0, [True] * 4), (1, [False, True, True, True]), (3, [False, False, False, True])):
        seen = []
        sample(ZeroTerminalSNR.execute(model, 0.0, steps).args[0], seen=seen)
        assert guided(seen) == expected


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_cfg_pp"])
def test_without_guidance_on_every_step_is_cfg_1(sampler):
    model = load_tiny_model("unet-v")
    # Capped, because float32 holds 4518·noise to 5e-4 only.
    never, plain = (ZeroTerminalSNR.execute(model, 160.0, steps).args[0] for steps in (100, 0))
    # CFG++ at 1 is guided in full; without guidance it is Euler's method.
    difference = sample(never, sampler=sampler) - sample(plain, cfg=1.0, sampler=sampler.removesuffix("_cfg_pp"))
    assert float(difference.abs().max()) < 1e-3


def test_a_run_that_starts_further_down_is_guided_from_its_first_step():
    seen = []
    sample(ZeroTerminalSNR.execute(load_tiny_model("unet-v"), 0.0, 2).args[0], start=2, seen=seen)
    assert guided(seen) == [True, True]


def test_cfg_1_and_the_nodes_of_others_stay_as_they_are():
    model = load_tiny_model("unet-v")
    assert torch.equal(sample(ZeroTerminalSNR.execute(model, 0.0, 1).args[0], cfg=1.0), sample(model, cfg=1.0))
    unguided = ZeroTerminalSNR.execute(model, 160.0, 1).args[0]
    # Before or after RescaleCFG, which takes the single slot of CFG functions: the first step is the conditional one.
    rescale = nodes_model_advanced.RescaleCFG().patch
    for both in (rescale(unguided, 0.7)[0], ZeroTerminalSNR.execute(rescale(model, 0.7)[0], 160.0, 1).args[0]):
        seen = []
        sample(both, seen=seen)
        assert guided(seen) == [False, True, True, True]
    # Perturbed attention is guidance of another kind, and keeps its part of the first step.
    seen = []
    sample(perturbed_attention(unguided, 3.0, 0.0, 1.0), seen=seen)
    assert torch.equal(seen[0]["uncond_denoised"], seen[0]["cond_denoised"])
    assert float((seen[0]["denoised"] - seen[0]["cond_denoised"]).abs().max()) > 1e-2
