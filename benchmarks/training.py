"""LoRA training on the embedded U-Net: this pack beside ComfyUI's own TrainLoraNode, in one process, on the same data.

Samples per second counts distinct training samples; rows per step counts what really went through the network. Both
arms train rank 16 in fp32 without gradient checkpointing; core's trains every layer including norms and biases, so ours
is set to its widest targets. Each arm is timed as (a long run) − (a short run), which leaves out loading and set-up.
"""

import argparse
import inspect
import time

import torch
from comfy_extras.nodes_train import TrainLoraNode

from tidetable.runtime import tiny
from tidetable.runtime.tiny_data import tiny_dataset
from tidetable.runtime.training import TrainingData, train_lora
from tidetable.training.config import LoRAConfig, TrainConfig


MODEL, COUNT = "unet-v", 16


def run(arguments: list[str]):
    """Rows (case, arm, metric, value, unit) for batch sizes 1, 4 and more."""
    parser = argparse.ArgumentParser(prog="bench training")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        latents, positive = make_data()
        for batch in options.batch_sizes:
            speeds = {}
            for arm, train in (("core", train_core), ("tidetable", train_ours)):
                long, rows = timed(train, latents, positive, batch, 2 * options.steps)
                short, _ = timed(train, latents, positive, batch, options.steps)
                speeds[arm] = batch * options.steps / max(long - short, 1e-9)
                yield f"batch {batch}", arm, "samples_per_second", speeds[arm], "1/s"
                yield f"batch {batch}", arm, "rows_per_step", rows / (2 * options.steps), "rows"
            yield f"batch {batch}", "tidetable / core", "speed_ratio", speeds["tidetable"] / speeds["core"], "x"


def timed(train, latents, positive, batch: int, steps: int) -> tuple[float, int]:
    """(seconds, rows that went through the network)."""
    rows = []

    def factory(name=MODEL, disable_dynamic=False):
        del disable_dynamic
        patcher = tiny.load_tiny_model(name)
        patcher.model.diffusion_model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        return patcher

    patcher = factory()
    patcher.cached_patcher_init = (factory, (MODEL,))
    started = time.perf_counter()
    train(patcher, latents, positive, batch, steps)
    return time.perf_counter() - started, sum(rows)


def train_ours(patcher, latents, positive, batch: int, steps: int) -> None:
    config = TrainConfig(steps=steps, batch_size=batch, learning_rate=1e-4, warmup_steps=0, lr_schedule="constant")
    train_lora(patcher, TrainingData(latents, positive), config, LoRAConfig(rank=16, targets="linear_conv"))


def train_core(patcher, latents, positive, batch: int, steps: int) -> None:
    settings = {
        "batch_size": batch, "steps": steps, "grad_accumulation_steps": 1, "learning_rate": 1e-4, "rank": 16,
        "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32",
        "algorithm": "LoRA", "gradient_checkpointing": False, "existing_lora": "[None]", "quantized_backward": False,
        "checkpoint_depth": 1, "offloading": False, "bucket_mode": False, "bypass_mode": False,
    }  # fmt: skip
    known = inspect.signature(TrainLoraNode.execute).parameters
    chosen = {name: [value] for name, value in settings.items() if name in known}
    TrainLoraNode.execute(model=[patcher], latents=latents, positive=positive, **chosen)


def make_data():
    clip, vae = tiny.load_tiny_clip(), tiny.load_tiny_vae()
    images, captions = tiny_dataset("glyphs", COUNT, 0)
    # One latent per dictionary: ComfyUI 0.3.75's trainer fails on a single batched one.
    latents = [{"samples": vae.encode(images[i : i + 1])} for i in range(COUNT)]
    return latents, [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in captions]
