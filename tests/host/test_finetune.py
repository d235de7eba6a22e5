"""All weights of a model trained by one process: what is saved, what is refused, what stays as it was."""

import comfy.sd
import folder_paths
import pytest
import torch

from tidetable.runtime.finetune import finetune, save_model, with_weights
from tidetable.runtime.trainable import training_session
from tidetable.runtime.training import TrainingData
from tidetable.runtime.training_run import RunConfig
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.guidance_models import normal
from tidetable.tests.host.model_zoo import zoo
from tidetable.training.config import TrainConfig


TEXT = [[normal(1, 6, 32, seed=1), {"pooled_output": normal(1, 32, seed=2)}]]
DATA = TrainingData([{"samples": normal(2, 16, 8, 8)}], [TEXT, TEXT])
# What ComfyUI's loader takes an SD3 file for: as many blocks as its width has heads.
DETECTED = {"depth": 2, "num_blocks": 2, "context_embedder_config": {
    "target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}}}  # fmt: skip
CONFIG = TrainConfig(steps=3, batch_size=2, learning_rate=1e-3, warmup_steps=0)


def predict(model):
    with training_session(model) as denoiser, torch.no_grad():
        x = normal(1, 16, 8, 8, seed=3)
        return denoiser.predict(x, torch.tensor([0.5]), [denoiser.condition(TEXT, x[0])])


def test_what_is_trained_is_saved_as_a_model_that_comfyui_loads(output):
    model = inference_copy(zoo("sd3", **DETECTED))
    before, answer = fingerprint(model), predict(model)
    weights = finetune(model, DATA, CONFIG, RunConfig())
    moved = sum(not torch.equal(value, model.model.state_dict()[name]) for name, value in weights.items())
    assert moved > 0.9 * len(weights) and fingerprint(model) == before and torch.equal(predict(model), answer)
    trained = with_weights(model, weights)
    name = save_model(trained, "some/trained")
    assert name == "some/trained_00001_.safetensors" and save_model(trained, "some/trained") != name
    loaded = comfy.sd.load_diffusion_model(f"{folder_paths.get_output_directory()}/diffusion_models/{name}")
    found = loaded.model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())
    assert torch.equal(predict(loaded), predict(trained)) and not torch.equal(predict(loaded), answer)
    with pytest.raises(ValueError, match="1 of 1 weights have no place"):
        with_weights(model, {"diffusion_model.none.weight": torch.zeros(1)})


def test_weights_in_bf16_are_refused(output):
    model = zoo("sd3")
    model.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="needs them in fp32, and this model has or computes in torch.bfloat16"):
        finetune(model, DATA, CONFIG, RunConfig())
