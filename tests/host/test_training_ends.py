"""However a run ends: the MODEL is what it was, what was learned is on disk, the run goes on, and nothing stays."""

import gc
import os
import signal
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import comfy.model_management
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from safetensors.torch import load_file

from tidetable.runtime import paths, tiny, training
from tidetable.runtime.saving import save_lora_model
from tidetable.runtime.trainable import ComfyDenoiser
from tidetable.runtime.training import AdapterConfig, TrainingData, train_lora
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.model_zoo import zoo
from tidetable.tests.host.test_training_run import equal
from tidetable.tests.host.training_runs import LORA, dataset, quick_run
from tidetable.training.adapter_kinds import AdapterNetwork
from tidetable.training.checkpoint import checkpoints, read_checkpoint, read_newest
from tidetable.training.config import TrainConfig
from tidetable.training.engine import Trainer
from tidetable.training.guard import GuardConfig
from tidetable.training.optimizers import OptimizerConfig
from tidetable.training.recipe import DensityConfig, ObjectiveConfig


pytestmark = pytest.mark.usefixtures("output")

# One sample at a time: a trainer that halves its batch when memory runs out has nothing left to halve.
CONFIG = TrainConfig(steps=5, batch_size=1, warmup_steps=0, seed=3, learning_rate=1e-3)


@pytest.fixture(scope="module")
def data():
    made = dataset(6)
    return TrainingData(made.latents, made.positive, made.negative, 0)


@pytest.fixture(params=["unet-v", "mmdit-flow"])
def model(request):
    return inference_copy(tiny.load_tiny_model(request.param))


def train(model, data, config=CONFIG, **settings):
    with torch.inference_mode():
        return train_lora(model, data, config, LORA, **{"run": quick_run(), **settings})


def interrupt():
    comfy.model_management.interrupt_current_processing()  # what the cancel button does


def fail():
    raise RuntimeError("a kernel failed")


def run_out():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


ENDS = {
    "cancel": (interrupt, InterruptProcessingException),
    "error": (fail, RuntimeError),
    "out of memory": (run_out, torch.OutOfMemoryError),
}


@contextmanager
def at_forward(model, number, happens):
    """Something happens in the forward pass of this number (1-based), in a layer in the middle of the network.

    Memory that ran out stays so: with less to do at once it is the same again.
    """
    layers = [m for m in model.model.diffusion_model.modules() if type(m).__name__ == "Linear"]
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == number or (happens is run_out and len(calls) > number):
            happens()

    handle = layers[len(layers) // 2].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def loras():
    return set(paths.loras_folder().rglob("*.safetensors"))


def living():
    gc.collect()
    return [x for x in gc.get_objects() if type(x) in (Trainer, AdapterNetwork, ComfyDenoiser)]


# ── every end ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("end", ENDS)
def test_whatever_ends_a_run_the_model_is_bitwise_clean_and_the_run_goes_on(end, model, data):
    happens, error = ENDS[end]
    with torch.inference_mode():
        complete = train_lora(model, data, CONFIG, LORA)
    before, known = fingerprint(model), loras()
    with at_forward(model, 3, happens), pytest.raises(error):
        train(model, data)
    assert fingerprint(model) == before
    assert getattr(comfy.model_management, "in_training", False) is False
    (saved,) = loras() - known
    learned = int(saved.name.split("step")[1].split("_")[0])
    (folder,) = paths.runs_folder().iterdir()
    # Most layers of ComfyUI hear of a cancel; a network of others would finish its forward pass, and so the step.
    assert learned in ((2, 3) if end == "cancel" else (2,))
    assert learned == int(checkpoints(folder)[0].stem.removeprefix("step_"))
    assert any(bool(value.any()) for key, value in load_file(saved).items() if key.endswith("lora_up.weight"))
    assert equal(train(model, data), complete)
    assert fingerprint(model) == before


def test_success_leaves_the_model_bitwise_clean(model, data):
    before = fingerprint(model)
    train(model, data)
    assert fingerprint(model) == before and getattr(comfy.model_management, "in_training", False) is False


@pytest.mark.parametrize("end", [None, *ENDS])
def test_memory_is_returned(end, data):
    """Nothing of a run lives on: no trainer, no adapter, and the model goes when its last user lets it go."""
    happens, error = ENDS.get(end, (lambda: None, None))
    model, result = inference_copy(tiny.load_tiny_model("unet-v")), None
    assert living() == []
    with at_forward(model, 3, happens), pytest.raises(error) if error else nullcontext():
        result = train(model, data)
    assert (result is None) == (end is not None)
    assert living() == []
    there = weakref.ref(model.model)
    del model, result
    comfy.model_management.unload_all_models()
    gc.collect()
    assert there() is None


@pytest.mark.parametrize("forward", [1, 6, 8])
def test_a_cancel_in_the_middle_of_an_accumulated_step_waits_for_one_batch_and_loses_that_step_only(forward, data):
    """Four batches a step: a cancel in the sixth forward pass lets the seventh not begin."""
    model, calls = tiny.load_tiny_model("unet-v"), []
    optimizer = OptimizerConfig(accumulate=4, warmup=0, ema_decay=0.9, ema_device="cpu")
    with torch.inference_mode():
        complete = train_lora(model, data, CONFIG, LORA, optimizer=optimizer)
    known, network = loras(), model.model.diffusion_model
    handle = network.register_forward_pre_hook(lambda *_: calls.append(1))
    with at_forward(model, forward, interrupt), pytest.raises(InterruptProcessingException):
        train(model, data, optimizer=optimizer)
    handle.remove()
    assert len(calls) == forward
    assert len(loras() - known) == (forward > 4), "before the first step is done there is nothing to save"
    assert equal(train(model, data, optimizer=optimizer), complete)


def test_a_cancel_before_the_first_step_is_said(data, caplog):
    model = tiny.load_tiny_model("unet-v")
    known = loras()
    with at_forward(model, 1, fail), pytest.raises(RuntimeError):
        train(model, data)
    assert loras() == known and "stopped before its first step was done: there is nothing to save" in caplog.text


def test_a_request_to_end_that_comes_while_what_was_learned_is_saved_loses_nothing(data, monkeypatch):
    """One process of several dies: the others' gradients fail, they begin to save, and torchrun ends them."""
    asked, known = [], loras()

    def stop(number, frame):
        raise SystemExit("stopped")

    def disturbed(*args):
        asked.append(os.kill(os.getpid(), signal.SIGTERM))
        return paths.save_lora(*args)

    monkeypatch.setattr(training, "save_lora", disturbed)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        model = tiny.load_tiny_model("unet-v")
        with at_forward(model, 3, fail), pytest.raises(RuntimeError, match="a kernel failed"):
            train(model, data)
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked and len(loras() - known) == 1


def test_steps_below_the_checkpoint_return_what_was_learned_with_an_average_in_main_memory(data):
    model, optimizer = tiny.load_tiny_model("unet-v"), OptimizerConfig(warmup=0, ema_decay=0.9, ema_device="cpu")
    with at_forward(model, 4, fail), pytest.raises(RuntimeError):
        train(model, data, optimizer=optimizer)
    (folder,) = paths.runs_folder().iterdir()
    average = read_newest(folder)[0]["trainer"]["weights"]["average"]["average"]
    now = train(model, data, replace(CONFIG, steps=1), optimizer=optimizer)
    assert now.lora.metadata["ss_steps"] == "3" and len(now.loss_map["loss"]) == 3
    factors = [value for key, value in now.lora.items() if not key.endswith("alpha")]
    assert len(factors) == len(average)
    assert {tuple(f.flatten().tolist()) for f in factors} == {tuple(a.flatten().tolist()) for a in average}


def test_checkpoints_by_time_come_without_a_count_of_steps_and_one_is_always_made_at_the_end(data):
    model = tiny.load_tiny_model("unet-v")
    for minutes, found in ((1e-9, 5), (60.0, 1), (0.0, 1)):
        run = quick_run(checkpoint_every_steps=0, checkpoint_every_minutes=minutes, keep=9, resume="off")
        train(model, data, run=run)
        newest = max(paths.runs_folder().iterdir(), key=lambda folder: folder.stat().st_mtime)
        assert len(checkpoints(newest)) == found
        assert checkpoints(newest)[0].stem == "step_00000005"


def test_another_objective_is_refused_field_by_field(data):
    model = tiny.load_tiny_model("unet-v")
    train(model, data)
    (folder,) = paths.runs_folder().iterdir()
    other = replace(CONFIG, objective=ObjectiveConfig(loss="huber"), timestep_density=DensityConfig(density="cosmap"))
    with pytest.raises(ValueError, match=r"train\.objective\.loss: mse in the checkpoint, huber now") as caught:
        train(model, data, other, run=quick_run(resume=folder.name))
    assert "train.timestep_density" in str(caught.value) and "train.seed" not in str(caught.value)


def test_an_optimizer_that_no_checkpoint_can_hold_costs_the_checkpoints_and_not_the_run(data, caplog):
    pytest.importorskip("pytorch_optimizer")
    optimizer, known = OptimizerConfig(name="other", class_name="AdaShift", warmup=0), loras()
    model = tiny.load_tiny_model("unet-v")
    result = train(model, data, optimizer=optimizer)
    assert result.lora.metadata["ss_steps"] == "5"
    assert "no checkpoint at step 1: a checkpoint cannot hold" in caplog.text and "use another optimizer" in caplog.text
    with at_forward(model, 3, fail), pytest.raises(RuntimeError, match="a kernel failed"):
        train(model, data, optimizer=optimizer)
    assert len(loras() - known) == 1


# ── the guard, through the whole path ───────────────────────────────────────────────────────────────────────────────


def test_the_guard_gives_up_with_everything_saved(data):
    """From the thirtieth step on the network puts out garbage: one restore is allowed, the second ends the run."""
    model = inference_copy(tiny.load_tiny_model("mmdit-flow"))
    steps, known, before = [], loras(), fingerprint(model)
    handle = model.model.diffusion_model.register_forward_hook(
        lambda _, args, output: steps.append(1) or output * (1.0 if len(steps) <= 30 else 1e8)
    )
    config = replace(CONFIG, steps=60)
    run = quick_run(guard=GuardConfig(max_restores=1, snapshot_every=10))
    with pytest.raises(ValueError, match=r"put the weights back 1 times .* lower learning_rate \(now 0\.001\)"):
        train(model, data, config, run=run)
    handle.remove()
    assert fingerprint(model) == before
    (saved,) = loras() - known
    good = load_file(saved)
    assert all(torch.isfinite(value).all() for value in good.values()) and "step34" in saved.name
    # The weights of step 20 or 30 are what a run of that length without the garbage has.
    clean = train(model, data, config, run=quick_run(resume="off", checkpoint_every_steps=10, keep=9))
    assert clean.lora.metadata["ss_steps"] == "60"
    newest = max(paths.runs_folder().iterdir(), key=lambda folder: folder.name)
    learned = {tuple(v.flatten().tolist()) for key, v in good.items() if not key.endswith("alpha")}
    found = []
    for path in checkpoints(newest):
        parameters = read_checkpoint(path)["trainer"]["weights"]["parameters"]
        if {tuple(p.flatten().tolist()) for p in parameters} == learned:
            found.append(path.stem)
    assert found in (["step_00000020"], ["step_00000030"])


def test_adapters_on_layers_that_take_no_part_are_reported(caplog):
    """Qwen's last block computes text that nobody reads: adapters on it stay as they are."""
    generator = torch.Generator().manual_seed(0)
    latents = [{"samples": torch.randn(4, 16, 1, 8, 8, generator=generator)}]
    row = [[torch.randn(1, 6, 32, generator=generator), {}]]
    run, adapter = quick_run(guard=GuardConfig(dead_after=3)), AdapterConfig(rank=2, targets="linear")
    with torch.inference_mode():
        result = train_lora(
            zoo("qwen_image"), TrainingData(latents, [row]), replace(CONFIG, steps=4), LORA, run=run, adapter=adapter
        )
    dead = sum(not value.any() for key, value in result.lora.items() if key.endswith("lora_up.weight"))
    assert dead > 0
    assert f"{dead} of " in caplog.text and "are still zero after 3 steps: their layers take no part" in caplog.text


# ── disks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def full_disk(limit: int):
    """The system itself refuses every byte of a file beyond `limit`."""
    resource = pytest.importorskip("resource")
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(os.name != "posix", reason="limits on a file's size are for POSIX systems")
def test_a_full_disk_refuses_the_lora_in_words_and_the_same_result_is_saved_later(data):
    lora = train(tiny.load_tiny_model("unet-v"), data).lora
    known = loras()
    with full_disk(10_000), pytest.raises(ValueError, match=r"could not write .*Free some space .* then queue again"):
        save_lora_model(lora, "tests/full")
    assert loras() == known and not list(paths.loras_folder().rglob("*.tmp"))
    back = load_file(paths.loras_folder() / save_lora_model(lora, "tests/full"))
    assert all(torch.equal(back[key], lora[key]) for key in lora)


def test_a_loras_folder_that_cannot_be_written_loses_nothing(data, monkeypatch, tmp_path, caplog):
    """A file stands where the folder should be, as nobody, not even root, can write through it."""
    blocked, model = tmp_path / "blocked", tiny.load_tiny_model("unet-v")
    blocked.write_text("a file")
    monkeypatch.setattr(paths, "loras_folder", lambda: blocked)
    with at_forward(model, 3, fail), pytest.raises(RuntimeError, match="a kernel failed"):
        train(model, data, run=None)
    (saved,) = (tmp_path / "loras").rglob("*.safetensors")
    assert "step2" in saved.name and f"saved {saved}" in caplog.text and f"could not write {blocked}" in caplog.text
