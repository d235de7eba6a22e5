"""Encode Dataset's work: pictures and captions through VAE and CLIP into a cache, only where it lacks them."""

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ..training.checkpoint import digest
from ..training.dataset.buckets import BucketConfig
from ..training.dataset.captions import CaptionConfig, escape, write_caption
from ..training.dataset.catalog import Catalog
from ..training.dataset.encoded import EncodedDataset, EncodedPicture, statistics_of
from ..training.dataset.report import Report
from ..training.dataset.scan import Entry, Pictures
from ..training.dataset.store import ShardWriter, Store, set_aside
from .identity import clip_identity, vae_identity
from .paths import cache_folder
from .pictures import Batches, Preparation, View, ahead, has_record


logger = logging.getLogger(__name__)


def encode_dataset(
    pictures: Pictures,
    vae: comfy.sd.VAE,
    clip: comfy.sd.CLIP,
    name: str,
    buckets: BucketConfig | None = None,
    captions: CaptionConfig | None = None,
    verify: bool = True,
    node_id: str | None = None,
    vae_batch: int = 1,
) -> EncodedDataset:
    """Encode what the cache `name` lacks. What is done stays when the run is cancelled or fails.

    ValueError where no picture is left, or where the disk refuses the cache; single pictures are skipped and named.
    """
    encoder = Encoder(vae, clip, cache_folder(name), buckets or BucketConfig(), captions or CaptionConfig(), verify)
    encoder.vae_batch = vae_batch
    encoder.progress = comfy.utils.ProgressBar(len(pictures.entries), node_id=node_id)
    encoder.report.extend(pictures.report)
    try:
        return encoder.run(pictures.entries)
    except OSError as error:
        raise ValueError(
            f"could not write the cache {encoder.store.folder}: {error}. Free some space, or start ComfyUI with another"
            " --output-directory; what is encoded so far is kept"
        ) from error
    finally:
        encoder.store.close()


class Encoder:
    """One pass over a data set; see `encode_dataset`."""

    progress: Any
    vae_batch = 1
    """Pictures that the VAE sees at once."""

    def __init__(
        self,
        vae: comfy.sd.VAE,
        clip: comfy.sd.CLIP,
        folder: Path,
        buckets: BucketConfig,
        captions: CaptionConfig,
        verify: bool,
    ):
        ratio = vae.spacial_compression_encode()
        if buckets.step % ratio:
            raise ValueError(f"bucket_step is {buckets.step}, but this VAE needs a multiple of {ratio}: use 64")
        self.vae, self.clip, self.buckets, self.captions, self.verify = vae, clip, buckets, captions, verify
        self.vae_name, self.clip_name = vae_identity(vae), clip_identity(clip)
        self.report = Report()
        folder.mkdir(parents=True, exist_ok=True)
        self.store = Store(folder)
        self.catalog = Catalog(folder / "files.json")
        self.infos: dict[str, Any] = {}
        """What is known of each latent of this data set, new or not."""
        self.encoded = {"latents": 0, "texts": 0}

    def run(self, entries: Sequence[Entry]) -> EncodedDataset:
        started = time.monotonic()
        for path, reason in self.store.damaged:
            self.report.note(path.name, f"is damaged: {reason}. Set aside; its samples are encoded again")
            set_aside(path)
        latents = self._encode_pictures(entries)
        texts = [self._texts_of(entry) for entry in entries if entry.name in latents]
        dropped = escape(self.captions.dropped_text) if self.captions.literal else self.captions.dropped_text
        self._encode_texts([*[(text, name) for name, found in texts for text in found], (dropped, "the dropped text")])
        found = tuple(
            EncodedPicture(
                entry.name,
                latents[entry.name],
                tuple(map(self._text_key, wanted)),
                entry.repeats,
                entry.regularization,
            )
            for entry, (_, wanted) in zip((e for e in entries if e.name in latents), texts, strict=True)
        )
        if not any(not picture.regularization for picture in found):
            raise ValueError(f"none of the {len(entries)} pictures could be used\n{self.report.text()}")
        statistics = statistics_of(list(self.infos.values()))
        self._summarize(len(found), statistics, time.monotonic() - started)
        text = self.report.text()
        logger.info("encoded %s:\n%s", self.store.folder, text)
        return EncodedDataset(self.store.folder, found, self._text_key(dropped), self.verify, text, statistics)

    def _encode_pictures(self, entries: Sequence[Entry]) -> dict[str, tuple[str, ...]]:
        """Keys of the latents of every picture that could be read, by its name."""
        found: dict[str, tuple[str, ...]] = {}
        prepare = Preparation(self.store, self.catalog, self.buckets, self.vae_name, self.verify)
        batches = Batches(self.vae, self.vae_batch, self.report.note)
        with (
            self.catalog,
            ShardWriter(self.store.folder, "latents") as writer,
            closing(ahead(prepare, entries)) as pictures,
        ):
            for number, picture in enumerate(pictures):
                comfy.model_management.throw_exception_if_processing_interrupted()
                for note in picture.notes:
                    self.report.note(picture.name, note)
                if picture.error:
                    self.report.skip(picture.name, picture.error)
                else:
                    found[picture.name] = picture.keys
                    self.infos |= picture.known
                    for view in picture.lacking:
                        self._write_latents(batches.add(view), writer)
                self.progress.update_absolute(number + 1)
            self._write_latents(batches.rest(), writer)
        for name in [name for name, keys in found.items() if not self.infos.keys() >= set(keys)]:
            self.report.skip(name, "its latent contains nan or inf: use a VAE in fp32 (--fp32-vae)")
            del found[name]
        return found

    def _write_latents(self, latents: Iterable[tuple[View, Tensor]], writer: ShardWriter) -> None:
        for view, latent in latents:
            if not torch.isfinite(latent).all():
                continue
            mask, flat = view.mask_for(latent), latent.flatten(1).double()
            info = {
                **view.sizes,
                "count": flat.shape[1],
                "sums": flat.sum(1).tolist(),
                "squares": flat.square().sum(1).tolist(),
            }
            writer.add(view.key, {"latent": latent} if mask is None else {"latent": latent, "mask": mask}, info)
            self.infos[view.key] = info
            self.encoded["latents"] += 1
            comfy.model_management.throw_exception_if_processing_interrupted()

    def _texts_of(self, entry: Entry) -> tuple[str, list[str]]:
        """(name, the distinct captions of the picture)."""
        count = self.captions.distinct(entry.caption)
        texts = (write_caption(entry.caption, self.captions, entry.name, k, entry.regularization) for k in range(count))
        return entry.name, list(texts)

    def _encode_texts(self, texts: Iterable[tuple[str, str]]) -> None:
        with ShardWriter(self.store.folder, "texts") as writer:
            done: set[str] = set()
            for text, name in texts:
                key = self._text_key(text)
                if key in done or has_record(self.store, key, self.verify, partial(self.report.note, name)):
                    continue
                comfy.model_management.throw_exception_if_processing_interrupted()
                done.add(key)
                tokens, cut = limit_chunks(self.clip.tokenize(text), self.captions.max_chunks)
                if cut:
                    self.report.note(
                        name, f"its caption has {cut} chunks of 75 tokens: {self.captions.max_chunks} kept"
                    )
                try:
                    writer.add(key, self.clip.encode_from_tokens_scheduled(tokens))
                except TypeError as error:
                    raise ValueError(f"this text encoder's conditioning cannot be kept in a cache ({error})") from error
                self.encoded["texts"] += 1

    def _text_key(self, text: str) -> str:
        return digest(["text", text, self.captions.max_chunks, self.clip_name])

    def _summarize(self, count: int, statistics: tuple[tuple[float, float], ...], seconds: float) -> None:
        sizes: dict[tuple[int, int], int] = {}
        for info in self.infos.values():
            size = info["target_width"], info["target_height"]
            sizes[size] = sizes.get(size, 0) + 1
        channels = ", ".join(f"{mean:.3f} ± {std:.3f}" for mean, std in statistics)
        self.report.figures += [
            f"{count} pictures in {len(sizes)} buckets: "
            + ", ".join(f"{width}x{height} ({n})" for (width, height), n in sorted(sizes.items())),
            f"encoded now: {self.encoded['latents']} latents and {self.encoded['texts']} captions in {seconds:.1f} s; "
            f"{len(self.infos) - self.encoded['latents']} latents were in the cache",
            f"latents of this VAE by channel, mean ± standard deviation: {channels}",
        ]


def limit_chunks(tokens: dict[str, Any], limit: int) -> tuple[dict[str, Any], int]:
    """At most `limit` chunks for each tokenizer, and how many there were if some were cut, else 0."""
    longest = max((len(rows) for rows in tokens.values() if isinstance(rows, list)), default=0)
    cut = {name: rows[:limit] if isinstance(rows, list) else rows for name, rows in tokens.items()}
    return cut, longest if longest > limit else 0


def encode_node(
    pictures: Pictures,
    vae: comfy.sd.VAE,
    clip: comfy.sd.CLIP,
    name: str,
    captions: CaptionConfig | None,
    *,
    bucket_step: int,
    verify: bool,
    node_id: str | None = None,
    vae_batch: int = 1,
    **sizes: Any,
) -> tuple[EncodedDataset, str]:
    """(the data set, its report) from the node's widgets."""
    buckets = BucketConfig(step=bucket_step, **sizes)
    found = encode_dataset(pictures, vae, clip, name, buckets, captions, verify, node_id, vae_batch)
    return found, found.report
