"""Flow Sampler and Sampler-Safe Flow inside real ComfyUI: KSampler, SamplerCustom, masks, splits, other packs."""

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_model_advanced

from tidetable.nodes.samplers import FlowSampler, SamplerSafeFlow
from tidetable.runtime.samplers import CORRECTED, flow_safe, host_names
from tidetable.samplers import SAMPLERS
from tidetable.tests.gaussians import sliced_wasserstein
from tidetable.tests.host import conformance
from tidetable.tests.host.comparing import fingerprint
from tidetable.tests.host.mixture_model import CONDITIONAL, MIXTURE, draw, exact_model, prompt, start_noise
from tidetable.tests.host.sampler_nodes import ours, safe, sigmas_for, stock


pytestmark = pytest.mark.usefixtures("in_a_node")
each_corrected = pytest.mark.parametrize("name", CORRECTED)


def ksampler(model, name, steps=12, cfg=1.0, scheduler="simple", count=8, seed=0, positive=MIXTURE, **options):
    """What KSampler and KSamplerAdvanced call."""
    noise = options.pop("noise", start_noise(count))
    latent = options.pop("latent", torch.zeros_like(noise))
    return comfy.sample.sample(
        model, noise, steps, cfg, name, scheduler, prompt(positive), prompt(MIXTURE), latent, disable_pbar=True,
        seed=seed, **options,
    ).flatten(1)  # fmt: skip


# ── Flow Sampler: which function runs ───────────────────────────────────────────────────────────────────────────────


def test_the_choice_is_comfyuis_and_corrected_names_are_ours_too():
    combo = FlowSampler.GET_SCHEMA().inputs[0]
    assert combo.options == comfy.samplers.SAMPLER_NAMES
    assert set(CORRECTED) <= set(SAMPLERS) and set(CORRECTED) <= set(combo.options)


@pytest.mark.parametrize("name", [name for name in host_names() if name not in CORRECTED])
def test_right_names_are_handed_through(name):
    given, expected = safe(name), stock(name)
    assert type(given) is type(expected)
    if hasattr(given, "sampler_function"):
        same = given.sampler_function is expected.sampler_function
        assert same or given.sampler_function.__qualname__ == expected.sampler_function.__qualname__
        assert (given.extra_options, given.inpaint_options) == (expected.extra_options, expected.inpaint_options)


@each_corrected
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_on_other_models_it_is_comfyuis_own(name, kind):
    model = exact_model(kind)
    sigmas = sigmas_for(model, scheduler="karras")
    results = [draw(model, sampler, sigmas, start_noise(4), cfg=1.5, seed=3) for sampler in (safe(name), stock(name))]
    assert torch.equal(*results)


@each_corrected
def test_on_flow_it_is_ours(flow, name):
    sigmas = sigmas_for(flow)
    results = [draw(flow, sampler, sigmas, start_noise(4), seed=3) for sampler in (safe(name), ours(name))]
    assert torch.equal(*results)
    assert not torch.allclose(results[0], draw(flow, stock(name), sigmas, start_noise(4), seed=3), atol=1e-4) or (
        name.endswith("_cfg_pp")  # equal at cfg 1 with one prompt
    )


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="this ComfyUI has no sampler 'eulr'.*euler"):
        safe("eulr")


# ── the model stays a flow model: everything around the sampler keeps its meaning ───────────────────────────────────


@each_corrected
@pytest.mark.parametrize("scheduler", ["simple", "normal", "beta", "karras", "ddim_uniform"])
def test_schedulers_are_comfyuis_for_the_model(flow, name, scheduler):
    """The model is asked at the levels of the schedule (dpm_* choose their own between its ends) and nowhere above."""
    sigmas = sigmas_for(flow, 12, name, scheduler)
    asked = []
    watched = flow.clone()
    watched.set_model_sampler_post_cfg_function(lambda args: asked.append(float(args["sigma"][0])) or args["denoised"])
    result = draw(watched, safe(name), sigmas, start_noise(4))
    assert torch.isfinite(result).all()
    assert asked[0] == pytest.approx(float(sigmas[0])) and max(asked) <= 1.0 and min(asked) > 0.0
    assert asked[-1] == pytest.approx(float(sigmas[-2]), rel=1e-4)
    if not name.startswith("dpm_") and "2s" not in name:
        assert asked == pytest.approx(sigmas[:-1].tolist())


@each_corrected
def test_percent_ranges_act_at_the_same_noise_levels(flow, name):
    """A condition that holds from 0.3 to 0.6 of the way is evaluated there and only there."""
    sigmas, seen = sigmas_for(flow, 20, name), []
    watched = flow.clone()
    watched.set_model_sampler_pre_cfg_function(
        lambda args: (
            seen.append((float(args["sigma"][0]), bool(args["conds_out"][0].abs().sum() > 0))) or args["conds_out"]
        )
    )
    ranged = [[prompt(CONDITIONAL)[0][0], {"start_percent": 0.3, "end_percent": 0.6}]]
    comfy.sample.sample_custom(
        watched, start_noise(4), 2.0, safe(name), sigmas, ranged, prompt(MIXTURE), torch.zeros(4, 4, 1, 1),
        disable_pbar=True, seed=0,
    )  # fmt: skip
    sampling = flow.get_model_object("model_sampling")
    start, end = sampling.percent_to_sigma(0.3), sampling.percent_to_sigma(0.6)
    assert {active for _, active in seen} == {True, False}
    assert all(active == (end <= sigma <= start) for sigma, active in seen)


@each_corrected
def test_inpainting_keeps_what_is_outside_the_mask(flow, name):
    latent = torch.linspace(-1.0, 1.0, 32).reshape(8, 4, 1, 1)
    mask = torch.zeros(8, 1, 1, 1)
    mask[4:] = 1.0
    result = draw(flow, safe(name), sigmas_for(flow), start_noise(8), latent=latent, noise_mask=mask)
    torch.testing.assert_close(result[:4], latent[:4].flatten(1), rtol=0, atol=1e-6)
    assert (result[4:] - latent[4:].flatten(1)).abs().max() > 0.1


@each_corrected
def test_denoise_below_one_starts_from_the_latent(flow, name):
    latent = MIXTURE.means.float().reshape(4, 4, 1, 1)
    result = draw(flow, safe(name), sigmas_for(flow, 10, name, denoise=0.08), start_noise(4), latent=latent)
    torch.testing.assert_close(MIXTURE.mode_weights(result), torch.full((4,), 0.25, dtype=torch.float64))


@each_corrected
def test_leftover_noise_of_a_split_is_at_its_level(flow, name):
    """KSamplerAdvanced, twice: steps 0 to 9 with leftover noise, then the rest without new noise."""
    count = 2048
    first = ksampler(
        SamplerSafeFlow.execute(flow).args[0], name, 24, count=count, last_step=9, force_full_denoise=False
    )
    middle = float(sigmas_for(flow, 24)[9])
    x = first.double() * (1.0 - middle)  # ComfyUI hands it on divided by the signal coefficient
    truth = (1.0 - middle) * conformance.truth_samples(count) + middle * start_noise(count, 9).double().flatten(1)
    assert sliced_wasserstein(x, truth) < 0.08
    torch.testing.assert_close(
        torch.cov(x.T), (1.0 - middle) ** 2 * MIXTURE.covariance() + middle**2 * torch.eye(4), rtol=0, atol=0.12
    )
    second = ksampler(
        SamplerSafeFlow.execute(flow).args[0], name, 24, latent=first.reshape(count, 4, 1, 1).float(), start_step=9,
        noise=torch.zeros(count, 4, 1, 1), disable_noise=True,
    )  # fmt: skip
    assert sliced_wasserstein(second, conformance.truth_samples(count)) < 0.1


@pytest.mark.parametrize("name", ["dpm_fast", "ddpm", "dpmpp_2m_cfg_pp"])
def test_rescale_cfg_acts_as_on_comfyuis_own(flow, name):
    """RescaleCFG sees a flow model's input: on the first evaluation, which is at the same state, both agree exactly."""
    rescaled = nodes_model_advanced.RescaleCFG().patch(flow, 0.7)[0]
    first = []
    for sampler in (safe(name), stock(name)):
        shown = []
        options = {
            "cfg": 3.0,
            "positive": CONDITIONAL,
            "callback": lambda i, d, x, n, shown=shown: shown.append(d.clone()),
        }
        draw(rescaled, sampler, sigmas_for(flow), start_noise(8), **options)
        first.append(shown[0])
    torch.testing.assert_close(first[0], first[1])
    plain = []
    draw(flow, safe(name), sigmas_for(flow), start_noise(8), cfg=3.0, positive=CONDITIONAL,
         callback=lambda i, d, x, n: plain.append(d.clone()))  # fmt: skip
    assert not torch.allclose(first[0], plain[0], atol=1e-3)


@each_corrected
def test_previews_get_the_denoised_sample_of_every_step_in_order(flow, name):
    shown = []
    result = draw(
        flow, safe(name), sigmas_for(flow, 12, name), start_noise(4),
        callback=lambda i, denoised, x, total: shown.append((i, total, denoised.clone(), x.clone())),
    )  # fmt: skip
    steps = [i for i, *_ in shown]
    assert steps == sorted(steps) and (steps[0], steps[-1]) == (0, 11) and {total for _, total, *_ in shown} == {12}
    torch.testing.assert_close(shown[-1][2].flatten(1), result)
    assert shown[0][3].std() == pytest.approx(1.0, abs=0.5)  # x is flow's, not 1000 times as large


def test_shift_nodes_may_come_before_or_after(flow):
    shifts = [
        nodes_model_advanced.ModelSamplingSD3().patch,
        lambda model, shift: (SamplerSafeFlow.execute(model).args[0],),
    ]
    results = []
    for order in (shifts, shifts[::-1]):
        model = flow
        for patch in order:
            model = patch(model, 6.0)[0]
        results.append(ksampler(model, "ddpm"))
    assert torch.equal(*results)
    assert not torch.allclose(results[0], ksampler(SamplerSafeFlow.execute(flow).args[0], "ddpm"), atol=1e-3)


# ── Sampler-Safe Flow ───────────────────────────────────────────────────────────────────────────────────────────────


@each_corrected
def test_ksampler_runs_the_corrected_form(flow, name):
    model = SamplerSafeFlow.execute(flow).args[0]
    expected = draw(flow, safe(name), sigmas_for(flow, 12, name), start_noise(8))
    assert torch.equal(ksampler(model, name), expected)


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "dpmpp_2m_sde", "uni_pc", "lcm"])
def test_other_names_run_untouched(flow, name):
    assert torch.equal(ksampler(SamplerSafeFlow.execute(flow).args[0], name), ksampler(flow, name))


def test_the_model_that_was_given_stays_as_it_was(flow):
    before, wrappers = fingerprint(flow), repr(flow.wrappers)
    patched = SamplerSafeFlow.execute(flow).args[0]
    ksampler(patched, "ddpm")
    assert fingerprint(flow) == before and repr(flow.wrappers) == wrappers
    assert type(patched.get_model_object("model_sampling")) is type(flow.get_model_object("model_sampling"))


def test_twice_is_once(flow):
    once = SamplerSafeFlow.execute(flow).args[0]
    twice = SamplerSafeFlow.execute(once).args[0]
    assert len(twice.get_all_wrappers(WrappersMP.SAMPLER_SAMPLE)) == 1
    assert torch.equal(ksampler(once, "ddpm"), ksampler(twice, "ddpm"))


def test_other_wrappers_before_and_after_still_run_around_the_corrected_one(flow):
    calls = []

    def wrapper(label):
        def around(executor, *args, **kwargs):
            calls.append(label)
            return executor(*args, **kwargs)

        return around

    model = flow.clone()
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "before", wrapper("before"))
    model = SamplerSafeFlow.execute(model).args[0]
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "after", wrapper("after"))
    assert torch.equal(ksampler(model, "ddpm"), ksampler(SamplerSafeFlow.execute(flow).args[0], "ddpm"))
    assert calls == ["before", "after"]


def test_the_text_names_what_changes(flow):
    text = SamplerSafeFlow.execute(flow).args[1]
    assert text.startswith("Changed on this flow model:") and all(f"\n{name}: " in text for name in CORRECTED)
    assert f"The other {len(host_names()) - len(CORRECTED)} samplers" in text
    assert "This is not a flow model" in SamplerSafeFlow.execute(exact_model("eps")).args[1]


def test_an_eps_model_made_flow_by_a_later_node_counts(flow):
    del flow
    model = nodes_model_advanced.ModelSamplingSD3().patch(SamplerSafeFlow.execute(exact_model("flow")).args[0], 2.0)[0]
    assert torch.equal(ksampler(model, "ddpm"), draw(model, safe("ddpm"), sigmas_for(model), start_noise(8)))


class ForeignSampler(comfy.samplers.Sampler):
    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar):
        return noise


def test_foreign_samplers_and_settings_stay_untouched(flow):
    renamed = comfy.samplers.KSAMPLER(lambda model, x, sigmas, **kwargs: x)
    renamed.sampler_function.__name__ = "sample_ddpm"
    detailed = comfy.samplers.ksampler("dpm_adaptive", {"rtol": 0.01})
    for sampler in (ForeignSampler(), renamed, detailed, ours("ddpm"), safe("ddpm")):
        assert flow_safe(sampler) is sampler
    noise = start_noise(3)
    result = draw(SamplerSafeFlow.execute(flow).args[0], ForeignSampler(), sigmas_for(flow), noise)
    torch.testing.assert_close(result, noise.flatten(1))


def test_settings_that_ours_have_are_kept(flow):
    sigmas = sigmas_for(flow)
    still = comfy.samplers.ksampler("res_multistep_ancestral", {"eta": 0.0})
    model = SamplerSafeFlow.execute(flow).args[0]
    expected = draw(flow, stock("res_multistep"), sigmas, start_noise(8))
    torch.testing.assert_close(draw(model, still, sigmas, start_noise(8)), expected, rtol=0, atol=2e-4)


def test_not_a_model_is_refused():
    with pytest.raises(ValueError, match="expected a diffusion MODEL, got str"):
        SamplerSafeFlow.execute("model")
