"""Checkpoints: a run that goes on is the run that never stopped, and a damaged file costs one checkpoint."""

import math
import os

import pytest
import torch

from tidetable.tests.training.solvable import PointDenoiser, point_dataset
from tidetable.training.checkpoint import (
    DamagedCheckpointError,
    checkpoints,
    differences,
    digest,
    read_checkpoint,
    read_newest,
    write_checkpoint,
)
from tidetable.training.config import TrainConfig
from tidetable.training.engine import Trainer
from tidetable.training.guard import Guard, GuardConfig


STATE = {
    "numbers": [1, 0.1, True, None, "text", math.inf],
    "pair": (0.9, 0.99),
    "by_index": {0: torch.arange(5), 3: {"exp_avg": torch.randn(2, 3), "step": torch.tensor(7.0)}},
    "half": torch.randn(4).bfloat16(),
}


def same(first, second) -> bool:
    return digest(first) == digest(second) and type(first) is type(second)


def trainer(**settings):
    denoiser = PointDenoiser()
    config = TrainConfig(**{"steps": 40, "learning_rate": 0.05, "warmup_steps": 5, "batch_size": 3, **settings})
    data = point_dataset(empty=0.0)
    return Trainer(config, denoiser, list(denoiser.parameters()), data, point_dataset(2), Guard(GuardConfig()))


def test_what_is_written_is_read(tmp_path):
    read = read_checkpoint(write_checkpoint(tmp_path, 3, STATE, 2))
    assert same(read, STATE)
    assert read["pair"] == (0.9, 0.99) and set(read["by_index"]) == {0, 3} and read["half"].dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003.safetensors"]


def test_the_newest_stay(tmp_path):
    for step in range(1, 12):
        write_checkpoint(tmp_path, step, STATE, 3)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step_{step:08}.safetensors" for step in (11, 10, 9)]


@pytest.mark.parametrize("stop", [1, 7, 39])
@pytest.mark.parametrize("ema", [0.0, 0.99])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, stop, ema):
    settings = {"ema_decay": ema, "caption_dropout": 0.2, "validate_every": 7}
    complete = trainer(**settings)
    events = list(complete.run())
    first = trainer(**settings)
    head = []
    for event in first.run():
        head.append(event)
        if getattr(event, "steps", 0) and event.step == stop:
            write_checkpoint(tmp_path, stop, first.state(), 2)
            break
    second = trainer(**settings)
    second.load_state(read_newest(tmp_path)[0])
    assert head + list(second.run()) == events
    assert torch.equal(second.denoiser.center, complete.denoiser.center)
    assert same(second.state(), complete.state())


def test_a_file_cut_anywhere_is_refused_and_the_one_before_is_used(tmp_path):
    for step in (1, 2):
        whole = write_checkpoint(tmp_path, step, {"step": step, **STATE}, 2)
    data = whole.read_bytes()
    for cut in (0, 5, len(data) // 2, len(data) - 1):
        whole.write_bytes(data[:cut])
        with pytest.raises(DamagedCheckpointError, match="cut off or damaged"):
            read_checkpoint(whole)
    state, notes = read_newest(tmp_path)
    assert state["step"] == 1
    assert len(notes) == 1 and "step_00000002" in notes[0] and "going on from the one before it" in notes[0]
    assert whole.with_suffix(".damaged").is_file(), "set aside, not thrown away"
    assert read_newest(tmp_path)[1] == []


def test_a_flipped_byte_is_seen(tmp_path):
    path = write_checkpoint(tmp_path, 1, STATE, 2)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match="do not match its checksum"):
        read_checkpoint(path)


def test_nothing_readable_names_the_way_out(tmp_path):
    assert read_newest(tmp_path) == (None, [])
    (tmp_path / "step_00000001.safetensors").write_bytes(b"no")
    with pytest.raises(DamagedCheckpointError, match="set resume to 'off'"):
        read_newest(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "step_00000009.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="limits on a file's size are for POSIX systems")
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    """The system itself refuses the bytes: the limit on a file's size is below the checkpoint's."""
    import resource
    import signal

    write_checkpoint(tmp_path, 1, {"a": torch.zeros(10)}, 2)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
        with pytest.raises(OSError, match="File too large"):
            write_checkpoint(tmp_path, 2, {"a": torch.zeros(10_000)}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.safetensors"]
    assert read_newest(tmp_path)[0]["a"].shape == (10,)


def test_differences_name_field_old_and_new():
    lines = differences({"a": 1, "b": 2, "gone": 3}, {"a": 1, "b": 5, "new": 4})
    assert lines == [
        "b: 2 in the checkpoint, 5 now",
        "gone: 3 in the checkpoint, (not there) now",
        "new: (not there) in the checkpoint, 4 now",
    ]


def test_weights_of_another_shape_are_refused():
    state = trainer().state()
    other = PointDenoiser()
    other.center = torch.nn.Parameter(torch.zeros(4))
    run = Trainer(TrainConfig(), other, list(other.parameters()), point_dataset())
    with pytest.raises(ValueError, match="the same rank and layers"):
        run.load_state(state)
    with pytest.raises(ValueError, match="the same ema_decay"):
        trainer(ema_decay=0.9).load_state(state)


def test_what_a_checkpoint_cannot_hold_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"cannot hold state\.optimizer\.x, a object"):
        write_checkpoint(tmp_path, 1, {"optimizer": {"x": object()}}, 1)
    assert list(tmp_path.iterdir()) == []
