"""Gradient checkpointing by blocks (Chen et al. 2016, arXiv:1604.06174): a block keeps its inputs, and what its
backward needs is computed once more from them when backward reaches it.

In place additions, which the blocks of many networks have, are why torch's own checkpoint is not used: there a tensor
that was saved while recomputing is overwritten by the addition that follows, and the gradient is silently wrong. Here
a block works on copies of its inputs, the first pass notes which saved tensors are overwritten later in the block, and
the second pass saves copies of exactly these. What cannot be right is an error: an input that changed in between, or a
second pass that saves something else than the first.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .activations import Away, Offload


@contextmanager
def recomputed(blocks: Sequence[nn.Module], offload: Offload | None = None) -> Iterator[None]:
    """Every call of a block under grad mode is recomputed in backward; its class's forward is back at the end.

    With `offload` the inputs, all that is kept of a block, are sent away.
    """
    with replaced_forwards(blocks, lambda block: _recomputing(block.forward, type(block).__name__, offload)):
        yield


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], make: Callable[[Any], Callable]) -> Iterator[None]:
    """Modules with the forward that `make` makes of each; what they had is back at the end, whatever happens."""
    replaced = list(dict.fromkeys(modules))
    before = [vars(module).get("forward") for module in replaced]
    try:
        for module in replaced:
            module.forward = make(module)
        yield
    finally:
        for module, forward in zip(replaced, before, strict=True):
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def _recomputing(forward: Callable, name: str, offload: Offload | None) -> Callable:
    def call(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return _Call(forward, name, args, kwargs, offload).first()

    return call


class _Call:
    """One call of a block: what it was given, and after `_recompute` what its backward needs."""

    def __init__(self, forward: Callable, name: str, args: tuple, kwargs: dict, offload: Offload | None):
        self.forward, self.name, self.offload = forward, name, offload
        # Networks write the place of the current block into the options that they hand to all blocks.
        self.given = _noted(args), _noted(kwargs)
        if offload is not None:
            self.given = tuple(_mapped(value, offload.keep) for value in self.given)
        self.args, self.kwargs = args, kwargs
        self.versions = [tensor._version for tensor in _tensors(self.given)]
        self.overwritten: set[int] = set()
        self.shapes: list[tuple] = []
        self.saved: dict[int, Tensor] | None = None

    def first(self) -> Any:
        """The block's result; nothing that it saves for backward is kept."""
        aliases: list[tuple[Tensor, int]] = []

        def pack(tensor: Tensor) -> int:
            aliases.append((tensor.detach(), tensor._version))
            self.shapes.append((tensor.shape, tensor.dtype))
            return len(aliases) - 1

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            result = self.forward(*_copies(self.args), **_copies(self.kwargs))
        self.overwritten = {i for i, (alias, version) in enumerate(aliases) if alias._version != version}
        aliases.clear()  # autograd keeps the hook, and with it the list
        self.args, self.kwargs = (), {}
        return result

    def _unpack(self, index: int) -> Tensor:
        if self.saved is None:
            self.saved = self._recompute()
        if index not in self.saved:
            raise RuntimeError(f"{self.name}: backward went through a recomputed block twice")
        return self.saved.pop(index)

    def _recompute(self) -> dict[int, Tensor]:
        if self.versions != [tensor._version for tensor in _tensors(self.given)]:
            raise RuntimeError(f"{self.name}: an input was changed in place after the block: turn checkpointing off")
        saved: dict[int, Tensor] = {}
        kept: list[tuple[Tensor, int]] = []

        def pack(tensor: Tensor) -> None:
            index, alias = len(saved), tensor.detach()
            saved[index] = alias.clone() if index in self.overwritten else alias
            kept.append((saved[index], saved[index]._version))

        def refuse(_: None) -> Tensor:
            raise RuntimeError(f"{self.name}: the recomputed graph has no backward of its own")

        args, kwargs = (_noted(value) for value in self.given)
        if self.offload is not None:
            args, kwargs = (_mapped(value, self.offload.back) for value in (args, kwargs))
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, refuse):
            self.forward(*_copies(args), **_copies(kwargs))
        same = [(tensor.shape, tensor.dtype) for tensor in saved.values()] == self.shapes
        if not same or any(tensor._version != version for tensor, version in kept):
            raise RuntimeError(f"{self.name}: its second pass differs from the first: turn checkpointing off")
        return saved


def _noted(arguments: Any) -> Any:
    """Arguments, positional or named, with their dictionaries as they are now."""
    if isinstance(arguments, dict):
        return {name: dict(value) if type(value) is dict else value for name, value in arguments.items()}
    return tuple(dict(value) if type(value) is dict else value for value in arguments)


def _copies(value: Any) -> Any:
    """Arguments with tensors of their own, so that the block may add in place; dictionaries as they are."""
    return _mapped(value, Tensor.clone)


def _mapped(value: Any, function: Callable, nested: bool = False) -> Any:
    """The tensors of arguments, wherever they are, replaced."""
    if isinstance(value, Tensor | Away):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, function, True) for item in value)
    if type(value) is dict and not nested:
        return {name: _mapped(item, function, True) for name, item in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (tuple, list, dict):
        for item in value.values() if type(value) is dict else value:
            yield from _tensors(item)
