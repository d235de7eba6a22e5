"""A network's weights in parts, by torch's FSDP2 (Zhao et al. 2023, arXiv:2304.11277): each process holds its share of
every weight, and a block's others are gathered for the length of the block's forward and of its backward pass.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import PATIENCE


VIEW = r"FSDP2-wrapped module \(FSDP{}\) returned a view"
"""What FSDP2 warns of at a network whose result is a view. Nobody adds to it in place: it goes into the loss."""


@contextmanager
def in_shares(network: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
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
    group: Any = dist.new_group(timeout=PATIENCE)
    mesh = DeviceMesh.from_group(group, next(network.parameters()).device.type)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", VIEW.format(type(network).__name__), UserWarning)
        for module in dict.fromkeys([*blocks, network]):
            fully_shard(module, mesh=mesh)
        yield


def refuse_unfit(network: nn.Module) -> None:
    """ValueError for a weight that fully_shard cannot cut along its first dimension."""
    for name, parameter in network.named_parameters():
        reason = ""
        if parameter.ndim == 0:
            reason = "is a single number"
        elif not parameter.is_contiguous():
            reason = "is not contiguous (--force-channels-last does that)"
        elif type(parameter.data) is not Tensor:
            reason = f"is a {type(parameter.data).__name__}, which has more to it than its values"
        if reason:
            raise ValueError(f"the weights cannot be shared by several processes: {name} {reason}")


def local_bytes(network: nn.Module) -> int:
    """Bytes of the weights that this process holds."""
    return sum(local(parameter).nbytes for parameter in network.parameters())


def local(tensor: Any) -> Tensor:
    """This process's share of a tensor, or the tensor where it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
