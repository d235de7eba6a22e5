"""An encoded data set as what the engine trains on: every sample is read from the cache when its step comes."""

import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ..training.checkpoint import digest
from ..training.data import Dataset
from ..training.dataset.encoded import EncodedDataset, OpenedDataset, Sample, samples_of, shapes, split
from ..training.dataset.store import Store
from ..training.recipe import ObjectiveConfig
from .masked import fitted
from .trainable import ComfyDenoiser


NATIVE = ObjectiveConfig()
NAMED = 5
"""Lost pictures that are named one by one."""
SIZES = ("width", "height", "crop_w", "crop_h", "target_width", "target_height")
"""SDXL's size conditioning; other models ignore it."""


class Lazy(Sequence):
    """A sequence whose items are made when they are asked for, and not kept."""

    def __init__(self, length: int, make: Callable[[int], Any]):
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._make(place) for place in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._make(index % self._length)


class EncodedSamples:
    """The cache behind a `ComfyDenoiser`: latents in its space and its own conditions, made at each access."""

    def __init__(self, denoiser: ComfyDenoiser, encoded: EncodedDataset, objective: ObjectiveConfig = NATIVE):
        self.denoiser, self.objective = denoiser, objective
        self.opened = OpenedDataset(encoded)
        places = [self.opened.store.places[key] for picture in self.opened.pictures for key in picture.latents]
        self.masked = objective.masked_loss != "off" and any(len(shapes(place)) > 1 for place in places)
        self.prompt = objective.prior_conditioning
        if isinstance(self.prompt, tuple):
            raise ValueError(
                f"{len(self.prompt)} conditionings at prior_conditioning of Training Objective, but the samples of a"
                " dataset have captions of their own: connect a single one"
            )

    def datasets(self, validation_percent: int) -> tuple[Dataset, Dataset | None]:
        """(to train on, held out); whole pictures are held out."""
        for number, picture in enumerate(self.opened.pictures if self.masked else (), 1):
            for key in picture.latents:  # better to hear of an empty mask now than in the night
                self.weight(Sample(number - 1, key, picture.texts[0]))
        kept, held = split(self.opened.pictures, validation_percent)
        return self.dataset(samples_of(kept)), self.dataset(samples_of(held)) if held else None

    def dataset(self, samples: Sequence[Sample]) -> Dataset:
        count, opened = len(samples), self.opened
        empties = Lazy(count, lambda place: self.condition(samples[place], opened.encoded.dropped))
        asked = Lazy(count, lambda place: self.sized(samples[place], self.prompt))
        objective = self.objective
        kept = objective.prior_weight > 0 and objective.prior_on == "class_prompt"
        name = [[[sample.latent, sample.text] for sample in samples], opened.encoded.dropped]
        return Dataset(
            latents=Lazy(count, lambda place: self.latent(samples[place])),
            conditions=Lazy(count, lambda place: self.condition(samples[place], samples[place].text)),
            empties=empties,
            keys=[opened.group(sample) for sample in samples],
            identity=digest([*name, self.prompt] if kept and self.prompt is not None else name),
            masks=Lazy(count, lambda place: self.weight(samples[place])) if self.masked else None,
            prior_conditions=(empties if self.prompt is None else asked) if kept else None,
        )

    def latent(self, sample: Sample) -> Tensor:
        return self.denoiser.latent(self.opened.store.read(sample.latent)["latent"])

    def mask(self, sample: Sample) -> Tensor | None:
        """[1, h, w] in 0 to 1 at the latent's size, 1 where training looks; None where the picture has none."""
        mask = self.opened.store.read(sample.latent).get("mask")
        return None if mask is None else mask.clone()

    def weight(self, sample: Sample) -> Tensor:
        """The mask as the loss takes it."""
        return fitted(self.mask(sample), self.latent(sample), sample.picture + 1, self.objective)

    def condition(self, sample: Sample, text: str) -> dict:
        """The model's own conditions of a text, with the size and the cut of the sample's picture."""
        return self.sized(sample, self.opened.store.read(text))

    def sized(self, sample: Sample, conditioning: Sequence) -> dict:
        info = self.opened.store.places[sample.latent].info
        sizes = {name: info[name] for name in SIZES}
        with torch.no_grad():
            return self.denoiser.condition(
                [[cross, {**options, **sizes}] for cross, options in conditioning], self.latent(sample)
            )


def encoded_datasets(
    denoiser: ComfyDenoiser,
    encoded: EncodedDataset,
    validation_percent: int,
    say: Callable[[str], None],
    objective: ObjectiveConfig = NATIVE,
) -> tuple[Dataset, Dataset | None]:
    """(to train on, held out or None). `say` hears of samples whose records are damaged or gone."""
    if not 0 <= validation_percent <= 50:
        raise ValueError(f"validation_percent is {validation_percent}, but it must be in 0..50")
    samples = EncodedSamples(denoiser, encoded, objective)
    lost = samples.opened.lost
    if lost:
        named = ", ".join(lost[:NAMED]) + (f" and {len(lost) - NAMED} more" if len(lost) > NAMED else "")
        say(
            f"{len(lost)} pictures are left out, their part of the cache is damaged or gone: {named}. Change any widget"
            " of Encode Dataset and queue again to encode them anew"
        )
    return samples.datasets(validation_percent)


def largest_latent(encoded: EncodedDataset) -> Tensor:
    """The VAE's latent [C, ...] with the most values: what the memory for a step is reckoned from."""
    store = Store(encoded.folder)
    keys = {key for picture in encoded.pictures for key in picture.latents if key in store}
    if not keys:
        raise ValueError(f"the cache {encoded.folder} is empty: encode the data set again")
    largest = max(sorted(keys), key=lambda key: math.prod(shapes(store.places[key])[0]))
    return store.read(largest)["latent"].clone()
