"""Adapters of every kind on real models: what was trained is what ComfyUI's own loader makes of the saved file."""

import logging

import nodes as host_nodes
import pytest
import torch

from tidetable.nodes.training_adapter import Adapter, Optimizer
from tidetable.runtime import tiny
from tidetable.runtime.lora_keys import apply_lora, to_lora_model
from tidetable.runtime.saving import save_lora_model
from tidetable.runtime.trainable import training_session
from tidetable.runtime.training import AdapterConfig, OptimizerConfig, train_lora
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.test_tiny import sample
from tidetable.tests.host.test_training import CONFIG, LORA, data  # noqa: F401
from tidetable.training.adapter_kinds import AdapterNetwork
from tidetable.training.adapter_settings import match_targets


KINDS = {kind: {"kind": kind} for kind in ("lora", "dora", "dora_input", "loha", "lokr")}
KINDS["pissa"] = {"initialization": "pissa"}
KINDS["rslora"] = {"rank_stabilized": True}
MODELS = ("unet-v", "mmdit-flow")


def loaded(model, clip, lora, strength):
    with torch.inference_mode():
        name = save_lora_model(lora, "tests/kinds")
        return host_nodes.LoraLoader().load_lora(model, clip, name, strength, strength)[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bypass_that_was_trained_equals_the_saved_file_in_the_stock_loader(name, kind, data):  # noqa: F811
    model = inference_copy(tiny.load_tiny_model(name))
    config = AdapterConfig(**{"rank": 4, "lora_alpha": 4.0, "targets": "linear_conv", **KINDS[kind]})

    def predict(denoiser):
        dataset = denoiser.dataset(data[0].samples()[:2], data[0].positive[:2])
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        t = denoiser.snap(torch.tensor([0.3, 0.8], dtype=torch.float64))
        with torch.no_grad():
            return denoiser.predict(x, t, dataset.conditions)

    with training_session(model) as denoiser:
        layers = match_targets(dict(denoiser.real.diffusion_model.named_modules()), config)
        network = AdapterNetwork(layers, config, denoiser.device)
        base = predict(denoiser)
        generator = torch.Generator().manual_seed(0)
        for parameter in network.trainable():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        with network.installed():
            bypass = predict(denoiser)
        lora = to_lora_model(network, {})
    assert all(key.rsplit(".alpha")[0] for key in lora) and sum(".alpha" in key for key in lora) == len(layers)
    with training_session(loaded(model, data[1], lora, 1.0)) as denoiser:
        merged = predict(denoiser)
    assert torch.allclose(bypass, merged, atol=1e-5 * merged.abs().max().clamp(1).item())
    assert not torch.allclose(base, merged, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_a_model_that_the_file_reproduces(kind, data):  # noqa: F811
    model = inference_copy(tiny.load_tiny_model("unet-v"))
    before, picture = fingerprint(model), sample(model, data[1])
    settings = {"rank": 4, "lora_alpha": 4.0, "rank_dropout": 0.2, "module_dropout": 0.2, **KINDS[kind]}
    with torch.inference_mode():
        result = train_lora(model, data[0], CONFIG, LORA, adapter=AdapterConfig(**settings))
    assert fingerprint(model) == before
    trained = sample(result.model, data[1])
    assert not torch.allclose(trained, picture, atol=1e-4)
    assert torch.allclose(trained, sample(loaded(model, data[1], result.lora, 1.0), data[1]), atol=1e-5)
    half = sample(apply_lora(model, result.lora, 0.5), data[1])
    assert torch.allclose(half, sample(loaded(model, data[1], result.lora, 0.5), data[1]), atol=1e-5)


def test_a_plain_adapter_trains_what_the_node_without_one_trains(data):  # noqa: F811
    model = inference_copy(tiny.load_tiny_model("unet-v"))
    with torch.inference_mode():
        plain = train_lora(model, data[0], CONFIG, LORA)
        adapter = train_lora(model, data[0], CONFIG, LORA, adapter=AdapterConfig(rank=4, lora_alpha=4.0))
    assert plain.lora.keys() == adapter.lora.keys()
    assert all(torch.allclose(plain.lora[key], adapter.lora[key], atol=1e-6) for key in plain.lora)


def test_the_log_lists_layers_and_the_node_gives_the_settings(data, caplog):  # noqa: F811
    settings = {name: getattr(AdapterConfig(), name) for name in ("kind", "lora_alpha", "targets")}
    adapter = Adapter.execute(**settings, rank=512, include="*attn1.to_q")[0]
    with torch.inference_mode(), caplog.at_level(logging.INFO):
        train_lora(inference_copy(tiny.load_tiny_model("unet-v")), data[0], CONFIG, LORA, adapter=adapter)
    assert "attn1.to_q: rank" in caplog.text and "(rank 512 is more than this layer has)" in caplog.text


def test_no_matching_layer_is_refused_before_anything_changes(data):  # noqa: F811
    model = inference_copy(tiny.load_tiny_model("unet-v"))
    before = fingerprint(model)
    with torch.inference_mode(), pytest.raises(ValueError, match="matches no layer of this network: did you mean"):
        train_lora(model, data[0], CONFIG, LORA, adapter=AdapterConfig(include="*attn7*"))
    assert fingerprint(model) == before


def test_an_optimizer_from_the_node_trains_and_is_written_to_the_header(data):  # noqa: F811
    names = [entry.id for entry in Optimizer.define_schema().inputs]
    settings = {name: getattr(OptimizerConfig(), name) for name in names}
    optimizer = Optimizer.execute(**{**settings, "name": "sgd", "warmup": 2, "accumulate": 2, "ema_decay": 0.5})[0]
    with torch.inference_mode():
        result = train_lora(inference_copy(tiny.load_tiny_model("unet-v")), data[0], CONFIG, LORA, optimizer=optimizer)
    assert result.lora.metadata["ss_optimizer"] == "torch.optim.sgd.SGD"
    assert result.lora.metadata["ss_gradient_accumulation_steps"] == "2" and len(result.loss_map["loss"]) == 4
