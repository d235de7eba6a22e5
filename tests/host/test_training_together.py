"""All settings nodes of a training run at once: what one changes, the checkpoints of another must carry."""

import pytest
import torch
from comfy.model_management import InterruptProcessingException

from tidetable.runtime import paths, tiny
from tidetable.runtime.training import train_lora
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.test_training_run import cancel_at, equal
from tidetable.tests.host.training_runs import LORA, dataset, quick_run
from tidetable.training.adapter_settings import AdapterConfig
from tidetable.training.config import TrainConfig
from tidetable.training.optimizers import OptimizerConfig
from tidetable.training.recipe import DensityConfig, ObjectiveConfig


pytestmark = pytest.mark.usefixtures("output")

SETTINGS = {
    "dora-adafactor": (
        {"kind": "dora", "rank": 4, "rank_dropout": 0.2, "max_norm": 1.0},
        {
            "name": "adafactor",
            "warmup": 2,
            "accumulate": 2,
            "lr_schedule": "rex",
            "ema_decay": 0.9,
            "ema_device": "cpu",
        },
        {"loss": "huber", "weighting": "min_snr", "offset_noise": 0.05, "input_perturbation": 0.1},
        {"density": "beta", "beta_a": 2.0, "t_min": 0.1},
    ),
    "loha-sgd": (
        {"kind": "loha", "rank": 2, "module_dropout": 0.3},
        {"name": "sgd", "lr_schedule": "linear", "warmup": 3},
        {"loss": "l1", "weighting": "p2", "gamma": 1.0, "pyramid_discount": 0.3, "ot_pairing": True},
        {"density": "cosmap", "stratified": False},
    ),
    "lokr-bridge": (
        {"kind": "lokr", "rank": 4},
        {"name": "adamw", "warmup": 0, "accumulate": 2},
        {"flow": "bridge"},
        {"density": "logit_normal", "shift_mode": "shift", "shift": 3.0},
    ),
}


@pytest.fixture(scope="module")
def data():
    return dataset()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_cancelled_run_with_all_settings_goes_on_bit_for_bit(name, data, monkeypatch):
    adapter, optimizer, objective, density = SETTINGS[name]
    config = TrainConfig(
        steps=8,
        batch_size=2,
        seed=3,
        validate_every=3,
        objective=ObjectiveConfig(**objective),
        timestep_density=DensityConfig(**density),
    )
    settings = {"adapter": AdapterConfig(**adapter), "optimizer": OptimizerConfig(**optimizer)}
    model = inference_copy(tiny.load_tiny_model("unet-eps" if name == "lokr-bridge" else "unet-v"))
    before = fingerprint(model)

    def train(run=None, **changed):
        with torch.inference_mode():
            return train_lora(model, data, config, LORA, run=run, **{**settings, **changed})

    complete = train()
    with monkeypatch.context() as patch:
        cancel_at(4, patch)
        with pytest.raises(InterruptProcessingException):
            train(quick_run())
    assert equal(train(quick_run()), complete)
    assert len(list(paths.runs_folder().iterdir())) == 1
    train(quick_run(), adapter=AdapterConfig(**{**adapter, "rank": 3}))
    assert len(list(paths.runs_folder().iterdir())) == 2, "another rank is another run"
    assert fingerprint(model) == before
