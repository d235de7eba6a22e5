"""The cache on disk: what is written is read, one record at a time; damage is found and costs its own records only."""

import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from devtools import loading
from tidetable.training.dataset import store as store_module
from tidetable.training.dataset.store import ShardWriter, Store, set_aside, write_shard


def record(place: int, size: int = 8) -> dict:
    generator = torch.Generator().manual_seed(place)
    latent = torch.randn(4, size, size, generator=generator)
    pooled = torch.randn(5, generator=generator).to(torch.bfloat16)
    return {"latent": latent, "nested": [[latent[0, 0], {"pooled": pooled, "none": None, "text": "ä", 3: (1, 2.5)}]]}


def fill(folder: Path, count: int, start: int = 0) -> list[Path]:
    with ShardWriter(folder, "latents") as writer:
        for place in range(start, start + count):
            writer.add(f"key {place}", record(place), {"place": place})
    return writer.written


def same(found, expected) -> bool:
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and all(same(*pair) for pair in zip(found, expected, strict=True))
    return found == expected


def test_what_is_written_is_read_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_BYTES", 5000)
    shards = fill(tmp_path, 20)
    assert len(shards) > 3 and not list(tmp_path.glob("*.tmp"))
    store = Store(tmp_path)
    assert len(store.places) == 20 and store.damaged == []
    for place in random.Random(0).sample(range(20), 20):
        assert same(store.read(f"key {place}"), record(place)), place
        assert store.places[f"key {place}"].info == {"place": place} and store.is_whole(f"key {place}")
    with pytest.raises(KeyError):
        store.read("key 20")


def test_a_shard_is_a_plain_safetensors_file(tmp_path):
    (shard,) = fill(tmp_path, 3)
    tensors = load_file(shard)
    assert len(tensors) == 9
    assert any(torch.equal(tensor, record(1)["latent"]) for tensor in tensors.values())


def test_one_read_touches_one_record(tmp_path):
    """The places of a record's tensors are its own bytes, no more: nothing else is decoded or copied."""
    fill(tmp_path, 10)
    store = Store(tmp_path)
    leaves = [leaf for place in store.places.values() for leaf in place.tensors()]
    spans = sorted((leaf.first, leaf.first + leaf.nbytes) for leaf in leaves)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert sum(leaf.nbytes for leaf in leaves) == 10 * (4 * 256 + 4 * 8 + 2 * 5)


def test_records_are_read_anew_where_another_shard_has_taken_their_place(tmp_path, monkeypatch):
    """Also where more shards are in use than are held open."""
    monkeypatch.setattr(store_module, "OPEN_SHARDS", 2)
    for place in range(5):
        fill(tmp_path, 1, start=place)
    store = Store(tmp_path)
    for place in random.Random(0).choices(range(5), k=40):
        assert same(store.read(f"key {place}"), record(place))
        assert len(store._shards) <= 2 and len(store._views) <= 2
    write_shard(tmp_path, "latents", [("key 1", record(7), {})])
    store.read("key 1")
    store.refresh()
    assert same(store.read("key 1"), record(7))
    store.forget("key 1")
    with pytest.raises(KeyError):
        store.read("key 1")


def test_what_a_reader_does_to_a_record_does_not_reach_the_file(tmp_path):
    (shard,) = fill(tmp_path, 2)
    before = shard.read_bytes()
    store = Store(tmp_path)
    store.read("key 0")["latent"].add_(1)
    store.close()
    assert shard.read_bytes() == before and same(Store(tmp_path).read("key 0"), record(0))


@pytest.mark.parametrize("length", [0, 4, 100, -100, -1])
def test_a_truncated_shard_is_named_and_the_others_are_read(tmp_path, length):
    (first,), (second,) = fill(tmp_path, 3), fill(tmp_path, 3, start=3)
    data = first.read_bytes()
    first.write_bytes(data[:length] if length else b"")
    store = Store(tmp_path)
    assert sorted(store.places) == ["key 3", "key 4", "key 5"]
    ((path, reason),) = store.damaged
    assert path == first and reason
    set_aside(path)
    assert Store(tmp_path).damaged == [] and second.exists()


def test_any_flipped_bit_is_found_and_costs_its_record_only(tmp_path):
    """In the tensors: the checksum. In the header: its own checksum, or it no longer fits the file."""
    (shard,) = fill(tmp_path, 5)
    data = shard.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(1)
    for _ in range(60):
        place = draw.randrange(header, len(data))
        shard.write_bytes(data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :])
        store = Store(tmp_path)
        whole = [key for key in store.places if store.is_whole(key)]
        assert len(store.places) == 5 and len(whole) == 4
        assert all(same(store.read(key), record(int(key.split()[1]))) for key in whole)
    for _ in range(200):
        place = draw.randrange(header)
        shard.write_bytes(data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :])
        store = Store(tmp_path)
        assert store.damaged or len(store.places) == 5
        for key in (key for key in store.places if store.is_whole(key)):
            number = int(key.split()[1])
            assert same(store.read(key), record(number)) and store.places[key].info == {"place": number}


def test_a_record_that_is_written_anew_replaces_the_damaged_one(tmp_path):
    (shard,) = fill(tmp_path, 3)
    data = bytearray(shard.read_bytes())
    data[-3] ^= 255
    shard.write_bytes(bytes(data))
    os.utime(shard, ns=(1, 1))
    (bad,) = [key for key in Store(tmp_path).places if not Store(tmp_path).is_whole(key)]
    for _ in range(5):
        write_shard(tmp_path, "latents", [(bad, record(int(bad.split()[1])), {})])
        store = Store(tmp_path)
        assert all(store.is_whole(key) for key in store.places)


def test_what_is_pending_is_written_when_the_run_is_cut_short(tmp_path):
    def interrupted():
        with ShardWriter(tmp_path, "latents") as writer:
            writer.add("key 0", record(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert same(Store(tmp_path).read("key 0"), record(0))


def test_a_disk_that_refuses_leaves_nothing_half_written(tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(28, "No space left on device")

    fill(tmp_path, 2)
    monkeypatch.setattr(store_module.os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, "latents", [("key 9", record(9), {})])
    assert len(list(tmp_path.iterdir())) == 1 and len(Store(tmp_path).places) == 2


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from devtools import loading
loading.load_checkout()
from pathlib import Path
from tidetable.training.dataset import store
from tidetable.tests.training.test_dataset_store import fill
store.SHARD_BYTES = 3000
fill(Path(sys.argv[2]), 40, start=int(sys.argv[3]))
"""


def test_processes_may_write_into_one_cache_at_once(tmp_path):
    command = [sys.executable, "-c", WRITER, str(loading.ROOT), str(tmp_path)]
    writers = [subprocess.Popen([*command, str(start)]) for start in (0, 20, 40)]
    while any(writer.poll() is None for writer in writers):
        store = Store(tmp_path)  # a reader in between sees whole shards only
        assert store.damaged == [] and all(store.is_whole(key) for key in list(store.places)[:5])
    assert all(writer.returncode == 0 for writer in writers)
    store = Store(tmp_path)
    assert sorted(store.places) == sorted(f"key {place}" for place in range(80))
    assert all(same(store.read(f"key {place}"), record(place)) for place in range(80))


RESIDENT = """
import sys
sys.path.insert(0, sys.argv[1])
from devtools import loading
loading.load_checkout()
import json, random
from pathlib import Path
from tidetable.training.dataset import store
def resident():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmRSS"].split()[0]) * 1024
store.RESIDENT_BYTES = 64 << 20
store = store.Store(Path(sys.argv[2]))
keys = sorted(store.places)
random.Random(0).shuffle(keys)
peaks, total = [0] * 8, 0.0
for place, key in enumerate(keys):
    total += float(store.read(key)["latent"].sum())
    part = place * 8 // len(keys)
    peaks[part] = max(peaks[part], resident())
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_resident_memory_is_flat_over_an_epoch(tmp_path):
    """512 MB of records go by; what stays resident is below a fixed part of it, and does not grow."""
    big = torch.arange(256 * 1024, dtype=torch.float32).reshape(4, 256, 256)
    with ShardWriter(tmp_path, "latents") as writer:
        for place in range(512):
            writer.add(f"key {place:04}", {"latent": big + place})
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(loading.ROOT), str(tmp_path)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 8
    assert max(found[1:]) - found[1] < 24 << 20, "every eighth reads 64 MB: without release it would be 384 MB"
