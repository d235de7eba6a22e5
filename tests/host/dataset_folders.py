"""Folders of small pictures for the tests of data sets."""

from pathlib import Path

import numpy as np
from PIL import Image

from tidetable.training.tiny_data import glyph_batch


def write_glyphs(folder: Path, count: int = 8, size: tuple[int, int] = (64, 64), seed: int = 0) -> list[Path]:
    """`count` PNG files of rendered characters with a .txt caption each."""
    folder.mkdir(parents=True, exist_ok=True)
    images, captions, _ = glyph_batch(count, seed)
    paths = []
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        path = folder / f"picture_{place:03}.png"
        Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        paths.append(path)
    return paths
