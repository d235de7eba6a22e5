"""Leaving a network at its first perturbed block and entering it there again, for rows that were the same until there.

Two `model_function_wrapper`s do it. `recording` keeps what the rows of cond are at that block. `resuming` leads a later
forward there: the modules before the block compute nothing, and the block is handed what was kept. All that they put on
the network is there for the length of one forward.

What the modules before the block answer in the later forward is not a number anywhere. Should a network let it through
to the prediction, by a way that is not foreseen here, the prediction says so.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import torch
from torch import Tensor, nn


class CannotShare(Exception):
    """Something in the first evaluation is not as the second one needs it."""


@dataclass(frozen=True)
class Prefix:
    """The modules before the first perturbed one, in order, and that one: a block or, in a U-Net, a transformer."""

    before: tuple[nn.Module, ...]
    first: nn.Module


Wrapper = Callable[[Callable, dict], Tensor]
"""A `model_function_wrapper`: (apply_model, its parameters) -> predictions of all rows."""


@dataclass
class Record:
    """What one cond entry left in the first evaluation. Tensors are its rows alone, None those without rows."""

    entered: list[Tensor | None] = field(default_factory=list)  # the first perturbed module's arguments
    skips: dict[tuple, Tensor] = field(default_factory=dict)  # block -> what a U-Net keeps for its output blocks
    answers: dict[nn.Module, Any] = field(default_factory=dict)  # what modules before it returned: shapes alone
    control: dict[str, list[Tensor | None]] | None = None


Records = dict[UUID, Record | None]
"""Cond entry -> its record; None: there are two, or the network did not go through the blocks once, in one piece."""


# ── the first evaluation ────────────────────────────────────────────────────────────────────────────────────────────


def recording(inner: Wrapper, prefix: Prefix, records: Records) -> Wrapper:
    """`inner`, with a record made of every entry of cond list 0 that a forward contains."""

    def wrapper(apply_model: Callable, params: dict) -> Tensor:
        chunks = _cond_chunks(params)
        if not chunks:
            return inner(apply_model, params)
        recorder = _Recorder(chunks, len(params["input"]))
        with recorder.at_work(prefix, params) as watched:
            output = inner(apply_model, watched)
        for uuid, record in recorder.results().items():
            records[uuid] = None if uuid in records else record
        return output

    return wrapper


def _cond_chunks(params: dict) -> dict[UUID, slice]:
    """The rows of each entry of cond list 0 in one forward. Other lists can have entries with the same uuid."""
    kinds, uuids = params["cond_or_uncond"], _uuids(params)
    size = len(params["input"]) // len(kinds)
    entries = enumerate(zip(kinds, uuids, strict=True))
    return {uuid: slice(i * size, (i + 1) * size) for i, (kind, uuid) in entries if kind == 0 and uuid is not None}


def _uuids(params: dict) -> list[UUID | None]:
    """The entries in one forward, chunk by chunk, as ComfyUI says it; None where another pack's loop does not."""
    uuids, kinds = params["c"]["transformer_options"].get("uuids", ()), params["cond_or_uncond"]
    return list(uuids) if len(uuids) == len(kinds) else [None] * len(kinds)


class _Recorder:
    """Looks on at one forward."""

    def __init__(self, chunks: dict[UUID, slice], num_rows: int):
        self.chunks, self.num_rows = chunks, num_rows
        self.records = {uuid: Record() for uuid in chunks}
        self.entries = 0
        self.usable = True

    def results(self) -> dict[UUID, Record | None]:
        return {uuid: record if self.usable and self.entries == 1 else None for uuid, record in self.records.items()}

    @contextmanager
    def at_work(self, prefix: Prefix, params: dict) -> Iterator[dict]:
        """The forward's parameters with what is needed to look on; on the modules it is for the length of the block."""
        self._keep_control(params["c"].get("control"))
        options = params["c"]["transformer_options"]
        patches = {**options.get("patches", {}), "input_block_patch": [self._keep_skip]}
        handles = [prefix.first.register_forward_pre_hook(self._keep_entry, with_kwargs=True)]
        handles += [module.register_forward_hook(self._keep_answer) for module in prefix.before]
        try:
            yield {**params, "c": {**params["c"], "transformer_options": {**options, "patches": patches}}}
        finally:
            for handle in handles:
                handle.remove()

    def _rows(self, tensor: Tensor, rows: slice) -> Tensor | None:
        return tensor[rows] if tensor.ndim and len(tensor) == self.num_rows else None

    def _keep_control(self, control: dict | None) -> None:
        # Before the forward: a U-Net takes the residuals out of the lists.
        if control is None:
            return
        for uuid, rows in self.chunks.items():
            self.records[uuid].control = {
                name: [None if residual is None else self._residual(residual, rows) for residual in residuals]
                for name, residuals in control.items()
            }

    def _residual(self, residual: Tensor, rows: slice) -> Tensor | None:
        kept = residual if len(residual) == 1 else self._rows(residual, rows)
        self.usable &= kept is not None
        return kept

    def _keep_entry(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # Copies: networks add to their tensors in place.
        self.entries += 1
        for uuid, rows in self.chunks.items():
            kept = [self._rows(tensor, rows) for tensor in _tensors([*args, *kwargs.values()])]
            self.records[uuid].entered = [None if tensor is None else tensor.clone() for tensor in kept]

    def _keep_skip(self, h: Tensor, options: dict) -> Tensor:
        self.usable &= len(h) == self.num_rows
        for uuid, rows in self.chunks.items():
            self.records[uuid].skips[options["block"]] = h[rows].clone()
        return h

    def _keep_answer(self, module: nn.Module, args: tuple, output: Any) -> None:
        tensors = list(_tensors(output))
        self.usable &= _is_nest_of_tensors(output) and all(
            t.ndim > 0 and len(t) == self.num_rows and t.is_floating_point() for t in tensors
        )
        for uuid, rows in self.chunks.items() if self.usable else ():
            self.records[uuid].answers[module] = _map(lambda t, rows=rows: t[rows].to("meta"), output)


# ── the second evaluation ───────────────────────────────────────────────────────────────────────────────────────────


def resuming(inner: Wrapper, prefix: Prefix, records: Records) -> Wrapper:
    """`inner`, entering the network at `prefix.first` with what `records` say of the forward's entries."""

    def wrapper(apply_model: Callable, params: dict) -> Tensor:
        resumer = _Resumer(_found(records, _uuids(params)))
        with resumer.at_work(prefix, params) as resumed:
            output = inner(apply_model, resumed)
        if resumer.entries != 1:
            raise CannotShare
        return output

    return wrapper


def _found(records: Records, uuids: Iterable[UUID | None]) -> list[Record]:
    found = [None if uuid is None else records.get(uuid) for uuid in uuids]
    if any(record is None for record in found):
        raise CannotShare
    return [record for record in found if record is not None]


class _Resumer:
    """Leads one forward, whose chunks of rows are those of `records`."""

    def __init__(self, records: list[Record]):
        self.records = records
        self.entries = 0

    @contextmanager
    def at_work(self, prefix: Prefix, params: dict) -> Iterator[dict]:
        """As for the recorder."""
        options = params["c"]["transformer_options"]
        patches = {**options.get("patches", {}), "input_block_patch": [self._skip]}
        handle = prefix.first.register_forward_pre_hook(self._enter, with_kwargs=True)
        device = params["input"].device
        try:
            for module in prefix.before:
                vars(module)["forward"] = lambda *_, module=module, **__: self._answer(module, device)
            yield {**params, "c": {**params["c"], "transformer_options": {**options, "patches": patches}}}
        finally:
            handle.remove()
            for module in prefix.before:
                vars(module).pop("forward", None)

    def _answer(self, module: nn.Module, device: torch.device) -> Any:
        template = self.records[0].answers.get(module)
        if template is None:
            raise CannotShare

        def nothing(meta: Tensor) -> Tensor:
            shape = (len(meta) * len(self.records), *meta.shape[1:])
            return torch.full(shape, math.nan, dtype=meta.dtype, device=device)

        return _map(nothing, template)

    def _skip(self, h: Tensor, options: dict) -> Tensor:
        return _joined([record.skips.get(options["block"]) for record in self.records], h)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self.entries += 1
        count = len(list(_tensors([*args, *kwargs.values()])))
        if self.entries > 1 or any(len(record.entered) != count for record in self.records):
            raise CannotShare
        kept = zip(*(record.entered for record in self.records), strict=True)
        values = _map(lambda tensor: _joined(next(kept), tensor), [*args, *kwargs.values()])
        return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


def _joined(parts: Iterable[Tensor | None], instead_of: Tensor) -> Tensor:
    """A copy of the kept rows of all chunks; what the network has itself where none were kept."""
    kept = [part for part in parts if part is not None]
    if not kept:
        return instead_of
    joined = torch.cat(kept)
    if joined.shape != instead_of.shape or joined.dtype != instead_of.dtype:
        raise CannotShare
    return joined


class _KeptControl:
    """Stands for a ControlNet: gives the residuals that it gave for the same rows in the first evaluation."""

    def __init__(self, records: Records):
        self.records = records

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: dict, batched_number: int, transformer_options: dict):
        controls = [record.control for record in _found(self.records, transformer_options["uuids"])]
        if len({_signature(control) for control in controls}) != 1:
            raise CannotShare
        given = [control for control in controls if control is not None]
        size = len(x_noisy) // len(controls)
        return {
            name: [_joined_residuals(parts, size) for parts in zip(*(control[name] for control in given), strict=True)]
            for name in (given[0] if given else ())
        } or None


def _signature(control: dict[str, list[Tensor | None]] | None) -> tuple | None:
    if control is None:
        return None
    return tuple((name, *(residual is None for residual in residuals)) for name, residuals in control.items())


def _joined_residuals(parts: tuple[Tensor | None, ...], size: int) -> Tensor | None:
    """The residuals of all chunks of `size` rows; a part may be one row for all of its chunk's."""
    expanded = [part.expand(size, *part.shape[1:]) for part in parts if part is not None]
    return torch.cat(expanded) if expanded else None


def with_kept_controls(copies: list[list[dict]], records: Records) -> list[list[dict]]:
    """Cond lists with stand-ins for their ControlNets: one for each, because entries that share one share a batch."""
    stand_ins: dict[int, _KeptControl] = {}

    def with_stand_in(entry: dict) -> dict:
        control = entry.get("control")
        return (
            entry if control is None else {**entry, "control": stand_ins.setdefault(id(control), _KeptControl(records))}
        )

    return [[with_stand_in(entry) for entry in copy] for copy in copies]


# ── nested tuples and lists of tensors ──────────────────────────────────────────────────────────────────────────────


def _map(function: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_map(function, part) for part in value) if type(value) in (tuple, list) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (tuple, list):
        for part in value:
            yield from _tensors(part)


def _is_nest_of_tensors(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_nest_of_tensors, value))
    return value is None or isinstance(value, Tensor)
