"""Two processes and one run: the second is told who is there, nothing is spoiled, and a dead one is not waited for."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from comfy.model_management import InterruptProcessingException

from devtools import loading
from tidetable.runtime import paths, run_lock, tiny
from tidetable.runtime.progress import TrainingReporter
from tidetable.runtime.run_lock import NAME, RunLock, is_held
from tidetable.runtime.training import train_lora
from tidetable.tests.host.test_training_run import cancel_at, equal
from tidetable.tests.host.training_runs import CONFIG_OF_CHILD, LORA, dataset, quick_run
from tidetable.tests.test_architecture import ROOT
from tidetable.training.checkpoint import checkpoints
from tidetable.training.config import TrainConfig


pytestmark = pytest.mark.usefixtures("output")

CONFIG = TrainConfig(steps=6, batch_size=2, warmup_steps=2, seed=3)


@pytest.fixture(scope="module")
def data():
    return dataset()


@pytest.fixture
def other():
    """Another process that is there, as a lock would name it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield child, {"pid": child.pid, "started": psutil.Process(child.pid).create_time(), "host": platform.node()}
    child.kill()
    child.wait()


def train(model, data, config=CONFIG, **run):
    with torch.inference_mode():
        return train_lora(model, data, config, LORA, run=quick_run(**run))


def lock_file(folder: Path, **holder) -> Path:
    path = folder / NAME
    path.write_text(json.dumps({"key": "another", **holder}))
    return path


# ── the lock ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lock_is_there_while_it_is_held(output):
    lock = RunLock(output)
    assert json.loads((output / NAME).read_text())["pid"] == os.getpid()
    lock.check()
    lock.release()
    lock.release()
    assert not (output / NAME).exists()


def test_another_process_on_this_machine_is_named_until_it_ends(output, other):
    child, holder = other
    path = lock_file(output, **holder)
    with pytest.raises(ValueError, match=rf"process {child.pid} on .*: wait for it or stop it .* resume to 'off'"):
        RunLock(output)
    child.kill()  # and not waited for: a zombie trains no more
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    RunLock(output).release()
    assert not path.exists()


def test_a_later_process_of_the_same_number_is_not_the_one_that_died(output, other):
    lock_file(output, **{**other[1], "started": other[1]["started"] - 3600})
    RunLock(output).release()


@pytest.mark.parametrize("text", ['{"pid": 1, "started": 0.0, "host": "elsewhere", "key": "x"}', "", "[]", "{cut"])
def test_a_lock_that_cannot_be_asked_counts_while_it_shows_signs_of_life(text, output):
    path = output / NAME
    path.write_text(text)
    assert is_held(output)
    with pytest.raises(ValueError, match=f"delete {path}"):
        RunLock(output)
    long_ago = time.time() - run_lock.SILENT - 5
    os.utime(path, (long_ago, long_ago))
    RunLock(output).release()


def test_a_run_shows_signs_of_life(output, monkeypatch):
    lock = RunLock(output)
    long_ago = time.time() - 1000
    os.utime(lock.path, (long_ago, long_ago))
    lock.touch()
    assert lock.path.stat().st_mtime < long_ago + 1, "not at every step"
    monkeypatch.setattr(run_lock, "SECONDS_BETWEEN_TOUCHES", -1.0)
    lock.touch()
    assert lock.path.stat().st_mtime > long_ago + 500


def test_whoever_lost_the_lock_notices_and_leaves_it_alone(output, other):
    lock = RunLock(output)
    path = lock_file(output, **other[1])
    with pytest.raises(ValueError, match=f"process {other[0].pid}"):
        lock.check()
    lock.release()
    assert path.exists()


# ── the run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_leaves_no_lock_however_it_ends(data, monkeypatch):
    model = tiny.load_tiny_model("unet-v")
    with monkeypatch.context() as patch:
        cancel_at(3, patch)
        with pytest.raises(InterruptProcessingException):
            train(model, data)
    (folder,) = paths.runs_folder().iterdir()
    assert not (folder / NAME).exists()
    with pytest.raises(ValueError, match="was made with something else"):
        train(model, dataset(8), resume=folder.name)
    assert not (folder / NAME).exists()
    train(model, data)
    assert not (folder / NAME).exists()


def test_a_folder_that_is_taken_during_the_run_gets_no_more_checkpoints_and_the_lora_is_saved(data, monkeypatch, other):
    model, original = tiny.load_tiny_model("unet-v"), TrainingReporter.__call__

    def steal(self, event):
        if event.step == 4:
            (folder,) = paths.runs_folder().iterdir()
            lock_file(folder, **other[1])
        original(self, event)

    known = set(paths.loras_folder().rglob("*.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr(TrainingReporter, "__call__", steal)
        with pytest.raises(ValueError, match=f"process {other[0].pid}"):
            train(model, data)
    (folder,) = paths.runs_folder().iterdir()
    assert [path.stem for path in checkpoints(folder)] == ["step_00000003", "step_00000002"]
    (saved,) = set(paths.loras_folder().rglob("*.safetensors")) - known
    assert "step4" in saved.name


@pytest.mark.skipif(os.name != "posix", reason="signals that stop a process are for POSIX systems")
def test_two_comfyuis_in_one_run_the_second_is_refused_and_nothing_is_spoiled(data, output):
    """The first is stopped in the middle, so that it is there for sure while the second tries."""
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "dev.py"), "exec", str(Path(__file__).with_name("training_child.py")), str(output)],
        env={**os.environ, "COMFYUI_PATH": str(loading.comfyui_path()), "COMFYUI_PYTHON": sys.executable},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (found := list(paths.runs_folder().glob("*/step_*.safetensors"))):
        assert child.poll() is None and time.monotonic() < deadline, child.stdout.read().decode()
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGSTOP)
    try:
        folder = found[0].parent
        holder = json.loads((folder / NAME).read_text())
        files = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ValueError, match=rf"trained by another ComfyUI \(process {holder['pid']} on "):
            train(tiny.load_tiny_model("unet-v"), data, CONFIG_OF_CHILD)
        assert {path: path.read_bytes() for path in folder.iterdir()} == files
        train(tiny.load_tiny_model("unet-v"), data, CONFIG_OF_CHILD, resume="off")
        assert len(list(paths.runs_folder().iterdir())) == 2, "beside it"
    finally:
        os.killpg(child.pid, signal.SIGCONT)
    assert child.wait(120) == 0, child.stdout.read().decode()
    with torch.inference_mode():
        complete = train_lora(tiny.load_tiny_model("unet-v"), data, CONFIG_OF_CHILD, LORA)
    assert equal(train(tiny.load_tiny_model("unet-v"), data, CONFIG_OF_CHILD, resume=folder.name), complete)
