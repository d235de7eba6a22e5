"""The real server with the pack in it, over the real HTTP and WebSocket API: from boot to picture."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from devtools.client import ExecutionError, InterruptedPromptError, PromptError
from devtools.errors import DevError
from devtools.progress import NodeProgress
from devtools.server import PACK_FOLDER, Server, require_free
from devtools.workflow import to_prompt
from tidetable.nodes import NODES
from tidetable.tests.test_architecture import ROOT


NODE_IDS = {node.GET_SCHEMA().node_id for node in NODES}
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
# The longest that each of these may take in a test; the demo runs them in full.
REDUCED = {"Tidetable_TrainLoRA": {"steps": 4}, "KSampler": {"steps": 4}, "Tidetable_TinyDataset": {"count": 8}}


def reduced(prompt: dict) -> dict:
    """The same prompt with its long loops cut short."""
    for node in prompt.values():
        for name, most in REDUCED.get(node["class_type"], {}).items():
            value = node["inputs"].get(name)
            if isinstance(value, int):
                node["inputs"][name] = min(value, most)
    return prompt


def tiny_sampling(steps: int, model: str = "mmdit-flow") -> dict:
    """A prompt of stock nodes around a tiny model."""
    return {
        "1": {"class_type": "Tidetable_LoadTinyModel", "inputs": {"name": model}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a bright green letter K"}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 256, "height": 256, "batch_size": 1}},
        "4": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0], "seed": 1,
                "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "test"}},
    }  # fmt: skip


# ── boot ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_server_lists_exactly_our_nodes(object_info):
    ours = {name: info for name, info in object_info.items() if name.startswith("Tidetable_")}
    assert set(ours) == NODE_IDS
    assert {info["python_module"] for info in ours.values()} == {f"custom_nodes.{PACK_FOLDER}"}


def test_the_pack_imports_without_complaint_and_quickly(comfy_server):
    log = comfy_server.log_text()
    times = re.findall(r"([\d.]+) seconds(.*): .*" + PACK_FOLDER, log)
    assert len(times) == 1, log
    seconds, remark = times[0]
    assert remark == ""
    # Below 0.05 s on an idle machine (`python3 dev.py bench startup`); this only catches a new heavy import.
    assert float(seconds) < 0.5
    assert not re.search(r'File ".*' + PACK_FOLDER, log), "a traceback through the pack"
    assert "Error while calling comfy_entrypoint" not in log


def test_scripts_are_served_once_each(client):
    ours = [path for path in client.get("/extensions") if "tidetable" in path.lower()]
    assert sorted(ours) == sorted(set(ours))
    assert {path.removeprefix(f"/extensions/{PACK_FOLDER}/") for path in ours} == {
        path.relative_to(ROOT / "web").as_posix() for path in (ROOT / "web").rglob("*.js")
    }


def test_help_pages_are_served(client):
    for node_id in NODE_IDS:
        assert client.request(f"/extensions/{PACK_FOLDER}/docs/{node_id}.md").startswith(b"#")


def test_templates_are_offered(client):
    offered = client.get("/workflow_templates")
    assert sorted(offered[PACK_FOLDER]) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        assert path.with_suffix(".jpg").is_file(), f"{path.name} needs a thumbnail {path.stem}.jpg"


def test_translations_name_only_our_nodes(client):
    for language, texts in client.get("/i18n").items():
        ours = {name for name in texts.get("nodeDefs", {}) if name.startswith("Tidetable_")}
        assert ours <= NODE_IDS, language


# ── prompts ────────────────────────────────────────────────────────────────────────────────────────


def test_there_are_example_workflows():
    assert WORKFLOWS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_workflow_runs(client, object_info, path: Path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    prompt = reduced(to_prompt(workflow, object_info))
    assert any(node["class_type"] in NODE_IDS for node in prompt.values())
    result = client.run(prompt, workflow=workflow)
    assert client.history(result.prompt_id)["status"]["status_str"] == "success"
    images = result.images()
    prefixes = [n["inputs"]["filename_prefix"] for n in prompt.values() if n["class_type"] == "Tidetable_SaveLoRA"]
    loras = client.get("/models/loras")
    assert images or prefixes
    assert all(any(name.startswith(prefix) for name in loras) for prefix in prefixes), loras
    for image in images:
        picture = Image.open(io.BytesIO(client.fetch(image)))
        picture.load()
        assert min(picture.size) >= 32


def test_progress_is_followed(client):
    steps, output = [], io.StringIO()
    prompt = tiny_sampling(steps=5)
    bars = NodeProgress(prompt, stream=output)

    def on_event(kind, data):
        bars(kind, data)
        if kind == "progress" and data["node"] == "4":
            steps.append((data["value"], data["max"]))

    result = client.run(prompt, on_event)
    assert steps[-1] == (5, 5)
    assert steps == sorted(steps)
    assert len(result.images("6")) == 1
    assert "KSampler" in output.getvalue()


def test_a_refused_prompt_says_why(client):
    prompt = tiny_sampling(steps=5)
    prompt["4"]["inputs"]["sampler_name"] = "no such sampler"
    with pytest.raises(PromptError, match=r"node 4 \(KSampler\).*no such sampler"):
        client.run(prompt)


def test_a_node_that_raises_is_named(client):
    """Flow shift on an eps model is refused with the reason."""
    prompt = tiny_sampling(steps=5, model="unet-eps")
    # The defaults of the node, as the page would fill them in.
    info = client.object_info("Tidetable_FlowShift")["Tidetable_FlowShift"]["input"]
    specs = {**info["required"], **info.get("optional", {})}
    inputs = {name: spec[1].get("default") for name, spec in specs.items() if name != "model"}
    prompt["7"] = {"class_type": "Tidetable_FlowShift", "inputs": {**inputs, "model": ["1", 0]}}
    prompt["4"]["inputs"]["model"] = ["7", 0]
    with pytest.raises(ExecutionError) as caught:
        client.run(prompt)
    assert (caught.value.node_id, caught.value.node_type) == ("7", "Tidetable_FlowShift")
    assert caught.value.exception_type == "ValueError"


def test_a_prompt_can_be_cancelled(client):
    def on_event(kind, data):
        if kind == "progress":
            client.interrupt()

    with pytest.raises(InterruptedPromptError):
        client.run(tiny_sampling(steps=500), on_event)
    assert client.run(tiny_sampling(steps=2)).images(), "the server works on after a cancelled prompt"


def test_an_uploaded_picture_is_found_again(client, tmp_path: Path):
    picture = Image.new("RGB", (48, 32), (200, 30, 90))
    picture.save(tmp_path / "upload me.png")
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": client.upload(tmp_path / "upload me.png", "tests")}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    (image,) = client.run(prompt).images("2")
    assert Image.open(io.BytesIO(client.fetch(image))).convert("RGB").tobytes() == picture.tobytes()


# ── starting and ending ────────────────────────────────────────────────────────────────────────────


def test_a_server_that_does_not_start_shows_the_end_of_its_log():
    server = Server(options=["--no-such-option"])
    with pytest.raises(DevError, match=r"(?s)ended with status 2 while starting.*--no-such-option"):
        server.start()
    assert not server.is_running()
    assert not server.base_directory.exists()
    assert (ROOT / "__init__.py").exists(), "the link was removed, not what it points to"


@pytest.mark.skipif(os.name != "posix", reason="the watch on the parent process is for POSIX systems")
def test_a_server_ends_when_its_starter_is_killed():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "from devtools.server import Server; import time\n"
    code += "server = Server().start(); print(server.port, server.base_directory, flush=True); time.sleep(600)"
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    port, base = starter.stdout.readline().split(maxsplit=1)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    deadline = time.monotonic() + 30
    while True:
        try:
            require_free(int(port))
            break
        except DevError:
            assert time.monotonic() < deadline, "the server outlived the process that started it"
            time.sleep(0.2)
    # Its starter had no chance to: remove what it left, the link first.
    (Path(base.strip()) / "custom_nodes" / PACK_FOLDER).unlink()
    shutil.rmtree(base.strip())
