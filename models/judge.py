"""Measure the embedded models: `python3 dev.py exec models/judge.py [--json models/quality.json]`.

Per model: how often an independent classifier reads the requested character, and the mean brightness of samples that
were asked to be very dark and very bright. Sampled by ComfyUI's own Euler sampler with SETTINGS, which were chosen on
other prompts and other noise (--seed 77).
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import comfy.samplers
import torch
from PIL import Image

from devtools.drawing import draw
from devtools.judges import accuracy, glyph_judge
from tidetable.runtime import tiny
from tidetable.runtime.model_sampling import current_sampling, patch_flow_shift
from tidetable.runtime.prediction import patch_flow_graft
from tidetable.training.tiny_data import CHARACTERS, glyph_batch, render_glyph


@dataclass(frozen=True)
class Settings:
    """How a model is sampled."""

    cfg: float
    scheduler: str
    shift: float | None = None
    """Of the flow model: above 1, more of the steps are where shapes form."""
    graft: float | None = None
    """Read as a flow model of this shift (Flow Graft)."""


STEPS, SEED = 30, 4242
SETTINGS = {
    "unet-eps": Settings(3.0, "sgm_uniform"),
    "unet-v": Settings(3.0, "sgm_uniform"),
    "mmdit-flow": Settings(5.0, "simple", 3.0),
    "unet-graft": Settings(3.0, "simple", graft=3.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(tiny.TINY_MODELS))
    parser.add_argument("--per-character", type=int, default=5)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    judge = glyph_judge()
    captions = [
        glyph_batch(1, args.seed + 1000 * n + i, c)[1][0]
        for n in range(args.per_character)
        for i, c in enumerate(CHARACTERS)
    ]
    wanted = list(CHARACTERS) * args.per_character
    plain = [text.split(",")[0] for text in captions[:36]]
    rows = {"classifier on held-out renderings": judge.accuracy}
    for name in args.models:
        model, settings = tiny.load_tiny_model(name), SETTINGS[name]
        if settings.graft is not None:
            model = patch_flow_graft(model, settings.graft)
        if settings.shift is not None:
            model = patch_flow_shift(model, "shift", settings.shift, 0.0, 256, 256)[0]
        sigmas = comfy.samplers.calculate_sigmas(current_sampling(model), settings.scheduler, STEPS)
        images = draw(model, captions, sigmas, settings.cfg, args.seed)
        dark, bright = (
            draw(model, [f"{text}, very {word}" for text in plain], sigmas, settings.cfg, args.seed)
            for word in ("dark", "bright")
        )
        rows[name] = {
            **asdict(settings),
            "character accuracy": accuracy(judge, images, wanted),
            "mean brightness of very dark": dark.mean().item(),
            "mean brightness of very bright": bright.mean().item(),
            "spread of mean brightness without a prompt": spread(model, sigmas, args.seed),
            "samples": len(captions),
        }
        print(name, json.dumps(rows[name]), flush=True)
        if args.pictures:
            args.pictures.mkdir(parents=True, exist_ok=True)
            save_grid(torch.cat([images[:72], dark[:18], bright[:18]]), args.pictures / f"{name}.png")
    reference = [glyph_batch(1, args.seed + i, c)[2][0] for i, c in enumerate(CHARACTERS)]
    pictures = glyph_batch(500, args.seed)[0]
    rows["data"] = {"spread of mean brightness": pictures.mean((1, 2, 3)).std().item()}
    rows["data"] |= {word: brightness_of(reference, word) for word in ("very dark", "very bright")}
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(json.dumps(rows["data"]), rows["classifier on held-out renderings"])


def spread(model, sigmas: torch.Tensor, seed: int, count: int = 120) -> float:
    """Standard deviation of the mean brightness of samples without a prompt."""
    return draw(model, [""] * count, sigmas, 1.0, seed).mean((1, 2, 3)).std().item()


def brightness_of(glyphs, word: str) -> float:
    return float(sum(render_glyph(replace(glyph, brightness=word)).mean() for glyph in glyphs) / len(glyphs))


def save_grid(images: torch.Tensor, path: Path, columns: int = 18) -> None:
    rows = len(images) // columns
    grid = (
        images[: rows * columns]
        .reshape(rows, columns, 3, 32, 32)
        .permute(0, 3, 1, 4, 2)
        .reshape(rows * 32, columns * 32, 3)
    )
    picture = Image.fromarray((grid * 255).round().byte().numpy())
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    main()
