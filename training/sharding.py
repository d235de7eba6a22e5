"""A network's weights in parts, by torch's FSDP2 (Zhao et al. 2023, arXiv:2304.11277): each process holds its share of
every weight, and a block's others are gathered for the length of the block's forward and of its backward pass.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import PATIENCE


VIEW = r"FSDP2-wrapped module \(FSDP{}\) returned a view"
"""What FSDP2 warns of at a network whose result is a view. Nobody adds to it in place: it goes into the loss."""


@contextmanager
def in_shares(network: nn.Module, blocks: Sequence[nn.Module], patience: timedelta = PATIENCE) -> Iterator[None]:
    """Leave this process its share of the network's weights, for good. ValueError where they cannot be cut.

    Gathering has a process group of its own: the order of its messages and that of DDP's then need not be the same in
    every process.
    """
    try:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise ValueError(f"torch {torch.__version__} has no fully_shard, 2.6 has: update torch") from error
    refuse_unfit(network)
    group: Any = dist.new_group(timeout=patience)
    mesh = DeviceMesh.from_group(group, next(network.parameters()).device.type)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", VIEW.format(type(network).__name__), UserWarning)
        for module in dict.fromkeys([*blocks, network]):
            # Of the outermost one FSDP2 would keep what it gathered: stale where weights change before the next pass.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        yield


def refuse_unfit(network: nn.Module) -> None:
    """ValueError for a weight that fully_shard cannot cut along its first dimension."""
    for name, parameter in network.named_parameters():
        reason = ""
        if parameter.ndim == 0:
            reason = "is a single number"
        elif not parameter.is_contiguous():
            reason = "is not contiguous (--force-channels-last does that)"
        elif parameter.element_size() < 2 and parameter.device.type == "cpu":
            reason = f"is {parameter.dtype}, which processes on a CPU cannot send"
        elif type(parameter.data) is not Tensor:
            reason = f"is a {type(parameter.data).__name__}, which has more to it than its values"
        if reason:
            raise ValueError(f"the weights cannot be shared by several processes: {name} {reason}")


def is_share(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only: torch's DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """All of a tensor; of a share all processes must ask for it. `item` of a reduced share is one process's own."""
    return tensor.full_tensor() if is_share(tensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """The same in main memory, to be saved."""
    return whole(tensor).detach().cpu() if is_share(tensor) else tensor


def like(value: Tensor, parameter: Any) -> Tensor:
    """Of a whole value what a process holds of the parameter; no message is sent."""
    if not is_share(parameter) or is_share(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.detach().to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def share_state(optimizer: Any) -> None:
    """Of an optimizer's state, loaded whole, keep what belongs to this process's shares."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and parameter.ndim:
                state[name] = like(value, parameter)


def local_bytes(network: nn.Module) -> int:
    """Bytes of the weights that this process holds."""
    return sum(local(parameter).nbytes for parameter in network.parameters())


def local(tensor: Any) -> Tensor:
    """This process's share of a tensor, or the tensor where it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
