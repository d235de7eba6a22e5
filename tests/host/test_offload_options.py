"""Training in processes that ComfyUI was started in with each of its options for memory."""

import os
import subprocess
import sys
from pathlib import Path

import comfy.cli_args
import comfy.model_patcher
import pytest
import torch
from safetensors import safe_open

from devtools import loading
from tidetable.tests.host.offload_child import PLACES, learned
from tidetable.tests.host.test_gradients import relative


DYNAMIC = hasattr(comfy.model_patcher, "ModelPatcherDynamic")
STARTS = [["plain", "--lowvram"], ["plain", "--novram"], ["plain", "--cpu"]]
if DYNAMIC:
    STARTS = [["plain", "--lowvram"], ["plain", "--novram", "--disable-dynamic-vram"], ["dynamic", "--cpu"]]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each start learned, by its words: (name of ComfyUI's memory state, its LoRAs, its log)."""
    child, environment = Path(__file__).with_name("offload_child.py"), {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["COMFYUI_PATH"] = str(loading.comfyui_path())
    running = []
    for words in STARTS:
        file = tmp_path_factory.mktemp("start") / "loras.safetensors"
        command = [sys.executable, str(child), str(file), *words]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        running.append((words, file, process))
    found = {}
    for words, file, process in running:
        log = process.communicate(timeout=300)[0].decode()
        assert process.returncode == 0, f"{words}: {log}"
        with safe_open(file, "pt") as saved:
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
            found[" ".join(words)] = saved.metadata()["state"], tensors, log
    return found


def test_every_start_learns_what_a_plain_run_does_here(results):
    expected = {name: tensor for name, tensor in learned("full").items() if not name.endswith("alpha")}
    assert len(expected) > 10
    for words, (_, tensors, _) in results.items():
        for place in PLACES:
            found = [tensors[f"{place}.{name}"] for name in expected]
            assert relative(found, list(expected.values())) < 1e-4, (words, place)


def test_a_cpu_has_one_memory_whatever_comfyui_is_told(results):
    """ComfyUI takes --lowvram and --novram on a CPU and does not act on them: what they do to a card is not seen."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a graphics card")
    assert {state for state, _, _ in results.values()} == {"DISABLED"}


@pytest.mark.skipif(not DYNAMIC, reason="this ComfyUI has no dynamic VRAM")
def test_a_model_with_dynamic_vram_is_loaded_without_and_the_log_says_so(results):
    assert results["dynamic --cpu"][2].count("its file is loaded once more, without") == len(PLACES)
