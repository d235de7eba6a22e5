"""Two processes that share the base learn what one alone does, and hold half of it each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tidetable.tests.host.sharded_child import run_all, run_case
from tidetable.training.sharding import refuse_unfit


NAMES = ("mmdit", "unet", "flux", "flux_kept", "unknown", "wrong", "preview", "4@taken", "2@given", "2@adamw", "2@unet")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """The folder with what two processes wrote."""
    folder = tmp_path_factory.mktemp("shared")
    run_all("taken", 2, folder / "taken")
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
    assert not alone["error"] and all(alone["alive"])  # one process keeps the weights
    assert any(value.abs().max() > 0 for key, value in expected.items() if "lora_up" in key)
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


def test_previews_are_for_one_process(shared):
    assert all("previews are drawn by one process" in one["error"] for one in facts(shared, "preview"))


def test_weights_that_cannot_be_cut_are_named():
    for weight, reason in (
        (torch.ones(()), "is a single number"),
        (torch.ones(4, 3).t(), "is not contiguous"),
        (torch.ones(2, 2).to(torch.float8_e4m3fn), "is torch.float8_e4m3fn"),
    ):
        network = torch.nn.ParameterDict({"odd": torch.nn.Parameter(weight, requires_grad=False)})
        with pytest.raises(ValueError, match=f"the weights cannot be shared by several processes: odd {reason}"):
            refuse_unfit(network)


def test_a_network_that_adds_in_place_needs_recomputed_blocks(shared):
    for one in facts(shared, "flux_kept"):
        assert "Flux adds to tensors in place" in one["error"] and one["part"] == one["whole"]


def test_all_weights_another_number_of_processes_goes_on(shared, tmp_path):
    """Begun by one process and ended by two, and the other way around."""
    expected, _ = run_all("alone", 4, tmp_path)
    for rank in range(2):
        assert close(load_file(shared / f"4@taken_{rank}.safetensors"), expected)
    assert close(run_all("given", 4, shared / "given")[0], expected)


@pytest.mark.parametrize("name", ["adamw", "unet"])
def test_all_weights_two_processes_learn_what_one_does(shared, tmp_path, name):
    expected, _ = run_all(name, 2, tmp_path)
    for rank, one in enumerate(facts(shared, f"2@{name}")):
        assert close(load_file(shared / f"2@{name}_{rank}.safetensors"), expected)
        assert abs(one["part"] / one["whole"] - 0.5) < 0.01
