"""Which size a picture is trained at, and which part of it is seen.

Aspect-ratio buckets keep the number of pixels near that of a square, as in Podell et al. 2023 (SDXL), arXiv:2307.01952,
appendix I. Where that would enlarge the picture too much, its bucket is smaller instead.
"""

import math
import random
from dataclasses import dataclass, replace
from functools import lru_cache

from ..recipe import require


CROPS = ("middle", "random", "top")


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketConfig:
    """The one home of the defaults of Encode Dataset's sizes. Lengths are pixels."""

    resolution: int = 1024
    """Side of the square whose area a bucket has at most."""
    step: int = 64
    """Sides are multiples of this."""
    max_aspect: float = 2.0
    """Longer side over shorter side of a bucket, at least 1; 1 is squares only."""
    max_upscale: float = 1.25
    """No picture is enlarged by more than this, at least 1; 1 is not at all."""
    flip: bool = False
    """Every picture also mirrored left to right."""
    crop: str = "middle"
    """Which part of a picture is seen, of `CROPS`: "top" keeps the upper edge, "random" draws `crops` parts."""
    crops: int = 1
    """Different random parts of a picture that are encoded; an epoch visits each of them once, at least 1."""

    def __post_init__(self):
        require(8 <= self.step <= 512, "step", self.step, "in 8..512")
        require(self.step <= self.resolution <= 8192, "resolution", self.resolution, f"in {self.step} (step)..8192")
        require(1 <= self.max_aspect <= 8, "max_aspect", self.max_aspect, "in 1..8")
        require(1 <= self.max_upscale <= 16, "max_upscale", self.max_upscale, "in 1..16")
        require(self.crop in CROPS, "crop", self.crop, f"one of {', '.join(CROPS)}")
        require(1 <= self.crops <= 100, "crops", self.crops, "in 1..100")


@dataclass(frozen=True, slots=True)
class Placement:
    """How a picture gets into its bucket: resized to (width, height), then cut to `bucket` at (left, top)."""

    original: tuple[int, int]
    """(width, height) before."""
    resized: tuple[int, int]
    left: int
    top: int
    bucket: tuple[int, int]

    @property
    def scale(self) -> float:
        return max(self.resized[0] / self.original[0], self.resized[1] / self.original[1])

    def source_box(self) -> tuple[float, float, float, float]:
        """What is seen, in pixels of the original: left, upper, right, lower."""
        x, y = (before / after for before, after in zip(self.original, self.resized, strict=True))
        width, height = self.bucket
        return self.left * x, self.top * y, (self.left + width) * x, (self.top + height) * y

    def size_conditioning(self, flipped: bool) -> dict[str, int]:
        """SDXL's micro-conditioning under ComfyUI's names; a mirrored picture is cropped from its other side."""
        left = self.resized[0] - self.bucket[0] - self.left if flipped else self.left
        sizes = zip(("width", "height", "target_width", "target_height"), (*self.original, *self.bucket), strict=True)
        return {**dict(sizes), "crop_w": left, "crop_h": self.top}


@lru_cache(maxsize=64)
def buckets(config: BucketConfig) -> tuple[tuple[int, int], ...]:
    """Every (width, height) for pictures that are large enough: the square, and for each width the tallest that fits
    the area."""
    step, area = config.step, config.resolution**2
    square = config.resolution // step * step
    found = [(square, square)]
    for width in range(step, area // step + 1, step):
        height = area // width // step * step
        if height and max(width, height) <= config.max_aspect * min(width, height):
            found.append((width, height))
    return tuple(dict.fromkeys(found))


def place(width: int, height: int, config: BucketConfig) -> Placement:
    """The bucket for a picture of this size, the picture's middle in it. ValueError where it is too small for any."""
    if min(width, height) < 1:
        raise ValueError(f"{width} x {height} pixels is no picture")
    aspect = math.log(width / height)
    fitting = min(buckets(config), key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), -size[0] * size[1]))
    if max(fitting[0] / width, fitting[1] / height) > config.max_upscale:
        fitting = _smaller(width, height, config)
    return _centered(width, height, fitting)


def cuts(middle: Placement, config: BucketConfig, name: str) -> tuple[Placement, ...]:
    """The parts of a picture that are seen, from its placement in the middle; random ones follow from `name`.

    Every corner is as likely. A picture that fits its bucket has one part only, others at most `config.crops`.
    """
    if config.crop == "middle":
        return (middle,)
    if config.crop == "top":
        return (replace(middle, top=0),)
    free = [whole - seen for whole, seen in zip(middle.resized, middle.bucket, strict=True)]
    draw = random.Random(name)
    corners = dict.fromkeys(tuple(draw.randint(0, slack) for slack in free) for _ in range(config.crops))
    return tuple(replace(middle, left=left, top=top) for left, top in corners)


def _smaller(width: int, height: int, config: BucketConfig) -> tuple[int, int]:
    """The largest bucket within the limit on enlarging; its area is below the usual one."""
    step = config.step
    longest = max(max(size) for size in buckets(config))
    sides = [min(longest, int(side * config.max_upscale + 1e-9) // step * step) for side in (width, height)]
    if min(sides) == 0:
        raise ValueError(
            f"{width} x {height} pixels is too small: a side must have {math.ceil(step / config.max_upscale)} or more"
            " (raise max_upscale, or lower bucket_step)"
        )
    cap = max(step, int(min(sides) * config.max_aspect) // step * step)
    sides = [min(side, cap) for side in sides]
    while sides[0] * sides[1] > config.resolution**2:
        sides[sides.index(max(sides))] -= step
    return sides[0], sides[1]


def _centered(width: int, height: int, bucket: tuple[int, int]) -> Placement:
    scale = max(bucket[0] / width, bucket[1] / height)
    resized = max(bucket[0], round(width * scale)), max(bucket[1], round(height * scale))
    return Placement((width, height), resized, (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2, bucket)
