"""LoRAs on rows of a fused layer make one LoRA that is the same change of its weight."""

import torch
from torch import nn

from tidetable.training.adapter_formats import Factors, adapter_from, fused


def part(rows, rank, scale, down=None):
    down = torch.randn(rank, 5) if down is None else down
    return Factors("lora", rank, scale, {"up": torch.randn(rows, rank), "down": down})


def delta(factors):
    return factors.tensors["up"] @ factors.tensors["down"] * factors.scale


def test_rows_with_scales_and_ranks_of_their_own():
    torch.manual_seed(0)
    parts = [(0, part(4, 2, 0.5)), (4, part(4, 3, 2.0)), (9, part(3, 1, 1.0))]
    whole = fused(parts, 12)
    expected = torch.zeros(12, 5)
    for start, one in parts:
        expected[start : start + len(one.tensors["up"])] = delta(one)
    assert whole.rank == 6 and torch.allclose(delta(whole), expected, atol=1e-6)
    adapter = adapter_from(nn.Linear(5, 12), whole)
    assert torch.allclose(adapter.delta(), expected, atol=1e-6)
    assert torch.equal(adapter_from(nn.Linear(5, 12), whole).tensors()["lora_up.weight"], whole.tensors["up"])


def test_rows_with_the_same_down_share_it():
    torch.manual_seed(0)
    down = torch.randn(2, 5)
    whole = fused([(0, part(4, 2, 0.5, down)), (4, part(4, 2, 0.25, down.clone()))], 8)
    assert whole.rank == 2 and torch.equal(whole.tensors["down"], down)
