"""An encoded data set: which records of a cache are its samples, and what is known about them without reading them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .store import Place, Store


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """One picture, by the keys of its records."""

    name: str
    latents: tuple[str, ...]
    """One record, or two where the picture is also mirrored."""
    texts: tuple[str, ...]
    """One record for each of its captions."""
    repeats: int = 1
    regularization: bool = False


@dataclass(frozen=True)
class EncodedDataset:
    """What Encode Dataset hands to Train LoRA: names of records, not the records."""

    folder: Path
    pictures: tuple[EncodedPicture, ...]
    dropped: str
    """The record of the text that stands for a dropped caption."""
    verify: bool = True
    """Check every record once before training."""
    report: str = ""
    statistics: tuple[tuple[float, float], ...] = ()
    """(mean, standard deviation) of each channel of the VAE's latents."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of an epoch."""

    picture: int
    latent: str
    text: str


def samples_of(pictures: Sequence[EncodedPicture]) -> list[Sample]:
    """The rows of an epoch: each picture as often as it repeats, with each caption, plain and mirrored.

    Every picture is there `repeats` times the largest number of captions and views that any has, so that pictures with
    one caption count as much as those with many. Regularization pictures fill up to as many rows as all others have.
    """
    if not pictures:
        return []
    captions, views = max(len(p.texts) for p in pictures), max(len(p.latents) for p in pictures)
    rows: dict[bool, list[Sample]] = {False: [], True: []}
    for number, picture in enumerate(pictures):
        for turn in range(picture.repeats * captions * views):
            caption, view = turn // views % len(picture.texts), turn % len(picture.latents)
            rows[picture.regularization].append(Sample(number, picture.latents[view], picture.texts[caption]))
    own, others = rows[False], rows[True]
    if own and others:
        others = [others[place * len(others) // len(own)] for place in range(len(own))]
    return own + others


def split(pictures: Sequence[EncodedPicture], percent: int) -> tuple[list[EncodedPicture], list[EncodedPicture]]:
    """(to train on, held out): an evenly spaced share of whole pictures, so that no held-out one is trained on.

    A held-out picture has one row: its first caption, not mirrored. Regularization pictures are never held out.
    """
    own = [place for place, picture in enumerate(pictures) if not picture.regularization]
    count = len(own) * percent // 100
    held = {own[(2 * k + 1) * len(own) // (2 * count)] for k in range(count)}
    kept = [picture for place, picture in enumerate(pictures) if place not in held]
    once = [replace(pictures[place], latents=pictures[place].latents[:1], texts=pictures[place].texts[:1], repeats=1)
            for place in sorted(held)]  # fmt: skip
    return kept, once


@dataclass
class OpenedDataset:
    """An encoded data set with its cache open. Pictures whose records are damaged or gone are left out and named."""

    encoded: EncodedDataset
    store: Store = field(init=False)
    pictures: list[EncodedPicture] = field(init=False)
    lost: list[str] = field(init=False)

    def __post_init__(self):
        self.store = Store(self.encoded.folder)
        wanted = {key for p in self.encoded.pictures for key in (*p.latents, *p.texts)} | {self.encoded.dropped}
        bad = {key for key in wanted if key not in self.store or (self.encoded.verify and not self.store.is_whole(key))}
        if self.encoded.dropped in bad:
            raise ValueError(
                f"the cache {self.encoded.folder} lacks the encoded empty caption: queue again after a change to "
                "Encode Dataset (any widget), which encodes what is missing"
            )
        whole = [p for p in self.encoded.pictures if not bad.intersection((*p.latents, *p.texts))]
        self.lost = [p.name for p in self.encoded.pictures if bad.intersection((*p.latents, *p.texts))]
        self.pictures = whole
        if not whole:
            raise ValueError(
                f"none of the {len(self.encoded.pictures)} samples is in the cache {self.encoded.folder}: encode the "
                "data set again"
            )

    def group(self, sample: Sample) -> tuple:
        """What the samples of a batch must have in common: the latent's shape and the text's, chunks included."""
        return shapes(self.store.places[sample.latent])[:1], shapes(self.store.places[sample.text])


def shapes(place: Place) -> tuple[tuple[int, ...], ...]:
    """The shapes of a record's tensors, in their order; nothing is read."""
    return tuple(shape for _, shape, _, _ in place.tensors())


def statistics_of(infos: Sequence[Any]) -> tuple[tuple[float, float], ...]:
    """(mean, standard deviation) of each channel over many latents, from each one's count, sums and sums of squares."""
    if not infos:
        return ()
    count = sum(info["count"] for info in infos)
    found = []
    for channel in range(min(len(info["sums"]) for info in infos)):
        mean = sum(info["sums"][channel] for info in infos) / count
        square = sum(info["squares"][channel] for info in infos) / count
        found.append((mean, max(0.0, square - mean * mean) ** 0.5))
    return tuple(found)
