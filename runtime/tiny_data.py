"""The embedded models' data as ComfyUI's IMAGE batches."""

from torch import Tensor, nn

from ..training.tiny_data import digit_batch, glyph_batch


DATASETS = ("glyphs", "digits", "digits (held out)")
MAX_COUNT = 2000


def tiny_dataset(which: str, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """[count, 256, 256, 3] float32 in [0, 1] and one caption each. ValueError for an unknown name or a bad count."""
    if not 1 <= count <= MAX_COUNT:
        raise ValueError(f"count is {count}, but it must be in 1..{MAX_COUNT}")
    if which == "glyphs":
        images, captions, _ = glyph_batch(count, seed)
    elif which in DATASETS:
        images, captions, _ = digit_batch(count, seed, "train" if which == "digits" else "test")
    else:
        raise ValueError(f"there is no data set {which!r}: choose one of {', '.join(DATASETS)}")
    enlarged = nn.functional.interpolate(images, scale_factor=8, mode="nearest")
    return enlarged.movedim(1, -1).contiguous(), captions
