"""Independent readers of small pictures: scikit-learn classifiers that know nothing of the models they judge."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

from tidetable.training.tiny_data import DIGITS, digit_batch, glyph_batch


SIDE = 20
"""The found character is scaled to this many pixels."""
TRAIN_SEED, TEST_SEED = 7_000_001, 7_000_002


@dataclass(frozen=True)
class Judge:
    """A classifier with its own accuracy on held-out real pictures."""

    classifier: SVC
    accuracy: float

    def read(self, images: Tensor) -> list[str]:
        """Class names for [N, 3, 32, 32] pictures in [0, 1]."""
        return [str(name) for name in self.classifier.predict(ink_maps(images))]


def accuracy(judge: Judge, images: Tensor, wanted: list[str]) -> float:
    return float(np.mean([a == b for a, b in zip(judge.read(images), wanted, strict=True)]))


@cache
def glyph_judge(count: int = 6000) -> Judge:
    """Reads the 36 characters; trained on renderings that no model was trained on."""
    return _judge(lambda seed, n: glyph_batch(n, seed), count, lambda batch: [glyph.character for glyph in batch[2]])


@cache
def digit_judge(count: int = 4000) -> Judge:
    """Reads handwritten digits; trained on the first 1400 of scikit-learn's, tested on the others."""
    splits = {TRAIN_SEED: "train", TEST_SEED: "test"}
    return _judge(
        lambda seed, n: digit_batch(n, seed, splits[seed]), count, lambda batch: [glyph.character for glyph in batch[2]]
    )


@cache
def handwriting_judge(count: int = 1500) -> Judge:
    """Tells handwritten digits from rendered ones: "handwritten" or "rendered"."""
    splits = {TRAIN_SEED: "train", TEST_SEED: "test"}

    def both(seed: int, n: int):
        written, rendered = digit_batch(n, seed, splits[seed])[0], glyph_batch(n, seed, DIGITS)[0]
        return torch.cat([written, rendered]), ["handwritten"] * n + ["rendered"] * n

    return _judge(both, count, lambda batch: batch[1])


def _judge(make, count: int, names) -> Judge:
    train, test = make(TRAIN_SEED, count), make(TEST_SEED, max(400, count // 10))
    classifier = SVC(C=10.0, gamma="scale").fit(ink_maps(train[0]), names(train))
    return Judge(classifier, float(classifier.score(ink_maps(test[0]), names(test))))


def ink_maps(images: Tensor) -> np.ndarray:
    """[N, 3, 32, 32] pictures to [N, SIDE²] maps of where the ink is, whatever its color, contrast, place and size."""
    return np.stack([_ink_map(image) for image in images.detach().float().cpu()])


def _ink_map(image: Tensor) -> np.ndarray:
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)
    distance = (image - border.median(dim=1).values[:, None, None]).norm(dim=0)
    ink = (distance / distance.flatten().quantile(0.97).clamp_min(1e-4)).clamp(0, 1)
    rows, columns = (torch.nonzero(ink.amax(dim) > 0.43).flatten() for dim in (1, 0))
    box = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else ink
    height, width = box.shape
    side = max(height, width)
    square = torch.zeros(side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = box
    scaled = torch.nn.functional.interpolate(square[None, None], size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return scaled.flatten().numpy()
