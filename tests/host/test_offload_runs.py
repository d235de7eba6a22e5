"""Whole runs with weights in main memory: what is learned, how they end, what else is loaded, what is refused."""

import logging
from types import SimpleNamespace

import comfy.model_management
import comfy.model_patcher
import nodes as host_nodes
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy.patcher_extension import CallbacksMP

from tidetable.nodes.training_memory import TrainingMemory
from tidetable.runtime import tiny, trainable
from tidetable.runtime.finetune import finetune
from tidetable.runtime.gradients import untested_offload
from tidetable.runtime.offload import load
from tidetable.runtime.sharding import shared_base
from tidetable.runtime.training import TrainingData, train_lora
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.gradient_cases import gradients, network_of, prompts_of, samples_of
from tidetable.tests.host.guidance_models import build, normal, prompt, sample
from tidetable.tests.host.quantized_models import FORMATS, plain_twin
from tidetable.tests.host.test_gradients import relative
from tidetable.tests.host.test_offload import TOLERANCE, borrowed, by_comfyui_alone, patched, session
from tidetable.tests.host.test_quantized import made
from tidetable.tests.host.test_tiny import encode
from tidetable.tests.host.test_training_previews import made as preview_of
from tidetable.tests.host.test_training_run import cancel_at
from tidetable.tests.host.training_runs import quick_run
from tidetable.training.config import LoRAConfig, TrainConfig
from tidetable.training.distributed import World
from tidetable.training.memory import MemoryConfig


pytestmark = pytest.mark.usefixtures("output")

CONFIG = TrainConfig(steps=4, batch_size=2, learning_rate=1e-2, warmup_steps=0, seed=3)
LORA = LoRAConfig(rank=4, lora_alpha=4.0)
OFFLOAD = MemoryConfig(base_weights="offload")
DATA = TrainingData([{"samples": normal(4, 3, 16, 24)}], [prompt(seed) for seed in range(4)])


def train(model, data=DATA, **settings):
    with torch.inference_mode():
        return train_lora(model, data, CONFIG, LORA, **settings)


def difference(first, second):
    """Of two LoRAs, relative to the second."""
    names = [name for name in second if not name.endswith("alpha")]
    return relative([first[name] for name in names], [second[name] for name in names])


@pytest.fixture(scope="module")
def plain():
    """(MODEL, LoRA of a plain run, a picture of the MODEL)."""
    model = inference_copy(build("unet"))
    with torch.inference_mode():
        picture = sample(model)
    return model, train(model).lora, picture


EVERYTHING = MemoryConfig(base_weights="offload", gradient_checkpointing="blocks", offload_activations=True)


@pytest.mark.parametrize("memory", [OFFLOAD, MemoryConfig(base_weights="auto"), EVERYTHING])
def test_a_run_learns_the_same_and_leaves_the_model_as_it_was(plain, memory):
    model, expected, picture = plain
    before = fingerprint(model)
    assert difference(train(model, memory=memory).lora, expected) < 1e-4
    assert fingerprint(model) == before
    with torch.inference_mode():
        assert torch.equal(sample(model), picture)
    assert not model.model.model_lowvram, "to sample, ComfyUI loads it as ever"


def test_a_run_goes_on_with_another_place_for_the_weights(plain, monkeypatch):
    model, expected, _ = plain
    with monkeypatch.context() as patch:
        cancel_at(2, patch)
        with pytest.raises(InterruptProcessingException):
            train(model, run=quick_run())
    result = train(model, run=quick_run(resume="auto"), memory=OFFLOAD)
    assert difference(result.lora, expected) < 1e-4


@pytest.mark.parametrize("end", ["cancel", "error"])
def test_a_run_that_ends_early_leaves_the_model_as_it_was(plain, end, monkeypatch):
    model, _, picture = plain
    before, calls = fingerprint(model), []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a kernel failed")

    with monkeypatch.context() as patch:
        handle = None
        if end == "cancel":
            cancel_at(2, patch)
        else:
            handle = model.model.diffusion_model.out[2].register_forward_pre_hook(fail)
        with pytest.raises(InterruptProcessingException if end == "cancel" else RuntimeError):
            train(model, memory=OFFLOAD)
        if handle is not None:
            handle.remove()
    assert fingerprint(model) == before
    with torch.inference_mode():
        assert torch.equal(sample(model), picture)


def test_a_preview_samples_with_the_weights_where_they_are_and_disturbs_nothing(plain):
    model, clip, vae = plain[0], tiny.load_tiny_clip(), tiny.load_tiny_vae()
    with torch.inference_mode():
        prompts = [encode(clip, "a letter")], encode(clip, "")
    expected = train(model, memory=OFFLOAD).lora
    result = train(model, memory=OFFLOAD, preview=preview_of(model, prompts, vae=[vae]))
    assert difference(result.lora, expected) == 0 and len(result.ui["images"]) == 2


def test_what_is_not_trained_leaves_the_device_and_comes_back(plain):
    model, clip, vae = plain[0], tiny.load_tiny_clip(), tiny.load_tiny_vae()
    image, seen = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0)), []

    def used():
        with torch.inference_mode():
            return encode(clip, "a red circle")[0][0], host_nodes.VAEEncode().encode(vae, image)[0]["samples"]

    def loaded():
        return {id(patcher.model) for patcher in comfy.model_management.loaded_models()}

    before, others = used(), {id(clip.patcher.model), id(vae.patcher.model)}
    assert others <= loaded()
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda *_: seen.append(loaded()))
    for memory in (None, OFFLOAD):
        used()
        train(model, memory=memory)
    handle.remove()
    assert seen and all(found == {id(model.model)} for found in seen)
    assert all(torch.equal(a, b) for a, b in zip(used(), before, strict=True)) and others <= loaded()


# ── weights that ComfyUI leaves in main memory ──────────────────────────────────────────────────────────────────────


def test_weights_that_do_not_fit_are_said_with_the_way_out(plain, monkeypatch):
    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", run_out)
    text = r"weights, \d+\.\d GB, do not fit cpu with base_weights 'full': .* to 'auto' or 'offload'.*20\.00 MiB"
    with pytest.raises(torch.OutOfMemoryError, match=text), trainable.training_session(plain[0]):
        raise AssertionError("there is nothing to train")


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_model_that_comfyui_does_not_load_in_full_is_right_with_full_too(share):
    """Part of its weights in main memory, as where they do not fit, or all, as with --novram whatever is asked for."""
    model = network_of("sd15")
    with session("sd15", model, "full") as (denoiser, trained, loss):
        plain = gradients(denoiser, trained, loss)

    def leave(patcher, *_):
        patcher.partially_unload(patcher.offload_device, share * patcher.model_size())

    with borrowed(model) as (other, _):
        other.add_callback(CallbacksMP.ON_LOAD, leave)
        with session("sd15", other, "full") as (denoiser, trained, loss):
            loaded = denoiser.patcher.loaded_size() / denoiser.patcher.model_size()
            assert denoiser.real.model_lowvram and loaded == pytest.approx(1 - share, abs=0.2)
            assert relative(gradients(denoiser, trained, loss), plain) < TOLERANCE


@pytest.mark.parametrize("right", [True, False])
def test_on_a_device_that_nobody_tested_it_is_proven_or_refused(right, monkeypatch, caplog):
    data = TrainingData([{"samples": samples_of("sd3")}], prompts_of("sd3"))
    monkeypatch.setattr("tidetable.runtime.gradients.untested_offload", lambda denoiser: "nobody tested this")
    if not right:
        by_comfyui_alone(monkeypatch)
    with borrowed(network_of("sd3")) as (model, _), caplog.at_level(logging.INFO):
        if right:
            assert train(model, data, memory=OFFLOAD).lora
            assert "nobody tested this; its gradients were checked on the first batch" in caplog.text
        else:
            with pytest.raises(ValueError, match="nobody tested this, and on the first batch its gradients are wrong"):
                train(model, data, memory=OFFLOAD)


def test_weights_on_another_device_than_the_run_are_noticed():
    with session("sd3", network_of("sd3"), "offload") as (denoiser, _, _):
        assert untested_offload(denoiser) == ""
        denoiser.device = torch.device("cuda")
        assert "cast from main memory to cuda" in untested_offload(denoiser)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_weights_of_another_type_than_the_run_are_cast_again_too(name):
    """A MODEL in fp32 that computes in bf16: the same gradients, to the rounding of bf16."""
    found = {}
    for base in ("full", "auto", "offload"):
        model = network_of(name)
        model.set_model_compute_dtype(torch.bfloat16)
        with session(name, model, base) as (denoiser, trained, loss):
            found[base] = gradients(denoiser, trained, loss)
    assert relative(found["auto"], found["full"]) < 1e-2 and relative(found["offload"], found["full"]) < 1e-2


@pytest.mark.parametrize(
    "kind", [kind for kind in ("fp8", "mixed_fast", "int8_tensorwise", "packed") if kind in FORMATS]
)
def test_a_quantized_base_can_be_in_main_memory(kind):
    model = made(kind)
    with session("sd3", plain_twin(model, "sd3"), "full") as (denoiser, trained, loss):
        expected = gradients(denoiser, trained, loss)
    with session("sd3", model, "offload") as (denoiser, trained, loss):
        assert relative(gradients(denoiser, trained, loss), expected) < TOLERANCE


def test_a_lora_that_comfyui_would_leave_out_is_refused():
    """SD3's RMSNorm cannot cast its weight, and a model that is loaded in part has it without the LoRA."""
    model = network_of("sd3")
    key = next(name for name, _ in model.model.named_parameters() if name.endswith("ln_q.weight"))
    model.add_patches({key: ("diff", (normal(*model.model.get_parameter(key).shape),))})
    with session("sd3", model, "auto"):
        pass
    refused = pytest.raises(ValueError, match=r"changes diffusion_model.*ln_q.weight, and ComfyUI leaves that out")
    with refused, session("sd3", model, "offload"):
        pass


def test_weights_in_main_memory_are_not_shared():
    """Each of several processes holds a share on its device, or they are in main memory; not both."""
    with session("sd3", network_of("sd3"), "offload") as (denoiser, _, _):
        trainer = SimpleNamespace(world=World(0, 2))
        with pytest.raises(ValueError, match="set base_weights to 'full'"), shared_base(denoiser, trainer, OFFLOAD):
            pass


@pytest.mark.parametrize(
    ("memory", "factor"),
    [
        (None, 4),
        (OFFLOAD, 4),
        (MemoryConfig(base_weights="auto"), 30),
        (MemoryConfig(base_weights="auto", offload_activations=True), 4),
        (MemoryConfig(base_weights="auto", gradient_checkpointing="blocks"), 4),
        (MemoryConfig(base_weights="auto", gradient_checkpointing="blocks", every=2), 17),
    ],
)
def test_weights_make_room_for_what_a_step_keeps(plain, memory, factor, monkeypatch):
    asked, original = [], trainable.load
    monkeypatch.setattr(trainable, "load", lambda *given: asked.append(given[2]) or original(*given))
    train(plain[0], memory=memory)
    assert asked == [pytest.approx(factor * plain[0].model.memory_required([CONFIG.batch_size, 3, 16, 24]))]


def test_weights_that_are_trained_are_on_the_device(plain):
    with pytest.raises(ValueError, match="training all weights needs all weights on the device"):
        finetune(plain[0], DATA, CONFIG, quick_run(), OFFLOAD)


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_card_that_keeps_everything_has_nowhere_to_put_the_weights():
    card = torch.device("cuda")
    model = comfy.model_patcher.ModelPatcher(network_of("sd3").model, load_device=card, offload_device=card)
    with pytest.raises(ValueError, match="started with --highvram or --gpu-only"):
        load(model, [], 0, "offload")


def test_the_node_and_its_values():
    given = {"gradient_checkpointing": "off", "every": 1, "base_weights": "auto", "offload_activations": False}
    assert (
        TrainingMemory.execute(**given).args[0] == MemoryConfig(base_weights="auto")
        and MemoryConfig().base_weights == "full"
    )
    with pytest.raises(ValueError, match="base_weights"):
        MemoryConfig(base_weights="half")


def test_a_patched_model_is_trained_as_it_is_sampled():
    """A LoRA of the user's on weights in main memory takes part: the run is not that of the bare MODEL."""
    data, model = TrainingData([{"samples": samples_of("sd15")}], prompts_of("sd15")), patched("sd15")
    expected, got = train(model, data).lora, train(model, data, memory=OFFLOAD).lora
    assert difference(got, expected) < 1e-4 < difference(train(network_of("sd15"), data).lora, expected)
