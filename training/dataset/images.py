"""Picture files of any kind to RGB at a bucket's size. What cannot be read whole is refused with the reason."""

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from .buckets import Placement


PAPER = (255, 255, 255)
"""What shows through where a picture is transparent."""
RESAMPLE = Image.Resampling.LANCZOS
_STRICT = threading.RLock()


class BadImageError(ValueError):
    """The bytes are not a picture, or not all of one."""


def read_whole(path: Path) -> tuple[bytes, os.stat_result]:
    """A file's bytes, all from one state of it, and that state. BadImageError where it cannot be read or changes."""
    try:
        for _ in range(3):
            before = path.stat()
            data = path.read_bytes()
            after = path.stat()
            if before.st_mtime_ns == after.st_mtime_ns and before.st_size == after.st_size == len(data):
                return data, after
    except OSError as error:
        raise BadImageError(f"could not be read ({error.strerror or error})") from error
    raise BadImageError("changes while it is read: queue again when whatever writes it is done")


def decode(data: bytes) -> tuple[Image.Image, list[str]]:
    """Bytes to an upright 8-bit RGB picture, and what was done to get there. BadImageError with the reason."""
    notes: list[str] = []
    try:
        with _whole_files_only(), Image.open(io.BytesIO(data)) as image:
            if getattr(image, "n_frames", 1) > 1:
                notes.append("is animated or has several pages: the first one is used")
            image.load()
            return _to_rgb(_upright(image, notes), notes), notes
    except BadImageError:
        raise
    except MemoryError as error:
        raise BadImageError("is too large for the memory") from error
    except UnidentifiedImageError as error:  # its words name an object of Python
        raise BadImageError("is not a whole picture, or of a kind that cannot be read") from error
    except Exception as error:  # damaged files raise nearly anything: OSError, SyntaxError, struct.error, …
        raise BadImageError(f"is not a whole picture ({type(error).__name__}: {error})") from error


def size_of(picture: Image.Image | Tensor) -> tuple[int, int]:
    """(width, height)."""
    return (picture.shape[1], picture.shape[0]) if isinstance(picture, Tensor) else picture.size


def fit(picture: Image.Image | Tensor, placement: Placement, flipped: bool = False) -> Tensor:
    """An RGB picture, or a tensor [H, W, C], as [height, width, C] float32 in 0 to 1 of the bucket."""
    if isinstance(picture, Tensor):
        pixels = _fit_tensor(picture.detach().cpu().float(), placement)
    else:
        pixels = torch.from_numpy(_resized(picture, placement).astype(np.float32) / 255.0)
    return (pixels.flip(1) if flipped else pixels).contiguous()


def decode_mask(data: bytes) -> Tensor:
    """A mask file as [H, W, 1] in 0 to 1: its brightness. BadImageError as `decode`."""
    picture, _ = decode(data)
    return torch.from_numpy(np.asarray(picture.convert("L"), dtype=np.float32) / 255.0)[..., None]


def _fit_tensor(pixels: Tensor, placement: Placement) -> Tensor:
    if size_of(pixels) == placement.bucket:
        return pixels.clone()
    channels = [_resized(Image.fromarray(channel.numpy()), placement) for channel in pixels.unbind(-1)]
    return torch.from_numpy(np.stack(channels, axis=-1)).clamp(0, 1)


def _resized(image: Image.Image, placement: Placement) -> np.ndarray:
    if image.size == placement.bucket:
        return np.array(image)
    return np.array(image.resize(placement.bucket, RESAMPLE, box=placement.source_box()))


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        orientation = image.getexif().get(0x0112, 1)
        if orientation in range(2, 9):
            return ImageOps.exif_transpose(image)
    except Exception as error:  # EXIF is as damaged as anything else
        notes.append(f"its EXIF data could not be read ({type(error).__name__}): not turned")
    return image


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _from_deep(image, notes)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:  # pyright: ignore
            notes.append("is transparent: white shows through")
            paper = Image.new("RGBA", image.size, (*PAPER, 255))
            image = Image.alpha_composite(paper, image)
    if image.mode == "CMYK":
        notes.append("is CMYK: converted to RGB without a color profile")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_deep(image: Image.Image, notes: list[str]) -> Image.Image:
    """Gray of 16 or 32 bits or floating point to 8 bits by its full range, not by its low byte."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise BadImageError("contains nan or inf")
    largest = values.max(initial=0)
    if image.mode.startswith("I;16") or largest > 255:
        top = 65535.0
    else:
        top = 1.0 if image.mode == "F" and largest <= 1 else 255.0
    notes.append(f"has deep gray values (mode {image.mode}): 0 to {top:g} became 0 to 255")
    return Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Pillow has one switch for all: other packs turn it on, and truncated pictures then come out half gray."""
    with _STRICT:
        before: Any = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before
