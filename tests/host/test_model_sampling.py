"""Describe Model and Flow Shift on real ComfyUI models of every family."""

import copy
import inspect
import math

import comfy.model_sampling
import comfy.sample
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import nodes_model_advanced

from tidetable.nodes.model_sampling import DescribeModel, FlowShift
from tidetable.runtime.model_sampling import detect_family, patch_flow_shift, read_sampling
from tidetable.runtime.tiny import build_patcher, load_tiny_vae
from tidetable.schedules.families import FAMILIES, official_shift
from tidetable.schedules.prediction import target
from tidetable.schedules.shift import shift_t
from tidetable.tests.host.model_zoo import FLOW, ZOO, discrete
from tidetable.tests.host.samplings import sample, with_sampling


pytestmark = pytest.mark.usefixtures("in_a_node")
SIGMAS = torch.linspace(0.02, 1.0, 50)
NEWER_HOST = hasattr(ModelType, "FLOW_AV")


def fingerprint(model):
    """Everything about a MODEL that a node could change, by value and by identity."""
    return {
        "object_patches": dict(model.object_patches),
        "model_options": copy.deepcopy(model.model_options),
        "patches": dict(model.patches),
        "uuid": model.patches_uuid,
        "sampling": (id(model.model.model_sampling), id(model.get_model_object("model_sampling"))),
        "buffers": {k: v.tolist() for k, v in model.get_model_object("model_sampling").state_dict().items()},
        "weights": {k: (v.data_ptr(), v.double().sum().item()) for k, v in model.model_state_dict().items()},
    }


def shifted(model, shift):
    return patch_flow_shift(model, "shift", shift, 0.0, 64, 64)[0]


# ── Flow Shift ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FLOW)
def test_flow_shift_moves_the_table_and_nothing_else(models, name):
    model = models[name]
    before, old = fingerprint(model), model.get_model_object("model_sampling")
    patched, shift, mu = FlowShift.execute(model, "shift", 2.5, 0.0, 64, 64).args
    new = patched.get_model_object("model_sampling")
    assert (shift, mu) == (2.5, math.log(2.5))
    assert type(new) is type(old) and new is not old
    assert getattr(new, "multiplier", None) == getattr(old, "multiplier", None)
    assert new.sigmas.shape == old.sigmas.shape
    torch.testing.assert_close(new.timestep(SIGMAS), old.timestep(SIGMAS), rtol=0, atol=0)
    rows = torch.arange(1, len(new.sigmas) + 1, dtype=torch.float64) / len(new.sigmas)
    torch.testing.assert_close(new.sigmas.double(), shift_t(rows, 2.5), rtol=2e-6, atol=0)
    assert read_sampling(patched).shift == pytest.approx(2.5)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", FLOW)
def test_official_is_the_familys_rule(models, name):
    patched, shift, mu = FlowShift.execute(models[name], "official", 9.9, 9.9, 1664, 928).args
    assert (shift, mu) == official_shift(name, 1664, 928)
    assert read_sampling(patched).shift == pytest.approx(shift)
    assert math.exp(mu) == pytest.approx(shift)


def test_qwen_image_gets_its_2_2059(models):
    _, shift, mu = FlowShift.execute(models["qwen_image"], "official", 1.0, 0.0, 1664, 928).args
    assert mu == pytest.approx(0.79113, abs=5e-6) and shift == pytest.approx(2.2059, abs=5e-5)


@pytest.mark.parametrize("name", FLOW)
def test_mu_and_shift_are_one_setting(models, name):
    by_mu = FlowShift.execute(models[name], "mu", 9.0, 0.7, 64, 64).args
    by_shift = FlowShift.execute(models[name], "shift", math.exp(0.7), 9.0, 64, 64).args
    assert by_mu[1:] == pytest.approx(by_shift[1:])
    sigmas = [patched.get_model_object("model_sampling").sigmas for patched in (by_mu[0], by_shift[0])]
    torch.testing.assert_close(*sigmas)


@pytest.mark.parametrize(
    ("name", "core", "arguments"),
    [
        ("sd3", nodes_model_advanced.ModelSamplingSD3, (2.2,)),
        ("wan", nodes_model_advanced.ModelSamplingSD3, (2.2,)),
        ("auraflow", nodes_model_advanced.ModelSamplingAuraFlow, (2.2,)),
        ("z_image", nodes_model_advanced.ModelSamplingAuraFlow, (2.2,)),
        ("lumina2", nodes_model_advanced.ModelSamplingAuraFlow, (2.2,)),
        ("flux", nodes_model_advanced.ModelSamplingFlux, (math.log(2.2), math.log(2.2), 1024, 1024)),
        ("qwen_image", nodes_model_advanced.ModelSamplingFlux, (math.log(2.2), math.log(2.2), 1024, 1024)),
    ],
)
def test_same_as_the_core_node_where_that_is_the_right_one(models, name, core, arguments):
    patch = core().patch_aura if hasattr(core, "patch_aura") else core().patch
    theirs = patch(models[name], *arguments)[0].get_model_object("model_sampling")
    ours = shifted(models[name], 2.2).get_model_object("model_sampling")
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.timestep(SIGMAS), theirs.timestep(SIGMAS), rtol=0, atol=0)
    assert ours.percent_to_sigma(0.3) == pytest.approx(theirs.percent_to_sigma(0.3))


@pytest.mark.parametrize("name", ["sd3", "flux", "z_image"])
def test_shifts_are_set_not_stacked(models, name):
    twice = shifted(shifted(models[name], 6.0), 2.0)
    once = shifted(models[name], 2.0)
    sigmas = [patched.get_model_object("model_sampling").sigmas for patched in (twice, once)]
    assert torch.equal(*sigmas)
    assert set(twice.object_patches) == {"model_sampling"}


def test_starts_from_the_patched_object_not_from_the_checkpoint(models):
    # An eps checkpoint declared as flow by core's node: the checkpoint's own settings would give an eps model again.
    as_flow = nodes_model_advanced.ModelSamplingSD3().patch(models["sdxl"], 3.0)[0]
    patched = shifted(as_flow, 5.0)
    assert isinstance(patched.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    assert read_sampling(patched).shift == 5.0 and read_sampling(as_flow).shift == 3.0
    assert read_sampling(models["sdxl"]).shift is None
    with pytest.raises(ValueError, match="no official shift is known for Stable Diffusion XL.*Set family.*mode shift"):
        FlowShift.execute(as_flow, "official", 1.0, 0.0, 1024, 1024)


@pytest.mark.skipif(not NEWER_HOST, reason="this ComfyUI has no audio shift and no noise scale")
def test_audio_shift_and_noise_scale_stay(models):
    audio = with_sampling(models["sd3"], ModelType.FLOW_AV, shift=12.0, audio_shift=3.0, multiplier=1000)
    patched = shifted(audio, 6.0).get_model_object("model_sampling")
    assert patched.audio_shift == 3.0 and patched.audio_scale == pytest.approx(2.0)
    scaled = with_sampling(models["sd3"], ModelType.FLOW, shift=3.0, noise_scale=8.0)
    assert shifted(scaled, 6.0).get_model_object("model_sampling").noise_scale == 8.0
    assert "noise_scale 8" in DescribeModel.execute(scaled).args[0]


@pytest.mark.parametrize(
    ("sampling", "node"),
    [("eps", "Tidetable_Schedule"), ("v_prediction", "ZeroTerminalSNR"), ("x0", "ZeroTerminalSNR")],
)
def test_models_without_a_shift_are_sent_to_the_right_node(models, sampling, node):
    model = discrete(models["sdxl"], sampling)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"not a flow model but ModelSamplingDiscrete.*{node}"):
        FlowShift.execute(model, "shift", 3.0, 1.0, 1024, 1024)
    assert fingerprint(model) == before


def test_an_unknown_family_says_what_to_do(models):
    unknown = copy.copy(models["sd3"])
    unknown.model = copy.copy(models["sd3"].model)
    unknown.model.model_config = type("SomethingNew", (), {})()
    unknown.model.__class__ = type("NewNetwork", (type(models["sd3"].model),), {})
    with pytest.raises(ValueError, match=r"SomethingNew \(NewNetwork\).*Set family.*mode shift"):
        FlowShift.execute(unknown, "official", 3.0, 1.0, 1024, 1024)
    assert FlowShift.execute(unknown, "shift", 3.0, 1.0, 1024, 1024).args[1] == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("shift", math.nan, 1.0, 64, 64), "shift must be .*nan"),
        (("shift", math.inf, 1.0, 64, 64), "shift must be .*inf"),
        (("shift", 0.0, 1.0, 64, 64), "shift must be .*0.0"),
        (("shift", -3.0, 1.0, 64, 64), "shift must be .*-3.0"),
        (("mu", 1.0, math.nan, 64, 64), "mu must be .*nan"),
        (("mu", 1.0, 1e9, 64, 64), "mu must be .*1000000000"),
        (("official", 1.0, 1.0, 0, 64), "width and height .*0×64"),
        (("official", 1.0, 1.0, 64, -64), "width and height .*64×-64"),
        (("x" * 10_000, 1.0, 1.0, 64, 64), "unknown mode"),
    ],
)
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_flow_shift_refuses_bad_numbers(models, name, arguments, message):
    before = fingerprint(models[name])
    with pytest.raises(ValueError, match=message) as caught:
        FlowShift.execute(models[name], *arguments)
    assert len(str(caught.value)) < 500
    assert fingerprint(models[name]) == before


# ── Describe Model and what it reads ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ZOO)
def test_every_family_is_recognized(models, name):
    family = detect_family(models[name])
    assert family is FAMILIES[name]
    sampling = read_sampling(models[name])
    assert sampling.prediction == family.prediction
    assert sampling.process.name == family.process
    if family.process == "flow":
        assert sampling.multiplier == (family.multiplier or 1.0)


@pytest.mark.parametrize("name", ZOO)
def test_the_process_noises_as_the_host_does(models, name):
    sampling = read_sampling(models[name])
    host, process = sampling.host, sampling.process
    sigma = host.sigmas[[3, 400, 950]]
    x0, noise = (torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    theirs = host.calculate_input(sigma, host.noise_scaling(sigma, noise, x0))
    t = sigma.double() if process.name == "flow" else process.t_from_ratio(sigma.double())
    torch.testing.assert_close(process.mix(x0, noise, t), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_a_perfect_prediction_is_denoised_by_the_host_to_x0(models, name):
    sampling = read_sampling(models[name])
    host, process = sampling.host, sampling.process
    sigma = host.sigmas[[30, 400, 950]]
    x0, noise = (torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    t = sigma.double() if process.name == "flow" else process.t_from_ratio(sigma.double())
    value = target(sampling.prediction, x0, noise, t, process)
    denoised = host.calculate_denoised(sigma, value, host.noise_scaling(sigma, noise, x0))
    torch.testing.assert_close(denoised, x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ZOO)
def test_description_has_every_fact(models, name):
    output = DescribeModel.execute(models[name])
    text = output.args[0]
    assert output.ui.as_dict() == {"text": (text,)}
    facts = dict(line.split(": ", 1) for line in text.splitlines() if not line.startswith(" "))
    assert list(facts) == [
        "family", "prediction", "process", "shift", "timestep", "sigma range", "terminal SNR", "latent", "patches",
    ]  # fmt: skip
    sampling = read_sampling(models[name])
    assert FAMILIES[name].title in facts["family"] and facts["prediction"].startswith(sampling.prediction)
    assert f"{models[name].model.latent_format.latent_channels} channels" in facts["latent"]
    assert facts["patches"] == "none"
    if sampling.shift is not None:
        assert f"α {sampling.shift:.4f}" in facts["shift"] and f"mu {math.log(sampling.shift):.4f}" in facts["shift"]
        assert facts["terminal SNR"] == "0 (pure noise)"


@pytest.mark.parametrize("kind", [kind.name for kind in ModelType])
def test_every_model_type_of_the_host_can_be_described(models, kind):
    text = DescribeModel.execute(with_sampling(models["sd15"], ModelType[kind])).args[0]
    assert "sigma range" in text and "nan" not in text.replace("Hunyuan", "")


def test_description_counts_what_was_patched(models):
    model = shifted(models["sd3"], 2.0)
    keys = [key for key in model.model_state_dict() if key.endswith("qkv.weight")][:2]
    weights = model.model_state_dict()
    assert model.add_patches({key: ("diff", (torch.ones_like(weights[key]),)) for key in keys}, 0.5)
    model.model_options["transformer_options"]["optimized_attention_override"] = test_every_family_is_recognized
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    model.set_model_attn1_patch(lambda q, k, v, options: (q, k, v))
    model.add_wrapper_with_key("diffusion_model", "mine", lambda executor, *args: executor(*args))
    patches = DescribeModel.execute(model).args[0].split("\npatches:\n")[1]
    for expected in (
        "object model_sampling: ModelSamplingDiscreteFlow + CONST",
        "weights: 2 tensors changed (2 diff)",
        "sampling functions: sampler_post_cfg_function",
        "attention override: test_every_family_is_recognized",
        "attention and block patches: attn1_patch (1)",
        "wrappers: diffusion_model (1)",
    ):
        assert expected in patches


@pytest.mark.parametrize("execute", [DescribeModel.execute, lambda m: shifted(m, 2.0)])
def test_the_wrong_kind_of_thing_is_named(execute):
    for thing, name in ((None, "NoneType"), ("model", "str"), (load_tiny_vae().patcher, "_Resample")):
        with pytest.raises(ValueError, match=f"expected a diffusion MODEL, got {name}"):
            execute(thing)


# ── In use ──────────────────────────────────────────────────────────────────────────────────────────


def test_sampling_feels_the_shift_and_the_original_does_not():
    model = build_patcher("mmdit-flow")
    plain = sample(model, steps=3)
    moved = sample(shifted(model, 4.0), steps=3)
    assert torch.isfinite(moved).all() and not torch.allclose(moved, plain, atol=1e-4)
    assert torch.equal(sample(model, steps=3), plain)
    assert torch.equal(sample(shifted(model, 1.0), steps=3), plain)


def test_every_input_says_unit_zero_and_range():
    for node in (DescribeModel, FlowShift):
        schema = node.define_schema()
        assert schema.node_id.startswith("Tidetable_") and schema.category.startswith("Tidetable/")
        assert all(entry.tooltip for entry in schema.inputs) and all(out.display_name for out in schema.outputs)
        assert set(inspect.signature(node.execute).parameters) == {entry.id for entry in schema.inputs}
