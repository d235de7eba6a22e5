"""Several processes that train one model: each takes its share of every batch, and DDP averages the gradients.

All that is random is drawn for the whole batch in every process and then cut, and the batch size of the settings is
that of all processes together. So the number of processes changes nothing but the order of floating-point sums.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


PATIENCE = timedelta(seconds=45)
"""How long a process waits for the others before it gives up."""


@dataclass(frozen=True)
class World:
    """The processes of a run and which one this is. One alone by default."""

    rank: int = 0
    size: int = 1
    together: bool = False
    """All must pass through the network as often as each other: its weights are in parts, see `sharding`."""

    @classmethod
    def current(cls) -> "World":
        """Of the process group that `torch.distributed` has, where there is one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def share(self, count: int) -> slice:
        """Which of `count` rows are this process's: neighbors, as many as each other has. ValueError if none fits."""
        if count % self.size:
            raise ValueError(
                f"a batch of {count} cannot be shared by {self.size} processes: use a batch_size that is a multiple of "
                f"{self.size}"
            )
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of all processes' values, the same in each."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        return self.sum(value) / self.size if self.size > 1 else value

    def most(self, count: int) -> int:
        """The largest of all processes' counts where they go together; else this one's."""
        if not self.together:
            return count
        value = torch.tensor(count)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first process does what is inside, then all others do."""
        if self.size > 1 and self.rank > 0:
            dist.barrier()
        try:
            yield
        finally:
            if self.size > 1 and self.rank == 0:
                dist.barrier()

    def averaged(self, loss: Callable[..., Tensor], parameters: Sequence[Tensor]) -> "Averaged":
        return Averaged(loss, parameters, self)


def leave() -> None:
    """The end of a process group, when all its processes are there: none takes the connection from another's feet."""
    dist.barrier()
    gc.collect()  # DDP's reducer before the threads that it uses
    dist.destroy_process_group()


class Averaged:
    """A loss whose backward pass leaves each parameter with the mean of all processes' gradients."""

    def __init__(self, loss: Callable[..., Tensor], parameters: Sequence[Tensor], world: World):
        self.call: Callable[..., Tensor] = loss
        self.wrapped: DistributedDataParallel | None = None
        if world.size > 1:
            # Adapters of layers that a batch does not reach have no gradient in it. For their sake gradients are sent
            # after every micro-batch: DDP's no_sync would lose those of a layer that only the last does not reach.
            self.wrapped = DistributedDataParallel(_Loss(loss, parameters), find_unused_parameters=True)
            self.call = self.wrapped

    def __call__(self, *batch) -> Tensor:
        return self.call(*batch)


class _Loss(nn.Module):
    """What DDP asks for: a module that has the parameters and whose forward pass is the loss."""

    def __init__(self, loss: Callable[..., Tensor], parameters: Sequence[Tensor]):
        super().__init__()
        self.loss = loss
        self.parts = nn.ParameterList(parameters)

    def forward(self, *batch) -> Tensor:
        return self.loss(*batch)


def parts(count: int, size: int) -> Iterator[slice]:
    """`count` rows in micro-batches of `size`."""
    return (slice(first, first + size) for first in range(0, count, size))
