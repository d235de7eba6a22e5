"""Training with weights in main memory: the gradients of the plain path, no weight kept for backward, all put back."""

import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import comfy.ops
import pytest
import torch

from tidetable.runtime import trainable
from tidetable.runtime.gradients import blocks_of
from tidetable.runtime.lora_keys import apply_lora, to_lora_model
from tidetable.runtime.offload import recomputing
from tidetable.runtime.quantized import dequantizing
from tidetable.runtime.text_encoder import LiveText, TextEncoder, TextEncoderConfig
from tidetable.runtime.trainable import training_session
from tidetable.runtime.training_run import _weights
from tidetable.tests.host.comparing import fingerprint
from tidetable.tests.host.gradient_cases import adapters, gradients, loss_of, network_of, prompts_of, samples_of
from tidetable.tests.host.guidance_models import normal
from tidetable.tests.host.test_gradients import CASES_HERE, relative
from tidetable.tests.host.text_models import CAPTIONS, ENCODERS, FAMILIES, small_clip, small_model, training_data
from tidetable.training.adapter_kinds import AdapterNetwork
from tidetable.training.adapter_settings import AdapterConfig
from tidetable.training.adapters import select_targets
from tidetable.training.checkpoint import digest
from tidetable.training.recompute import recomputed


TOLERANCE = 1e-5
VARIANTS = ("sd20", "refiner", "unet_without_middle", "sd35_medium", "auraflow_double", "flux_double", "flux2",
            "chroma_radiance", "hunyuan_video_double", "hunyuan_image", "wan_vace")  # fmt: skip
"""Networks with the layers of another one, left out here for time."""
FAMILIES_HERE = [case for case in CASES_HERE if case.values[0] not in VARIANTS]


@contextmanager
def session(name, model, base_weights, make=adapters):
    """(denoiser, adapters, loss) of a family, its weights on the device or in main memory."""
    with training_session(model, base_weights=base_weights) as denoiser:
        dataset, trained = denoiser.dataset(list(samples_of(name)), prompts_of(name)), make(denoiser)
        with trained.installed():
            yield denoiser, trained, lambda: loss_of(denoiser, dataset)


def patched(name):
    """A MODEL of the family with a LoRA on it, and a change of every weight besides that ComfyUI can cast."""
    model = network_of(name)
    with session(name, model, "full") as (_, trained, _):
        model = apply_lora(model, to_lora_model(trained, {}))
    modules = [(key, m) for key, m in model.model.named_modules() if hasattr(m, "comfy_cast_weights")]
    others = [(f"{key}.{name}", p) for key, m in modules for name, p in m.named_parameters() if p.ndim != 2]
    scales = [0.1 / p[0].numel() ** 0.5 for _, p in others]
    model.add_patches(
        {key: ("diff", (scale * normal(*p.shape, seed=3),)) for scale, (key, p) in zip(scales, others, strict=True)}
    )
    return model


def found(model):
    """Its fingerprint but for the kind of its tensors: where ComfyUI takes a LoRA off again it makes new ones."""
    return {name: value for name, value in fingerprint(model).items() if name not in ("inference", "requires_grad")}


def away(denoiser):
    """How many layers cast their weights, and how many of them with patches on the way."""
    layers = [m for m in denoiser.real.modules() if getattr(m, "comfy_cast_weights", False)]
    return len(layers), sum(bool(m.weight_function or m.bias_function) for m in layers)


@pytest.mark.parametrize("name", FAMILIES_HERE)
def test_the_gradients_are_those_of_weights_on_the_device(name):
    model = patched(name)
    before = found(model)
    with session(name, model, "full") as (denoiser, trained, loss):
        assert away(denoiser) == (0, 0) and not any("forward" in vars(m) for m in denoiser.real.modules())
        plain, value = gradients(denoiser, trained, loss), loss().item()
    with session(name, model, "offload") as (denoiser, trained, loss):
        count, with_patches = away(denoiser)
        assert count > 10 and with_patches > 10 and denoiser.real.model_lowvram
        assert loss().item() == pytest.approx(value, rel=TOLERANCE)
        assert relative(gradients(denoiser, trained, loss), plain) < TOLERANCE
        with recomputed(blocks_of(denoiser.real.diffusion_model)):
            assert relative(gradients(denoiser, trained, loss), plain) < TOLERANCE
    assert found(model) == before


def by_comfyui_alone(monkeypatch):
    """From now on weights are cast as ComfyUI casts them, and autograd does the rest."""
    for name in ("dequantizing", "recomputing"):
        monkeypatch.setattr(trainable, name, lambda _: nullcontext())


@contextmanager
def borrowed(model):
    """Every cast weight in one and the same buffer, as newer ComfyUI casts on a GPU; yields weak references to them."""
    size = max(p.numel() for p in model.model.parameters())
    buffer, given = torch.empty(size), []

    def cast(weight):
        # A tensor of its own on the same memory: autograd's own check for overwritten tensors does not see it.
        copy = torch.empty(0).set_(buffer.untyped_storage(), 0, weight.shape)
        given.append(weakref.ref(copy.copy_(weight)))
        return copy

    clone = model.clone()
    for key, module in clone.model.named_modules():
        known = isinstance(module, comfy.ops.disable_weight_init.Linear | comfy.ops.disable_weight_init.LayerNorm)
        if known and module.weight is not None:
            clone.add_weight_wrapper(f"{key}.weight", cast)
    yield clone, given


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_cast_weight_is_used_only_until_the_next_one(name, monkeypatch):
    """And none is alive after a forward pass: with autograd's own backward all are, and the gradients are wrong."""
    model = network_of(name)
    with session(name, model, "full") as (denoiser, trained, loss):
        plain = gradients(denoiser, trained, loss)
    with borrowed(model) as (other, given):
        with session(name, other, "offload") as (denoiser, trained, loss):
            assert relative(gradients(denoiser, trained, loss), plain) < TOLERANCE
            given.clear()
            value = loss()
            assert len(given) > 10 and not any(reference() is not None for reference in given)
            del value
        by_comfyui_alone(monkeypatch)
        with session(name, other, "offload") as (denoiser, trained, loss):
            given.clear()
            value = loss()
            assert sum(reference() is not None for reference in given) > 10
            del value
            assert relative(gradients(denoiser, trained, loss), plain) > 0.1


def saved_bytes(loss):
    """Bytes that autograd keeps for backward, by distinct memory."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    return sum(kept.values()), value


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_backward_keeps_no_weights(name, monkeypatch):
    """What is kept for backward is the activations: by ComfyUI's path alone it is a copy of every weight besides."""
    model = patched(name)
    with session(name, model, "offload") as (denoiser, _, loss):
        weights = denoiser.patcher.model_size()
        kept, _ = saved_bytes(loss)
    by_comfyui_alone(monkeypatch)
    with session(name, model, "offload") as (_, _, loss):
        naive, _ = saved_bytes(loss)
    assert naive - kept > 0.9 * weights


KINDS = [
    {"kind": "lora", "initialization": "pissa"},
    {"kind": "dora"},
    {"kind": "dora_input"},
    {"kind": "loha"},
    {"kind": "lokr"},
]


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: settings["kind"])
def test_every_kind_of_adapter_sees_the_weights_as_they_act(settings):
    """DoRA and PiSSA read the weight and the bias: with a LoRA of the user's on a weight in main memory as well."""

    def make(denoiser):
        layers = select_targets(dict(denoiser.real.diffusion_model.named_modules()), "linear")
        network = AdapterNetwork(layers, AdapterConfig(rank=2, lora_alpha=2.0, **settings), denoiser.device)
        for i, parameter in enumerate(network.trainable()):
            parameter.data += 0.1 * normal(*parameter.shape, seed=i)
        return network

    results, model = {}, patched("sd15")
    for base in ("full", "offload"):
        with session("sd15", model, base, make) as (denoiser, trained, loss):
            results[base] = loss().item(), gradients(denoiser, trained, loss)
    assert results["offload"][0] == pytest.approx(results["full"][0], rel=TOLERANCE)
    assert relative(results["offload"][1], results["full"][1]) < TOLERANCE


def test_a_run_is_known_again_wherever_the_weights_are():
    """The values by which a saved run is found are those of the patched weights in both cases."""
    names, model = [], patched("flux")
    for one, base in ((model, "full"), (model, "offload"), (network_of("flux"), "offload")):
        with training_session(one, base_weights=base) as denoiser:
            names.append(digest(_weights(denoiser.real.diffusion_model)))
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_encoder_that_is_trained_beside_is_right_too(family):
    model, clip = small_model(family), small_clip(family)
    config = TextEncoderConfig(rank=2, lora_alpha=2.0, targets="linear", encoders=ENCODERS[family])
    results = {}
    for base in ("full", "offload"):
        encoder = TextEncoder(clip, CAPTIONS, config).private()
        data = training_data(clip)
        with training_session(model, 0, [encoder.clip.patcher], base) as denoiser:
            text, trained = LiveText(encoder, denoiser, 0), adapters(denoiser)
            if base == "offload":  # as where ComfyUI finds no room for it
                encoder.clip.patcher.partially_unload(encoder.clip.patcher.offload_device, 1e32)
            plain = denoiser.dataset(data.samples(), data.positive)
            dataset = text.dataset(plain, data.positive, None)
            dataset = replace(dataset, latents=dataset.latents[:2], conditions=dataset.conditions[:2])
            with trained.installed(), text.installed(), denoiser.gradient_context():
                loss_of(denoiser, dataset).backward()
            results[base] = [p.grad for p in (*trained.trainable(), *text.network.trainable())]
    assert relative(results["offload"], results["full"]) < TOLERANCE


def test_every_kind_of_layer_is_right():
    """Also one with a forward of its own, whatever it does besides, and with arguments besides its input."""
    ops = comfy.ops.manual_cast

    class Squared(ops.Linear):
        def forward_comfy_cast_weights(self, x, power=2):
            return super().forward_comfy_cast_weights(x) ** power

    layers = [Squared(4, 4), ops.Linear(4, 4, bias=False), ops.Conv2d(4, 4, 3, padding="same"), ops.LayerNorm(4),
              ops.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), ops.Conv1d(4, 4, 2, dilation=2), ops.GroupNorm(2, 4),
              ops.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1)), ops.ConvTranspose2d(4, 6, 2, stride=2),
              ops.RMSNorm(4)]  # fmt: skip
    shapes = [(3, 4), (2, 3, 4), (2, 4, 5, 7), (3, 4), (2, 4, 5, 7), (2, 4, 9), (2, 4, 5), (2, 4, 2, 3, 3),
              (2, 4, 3, 3), (3, 4)]  # fmt: skip
    for seed, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
        for i, parameter in enumerate(layer.requires_grad_(False).parameters()):
            parameter.data = normal(*parameter.shape, seed=i)
        x, more = normal(*shape, seed=seed).requires_grad_(), {"power": 3} if isinstance(layer, Squared) else {}
        expected = torch.autograd.grad(layer(x, **more).sin().sum(), x)[0]
        with dequantizing(layer), recomputing([layer]):
            got = torch.autograd.grad(layer(x, **more).sin().sum(), x)[0]
            assert "forward" in vars(layer)
        assert "forward" not in vars(layer)
        torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=1e-6)
