"""Samples, in memory or read one by one, and their order: a function of (seed, step), so that a run can resume."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .protocols import Condition


@dataclass(frozen=True)
class Dataset:
    """Latents [C, ...] in the space the network sees, with one conditioning each; shapes may differ."""

    latents: Sequence[Tensor]
    conditions: Sequence[Condition]
    empty_condition: Condition | None = None
    """What caption dropout replaces a condition with."""
    empties: Sequence[Condition] | None = None
    """The same where each sample has its own; in place of `empty_condition`."""
    keys: Sequence[Hashable] | None = None
    """What the samples of a batch must have in common, one for each; None: the shape of the latent, read from it."""
    identity: str = ""
    """A name for all of it, for data that is not read as a whole to compare runs; empty where it is."""
    masks: Sequence[Tensor] | None = None
    """[1, ..., h, w] of each latent: 1 where it is learned, see `training.masked`."""
    prior_conditions: Sequence[Condition] | None = None
    """For each latent the condition on which the adapter shall change nothing, see `training.prior`."""

    def __post_init__(self):
        if len(self.latents) == 0:
            raise ValueError("the data set is empty: connect at least one latent")
        if len(self.latents) != len(self.conditions):
            raise ValueError(
                f"{len(self.latents)} latents but {len(self.conditions)} conditionings: connect one for each latent"
            )

    def __len__(self) -> int:
        return len(self.latents)

    def subset(self, rows: Sequence[int]) -> "Dataset":
        """These samples, in this order, of a data set in memory."""
        parts = {name: getattr(self, name) for name in ("latents", "conditions", "masks", "prior_conditions")}
        return replace(
            self, **{name: None if part is None else [part[row] for row in rows] for name, part in parts.items()}
        )

    def masks_of(self, rows: Sequence[int]) -> Tensor | None:
        """[B, 1, ..., h, w], or None where no sample has a mask."""
        return None if self.masks is None else torch.stack([self.masks[row] for row in rows])

    def condition(self, index: int, dropped: bool = False) -> Condition:
        """A sample's condition, or what stands for it where its caption is dropped."""
        if not dropped:
            return self.conditions[index]
        return self.empties[index] if self.empties is not None else self.empty_condition

    def groups(self) -> list[list[int]]:
        """Indices of samples that can share a batch: those with one key."""
        by_key: dict[Hashable, list[int]] = {}
        for index, key in enumerate(self.keys or (latent.shape for latent in self.latents)):
            by_key.setdefault(key, []).append(index)
        return list(by_key.values())


class BatchOrder:
    """Every epoch visits each sample once, in batches of one shape; short batches are filled from their own group."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int):
        self.groups = dataset.groups()
        self.batch_size = batch_size
        self.seed = seed
        self.batches_per_epoch = sum(-(-len(group) // batch_size) for group in self.groups)
        self._epoch: tuple[int, list[list[int]]] | None = None

    def indices(self, step: int) -> list[int]:
        """Sample indices of step `step` (0-based)."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._make_epoch(epoch))
        return self._epoch[1][position]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        generator = step_generator(self.seed, epoch, stream=1)
        batches = []
        for group in self.groups:
            order = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
            while len(order) % self.batch_size:
                order += order[: self.batch_size - len(order) % self.batch_size]
            batches += [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The randomness of one step (stream 0), an epoch's order (1), validation noise (2), or a row's noise (3 on)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) % 2**64
    mixed ^= mixed >> 31
    return torch.Generator().manual_seed((mixed * 0xD6E8FEB86659FD93) % 2**63)


def row_noise(like: Tensor, seed: int, step: int, row: int) -> Tensor:
    """Standard normal noise of one row of a step's batch, drawn on the CPU: the same on every device."""
    return torch.randn(like.shape, generator=step_generator(seed, step, stream=3 + row)).to(like)
