"""Pictures on their way to the VAE: ahead of it in a thread, several at once, and cut in other places."""

import threading
from collections import Counter
from dataclasses import replace

import comfy.model_management
import comfy.sd
import numpy as np
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.model_management import InterruptProcessingException
from PIL import Image

from tidetable.runtime import tiny
from tidetable.runtime.dataset import folder_dataset
from tidetable.runtime.encoding import encode_dataset
from tidetable.runtime.pictures import AHEAD, Batches, ahead
from tidetable.tests.host.dataset_folders import write_glyphs
from tidetable.tests.host.test_dataset_encoding import content, equal
from tidetable.training.dataset import catalog
from tidetable.training.dataset.buckets import BucketConfig
from tidetable.training.dataset.encoded import samples_of
from tidetable.training.dataset.store import Store


SMALL = BucketConfig(resolution=64, step=16, flip=True)
_NETWORK = {
    "double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def kl_vae() -> comfy.sd.VAE:
    """ComfyUI's VAE around its own AutoencoderKL, small, with random weights."""
    with torch.inference_mode(False), torch.no_grad():
        params = {"ddconfig": _NETWORK, "embed_dim": 4}
        network = AutoencoderKL(**params)
        tiny.initialize(network, 0)
        return comfy.sd.VAE(sd=network.state_dict(), config={"params": params}, dtype=torch.float32)


@pytest.fixture
def clip():
    return tiny.load_tiny_clip()


@pytest.fixture
def source(output, monkeypatch):
    """Nine pictures in three sizes, one with a mask."""
    monkeypatch.setattr(catalog, "RACY_NS", 0)
    for number, size in enumerate(((64, 64), (64, 96), (128, 64))):
        write_glyphs(output / "data" / str(number), 3, size, seed=number)
    Image.linear_gradient("L").save(output / "data" / "1" / "picture_001.mask.png")
    return output / "data"


def encode(folder, vae, clip, name="cache", buckets=SMALL, **kwargs):
    with torch.inference_mode():
        return encode_dataset(folder_dataset(str(folder))[0], vae, clip, name, buckets, **kwargs)


def masks(encoded):
    store = Store(encoded.folder)
    found = [store.read(key).get("mask") for picture in encoded.pictures for key in picture.latents]
    return [mask.clone() for mask in found if mask is not None]


@pytest.mark.parametrize("make", [tiny.load_tiny_vae, kl_vae], ids=["embedded", "kl"])
def test_batches_give_the_latents_of_one_by_one_under_the_same_keys(source, clip, make):
    vae = make()
    one = encode(source, vae, clip, "one")
    many = encode(source, vae, clip, "many", vae_batch=4)
    assert one.pictures == many.pictures and "too large" not in many.report
    alone, together = content(one), content(many)
    for name in alone:
        for mine, others in zip(alone[name][0], together[name][0], strict=True):
            assert torch.allclose(mine, others, rtol=1e-5, atol=1e-5 * float(mine.std()))
    assert len(masks(one)) == 2 and all(map(torch.equal, masks(one), masks(many)))
    assert make is kl_vae or equal(alone, together)


def test_the_network_sees_batches_of_one_size_only(source, clip, monkeypatch):
    vae = kl_vae()
    seen = []
    original = vae.first_stage_model.encode
    monkeypatch.setattr(
        vae.first_stage_model, "encode", lambda x, *a, **k: seen.append(x.shape) or original(x, *a, **k)
    )
    encode(source, vae, clip, "one")
    assert {shape[0] for shape in seen} == {1} and len(seen) == 18
    seen.clear()
    encode(source, vae, clip, "many", vae_batch=4)
    assert Counter(shape[0] for shape in seen) == {4: 3, 2: 3}, "six views of each of three sizes"


def test_a_video_vae_gets_one_picture_at_once():
    """A batch would be the frames of one film."""
    vae = kl_vae()
    assert Batches(vae, 8, print).size == 8
    vae.latent_dim, vae.not_video = 3, False
    assert Batches(vae, 8, print).size == 1
    vae.not_video = True
    assert Batches(vae, 8, print).size == 8


@pytest.mark.parametrize("largest", [2, 1, 0])
def test_out_of_memory_halves_the_batch_and_tiles_are_named(source, clip, monkeypatch, largest):
    """Where not even one fits, ComfyUI's tiles are used, and the report says of which pictures."""
    vae = kl_vae()
    before = content(encode(source, vae, clip, "before"))
    original = vae.first_stage_model.encode
    failing = [True]

    def refuse(pixels, *args, **kwargs):
        if len(pixels) > largest and failing[0]:
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return original(pixels, *args, **kwargs)

    monkeypatch.setattr(vae.first_stage_model, "encode", refuse)
    tiles = type(vae).encode_tiled_

    def tiled(self, *args, **kwargs):
        failing[0] = False  # a tile is smaller, here it is not
        try:
            return tiles(self, *args, **kwargs)
        finally:
            failing[0] = True

    monkeypatch.setattr(type(vae), "encode_tiled_", tiled)
    found = encode(source, vae, clip, "after", vae_batch=4)
    assert "4 at once were too large for the memory: 2 from here on" in found.report
    assert ("2 at once were too large for the memory: 1" in found.report) == (largest < 2)
    assert found.report.count("encoded in tiles") == (18 if largest == 0 else 0)
    after = content(found)
    for name in before:
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(before[name][0], after[name][0], strict=True))


def test_pictures_are_read_while_the_vae_works_and_not_too_many(source, clip, monkeypatch):
    vae, made, enough = tiny.load_tiny_vae(), [], threading.Event()
    original, look = vae.encode, catalog.Catalog.look

    def watch(self, path):
        assert threading.current_thread() is not threading.main_thread()
        made.append(path)
        if len(made) > AHEAD:
            enough.set()
        return look(self, path)

    def wait(pixels):
        assert enough.wait(30), "the VAE works on the first picture, and the next ones are read meanwhile"
        return original(pixels)

    monkeypatch.setattr(catalog.Catalog, "look", watch)
    monkeypatch.setattr(vae, "encode", wait)
    assert len(encode(source, vae, clip).pictures) == 9 == len(made)
    taken, running = [], ahead(lambda k: taken.append(k) or k, range(100))
    assert [next(running) for _ in range(3)] == [0, 1, 2]
    running.close()
    assert len(taken) <= 3 + AHEAD
    assert not [thread for thread in threading.enumerate() if "tidetable-pictures" in thread.name]


@pytest.mark.parametrize("batch", [1, 4])
def test_cancel_and_errors_end_the_thread_and_keep_what_is_done(source, clip, monkeypatch, batch):
    vae, calls = tiny.load_tiny_vae(), []
    original = vae.encode

    def cancel(pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            comfy.model_management.interrupt_current_processing()
        if len(calls) == 4:
            raise RuntimeError("the VAE fails")
        return original(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(vae, "encode", cancel)
        with pytest.raises(InterruptProcessingException):
            encode(source, vae, clip, vae_batch=batch)
        assert not [thread for thread in threading.enumerate() if "tidetable-pictures" in thread.name]
        done = sum(key is not None for key in Store(source.parent / "tidetable" / "cache" / "cache").places)
        assert batch < done <= 2 * batch
        with pytest.raises(RuntimeError, match="the VAE fails"):
            encode(source, vae, clip, vae_batch=batch)
    assert equal(content(encode(source, vae, clip)), content(encode(source, vae, clip, "fresh")))


def test_random_parts_are_told_to_the_model_as_they_are_cut(output, clip):
    """A picture whose red is its column and whose green is its row: the latent's mean says where the cut is."""
    folder = output / "data"
    folder.mkdir()
    columns, rows = np.meshgrid(np.linspace(0, 255, 300), np.linspace(0, 255, 200))
    Image.fromarray(np.stack([columns, rows, rows], -1).round().astype(np.uint8)).save(folder / "wide.png")
    Image.new("RGB", (64, 64), (90, 90, 90)).save(folder / "fits.png")
    buckets = BucketConfig(resolution=64, step=64, max_aspect=1.0, crop="random", crops=5, flip=True)
    encoded = encode(folder, tiny.load_tiny_vae(), clip, buckets=buckets)
    fits, wide = encoded.pictures
    assert len(wide.latents) == 10 and len(fits.latents) == 2, "what fits has one part, plain and mirrored"
    rows = samples_of(encoded.pictures)
    assert Counter(row.picture for row in rows) == {0: 10, 1: 10} and len({row.latent for row in rows}) == 12
    store, lefts = Store(encoded.folder), set()
    for number, key in enumerate(wide.latents):
        info = store.places[key].info
        column = (store.read(key)["latent"][0].mean() + 1) / 2 * 96 - 0.5
        left = info["crop_w"] if number % 2 == 0 else 96 - 64 - info["crop_w"]  # of the picture as it hangs
        assert abs(float(column) - (left + 31.5)) < 0.7 and info["crop_h"] == 0
        assert (info["width"], info["height"]) == (300, 200)
        lefts.add(left)
    assert len(lefts) == 5
    again = encode(folder, tiny.load_tiny_vae(), clip, buckets=buckets)
    assert again.pictures == encoded.pictures and "encoded now: 0 latents" in again.report
    fewer = encode(folder, tiny.load_tiny_vae(), clip, buckets=replace(buckets, crops=3))
    assert set(fewer.pictures[1].latents) < set(wide.latents), "more parts leave those that are there"
