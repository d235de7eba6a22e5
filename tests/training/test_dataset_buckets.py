"""Laws of sizes and cuts, and that pixels go where the record says."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tidetable.training.dataset.buckets import BucketConfig, buckets, cuts, place
from tidetable.training.dataset.images import fit


def random_sizes(count: int):
    draw = random.Random(0)
    return [(int(10 ** draw.uniform(1.2, 3.9)), int(10 ** draw.uniform(1.2, 3.9))) for _ in range(count)]


@pytest.mark.parametrize(
    "config",
    [
        BucketConfig(),
        BucketConfig(resolution=1000, max_aspect=1.0),
        BucketConfig(resolution=512, step=32, max_upscale=1.0, max_aspect=4.0),
    ],
)
def test_every_bucket_keeps_the_limits_and_the_cut_lies_in_the_picture(config):
    placed = 0
    for width, height in random_sizes(500):
        try:
            found = place(width, height, config)
        except ValueError:
            assert min(width, height) * config.max_upscale < config.step
            continue
        placed += 1
        wide, high = found.bucket
        assert wide % config.step == high % config.step == 0
        assert wide * high <= config.resolution**2
        assert max(wide, high) <= config.max_aspect * min(wide, high)
        assert max(wide / width, high / height) <= config.max_upscale + 1e-9
        assert 0 <= found.left <= found.resized[0] - wide and 0 <= found.top <= found.resized[1] - high
        left, top, right, bottom = found.source_box()
        assert left >= 0 and top >= 0 and right <= width + 1e-6 and bottom <= height + 1e-6
    assert placed > 200


def test_large_pictures_get_the_bucket_of_the_nearest_shape():
    config = BucketConfig()
    assert place(4096, 4096, config).bucket == (1024, 1024)
    assert place(2160, 3840, config).bucket == (768, 1344)
    assert place(30_000, 3_000, config).bucket == max(buckets(config), key=lambda size: size[0] / size[1])
    for width, height in random_sizes(100):
        assert place(width + 2000, height + 2000, config).bucket in buckets(config)


@pytest.mark.parametrize("size", [(1, 1), (30_000, 10), (51, 400)])
def test_pictures_that_are_too_small_are_refused_with_the_way_out(size):
    with pytest.raises(ValueError, match=r"is too small: a side must have 52 or more \(raise max_upscale"):
        place(*size, BucketConfig())


def test_the_record_says_which_part_is_seen():
    """A picture whose brightness is its column: what comes out at each place is what the record says was there."""
    for size in ((300, 128), (128, 300), (200, 200), (500, 97)):
        found = place(*size, BucketConfig(resolution=128, step=32, max_aspect=2.0))
        for axis in (0, 1):
            ramp = torch.linspace(0, 1, size[axis])[(None, slice(None)) if axis == 0 else (slice(None), None)]
            picture = ramp.expand(size[1], size[0])[..., None]
            got = fit(picture, found)[..., 0].mean(axis)
            offset, extent = (found.left, found.top)[axis], found.resized[axis]
            expected = ((offset + torch.arange(len(got)) + 0.5) * size[axis] / extent - 0.5) / (size[axis] - 1)
            assert (got - expected)[3:-3].abs().max() < 0.01


def test_the_cut_of_a_mirrored_picture_is_that_of_the_mirror_image():
    found = place(301, 128, BucketConfig(resolution=128, step=32, max_aspect=1.0))
    recorded = found.size_conditioning(True)
    assert found.size_conditioning(False)["crop_w"] == found.left
    assert recorded["crop_w"] == found.resized[0] - found.bucket[0] - found.left
    assert (recorded["width"], recorded["height"]) == (301, 128)
    assert (recorded["target_width"], recorded["target_height"]) == found.bucket
    picture = torch.rand(128, 301, 3)
    assert torch.equal(fit(picture, found, flipped=True), fit(picture, found).flip(1))


def test_random_parts_lie_in_the_picture_and_every_corner_is_as_likely():
    config = BucketConfig(resolution=128, step=32, max_aspect=1.0, crop="random")
    middle = place(200, 128, config)
    found = [cuts(middle, config, f"content {k}")[0] for k in range(4000)]
    lefts = [at.left for at in found]
    assert all(replace(at, left=middle.left) == middle for at in found), "nothing else moves"
    assert set(lefts) == set(range(73)), "from one edge to the other"
    assert abs(np.mean(lefts) - 36) < 1.5 and abs(np.var(lefts) / ((73**2 - 1) / 12) - 1) < 0.06
    assert cuts(middle, config, "content 5") == cuts(middle, config, "content 5")


def test_parts_are_distinct_grow_by_one_another_and_there_are_no_more_than_there_can_be():
    config = BucketConfig(resolution=128, step=32, max_aspect=1.0, crop="random", crops=6)
    wide, narrow, exact = (place(width, 128, config) for width in (400, 129, 128))
    assert len(set(cuts(wide, config, "x"))) == 6
    assert cuts(wide, config, "x")[:4] == cuts(wide, replace(config, crops=4), "x")
    assert len(cuts(narrow, config, "x")) == narrow.resized[0] - 127 < 6 and cuts(exact, config, "x") == (exact,)


def test_the_upper_edge_is_kept():
    config = BucketConfig(resolution=128, step=32, max_aspect=1.0, crop="top")
    tall, wide = place(128, 300, config), place(300, 128, config)
    assert cuts(tall, config, "x") == (replace(tall, top=0),) and tall.top == 86
    assert cuts(wide, config, "x") == (wide,), "left and right stay the middle"
    assert cuts(tall, replace(config, crop="middle"), "x") == (tall,)


def test_files_and_tensors_are_resized_alike_and_the_right_size_is_untouched():
    pixels = np.random.default_rng(0).integers(64, 192, (200, 333, 3), dtype=np.uint8)
    config = BucketConfig(resolution=128, step=32)
    found = place(333, 200, config)
    tensor = torch.from_numpy(pixels.astype(np.float32) / 255)
    assert (fit(Image.fromarray(pixels), found) - fit(tensor, found)).abs().max() < 2 / 255
    exact = torch.rand(128, 128, 3)
    assert torch.equal(fit(exact, place(128, 128, config)), exact)


@pytest.mark.parametrize(
    "wrong",
    [{"step": 4}, {"resolution": 32}, {"max_aspect": 0.5}, {"max_upscale": 0.9}, {"crops": 0}, {"crop": "left"}],
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}, but it must be"):
        BucketConfig(**wrong)
