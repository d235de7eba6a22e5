"""A preview of every family that can be trained is what SamplerCustom draws with the result."""

import pytest
import torch
from comfy_extras.nodes_custom_sampler import BasicScheduler, KSamplerSelect, SamplerCustom

from tidetable.runtime import previews
from tidetable.runtime.training import TrainingData, train_lora
from tidetable.tests.host.comparing import fingerprint
from tidetable.tests.host.test_training_families import case
from tidetable.training.config import LoRAConfig, TrainConfig


pytestmark = pytest.mark.usefixtures("output")
__all__ = ["case"]
CONFIG = TrainConfig(steps=2, batch_size=2, learning_rate=1e-2, warmup_steps=0, lr_schedule="constant")


def test_a_preview_is_what_the_result_draws(case, monkeypatch):
    _, model, samples, positive = case
    before, drawn, original = fingerprint(model), [], previews.Previewer.sample
    monkeypatch.setattr(
        previews.Previewer, "sample", lambda self, prompt: drawn.append(original(self, prompt)) or drawn[-1]
    )
    with torch.inference_mode():
        sampler, sigmas = KSamplerSelect.execute("euler")[0], BasicScheduler.execute(model, "simple", 2, 1.0)[0]
        start = {"samples": torch.zeros_like(samples[:1])}
        preview = previews.PreviewConfig(
            sampler=sampler, sigmas=sigmas, positive=positive[:1], negative=positive[1], seed=4, latent=start
        )
        data = TrainingData([{"samples": samples}], positive)
        result = train_lora(model, data, CONFIG, LoRAConfig(rank=4, lora_alpha=4.0), preview=preview)
        assert fingerprint(model) == before
        (ours,), chosen = drawn, (True, 4, preview.cfg, positive[0], positive[1], sampler, sigmas, start)
        theirs, base = (SamplerCustom.execute(one, *chosen)[0]["samples"] for one in (result.model, model))
    size = theirs.abs().max()
    assert torch.allclose(ours, theirs, atol=1e-4 * max(1.0, size.item()))
    assert not torch.allclose(base, theirs, atol=1e-3 * size.item())
    (picture,) = result.ui["images"]
    assert picture["filename"] == "step000002_prompt01.png"
