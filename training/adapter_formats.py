"""Adapters in the forms that other trainers write, as ones that can be trained on here: the same change of the weight.

LyCORIS's Tucker form (Yeh et al. 2023, arXiv:2309.14859) of a convolution is multiplied out into the plain one. LoRAs
of some rows of a fused layer (to_q, to_k and to_v of one qkv) become one LoRA of all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_kinds import Adapter, DoRA, LoHa, LoKr, LowRank


@dataclass(frozen=True, slots=True)
class Factors:
    """What a file says of one layer, or of some rows of it."""

    kind: str
    """lora, dora, dora_input, loha or lokr."""
    rank: int
    scale: float
    """What the product of the factors is multiplied by."""
    tensors: dict[str, Tensor]
    """By the names that the adapter's parameters have here."""


class WholeLoKr(Adapter):
    """kron(w1, w2) with both factors whole, which has no rank to drop from and no scale."""

    last = "lokr_w2"

    def __init__(self, layer: Any, w1: Tensor, w2: Tensor):
        super().__init__(layer, 1, 1.0)
        self.lokr_w1, self.lokr_w2 = nn.Parameter(w1), nn.Parameter(w2)

    def delta(self) -> Tensor:
        return torch.kron(self.lokr_w1, self.lokr_w2.flatten(1)).reshape(self.layer_shape)


def lora_factors(up: Tensor, down: Tensor, alpha: float | None, mid: Tensor | None, dora: Tensor | None) -> Factors:
    """LoRA, LoCon and DoRA; `mid` [r, r, kh, kw] is the core of a Tucker form, whose down is 1×1."""
    rank = len(down)
    if mid is not None:
        down = torch.einsum("rskl,si->rikl", mid, down.flatten(1))
    scale = 1.0 if alpha is None else alpha / rank
    if dora is None:
        return Factors("lora", rank, scale, {"down": down, "up": up})
    kind = "dora" if dora.shape[0] == up.shape[0] else "dora_input"  # the loader's own rule
    return Factors(kind, rank, scale, {"down": down, "up": up, "magnitude": dora})


def loha_factors(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    alpha: float | None,
    cores: tuple[Tensor, Tensor] | None,
) -> Factors:
    """LoHa; `cores` are those of a Tucker form."""
    rank = len(first[1])
    if cores is not None:
        first, second = without_core(*first, cores[0]), without_core(*second, cores[1])
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    scale = 1.0 if alpha is None else alpha / rank
    return Factors("loha", rank, scale, dict(zip(names, (*first, *second), strict=True)))


def lokr_factors(
    first: Tensor | tuple[Tensor, Tensor],
    second: Tensor | tuple[Tensor, Tensor],
    alpha: float | None,
    core: Tensor | None,
) -> Factors:
    """LoKr with either factor whole or a product of two; the first is small and becomes whole.

    As ComfyUI reads it, the scale is alpha by the second factor's rank, by the first's where the second is whole, and 1
    where both are.
    """
    rank = len(second[1]) if isinstance(second, tuple) else len(first[1]) if isinstance(first, tuple) else None
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    first = first[0] @ first[1] if isinstance(first, tuple) else first
    if isinstance(second, Tensor):
        return Factors("lokr", 1, 1.0, {"lokr_w1": first * scale, "lokr_w2": second})
    rows, columns = second if core is None else without_core(*second, core)
    return Factors("lokr", len(columns), scale, {"lokr_w1": first, "lokr_w2_a": rows, "lokr_w2_b": columns})


def without_core(rows: Tensor, columns: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """[out, r] and [r, in · kh · kw] of a Tucker form: rows [r, out], columns [r, in], core [r, r, kh, kw]."""
    return rows.T.contiguous(), torch.einsum("ijkl,jr->irkl", core, columns).flatten(1)


def fused(parts: Sequence[tuple[int, Factors]], outputs: int) -> Factors:
    """One LoRA of a layer with `outputs` rows, of LoRAs on rows of it, each with its first row.

    down stacks the downs, and up has each part's rows in its own columns: zero elsewhere at the start, and trained from
    there. Parts with the same down (as our own export cuts them) share its columns again.
    """
    scale = parts[0][1].scale
    downs: list[Tensor] = []
    places: list[tuple[int, int, Tensor]] = []
    for start, part in parts:
        down, up = part.tensors["down"], part.tensors["up"] * (part.scale / scale)
        place = next((place for place, known in enumerate(downs) if torch.equal(known, down)), len(downs))
        downs += [down] if place == len(downs) else []
        places.append((place, start, up))
    firsts = [sum(len(down) for down in downs[:place]) for place in range(len(downs))]
    rank = sum(len(down) for down in downs)
    up = torch.zeros(outputs, rank, *places[0][2].shape[2:])
    for place, start, rows in places:
        up[start : start + len(rows), firsts[place] : firsts[place] + rows.shape[1]] += rows
    return Factors("lora", rank, scale, {"down": torch.cat(downs), "up": up})


def adapter_from(layer: Any, factors: Factors) -> Adapter:
    """The adapter with these factors. ValueError names the factor that does not fit the layer."""
    tensors, generator = factors.tensors, torch.Generator()
    if factors.kind == "lokr":
        return _lokr(layer, factors, generator)
    if factors.kind == "loha":
        adapter: Adapter = LoHa(layer, factors.rank, factors.scale, generator)
    elif factors.kind == "lora":
        adapter = LowRank(layer, factors.rank, factors.scale, generator)
    else:
        adapter = DoRA(layer, factors.rank, factors.scale, generator, factors.kind == "dora_input")
    for name, tensor in tensors.items():
        parameter = getattr(adapter, name)
        if tensor.numel() != parameter.numel():
            raise ValueError(f"{name} is {tuple(tensor.shape)}, the layer needs {tuple(parameter.shape)}")
        parameter.data.copy_(tensor.reshape(parameter.shape))
    return adapter


def _lokr(layer: Any, factors: Factors, generator: torch.Generator) -> Adapter:
    tensors = {name: tensor.clone() for name, tensor in factors.tensors.items()}
    if "lokr_w2" in tensors:
        adapter: Adapter = WholeLoKr(layer, tensors["lokr_w1"], tensors["lokr_w2"])
    else:
        adapter = LoKr(layer, 1, factors.scale, generator, 1)
        for name, tensor in tensors.items():
            setattr(adapter, name, nn.Parameter(tensor))
        adapter.rank = factors.rank
    try:
        adapter.delta()
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"{shapes} do not make a weight of {tuple(adapter.layer_shape)}") from error
    return adapter
