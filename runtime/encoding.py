"""Encode Dataset's work: pictures and captions through VAE and CLIP into a cache, only where it lacks them."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn

from ..training.checkpoint import digest
from ..training.dataset.buckets import BucketConfig, Placement, place
from ..training.dataset.captions import CaptionConfig, escape, write_caption
from ..training.dataset.catalog import Catalog, Seen
from ..training.dataset.encoded import EncodedDataset, EncodedPicture, statistics_of
from ..training.dataset.images import BadImageError, fit
from ..training.dataset.report import Report
from ..training.dataset.scan import Entry, Pictures
from ..training.dataset.store import ShardWriter, Store, set_aside
from .identity import clip_identity, vae_identity
from .paths import cache_folder


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
) -> EncodedDataset:
    """Encode what the cache `name` lacks. What is done stays when the run is cancelled or fails.

    ValueError where no picture is left, or where the disk refuses the cache; single pictures are skipped and named.
    """
    encoder = Encoder(vae, clip, cache_folder(name), buckets or BucketConfig(), captions or CaptionConfig(), verify)
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
        with self.catalog, ShardWriter(self.store.folder, "latents") as writer:
            for number, entry in enumerate(entries):
                comfy.model_management.throw_exception_if_processing_interrupted()
                try:
                    if entry.name in found:
                        raise BadImageError("has the name of another picture")
                    found[entry.name] = self._encode_picture(entry, writer)
                except BadImageError as error:
                    self.report.skip(entry.name, error)
                self.progress.update_absolute(number + 1)
        return found

    def _encode_picture(self, entry: Entry, writer: ShardWriter) -> tuple[str, ...]:
        seen = self.catalog.look(entry.source)
        mask = self.catalog.look_at_mask(entry.mask)
        if mask is not None and mask.error:
            self.report.note(entry.name, f"its mask {mask.error}: used without")
            mask = None
        for note in seen.notes:
            self.report.note(entry.name, note)
        if seen.error:
            raise BadImageError(seen.error)
        try:
            placement = place(*seen.size, self.buckets)
        except ValueError as error:
            raise BadImageError(str(error)) from None
        flips = (False, True) if self.buckets.flip else (False,)
        keys = tuple(self._latent_key(seen, mask, placement, flipped) for flipped in flips)
        for key, flipped in zip(keys, flips, strict=True):
            if self._has(key, entry.name):
                self.infos[key] = self.store.places[key].info
            elif key not in self.infos:  # the same picture under two names is encoded once
                self._write_latent(key, seen, mask, placement, flipped, writer)
        return keys

    def _write_latent(
        self, key: str, seen: Seen, mask: Seen | None, placement: Placement, flipped: bool, writer: ShardWriter
    ) -> None:
        latent = self.vae.encode(fit(seen.picture(), placement, flipped)[None])[0].float().cpu()
        if not torch.isfinite(latent).all():
            raise BadImageError("its latent contains nan or inf: use a VAE in fp32 (--fp32-vae)")
        value = {"latent": latent}
        if mask is not None:
            value["mask"] = _latent_mask(mask, placement, flipped, latent)
        flat = latent.flatten(1).double()
        info = {
            **placement.size_conditioning(flipped),
            "count": flat.shape[1],
            "sums": flat.sum(1).tolist(),
            "squares": flat.square().sum(1).tolist(),
        }
        writer.add(key, value, info)
        self.infos[key] = info
        self.encoded["latents"] += 1

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
                if key in done or self._has(key, name):
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

    def _has(self, key: str, name: str) -> bool:
        if key not in self.store:
            return False
        if self.verify and not self.store.is_whole(key):
            self.report.note(name, f"was damaged in {self.store.places[key].shard.name}: encoded again")
            self.store.forget(key)
            return False
        return True

    def _latent_key(self, seen: Seen, mask: Seen | None, placement: Placement, flipped: bool) -> str:
        box = [placement.original, placement.resized, placement.left, placement.top, placement.bucket, flipped]
        return digest(["latent", seen.content, mask.content if mask else "", box, self.vae_name])

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


def _latent_mask(mask: Seen, placement: Placement, flipped: bool, latent: Tensor) -> Tensor:
    """[1, h, w] in 0 to 1: the mask through the same resizing and cut, at the latent's size."""
    picture = mask.picture()
    own = replace(placement, original=(picture.shape[1], picture.shape[0]))
    pixels = fit(picture, own, flipped).movedim(-1, 0)[None]
    return nn.functional.interpolate(pixels, size=latent.shape[-2:], mode="area")[0].clamp(0, 1)


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
    **sizes: Any,
) -> tuple[EncodedDataset, str]:
    """(the data set, its report) from the node's widgets."""
    buckets = BucketConfig(step=bucket_step, **sizes)
    found = encode_dataset(pictures, vae, clip, name, buckets, captions, verify, node_id)
    return found, found.report
