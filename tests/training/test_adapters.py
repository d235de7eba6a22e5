"""Both forms of an adapter agree, a fresh one is the identity, and nothing is left behind."""

import pytest
import torch
from torch import nn

from tidetable.training.adapter_kinds import AdapterNetwork
from tidetable.training.adapter_settings import AdapterConfig
from tidetable.training.adapters import select_targets


def network():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "attn1": nn.ModuleDict({"to_q": nn.Linear(6, 8), "to_out": nn.Linear(8, 8)}),
            "ff": nn.ModuleDict({"net": nn.Linear(8, 8)}),
            "time": nn.Linear(4, 4),
            "conv": nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=1),
            "grouped": nn.Conv2d(4, 4, 3, groups=4),
            "norm": nn.LayerNorm(8),
        }
    )


def adapters(layers, **settings):
    return AdapterNetwork(layers, AdapterConfig(**{"rank": 2, "lora_alpha": 3.0, **settings}), torch.device("cpu"))


def randomize(lora):
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.trainable():
        parameter.data = torch.randn(parameter.shape, generator=generator)


INPUTS = {
    "linear": (nn.Linear(6, 8), (5, 7, 6)),
    "conv": (nn.Conv2d(3, 5, 3, 2, 1), (2, 3, 9, 9)),
    "dilated": (nn.Conv2d(3, 5, 3, 1, 2, 2), (2, 3, 9, 9)),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_a_fresh_adapter_is_the_identity_bit_for_bit(kind):
    layer, shape = INPUTS[kind]
    x = torch.randn(shape)
    before = layer(x)
    with adapters({"layer": layer}).installed():
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", INPUTS)
def test_bypass_equals_the_changed_weight(kind):
    layer, shape = INPUTS[kind]
    lora = adapters({"layer": layer})
    randomize(lora)
    x = torch.randn(shape)
    with lora.installed():
        bypass = layer(x)
    weight = layer.weight.data.clone()
    layer.weight.data += lora.adapters["layer"].delta()
    assert torch.allclose(bypass, layer(x), atol=1e-5)
    layer.weight.data = weight


def test_hooks_are_gone_after_an_error():
    layer = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="boom"), adapters({"layer": layer}).installed():
        raise RuntimeError("boom")
    assert not layer._forward_hooks


def test_targets_by_preset():
    modules = dict(network().named_modules())
    assert set(select_targets(modules, "attention")) == {"attn1.to_q", "attn1.to_out"}
    assert set(select_targets(modules, "attention_mlp")) == {"attn1.to_q", "attn1.to_out", "ff.net"}
    assert set(select_targets(modules, "linear")) == {"attn1.to_q", "attn1.to_out", "ff.net", "time"}
    assert set(select_targets(modules, "linear_conv")) == {"attn1.to_q", "attn1.to_out", "ff.net", "time", "conv"}


def test_a_preset_that_matches_nothing_says_what_there_is():
    with pytest.raises(ValueError, match=r"targets 'attention' matches no layer of this network \(it has Linear\)"):
        select_targets({"time": nn.Linear(2, 2)}, "attention")


def test_a_narrow_layer_keeps_the_strength_that_was_asked_for():
    lora = adapters({"layer": nn.Linear(3, 64)}, rank=8, lora_alpha=4.0)
    adapter = lora.adapters["layer"]
    assert adapter.down.shape == (3, 3) and adapter.scale == 4.0 / 8


def test_initialization_follows_from_the_seed_and_not_from_the_global_state():
    first = adapters({"layer": nn.Linear(6, 8)}, seed=5)
    torch.rand(17)
    again, other = adapters({"layer": nn.Linear(6, 8)}, seed=5), adapters({"layer": nn.Linear(6, 8)}, seed=6)
    assert torch.equal(first.adapters["layer"].down, again.adapters["layer"].down)
    assert not torch.equal(first.adapters["layer"].down, other.adapters["layer"].down)


def test_adapters_stay_in_fp32_under_half_precision_inputs():
    layer = nn.Linear(6, 8).bfloat16()
    lora = adapters({"layer": layer})
    with lora.installed():
        layer(torch.randn(2, 6).bfloat16()).float().sum().backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in lora.trainable())
