"""Settings as TOML and back, and what is said of text that is not settings."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidetable.training.adapter_settings import AdapterConfig
from tidetable.training.config import LoRAConfig, TrainConfig, with_optimizer
from tidetable.training.optimizers import OptimizerConfig
from tidetable.training.recipe import DensityConfig, ObjectiveConfig
from tidetable.training.settings_text import from_toml, to_toml


pytest.importorskip("tomllib")


@dataclass(frozen=True, kw_only=True)
class Settings:
    train: TrainConfig
    lora: LoRAConfig
    adapter: AdapterConfig | None = None
    name: str = ""


FULL = Settings(
    train=replace(
        with_optimizer(TrainConfig(steps=7, seed=2**63 + 1), OptimizerConfig(name="sgd", accumulate=3, warmup=2)),
        objective=ObjectiveConfig(weighting="min_snr", flow="bridge"),
        timestep_density=DensityConfig(density="piecewise", knots=((0.0, 1.0), (0.5, 2.0), (1.0, 0.25))),
    ),
    lora=LoRAConfig(rank=4, lora_alpha=1e-3),
    adapter=AdapterConfig(kind="lokr", ranks="*attn* = 8,\n*mlp* = 4", include='a"b\\c'),
    name="größer — \t\x01",
)


@pytest.mark.parametrize("settings", [FULL, Settings(train=TrainConfig(), lora=LoRAConfig())], ids=["full", "plain"])
def test_there_and_back(settings):
    assert from_toml(Settings, to_toml(settings, "made by a test\nin two lines")) == settings


@given(
    st.text(st.characters(codec="utf-8")),
    st.floats(min_value=1e-300, max_value=100, allow_nan=False),
    st.integers(0, 2**63 - 1),
)
def test_any_value_comes_back(text, rate, seed):
    settings = Settings(train=TrainConfig(learning_rate=rate, seed=seed), lora=LoRAConfig(), name=text)
    assert from_toml(Settings, to_toml(settings)) == settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps = 500", "stps = 500"), "the job file, train has 'stps', which is not a setting: did you mean 'steps'"),
        (("steps = 500", 'steps = "many"'), "train, steps is 'many', a str, but it must be int"),
        (("steps = 500", "steps = true"), "train, steps is True, a bool, but it must be int"),
        (("steps = 500", "steps = 0"), "train: steps is 0, but it must be at least 1"),
        (('loss = "mse"', 'loss = "mean"'), "train, objective: unknown loss 'mean'"),
        (("[lora]", "[lora"), "is not TOML"),
        (("[lora]", "[train.more]\n[lora]"), "train has 'more', which is not a setting"),
    ],
)
def test_errors_name_the_place(change, message):
    text = to_toml(Settings(train=TrainConfig(), lora=LoRAConfig()))
    assert change[0] in text
    with pytest.raises(ValueError, match=message):
        from_toml(Settings, text.replace(*change))


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="has no 'train', which it needs"):
        from_toml(Settings, 'name = "x"\n')
