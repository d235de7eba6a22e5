"""Training on real ComfyUI models: what the network is asked, what it leaves behind, and what comes out."""

from dataclasses import asdict

import comfy.model_management
import nodes as host_nodes
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingSD3
from safetensors import safe_open

from tidetable.nodes.training import SaveLoRA
from tidetable.runtime import paths, tiny
from tidetable.runtime.lora_keys import apply_lora
from tidetable.runtime.saving import save_lora_model
from tidetable.runtime.tiny_data import tiny_dataset
from tidetable.runtime.trainable import training_session
from tidetable.runtime.training import TrainingData, train_lora
from tidetable.schedules.prediction import target
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.test_tiny import encode, sample
from tidetable.training.config import LoRAConfig, TrainConfig
from tidetable.training.objective import loss_for_batch


CONFIG = TrainConfig(steps=4, batch_size=4, learning_rate=1e-3, warmup_steps=0, seed=3)
LORA = LoRAConfig(rank=4, lora_alpha=4.0)


@pytest.fixture(scope="module")
def data():
    clip, vae = tiny.load_tiny_clip(), tiny.load_tiny_vae()
    with torch.inference_mode():
        images, captions = tiny_dataset("glyphs", 10, 0)
        latents = host_nodes.VAEEncode().encode(vae, images)[0]
        positive = [encode(clip, text) for text in captions]
    return TrainingData([latents], positive, encode(clip, ""), 20), clip


@pytest.fixture(params=tiny.TINY_MODELS)
def model(request):
    """As nodes hand it over: every weight an inference tensor."""
    return inference_copy(tiny.load_tiny_model(request.param))


def variants(model):
    """The model as it is, and with a core sampling node applied."""
    yield model
    if model.model.model_type.name == "FLOW":
        yield ModelSamplingSD3().patch(model, 3.0)[0]
    else:
        yield ModelSamplingDiscrete().patch(model, "x0", False)[0]
        yield ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]


# ── the objective ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_target_is_what_comfyui_turns_into_the_clean_sample(model, data):
    """A network that outputs our target exactly makes ComfyUI's own `apply_model` return x0, at every noise level."""
    for patched in variants(model):
        with training_session(patched) as denoiser, torch.no_grad():
            x0 = denoiser.latent(data[0].samples()[0])[None].repeat(5, 1, 1, 1)
            row = denoiser.condition(data[0].positive[0], x0[0])
            t = denoiser.snap(torch.tensor([0.02, 0.3, 0.6, 0.9, 0.99], dtype=torch.float64))
            eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
            goal = target(denoiser.prediction, x0, eps, t, denoiser.process)
            results, original = [], denoiser.real.apply_model
            hook = denoiser.real.diffusion_model.register_forward_hook(lambda *_, goal=goal: goal)
            denoiser.real.apply_model = lambda *a, results=results, f=original, **k: results.append(f(*a, **k))
            try:
                loss = loss_for_batch(denoiser, x0, [row] * 5, eps, t)
            finally:
                hook.remove()
                del denoiser.real.apply_model
        assert torch.allclose(loss, torch.zeros(5), atol=1e-10)
        tolerance = 1e-5 * denoiser.process.ratio(t).clamp(1).max().item()
        assert torch.allclose(results[0], x0, atol=tolerance)


def test_four_captions_in_one_forward_equal_four_forwards(model, data):
    with training_session(model) as denoiser, torch.no_grad():
        dataset = denoiser.dataset(data[0].samples(), data[0].positive)
        x = torch.stack(list(dataset.latents[:4])) + torch.randn(4, 3, 32, 32)
        t = denoiser.snap(torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64))
        rows = []
        hook = denoiser.real.diffusion_model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        together = denoiser.predict(x, t, dataset.conditions[:4])
        hook.remove()
        single = torch.cat([denoiser.predict(x[i : i + 1], t[i : i + 1], [dataset.conditions[i]]) for i in range(4)])
        swapped = denoiser.predict(x, t, dataset.conditions[:4][::-1])
    assert rows == [4]
    assert torch.allclose(together, single, atol=1e-4 * single.abs().max())
    assert not torch.allclose(together, swapped, atol=1e-2)


def test_captions_of_different_length_are_each_right(model, data):
    with training_session(model) as denoiser, torch.no_grad():
        latent = denoiser.latent(data[0].samples()[0])
        short = [[data[0].positive[0][0][0][:, :7], data[0].positive[0][0][1]]]
        rows = [denoiser.condition(c, latent) for c in (data[0].positive[0], short, data[0].positive[1])]
        x, t = torch.randn(3, 3, 32, 32), denoiser.snap(torch.full((3,), 0.5, dtype=torch.float64))
        together = denoiser.predict(x, t, rows)
        single = torch.cat([denoiser.predict(x[i : i + 1], t[i : i + 1], [rows[i]]) for i in range(3)])
    assert torch.allclose(together, single, atol=1e-4 * single.abs().max())


def test_gradients_agree_with_finite_differences(model, data):
    from tidetable.training.adapter_kinds import AdapterNetwork
    from tidetable.training.adapter_settings import AdapterConfig
    from tidetable.training.adapters import select_targets

    with training_session(model) as denoiser:
        dataset = denoiser.dataset(data[0].samples()[:2], data[0].positive[:2])
        layers = select_targets(dict(denoiser.real.diffusion_model.named_modules()), "linear_conv")
        network = AdapterNetwork(layers, AdapterConfig(**asdict(LORA)), denoiser.device)
        generator = torch.Generator().manual_seed(0)
        for adapter in network.adapters.values():
            adapter.up.data = 0.05 * torch.randn(adapter.up.shape, generator=generator)
        x0, eps = torch.stack(list(dataset.latents)), torch.randn(2, 3, 32, 32, generator=generator)
        t = denoiser.snap(torch.tensor([0.3, 0.8], dtype=torch.float64))

        def loss():
            return loss_for_batch(denoiser, x0, dataset.conditions, eps, t).mean()

        with network.installed(), denoiser.gradient_context():
            loss().backward()
            parameters = [p for p in network.trainable() if p.grad is not None]
            direction = [torch.randn(p.shape, generator=generator) for p in parameters]
            slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True)).item()
            values = []
            for step in (1e-3, -1e-3):
                with torch.no_grad():
                    for p, d in zip(parameters, direction, strict=True):
                        p.add_(d, alpha=step)
                    values.append(loss().double().item())
                    for p, d in zip(parameters, direction, strict=True):
                        p.sub_(d, alpha=step)
    assert abs(slope - (values[0] - values[1]) / 2e-3) < 0.02 * abs(slope) + 1e-3


# ── the result ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_training_leaves_the_model_as_it_was_and_returns_a_working_lora(model, data):
    before, picture = fingerprint(model), sample(model, data[1])
    with torch.inference_mode():
        result = train_lora(model, data[0], CONFIG, LORA)
    assert fingerprint(model) == before
    assert torch.equal(sample(model, data[1]), picture)
    assert len(result.loss_map["loss"]) == 4 and len(result.loss_map["validation_loss"]) == 2
    assert not torch.allclose(sample(result.model, data[1]), picture, atol=1e-4)


def test_a_saved_lora_in_the_stock_loader_equals_the_trained_model(model, data):
    with torch.inference_mode():
        result = train_lora(model, data[0], CONFIG, LORA)
        name = SaveLoRA.execute(result.lora, "tests/equal", "a title")[0]
        stock, _ = host_nodes.LoraLoader().load_lora(model, data[1], name, 1.0, 1.0)
    ours, theirs = sample(result.model, data[1]), sample(stock, data[1])
    assert torch.allclose(ours, theirs, atol=1e-5)
    with safe_open(paths.loras_folder() / name, "pt") as file:
        header, keys = file.metadata(), set(file.keys())
    assert all(key.replace("lora_up.weight", "alpha") in keys for key in keys)
    assert header["modelspec.title"] == "a title" and header["ss_network_dim"] == "4" and header["ss_steps"] == "4"


def test_the_bypass_that_was_trained_equals_the_weights_that_are_saved(model, data):
    """The loss with hooks in training equals the loss of the result with nothing but patched weights."""
    from tidetable.runtime.lora_keys import to_lora_model
    from tidetable.training.adapter_kinds import AdapterNetwork
    from tidetable.training.adapter_settings import AdapterConfig
    from tidetable.training.adapters import select_targets

    def held_out_loss(denoiser):
        dataset = denoiser.dataset(data[0].samples()[:4], data[0].positive[:4])
        t = denoiser.snap(torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64))
        eps = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return loss_for_batch(denoiser, torch.stack(list(dataset.latents)), dataset.conditions, eps, t)

    with training_session(model) as denoiser:
        layers = select_targets(dict(denoiser.real.diffusion_model.named_modules()), "linear_conv")
        network = AdapterNetwork(layers, AdapterConfig(**asdict(LORA)), denoiser.device)
        generator = torch.Generator().manual_seed(0)
        for adapter in network.adapters.values():
            adapter.up.data = 0.1 * torch.randn(adapter.up.shape, generator=generator)
        with network.installed():
            bypass = held_out_loss(denoiser)
        base = held_out_loss(denoiser)
        lora = to_lora_model(network, {})
    with training_session(apply_lora(model, lora)) as denoiser:
        patched = held_out_loss(denoiser)
    assert torch.allclose(bypass, patched, rtol=1e-4) and not torch.allclose(base, patched, rtol=1e-2)


def test_the_same_seed_trains_the_same_bits(model, data):
    with torch.inference_mode():
        first, again = (train_lora(model, data[0], CONFIG, LORA) for _ in range(2))
    assert first.loss_map == again.loss_map
    assert all(torch.equal(first.lora[key], again.lora[key]) for key in first.lora)


def test_a_lora_on_the_way_in_stays_active_and_its_base_stays_clean(model, data):
    before = fingerprint(model)
    with torch.inference_mode():
        first = train_lora(model, data[0], CONFIG, LORA)
        picture = sample(first.model, data[1])
        second = train_lora(first.model, data[0], CONFIG, LORA)
        assert torch.equal(sample(first.model, data[1]), picture)
        assert not torch.allclose(sample(second.model, data[1]), picture, atol=1e-5)
    comfy.model_management.unload_all_models()
    # ComfyUI's own patching and unpatching makes new tensors, with requires_grad False, of the weights that it swapped.
    ignored = {"requires_grad": 0, "inference": 0}
    assert {**fingerprint(model), **ignored} == {**before, **ignored}


# ── when things go wrong ────────────────────────────────────────────────────────────────────────────────────────────


def test_cancel_saves_what_was_learned_stops_and_leaves_the_model_clean(model, data, monkeypatch):
    from tidetable.runtime import progress

    before, original = fingerprint(model), progress.TrainingReporter.__call__

    def cancel_at_three(self, event):
        if getattr(event, "step", 0) == 3:
            comfy.model_management.interrupt_current_processing()  # what the cancel button does
        original(self, event)

    monkeypatch.setattr(progress.TrainingReporter, "__call__", cancel_at_three)
    known = set(paths.loras_folder().rglob("*.safetensors")) if paths.loras_folder().exists() else set()
    with torch.inference_mode(), pytest.raises(InterruptProcessingException):
        train_lora(model, data[0], TrainConfig(steps=50, batch_size=2), LORA)
    assert fingerprint(model) == before
    (saved,) = set(paths.loras_folder().rglob("*.safetensors")) - known
    assert "step3" in saved.name
    with safe_open(saved, "pt") as file:
        assert file.metadata()["ss_steps"] == "3"
        lora = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert not torch.equal(sample(apply_lora(model, lora), data[1]), sample(model, data[1]))


def test_an_error_in_the_loop_leaves_the_model_clean(model, data, monkeypatch):
    from tidetable.training import engine

    before = fingerprint(model)
    monkeypatch.setattr(engine.Trainer, "_clip_gradients", lambda self: 1 / 0)
    with torch.inference_mode(), pytest.raises(ZeroDivisionError):
        train_lora(model, data[0], CONFIG, LORA)
    assert fingerprint(model) == before
    assert getattr(comfy.model_management, "in_training", False) is False


def with_latents(data, samples):
    return TrainingData([{"samples": samples}], data.positive, None, 0)


BAD_DATA = {
    "empty batch": (lambda d: with_latents(d, torch.zeros(0, 3, 32, 32)), "the latents are empty"),
    "channels": (
        lambda d: with_latents(d, torch.zeros(10, 4, 32, 32)),
        "the latents have 4 channels but this model's have 3",
    ),
    "nan": (lambda d: with_latents(d, torch.full((10, 3, 32, 32), float("nan"))), "nan or inf"),
    "counts": (lambda d: TrainingData(d.latents, d.positive[:3], None, 0), "10 latents but 3 conditionings"),
    "combined": (lambda d: TrainingData(d.latents, [d.positive[0] * 2], None, 0), "this one has 2 entries"),
    "area": (
        lambda d: TrainingData(
            d.latents, [[[d.positive[0][0][0], {**d.positive[0][0][1], "area": (4, 4, 0, 0)}]]], None, 0
        ),
        "cannot carry area",
    ),
    "percent": (lambda d: TrainingData(d.latents, d.positive, None, 80), "validation_percent is 80"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_input_is_refused_in_words_and_changes_nothing(case, data):
    model = inference_copy(tiny.load_tiny_model("mmdit-flow"))
    before, (make, message) = fingerprint(model), BAD_DATA[case]
    with torch.inference_mode(), pytest.raises(ValueError, match=message):
        train_lora(model, make(data[0]), CONFIG, LORA)
    assert fingerprint(model) == before


def test_a_model_without_a_native_target_is_refused(data):
    from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM

    model = ModelSamplingContinuousEDM().patch(tiny.load_tiny_model("unet-v"), "edm", 80.0, 0.002)[0]
    with torch.inference_mode(), pytest.raises(ValueError, match="cannot be trained here: supported are eps, v and x0"):
        train_lora(model, data[0], CONFIG, LORA)


def test_another_architectures_lora_is_refused(data):
    with torch.inference_mode():
        result = train_lora(tiny.load_tiny_model("mmdit-flow"), data[0], CONFIG, LORA)
    with pytest.raises(ValueError, match="adapters match no layer of this model: it is another architecture"):
        apply_lora(tiny.load_tiny_model("unet-v"), result.lora)


@pytest.mark.parametrize("prefix", ["", "   ", "../outside", "x" * 10_000, "a/../../b", "nul\0byte"])
def test_a_bad_file_name_is_refused_and_writes_nothing(prefix):
    lora = {"diffusion_model.x.alpha": torch.tensor(1.0)}
    before = set(paths.loras_folder().parent.rglob("*"))
    with pytest.raises(ValueError, match=r"file name must have|is not a place inside"):
        save_lora_model(lora, prefix)
    assert set(paths.loras_folder().parent.rglob("*.safetensors")) <= before


def test_a_full_disk_is_said_in_words_and_leaves_no_half_file(monkeypatch):
    import errno

    def no_space(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(paths, "save_file", no_space)
    with pytest.raises(ValueError, match="could not write .* No space left on device"):
        save_lora_model({"diffusion_model.x.alpha": torch.tensor(1.0)}, "tests/disk")
    assert not list(paths.loras_folder().rglob("*disk*"))


def test_nothing_is_overwritten():
    lora = {"diffusion_model.x.alpha": torch.tensor(1.0)}
    names = {save_lora_model(lora, "tests/again") for _ in range(3)}
    assert len(names) == 3
