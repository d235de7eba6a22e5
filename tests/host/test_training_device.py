"""A step of training stays on the model's device. Without a GPU: torch's meta device refuses mixtures just as a GPU."""

import comfy.model_patcher
import pytest
import torch

from tidetable.benchmarks import published
from tidetable.benchmarks.training_shapes import SHAPES, meta_inputs
from tidetable.runtime.gradients import memory_saving
from tidetable.runtime.trainable import ComfyDenoiser
from tidetable.training.adapter_kinds import AdapterNetwork
from tidetable.training.adapter_settings import AdapterConfig
from tidetable.training.adapters import select_targets
from tidetable.training.config import TrainConfig
from tidetable.training.data import Dataset
from tidetable.training.engine import Trainer
from tidetable.training.memory import MemoryConfig
from tidetable.training.recipe import ObjectiveConfig


CPU, META, TINY = torch.device("cpu"), torch.device("meta"), SHAPES["tiny-sdxl"]
OBJECTIVES = {
    "native": ObjectiveConfig(),
    "x0": ObjectiveConfig(prediction="x0"),
    "weighted": ObjectiveConfig(weighting="min_snr", loss="huber"),
    "offset": ObjectiveConfig(offset_noise=0.1, input_perturbation=0.1),
    "pyramid": ObjectiveConfig(pyramid_discount=0.3),
}


@pytest.fixture(scope="module")
def denoiser():
    """A small SDXL on the meta device, as a session leaves it on a GPU: its schedule, kept by us, on the CPU."""
    model = published.on_meta(TINY, TINY.full)
    model.requires_grad_(False)
    model.model_sampling = comfy.model_base.model_sampling(model.model_config, model.model_type)
    made = ComfyDenoiser(comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU))
    model.model_sampling.to(META)
    made.device = model.device = META
    return made


def test_the_meta_device_refuses_mixtures():
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2) * torch.ones(2, device=META)


@pytest.mark.parametrize(
    ("objective", "blocks"), [("native", "blocks"), *((objective, "off") for objective in OBJECTIVES)]
)
def test_a_step_stays_on_the_device(denoiser, objective, blocks):
    x, _, inputs = meta_inputs(TINY)
    row = {"c_crossattn": inputs["context"], "y": inputs["y"]}
    dataset = Dataset([x[0].float()] * 4, [row] * 4, row)
    diffusion_model = denoiser.real.diffusion_model
    layers = select_targets(dict(diffusion_model.named_modules()), "linear_conv")
    network = AdapterNetwork(layers, AdapterConfig(rank=4, rank_dropout=0.1, module_dropout=0.5), META)
    config = TrainConfig(steps=1, batch_size=4, caption_dropout=0.3, objective=OBJECTIVES[objective])
    trainer = Trainer(config, denoiser, network.trainable(), dataset)
    trainer.adapter, trainer.rows_at_once = network, 2
    with network.installed(), memory_saving(diffusion_model, MemoryConfig(gradient_checkpointing=blocks)):
        loss = trainer._gradients()
    assert loss.device == META
    assert all(parameter.grad.device == META for parameter in network.trainable())
