"""Encode Dataset: only what changed is encoded again, and whatever is wrong is named and survived."""

import random
import threading
import time
from dataclasses import replace

import comfy.model_management
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from PIL import Image

from tidetable.runtime import tiny
from tidetable.runtime.dataset import folder_dataset
from tidetable.runtime.encoding import Encoder, encode_dataset, limit_chunks
from tidetable.runtime.paths import cache_folder
from tidetable.tests.host.dataset_folders import write_glyphs
from tidetable.training.dataset import catalog, store
from tidetable.training.dataset.buckets import BucketConfig
from tidetable.training.dataset.captions import CaptionConfig
from tidetable.training.dataset.encoded import OpenedDataset
from tidetable.training.dataset.store import Store


SMALL = BucketConfig(resolution=64, step=32)


@pytest.fixture(scope="module")
def tools():
    return tiny.load_tiny_vae(), tiny.load_tiny_clip()


@pytest.fixture
def source(output, monkeypatch):
    """A folder of eight pictures that may be read, and files old enough to be remembered."""
    monkeypatch.setattr(catalog, "RACY_NS", 0)
    write_glyphs(output / "data")
    return output / "data"


@pytest.fixture
def counted(monkeypatch):
    """What really went through VAE and CLIP in this test."""
    counts = {"latents": 0, "texts": 0}
    run = Encoder.run

    def count(self, entries):
        try:
            return run(self, entries)
        finally:
            for name in counts:
                counts[name] += self.encoded[name]

    monkeypatch.setattr(Encoder, "run", count)
    return counts


def encode(folder, tools, name="cache", buckets=SMALL, captions=None, **kwargs):
    with torch.inference_mode():
        return encode_dataset(folder_dataset(str(folder))[0], *tools, name, buckets, captions, **kwargs)


def content(encoded):
    """Every latent and text by the picture's name."""
    found = Store(encoded.folder)
    return {
        picture.name: (
            [found.read(key)["latent"].clone() for key in picture.latents],
            [found.read(key)[0][0].clone() for key in picture.texts],
        )
        for picture in encoded.pictures
    }


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(a, b)
        for name in first
        for mine, others in zip(first[name], second[name], strict=True)
        for a, b in zip(mine, others, strict=True)
    )


def test_only_what_changed_is_encoded_again(source, tools, counted):
    first = encode(source, tools)
    assert counted["latents"] == 8
    texts = counted["texts"]
    again = encode(source, tools)
    assert counted == {"latents": 8, "texts": texts} and again.pictures == first.pictures
    write_glyphs(source / "more", 2, seed=5)
    (source / "picture_000.txt").write_text("another caption")
    Image.open(source / "picture_001.png").rotate(90).save(source / "picture_001.png")
    (source / "picture_002.png").rename(source / "renamed.png")
    changed = encode(source, tools)
    assert counted["latents"] == 8 + 3 and counted["texts"] <= texts + 3
    assert equal(content(changed), content(encode(source, tools, "fresh")))


def test_each_setting_that_changes_a_sample_has_its_own_samples(source, tools, counted):
    encode(source, tools)
    before = dict(counted)
    encode(source, tools, buckets=replace(SMALL, resolution=32))
    assert counted["latents"] == before["latents"] + 8 and counted["texts"] == before["texts"]
    encode(source, tools, buckets=replace(SMALL, flip=True))
    assert counted["latents"] == before["latents"] + 16, "the mirrored ones only"
    encode(source, tools, captions=CaptionConfig(trigger="sks"))
    assert counted["latents"] == before["latents"] + 16 and counted["texts"] > before["texts"]


def test_another_vae_or_text_encoder_never_gets_these_samples(source, tools, counted):
    first = encode(source, tools)
    before = dict(counted)
    with torch.inference_mode(False):
        vae, clip = tiny.load_tiny_vae(), tiny.load_tiny_clip()
        assert encode(source, (vae, clip)).pictures == first.pictures and counted == before, "equal ones do"
        vae.first_stage_model.anchor.data += 1
        clip.cond_stage_model.words.weight.data[40:] += 1
    other = encode(source, (vae, clip))
    assert counted == {name: 2 * count for name, count in before.items()}
    assert not {k for p in first.pictures for k in p.latents} & {k for p in other.pictures for k in p.latents}


def test_a_lora_on_the_text_encoder_counts_before_and_after_it_is_loaded(source, tools):
    clip = tools[1].clone()
    weight = clip.cond_stage_model.words.weight
    clip.patcher.add_patches({"words.weight": (torch.full_like(weight, 0.5),)}, 0.3)
    plain, patched = (encode(source, (tools[0], c)) for c in (tools[1], clip))
    assert plain.pictures[0].texts != patched.pictures[0].texts
    assert encode(source, (tools[0], clip)).pictures == patched.pictures
    assert encode(source, tools).pictures == plain.pictures, "merged patches are not taken for the encoder's own"


def test_cancel_keeps_what_is_done(source, tools, counted, monkeypatch):
    original, calls = tools[0].encode, []

    def cancel(pixels):
        calls.append(1)
        if len(calls) == 5:
            comfy.model_management.interrupt_current_processing()
        return original(pixels)

    monkeypatch.setattr(tools[0], "encode", cancel)
    with pytest.raises(InterruptProcessingException):
        encode(source, tools)
    assert counted["latents"] == 5
    encode(source, tools)
    assert counted["latents"] == 8


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "delete"])
def test_a_damaged_shard_is_named_and_mended(source, tools, counted, damage):
    whole = content(encode(source, tools))
    for shard in cache_folder("cache").glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-5] ^= 64
        {
            "truncate": lambda s=shard, d=data: s.write_bytes(d[: len(d) // 2]),
            "flip": lambda s=shard, d=data: s.write_bytes(d),
            "empty": lambda s=shard: s.write_bytes(b""),
            "delete": lambda s=shard: s.unlink(),
        }[damage]()
    before = counted["latents"]
    mended = encode(source, tools)
    assert equal(content(mended), whole)
    assert counted["latents"] == before + (1 if damage == "flip" else 8)
    assert damage == "delete" or "damaged" in mended.report
    assert OpenedDataset(mended).lost == []


def test_damage_after_encoding_leaves_the_picture_out_and_names_it(source, tools):
    encoded = encode(source, tools)
    (shard,) = cache_folder("cache").glob("latents-*")
    data = bytearray(shard.read_bytes())
    data[-5] ^= 64
    shard.write_bytes(data)
    opened = OpenedDataset(encoded)
    assert len(opened.lost) == 1 and len(opened.pictures) == 7


def test_two_encodes_into_one_cache_at_once(source, tools):
    found, failures = [], []

    def work():
        try:
            found.append(
                encode(source, (tiny.load_tiny_vae(), tiny.load_tiny_clip()), captions=CaptionConfig(trigger="x"))
            )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and len({encoded.pictures for encoded in found}) == 1
    assert OpenedDataset(found[0]).lost == [] and not list(cache_folder("cache").glob("*.tmp"))


def corrupt(data: bytes, draw: random.Random) -> bytes:
    """One of five ways in which files get damaged."""
    place = draw.randrange(len(data))
    return draw.choice(
        [
            lambda: data[:place],
            lambda: data[:place] + bytes(draw.randrange(1, 40)) + data[place:],
            lambda: data[:place] + draw.randbytes(20) + data[place + 20 :],
            lambda: b"".join(bytes([b ^ (draw.random() < 0.01)]) for b in data),
            lambda: draw.randbytes(len(data)),
        ]
    )()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_thousand_corrupted_files_are_survived_and_named(source, tools):
    """Each is left out with its name and a reason, or decodes; the whole pictures beside them come out as ever."""
    whole = content(encode(source, tools, "whole"))
    draw, bases = random.Random(0), []
    picture = Image.open(source / "picture_003.png").convert("RGB")
    for kind in ("png", "jpg", "webp", "gif", "bmp", "tiff"):
        picture.save(source.parent / f"base.{kind}")
        bases.append((kind, (source.parent / f"base.{kind}").read_bytes()))
    for number in range(1000):
        kind, data = bases[number % len(bases)]
        (source / f"corrupt_{number}.{kind}").write_bytes(corrupt(data, draw))
    started = time.monotonic()
    pictures, _ = folder_dataset(str(source))
    with torch.inference_mode():
        encoded = encode_dataset(pictures, *tools, "corrupted", SMALL)
    assert time.monotonic() - started < 60
    used = {picture.name for picture in encoded.pictures}
    skipped = encoded.report.split("left out: ")[1].split()[0]
    assert len(used) + int(skipped) == 1008 and int(skipped) > 400
    found = content(encoded)
    assert equal({name: found[name] for name in whole}, whole)
    assert all(torch.isfinite(latent).all() for latents, _ in found.values() for latent in latents)
    warm = encode(source, tools, "corrupted")
    assert warm.pictures == encoded.pictures and warm.report.count("left out") == 1, "named again from memory"


def test_nothing_left_is_an_error_with_the_reasons(source, tools):
    for path in source.glob("*.png"):
        path.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"none of the 8 pictures could be used(.|\n)*is not a whole picture"):
        encode(source, tools)


def test_a_full_disk_is_said_with_the_way_out(source, tools, monkeypatch):
    def refuse(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", refuse)
    with pytest.raises(ValueError, match="could not write the cache .*No space left.*Free some space"):
        encode(source, tools)


@pytest.mark.parametrize("name", ["", "../x", "/etc/x", "a\0b", "x" * 300])
def test_names_that_leave_the_cache_folder_are_refused(source, tools, name):
    with pytest.raises(ValueError, match="is not a name for a cache"):
        encode(source, tools, name)


def test_steps_that_the_vae_cannot_take_are_refused(source, tools):
    with pytest.raises(ValueError, match="bucket_step is 12, but this VAE needs a multiple of 8"):
        encode(source, tools, buckets=BucketConfig(resolution=64, step=12))


def test_long_prompts_keep_three_chunks():
    rows = [[(k, 1.0)] * 77 for k in range(5)]
    assert limit_chunks({"l": rows, "t5": rows[:1]}, 3) == ({"l": rows[:3], "t5": rows[:1]}, 5)
    assert limit_chunks({"l": rows[:3]}, 3) == ({"l": rows[:3]}, 0)


def test_statistics_are_those_of_the_latents(source, tools):
    encoded = encode(source, tools)
    stacked = torch.cat([latents[0].flatten(1) for latents, _ in content(encoded).values()], dim=1).double()
    mean, std = zip(*encoded.statistics, strict=True)
    assert torch.allclose(torch.tensor(mean, dtype=torch.float64), stacked.mean(1), atol=1e-9)
    assert torch.allclose(torch.tensor(std, dtype=torch.float64), stacked.std(1, correction=0), atol=1e-9)
