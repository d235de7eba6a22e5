"""What backward needs is kept in main memory: every large tensor that a network saves is copied there when it is saved,
and comes back when backward asks for it.

torch's own `save_on_cpu` would send the frozen weights too, which autograd saves as well and which stay where they are.
A copy is made at once, so additions in place that come later cannot change it; small tensors are copied where they are.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


LEAST_BYTES = 1 << 20
"""Of memory that is worth the way there and back."""


class Held:
    """A copy of a tensor's whole memory, which several tensors may be views of: it goes and comes once for all."""

    def __init__(self, tensor: Tensor):
        memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        self.device, self.away = tensor.device, len(memory) >= LEAST_BYTES
        pinned = self.away and tensor.device.type == "cuda"
        place = "cpu" if self.away else tensor.device
        self.copy = torch.empty(len(memory), dtype=torch.uint8, device=place, pin_memory=pinned).copy_(memory)
        self._returned: weakref.ref[Tensor] | None = None

    def view(self, dtype: torch.dtype, offset: int, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
        last = None if self._returned is None else self._returned()
        if last is None:
            last = self.copy.to(self.device, non_blocking=self.copy.is_pinned())
        tensor = torch.empty(0, dtype=dtype, device=self.device)
        tensor.set_(last.untyped_storage(), offset, size, stride)
        self._returned = weakref.ref(tensor)
        return tensor


@dataclass(frozen=True, slots=True)
class Away:
    """A tensor that is not there, with its strides: what is computed from it must be the same bits."""

    held: Held
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    requires_grad: bool


class Offload:
    """Sends tensors away and brings them back."""

    def __init__(self):
        self.staying: set[int] = set()
        self._sent: dict[int, tuple[StorageWeakRef, int, weakref.ref[Held]]] = {}

    def keep(self, tensor: Tensor) -> Tensor | Away:
        """Weights as they are, everything else as a copy, in main memory where it is large."""
        root = tensor if tensor._base is None else tensor._base
        if hasattr(tensor, "__tensor_flatten__") or (root.is_leaf and root.requires_grad):  # what is trained
            return tensor
        if tensor.untyped_storage().data_ptr() in self.staying:
            return tensor
        tensor = tensor.resolve_conj().resolve_neg()
        storage, version = tensor.untyped_storage(), tensor._version
        reference, sent, known = self._sent.get(storage._cdata, (None, -1, None))
        held = None if known is None or reference is None or reference.expired() or sent != version else known()
        if held is None:
            held = Held(tensor)
            self._sent[storage._cdata] = (StorageWeakRef(storage), version, weakref.ref(held))
        offset = int(tensor.storage_offset())
        return Away(held, tensor.dtype, offset, tensor.size(), tensor.stride(), tensor.requires_grad)

    def back(self, kept: Tensor | Away) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        tensor = kept.held.view(kept.dtype, kept.offset, kept.size, kept.stride)
        return tensor.requires_grad_() if kept.requires_grad else tensor

    def forward_of(self, network: nn.Module) -> Callable:
        """The network's forward, of which everything that it saves for backward is sent away."""
        forward = network.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            self._look_at(network)
            # Of nested hooks only the innermost are asked: a guard's around this pass have nothing to guard here.
            with torch.autograd.graph.saved_tensors_hooks(self.keep, self.back):
                return forward(*args, **kwargs)

        return call

    def _look_at(self, network: nn.Module) -> None:
        """Forget what is gone, and see where the weights are."""
        self._sent = {key: entry for key, entry in self._sent.items() if not entry[0].expired()}
        weights = [p for p in (*network.parameters(), *network.buffers()) if not hasattr(p, "__tensor_flatten__")]
        self.staying = {p.untyped_storage().data_ptr() for p in weights}
