"""LoRAs on base weights that are stored small: exact gradients, nothing kept for backward, nothing left behind."""

import logging

import comfy.model_management
import comfy.ops
import pytest
import torch

from tidetable.runtime.gradients import blocks_of
from tidetable.runtime.lora_keys import apply_lora, to_lora_model
from tidetable.runtime.trainable import training_session
from tidetable.runtime.training import TrainingData, train_lora
from tidetable.tests.host.comparing import fingerprint
from tidetable.tests.host.gradient_cases import gradients, prepared, prompts_of, samples_of
from tidetable.tests.host.quantized_models import FORMATS, PackedOps, plain_twin
from tidetable.tests.host.test_gradients import relative
from tidetable.tests.host.training_runs import quick_run
from tidetable.training.adapter_kinds import AdapterNetwork
from tidetable.training.adapter_settings import AdapterConfig, match_targets
from tidetable.training.adapters import weight_of
from tidetable.training.config import LoRAConfig, TrainConfig
from tidetable.training.recompute import recomputed


CONFIG = TrainConfig(steps=12, batch_size=2, learning_rate=1e-2, warmup_steps=0, lr_schedule="constant", seed=3)
LORA = LoRAConfig(rank=4, lora_alpha=4.0)
FEW = [name for name in ("fp8", "scaled_fast", "mixed_fast", "nvfp4", "packed") if name in FORMATS]


def made(kind, name="sd3"):
    """A MODEL whose weights are inference tensors, as ComfyUI's loaders make them; its quantized layers make ordinary
    ones when ComfyUI loads them.
    """
    with torch.inference_mode():
        model = FORMATS[kind](name)
    comfy.model_management.load_models_gpu([model])
    return model


def train(model, name, **settings):
    data = TrainingData([{"samples": samples_of(name)}], prompts_of(name))
    with torch.inference_mode():
        return train_lora(model, data, CONFIG, LORA, **settings)


CASES = [(kind, name) for kind in FORMATS for name in ("sd3", "flux")]


@pytest.mark.parametrize(("kind", "name"), [*CASES, ("fp8", "sdxl"), ("packed", "sdxl")])
def test_the_gradients_are_those_of_the_dequantized_weights(kind, name):
    model = made(kind, name)
    before, kernels = fingerprint(model), kernels_of(model)
    with prepared(name, plain_twin(model, name)) as (denoiser, trained, loss):
        expected, value = gradients(denoiser, trained, loss), loss().item()
    with prepared(name, model) as (denoiser, trained, loss):
        with torch.no_grad():
            assert abs(loss().item() / value - 1) < 1e-5, "without gradients the same kernels compute"
        assert relative(gradients(denoiser, trained, loss), expected) < 1e-5
    assert fingerprint(model) == before and kernels_of(model) == kernels


def kernels_of(model):
    """What says which kernels are used, and the layers' forwards."""
    layers = [(vars(m).get("_full_precision_mm"), vars(m).get("forward")) for m in model.model.modules()]
    return [vars(comfy.ops).get("fp8_linear"), *layers]


@pytest.mark.parametrize("kind", FEW)
def test_the_kernels_are_back_after_an_interrupt(kind):
    model = made(kind)
    before = kernels_of(model)
    with training_session(model):
        assert kernels_of(model) != before
    with pytest.raises(KeyboardInterrupt), training_session(model):
        raise KeyboardInterrupt
    assert kernels_of(model) == before


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_recomputed_blocks_dequantize_too(name):
    with prepared(name, made("packed", name)) as (denoiser, trained, loss):
        plain = gradients(denoiser, trained, loss)
        with recomputed(blocks_of(denoiser.real.diffusion_model)):
            assert relative(gradients(denoiser, trained, loss), plain) < 1e-6


@pytest.mark.parametrize("kind", FEW)
def test_no_dequantized_weight_waits_for_backward(kind):
    kept = []
    with prepared("sd3", made(kind)) as (denoiser, _, loss):
        weights = {tuple(p.shape) for p in denoiser.real.diffusion_model.parameters() if p.ndim == 2}
        weights |= {shape[::-1] for shape in weights}
        own = {p.data_ptr() for p in denoiser.real.diffusion_model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((tuple(t.shape), t.data_ptr())), id):
            loss()
    assert len(kept) > 20
    assert not [shape for shape, place in kept if shape in weights and place not in own]


@pytest.mark.parametrize(("kind", "name"), [(kind, "sd3") for kind in FEW] + [("packed", "flux")])
def test_a_run_learns_on_a_proven_base_and_goes_on_after_a_stop(kind, name, caplog, output):
    model = made(kind, name)
    before = fingerprint(model)
    with caplog.at_level(logging.INFO):
        result = train(model, name, run=quick_run(checkpoint_every_steps=6))
    assert "its weights are stored as" in caplog.text and "its gradients were checked on the first batch" in caplog.text
    assert fingerprint(model) == before
    with prepared(name, model, scale=0.0) as (_, _, loss), torch.no_grad():
        base = loss().item()
    with prepared(name, result.model, scale=0.0) as (_, _, loss), torch.no_grad():
        assert loss().item() < base
    again = train(model, name, run=quick_run(checkpoint_every_steps=6))  # the finished run's last state
    assert all(torch.equal(again.lora[key], result.lora[key]) for key in result.lora)


ADAPTERS = [AdapterConfig(kind=kind, rank=2, lora_alpha=2.0) for kind in ("dora", "dora_input", "loha", "lokr")]
ADAPTERS.append(AdapterConfig(kind="lora", rank=2, lora_alpha=2.0, initialization="pissa"))


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: f"{adapter.kind}-{adapter.initialization}")
def test_adapters_that_read_the_weight_read_the_dequantized_one(kind, adapter):
    model, found = made(kind), []
    for base in (plain_twin(model, "sd3"), model):
        with training_session(base) as denoiser:
            layers = match_targets(dict(denoiser.real.diffusion_model.named_modules()), adapter)
            network = AdapterNetwork(layers, adapter, denoiser.device)
            for i, p in enumerate(network.trainable()):
                p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            values = [p.detach().clone() for p in network.trainable()]
            dataset = denoiser.dataset(list(samples_of("sd3")), prompts_of("sd3"))
            t = torch.tensor((0.3, 0.8))
            with network.installed():
                denoiser.predict(torch.stack(list(dataset.latents)), t, dataset.conditions).square().mean().backward()
            found.append((values, [p.grad for p in network.trainable()]))
    (values, slopes), (other_values, other_slopes) = found
    assert relative(other_values, values) < 1e-4 and relative(other_slopes, slopes) < 1e-4


ROUNDING = {"fp8": 0.05, "scaled_fast": 0.05, "mixed_fast": 0.05, "nvfp4": 0.2}
"""Relative error of a matrix that ComfyUI rounds to the format, stochastically for what its loader has changed."""


@pytest.mark.parametrize("kind", [kind for kind in ROUNDING if kind in FORMATS])
def test_the_saved_lora_changes_the_weights_as_trained_up_to_the_rounding_of_the_format(kind):
    model = made(kind)
    with prepared("sd3", model) as (denoiser, trained, _):
        expected = {name: weight_of(layer) + trained.adapters[name].delta() for name, layer in trained.layers.items()}
        lora = to_lora_model(trained, {})
    with training_session(apply_lora(model, lora)) as denoiser:
        layers = dict(denoiser.real.diffusion_model.named_modules())
        merged = {name: weight_of(layers[name]) for name in expected}
    errors = [((merged[name] - weight).norm() / weight.norm()).item() for name, weight in expected.items()]
    assert max(errors) < ROUNDING[kind]


def test_a_base_without_a_backward_pass_is_refused_with_the_reason(monkeypatch):
    def forward(layer, x):
        return comfy.ops.manual_cast.Linear.forward_comfy_cast_weights(layer, x.detach())

    monkeypatch.setattr(PackedOps.Linear, "forward_comfy_cast_weights", forward)
    model = FORMATS["fp8"]("sd3", operations=PackedOps)
    with pytest.raises(ValueError, match="its weights are stored as float8_e4m3fn, and on the first batch its grad"):
        train(model, "sd3")
