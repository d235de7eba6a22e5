"""What an evaluation costs at full size, counted on shapes alone: nothing of the network is computed or allocated.

A sampler's own numbers stay real, so that nodes can ask for the noise level; from where a network begins to where it
ends its tensors are FakeTensors. The counts do not depend on the machine.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


# torch counts its fused attention on the GPU, but as of 2.13 not the one on the CPU.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v)
    )
}


@dataclass(frozen=True)
class Cost:
    """FLOPs (two per multiply-add) of matrix products, convolutions and attention; how often the network was called;
    bytes: the most that tensors other than weights took at any one time."""

    flops: int
    calls: int
    peak_bytes: int


def count(network: nn.Module, action: Callable[[], object]) -> Cost:
    """The cost of `action`, which calls `network` any number of times with anything around it."""
    with torch.no_grad(), shapes_only(network) as rows, LiveBytes() as live, flop_counter() as flops:
        action()
    return Cost(flops.get_total_flops(), len(rows), live.peak)


def flop_counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


@contextlib.contextmanager
def shapes_only(network: nn.Module) -> Iterator[list[int]]:
    """Inside, `network` works on FakeTensors and answers with zeros; yields the rows of each call so far."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    rows = []

    def convert(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else fake.from_tensor(tensor)

    def before(module, args, kwargs):
        rows.append(len(args[0]))
        fake.__enter__()
        return tree_map_only(Tensor, convert, (args, kwargs))

    def after(module, args, output):
        fake.__exit__(None, None, None)
        return tree_map_only(Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=t.device), output)

    handles = [
        network.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        network.register_forward_hook(after, prepend=True, always_call=True),
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes that tensors made inside took together. What was there before, like weights, is left out,
    and so is what a kernel uses for itself."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if all(returned.alias_info is None for returned in func._schema.returns):  # neither a view nor in place
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor):
                    self._note(tensor.untyped_storage())
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
