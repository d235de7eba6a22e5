"""Trainings in a server's queue, beside each other and beside pictures: each gives what it gives alone."""

import time

import pytest
import torch
from safetensors.torch import load_file

from devtools.client import ExecutionError, InterruptedPromptError
from tidetable.tests.host.test_training_hosted import training_prompt


SAMPLING = {"seed": 5, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def picture_prompt(shade: int) -> dict:
    """Three steps of KSampler on the model that the trainings use, from the latent of a picture at full noise."""
    return {
        "1": {"class_type": "Tidetable_LoadTinyModel", "inputs": {"name": "unet-v"}},
        "2": {"class_type": "EmptyImage", "inputs": {"width": 256, "height": 256, "batch_size": 1, "color": shade}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red glyph"}},
        "4": {"class_type": "VAEEncode", "inputs": {"pixels": ["2", 0], "vae": ["1", 2]}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0], "positive": ["3", 0], "negative": ["3", 0], "latent_image": ["4", 0], **SAMPLING,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
    }  # fmt: skip


def picture(client, shade: int) -> bytes:
    done = client.run(picture_prompt(shade))
    assert "5" in done.seconds, "sampled, not taken from the cache"
    return client.fetch(done.images("7")[0])


def trained(server, name: str) -> dict[str, torch.Tensor]:
    return load_file(next(path for path in server.base_directory.rglob("*.safetensors") if str(path).endswith(name)))


def queued(client, prompts) -> list[dict]:
    ids, deadline = [client.queue(prompt) for prompt in prompts], time.monotonic() + 240
    while not all(client.history(each) for each in ids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return [client.history(each) for each in ids]


def test_pictures_are_the_same_before_and_after_trainings_that_end_in_every_way(client, object_info):
    def cancel(kind, event):
        if kind == "progress" and event["node"] == "6":
            client.interrupt()

    before = picture(client, 0)
    with pytest.raises(InterruptedPromptError):
        client.run(training_prompt(object_info, 31, 2000, "pictures.jsonl"), cancel)
    client.run(picture_prompt(1))  # or the server would take the first picture from its cache
    assert picture(client, 0) == before
    broken = training_prompt(object_info, 32, 4, "pictures.jsonl")
    broken["6"]["inputs"]["validation_percent"] = 50
    broken["5"]["inputs"]["resume"] = "no such run"
    with pytest.raises(ExecutionError, match="there is no run 'no such run'"):
        client.run(broken)
    assert client.run(training_prompt(object_info, 33, 4, "pictures.jsonl")).outputs["7"]["text"]
    client.post("/free", {"unload_models": True, "free_memory": True})
    client.run(picture_prompt(2))
    assert picture(client, 0) == before


def test_two_trainings_and_a_picture_queued_at_once_give_what_each_gives_alone(client, comfy_server, object_info):
    def run(seed, **changed):
        prompt = training_prompt(object_info, seed, 6, f"alone{seed}.jsonl")
        prompt["5"]["inputs"].update(changed)
        return prompt

    together = queued(client, [run(41), picture_prompt(3), run(42)])
    assert [record["status"]["status_str"] for record in together] == ["success"] * 3
    for record in (together[0], together[2]):
        seed = record["prompt"][2]["6"]["inputs"]["seed"]
        alone = client.run(run(seed, resume="off"))
        names = [record["outputs"]["7"]["text"][0], alone.outputs["7"]["text"][0]]
        assert names[0] != names[1]
        first, second = (trained(comfy_server, name) for name in names)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        assert any(bool(value.any()) for key, value in first.items() if key.endswith("lora_up.weight"))


def held(client) -> int:
    """Bytes of live tensors on the server's GPU, once it was told to give everything back and no longer does."""
    client.post("/free", {"unload_models": True, "free_memory": True})
    readings, deadline = [], time.monotonic() + 60
    while len(readings) < 3 or len(set(readings[-3:])) > 1:
        assert time.monotonic() < deadline, readings
        time.sleep(1)
        device = client.get("/system_stats")["devices"][0]
        readings.append(device["torch_vram_total"] - device["torch_vram_free"])
    return readings[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_trainings_and_pictures_in_one_queue_give_the_gpu_its_memory_back(client, object_info):
    def go_through(seed):
        trainings = [training_prompt(object_info, seed + i, 6, f"memory{seed + i}.jsonl") for i in range(2)]
        done = queued(client, [trainings[0], picture_prompt(seed), trainings[1], picture_prompt(seed + 1)])
        assert [record["status"]["status_str"] for record in done] == ["success"] * 4

    go_through(51)  # what the libraries allocate once and keep is there from now on
    before = held(client)
    go_through(53)
    assert held(client) <= before + 2**20  # the weights of a model that stayed would be 3.7 MB
