"""What the tests of training runs share: a small data set, and settings that save after every step."""

import torch

from tidetable.runtime.training_run import RunConfig
from tidetable.training.config import LoRAConfig, TrainConfig


LORA = LoRAConfig(rank=4, lora_alpha=4.0)
CONFIG_OF_CHILD = TrainConfig(steps=60, batch_size=2, warmup_steps=0, seed=5, ema_decay=0.95, validate_every=9)


def quick_run(**settings) -> RunConfig:
    return RunConfig(**{"checkpoint_every_steps": 1, "checkpoint_every_minutes": 0.0, **settings})


def dataset(count: int = 10):
    """Glyphs with captions as the nodes hand them over."""
    import nodes as host_nodes

    from tidetable.runtime import tiny
    from tidetable.runtime.tiny_data import tiny_dataset
    from tidetable.runtime.training import TrainingData
    from tidetable.tests.host.test_tiny import encode

    clip, vae = tiny.load_tiny_clip(), tiny.load_tiny_vae()
    with torch.inference_mode():
        images, captions = tiny_dataset("glyphs", count, 0)
        latents = host_nodes.VAEEncode().encode(vae, images)[0]
        positive = [encode(clip, text) for text in captions]
    return TrainingData([latents], positive, encode(clip, ""), 20)
