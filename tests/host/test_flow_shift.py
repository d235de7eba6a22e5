"""Flow Shift beyond its first modes: every class of the host, sizes from a LATENT, and what an earlier node did."""

import copy
import math

import comfy.latent_formats
import comfy.model_sampling
import comfy.supported_models
import comfy.supported_models_base
import pytest
import torch
from comfy_extras import nodes_lt, nodes_model_advanced

from tidetable.nodes.model_sampling import DescribeModel, FlowShift
from tidetable.runtime.flow_shift import FAMILY_CHOICES
from tidetable.runtime.model_sampling import patch_flow_shift, read_sampling
from tidetable.schedules.families import FAMILIES, FLOW_FAMILIES, NOT_FAMILIES, family_of, official_shift
from tidetable.tests.host.model_zoo import FLOW, discrete
from tidetable.tests.host.test_model_sampling import fingerprint


pytestmark = pytest.mark.usefixtures("in_a_node")
CONFIGS = {config.__name__: config for config in comfy.supported_models.models}
HAS_NOISE_SCALE = hasattr(comfy.model_sampling.ModelSamplingDiscreteFlow, "set_noise_scale")


def shift_node(model, mode="official", shift=3.0, mu=1.15, width=1024, height=1024, **more):
    output = FlowShift.execute(model, mode, shift, mu, width, height, **more)
    return (*output.args, output.ui.as_dict()["text"][0])


# ── every class ─────────────────────────────────────────────────────────────────────────────────────


def test_every_model_class_of_this_comfyui_is_a_family_or_left_out_for_a_reason():
    assert len(CONFIGS) > 60
    unknown = [name for name in CONFIGS if family_of(name) is None and name not in NOT_FAMILIES]
    assert unknown == [], "add them to schedules/families.py, or to NOT_FAMILIES with the reason"
    assert all(len(reason) > 5 for reason in NOT_FAMILIES.values())


def test_every_flow_class_has_a_rule_and_no_other_class_does():
    """By the settings that ComfyUI's own config classes carry: flow models have a shift there or are FLUX-like."""
    for name, config in CONFIGS.items():
        family = family_of(name)
        if family is None or name.startswith("Stable_Cascade"):  # Cascade's shift is another one, of its cosine
            continue
        if "shift" in config.sampling_settings:
            assert family.rule is not None, name
        if family.rule is None:
            assert "shift" not in config.sampling_settings and "multiplier" not in config.sampling_settings, name


def with_sizes():
    """Flow classes of pictures and videos, where this ComfyUI says how large a latent pixel is (newer ones do)."""
    for name, config in CONFIGS.items():
        family, latent_format = family_of(name), getattr(config, "latent_format", None)
        says = latent_format and hasattr(latent_format, "spacial_downscale_ratio")
        if family and family.rule and says and latent_format.latent_dimensions > 1:
            yield name


@pytest.mark.parametrize("name", list(with_sizes()))
def test_sizes_of_latents_are_the_hosts(name):
    family, latent_format = family_of(name), CONFIGS[name].latent_format
    assert family.pixels_per_latent == latent_format.spacial_downscale_ratio
    assert family.frames_per_latent == latent_format.temporal_downscale_ratio


@pytest.mark.parametrize("key", FLOW_FAMILIES)
def test_any_familys_rule_can_be_forced_on_any_flow_model(models, key):
    size = (FAMILIES[key].default_width, FAMILIES[key].default_height)
    patched, shift, mu, text = shift_node(models["sd3"], width=size[0], height=size[1], family=key, length=9, steps=7)
    assert (shift, mu) == official_shift(key, *size, 9, 7) and FAMILIES[key].title in text
    assert read_sampling(patched).shift == pytest.approx(shift)
    assert type(patched.get_model_object("model_sampling")) is type(models["sd3"].model.model_sampling)


def test_the_family_choices_are_auto_and_those_with_a_rule():
    assert ("auto", *FLOW_FAMILIES) == FAMILY_CHOICES and "sdxl" not in FAMILY_CHOICES and "flux2" in FAMILY_CHOICES


# ── modes and sizes ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize(
    ("mode", "expected"), [("line", math.exp(0.5)), ("sqrt area", 0.5), ("log area", 0.25)], ids=lambda v: str(v)
)
def test_modes_by_size(models, name, mode, expected):
    _, shift, mu, text = shift_node(models[name], mode, width=256, height=256, base_size=512)
    assert shift == pytest.approx(expected) and mu == pytest.approx(math.log(expected))
    assert "256×256" in text and f"α {shift:.4f}" in text


def latent(*shape):
    return {"samples": torch.zeros(shape)}


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("flux", (1, 16, 116, 208), (1664, 928, 1)),
        ("sd3", (2, 16, 64, 96), (768, 512, 1)),
        ("qwen_image", (1, 16, 1, 116, 208), (1664, 928, 1)),
        ("qwen_image", (1, 16, 116, 208), (1664, 928, 1)),
        ("wan", (1, 16, 21, 60, 104), (832, 480, 81)),
    ],
)
@pytest.mark.parametrize("mode", ["official", "line", "sqrt area", "log area"])
def test_a_latent_gives_the_size(models, name, shape, size, mode):
    connected = shift_node(models[name], mode, latent=latent(*shape))
    typed = shift_node(models[name], mode, width=size[0], height=size[1], length=size[2])
    assert connected[1:3] == typed[1:3] and connected[3] == typed[3]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("flux", latent(1, 4, 64, 64), "LATENT has 4 channels, but this model's latents have 16.*width and height"),
        ("flux", latent(1, 128, 64, 64), "LATENT has 128 channels.*have 16"),
        ("auraflow", latent(1, 16, 1, 64, 64), "LATENT has 16 channels.*have 4"),
        ("wan", latent(1, 16, 64), r"shape \[1, 16, 64\].*Disconnect it"),
        ("wan", latent(1, 16, 0, 64, 64), r"shape \[1, 16, 0, 64, 64\]"),
        ("wan", {}, "expected a LATENT with samples, got dict"),
        ("wan", {"samples": None}, "expected a LATENT with samples, got dict"),
        ("wan", "latent", "expected a LATENT with samples, got str"),
        ("flux", latent(1, 16, 1, 1), "at least 16 pixels .*8×8"),
    ],
)
def test_bad_latents_are_named(models, name, given, message):
    before = fingerprint(models[name])
    with pytest.raises(ValueError, match=message):
        shift_node(models[name], latent=given)
    assert fingerprint(models[name]) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"family": "sdxl"}, "no official shift is known for Stable Diffusion XL"),
        ({"family": "nonsense"}, "unknown family 'nonsense'.*flux2"),
        ({"family": "flux2", "steps": 0}, "steps must be 1 to 10000, got 0"),
        ({"family": "ltxv", "length": 0}, "length must be at least 1 frame, got 0"),
        ({"mode": "line", "x2": 256.0}, "x1 and x2 are both 256 tokens"),
        ({"mode": "sqrt area", "base_size": 0}, "base_size .*got 0"),
    ],
)
def test_bad_settings_are_named(models, more, message):
    with pytest.raises(ValueError, match=message):
        shift_node(models["sd3"], **more)


def test_a_newer_model_of_no_family_uses_what_the_host_says_of_its_latent(models):
    unknown = copy.copy(models["sd3"])
    unknown.model = copy.copy(models["sd3"].model)
    unknown.model.model_config = type("SomethingNew", (), {})()
    unknown.model.__class__ = type("NewNetwork", (type(models["sd3"].model),), {})
    assert shift_node(unknown, "log area", base_size=512, latent=latent(1, 16, 128, 64))[1] == pytest.approx(2.0)
    wide = copy.copy(models["sd3"].model.latent_format)
    wide.spacial_downscale_ratio, wide.temporal_downscale_ratio = 16, 4
    unknown.model.latent_format = wide
    assert shift_node(unknown, "log area", base_size=512, latent=latent(1, 16, 128, 64))[1] == pytest.approx(8.0)


# ── after another model-sampling node ───────────────────────────────────────────────────────────────


def test_the_text_says_what_was_replaced(models):
    qwen = models["qwen_image"]
    text = shift_node(qwen, width=1664, height=928)[3]
    assert "α 2.2059, mu 0.7911: official for Qwen-Image at 1664×928 (6032 tokens). Source: Qwen/Qwen-Image" in text
    assert "replaces α 3.1582 of the checkpoint" in text and "WARNING" not in text
    assert "end at 0.02" in text and "Tidetable_OfficialSchedule" in text
    twice = shift_node(patch_flow_shift(qwen, "shift", 6.0, 0.0, 64, 64)[0], "shift", 2.0)[3]
    assert "replaces α 6.0000 that an earlier model-sampling node set (the checkpoint has α 3.1582)" in twice


@pytest.mark.parametrize(
    ("name", "node", "old", "new"),
    [
        ("z_image", "ModelSamplingSD3", "sigma", "sigma·1000"),
        ("flux", "ModelSamplingSD3", "sigma", "sigma·1000"),
        ("sd3", "ModelSamplingAuraFlow", "sigma·1000", "sigma"),
    ],
)
def test_a_node_for_another_kind_of_model_upstream_is_reported_and_kept(models, name, node, old, new):
    core = getattr(nodes_model_advanced, node)()
    wrong = (core.patch_aura if hasattr(core, "patch_aura") else core.patch)(models[name], 3.0)[0]
    patched, *_, text = shift_node(wrong)
    assert f"WARNING: an earlier node changed the network's time from {old} to {new}" in text and "Remove that" in text
    before, after = wrong.get_model_object("model_sampling"), patched.get_model_object("model_sampling")
    assert type(after) is type(before) and getattr(after, "multiplier", None) == getattr(before, "multiplier", None)


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("sd3", lambda m: nodes_model_advanced.ModelSamplingSD3().patch(m, 5.0)[0]),
        ("lumina2", lambda m: nodes_model_advanced.ModelSamplingAuraFlow().patch_aura(m, 5.0)[0]),
        ("flux", lambda m: nodes_model_advanced.ModelSamplingFlux().patch(m, 1.0, 1.0, 1024, 1024)[0]),
    ],
)
def test_the_right_core_node_upstream_is_composed_with(models, name, patch):
    upstream = patch(models[name])
    patched, shift, _, text = shift_node(upstream)
    alone = shift_node(models[name])
    assert "WARNING" not in text and shift == alone[1]
    sigmas = [model.get_model_object("model_sampling").sigmas for model in (patched, alone[0])]
    torch.testing.assert_close(*sigmas, rtol=0, atol=0)


def test_ltxs_node_upstream_keeps_its_type(models):
    size = {"width": 1024, "height": 1024}
    node = nodes_lt.ModelSamplingLTXV
    run = getattr(node, "execute", None) or node().patch
    output = run(models["flux"], 2.05, 0.95, None)
    upstream = output.args[0] if hasattr(output, "args") else output[0]
    patched, shift, _, text = shift_node(upstream, family="ltxv", **size)
    assert isinstance(patched.get_model_object("model_sampling"), comfy.model_sampling.ModelSamplingFlux)
    assert shift == official_shift("ltxv", 1024, 1024)[0] and "WARNING" not in text


@pytest.mark.skipif(not HAS_NOISE_SCALE, reason="an older ComfyUI without noise scale")
def test_noise_scale_is_kept_and_said(models):
    scaled = nodes_model_advanced.ModelNoiseScale()
    run = getattr(scaled, "execute", None) or scaled.patch
    output = run(models["sd3"], 8.0)
    upstream = output.args[0] if hasattr(output, "args") else output[0]
    patched, *_, text = shift_node(upstream)
    assert patched.get_model_object("model_sampling").noise_scale == 8.0 and "keeps noise_scale 8" in text


@pytest.mark.skipif(not hasattr(comfy.model_sampling, "ModelSamplingAV"), reason="an older ComfyUI without audio shift")
def test_audio_shift_is_kept_or_its_loss_reported(models):
    class Sampling(comfy.model_sampling.ModelSamplingAV, comfy.model_sampling.CONST):
        pass

    model = models["sd3"].clone()
    model.model = copy.copy(models["sd3"].model)
    sampling = Sampling(comfy.supported_models_base.BASE({}))
    sampling.set_parameters(shift=12.0, audio_shift=3.0)
    model.model.model_sampling = sampling
    patched, *_, text = shift_node(model, "shift", 6.0)
    new = patched.get_model_object("model_sampling")
    assert new.audio_shift == 3.0 and new.audio_scale == 2.0 and "keeps audio_shift 3" in text
    lost = nodes_model_advanced.ModelSamplingSD3().patch(model, 5.0)[0]
    assert "WARNING: an earlier node dropped audio_shift 3 of the checkpoint" in shift_node(lost)[3]


@pytest.mark.parametrize("sampling", ["eps", "v_prediction"])
def test_a_flow_model_that_an_earlier_node_made_discrete_is_refused_with_the_reason(models, sampling):
    for zsnr in (False, True):
        broken = discrete(models["flux"], sampling, zsnr=zsnr)
        with pytest.raises(ValueError, match="its checkpoint is one, so an earlier model-sampling node made it so"):
            shift_node(broken)


def test_a_sigma_range_set_upstream_is_refused_with_the_reason(models):
    ranged = nodes_model_advanced.ModelSamplingContinuousEDM().patch(models["sd3"], "v_prediction", 120.0, 0.002)[0]
    with pytest.raises(ValueError, match="ContinuousEDM.*earlier model-sampling node"):
        shift_node(ranged)


# ── Describe Model beside it ────────────────────────────────────────────────────────────────────────


def test_describe_model_agrees_with_flow_shift(models):
    for name in FLOW:
        family = FAMILIES[name]
        size = {"width": family.default_width, "height": family.default_height, "length": family.default_length}
        patched, shift, mu, _ = shift_node(models[name], **size)
        text = DescribeModel.execute(patched).args[0]
        line = next(line for line in text.splitlines() if line.startswith("shift: "))
        assert line.count(f"α {shift:.4f}") == 2 and line.count(f"mu {mu:.4f}") == 2
