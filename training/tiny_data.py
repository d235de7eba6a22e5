"""Captioned pictures of rendered characters: the data behind the embedded models, unlimited and dependency-free.

A picture is one of 36 characters in a face, a color, a place and an angle, on a colored background, with the
brightness of the *whole* picture as an attribute of the caption. Everything follows from an integer seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
CHARACTERS = LETTERS + DIGITS
FACES = ("regular", "bold", "italic", "condensed")
HUES = {  # fully saturated sRGB, except white
    "red": (1.0, 0.10, 0.10),
    "orange": (1.0, 0.50, 0.05),
    "yellow": (1.0, 0.95, 0.10),
    "green": (0.10, 0.90, 0.15),
    "cyan": (0.10, 0.90, 1.0),
    "blue": (0.10, 0.25, 1.0),
    "purple": (0.65, 0.15, 1.0),
    "white": (1.0, 1.0, 1.0),
}
TONES = {"dark": 0.30, "": 0.62, "bright": 1.0}
# brightness word -> (gain, offset) applied to the finished picture in [0, 1]: contrast is lost towards both ends
BRIGHTNESS = {
    "very dark": (0.30, 0.0),
    "dark": (0.60, 0.0),
    "": (1.0, 0.0),
    "bright": (0.60, 0.40),
    "very bright": (0.30, 0.70),
}
LUMINANCE = np.asarray((0.2126, 0.7152, 0.0722), dtype=np.float32)  # Rec. 709 weights
SIZE = 32
SUPERSAMPLE = 4
MIN_CONTRAST = 0.25  # in luminance


@dataclass(frozen=True, kw_only=True, slots=True)
class Glyph:
    """What one picture shows; `caption` says it in words, `render_glyph` draws it."""

    character: str
    face: str
    ink: tuple[str, str]
    """(tone, hue) of the character."""
    paper: tuple[str, str]
    """(tone, hue) of the background."""
    brightness: str
    angle: float
    """Degrees, counter-clockwise."""
    scale: float
    """Height of a capital relative to the picture."""
    offset: tuple[float, float]
    """Of the center, relative to the picture's side."""


def caption(glyph: Glyph, style: str = "") -> str:
    """`"a bright green letter K on a dark blue background, very dark"`; `style` goes before the color."""
    kind = "digit" if glyph.character in DIGITS else "letter"
    words = ["a", style, *glyph.ink, kind, glyph.character, "on a", *glyph.paper, "background"]
    sentence = " ".join(word for word in words if word)
    return f"{sentence}, {glyph.brightness}" if glyph.brightness else sentence


def sample_glyph(rng: np.random.Generator, characters: str = CHARACTERS) -> Glyph:
    """Draw one picture's description; ink and paper always differ enough to be read."""
    while True:
        ink, paper = _sample_color(rng), _sample_color(rng)
        if abs(float((_rgb(ink) - _rgb(paper)) @ LUMINANCE)) >= MIN_CONTRAST and ink[1] != paper[1]:
            break
    return Glyph(
        character=str(rng.choice(list(characters))),
        face=str(rng.choice(FACES)),
        ink=ink,
        paper=paper,
        brightness=str(rng.choice(list(BRIGHTNESS), p=(0.15, 0.15, 0.4, 0.15, 0.15))),
        angle=float(rng.uniform(-12, 12)),
        scale=float(rng.uniform(0.55, 0.75)),
        offset=(float(rng.uniform(-0.08, 0.08)), float(rng.uniform(-0.08, 0.08))),
    )


def glyph_batch(count: int, seed: int, characters: str = CHARACTERS) -> tuple[Tensor, list[str], list[Glyph]]:
    """Render `count` pictures: ([count, 3, 32, 32] float32 in [0, 1], captions, descriptions)."""
    rng = np.random.default_rng(seed)
    glyphs = [sample_glyph(rng, characters) for _ in range(count)]
    images = np.stack([render_glyph(glyph) for glyph in glyphs])
    return torch.from_numpy(images), [caption(glyph) for glyph in glyphs], glyphs


def digit_batch(count: int, seed: int, split: str = "train") -> tuple[Tensor, list[str], list[Glyph]]:
    """scikit-learn's handwritten digits (1797 of 8x8, UCI) in the same colors, as ([count, 3, 32, 32], captions, …).

    `split` "train" takes the first 1400 images, "test" the rest. Raises ValueError where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits  # development extra; nothing is downloaded, the file is bundled
    except ImportError:
        raise ValueError(
            "the 'digits' data set needs scikit-learn, which this Python does not have: "
            "choose 'glyphs', or install scikit-learn into ComfyUI's Python yourself"
        ) from None
    bunch: Any = load_digits()
    pixels, labels = bunch.images.astype(np.float32) / 16.0, bunch.target
    keep = slice(0, 1400) if split == "train" else slice(1400, None)
    pixels, labels = pixels[keep], labels[keep]
    rng = np.random.default_rng(seed)
    order = [int(i) for i in np.concatenate([rng.permutation(len(labels)) for _ in range(count // len(labels) + 1)])]
    glyphs, images = [], []
    for index in order[:count]:
        glyph = sample_glyph(rng, str(labels[index]))
        images.append(_compose(_place(pixels[index], glyph), glyph))
        glyphs.append(glyph)
    return torch.from_numpy(np.stack(images)), [caption(glyph, "handwritten") for glyph in glyphs], glyphs


def render_glyph(glyph: Glyph) -> np.ndarray:
    """Draw one picture as [3, 32, 32] float32 in [0, 1]."""
    side = SIZE * SUPERSAMPLE
    font_size = max(8, round(glyph.scale * side / 0.72))  # a capital of the built-in face is 0.72 em high
    mask = _character_mask(glyph.character, glyph.face, font_size, side)
    shift = [value * side for value in glyph.offset]
    mask = mask.rotate(glyph.angle, resample=Image.Resampling.BILINEAR, translate=(round(shift[0]), round(shift[1])))
    coverage = np.asarray(mask, dtype=np.float32) / 255.0
    coverage = coverage.reshape(SIZE, SUPERSAMPLE, SIZE, SUPERSAMPLE).mean((1, 3))
    return _compose(coverage, glyph)


def _compose(coverage: np.ndarray, glyph: Glyph) -> np.ndarray:
    """[32, 32] ink coverage -> [3, 32, 32] picture with its colors and its brightness."""
    ink, paper = _rgb(glyph.ink)[:, None, None], _rgb(glyph.paper)[:, None, None]
    picture = paper + (ink - paper) * coverage[None]
    gain, offset = BRIGHTNESS[glyph.brightness]
    return (picture * gain + offset).astype(np.float32)


def _place(pixels: np.ndarray, glyph: Glyph) -> np.ndarray:
    """Scale an 8x8 digit to the glyph's height and put it at its place: [32, 32] coverage in [0, 1]."""
    height = round(glyph.scale * SIZE)
    digit = Image.fromarray((pixels * 255).astype(np.uint8)).resize((height, height), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (SIZE, SIZE))
    corner = [round((SIZE - height) / 2 + value * SIZE) for value in glyph.offset]
    canvas.paste(digit, (corner[0], corner[1]))
    return np.asarray(canvas, dtype=np.float32) / 255.0


@lru_cache(maxsize=4096)
def _character_mask(character: str, face: str, font_size: int, side: int) -> Image.Image:
    font = _font(font_size)
    stroke = round(font_size * (0.06 if face == "bold" else 0.02))
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).text(
        (side / 2, side / 2), character, fill=255, font=font, anchor="mm", stroke_width=stroke, stroke_fill=255
    )
    if character == "0":  # slashed, or nobody could tell it from a condensed O
        reach = (font_size * 0.15, font_size * 0.24)
        ends = [(side / 2 - reach[0], side / 2 + reach[1]), (side / 2 + reach[0], side / 2 - reach[1])]
        ImageDraw.Draw(mask).line(ends, fill=255, width=max(2, round(font_size * 0.07)))
    if face == "italic":
        slant = math.tan(math.radians(14))
        mask = mask.transform(
            mask.size, Image.Transform.AFFINE, (1, slant, -slant * side / 2, 0, 1, 0), Image.Resampling.BILINEAR
        )
    if face == "condensed":
        mask = mask.transform(
            mask.size, Image.Transform.AFFINE, (1.35, 0, -0.35 * side / 2, 0, 1, 0), Image.Resampling.BILINEAR
        )
    return mask


@lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _sample_color(rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(list(TONES))), str(rng.choice(list(HUES)))


def _rgb(color: Sequence[str]) -> np.ndarray:
    tone, hue = color
    return np.asarray(HUES[hue], dtype=np.float32) * TONES[tone]
