"""Two processes that share the base learn what one alone does, and hold half of it each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tidetable.tests.host.sharded_child import run_case


NAMES = ("mmdit", "unet", "flux", "flux_kept", "unknown", "wrong")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """The folder with what two processes wrote."""
    folder = tmp_path_factory.mktemp("shared")
    script = str(Path(__file__).with_name("sharded_child.py"))
    children = [
        subprocess.Popen([sys.executable, script, str(rank), "2", str(folder / "meeting"), str(folder), *NAMES],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]  # fmt: skip
    for child in children:
        output, _ = child.communicate(timeout=240)
        assert child.returncode == 0, output
    return folder


def facts(folder: Path, name: str) -> list[dict]:
    return [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in range(2)]


def close(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        (found[key] - value).abs().max() <= 1e-5 * value.abs().max() for key, value in expected.items()
    )


@pytest.mark.parametrize("name", ["mmdit", "unet", "flux", "unknown"])
def test_two_processes_learn_what_one_does(shared, name):
    expected, alone = run_case(name)
    assert not alone["error"] and any(value.abs().max() > 0 for key, value in expected.items() if "lora_up" in key)
    for rank, facts_of in enumerate(facts(shared, name)):
        assert not facts_of["error"]
        assert close(load_file(shared / f"{name}_{rank}.safetensors"), expected)
        assert facts_of["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert facts_of["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["mmdit", "unet", "flux"])
def test_each_holds_half_of_the_base(shared, name):
    parts = facts(shared, name)
    whole = parts[0]["whole"]
    assert all(abs(one["part"] / whole - 0.5) < 0.01 for one in parts)
    assert sum(one["part"] for one in parts) == whole
    assert not any(any(one["alive"]) for one in parts)  # the whole weights are gone from the first pass on
    assert len(parts[0]["alive"]) == len(parts[1]["alive"])


def test_the_proof_is_one_of_all_processes(shared):
    first, second = facts(shared, "unknown")
    assert first["said"] == second["said"] and len(first["said"]) == 1
    assert "UnheardOf is not among the networks that are tested" in first["said"][0]
    first, second = facts(shared, "wrong")
    assert first["error"] == second["error"] and "this model cannot be trained here" in first["error"]


def test_a_network_that_adds_in_place_needs_recomputed_blocks(shared):
    for one in facts(shared, "flux_kept"):
        assert "Flux adds to tensors in place" in one["error"] and one["part"] == one["whole"]
