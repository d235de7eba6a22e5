"""Held-out loss at fixed noise levels and fixed noise: a number that falls only when the model improves."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from .data import Dataset, step_generator
from .distributed import World
from .events import Validated
from .objective import NATIVE, loss_for_batch
from .protocols import TrainableDenoiser
from .recipe import ObjectiveConfig


ALONE = World()
VALIDATION_T = (0.1, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def validate(
    denoiser: TrainableDenoiser,
    dataset: Dataset,
    batch_size: int,
    seed: int,
    step: int,
    world: World = ALONE,
    objective: ObjectiveConfig = NATIVE,
) -> Validated:
    """Mean native loss of every held-out sample at every level of `VALIDATION_T`, with noise drawn from the seed.

    Each (sample, t) has its own noise, the same at every call and for every batch size. Of the objective only its masks
    count, so that runs with other losses can be compared.
    """
    masked = replace(NATIVE, masked_loss=objective.masked_loss, unmasked_weight=objective.unmasked_weight)
    by_t = []
    batches = list(shared(dataset, batch_size, world))
    for level, t in enumerate(VALIDATION_T):
        total = torch.zeros((), dtype=torch.float64)
        for rows, counts in batches:
            x0 = torch.stack([dataset.latents[i] for i in rows])
            eps = torch.stack([_noise(x0[0], seed, i * len(VALIDATION_T) + level) for i in rows]).to(x0)
            levels = denoiser.snap(torch.full((len(rows),), t, dtype=torch.float64))
            conditions = [dataset.conditions[i] for i in rows]
            losses = loss_for_batch(denoiser, x0, conditions, eps, levels, masked, masks=dataset.masks_of(rows))
            if counts:
                total += losses.double().sum().cpu()
        by_t.append((t, (world.sum(total) / len(dataset)).item()))
    return Validated(step=step, loss=sum(loss for _, loss in by_t) / len(by_t), by_t=tuple(by_t))


def shared(dataset: Dataset, batch_size: int, world: World) -> Iterator[tuple[list[int], bool]]:
    """This process's batches, and whether each counts: processes that go together fill up with one that does not."""
    for group in dataset.groups():
        own = group[world.rank :: world.size]
        longest = -(-len(group) // world.size) if world.together else len(own)
        for start in range(0, longest, batch_size):
            rows = own[start : start + batch_size]
            yield rows or group[:1], bool(rows)


def _noise(like: torch.Tensor, seed: int, index: int) -> torch.Tensor:
    return torch.randn(like.shape, generator=step_generator(seed, index, stream=2))
