"""Does the demo's LoRA, handwritten digits, learn on every kind of model, and by every objective?

Each case trains the demo's LoRA on 256 handwritten digits with one embedded model and one objective, and draws prompts
that training never saw without and with it. Classifiers that know neither model nor training read the samples. Also
yields the validation loss on held-out digits in the objective's own terms, before and after.
"""

import argparse

import comfy.samplers
import torch

from devtools.drawing import draw
from devtools.judges import accuracy, digit_judge, handwriting_judge
from tidetable.runtime import tiny
from tidetable.runtime.model_sampling import current_sampling, patch_flow_shift
from tidetable.runtime.prediction import patch_flow_graft
from tidetable.runtime.tiny_data import tiny_dataset
from tidetable.runtime.training import TrainingData, train_lora
from tidetable.training.config import LoRAConfig, TrainConfig
from tidetable.training.recipe import ObjectiveConfig
from tidetable.training.tiny_data import digit_batch


STEPS, SEED = 20, 7
CASES = {
    "eps": ("unet-eps", {}),
    "eps, bridge": ("unet-eps", {"flow": "bridge"}),
    "v": ("unet-v", {}),
    "v, bridge": ("unet-v", {"flow": "bridge"}),
    "v, min-SNR": ("unet-v", {"weighting": "min_snr"}),
    "flow": ("mmdit-flow", {}),
    "graft": ("unet-graft", {"flow": "graft"}),
}
TARGETS = {"mmdit-flow": "attention_mlp"}
"""The demo's layers. A U-Net draws strokes in its convolutions: linear_conv."""
GUIDANCE = {"unet-eps": 3.0, "unet-v": 3.0, "unet-graft": 3.0, "mmdit-flow": 5.0}


def run(arguments: list[str]):
    """Rows (case, arm, metric, value, unit), arms before and after."""
    parser = argparse.ArgumentParser(prog="bench handwriting")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    digits, style = digit_judge(), handwriting_judge()
    yield "classifiers, real pictures", "digit", "accuracy", digits.accuracy, ""
    yield "classifiers, real pictures", "handwritten", "accuracy", style.accuracy, ""
    with torch.inference_mode():
        for case in options.cases:
            yield from measure(case, options.steps, options.samples, digits, style)


def measure(case: str, steps: int, samples: int, digits, style):
    name, objective = CASES[case]
    _, captions, glyphs = digit_batch(samples, SEED, "test")
    wanted = [glyph.character for glyph in glyphs]
    model = tiny.load_tiny_model(name)
    if name == "mmdit-flow":
        model = patch_flow_shift(model, "shift", 3.0, 0.0, 256, 256)[0]
    result = train_lora(model, handwritten(), *settings(name, steps, objective))
    before = patch_flow_graft(model, ObjectiveConfig().graft_shift) if objective.get("flow") == "graft" else model
    losses = result.loss_map["validation_loss"]
    for arm, drawn, loss in (("before", before, losses[0]), ("after", result.model, losses[-1])):
        sampling = current_sampling(drawn)
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple" if name == "mmdit-flow" else "sgm_uniform", STEPS)
        images = draw(drawn, captions, sigmas, GUIDANCE[name], SEED)
        yield case, arm, "looks handwritten", accuracy(style, images, ["handwritten"] * samples), ""
        yield case, arm, "digit is read", accuracy(digits, images, wanted), ""
        yield case, arm, "validation loss", loss, ""


def settings(name: str, steps: int, objective: dict) -> tuple[TrainConfig, LoRAConfig]:
    """Those of the demo, except for the layers of a U-Net."""
    train = TrainConfig(
        steps=steps, batch_size=8, learning_rate=1e-3, caption_dropout=0.1, objective=ObjectiveConfig(**objective)
    )
    return train, LoRAConfig(rank=16, lora_alpha=16, targets=TARGETS.get(name, "linear_conv"))


def handwritten() -> TrainingData:
    clip, vae = tiny.load_tiny_clip(), tiny.load_tiny_vae()
    images, captions = tiny_dataset("digits", 256, 0)
    encode = lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))  # noqa: E731
    return TrainingData([{"samples": vae.encode(images)}], [encode(text) for text in captions], encode(""), 10)
