"""Several processes learn what one does, and another number of them can go on from their checkpoint."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tidetable.training.checkpoint import read_newest
from tidetable.training.data import Dataset
from tidetable.training.distributed import World, parts
from tidetable.training.validation import shared


def run(folder: Path, size: int, steps: int) -> dict:
    """What rank 0 of `size` processes has after `steps` steps, from the folder's checkpoint on."""
    folder.mkdir(exist_ok=True)
    meeting = folder / f"meeting_{size}_{steps}"
    children = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("distributed_child.py")), *map(str, (rank, size, meeting)),
             str(folder), str(steps)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    for child in children:
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0, output
    saved, _ = read_newest(folder)
    assert saved is not None
    return saved


def close(a: dict, b: dict) -> bool:
    pairs = zip(a["trainer"]["weights"]["parameters"], b["trainer"]["weights"]["parameters"], strict=True)
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in pairs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("alone"), 1, 12)


def test_processes_share_a_batch(tmp_path, alone):
    two = run(tmp_path, 2, 12)
    assert alone["losses"] == pytest.approx(two["losses"], rel=1e-5)
    assert alone["validations"] == pytest.approx(two["validations"], rel=1e-5)
    assert close(alone, two)
    moved = alone["trainer"]["weights"]["parameters"]
    assert moved[0].abs().sum() > 0 and moved[2].abs().sum() > 0 and moved[3].abs().sum() == 0
    assert alone["batches"][10:] == [4] * 24 and two["batches"][5:] == [2] * 24


def test_another_number_of_processes_goes_on(tmp_path, alone):
    run(tmp_path, 1, 5)
    assert close(run(tmp_path, 4, 12), alone)


def test_shares():
    shares = [World(rank, 3).share(12) for rank in range(3)]
    assert [row for share in shares for row in range(12)[share]] == list(range(12))
    with pytest.raises(ValueError, match="a batch of 10 cannot be shared by 3"):
        World(0, 3).share(10)
    assert list(parts(4, 2)) == [slice(0, 2), slice(2, 4)]


@pytest.mark.parametrize("together", [False, True])
def test_a_validation_takes_each_sample_once(together):
    """Processes that go together have as many batches each: those without samples of their own see one again."""
    data = Dataset([torch.zeros(1, 2, width) for width in (2, 2, 3, 2, 2, 2)], [""] * 6)
    batches = [list(shared(data, 2, World(rank, 3, together))) for rank in range(3)]
    seen = [row for own in batches for rows, counts in own if counts for row in rows]
    assert sorted(seen) == list(range(6))
    assert [len(own) for own in batches] == ([2, 2, 2] if together else [2, 1, 1])
