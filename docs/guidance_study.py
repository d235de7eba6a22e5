"""Does perturbed attention help? `python3 dev.py exec docs/guidance_study.py` prints the table of docs/guidance.md.

The embedded models draw the same prompts from the same noise at every scale, without and with CFG. Measured are how
often the independent reader of models/judge.py reads the requested character, and the sharpness: mean absolute
difference between neighboring pixels, divided by that of rendered pictures of the same prompts.
"""

import argparse

import comfy.samplers
import torch
from PIL import Image

from devtools.drawing import draw
from devtools.judges import accuracy, glyph_judge
from tidetable.nodes.guidance import PerturbedAttention
from tidetable.runtime import tiny
from tidetable.runtime.model_sampling import current_sampling, patch_flow_shift
from tidetable.tests.test_architecture import ROOT
from tidetable.training.tiny_data import CHARACTERS, glyph_batch


STEPS, SEED, SHOWN = 20, 31_000, 12
SCALES = (0.0, 1.0, 3.0, 5.0)
# Model -> (scheduler, shift, CFG), as in models/README.md.
MODELS = {
    "unet-eps": ("sgm_uniform", None, 3.0),
    "unet-v": ("sgm_uniform", None, 3.0),
    "mmdit-flow": ("simple", 3.0, 5.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    wanted = [CHARACTERS[i % len(CHARACTERS)] for i in range(args.samples)]
    rendered = [glyph_batch(1, SEED + i, character) for i, character in enumerate(wanted)]
    captions, sharp = [one[1][0] for one in rendered], sharpness(torch.cat([one[0] for one in rendered]))
    print("| model | CFG | scale | character is read | sharpness |\n|---|---|---|---|---|")
    for name in args.models:
        save_grid(study(name, captions, wanted, sharp), ROOT / "docs" / "images" / f"guidance-{name}.png")


def study(name: str, captions: list[str], wanted: list[str], sharp: float) -> torch.Tensor:
    """Prints a row of the table for each way, and returns the first SHOWN pictures of each."""
    scheduler, shift, with_cfg = MODELS[name]
    model = tiny.load_tiny_model(name)
    if shift is not None:
        model = patch_flow_shift(model, "shift", shift, 0.0, 256, 256)[0]
    sigmas = comfy.samplers.calculate_sigmas(current_sampling(model), scheduler, STEPS)
    pictures = []
    for cfg in (1.0, with_cfg):
        for scale in SCALES:
            guided = PerturbedAttention.execute(model, scale, 0.0, 1.0).args[0]
            images = draw(guided, captions, sigmas, cfg, SEED)
            read = accuracy(glyph_judge(), images, wanted)
            print(f"| {name} | {cfg:g} | {scale:g} | {read:.1%} | {sharpness(images) / sharp:.2f} |", flush=True)
            pictures.append(images[:SHOWN])
    return torch.cat(pictures)


def sharpness(images: torch.Tensor) -> float:
    """Mean absolute difference between neighbors, of pictures [N, 3, H, W]."""
    return float(images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean())


def save_grid(images: torch.Tensor, path) -> None:
    rows = len(images) // SHOWN
    grid = images.reshape(rows, SHOWN, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(rows * 32, SHOWN * 32, 3)
    picture = Image.fromarray((grid * 255).round().byte().numpy())
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path, optimize=True)


if __name__ == "__main__":
    main()
