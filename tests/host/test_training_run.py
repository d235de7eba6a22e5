"""Training runs that are cut short, on real ComfyUI models: what is saved, and how the run goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfy.model_management import InterruptProcessingException

from devtools import loading
from tidetable.runtime import paths, tiny
from tidetable.runtime.progress import TrainingReporter
from tidetable.runtime.training import train_lora
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.training_runs import CONFIG_OF_CHILD, LORA, dataset, quick_run
from tidetable.tests.test_architecture import ROOT
from tidetable.training.checkpoint import checkpoints
from tidetable.training.config import TrainConfig


pytestmark = pytest.mark.usefixtures("output")

CONFIG = TrainConfig(steps=9, batch_size=2, warmup_steps=2, seed=3, ema_decay=0.9, validate_every=3)


@pytest.fixture(scope="module")
def data():
    return dataset()


@pytest.fixture(params=["unet-v", "mmdit-flow"])
def model(request):
    return inference_copy(tiny.load_tiny_model(request.param))


def train(model, data, config=CONFIG, lora=LORA, **run):
    with torch.inference_mode():
        return train_lora(model, data, config, lora, run=quick_run(**run))


def cancel_at(step, monkeypatch):
    """What the cancel button does, at a step."""
    original = TrainingReporter.__call__

    def call(self, event):
        if event.step == step:
            comfy.model_management.interrupt_current_processing()
        original(self, event)

    monkeypatch.setattr(TrainingReporter, "__call__", call)


def cancelled(model, data, step, monkeypatch, config=CONFIG, **run):
    with monkeypatch.context() as patch:
        cancel_at(step, patch)
        with pytest.raises(InterruptProcessingException):
            train(model, data, config, **run)


def same_lora(first, second) -> bool:
    return all(torch.equal(first.lora[key], second.lora[key]) for key in first.lora)


def equal(first, second) -> bool:
    return first.loss_map == second.loss_map and same_lora(first, second)


def run_folders():
    return sorted(paths.runs_folder().iterdir()) if paths.runs_folder().exists() else []


# ── going on ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_cancelled_run_goes_on_bit_for_bit_when_it_is_queued_again(model, data, monkeypatch):
    with torch.inference_mode():
        complete = train_lora(model, data, CONFIG, LORA)
    before = fingerprint(model)
    for step in (1, 4, 6):  # one after the other, 6 with its validation made before the cancel
        cancelled(model, data, step, monkeypatch)
        assert fingerprint(model) == before
    assert equal(train(model, data), complete)
    assert len(run_folders()) == 1
    again = train(model, data)
    assert equal(again, complete), "a finished run is found too"
    assert fingerprint(model) == before


def test_steps_can_be_raised_and_a_run_can_be_finished_now(data, monkeypatch):
    model = tiny.load_tiny_model("unet-v")
    constant = replace(CONFIG, lr_schedule="constant")
    cancelled(model, data, 4, monkeypatch, constant)
    now = train(model, data, replace(constant, steps=1))
    assert now.lora.metadata["ss_steps"] == "4" and len(now.loss_map["loss"]) == 4
    longer = train(model, data, replace(constant, steps=12))
    with torch.inference_mode():
        complete = train_lora(model, data, replace(constant, steps=12), LORA)
    assert same_lora(longer, complete)


def test_cancel_in_the_first_step_saves_nothing_and_leaves_the_model_clean(model, data, monkeypatch):
    """ComfyUI's own operations see the cancel inside the first forward pass, before any event."""
    before = fingerprint(model)
    hook = model.model.diffusion_model.register_forward_pre_hook(
        lambda *_: comfy.model_management.throw_exception_if_processing_interrupted()
    )
    comfy.model_management.interrupt_current_processing()
    try:
        with pytest.raises(InterruptProcessingException):
            train(model, data)
    finally:
        hook.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert fingerprint(model) == before
    assert not list(paths.runs_folder().rglob("*.safetensors")) and not list(paths.loras_folder().rglob("*.tmp"))


def test_a_killed_process_loses_at_most_a_step_and_goes_on_bit_for_bit(data, output):
    """kill -9 at a random moment, in a process of its own, then the same run here."""
    model, moment = tiny.load_tiny_model("unet-v"), random.SystemRandom().uniform(0.05, 0.9)
    with torch.inference_mode():
        complete = train_lora(model, data, CONFIG_OF_CHILD, LORA)
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "dev.py"), "exec", str(Path(__file__).with_name("training_child.py")), str(output)],
        env={**os.environ, "COMFYUI_PATH": str(loading.comfyui_path()), "COMFYUI_PYTHON": sys.executable},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (found := [p for folder in run_folders() for p in checkpoints(folder)]):
        assert child.poll() is None and time.monotonic() < deadline, child.stdout.read().decode()
        time.sleep(0.02)
    time.sleep(moment)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    found = [p for folder in run_folders() for p in checkpoints(folder)]
    reached = int(found[0].stem.removeprefix("step_"))
    assert 1 <= reached < CONFIG_OF_CHILD.steps, f"killed after {moment} s at step {reached}: too late to say anything"
    assert equal(train(model, data, CONFIG_OF_CHILD), complete), f"killed after {moment} s at step {reached}"
    assert len(run_folders()) == 1


def test_two_trainings_one_after_the_other_keep_to_themselves(data, monkeypatch):
    model = tiny.load_tiny_model("unet-v")
    other = replace(CONFIG, seed=4)
    cancelled(model, data, 4, monkeypatch)
    cancelled(model, data, 5, monkeypatch, other)
    assert len(run_folders()) == 2
    with torch.inference_mode():
        expected = [train_lora(model, data, config, LORA) for config in (CONFIG, other)]
    assert equal(train(model, data), expected[0]) and equal(train(model, data, other), expected[1])


def test_off_starts_anew_beside_the_old_run(data, monkeypatch):
    model = tiny.load_tiny_model("unet-v")
    cancelled(model, data, 4, monkeypatch)
    old = {path: path.read_bytes() for path in checkpoints(run_folders()[0])}
    with torch.inference_mode():
        assert equal(train(model, data, resume="off"), train_lora(model, data, CONFIG, LORA))
    assert len(run_folders()) == 2 and all(path.read_bytes() == content for path, content in old.items())


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_another_data_set_model_or_setting_is_refused_field_by_field(data, monkeypatch):
    model = tiny.load_tiny_model("unet-v")
    cancelled(model, data, 4, monkeypatch)
    name = run_folders()[0].name
    changed = replace(CONFIG, learning_rate=0.002, caption_dropout=0.1)
    with pytest.raises(ValueError) as caught:
        train(model, dataset(8), changed, resume=name)
    text = str(caught.value)
    assert "train.learning_rate: 0.001 in the checkpoint, 0.002 now" in text
    assert "train.caption_dropout: 0.0 in the checkpoint, 0.1 now" in text
    assert "data.samples: 8 in the checkpoint, 7 now" in text and "data.latents: " in text
    assert "resume_anyway" in text and "train.seed" not in text and "model." not in text
    with pytest.raises(ValueError, match=r"model\.prediction: v in the checkpoint, eps now"):
        train(tiny.load_tiny_model("unet-eps"), data, resume=name)
    with pytest.raises(ValueError, match="the same rank and layers"):
        train(model, data, lora=replace(LORA, rank=2), resume=name, resume_anyway=True)
    assert train(model, dataset(8), changed, resume=name, resume_anyway=True).lora.metadata["ss_steps"] == "9"


@pytest.mark.parametrize("name", ["nothing", "../outside", "", "a/b"])
def test_a_run_that_is_not_there_is_refused_with_the_names_that_are(name, data, monkeypatch):
    model = tiny.load_tiny_model("unet-v")
    cancelled(model, data, 1, monkeypatch)
    with pytest.raises(ValueError, match=rf"there is no run .*there: {run_folders()[0].name}\)"):
        train(model, data, resume=name)


def test_the_newest_checkpoint_cut_in_half_falls_back_to_the_one_before(data, monkeypatch, caplog):
    model = tiny.load_tiny_model("unet-v")
    cancelled(model, data, 5, monkeypatch)
    newest = checkpoints(run_folders()[0])[0]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    with torch.inference_mode():
        complete = train_lora(model, data, CONFIG, LORA)
    assert equal(train(model, data), complete)
    assert "step_00000005.safetensors is cut off or damaged" in caplog.text and "at step 4 of 9" in caplog.text


# ── a disk that refuses ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_place_that_cannot_be_written_is_refused_before_training(data, output):
    (output / "tidetable").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="could not write checkpoints to .*Free some space or start ComfyUI with"):
        train(tiny.load_tiny_model("unet-v"), data)


@pytest.mark.skipif(os.name != "posix", reason="limits on a file's size are for POSIX systems")
def test_a_disk_that_fills_up_during_the_run_costs_a_warning_and_nothing_else(data, caplog):
    """The system refuses the bytes of every checkpoint after the third step."""
    import resource

    model = tiny.load_tiny_model("unet-v")
    original, old = TrainingReporter.__call__, resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(self, event):
        if event.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        original(self, event)

    with torch.inference_mode():
        complete = train_lora(model, data, CONFIG, LORA)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainingReporter, "__call__", fill)
            assert equal(train(model, data), complete)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert "no checkpoint at step 4: could not write" in caplog.text and "Free some space" in caplog.text
    assert [path.stem for path in checkpoints(run_folders()[0])] == ["step_00000003", "step_00000002"]
    assert equal(train(model, data), complete), "and the older ones still work"


# ── the log ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_log_has_every_step_and_says_where_it_went_on(data, output, monkeypatch):
    model = tiny.load_tiny_model("unet-v")
    cancelled(model, data, 4, monkeypatch, log="logs/run.jsonl")
    result = train(model, data, log="logs/run.jsonl")
    lines = [json.loads(line) for line in (output / "logs" / "run.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "StepDone"]
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert [line["loss"] for line in steps] == result.loss_map["loss"]
    assert any(line["event"] == "Notice" and "resumed" in line["text"] for line in lines)
    assert [line["step"] for line in lines if line["event"] == "Validated"] == [0, 3, 6, 9]


@pytest.mark.parametrize("log", ["../outside.jsonl", "/somewhere/else.jsonl", ".", "nul\0byte"])
def test_a_log_outside_the_output_folder_is_refused(log, data):
    with pytest.raises(ValueError, match="is not a file inside"):
        train(tiny.load_tiny_model("unet-v"), data, log=log)
