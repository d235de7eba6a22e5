"""What is said before a run begins, through the real training path and with ComfyUI's own latent formats."""

import inspect

import comfy.latent_formats
import pytest
import torch

from tidetable.runtime import tiny
from tidetable.runtime.training import AdapterConfig, TrainingData, train_lora
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.model_zoo import zoo
from tidetable.tests.host.training_runs import LORA, dataset
from tidetable.training.config import LoRAConfig, TrainConfig
from tidetable.training.latent_statistics import judge, latent_statistics


CONFIG = TrainConfig(steps=2, batch_size=2, warmup_steps=0)


@pytest.fixture(scope="module")
def data():
    return dataset(6)


def train(model, data, config=CONFIG, lora=LORA, **settings):
    with torch.inference_mode():
        return train_lora(model, data, config, lora, **settings)


# ── latents ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def formats():
    """Every latent format of pictures or video of this ComfyUI that scales by constants of its own."""
    for name, kind in inspect.getmembers(comfy.latent_formats, inspect.isclass):
        made = kind() if issubclass(kind, comfy.latent_formats.LatentFormat) else None
        if made is not None and made.latent_dimensions in (2, 3):
            unit = torch.randn(1, made.latent_channels, 3, 16, 16, generator=torch.Generator().manual_seed(0))
            unit = unit if made.latent_dimensions == 3 else unit[:, :, 0]
            try:
                raw = made.process_out(unit)
            except Exception:  # formats that reshape have no plain inverse to ask
                continue
            if raw.shape == unit.shape:
                yield name, made, unit, raw


def test_no_format_of_comfyui_is_refused_its_own_latents_and_a_forgotten_or_a_second_scaling_is_seen():
    seen, refused, twice = [], [], []
    for name, made, unit, raw in formats():
        own = judge(latent_statistics(made.process_in(raw)), latent_statistics(raw))
        assert own.level == "fine", f"{name}: {own.text}"
        seen.append(name)
        if judge(latent_statistics(raw), latent_statistics(raw)).level == "error":
            refused.append(name)
        if "already" in judge(latent_statistics(made.process_in(unit)), latent_statistics(unit)).text:
            twice.append(name)
    assert {"SD15", "SDXL", "SD3", "Flux", "Wan21"} <= set(seen)
    assert {"SD15", "SDXL"} <= set(refused) and {"SD15", "SDXL", "Flux"} <= set(twice)


def test_latents_that_are_scaled_already_are_said(caplog):
    model, generator = zoo("sdxl"), torch.Generator().manual_seed(0)
    latents = torch.randn(4, 4, 16, 16, generator=generator)
    row = [[torch.randn(1, 6, 32, generator=generator), {"pooled_output": torch.randn(1, 32, generator=generator)}]]
    train(model, TrainingData([{"samples": latents}], [row]))
    assert "scaled for the model already" in caplog.text and "Latent Multiply by 7.67" in caplog.text
    caplog.clear()
    train(model, TrainingData([{"samples": latents * 7.67}], [row]))
    assert "data is near 1" not in caplog.text


def test_the_embedded_models_own_latents_are_fine_and_reported(data, caplog):
    caplog.set_level("INFO")
    for name in tiny.TINY_MODELS:
        caplog.clear()
        train(tiny.load_tiny_model(name), data)
        assert "latents as the model sees them: 6 latents, root mean square" in caplog.text
        assert "data is near 1" not in caplog.text and "every latent is zero" not in caplog.text


def test_the_latents_of_another_scale_or_an_empty_one_are_said(data, caplog):
    model = inference_copy(tiny.load_tiny_model("mmdit-flow"))
    pixels = [{"samples": 127.5 * (data.latents[0]["samples"] + 1)}]
    before = fingerprint(model)
    with pytest.raises(ValueError, match="in the model's own space, where data is near 1: they come from another"):
        train(model, TrainingData(pixels, data.positive))
    assert fingerprint(model) == before
    train(model, TrainingData([{"samples": torch.zeros(6, 3, 32, 32)}], data.positive))
    assert "every latent is zero, as Empty Latent Image makes them" in caplog.text


def test_the_latent_that_is_not_finite_is_named(data):
    samples = data.latents[0]["samples"].clone()
    samples[4, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="latent 5 of 6 contains nan or inf: look at the image it came from"):
        train(tiny.load_tiny_model("unet-v"), TrainingData([{"samples": samples}], data.positive))


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=200, targets="linear")])
def test_a_rank_that_layers_do_not_have_is_said_with_their_own(adapter, data, caplog):
    model = tiny.load_tiny_model("mmdit-flow")
    lora = train(model, data, lora=LoRAConfig(rank=200, targets="linear"), adapter=adapter).lora
    ranks = {key: len(value) for key, value in lora.items() if key.endswith("lora_down.weight")}
    narrow = {key: rank for key, rank in ranks.items() if rank < 200}
    assert f"rank 200 is more than {len(narrow)} of {len(ranks)} layers have" in caplog.text
    first = next(iter(narrow)).removeprefix("diffusion_model.").removesuffix(".lora_down.weight")
    assert f"{first} ({next(iter(narrow.values()))})" in caplog.text and "Lower rank" in caplog.text
    caplog.clear()
    train(model, data, lora=LoRAConfig(rank=4))
    assert "layers have" not in caplog.text


def test_a_run_shorter_than_its_warm_up_is_said(data, caplog):
    model = tiny.load_tiny_model("unet-v")
    result = train(model, data, TrainConfig(steps=3, batch_size=2, warmup_steps=3, learning_rate=0.01))
    assert max(result.loss_map["lr"]) < 0.01
    assert "the warm-up takes 3 steps of a run of 3: learning_rate 0.01 is never reached. Lower warm" in caplog.text
    caplog.clear()
    result = train(model, data, TrainConfig(steps=3, batch_size=2, warmup_steps=2, learning_rate=0.01))
    assert max(result.loss_map["lr"]) == 0.01 and "warm-up" not in caplog.text
