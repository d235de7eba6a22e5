"""The model_sampling of a MODEL: read, compared, replaced by ComfyUI's for another type of model, and sampled with."""

from types import SimpleNamespace

import comfy.model_base
import comfy.sample
import torch

from tidetable.runtime.tiny_text import CONTEXT_WIDTH


def sampling(model):
    return model.get_model_object("model_sampling")


def without_class(host):
    """The state of a model_sampling object: everything but its class."""
    state = {k: v for k, v in vars(host).items() if not k.startswith("_")}
    return state | {k: v.tolist() for k, v in host.state_dict().items()}


def with_sampling(model, model_type, **settings):
    """`model` with the model_sampling that ComfyUI would build for another model type and other settings."""
    config = SimpleNamespace(sampling_settings=settings)
    clone = model.clone()
    clone.add_object_patch("model_sampling", comfy.model_base.model_sampling(config, model_type))
    return clone


def sample(model, sampler="euler", steps=6):
    """Pictures of 8 × 8 pixels from a tiny model, always from the same noise and prompt; [2, 3, 8, 8]."""
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 4, CONTEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    cond = [[text, {"pooled_output": text.mean(1)}]]
    return comfy.sample.sample(model, noise, steps, 1.0, sampler, "simple", cond, cond, torch.zeros(2, 3, 8, 8), seed=3)
