"""What Train LoRA is given to train on, as the data sets of the engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..training.data import Dataset
from ..training.dataset.encoded import EncodedDataset
from ..training.distributed import World
from ..training.recipe import ObjectiveConfig
from .encoded import encoded_datasets, largest_latent
from .masked import refuse_encoded_prompt, with_masks_and_prior
from .preflight import check_latents
from .progress import TrainingReporter
from .text_encoder import LiveText
from .trainable import ComfyDenoiser


NATIVE = ObjectiveConfig()
CHECKED = 64
"""Samples of an encoded data set whose statistics are looked at before training."""


@dataclass(frozen=True)
class TrainingData:
    """What the node was connected to."""

    latents: Sequence[dict] = ()
    positive: Sequence[list] = ()
    negative: list | None = None
    """The empty conditioning for caption dropout."""
    validation_percent: int = 0
    """Share of the samples that is held out for validation, 0 to 50."""
    encoded: EncodedDataset | None = None
    """From Encode Dataset, in place of `latents`, `positive` and `negative`."""

    def samples(self) -> list[Tensor]:
        """Every latent [C, ...] by itself, in order; of an encoded data set the largest one. ValueError for none."""
        if self.encoded is not None:
            return [largest_latent(self.encoded)]
        rows = [row for latent in self.latents for row in latent["samples"]]
        if not rows:
            raise ValueError(
                "there is nothing to train on, the latents are empty: connect the latents of at least one image (VAE "
                "Encode) and their conditionings, or a dataset (Encode Dataset)"
            )
        return rows


def training_data(
    latents: Sequence[dict | None] | None,
    positive: Sequence[list | None] | None,
    empty: Sequence[list | None] | None,
    validation_percent: int,
    encoded: EncodedDataset | None = None,
) -> TrainingData:
    """What the node was given, where inputs that are not connected are None or [None]."""
    rows = [row for row in latents or () if row is not None]
    texts = [text for text in positive or () if text is not None]
    none = next((text for text in empty or () if text is not None), None)
    if encoded is not None and (rows or texts or none is not None):
        raise ValueError(
            "both a dataset and latents, positive or empty are connected: disconnect one. Encode Dataset brings the "
            "captions and the empty one with it"
        )
    if bool(rows) != bool(texts):
        raise ValueError("latents and positive belong together: connect both, or a dataset in their place")
    return TrainingData(rows, texts, none, validation_percent, encoded)


def datasets_of(
    denoiser: ComfyDenoiser,
    data: TrainingData,
    samples: Sequence[Tensor],
    reporter: TrainingReporter,
    text: LiveText | None = None,
    objective: ObjectiveConfig = NATIVE,
) -> tuple[Dataset, Dataset | None]:
    """(to train on, held out or None), in memory or read from a cache while training. `text` encodes captions live."""
    if data.encoded is not None:
        if text is not None:
            raise ValueError(
                "a dataset from Encode Dataset has its captions encoded already, so the text encoder cannot be trained "
                "on it: disconnect text_encoder, or connect latents and positive in place of dataset"
            )
        dataset, held_out = encoded_datasets(denoiser, data.encoded, data.validation_percent, reporter.say, objective)
        if World.current().rank == 0:  # the others read nothing but their own samples
            some = [dataset.latents[i] for i in range(0, len(dataset), -(-len(dataset) // CHECKED))]
            check_latents([denoiser.real.process_latent_out(latent[None])[0] for latent in some], some, reporter)
        return dataset, held_out
    dataset = denoiser.dataset(samples, data.positive, data.negative)
    check_latents(samples, dataset.latents, reporter)
    if text is not None:
        refuse_encoded_prompt(objective)
        dataset = text.dataset(dataset, data.positive, data.negative)
    dataset = with_masks_and_prior(denoiser, dataset, data.latents, data.negative, objective)
    return split_held_out(dataset, data.validation_percent)


def split_held_out(dataset: Dataset, percent: int) -> tuple[Dataset, Dataset | None]:
    """Hold out an evenly spaced share of the samples; none where the share is below one sample."""
    if not 0 <= percent <= 50:
        raise ValueError(f"validation_percent is {percent}, but it must be in 0..50")
    count = len(dataset) * percent // 100
    if count == 0:
        return dataset, None
    held = {(2 * k + 1) * len(dataset) // (2 * count) for k in range(count)}
    return dataset.subset([i for i in range(len(dataset)) if i not in held]), dataset.subset(sorted(held))
