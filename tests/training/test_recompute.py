"""Recomputed blocks against plain ones: additions in place, dropout masks, and what is refused."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tidetable.training.adapter_kinds import AdapterNetwork
from tidetable.training.adapter_settings import AdapterConfig
from tidetable.training.memory import MemoryConfig
from tidetable.training.recompute import recomputed


class Block(nn.Module):
    """With what the blocks of real networks do: it adds in place to what it was given and to what it saved."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, gate, options):
        options["place"] = options["place"] + 1
        hidden = torch.nn.functional.layer_norm(x, x.shape[-1:]) * options["scale"]
        x += gate * self.first(hidden).sin()
        y = x.exp() / (1 + x.square())
        y += self.second(x)
        y *= 0.5
        return y


class Network(nn.Module):
    counted = True

    def __init__(self, count=4):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.gates = nn.Linear(8, 8)
        self.double()

    def forward(self, x):
        options = {"place": 0, "scale": 1.0}
        gates = self.gates(x.mean(0))
        x = x * 1.0
        for i, block in enumerate(self.blocks):
            options["scale"] = 1.0 + i  # as networks write the current block's place into their options
            x = block(x, gate=gates, options=options)
        assert not self.counted or options["place"] == len(self.blocks), "recomputing must not count"
        return x.square().sum()


INPUT = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).double()


def numerical(network, parameter, step=1e-6):
    slopes = torch.zeros_like(parameter)
    for i in range(parameter.numel()):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[i] += sign * step
                values.append(network(INPUT))
                parameter.view(-1)[i] -= sign * step
        slopes.view(-1)[i] = (values[0] - values[1]) / (2 * step)
    return slopes


def test_gradients_through_additions_in_place_are_finite_differences():
    """Without a checkpoint this network cannot be differentiated, and torch's, on copies of the inputs, is wrong."""
    network = Network()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        network(INPUT).backward()
    parameters = [network.blocks[0].first.weight, network.blocks[3].second.bias, network.gates.weight]
    expected = [numerical(network, p) for p in parameters]

    def error():
        return max(((p.grad - e).norm() / e.norm()).item() for p, e in zip(parameters, expected, strict=True))

    network.zero_grad()
    with recomputed(list(network.blocks)):
        network(INPUT).backward()
    assert error() < 1e-7

    network.zero_grad()
    for block in network.blocks:
        on_a_copy = partial(lambda forward, x, **others: forward(x.clone(), **others), block.forward)
        block.forward = partial(checkpoint, on_a_copy, use_reentrant=False)
    network.counted = False
    network(INPUT).backward()
    assert error() > 0.01


def test_some_blocks_recomputed_equal_all_kept():
    gradients = []
    for every in (None, 1, 3):
        network = Network()
        blocks = list(network.blocks)[::every] if every else []
        with recomputed(blocks), torch.autograd.graph.allow_mutation_on_saved_tensors():
            network(INPUT).backward()
        gradients.append([p.grad for p in network.parameters()])
    for other in gradients[1:]:
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(gradients[0], other, strict=True))


def test_the_forwards_are_the_classes_again_even_after_an_error():
    network = Network()
    own = network.blocks[1].forward = network.blocks[1].forward  # somebody else's wrapper
    with pytest.raises(KeyboardInterrupt), recomputed(list(network.blocks)):
        raise KeyboardInterrupt
    assert [vars(block).get("forward") for block in network.blocks] == [None, own, None, None]


def test_an_inference_pass_is_not_recorded():
    network = Network()
    with recomputed(list(network.blocks)), torch.no_grad():
        value = network(INPUT)
    assert value == network(INPUT).detach() and not value.requires_grad


@pytest.mark.parametrize("settings", [{"rank_dropout": 0.5}, {"module_dropout": 0.5}])
def test_the_second_pass_sees_the_masks_of_the_first(settings):
    """The masks of a step are drawn once; a new draw while recomputing would change the gradient."""
    results = []
    for blocks in (False, True):
        network = Network()
        layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear) and "blocks" in name}
        config = AdapterConfig(rank=4, lora_alpha=4.0, seed=3, **settings)
        adapters = AdapterNetwork(layers, config, torch.device("cpu"))
        for i, p in enumerate(adapters.trainable()):
            p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        network.requires_grad_(False)
        with (
            adapters.installed(),
            recomputed(list(network.blocks) if blocks else []),
            adapters.dropout(step=7),
            torch.autograd.graph.allow_mutation_on_saved_tensors(),
        ):
            network(INPUT).backward()
        results.append([p.grad for p in adapters.trainable()])
    zero = sum(int((g == 0).sum()) for g in results[0] if g is not None)
    assert zero > 0, "nothing was dropped: nothing is tested"
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-9)


def test_a_block_that_draws_anew_is_an_error():
    class Routed(nn.Module):
        calls = 0

        def forward(self, x):
            Routed.calls += 1
            return x[: 4 if Routed.calls == 1 else 3].exp()

    block = Routed()
    with recomputed([block]), pytest.raises(RuntimeError, match="its second pass differs from the first"):
        block(INPUT.clone().requires_grad_()).sum().backward()


def test_an_input_that_changes_after_its_block_is_an_error():
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double()
    x = INPUT.clone()
    with recomputed([block]):
        value = block(x).sum()
        x += 1
    with pytest.raises(RuntimeError, match="an input was changed in place after the block"):
        value.backward()


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": "all"}, {"every": 0}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        MemoryConfig(**settings)
