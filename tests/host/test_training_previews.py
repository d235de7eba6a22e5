"""Previews: the pictures that the saved LoRA draws in stock nodes, and a run that does not notice them."""

import comfy.model_management
import comfy.samplers
import nodes as host_nodes
import numpy as np
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import BasicScheduler, KSamplerSelect, SamplerCustom
from PIL import Image

from tidetable.nodes.training import SaveLoRA
from tidetable.nodes.training_preview import TrainingPreview
from tidetable.runtime import paths, previews, tiny
from tidetable.runtime.lora_keys import apply_lora
from tidetable.runtime.prediction import patch_flow_graft
from tidetable.runtime.trainable import training_session
from tidetable.runtime.training import train_lora
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.test_tiny import encode
from tidetable.tests.host.training_runs import LORA, dataset, quick_run
from tidetable.training.adapter_settings import AdapterConfig
from tidetable.training.checkpoint import read_newest
from tidetable.training.config import TrainConfig
from tidetable.training.optimizers import OptimizerConfig
from tidetable.training.recipe import ObjectiveConfig


pytestmark = pytest.mark.usefixtures("output")

CONFIG = TrainConfig(steps=4, batch_size=2, learning_rate=5e-3, warmup_steps=0, lr_schedule="constant", seed=3)
PROMPTS = ("a bright green letter K on a dark blue background", "a red letter A on a white background")
CASES = {
    "eps": ("unet-eps", {}),
    "v": ("unet-v", {}),
    "flow": ("mmdit-flow", {}),
    "graft": ("unet-eps", {"objective": ObjectiveConfig(flow="graft")}),
    "average": ("mmdit-flow", {"ema_decay": 0.9}),
}


@pytest.fixture(scope="module")
def data():
    return dataset()


@pytest.fixture(scope="module")
def vae():
    return tiny.load_tiny_vae()


@pytest.fixture(scope="module")
def prompts():
    clip = tiny.load_tiny_clip()
    with torch.inference_mode():
        return [encode(clip, text) for text in PROMPTS], encode(clip, "")


def made(model, prompts, name="euler", **changed):
    """The output of the node Training Preview, with stock nodes before it."""
    with torch.inference_mode():
        given = {
            "sampler": [KSamplerSelect.execute(name)[0]],
            "sigmas": [BasicScheduler.execute(model, "simple", 5, 1.0)[0]],
            "positive": prompts[0],
            "negative": [prompts[1]],
            "every": [2],
            "cfg": [3.0],
            "seed": [11],
            "width": [128],
            "height": [96],
        }
        return TrainingPreview.execute(**{**given, **changed})[0]


def train(model, data, config=CONFIG, **settings):
    with torch.inference_mode():
        return train_lora(model, data, config, LORA, **settings)


def same(first, second) -> bool:
    lora = all(torch.equal(first.lora[key], second.lora[key]) for key in first.lora)
    return lora and first.loss_map == second.loss_map


def unfinished():
    return set(paths.loras_folder().rglob("unfinished*"))


def picture_files(folder="training_00001"):
    return sorted((paths.previews_folder(folder)).iterdir())


# ── the law ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", CASES)
def test_a_preview_is_what_the_saved_lora_draws_in_stock_nodes(case, data, prompts, vae, monkeypatch):
    name, settings = CASES[case]
    model, config = inference_copy(tiny.load_tiny_model(name)), TrainConfig(**{**vars_of(CONFIG), **settings})
    before, drawn, original = fingerprint(model), [], previews.Previewer.picture
    monkeypatch.setattr(
        previews.Previewer, "picture", lambda self, samples: drawn.append(samples) or original(self, samples)
    )
    seen = patch_flow_graft(model, config.objective.graft_shift) if case == "graft" else model
    preview = made(seen, prompts, vae=[vae])
    train(model, data, config, preview=preview)
    if case != "graft":  # ComfyUI leaves a clone's sampling on the model that they share until the next load
        assert fingerprint(model) == before
    # Half of the run is a run of half the steps.
    for step, pictures in ((2, drawn[:2]), (4, drawn[2:])):
        lora = train(model, data, TrainConfig(**{**vars_of(config), "steps": step})).lora
        with torch.inference_mode():
            file = SaveLoRA.execute(lora, f"tests/{case}", "")[0]
            stock, _ = host_nodes.LoraLoader().load_lora(seen, None, file, 1.0, 0.0)
            for number, (positive, ours) in enumerate(zip(prompts[0], pictures, strict=True), 1):
                start = host_nodes.EmptyLatentImage().generate(128, 96, 1)[0]
                negative = prompts[1]
                chosen = stock, True, 11, 3.0, positive, negative, preview.sampler, preview.sigmas, start
                theirs = SamplerCustom.execute(*chosen)[0]["samples"]
                assert theirs.shape == ours.shape == (1, 3, 12, 16)
                assert torch.allclose(ours, theirs, atol=1e-4)
                chosen = seen, *chosen[1:]
                assert not torch.allclose(ours, SamplerCustom.execute(*chosen)[0]["samples"], atol=1e-2)
                image = host_nodes.VAEDecode().decode(vae, {"samples": theirs})[0][0]
                with Image.open(picture_files()[step - 2 + number - 1]) as file_of_ours:
                    shown = np.asarray(file_of_ours, dtype=np.float32)
                assert np.abs(shown - 255 * image.numpy()).max() <= 1.1


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_without_a_vae_the_colors_are_those_of_comfyuis_own_previews(data, prompts):
    """The embedded models' latents are pictures already, so the rough colors are the colors."""
    model = tiny.load_tiny_model("mmdit-flow")
    result = train(model, data, preview=made(model, prompts, every=[0]))
    assert [file.name for file in picture_files()] == ["step000004_prompt01.png", "step000004_prompt02.png"]
    with torch.inference_mode():
        start = host_nodes.EmptyLatentImage().generate(128, 96, 1)[0]
        sampler, sigmas = KSamplerSelect.execute("euler")[0], BasicScheduler.execute(model, "simple", 5, 1.0)[0]
        chosen = result.model, True, 11, 3.0, prompts[0][0], prompts[1], sampler, sigmas, start
        latent = SamplerCustom.execute(*chosen)[0]["samples"][0]
    with Image.open(picture_files()[0]) as file:
        shown = torch.from_numpy(np.asarray(file, dtype=np.float32))
    expected = (latent.movedim(0, -1) + 1).div(2).clamp(0, 1) * 255
    assert shown.shape == (12, 16, 3) and (shown - expected).abs().max() <= 1.1


def test_a_latent_and_its_mask_are_where_the_picture_starts(data, prompts):
    model = tiny.load_tiny_model("unet-v")
    mask = torch.zeros(1, 1, 12, 16)
    mask[..., 8:] = 1
    latent = {"samples": torch.full((1, 3, 12, 16), 0.5), "noise_mask": mask}
    train(model, data, preview=made(model, prompts, latent=[latent], every=[0]))
    with Image.open(picture_files()[0]) as file:
        shown = np.asarray(file)
    assert (abs(shown[:, :8].astype(int) - 191) <= 1).all() and not (abs(shown[:, 8:].astype(int) - 191) <= 1).all()


# ── the run does not notice ─────────────────────────────────────────────────────────────────────────────────────────


def test_weights_optimizer_average_and_losses_are_the_same_bits_with_previews(data, prompts, output, monkeypatch):
    """With a sampler that draws noise of its own, dropouts, a moving average, validation and another optimizer."""
    config = TrainConfig(steps=6, batch_size=2, seed=3, validate_every=2)
    settings = {
        "adapter": AdapterConfig(kind="dora", rank=4, rank_dropout=0.2, module_dropout=0.2),
        "optimizer": OptimizerConfig(name="adamw", warmup=2, ema_decay=0.9, accumulate=2),
    }
    model = inference_copy(tiny.load_tiny_model("unet-v"))
    results, states = [], []
    for on in (False, True):
        paths.folder_paths.set_output_directory(str(output / str(on)))
        preview = made(model, prompts, "euler_ancestral") if on else None
        torch.manual_seed(5)
        results.append(train(model, data, config, run=quick_run(), preview=preview, **settings))
        states.append((read_newest(next(paths.runs_folder().iterdir()))[0], torch.get_rng_state()))
    assert same(*results)
    (plain, random_before), (watched, random_after) = states
    assert torch.equal(random_before, random_after)
    assert flat(plain) == flat(watched) and len(list(flat(plain))) > 100
    assert [file.name for file in picture_files(next(paths.runs_folder().iterdir()).name)] == [
        f"step{step:06}_prompt{number:02}.png" for step in (2, 4, 6) for number in (1, 2)
    ]


def flat(value, name=""):
    """Every leaf of nested state, tensors as lists."""
    if isinstance(value, dict):
        return {key: item for part in value for key, item in flat(value[part], f"{name}.{part}").items()}
    if isinstance(value, list | tuple):
        return {key: item for part, entry in enumerate(value) for key, item in flat(entry, f"{name}.{part}").items()}
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value}


def test_a_run_goes_on_with_other_previews_or_none(data, prompts, monkeypatch):
    """What is looked at is no part of the run's identity, and its pictures stay together."""
    from tidetable.tests.host.test_training_run import cancel_at

    model = tiny.load_tiny_model("unet-v")
    complete = train(model, data)
    preview = made(model, prompts, every=[1])
    with monkeypatch.context() as patch:
        cancel_at(2, patch)
        with pytest.raises(InterruptProcessingException):
            train(model, data, run=quick_run(), preview=preview)
    resumed = train(model, data, run=quick_run(), preview=made(model, prompts, every=[3]))
    assert same(resumed, complete)
    (run,) = paths.runs_folder().iterdir()
    steps = [entry["filename"][:10] for entry in resumed.ui["images"]]
    assert steps == [f"step{step:06}" for step in (1, 1, 3, 3, 4, 4)], "step 2 was cancelled"
    assert {entry["subfolder"] for entry in resumed.ui["images"]} == {f"tidetable/previews/{run.name}"}
    assert all((paths.previews_folder(run.name) / entry["filename"]).is_file() for entry in resumed.ui["images"])


def test_runs_without_a_name_do_not_write_over_each_other(data, prompts):
    model = tiny.load_tiny_model("mmdit-flow")
    folders = [train(model, data, preview=made(model, prompts)).ui["images"][0]["subfolder"] for _ in range(2)]
    assert folders == ["tidetable/previews/training_00001", "tidetable/previews/training_00002"]
    assert len(picture_files("training_00001")) == len(picture_files("training_00002")) == 4


@pytest.mark.parametrize(
    ("count", "prompts", "size"),
    [(1, 1, (768, 576)), (2, 2, (768, 288)), (8, 2, (768, 1152)), (9, 1, (768, 576)), (2, 3, (512, 192))],
)
def test_the_sheet_has_every_picture_in_its_place(count, prompts, size):
    colors = [(20 * index, 255 - 20 * index, 100) for index in range(count)]
    whole = previews.sheet([Image.new("RGB", (128, 96), color) for color in colors], prompts)
    assert whole.size == size
    columns = prompts * max(1, round(count**0.5 / prompts))
    width, height = 768 // columns, 576 // columns
    for index, color in enumerate(colors):
        assert whole.getpixel((index % columns * width + width // 2, index // columns * height + height // 2)) == color


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class GreedyVAE:
    """A VAE that needs all memory: every model that ComfyUI may move is moved away first, as on a small GPU."""

    def __init__(self, vae):
        self.vae, self.patcher = vae, vae.patcher

    def decode(self, samples):
        comfy.model_management.free_memory(1e30, torch.device("cpu"))
        return self.vae.decode(samples)


def test_a_greedy_vae_does_not_move_the_model_in_training(data, prompts, vae):
    """With a LoRA on it: moved away, its weights would be the base model's."""
    base = inference_copy(tiny.load_tiny_model("unet-v"))
    model = train(base, data).model
    plain = train(model, data)
    before = fingerprint(model)
    assert same(train(model, data, preview=made(model, prompts, vae=[GreedyVAE(vae)])), plain)
    assert fingerprint(model) == before
    assert len(picture_files()) == 4


def test_what_left_in_place_protects_and_for_how_long(data):
    model = apply_lora(tiny.load_tiny_model("unet-v"), train(tiny.load_tiny_model("unet-v"), data).lora)
    with training_session(model) as denoiser:
        patched = fingerprint(model)["weights"]
        device = torch.device("cpu")

        def runs_out_of_memory():
            with previews.left_in_place(denoiser.loaded, device):
                comfy.model_management.free_memory(1e30, device)
                assert fingerprint(model)["weights"] == patched
                raise MemoryError

        with pytest.raises(MemoryError):
            runs_out_of_memory()
        comfy.model_management.free_memory(1e30, device)
        assert fingerprint(model)["weights"] != patched, "and afterwards it is ComfyUI's again"


def test_wrappers_draw_along_but_for_compiled_code(data, prompts):
    """Code that torch.compile makes of a model with adapters could be used after the run, when they are gone."""
    calls, model = [], tiny.load_tiny_model("mmdit-flow").clone()
    for key in ("torch.compile", "other"):
        model.add_wrapper_with_key(
            WrappersMP.APPLY_MODEL, key, lambda run, *args, key=key, **more: calls.append(key) or run(*args, **more)
        )
    train(model, data, preview=made(model, prompts, every=[0]))
    assert set(calls) == {"other"} and set(model.wrappers[WrappersMP.APPLY_MODEL]) == {"torch.compile", "other"}
    assert WrappersMP.PREPARE_SAMPLING not in model.wrappers


# ── cancel, failures ────────────────────────────────────────────────────────────────────────────────────────────────


def test_cancel_within_a_preview_stops_at_that_step_and_saves_the_training_weights(data, prompts, monkeypatch):
    """Also that the moving average, which was being shown, is not what the checkpoint holds."""
    model, calls = inference_copy(tiny.load_tiny_model("mmdit-flow")), []
    config = TrainConfig(**{**vars_of(CONFIG), "ema_decay": 0.9, "steps": 6})
    complete, before, earlier = train(model, data, config), fingerprint(model), unfinished()

    def cancelled_at_its_second_step(model, x, sigmas, extra_args, **_):
        for index, sigma in enumerate(sigmas[:-1]):
            if index == 1:
                comfy.model_management.interrupt_current_processing()  # what the cancel button does
            x = model(x, sigma * x.new_ones(len(x)), **extra_args)
            calls.append(index)
        return x

    sampler = comfy.samplers.KSAMPLER(cancelled_at_its_second_step)
    with pytest.raises(InterruptProcessingException):
        train(model, data, config, run=quick_run(), preview=made(model, prompts, sampler=[sampler], every=[3]))
    assert calls == [0], "within one step of the sampler"
    assert fingerprint(model) == before and getattr(comfy.model_management, "in_training", False) is False
    (saved,) = unfinished() - earlier
    assert "step3" in saved.name and picture_files(next(paths.runs_folder().iterdir()).name) == []
    assert same(train(model, data, config, run=quick_run()), complete), "and the run goes on bit for bit"


class FailingVAE(GreedyVAE):
    def decode(self, samples):
        raise comfy.model_management.OOM_EXCEPTION("out of memory")


def test_a_preview_that_fails_costs_a_notice_and_not_the_run(data, prompts, vae, caplog):
    model = inference_copy(tiny.load_tiny_model("unet-eps"))
    before, plain = fingerprint(model), train(model, data)
    result = train(model, data, preview=made(model, prompts, vae=[FailingVAE(vae)]))
    assert same(result, plain) and fingerprint(model) == before
    assert caplog.text.count("no preview of prompt 1 at step 2: out of memory; the run goes on") == 1
    assert result.ui == {"images": []}


def bad(name, value):
    return lambda model, prompts: made(model, prompts, **{name: value})


REFUSED = {
    "no prompt": (bad("positive", []), "there is no prompt to preview"),
    "two samples": (bad("latent", [{"samples": torch.zeros(2, 3, 8, 8)}]), "has 2 samples: connect one"),
    "channels": (bad("latent", [{"samples": torch.ones(1, 4, 8, 8)}]), "has 4 channels but this model's have 3"),
    "no steps": (bad("sigmas", [torch.zeros(1)]), "so no step"),
    "control": (bad("negative", [[[torch.zeros(1, 4, 32), {"control": object()}]]]), "cannot carry control"),
    "every": (bad("every", [-1]), "every is -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drawn_is_refused_before_the_first_step(case, data, prompts):
    model, (make, message) = inference_copy(tiny.load_tiny_model("mmdit-flow")), REFUSED[case]
    before, saved = fingerprint(model), unfinished()
    with pytest.raises(ValueError, match=message):
        train(model, data, preview=make(model, prompts))
    assert fingerprint(model) == before and unfinished() == saved
