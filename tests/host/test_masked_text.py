"""Prior preservation beside a trained text encoder: the model's own answer is without both adapters."""

from dataclasses import replace

import pytest
import torch

from tidetable.runtime.masked import with_masks_and_prior
from tidetable.runtime.text_encoder import LiveText, TextEncoder
from tidetable.runtime.trainable import training_session
from tidetable.runtime.training import build_network
from tidetable.tests.host.test_text_encoder import CONFIG, TEXT, train
from tidetable.tests.host.text_models import CAPTIONS, small_clip, small_model, training_data
from tidetable.tests.host.training_runs import LORA
from tidetable.training.prior import LossTerms
from tidetable.training.recipe import ObjectiveConfig


pytestmark = pytest.mark.usefixtures("output")


def test_the_answer_without_the_adapters_is_without_the_text_encoders_too():
    model, clip = small_model("sd15"), small_clip("sd15")
    encoder, data = TextEncoder(clip, CAPTIONS, TEXT).private(), training_data(clip)
    objective = ObjectiveConfig(masked_loss="on", prior_weight=1.0, prior_on="outside_mask")
    with training_session(model, 0, [encoder.clip.patcher]) as denoiser:
        network = build_network(dict(denoiser.real.diffusion_model.named_modules()), denoiser, LORA, None)
        plain = denoiser.dataset(data.samples(), data.positive, data.negative)
        text = LiveText(encoder, denoiser, 0)
        live = text.dataset(plain, data.positive, data.negative)
        latents = [{"samples": torch.stack(data.samples()), "noise_mask": torch.eye(8)}]
        live = with_masks_and_prior(denoiser, live, latents, data.negative, objective)
        terms = LossTerms(denoiser, live, objective, lambda: text.without(network))
        x_t = torch.stack(list(live.latents[:2]))
        t = denoiser.snap(torch.tensor([0.3, 0.7], dtype=torch.float64))
        with torch.no_grad():
            bare = denoiser._forward(x_t, t, plain.conditions[:2])
            for adapter in text.network.adapters.values():
                adapter.up.normal_()
            with network.installed(), text.installed():
                moved = denoiser.predict(x_t, t, live.conditions[:2])
                own = terms._own_answer(x_t, t, live.conditions[:2])
                again = denoiser.predict(x_t, t, live.conditions[:2])
    assert torch.allclose(own, bare, atol=1e-5) and not torch.allclose(moved, bare, atol=1e-3)
    assert torch.equal(moved, again)


def test_a_prompt_that_was_encoded_before_is_refused():
    model, clip = small_model("sd15"), small_clip("sd15")
    config = replace(CONFIG, objective=ObjectiveConfig(prior_weight=0.5))
    with pytest.raises(ValueError, match=r"prior_weight is 0\.5, but prior_conditioning was encoded before this run"):
        train(model, clip, config=config)
