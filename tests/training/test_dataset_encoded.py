"""The rows of an epoch, what is held out, which rows share a batch, and pictures whose records are lost."""

from collections import Counter
from itertools import product

import pytest
import torch

from tidetable.training.data import BatchOrder, Dataset
from tidetable.training.dataset.encoded import (
    EncodedDataset,
    EncodedPicture,
    OpenedDataset,
    samples_of,
    split,
    statistics_of,
)
from tidetable.training.dataset.store import write_shard


def picture(name, texts=1, views=1, repeats=1, regularization=False):
    latents = tuple(f"{name} latent {view}" for view in range(views))
    return EncodedPicture(name, latents, tuple(f"{name} text {k}" for k in range(texts)), repeats, regularization)


def test_an_epoch_has_every_caption_with_every_view_and_repeats_are_exact():
    rows = samples_of([picture("a", 3, 2, repeats=2), picture("b", 1, 2), picture("c", 3, 2)])
    counts = Counter((row.latent, row.text) for row in rows)
    for view, text in product(range(2), range(3)):
        assert counts[f"a latent {view}", f"a text {text}"] == 2
        assert counts[f"c latent {view}", f"c text {text}"] == 1
    assert Counter(row.picture for row in rows) == {0: 12, 1: 6, 2: 6}, "one caption counts as much as three"


@pytest.mark.parametrize("others", [1, 4, 40])
def test_regularization_is_half_of_an_epoch_and_evenly_taken(others):
    rows = samples_of([picture("a", repeats=10), *[picture(f"r{k}", regularization=True) for k in range(others)]])
    counts = Counter(row.picture for row in rows)
    assert counts.pop(0) == 10 and sum(counts.values()) == 10
    assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == min(10, others)
    assert not samples_of([]) and len(samples_of([picture("r", regularization=True)])) == 1


def test_held_out_pictures_are_whole_evenly_spaced_and_never_regularization():
    pictures = [picture(f"p{k}", 2, 2, 3) for k in range(20)] + [picture("r", regularization=True)] * 5
    kept, held = split(pictures, 20)
    assert [p.name for p in held] == ["p2", "p7", "p12", "p17"]
    assert {p.name for p in kept}.isdisjoint(p.name for p in held) and len(kept) == 21
    assert all((len(p.latents), len(p.texts), p.repeats) == (1, 1, 1) for p in held)
    assert split(pictures, 0) == (pictures, []) and split(pictures[:4], 20) == (pictures[:4], [])


@pytest.fixture
def cache(tmp_path):
    """Pictures of two sizes with captions of one to three chunks."""
    pictures, latents, texts = [], [], [("none", [[torch.zeros(1, 77, 4), {}]], {})]
    for place in range(12):
        own = picture(f"p{place}")
        pictures.append(own)
        latents.append((own.latents[0], {"latent": torch.full((4, 8, 8 + 4 * (place % 2)), float(place))}, {}))
        texts.append((own.texts[0], [[torch.zeros(1, 77 * (1 + place % 3), 4), {"pooled": torch.zeros(1, 2)}]], {}))
    write_shard(tmp_path, "texts", texts)
    shard = write_shard(tmp_path, "latents", latents)
    return EncodedDataset(tmp_path, tuple(pictures), "none"), shard


def test_batches_never_mix_sizes_or_numbers_of_chunks(cache):
    opened = OpenedDataset(cache[0])
    rows = samples_of(opened.pictures)
    data = Dataset([None] * 12, [None] * 12, keys=[opened.group(row) for row in rows])
    order = BatchOrder(data, 2, seed=0)
    assert len(data.groups()) == 6 and order.batches_per_epoch == 6
    for step in range(12):
        first, second = order.indices(step)
        assert first % 2 == second % 2 and first % 3 == second % 3 and first != second


def test_lost_records_cost_their_pictures_only(cache):
    encoded, shard = cache
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    opened = OpenedDataset(encoded)
    assert (
        len(opened.lost) == 1 and len(opened.pictures) == 11 and opened.lost[0] not in {p.name for p in opened.pictures}
    )
    shard.unlink()
    with pytest.raises(ValueError, match="none of the 12 samples is in the cache"):
        OpenedDataset(encoded)
    for other in encoded.folder.glob("texts*"):
        other.unlink()
    with pytest.raises(ValueError, match="lacks the encoded empty caption"):
        OpenedDataset(encoded)


def test_statistics_add_up_over_latents_of_any_size():
    latents = [torch.randn(3, 5 + k, 7, dtype=torch.float64) * 2 + 1 for k in range(6)]
    infos = [
        {"count": x[0].numel(), "sums": x.sum((1, 2)).tolist(), "squares": x.square().sum((1, 2)).tolist()}
        for x in latents
    ]
    whole = torch.cat([x.flatten(1) for x in latents], dim=1)
    expected = torch.stack([whole.mean(1), whole.std(1, correction=0)], dim=1)
    assert torch.allclose(torch.tensor(statistics_of(infos), dtype=torch.float64), expected)
    assert statistics_of([]) == ()
