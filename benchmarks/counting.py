"""What an evaluation costs at full size, counted on shapes alone: nothing of the network is computed or allocated.

A sampler's own numbers stay real, so that nodes can ask for the noise level; inside `apply_model` tensors are
FakeTensors, and what comes out of it is zeros. The counts do not depend on the machine.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
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


def count(model: ModelPatcher, evaluate: Callable[[ModelPatcher], object]) -> Cost:
    """The cost of `evaluate`, which gets a clone of the model and calls its network any number of times."""
    on_shapes, calls = shapes_only(model)
    with torch.no_grad(), LiveBytes() as live, flop_counter() as flops:
        evaluate(on_shapes)
    return Cost(flops.get_total_flops(), len(calls), live.peak)


def flop_counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


def shapes_only(model: ModelPatcher) -> tuple[ModelPatcher, list[int]]:
    """A clone that computes shapes and answers with zeros, and a list that gets the number of rows at each call."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    calls = []

    def convert(tensor: Tensor) -> Tensor:
        return fake.from_tensor(tensor)

    def apply(executor, x, t, c_concat, c_crossattn, control, transformer_options, **conds):
        calls.append(len(x))
        inputs, conds = tree_map_only(Tensor, convert, ((x, t, c_concat, c_crossattn, control), conds))
        with fake:
            output = executor(*inputs, transformer_options, **conds)
        return torch.zeros(output.shape, dtype=output.dtype, device=x.device)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "tidetable_benchmark", apply)
    return model, calls


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes that tensors made inside took together. What was there before, like weights, is left out,
    and so is what a kernel uses for itself."""

    def __init__(self, meta: bool = False):
        """`meta`: tensors on torch's meta device count as if they had memory."""
        super().__init__()
        self.meta = meta
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if all(returned.alias_info is None for returned in func._schema.returns):  # neither a view nor in place
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and (self.meta or tensor.device.type != "meta"):
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
