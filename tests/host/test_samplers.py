"""Sampler inside real ComfyUI: parity with ComfyUI's own, seeds, precision, and bad input; also of Flow Sampler."""

import math

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.k_diffusion import sampling as host
from comfy_extras.nodes_custom_sampler import BasicGuider

from tidetable.runtime.samplers import sample_ours
from tidetable.samplers import SAMPLERS
from tidetable.tests.host.mixture_model import MIXTURE, draw, exact_model, prompt, start_noise
from tidetable.tests.host.model_zoo import LATENT, zoo
from tidetable.tests.host.sampler_nodes import ours, safe, sigmas_for, stock


pytestmark = pytest.mark.usefixtures("in_a_node")


# ── parity with ComfyUI where theory says equal ─────────────────────────────────────────────────────────────────────

SAME = [
    ("euler", {}, "euler"), ("heun", {}, "heun"), ("ddim", {"eta": 0.0}, "ddim"),
    ("res_multistep_ancestral", {"eta": 0.0}, "res_multistep"),
    ("res_multistep_cfg_pp", {}, "res_multistep"), ("dpmpp_2m_cfg_pp", {}, "dpmpp_2m"),
    ("gradient_estimation_cfg_pp", {}, "gradient_estimation"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize(("name", "options", "theirs"), SAME)
def test_deterministic_forms_equal_comfyuis(kind, name, options, theirs):
    model = exact_model(kind)
    sigmas = sigmas_for(model)
    got, expected = (draw(model, s, sigmas, start_noise(64)) for s in (ours(name, **options), stock(theirs)))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["ddpm", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp"])
def test_ancestral_samplers_equal_comfyuis_on_eps_models_noise_included(name):
    model = exact_model("eps")
    sigmas = sigmas_for(model, scheduler="karras")
    got, expected = (draw(model, s, sigmas, start_noise(64), seed=5) for s in (ours(name), stock(name)))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "qwen_image", "z_image", "lumina2", "wan", "auraflow"])
def test_euler_equals_comfyuis_on_real_networks(name):
    """On every family of the zoo, 4-D and 5-D latents: the same numbers, and corrected samplers run."""
    model, shape = zoo(name), LATENT.get(name, (1, 16, 8, 8))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    context = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
    cond = [[context, {"pooled_output": torch.zeros(1, 32)}]]

    def run(sampler):
        return comfy.sample.sample_custom(
            model,
            noise,
            1.5,
            sampler,
            sigmas_for(model, 4),
            cond,
            cond,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )

    expected = run(stock("euler"))
    torch.testing.assert_close(run(ours("euler")), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for corrected in ("ddpm", "dpmpp_2s_ancestral_cfg_pp", "dpm_adaptive"):
        assert torch.isfinite(run(safe(corrected))).all()


# ── seeds, noise, precision ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [name for name, spec in SAMPLERS.items() if spec.stochastic])
def test_the_seed_decides(flow, name):
    def run(seed):
        return draw(flow, ours(name), sigmas_for(flow), start_noise(4), seed=seed)

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2), atol=1e-3)


def test_noise_is_comfyuis_for_the_seed(flow, monkeypatch):
    drawn = []
    real = host.default_noise_sampler

    def watched(x, seed=None):
        drawn.append((tuple(x.shape), seed))
        return real(x, seed=seed)

    monkeypatch.setattr(host, "default_noise_sampler", watched)
    draw(flow, ours("ddpm"), sigmas_for(flow), start_noise(4), seed=17)
    assert drawn == [((4, 4, 1, 1), 17)]


def test_half_precision_latents_are_sampled_in_float32(flow):
    """ComfyUI 0.3.75 keeps the dtype of the noise for the whole run."""
    asked, expected = [], draw(flow, ours("euler"), sigmas_for(flow, 30), start_noise(4))

    class Proxy:
        def __init__(self, model):
            self.inner_model = model.inner_model
            self.model = model

        def __call__(self, x, sigma, **kwargs):
            asked.append(x.dtype)
            return self.model(x, sigma, **kwargs)

    def run(model, x, sigmas, **kwargs):
        result = sample_ours(Proxy(model), x.half(), sigmas, name="euler", **kwargs)
        assert result.dtype == torch.float16
        return result.float()

    got = draw(flow, comfy.samplers.KSAMPLER(run), sigmas_for(flow, 30), start_noise(4))
    assert set(asked) == {torch.float32}
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-3)


@pytest.mark.skipif(not hasattr(exact_model("flow").get_model_object("model_sampling"), "noise_scale"), reason="newer")
def test_noise_scale_of_newer_flow_models(flow):
    """Noise that is twice as large at the start is twice as large when it is drawn anew."""
    plain = draw(flow, ours("ddpm"), torch.tensor([1.0, 0.5]), start_noise(256), seed=2)
    scaled = exact_model("flow", noise_scale=2.0)
    got = draw(scaled, ours("ddpm"), torch.tensor([1.0, 0.5]), start_noise(256), seed=2)
    assert float(got.std()) > 1.3 * float(plain.std())


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([0.5], "sigmas has 1 value"),
        ([1.0, math.nan, 0.0], r"sigmas\[1\] is nan"),
        ([0.0, 0.5, 1.0], "must fall from noise to data"),
        ([1.0, 0.5, 0.5, 0.0], r"sigmas\[1\] = 0.5 is followed by 0.5"),
        ([1.0, -0.5], r"sigmas\[1\] is -0.5"),
        ([14.6, 3.0, 0.0], "start at 14.6, but a flow model's noise levels are 1"),
    ],
)
@pytest.mark.parametrize("make", [ours, safe], ids=["Sampler", "FlowSampler"])
def test_bad_sigmas_are_refused(flow, make, sigmas, message):
    with pytest.raises(ValueError, match=message):
        draw(flow, make("ddpm"), torch.tensor(sigmas), start_noise(2))


def test_no_sigmas_return_the_latent_as_in_comfyui(flow):
    latent = start_noise(2, seed=4)
    assert torch.equal(draw(flow, ours("ddpm"), torch.tensor([]), start_noise(2), latent=latent), latent.flatten(1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eta": math.nan}, "eta.*nan"),
        ({"s_noise": -2.0}, "s_noise.*-2"),
        ({"order": 3}, "res_multistep_ancestral has order 1 or 2, not 3"),
        ({"churn": -1.0}, "churn.*-1"),
    ],
)
def test_bad_options_are_refused_by_the_node(values, message):
    with pytest.raises(ValueError, match=message):
        ours("res_multistep_ancestral", **values)


def test_cfg_pp_without_a_negative_prompt_is_refused(flow):
    """BasicGuider evaluates none; ComfyUI's own would take zeros for it."""
    guider = BasicGuider.execute(flow, prompt(MIXTURE)).args[0]
    for sampler in (ours("dpmpp_2m_cfg_pp"), safe("dpmpp_2m_cfg_pp")):
        with pytest.raises(ValueError, match="dpmpp_2m_cfg_pp is a CFG\\+\\+ sampler and needs a negative prompt"):
            guider.sample(start_noise(2), torch.zeros(2, 4, 1, 1), sampler, sigmas_for(flow), disable_pbar=True, seed=0)


def test_a_model_without_a_noise_process_is_refused():
    model = exact_model("flow")

    class Regression(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.IMG_TO_IMG):
        pass

    model.add_object_patch("model_sampling", Regression())
    with pytest.raises(ValueError, match="ddpm is for flow and ve models, not for this model, which has no noise"):
        draw(model, ours("ddpm"), torch.tensor([1.0, 0.5, 0.0]), start_noise(2))
