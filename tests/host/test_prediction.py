"""Prediction on real ComfyUI models of every process, and a prompt with all of its neighbors."""

import itertools
import math

import comfy.model_sampling as host_sampling
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import nodes_model_advanced

from tidetable.nodes.model_sampling import DescribeModel, FlowShift
from tidetable.nodes.prediction import FlowGraft, Prediction, ZeroTerminalSNR
from tidetable.runtime.model_sampling import patch_flow_shift, read_sampling
from tidetable.runtime.process import prediction_of, process_of
from tidetable.runtime.tiny import build_patcher, load_tiny_vae
from tidetable.runtime.trainable import training_session
from tidetable.schedules.prediction import target
from tidetable.schedules.process import Flow
from tidetable.tests.host.comparing import fingerprint
from tidetable.tests.host.exact_networks import ExactNetwork, denoised, with_network
from tidetable.tests.host.model_zoo import discrete, zoo
from tidetable.tests.host.samplings import sample, sampling, with_sampling, without_class


pytestmark = pytest.mark.usefixtures("in_a_node")
FLOW = ("sd3", "flux", "auraflow", "wan")
NEWER_HOST = hasattr(ModelType, "FLOW_AV")


def read_as(model, prediction):
    return Prediction.execute(model, prediction).args[0]


# ── every combination is exact ──────────────────────────────────────────────────────────────────────


def continuous(kind, sigma_max, sigma_min):
    return lambda model: nodes_model_advanced.ModelSamplingContinuousEDM().patch(model, kind, sigma_max, sigma_min)[0]


def rows(model):
    table = sampling(model).sigmas.double()
    return lambda timestep: table[timestep.long()]


PROCESSES = {
    # name: (family, how the MODEL gets its schedule, level of a timestep, predictions)
    "vp table": ("sd15", lambda m: m, rows, ("eps", "v", "x0", "velocity", "edm")),
    "zero-terminal table": (
        "sd15",
        lambda m: ZeroTerminalSNR.execute(discrete(m, "x0")).args[0],
        rows,
        ("v", "x0", "velocity", "edm"),
    ),
    "zero-terminal table, capped": (
        "sdxl",
        lambda m: ZeroTerminalSNR.execute(m, 160.0).args[0],
        rows,
        ("eps", "v", "x0", "velocity", "edm"),
    ),
    "edm range": (
        "sd15",
        continuous("edm", 80.0, 0.002),
        lambda m: lambda timestep: (4.0 * timestep).exp(),
        ("eps", "v", "x0", "velocity", "edm"),
    ),
    "v range": (
        "sd15",
        lambda m: nodes_model_advanced.ModelSamplingContinuousV().patch(m, "v_prediction", 500.0, 0.03)[0],
        lambda m: lambda timestep: (timestep * math.pi / 2).tan(),
        ("eps", "v", "x0", "velocity", "edm"),
    ),
    "flow, t·1000": ("sd3", lambda m: m, lambda m: lambda timestep: timestep / 1000.0, ("velocity", "v", "x0")),
    "flow, t": ("auraflow", lambda m: m, lambda m: lambda timestep: timestep, ("velocity", "v", "x0")),
    "flow, mu": ("flux", lambda m: m, lambda m: lambda timestep: timestep, ("velocity", "v", "x0")),
    "flow, video": ("wan", lambda m: m, lambda m: lambda timestep: timestep / 1000.0, ("velocity", "v", "x0")),
    "flow, grafted": (
        "sdxl",
        lambda m: FlowGraft.execute(m, 3.0).args[0],
        lambda m: lambda timestep: timestep / 1000.0,
        ("velocity", "v", "x0"),
    ),
}
COMBINATIONS = [(process, kind) for process, case in PROCESSES.items() for kind in case[-1]]


@pytest.mark.parametrize(("process", "kind"), COMBINATIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_an_exact_network_of_that_kind_is_denoised_exactly(process, kind, batch):
    family, prepare, level, _ = PROCESSES[process]
    model = read_as(prepare(zoo(family)), kind)
    host, flow = sampling(model), read_sampling(model).shift is not None
    with_network(model, ExactNetwork(kind, flow, level(model), float(getattr(host, "sigma_data", 1.0))))
    shape = (batch, 16, 2, 4, 4) if family == "wan" else (batch, 4, 4, 4)
    x0, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    model.patch_model()  # installs the object patches, as loading does
    try:
        for rows_of_batch in ([0, 17, 400], [-1, -1, -1], [900, 30, -1]):
            sigma = host.sigmas[rows_of_batch[:batch]]
            x = host.noise_scaling(sigma, noise, x0)
            alpha = 1.0 - sigma.double() if flow else torch.ones(batch, dtype=torch.float64)
            exact = denoised(x.double(), alpha, sigma.double()).float()
            # A sample of 4518·noise has that many times the rounding.
            atol = 2e-5 * max(1.0, float(x.abs().max()) / 100)
            torch.testing.assert_close(model.model.apply_model(x, sigma), exact, rtol=2e-5, atol=atol)
    finally:
        model.unpatch_model()


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "euler_ancestral"])
@pytest.mark.parametrize(
    ("name", "kinds", "level"),
    [
        ("unet-eps", ("eps", "v", "x0", "velocity", "edm"), rows),
        ("unet-v", ("v", "x0", "velocity", "edm"), rows),
        ("mmdit-flow", ("velocity", "v", "x0"), lambda model: lambda timestep: timestep / 1000.0),
    ],
)
def test_ode_and_sde_samplers_draw_the_same_from_every_prediction(name, kinds, level, sampler):
    pictures = []
    for kind in kinds:
        model = read_as(build_patcher(name), kind)
        flow = read_sampling(model).shift is not None
        pictures.append(sample(with_network(model, ExactNetwork(kind, flow, level(model))), sampler))
    assert torch.isfinite(pictures[0]).all()
    for picture in pictures[1:]:
        # float32 at sigma 4518 holds a sample to 5e-4
        torch.testing.assert_close(picture, pictures[0], rtol=0, atol=5e-3 if name == "unet-v" else 1e-4)


# ── what stays, and what other nodes see ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("process", "kind"), COMBINATIONS)
def test_only_the_reading_changes(models, process, kind):
    family, prepare, _, _ = PROCESSES[process]
    model = prepare(models[family])
    before, old = fingerprint(model), sampling(model)
    state = without_class(old)
    new = sampling(read_as(model, kind))
    assert without_class(new) == state and new is not old and without_class(old) == state
    assert fingerprint(model) == before
    levels = old.sigmas[[3, 500, -1]]
    assert torch.equal(new.timestep(levels), old.timestep(levels))
    assert new.percent_to_sigma(0.4) == old.percent_to_sigma(0.4)
    # What samplers and other packs ask for is true.
    assert isinstance(new, host_sampling.CONST) == isinstance(old, host_sampling.CONST)
    assert isinstance(new, host_sampling.V_PREDICTION) == (
        kind in ("v", "edm") and not isinstance(old, host_sampling.CONST)
    )
    assert prediction_of(new) == (None if kind == "edm" else kind)
    assert len(type(new).__bases__) == 2


def test_every_prediction_from_every_other_one(models):
    for first, second in itertools.permutations(("eps", "v", "x0", "velocity", "edm"), 2):
        twice = sampling(read_as(read_as(models["sd15"], first), second))
        once = sampling(read_as(models["sd15"], second))
        assert type(twice).__bases__ == type(once).__bases__
    for first, second in itertools.permutations(("velocity", "v", "x0"), 2):
        assert prediction_of(sampling(read_as(read_as(models["flux"], first), second))) == second


@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize("kind", ["v", "x0"])
def test_shift_and_prediction_in_either_order(models, name, kind):
    first = read_as(patch_flow_shift(models[name], "shift", 5.0, 0.0, 64, 64)[0], kind)
    last = FlowShift.execute(read_as(models[name], kind), "shift", 5.0, 0.0, 64, 64).args[0]
    assert without_class(sampling(first)) == without_class(sampling(last))
    for model in (first, last):
        assert read_sampling(model).shift == pytest.approx(5.0) and read_sampling(model).prediction == kind
    text = DescribeModel.execute(last).args[0]
    assert f"\nprediction: {kind}" in text and {"v": "FlowV", "x0": "FlowX0"}[kind] in text


@pytest.mark.parametrize(
    ("family", "core", "kind"),
    [
        ("sd3", lambda m: nodes_model_advanced.ModelSamplingSD3().patch(m, 6.0)[0], "x0"),
        ("auraflow", lambda m: nodes_model_advanced.ModelSamplingAuraFlow().patch_aura(m, 6.0)[0], "v"),
        ("flux", lambda m: nodes_model_advanced.ModelSamplingFlux().patch(m, 1.5, 0.5, 1024, 1024)[0], "x0"),
        ("sdxl", lambda m: discrete(m, "v_prediction", zsnr=True), "x0"),
        ("sdxl", continuous("eps", 200.0, 0.01), "v"),
    ],
)
def test_core_nodes_before_it_are_kept_and_after_it_have_the_last_word(models, family, core, kind):
    before = core(models[family])
    composed = sampling(read_as(before, kind))
    assert without_class(composed) == without_class(sampling(before)) and prediction_of(composed) == kind
    # A core node builds anew from the checkpoint's settings: the prediction is then the one that it sets.
    after = sampling(core(read_as(models[family], kind)))
    assert type(after).__bases__ == type(sampling(before)).__bases__


@pytest.mark.skipif(not NEWER_HOST, reason="this ComfyUI has no audio shift and no noise scale")
@pytest.mark.parametrize("kind", ["v", "x0", "velocity"])
def test_audio_shift_and_noise_scale_stay(models, kind):
    audio = with_sampling(models["sd3"], ModelType.FLOW_AV, shift=12.0, audio_shift=3.0, multiplier=1000)
    assert sampling(read_as(audio, kind)).audio_scale == pytest.approx(4.0)
    scaled = sampling(read_as(with_sampling(models["sd3"], ModelType.FLOW, shift=3.0, noise_scale=8.0), kind))
    assert scaled.noise_scale == 8.0
    x0, noise = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    sigma = scaled.sigmas[[300, 900]]
    value = target(kind, x0, 8.0 * noise, sigma, Flow())
    denoised = scaled.calculate_denoised(sigma, value, scaled.noise_scaling(sigma, noise, x0))
    torch.testing.assert_close(denoised, x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind", "process"),
    [
        ("mmdit-flow", "v", "flow"),
        ("mmdit-flow", "x0", "flow"),
        ("unet-eps", "velocity", "vp"),
        ("unet-eps", "x0", "vp"),
    ],
)
def test_the_trainer_trains_on_the_same_terms(name, kind, process):
    with training_session(read_as(build_patcher(name), kind)) as denoiser:
        assert denoiser.prediction == kind and denoiser.process.name == process
    with training_session(FlowGraft.execute(build_patcher("unet-eps"), 2.5).args[0]) as denoiser:
        assert (denoiser.prediction, denoiser.process, denoiser.shift) == ("velocity", Flow(), 2.5)


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────


def refused(model, kind, message):
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message) as caught:
        Prediction.execute(model, kind)
    assert len(str(caught.value)) < 500 and fingerprint(model) == before


def test_eps_in_pure_noise_is_refused_with_the_way_out(models):
    zero = ZeroTerminalSNR.execute(discrete(models["sdxl"], "v_prediction")).args[0]
    refused(zero, "eps", r"pure noise \(largest sigma 4518.76\).*Use v, x0 or velocity, or cap sigma.*sigma_cap 160")
    for name in FLOW:
        refused(models[name], "eps", r"pure noise \(largest sigma 1\).*choose velocity, v or x0")
    capped = ZeroTerminalSNR.execute(zero, 160.0).args[0]
    assert read_sampling(read_as(capped, "eps")).prediction == "eps"


def test_edm_on_flow_and_unknown_names_are_refused(models):
    refused(models["flux"], "edm", "Karras.*flow model.*Choose velocity, v or x0")
    refused(models["sd15"], "x" * 10_000, "unknown prediction 'xxx.*use one of eps, v, x0, velocity, edm")


@pytest.mark.parametrize("kind", ["FLOW_COSMOS", "IMG_TO_IMG", "IMG_TO_IMG_FLOW", "V_PREDICTION_DDPM"])
def test_models_with_an_input_of_their_own_are_refused(models, kind):
    if kind not in ModelType.__members__:
        pytest.skip("not in this ComfyUI")
    refused(with_sampling(models["sd15"], ModelType[kind]), "v", "feeds its network in its own way")


def test_a_class_with_methods_of_its_own_is_not_taken_apart(models):
    class Theirs(host_sampling.ModelSamplingDiscrete, host_sampling.EPS):
        def timestep(self, sigma):
            return super().timestep(sigma) + 1

    model = models["sd15"].clone()
    model.add_object_patch("model_sampling", Theirs(model.model.model_config))
    refused(model, "v", r"test_prediction.Theirs has methods of its own \(timestep\).*Place Prediction before")


@pytest.mark.parametrize("execute", [lambda m: Prediction.execute(m, "v"), lambda m: FlowGraft.execute(m, 3.0)])
def test_the_wrong_kind_of_thing_is_named(execute):
    for thing, name in ((None, "NoneType"), ("model", "str"), (load_tiny_vae().patcher, "_Resample")):
        with pytest.raises(ValueError, match=f"expected a diffusion MODEL, got {name}"):
            execute(thing)


# ── one table, and a server ─────────────────────────────────────────────────────────────────────────


def test_process_and_prediction_are_read_off_one_table(models):
    for name in ("sd15", "sd3", "flux"):
        assert prediction_of(sampling(models[name])) == read_sampling(models[name]).prediction
    if "V_PREDICTION_DDPM" in ModelType.__members__:  # its network is given the unscaled sample: not to be trained on
        assert process_of(sampling(with_sampling(models["sd15"], ModelType.V_PREDICTION_DDPM))) is None


def test_a_prompt_with_all_of_them(client):
    """Also a prompt from before Zero Terminal SNR had a cap: new inputs may be missing."""
    prompt = {
        "1": {"class_type": "Tidetable_LoadTinyModel", "inputs": {"name": "unet-v"}},
        "2": {"class_type": "Tidetable_ZeroTerminalSNR", "inputs": {"model": ["1", 0]}},
        "3": {"class_type": "Tidetable_Prediction", "inputs": {"model": ["2", 0], "prediction": "x0"}},
        "4": {"class_type": "Tidetable_DescribeModel", "inputs": {"model": ["3", 0]}},
        "5": {"class_type": "Tidetable_LoadTinyModel", "inputs": {"name": "unet-eps"}},
        "6": {"class_type": "Tidetable_FlowGraft", "inputs": {"model": ["5", 0], "shift": 3.0}},
        "7": {"class_type": "Tidetable_DescribeModel", "inputs": {"model": ["6", 0]}},
        "8": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "9": {
            "class_type": "Tidetable_ConvertPrediction",
            "inputs": {
                "noisy": ["8", 0], "prediction": ["8", 0], "source": "v", "dest": "x0", "process": "vp", "sigma": 1.0,
            },
        },
        "10": {"class_type": "SaveLatent", "inputs": {"samples": ["9", 0], "filename_prefix": "converted"}},
    }  # fmt: skip
    outputs = client.run(prompt).outputs
    assert outputs["2"]["text"][0].startswith("checkpoint: marked as zero terminal SNR")
    assert "\nprediction: x0" in outputs["4"]["text"][0] and "4518.76" in outputs["4"]["text"][0]
    assert "\nprediction: velocity" in outputs["7"]["text"][0]
    assert "10" in outputs
