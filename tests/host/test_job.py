"""A job: exported from the graph, run by train.py as one process and as two, stopped, and gone on with."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import folder_paths
import psutil
import pytest
import torch
from safetensors.torch import load_file

from devtools import loading
from tidetable.runtime import tiny
from tidetable.runtime.dataset import images_dataset
from tidetable.runtime.encoding import encode_dataset
from tidetable.runtime.job import Job, export_job, read_job, run_job
from tidetable.runtime.model_sampling import patch_flow_shift
from tidetable.runtime.tiny_data import tiny_dataset
from tidetable.runtime.training import train_lora
from tidetable.runtime.training_data import TrainingData
from tidetable.runtime.training_run import RunConfig
from tidetable.training.adapter_settings import AdapterConfig
from tidetable.training.checkpoint import checkpoints
from tidetable.training.dataset.buckets import BucketConfig
from tidetable.training.memory import MemoryConfig
from tidetable.training.optimizers import OptimizerConfig


pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="job files need Python 3.11")

PROMPT = {
    "1": {"class_type": "Tidetable_LoadTinyModel", "inputs": {"name": "mmdit-flow"}},
    "2": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 2.5}},
    "3": {"class_type": "KSampler", "inputs": {"model": ["2", 0]}},
    "4": {"class_type": "Tidetable_ExportJob", "inputs": {"model": ["2", 0]}},
}
RUN = RunConfig(checkpoint_every_steps=2, checkpoint_every_minutes=0)
SETTINGS = {
    "steps": 6, "batch_size": 4, "rank": 4, "lora_alpha": 4.0, "learning_rate": 1e-3, "seed": 5, "targets": "attention",
    "caption_dropout": 0.2, "validation_percent": 20, "validate_every": 3, "filename_prefix": "tidetable/job",
    "optimizer": OptimizerConfig(accumulate=2, warmup=2, ema_decay=0.5), "adapter": AdapterConfig(rank=4, kind="dora"),
    "run": RUN,
}  # fmt: skip


@pytest.fixture
def encoded(output):
    folder_paths.set_output_directory(str(output / "output"))  # where train.py looks, given --base-directory
    images, captions = tiny_dataset("glyphs", 12, 0)
    dataset = images_dataset([images], captions)[0]
    with torch.inference_mode():
        return encode_dataset(dataset, tiny.load_tiny_vae(), tiny.load_tiny_clip(), "job", BucketConfig(resolution=256))


def export(encoded, **changes) -> Path:
    return export_job("test", PROMPT, "4", encoded, {**SETTINGS, **changes})


def command(job: Path, processes: int, *arguments: str) -> list[str]:
    script = [str(Path(__file__).with_name("job_process.py")), str(job), "--base-directory", str(job.parents[4])]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else []), *arguments, *script, "--cpu"]


def run(job: Path, processes: int = 1) -> str:
    """All that the processes said."""
    environment = {**os.environ, "COMFYUI_PATH": str(loading.comfyui_path())}
    done = subprocess.run(
        command(job, processes),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return f"{done.stdout}\nexit {done.returncode}"


def in_the_node(job: Job, encoded) -> dict:
    """What Train LoRA makes of the same settings, in this process."""
    model = patch_flow_shift(tiny.load_tiny_model("mmdit-flow"), "shift", 2.5, 0.0, 256, 256)[0]
    data = TrainingData(validation_percent=20, encoded=encoded)
    with torch.inference_mode():
        return train_lora(model, data, job.train, job.lora, adapter=job.adapter).lora


def newest_lora() -> dict:
    folder = Path(folder_paths.get_output_directory()) / "loras" / "tidetable"
    return load_file(max(folder.glob("job*.safetensors")))


def test_a_job_is_the_node_s_run_with_one_process_and_with_two(encoded):
    expected = in_the_node(read_job(export(encoded)), encoded)
    for processes in (1, 2):
        memory = MemoryConfig(gradient_checkpointing="blocks") if processes == 2 else None
        path = export(encoded, run=RunConfig(resume="off"), shard_base=processes == 2, memory=memory)
        said = run(path, processes)
        assert ("each of 2 processes holds" in said) == (processes == 2), said
        assert "exit 0" in said and "step 6 of 6" in said and said.count("saved tidetable/job") == 1, said
        found = newest_lora()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-6, msg=f"{key} with {processes}")


def test_a_lost_process_stops_the_others_and_the_job_goes_on_with_another_number(encoded):
    """Killed in the middle, two processes leave a checkpoint; one process then ends where one alone would have."""
    path = export(encoded, steps=24)
    expected = in_the_node(read_job(path), encoded)
    environment = {**os.environ, "COMFYUI_PATH": str(loading.comfyui_path())}
    parent = subprocess.Popen(
        command(path, 2), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    runs = Path(folder_paths.get_output_directory()) / "tidetable" / "runs"
    deadline = time.monotonic() + 120
    while not any(checkpoints(folder) for folder in runs.glob("*")):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(second_of(parent.pid), signal.SIGKILL)
    killed = time.monotonic()
    said, _ = parent.communicate(timeout=60)
    assert parent.returncode != 0 and time.monotonic() - killed < 60
    assert "training stopped at step" in said and "SIGKILL" in said, said
    said = run(path)
    assert "exit 0" in said and "resumed" in said, said
    found = newest_lora()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=2e-5, msg=key)


def second_of(parent: int) -> int:
    """The process of rank 1 among the children of torchrun."""
    for child in psutil.Process(parent).children(recursive=True):
        if child.environ().get("RANK") == "1" and "job_process" in " ".join(child.cmdline()):
            return child.pid
    raise AssertionError("there is no second process")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rank = 4", "rnak = 4"), "job.toml, lora has 'rnak', which is not a setting: did you mean 'rank'?"),
        (("batch_size = 4", "batch_size = 0"), "batch_size is 0, but it must be at least 1"),
    ],
)
def test_errors_name_the_place(encoded, change, message):
    path = export(encoded)
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(ValueError, match=re.escape(message)):
        run_job(read_job(path), path.parent)


def test_a_graph_without_the_model_is_refused_in_words(encoded):
    path = export(encoded)
    path.write_text(path.read_text().replace('model_output = ["2", 0]', 'model_output = ["9", 0]'))
    said = run(path)
    assert "job.toml: ComfyUI does not take the job's graph" in said and "exit 1" in said, said


def test_the_node_writes_a_job_on_a_server(client, object_info):
    widgets = object_info["Tidetable_ExportJob"]["input"]
    assert {"dataset", "steps", "job_name", "filename_prefix"} <= set(widgets["required"])
    assert not {"latents", "preview", "text_encoder"} & {*widgets["required"], *widgets["optional"]}
    settings = {n: spec[1]["default"] for n, spec in widgets["required"].items() if "default" in (spec[1:] or [{}])[0]}
    encode = {n: s[1]["default"] for n, s in object_info["Tidetable_EncodeDataset"]["input"]["required"].items()
              if "default" in (s[1:] or [{}])[0]}  # fmt: skip
    prompt = {
        "1": {"class_type": "Tidetable_LoadTinyModel", "inputs": {"name": "mmdit-flow"}},
        "2": {"class_type": "Tidetable_TinyDataset", "inputs": {"which": "glyphs", "count": 8, "seed": 0}},
        "3": {"class_type": "Tidetable_DatasetImages",
              "inputs": {"images": ["2", 0], "captions": ["2", 1], "repeats": 1}},
        "4": {"class_type": "Tidetable_EncodeDataset",
              "inputs": {**encode, "dataset": ["3", 0], "vae": ["1", 2], "clip": ["1", 1], "resolution": 256}},
        "5": {"class_type": "Tidetable_ExportJob",
              "inputs": {**settings, "model": ["1", 0], "dataset": ["4", 0], "job_name": "served"}},
    }  # fmt: skip
    (text,) = client.run(prompt).outputs["5"]["text"]
    job = read_job(Path(text))
    assert job.model_output == ("1", 0) and job.train.steps == settings["steps"] and job.adapter is None


def test_what_a_job_cannot_have_is_refused(encoded):
    with pytest.raises(ValueError, match="a job cannot have text_encoder"):
        export(encoded, text_encoder=object())
    with pytest.raises(ValueError, match="is not a folder inside"):
        export_job("../up", PROMPT, "4", encoded, dict(SETTINGS))
