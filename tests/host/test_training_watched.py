"""What is said of a run while it trains: the log, the loss map, TensorBoard."""

import json
import sys

import pytest
import torch

from tidetable.runtime import board, paths, tiny
from tidetable.runtime.training import train_lora
from tidetable.runtime.training_run import RunConfig, run_config
from tidetable.tests.host.training_runs import LORA, dataset, quick_run
from tidetable.training.config import TrainConfig
from tidetable.training.validation import VALIDATION_T


pytestmark = pytest.mark.usefixtures("output")

CONFIG = TrainConfig(steps=6, batch_size=2, warmup_steps=0, seed=3, validate_every=3)


@pytest.fixture(scope="module")
def data():
    return dataset()


def train(data, config=CONFIG, **run):
    with torch.inference_mode():
        return train_lora(tiny.load_tiny_model("unet-v"), data, config, LORA, run=quick_run(**run))


def widgets(**changed):
    """The widgets of Training Run as the node hands them over."""
    run, guard = RunConfig(), RunConfig().guard
    names = ("checkpoint_every_steps", "checkpoint_every_minutes", "keep", "resume", "resume_anyway", "log")
    own = {name: getattr(run, name) for name in (*names, "tensorboard")}
    names = ("snapshot_every", "rate_factor", "max_restores")
    watch = {name: getattr(guard, name) for name in names} | {"guard": True, "guard_threshold": guard.threshold}
    return {**own, **watch, **changed}


def test_the_loss_map_and_the_log_have_validation_by_t(data, output):
    result = train(data, log="run.jsonl")
    found = result.loss_map
    assert found["validation_t"] == list(VALIDATION_T) and found["validation_steps"] == [0, 3, 6]
    for row, mean in zip(found["validation_by_t"], found["validation_loss"], strict=True):
        assert sum(row) / len(row) == pytest.approx(mean)
    lines = [json.loads(line) for line in (output / "run.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["event"] == "Validated"]
    assert [[loss for _, loss in line["by_t"]] for line in validations] == found["validation_by_t"]
    assert {line["base"] for line in validations} == {found["validation_base"]}
    steps = [line for line in lines if line["event"] == "StepDone"]
    assert steps[0]["smooth"] == pytest.approx(steps[0]["loss"]) and steps[0]["speed"] is None
    low, high = min(found["loss"]), max(found["loss"])
    for line in steps[1:]:
        assert low <= line["smooth"] <= high and line["speed"] > 0 and line["memory"] > 50e6
    assert steps[-1]["seconds_left"] == 0


def test_a_resumed_run_goes_on_with_the_smoothed_loss(data, output):
    train(data, TrainConfig(steps=6, batch_size=2, warmup_steps=0, seed=3, lr_schedule="constant"), log="whole.jsonl")
    paths.folder_paths.set_output_directory(str(output / "other"))
    for steps in (3, 6):
        config = TrainConfig(steps=steps, batch_size=2, warmup_steps=0, seed=3, lr_schedule="constant")
        train(data, config, log="parts.jsonl")
    whole, parts = (
        [json.loads(line)["smooth"] for line in file.read_text().splitlines() if "StepDone" in line]
        for file in (output / "whole.jsonl", output / "other" / "parts.jsonl")
    )
    assert whole == parts


# ── TensorBoard ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_the_package_it_is_refused_before_training(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as where it is not installed
    with pytest.raises(
        ValueError, match=r"cannot import it.*install the package 'tensorboard'.*or turn it off and use"
    ):
        run_config(**widgets(tensorboard=True))
    assert run_config(**widgets()).tensorboard is False


def test_its_files_have_the_numbers_of_the_loss_map(data, output):
    """A run in two parts: one curve, with the validations and a value for every step."""
    event_files = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run_config(**widgets(tensorboard=True)).tensorboard
    train(data, TrainConfig(steps=3, batch_size=2, warmup_steps=0, seed=3, validate_every=3), tensorboard=True)
    result = train(data, tensorboard=True)
    (folder,) = (output / "tidetable" / "tensorboard").iterdir()
    assert folder.name == next(paths.runs_folder().iterdir()).name
    found = event_files.EventAccumulator(str(folder)).Reload()
    for name, values in {
        "train/loss": result.loss_map["loss"],
        "train/grad_norm": result.loss_map["grad_norm"],
        "validation_by_t/0.5": [row[2] for row in result.loss_map["validation_by_t"]],
    }.items():
        scalars = {event.step: event.value for event in found.Scalars(name)}
        assert [scalars[step] for step in sorted(scalars)] == pytest.approx(values, rel=1e-6)
    assert {"train/smooth", "run/steps_per_second", "run/memory", "validation/base"} <= set(found.Tags()["scalars"])
    assert board.require_tensorboard()
