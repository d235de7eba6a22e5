"""Files as people have them that are not as they should be: name -> what the report must say of it."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from tidetable.tests.host.dataset_folders import write_glyphs


LEFT_OUT = {
    "truncated.jpg": "is not a whole picture",
    "truncated.png": "is not a whole picture",
    "empty.png": "is not a whole picture (the file is empty)",
    "text.png": "is not a whole picture (its kind cannot be told from its first bytes)",
    "dot.png": "is too small: a side must have",
    "thread.png": "is too small: a side must have",
    "gone.png": "could not be read",
    "nan.tiff": "contains nan or inf",
    "deep/loop": "is a link to a folder that it is in",
    "lost.mask.png": "is a mask without a picture",
    "0_none": "0 repeats",
}
"""Left out, and the rest of the folder is used."""
NOTED = {
    "sixteen.png": "deep gray values",
    "cmyk.jpg": "is CMYK",
    "moving.gif": "is animated",
    "glass.png": "is transparent",
    "broken_mask.png": "its mask is not a whole picture (its kind cannot be told from its first bytes): used without",
    "latin.txt": "is not UTF-8",
    "words.png": "its caption has 10000 words: cut",
    "sentence.json": "is not JSON",
    "list.json": 'must be {"caption"',
    "mute.png": "has no caption",
    "twin.jpg": "shares its caption with",
}
"""Used, but not quite as they were."""
FINE = ("palette.png", "turned.jpg", "whole.png")
"""Used, and nothing is said of them."""


def write_bad_files(folder: Path) -> None:
    """Every file of the tables above, with a caption each where captions are not what is wrong."""
    (source,) = write_glyphs(folder, 1, (96, 64))
    picture = Image.open(source).convert("RGB")
    picture.load()
    source.unlink()
    source.with_suffix(".txt").unlink()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    for kind in ("jpg", "png"):
        noise.save(folder / f"truncated.{kind}")
        _cut(folder / f"truncated.{kind}")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("<html>404 Not Found</html>")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (30_000, 10)).save(folder / "thread.png")
    Image.fromarray(np.full((64, 64), np.nan, np.float32)).save(folder / "nan.tiff")
    Image.fromarray(np.linspace(0, 65535, 64 * 96).reshape(64, 96).astype(np.uint16)).save(folder / "sixteen.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    picture.quantize(16).save(folder / "palette.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=turned, quality=95, subsampling=0)
    picture.save(folder / "moving.gif", save_all=True, append_images=[noise, picture])
    glass = picture.copy()
    glass.putalpha(100)
    glass.save(folder / "glass.png")
    for name in ("whole.png", "broken_mask.png", "latin.png", "words.png", "sentence.png", "list.png", "mute.png"):
        picture.save(folder / name)
    for name in ("twin.jpg", "twin.png"):
        picture.save(folder / name)
    (folder / "broken_mask.mask.png").write_bytes(b"no")
    picture.save(folder / "lost.mask.png")
    for path in folder.glob("*.*"):
        if path.suffix != ".txt" and path.stem not in ("mute", "sentence", "list") and "mask.png" not in path.name[-8:]:
            path.with_suffix(".txt").write_text(f"a {path.stem}", encoding="utf-8")
    (folder / "broken_mask.txt").write_text("a mask", encoding="utf-8")
    (folder / "latin.txt").write_bytes("über".encode("cp1252"))
    (folder / "words.txt").write_text("word " * 10_000)
    (folder / "sentence.json").write_text('{"caption": ')
    (folder / "list.json").write_text("[1, 2]")
    (folder / "0_none").mkdir()
    picture.save(folder / "0_none" / "unused.png")
    (folder / "deep").mkdir()
    os.symlink(folder, folder / "deep" / "loop")
    os.symlink(folder / "nowhere.png", folder / "gone.png")
    (folder / "gone.txt").write_text("gone")


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
