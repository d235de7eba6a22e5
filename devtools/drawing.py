"""Pictures drawn by the embedded models, for the model card and the help pages. Runs inside ComfyUI (`dev.py exec`)."""

import comfy.sample
import comfy.samplers
import torch

from tidetable.runtime import tiny


BATCH = 60


@torch.inference_mode()
def draw(model, prompts: list[str], sigmas: torch.Tensor, cfg: float, seed: int) -> torch.Tensor:
    """One sample per prompt by ComfyUI's Euler sampler over `sigmas` [steps + 1]: [N, 3, 32, 32] in [0, 1]."""
    clip, sampler, drawn = tiny.load_tiny_clip(), comfy.samplers.sampler_object("euler"), []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        *encoded, empty = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in [*part, ""]]
        pooled = torch.cat([row[1]["pooled_output"] for row in encoded])
        positive = [[torch.cat([row[0] for row in encoded]), {"pooled_output": pooled}]]
        latent = torch.zeros(len(part), 3, 32, 32)
        noise = comfy.sample.prepare_noise(latent, seed + start)
        samples = comfy.sample.sample_custom(
            model, noise, cfg, sampler, sigmas, positive, [empty], latent, disable_pbar=True, seed=seed
        )
        drawn.append(((samples + 1) / 2).clamp(0, 1))
    return torch.cat(drawn)
