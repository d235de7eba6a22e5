"""Every kind of adapter: identity at the start, bypass equals the changed weight, slope equals finite difference."""

import copy

import pytest
import torch
from torch import nn

from tidetable.tests.training.test_adapters import INPUTS, network, randomize
from tidetable.training.adapter_kinds import AdapterNetwork
from tidetable.training.adapter_settings import AdapterConfig, match_targets


KINDS = ("lora", "dora", "dora_input", "loha", "lokr", "pissa")


def adapters(kind, layers, **settings):
    start = "pissa" if kind == "pissa" else "zero"
    kind = "lora" if kind == "pissa" else kind
    settings = {"rank": 2, "lora_alpha": 3.0, "lokr_factor": 2, **settings}
    return AdapterNetwork(layers, AdapterConfig(kind=kind, initialization=start, **settings), torch.device("cpu"))


def changed(layer, adapter):
    """W' by the definition of the kind, from the tensors of the file."""
    file, weight = adapter.tensors(), layer.weight.detach()
    scale = file["alpha"] / adapter.tensors().get("lora_down.weight", torch.empty(adapter.rank)).shape[0]
    if "hada_w1_a" in file:
        delta = (file["hada_w1_a"] @ file["hada_w1_b"]) * (file["hada_w2_a"] @ file["hada_w2_b"])
    elif "lokr_w1" in file:
        delta = torch.kron(file["lokr_w1"], file["lokr_w2_a"] @ file["lokr_w2_b"])
    else:
        delta = file["lora_up.weight"].flatten(1) @ file["lora_down.weight"].flatten(1)
    result = weight + (delta * scale).reshape(weight.shape)
    if "dora_scale" not in file:
        return result
    by_output = file["dora_scale"].shape[0] == weight.shape[0]
    norm = weight.flatten(1).norm(dim=1) if by_output else result.transpose(0, 1).flatten(1).norm(dim=1)
    return result * (file["dora_scale"] / (norm.reshape(file["dora_scale"].shape) + 1.1920929e-07))


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_the_identity_bit_for_bit(kind, shape):
    layer, size = INPUTS[shape]
    x = torch.randn(size)
    before = layer(x)
    with adapters(kind, {"layer": layer}).installed():
        if kind == "dora_input":  # W · 1 - W is zero, but the paths differ for the convolution's rounding of nothing
            assert torch.allclose(layer(x), before, atol=1e-7)
        else:
            assert torch.equal(layer(x), before)
    assert not layer._forward_hooks


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_bypass_equals_the_changed_weight_of_the_file(kind, shape):
    layer, size = INPUTS[shape]
    fresh = adapters(kind, {"layer": layer})
    before = fresh.adapters["layer"].delta().clone()
    randomize(fresh)
    x, original = torch.randn(size), layer.weight.data.clone()
    with fresh.installed():
        bypass = layer(x)
    try:
        layer.weight.data = changed(layer, fresh.adapters["layer"])
        merged = layer(x)
    finally:
        layer.weight.data = original
    assert torch.allclose(bypass, merged, atol=1e-5 * merged.abs().max().item())
    assert not torch.allclose(fresh.adapters["layer"].delta(), before, atol=1e-2)


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_finite_difference(kind, shape):
    layer, size = copy.deepcopy(INPUTS[shape][0]).requires_grad_(False), INPUTS[shape][1]
    net = adapters(kind, {"layer": layer})
    randomize(net)
    x = torch.randn(size)
    goal = torch.randn(layer(x).shape)

    def loss():
        return (layer(x) - goal).double().square().mean()

    with net.installed():
        loss().backward()
        for parameter in net.trainable():
            assert parameter.grad is not None
            direction = torch.randn(parameter.shape)
            slope, values = (parameter.grad * direction).sum().item(), []
            for step in (1e-3, -1e-3):
                parameter.data += step * direction
                values.append(loss().item())
                parameter.data -= step * direction
            assert abs(slope - (values[0] - values[1]) / 2e-3) < 0.01 * abs(slope) + 1e-2
    assert layer.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_stay_in_fp32_under_half_precision(kind):
    layer = nn.Linear(6, 8).bfloat16()
    net = adapters(kind, {"layer": layer})
    with net.installed():
        layer(torch.randn(2, 6).bfloat16()).float().square().sum().backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in net.trainable())


def test_rank_stabilized_scale():
    layer = nn.Linear(64, 64)
    net = adapters("lora", {"layer": layer}, rank=16, lora_alpha=8.0, rank_stabilized=True)
    assert net.adapters["layer"].scale == 2.0
    assert net.adapters["layer"].tensors()["alpha"].item() == 32.0  # a loader divides by the rank


def test_ranks_by_pattern_and_a_rank_larger_than_the_layer():
    net = adapters("lora", {"a.q": nn.Linear(9, 9), "b.q": nn.Linear(9, 9)}, rank=4, ranks="a.* = 2\n*.q = 64")
    assert {name: adapter.rank for name, adapter in net.adapters.items()} == {"a.q": 2, "b.q": 9}
    assert "b.q: rank 9 (rank 64 is more than this layer has)" in net.listing() and "a.q: rank 2\n" in net.listing()
    assert net.adapters["b.q"].scale == 3.0 / 64


@pytest.mark.parametrize("text", ["a", "a=", "=3", "a=0", "a=513", "a=-1", "a=2.5", "a=²", "a=1=2"])
def test_a_bad_rank_entry_is_refused(text):
    with pytest.raises(ValueError, match="ranks has .*, but an entry is 'pattern = rank'"):
        AdapterConfig(ranks=text)


def test_patterns_choose_and_leave_out():
    modules = dict(network().named_modules())
    assert set(match_targets(modules, AdapterConfig(targets="attention"))) == {"attn1.to_q", "attn1.to_out"}
    assert set(match_targets(modules, AdapterConfig(include="ff.*, conv"))) == {"ff.net", "conv"}
    assert set(match_targets(modules, AdapterConfig(include="*", exclude="conv\nattn1.*"))) == {"ff.net", "time"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include": "atn1.*"}, r"include 'atn1\.\*' matches no layer of this network: did you mean attn1\.to_"),
        ({"exclude": "to_quer"}, "exclude 'to_quer' matches no layer .* did you mean attn1.to_q"),
        ({"ranks": "convs = 3"}, "ranks 'convs' matches no layer .* did you mean conv"),
        ({"exclude": "*"}, r"no layer is left to train: exclude '\*' takes away all"),
    ],
)
def test_a_pattern_that_matches_nothing_names_near_layers(settings, message):
    with pytest.raises(ValueError, match=message):
        match_targets(dict(network().named_modules()), AdapterConfig(**settings))


@pytest.mark.parametrize("kind", KINDS)
def test_rank_dropout_has_the_right_mean_and_follows_from_the_step(kind):
    layer = nn.Linear(6, 8)
    net = adapters(kind, {"layer": layer}, rank_dropout=0.4)
    randomize(net)
    adapter, total = net.adapters["layer"], torch.zeros(8, 6)
    full = adapter.delta()
    with net.dropout(7):
        first = adapter.delta()
    with net.dropout(7):
        assert torch.equal(adapter.delta(), first)
    for step in range(2000):
        with net.dropout(step):
            total += adapter.delta().detach() / 2000
    assert torch.allclose(total, full, atol=0.1 * full.abs().max().item())
    assert torch.equal(adapter.delta(), full)


def test_module_dropout_leaves_whole_adapters_out_and_always_has_a_gradient():
    layer, x = nn.Linear(6, 8).requires_grad_(False), torch.randn(3, 6)
    net = adapters("lora", {"layer": layer}, module_dropout=0.5)
    randomize(net)
    plain, count = layer(x), 0
    with net.installed():
        for step in range(400):
            with net.dropout(step):
                out = layer(x)
            count += torch.equal(out, plain)
            out.sum().backward()
    assert 160 < count < 240


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pissa"])
def test_max_norm_is_a_ceiling_that_keeps_the_direction(kind):
    net = adapters(kind, {"layer": nn.Linear(6, 8)}, max_norm=0.5)
    randomize(net)
    before = net.adapters["layer"].delta()
    net.limit_norms()
    after = net.adapters["layer"].delta()
    assert before.norm() > 0.5 and abs(after.norm() - 0.5) < 1e-5
    assert torch.allclose(after / after.norm(), before / before.norm(), atol=1e-5)
    net.limit_norms()
    assert torch.allclose(net.adapters["layer"].delta(), after, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 0), ("lora_alpha", 0.0), ("rank_dropout", 1.0), ("module_dropout", -0.1), ("max_norm", float("nan")),
     ("lokr_factor", 0)],
)  # fmt: skip
def test_a_bad_setting_is_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}, but it must be "):
        AdapterConfig(**{field: value})


def test_pissa_is_refused_where_it_is_not_defined():
    with pytest.raises(ValueError, match="'pissa' exists for kind 'lora' only, not for 'loha'"):
        AdapterConfig(kind="loha", initialization="pissa")
    with pytest.raises(ValueError, match="with initialization 'pissa' it must be 0"):
        AdapterConfig(initialization="pissa", max_norm=1.0)
