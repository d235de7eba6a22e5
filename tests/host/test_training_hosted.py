"""Training on a MODEL that others have worked on (LoRAs, hooks, wrappers, torch.compile), and runs on a server."""

import json
import time

import comfy.hooks
import comfy.patcher_extension
import folder_paths
import pytest
import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel

from devtools.client import InterruptedPromptError
from tidetable.runtime import tiny
from tidetable.runtime.training import train_lora
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.training_runs import LORA, dataset, quick_run
from tidetable.training.config import TrainConfig


CONFIG = TrainConfig(steps=3, batch_size=2, warmup_steps=0, seed=3)


@pytest.fixture(scope="module")
def data():
    return dataset(6)


@pytest.fixture
def model():
    return inference_copy(tiny.load_tiny_model("mmdit-flow"))


def train(model, data, **settings):
    with torch.inference_mode():
        return train_lora(model, data, CONFIG, LORA, **settings)


def same_lora(first, second) -> bool:
    return all(torch.equal(first.lora[key], second.lora[key]) for key in first.lora)


def test_torch_compile_on_the_model_changes_neither_the_run_nor_the_wrapper(model, data):
    compiled = TorchCompileModel.execute(model, "inductor")[0]
    before, wrappers = fingerprint(compiled), repr(compiled.wrappers)
    assert same_lora(train(compiled, data), train(model, data))
    assert fingerprint(compiled) == before and repr(compiled.wrappers) == wrappers


def test_a_foreign_hook_stays_and_takes_part(model, data):
    """Somebody's forward hook on a layer is part of the model as it is: it runs in training and is there afterwards."""
    calls, layer = [], model.model.diffusion_model.final_layer
    plain = train(model, data)
    handle = layer.register_forward_hook(lambda _, args, output: calls.append(1) or output * 1.5)
    before = fingerprint(model)
    hooked = train(model, data)
    assert fingerprint(model) == before and before["hooks"] == 1 and len(calls) >= CONFIG.steps
    assert not same_lora(hooked, plain)
    handle.remove()


def test_wrappers_for_sampling_stay_and_take_no_part(model, data):
    calls, kind = [], comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    wrapped = model.clone()
    wrapped.add_wrapper_with_key(kind, "test", lambda run, *args, **kwargs: calls.append(1) or run(*args, **kwargs))
    assert same_lora(train(wrapped, data), train(model, data))
    assert calls == [] and len(wrapped.wrappers[kind]["test"]) == 1


def test_hooks_on_a_conditioning_are_refused_in_words(model, data):
    hooks = comfy.hooks.HookGroup()
    conditioning = [[data.positive[0][0][0], {**data.positive[0][0][1], "hooks": hooks}]]
    before = fingerprint(model)
    with pytest.raises(ValueError, match="cannot carry hooks"):
        train(model, type(data)(data.latents, [conditioning], None, 0))
    assert fingerprint(model) == before


def test_a_lora_on_the_model_makes_it_another_run(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    first = train(model, data, run=quick_run())
    second = train(first.model, data, run=quick_run())
    assert len(list((tmp_path / "tidetable" / "runs").iterdir())) == 2
    assert not same_lora(first, second)


# ── on a real server ────────────────────────────────────────────────────────────────────────────────────────────────


def training_prompt(info, seed: int, steps: int, log: str) -> dict:
    """Tiny dataset to LoRA file, with the defaults of every node as the page would fill them in."""

    def node(kind, /, **inputs):
        specs = {**info[kind]["input"]["required"], **info[kind]["input"].get("optional", {})}
        defaults = {key: spec[1]["default"] for key, spec in specs.items() if len(spec) > 1 and "default" in spec[1]}
        combos = {key: spec[0][0] for key, spec in specs.items() if isinstance(spec[0], list) and spec[0]}
        return {"class_type": kind, "inputs": {**combos, **defaults, **inputs}}

    return {
        "1": node("Tidetable_LoadTinyModel", name="unet-v"),
        "2": node("Tidetable_TinyDataset", count=6),
        "3": node("CLIPTextEncode", clip=["1", 1], text=["2", 1]),
        "4": node("VAEEncode", pixels=["2", 0], vae=["1", 2]),
        "5": node("Tidetable_TrainingRun", checkpoint_every_steps=5, log=log),
        "6": node(
            "Tidetable_TrainLoRA", model=["1", 0], latents=["4", 0], positive=["3", 0], run=["5", 0], seed=seed,
            steps=steps, batch_size=2, rank=2,
        ),
        "7": node("Tidetable_SaveLoRA", lora=["6", 1], filename_prefix=f"tests/queued{seed}"),
    }  # fmt: skip


def log_lines(server, name):
    path = next(server.base_directory.rglob(name))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_cancel_queue_again_and_finish_now(client, comfy_server, object_info):
    """The whole story as a user has it: two cancels, each queue goes on, and a lower `steps` returns the LoRA."""
    reached = 0  # newer ComfyUI shows progress every half percent: five steps of a thousand
    for _ in range(2):
        shown = []

        def cancel(kind, event, shown=shown):
            if kind == "progress" and event["node"] == "6":
                shown.append(event["value"])
                if len(shown) == 2:
                    client.interrupt()

        prompt = training_prompt(object_info, 11, 1000, "story.jsonl")
        with pytest.raises(InterruptedPromptError):
            client.run(prompt, cancel)
        steps = [line["step"] for line in log_lines(comfy_server, "story.jsonl") if line["event"] == "StepDone"]
        assert steps == list(range(1, len(steps) + 1)), "no step was made twice, none is missing"
        assert len(steps) > reached
        reached = len(steps)
    done = client.run(training_prompt(object_info, 11, 1, "story.jsonl"))
    assert done.outputs["7"]["text"][0].startswith("tests/queued11")
    lines = log_lines(comfy_server, "story.jsonl")
    assert [line["step"] for line in lines if line["event"] == "StepDone"][-1] == reached
    assert f"at step {reached} of 1: that is all of it" in [x for x in lines if x["event"] == "Notice"][-1]["text"]


def test_two_trainings_queued_at_once_both_finish(client, comfy_server, object_info):
    ids = [client.queue(training_prompt(object_info, seed, 12, f"both{seed}.jsonl")) for seed in (21, 22)]
    deadline = time.monotonic() + 120
    while not all(client.history(queued) for queued in ids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [client.history(queued)["status"]["status_str"] for queued in ids] == ["success", "success"]
    for seed in (21, 22):
        lines = log_lines(comfy_server, f"both{seed}.jsonl")
        assert [line["step"] for line in lines if line["event"] == "StepDone"] == list(range(1, 13))
