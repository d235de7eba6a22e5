"""The pictures of the help pages that show what theory says: `python3 dev.py exec docs/make_pictures.py`.

The embedded models, ComfyUI's Euler sampler, the same prompts and noise in every row.
"""

import torch
from PIL import Image, ImageDraw, ImageFont

from devtools.drawing import draw
from tidetable.runtime import tiny
from tidetable.runtime.model_sampling import patch_flow_shift
from tidetable.runtime.schedules import make_schedule
from tidetable.tests.test_architecture import ROOT
from tidetable.training.tiny_data import glyph_batch


PROMPTS = [
    "a bright red letter A on a dark blue background",
    "a yellow letter K on a purple background",
    "a white digit 5 on a green background",
    "a dark blue letter R on a orange background",
    "a cyan digit 2 on a dark red background",
    "a bright green letter S on a white background",
]
SIDE, LABEL, SEED = 96, 150, 11
COUNT, SHOWN = 120, 8


def save_rows(name: str, rows: dict[str, torch.Tensor]) -> None:
    columns = max(len(images) for images in rows.values())
    picture = Image.new("RGB", (LABEL + columns * SIDE, len(rows) * SIDE), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for y, (label, images) in enumerate(rows.items()):
        pen.multiline_text((10, y * SIDE + SIDE / 2), label, fill="#222", font=font, anchor="lm")
        for x, image in enumerate(images):
            pixels = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
            picture.paste(pixels.resize((SIDE, SIDE), Image.Resampling.NEAREST), (LABEL + x * SIDE, y * SIDE))
    picture.save(ROOT / "web" / "docs" / f"{name}.png", optimize=True)


def by_brightness(images: torch.Tensor) -> torch.Tensor:
    """SHOWN of the pictures [N, 3, H, W], from the darkest to the brightest at equal quantiles."""
    ranks = torch.linspace(0.0, len(images) - 1.0, SHOWN + 2)[1:-1].round().long()
    return images[images.mean((1, 2, 3)).argsort()[ranks]]


def spread(images: torch.Tensor) -> str:
    return f"{images.mean((1, 2, 3)).std():.2f}"


def shift_picture() -> None:
    flow = tiny.load_tiny_model("mmdit-flow")
    shifted = {s: patch_flow_shift(flow, "shift", s, 0.0, 256, 256)[0] for s in (1.0, 3.0, 6.0)}
    save_rows(
        "Tidetable_FlowShift",
        {f"shift {s:g}": draw(m, PROMPTS, make_schedule(m, "trailing", 6), 4.0, SEED) for s, m in shifted.items()},
    )


def brightness_pictures() -> None:
    """Without a prompt the brightness is up to the noise that a run starts from."""
    v, eps = tiny.load_tiny_model("unet-v"), tiny.load_tiny_model("unet-eps")
    ways = {
        "training\npictures": glyph_batch(COUNT, SEED)[0],
        "v with zero\nterminal SNR": drawn(v, "trailing", 20),
        "eps, table\nends at 14.6": drawn(eps, "trailing", 20),
    }
    print({name: spread(images) for name, images in ways.items()})
    save_rows("Tidetable_ZeroTerminalSNR", {name: by_brightness(images) for name, images in ways.items()})
    ways = {
        f"{spacing}\n{steps} steps": drawn(eps, spacing, steps)
        for steps in (20, 5)
        for spacing in ("trailing", "leading")
    }
    print({name: spread(images) for name, images in ways.items()})
    save_rows("Tidetable_Schedule_leading", {name: by_brightness(images) for name, images in ways.items()})


def drawn(model, spacing: str, steps: int) -> torch.Tensor:
    """COUNT pictures without a prompt and without CFG."""
    return draw(model, [""] * COUNT, make_schedule(model, spacing, steps), 1.0, SEED)


def main() -> None:
    shift_picture()
    brightness_pictures()


if __name__ == "__main__":
    main()
