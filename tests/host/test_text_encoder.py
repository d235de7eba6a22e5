"""Training the text encoder beside the model, on ComfyUI's own CLIP classes at tiny size."""

from dataclasses import asdict, replace

import comfy.model_management
import comfy.sd
import nodes as host_nodes
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from safetensors.torch import load_file

from tidetable.nodes.training import SaveLoRA
from tidetable.runtime import paths
from tidetable.runtime.previews import left_in_place
from tidetable.runtime.text_encoder import LiveText, TextEncoder, TextEncoderConfig
from tidetable.runtime.trainable import training_session
from tidetable.runtime.training import TrainingData, train_lora
from tidetable.tests.host.comparing import fingerprint
from tidetable.tests.host.test_training_run import cancel_at, equal
from tidetable.tests.host.text_models import (
    CAPTIONS,
    ENCODERS,
    FAMILIES,
    encode,
    small_clip,
    small_model,
    training_data,
)
from tidetable.tests.host.training_runs import LORA, quick_run
from tidetable.training import engine
from tidetable.training.adapter_kinds import AdapterNetwork
from tidetable.training.adapter_settings import AdapterConfig
from tidetable.training.adapters import select_targets
from tidetable.training.config import TrainConfig
from tidetable.training.objective import loss_for_batch
from tidetable.training.optimizers import OptimizerConfig
from tidetable.training.recipe import ObjectiveConfig
from tidetable.training.validation import validate


pytestmark = pytest.mark.usefixtures("output")

TEXT = TextEncoderConfig(rank=4, lora_alpha=4.0, learning_rate=1e-2)
CONFIG = TrainConfig(steps=6, batch_size=2, learning_rate=1e-2, warmup_steps=0, seed=3)


@pytest.fixture(params=["sd15", "sdxl"])
def pair(request):
    """(MODEL, CLIP), every weight an inference tensor."""
    return small_model(request.param), small_clip(request.param)


@pytest.fixture(params=FAMILIES)
def every(request):
    """(MODEL, CLIP, the name of all its text models) of every family, T5 too."""
    return small_model(request.param), small_clip(request.param), ENCODERS[request.param]


def train(model, clip, data=None, config=CONFIG, text=TEXT, captions=CAPTIONS, **settings):
    with torch.inference_mode():
        encoder = TextEncoder(clip, captions, text) if text else None
        return train_lora(model, data or training_data(clip), config, LORA, text_encoder=encoder, **settings)


def prediction(model, conditioning):
    """What the model says about one noisy latent."""
    with training_session(model) as denoiser, torch.no_grad():
        channels = model.model.latent_format.latent_channels
        latent = torch.randn(channels, 8, 8, generator=torch.Generator().manual_seed(4))
        return denoiser.predict(latent[None], torch.tensor([0.5]), [denoiser.condition(conditioning, latent)])


def same(first, second) -> bool:
    """Two conditionings, tensors and pooled ones."""
    return all(
        torch.allclose(a, b, atol=1e-5)
        for a, b in ((first[0][0], second[0][0]), (first[0][1]["pooled_output"], second[0][1]["pooled_output"]))
    )


# ── the gradient ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_live_encoding_is_what_clip_text_encode_says(every):
    model, clip, encoders = every
    encoder = TextEncoder(clip, CAPTIONS, replace(TEXT, encoders=encoders)).private()
    with training_session(model, 0, [encoder.clip.patcher]) as denoiser:
        text = LiveText(encoder, denoiser, 0)
        with text.installed():  # with up at zero the adapters are the identity
            live = {caption: text.encode(caption) for caption in (*CAPTIONS, "", "word " * 200)}
    for caption, (cross_attn, options) in live.items():
        ((wanted, wanted_options),) = encode(clip, caption)
        assert torch.equal(cross_attn, wanted) and cross_attn.requires_grad
        assert torch.equal(options["pooled_output"], wanted_options["pooled_output"])


def test_the_gradient_of_both_adapters_is_the_slope_of_the_loss(every):
    model, clip, encoders = every
    encoder = TextEncoder(clip, CAPTIONS, replace(TEXT, targets="linear", encoders=encoders)).private()
    data = training_data(clip)
    with training_session(model, 0, [encoder.clip.patcher]) as denoiser:
        plain = denoiser.dataset(data.samples(), data.positive)
        layers = select_targets(dict(denoiser.real.diffusion_model.named_modules()), "attention_mlp")
        network, text = (
            AdapterNetwork(layers, AdapterConfig(**asdict(LORA)), denoiser.device),
            LiveText(encoder, denoiser, 0),
        )
        generator = torch.Generator().manual_seed(2)
        for adapter in (*network.adapters.values(), *text.network.adapters.values()):
            adapter.up.data = 0.1 * torch.randn(adapter.up.shape, generator=generator)
        dataset = text.dataset(plain, data.positive, None)
        x0 = torch.stack(list(dataset.latents))
        eps = torch.randn(x0.shape, generator=generator)
        t = denoiser.snap(torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64))

        def loss():
            return loss_for_batch(denoiser, x0, dataset.conditions, eps, t).mean()

        with network.installed(), text.installed():
            with denoiser.gradient_context():
                loss().backward()
            for trained in (network.trainable(), text.network.trainable()):
                trained = [p for p in trained if p.grad is not None and p.grad.any()]
                assert len(trained) > 10
                norm = torch.stack([p.grad.square().sum() for p in trained]).sum().sqrt()
                values = []
                for step in (1e-2, -1e-2):
                    with torch.no_grad():
                        for p in trained:
                            p.add_(p.grad, alpha=float(step / norm))
                        values.append(loss().double().item())
                        for p in trained:
                            p.sub_(p.grad, alpha=float(step / norm))
                slope = (values[0] - values[1]) / 2e-2
                assert abs(slope - norm.item()) < 0.02 * norm.item()


# ── the result ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_saved_file_in_the_stock_loader_gives_the_trained_model_and_clip(every):
    model, clip, encoders = every
    before = fingerprint(model), fingerprint(clip.patcher)
    result = train(model, clip, text=replace(TEXT, encoders=encoders))
    assert (fingerprint(model), fingerprint(clip.patcher)) == before
    base = encode(clip, CAPTIONS[0])
    with torch.inference_mode():
        name = SaveLoRA.execute(result.lora, "tests/both", "")[0]
        stock_model, stock_clip = host_nodes.LoraLoader().load_lora(model, clip, name, 1.0, 1.0)
    for caption in (*CAPTIONS, ""):
        ours, theirs = encode(result.clip, caption), encode(stock_clip, caption)
        assert same(ours, theirs) and not same(ours, encode(clip, caption))
        assert torch.allclose(prediction(result.model, ours), prediction(stock_model, theirs), atol=1e-5)
    assert same(encode(clip, CAPTIONS[0]), base)
    comfy.model_management.unload_all_models()
    assert [fingerprint(p)["weights"] for p in (model, clip.patcher)] == [part["weights"] for part in before]


def test_what_was_trained_with_hooks_is_what_the_result_says(pair):
    """The held-out loss after the last step, by live captions, is that of the returned MODEL and CLIP."""
    model, clip = pair
    config = replace(CONFIG, validate_every=0)
    result = train(model, clip, training_data(clip, percent=50), config)
    rows = [1, 3]  # what split_held_out holds out of four
    held = TrainingData([{"samples": training_data(clip).latents[0]["samples"][rows]}], [], None, 0)
    positive = [encode(result.clip, CAPTIONS[row]) for row in rows]
    with training_session(result.model) as denoiser:
        loss = validate(denoiser, denoiser.dataset(held.samples(), positive), 2, config.seed, 0).loss
    assert loss == pytest.approx(result.loss_map["validation_loss"][-1], rel=1e-4)
    assert loss != pytest.approx(result.loss_map["validation_loss"][0], rel=1e-4)


@pytest.mark.parametrize(
    ("family", "prefixes"),
    [
        ("sd15", {"lora_te_text_model"}),
        ("sdxl", {"lora_te1_text_model", "lora_te2_text_model"}),
        ("flux", {"lora_te1_text_model", "lora_te3"}),
    ],
)
def test_the_file_has_kohyas_names_and_both_rates(family, prefixes):
    clip = small_clip(family)
    text = replace(TEXT, encoders=ENCODERS[family])
    result = train(small_model(family), clip, config=replace(CONFIG, steps=1), text=text)
    text = {name for name in result.lora if not name.startswith("diffusion_model.")}
    assert {name.split("_encoder_")[0] for name in text} == prefixes
    assert all(name.split(".", 1)[0] + ".alpha" in text for name in text)
    assert result.lora.metadata["ss_text_encoder_lr"] == "0.01"


def test_without_it_the_text_encoder_is_frozen_and_the_run_is_what_it_was(pair):
    model, clip = pair
    data = training_data(clip)
    before = fingerprint(clip.patcher)
    plain = train(model, clip, data, text=None)
    assert fingerprint(clip.patcher) == before
    assert all(name.startswith("diffusion_model.") for name in plain.lora)
    assert "text_encoder" in plain.clip.message
    live = train(model, clip, data, text=replace(TEXT, learning_rate=1e-30))
    for name in plain.lora:  # the same captions, as good as frozen: the same training
        assert torch.allclose(plain.lora[name], live.lora[name], atol=1e-4), name


def test_the_loss_falls_when_only_the_text_encoder_learns(pair):
    model, clip = pair
    data = training_data(clip, percent=50)
    held = TrainingData(data.latents * 2, data.positive * 2, None, 50)  # what is held out is trained on too
    config = replace(CONFIG, steps=40, learning_rate=1e-12, lr_schedule="constant", batch_size=4)
    learned = train(model, clip, held, config, captions=CAPTIONS * 2).loss_map["validation_loss"]
    frozen = train(model, clip, held, config, None).loss_map["validation_loss"]
    assert abs(frozen[-1] - frozen[0]) < 1e-5 * frozen[0]
    assert learned[-1] < 0.99 * learned[0]


def test_each_adapter_moves_at_its_own_rate(pair):
    """Sign descent: AdamW's first step moves every weight by its rate."""
    model, clip = pair
    config = replace(CONFIG, steps=1, lr_schedule="constant", learning_rate=1e-3)
    result = train(model, clip, config=config, text=replace(TEXT, learning_rate=2e-2))
    for start, rate in (("diffusion_model.", 1e-3), ("lora_te", 2e-2)):
        ups = [v for name, v in result.lora.items() if name.startswith(start) and name.endswith("lora_up.weight")]
        moved = torch.cat([up.abs().flatten() for up in ups])
        assert moved.max().item() == pytest.approx(rate, rel=1e-3)


# ── a run that is cut short ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_cancelled_run_goes_on_bit_for_bit_and_leaves_the_clip_clean(pair, monkeypatch):
    model, clip = pair
    data = training_data(clip, percent=25)
    config = replace(CONFIG, ema_decay=0.9, caption_dropout=0.4, validate_every=2, warmup_steps=2)
    before = fingerprint(model), fingerprint(clip.patcher)
    complete = train(model, clip, data, config)
    with monkeypatch.context() as patch:
        cancel_at(3, patch)
        with pytest.raises(InterruptProcessingException):
            train(model, clip, data, config, run=quick_run())
    assert (fingerprint(model), fingerprint(clip.patcher)) == before
    rescued = max(paths.loras_folder().rglob("*step3*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    assert any(name.startswith("lora_te") for name in load_file(rescued))
    assert equal(train(model, clip, data, config, run=quick_run()), complete)
    folders = len(list(paths.runs_folder().iterdir()))
    train(model, clip, data, config, run=quick_run(), captions=[*CAPTIONS[:3], "three birds"])
    train(model, clip, data, config, run=quick_run(), text=replace(TEXT, learning_rate=2e-2))
    other = small_clip("sdxl" if hasattr(clip.cond_stage_model, "clip_g") else "sd15", seed=1)
    train(model, other, data, config, run=quick_run())
    assert len(list(paths.runs_folder().iterdir())) == folders + 3, "other captions, rates or CLIPs are other runs"
    assert (fingerprint(model), fingerprint(clip.patcher)) == before


def test_with_all_settings_at_once_a_cancelled_run_goes_on_bit_for_bit(monkeypatch):
    """Another kind of adapter with dropout, another optimizer, accumulation, the bridge and the guard."""
    model, clip = small_model("sd15"), small_clip("sd15")
    data = training_data(clip, CAPTIONS * 2, percent=25)
    objective = ObjectiveConfig(flow="bridge", loss="huber")
    config = TrainConfig(steps=6, batch_size=2, seed=3, caption_dropout=0.3, validate_every=4, objective=objective)
    settings = {
        "adapter": AdapterConfig(kind="dora", rank=4, rank_dropout=0.2, max_norm=1.0),
        "optimizer": OptimizerConfig(name="adafactor", warmup=2, accumulate=2, ema_decay=0.9, ema_device="cpu"),
    }
    complete = train(model, clip, data, config, captions=CAPTIONS * 2, **settings)
    with monkeypatch.context() as patch:
        cancel_at(3, patch)
        with pytest.raises(InterruptProcessingException):
            train(model, clip, data, config, captions=CAPTIONS * 2, run=quick_run(), **settings)
    assert equal(train(model, clip, data, config, captions=CAPTIONS * 2, run=quick_run(), **settings), complete)


def test_previews_leave_the_text_encoder_in_place():
    """A VAE that needs all memory does not move the CLIP that is trained; LoRAs on it would be taken off."""
    model, clip = small_model("sd15"), small_clip("sd15")
    first = train(model, clip)
    encoder = TextEncoder(first.clip, CAPTIONS, TEXT).private()
    with training_session(first.model, 0, [encoder.clip.patcher]) as denoiser:
        patched = fingerprint(clip.patcher)["weights"]
        with left_in_place(denoiser.loaded, torch.device("cpu")):
            comfy.model_management.free_memory(1e30, torch.device("cpu"))
            assert fingerprint(clip.patcher)["weights"] == patched
        comfy.model_management.free_memory(1e30, torch.device("cpu"))
        assert fingerprint(clip.patcher)["weights"] != patched


def test_a_file_goes_on_with_both_its_parts(pair):
    """At a rate of nothing, what was continued is what the file said."""
    model, clip = pair
    first = train(model, clip)
    adapter = AdapterConfig(continue_from=SaveLoRA.execute(first.lora, "tests/go-on", "")[0])
    still = replace(CONFIG, learning_rate=1e-12)
    second = train(model, clip, None, still, replace(TEXT, learning_rate=1e-12, rank=2), adapter=adapter)
    assert second.lora.keys() == first.lora.keys()
    assert all(torch.allclose(second.lora[name], first.lora[name], atol=1e-7) for name in first.lora)
    assert same(encode(second.clip, CAPTIONS[1]), encode(first.clip, CAPTIONS[1]))
    moved = train(model, clip, None, CONFIG, TEXT, adapter=adapter)
    assert not same(encode(moved.clip, CAPTIONS[1]), encode(first.clip, CAPTIONS[1]))
    alone = train(model, clip, None, CONFIG, None, adapter=adapter)
    assert all(name.startswith("diffusion_model.") for name in alone.lora)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd", "muon"])
def test_every_optimizer_keeps_the_rates_apart(optimizer):
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model, clip = small_model("sd15"), small_clip("sd15")
    settings = {"optimizer": OptimizerConfig(name=optimizer, warmup=0, lr_schedule="constant")}
    result = train(model, clip, config=replace(CONFIG, learning_rate=1e-12), **settings)
    ups = {name: v.abs().max() for name, v in result.lora.items() if name.endswith("lora_up.weight")}
    text, own = ([v for name, v in ups.items() if name.startswith("lora_te") == is_text] for is_text in (True, False))
    assert max(own) < 1e-9 and max(text) > 1e-6


def test_an_error_in_the_loop_leaves_the_clip_clean(pair, monkeypatch):
    model, clip = pair
    before = fingerprint(model), fingerprint(clip.patcher)
    monkeypatch.setattr(engine.Trainer, "_clip_gradients", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(model, clip)
    assert (fingerprint(model), fingerprint(clip.patcher)) == before


def test_a_lora_on_the_clip_stays_active_and_its_base_stays_clean(pair):
    model, clip = pair
    before = fingerprint(clip.patcher)["weights"]
    first = train(model, clip)
    said = encode(first.clip, CAPTIONS[1])
    second = train(first.model, first.clip)
    assert same(encode(first.clip, CAPTIONS[1]), said) and not same(encode(second.clip, CAPTIONS[1]), said)
    comfy.model_management.unload_all_models()
    assert fingerprint(clip.patcher)["weights"] == before
