"""The picture of Flow Shift's help page, which shows what a shift does: `python3 dev.py exec docs/make_pictures.py`.

The embedded flow model, ComfyUI's Euler sampler, the same prompts and noise in every row.
"""

import torch
from PIL import Image, ImageDraw, ImageFont

from devtools.drawing import draw
from tidetable.runtime import tiny
from tidetable.runtime.model_sampling import patch_flow_shift
from tidetable.runtime.schedules import make_schedule
from tidetable.tests.test_architecture import ROOT


PROMPTS = [
    "a bright red letter A on a dark blue background",
    "a yellow letter K on a purple background",
    "a white digit 5 on a green background",
    "a dark blue letter R on a orange background",
    "a cyan digit 2 on a dark red background",
    "a bright green letter S on a white background",
]
SIDE, LABEL, SEED = 96, 150, 11


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


def main() -> None:
    flow = tiny.load_tiny_model("mmdit-flow")
    shifted = {s: patch_flow_shift(flow, "shift", s, 0.0, 256, 256)[0] for s in (1.0, 3.0, 6.0)}
    save_rows(
        "Tidetable_FlowShift",
        {f"shift {s:g}": draw(m, PROMPTS, make_schedule(m, "trailing", 6), 4.0, SEED) for s, m in shifted.items()},
    )


if __name__ == "__main__":
    main()
