"""Training data: pictures per second through Encode Dataset, and samples per second out of its cache.

`cold` encodes a folder into an empty cache, `warm` the same folder again, `changed` after 5 % of the files changed;
the embedded VAE and text encoder cost next to nothing, so this is what the pack itself costs. `read` draws every sample
of an epoch in batches, latents stacked and texts joined as training does, once from the cache and once from the same
tensors in memory (by the clock, and by CPU time where other programs share the machine). The model's own conditions,
which training makes of each sample at each visit, are not in it. `peak_bytes` is the resident memory over that at the
start (`memory`: the bytes of its tensors).
"""

import argparse
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import folder_paths
import numpy as np
import torch
from PIL import Image

from tidetable.runtime import tiny
from tidetable.runtime.dataset import folder_dataset
from tidetable.runtime.encoding import encode_dataset
from tidetable.training.data import BatchOrder, Dataset
from tidetable.training.dataset.buckets import BucketConfig
from tidetable.training.dataset.store import ShardWriter, Store


CHANGED = 0.05
PARTS = 10
"""Turns of each arm in an epoch of `read`."""
LATENT, TEXT, TEXTS = (4, 32, 32), (77, 2048), 1000
"""Shapes of `read`: small latents, text embeddings as SDXL has them, and how many different texts there are."""


def run(arguments: list[str]):
    """Rows for cases cold, warm, changed and read."""
    parser = argparse.ArgumentParser(prog="bench data")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--size", type=int, default=512, help="pixels of the pictures' sides")
    parser.add_argument("--entries", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=["encode", "read"], choices=["encode", "read"])
    options = parser.parse_args(arguments)
    before = folder_paths.get_output_directory()
    folder = Path(tempfile.mkdtemp(prefix="tidetable-bench-"))
    try:
        folder_paths.set_output_directory(str(folder))
        if "encode" in options.cases:
            yield from encode_rows(folder / "pictures", options.pictures, options.size)
        if "read" in options.cases:
            yield from read_rows(folder / "cache", options.entries, options.batch_size, options.rounds)
    finally:
        folder_paths.set_output_directory(before)
        shutil.rmtree(folder)


def encode_rows(folder: Path, count: int, size: int) -> Iterator[tuple]:
    vae, clip = tiny.load_tiny_vae(), tiny.load_tiny_clip()
    draw = np.random.default_rng(0)
    folder.mkdir()
    for place in range(count):
        write_picture(folder / f"{place:06}.jpg", size, draw)
        (folder / f"{place:06}.txt").write_text(f"a picture with the number {place}")
    time.sleep(2.1)  # files as young as that are not remembered
    for case in ("cold", "warm", "changed"):
        if case == "changed":
            for place in range(0, count, round(1 / CHANGED)):
                write_picture(folder / f"{place:06}.jpg", size, draw)

        def encode() -> None:
            with torch.inference_mode():
                encode_dataset(folder_dataset(str(folder))[0], vae, clip, "bench", BucketConfig(resolution=size))

        peak, seconds = with_peak(encode)
        yield case, "tidetable", "per_second", count / seconds, "1/s"
        yield case, "tidetable", "peak_bytes", peak, "B"


def write_picture(path: Path, size: int, draw: np.random.Generator) -> None:
    coarse = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    coarse.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)


def read_rows(folder: Path, count: int, batch_size: int, rounds: int) -> Iterator[tuple]:
    write_cache(folder, count)
    store = Store(folder)
    texts = [place % TEXTS for place in range(count)]

    def dataset(latent: Callable[[int], torch.Tensor]) -> Dataset:
        return Dataset(Reads(count, latent), texts, keys=[0] * count)

    keys, text_keys = ([f"{kind} {place}" for place in range(n)] for kind, n in (("latent", count), ("text", TEXTS)))
    cached = dataset(lambda place: store.read(keys[place])["latent"])
    cached_text = lambda place: store.read(text_keys[place])[0][0]  # noqa: E731
    order = BatchOrder(cached, batch_size, 0)
    steps = order.batches_per_epoch
    peak, _ = with_peak(lambda: walk(cached, cached_text, order, range(2 * steps)))
    latents = [store.read(key)["latent"].clone() for key in keys]
    embeddings = [store.read(key)[0][0].clone() for key in text_keys]
    arms = {"memory": (dataset(latents.__getitem__), embeddings.__getitem__), "tidetable": (cached, cached_text)}
    spent: dict[str, list[tuple[float, float]]] = {"tidetable": [], "memory": []}
    for number in range(rounds * PARTS):  # side by side, in short turns: other programs share this machine
        part = range(number * steps // PARTS, (number + 1) * steps // PARTS)
        for arm in (*arms,) if number % 2 else (*arms,)[::-1]:
            started, used = time.perf_counter(), time.process_time()
            walk(*arms[arm], order, part)
            spent[arm].append((time.perf_counter() - started, time.process_time() - used))
    peaks = {"tidetable": peak, "memory": float(sum(tensor.nbytes for tensor in (*latents, *embeddings)))}
    for arm, times in spent.items():
        yield "read", arm, "per_second", count / PARTS / median(clock for clock, _ in times), "1/s"
        yield "read", arm, "peak_bytes", peaks[arm], "B"
    for kind, name in enumerate(("of_memory", "of_memory_by_cpu_time")):
        ratios = [theirs[kind] / ours[kind] for ours, theirs in zip(*spent.values(), strict=True)]
        yield "read", "tidetable", name, median(ratios), "x"


class Reads:
    """A sequence whose items are read when they are asked for."""

    def __init__(self, count: int, read: Callable[[int], torch.Tensor]):
        self.count, self.read = count, read

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> torch.Tensor:
        return self.read(place)


def write_cache(folder: Path, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, "latents") as writer:
        for place in range(count):
            writer.add(f"latent {place}", {"latent": torch.randn(LATENT, generator=generator)})
    with ShardWriter(folder, "texts") as writer:
        for place in range(TEXTS):
            writer.add(f"text {place}", [[torch.randn(1, *TEXT, generator=generator), {}]])


def walk(data: Dataset, text: Callable[[int], torch.Tensor], order: BatchOrder, steps: range) -> float:
    """These steps' batches, as the trainer makes them; the sum keeps it from being skipped."""
    total = 0.0
    for step in steps:
        rows = order.indices(step)
        latents = torch.stack([data.latents[row] for row in rows])
        texts = torch.cat([text(data.conditions[row]) for row in rows])
        total += float(latents.flatten()[0] + texts.flatten()[0])
    return total


def with_peak(work: Callable[[], object]) -> tuple[float, float]:
    """(bytes of resident memory at most, over that at the start; seconds)."""
    first = peak = current_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, current_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        work()
    finally:
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    return max(peak, current_bytes()) - first, seconds


def current_bytes() -> int:
    """Resident memory now; where /proc does not say, the most there has been."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
