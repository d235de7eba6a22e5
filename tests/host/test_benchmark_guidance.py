"""benchmarks/guidance.py: what it counts, against a computation by hand and against real tensors."""

import dataclasses

import comfy.ldm.modules.attention as comfy_attention
import comfy.ops
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from tidetable.benchmarks import guidance, published
from tidetable.benchmarks.counting import LiveBytes, count, flop_counter
from tidetable.benchmarks.published import Published, Shape
from tidetable.tests.host.guidance_models import counted
from tidetable.tests.host.model_zoo import ZOO


UNET = {**ZOO["sdxl"][1], "in_channels": 4, "num_head_channels": 32, "adm_in_channels": 2816}
SMALL = Published("SDXL", UNET, (4,), 32, 1280, Shape(16, 7), Shape(8, 7), "normal")
BACKENDS = ("attention_basic", "attention_split", "attention_sub_quad", "attention_pytorch")


@pytest.fixture
def small():
    return published.build(SMALL, SMALL.full, torch.device("cpu"))


def evaluate(model, published=SMALL):
    return guidance.evaluation(published, SMALL.full, model, [])()


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_of_one_attention_layer_whatever_computes_it(backend):
    rows, queries, keys, width, context, heads = 2, 40, 7, 64, 32, 4
    layer = comfy_attention.CrossAttention(
        width, context, heads, width // heads, operations=comfy.ops.disable_weight_init
    )
    options = {"optimized_attention_override": lambda _, *a, **k: getattr(comfy_attention, backend)(*a, **k)}
    x, text = torch.randn(rows, queries, width), torch.randn(rows, keys, context)
    to_q = to_out = rows * queries * width * width
    to_k = to_v = rows * keys * context * width
    scores = values = rows * queries * keys * width  # heads · width of a head = width
    expected = 2 * (to_q + to_k + to_v + scores + values + to_out)
    with torch.no_grad(), flop_counter() as counter:
        layer(x, text, transformer_options=options)
    assert counter.get_total_flops() == expected


def test_shapes_alone_give_the_counts_of_real_tensors(small):
    for arm, model in guidance.arms(SMALL, SMALL.full, small).items():
        model, calls = counted(model)
        with torch.no_grad(), LiveBytes() as live, flop_counter() as counter:
            evaluate(model)
        cost = count(model, evaluate)
        assert (cost.flops, 2 * cost.calls) == (counter.get_total_flops(), len(calls)), arm
        assert cost.peak_bytes == pytest.approx(live.peak, rel=0.05), arm


def test_costs_of_the_arms(small):
    costs = guidance.counted(SMALL, small)
    flops = {arm: cost["flops_per_step"] / costs["cfg"]["flops_per_step"] for arm, cost in costs.items()}
    assert flops["tidetable-plain"] == 1.5  # three rows for two
    assert 1.45 < flops["core-pag"] < 1.5  # leaves out the attention whose result it replaces
    # What comes before the middle block's transformer is computed for two rows, all else for three.
    network = small.model.diffusion_model
    before = [*(layer for block in network.input_blocks for layer in block), network.middle_block[0]]
    assert flops["tidetable"] == pytest.approx(
        1.5 - 0.5 * share_of(before, small), abs=0.005
    )  # and what embeds the time
    calls = {arm: cost["model_calls_per_step"] for arm, cost in costs.items()}
    assert calls == {"cfg": 1, "core-pag": 2, "tidetable-plain": 1, "tidetable": 2}


def share_of(modules, model):
    """The share of `modules` in the FLOPs of an evaluation, measured with hooks on real tensors."""
    inside, started = [], []
    with torch.no_grad(), flop_counter() as counter:
        for module in modules:
            module.register_forward_pre_hook(lambda *_: started.append(counter.get_total_flops()))
            module.register_forward_hook(lambda *_: inside.append(counter.get_total_flops() - started[-1]))
        evaluate(model)
    return sum(inside) / counter.get_total_flops()


def test_a_whole_run_is_the_sum_of_its_steps(small):
    step = count(small, evaluate).flops
    assert count(small, lambda model: guidance.whole_run(SMALL, model, 3)).flops == 3 * step
    guided = guidance.tidetable(small, end_percent=0.4, shared_prefix="off")  # the first of three steps
    assert count(guided, lambda model: guidance.whole_run(SMALL, model, 3)).flops == 3.5 * step


def test_live_bytes_are_those_of_tensors_that_are_alive_together():
    layer, x = torch.nn.Linear(100, 50), torch.randn(10, 100)
    with torch.no_grad(), LiveBytes() as live:
        for _ in range(3):
            y = layer(x)  # 2000 bytes, gone when the next one is there
            y.add_(1.0).view(50, 10)
            y.to("meta")
        assert (live.live, live.peak) == (2000, 4000)
        del y
        assert (live.live, live.peak) == (0, 4000)


def test_counting_leaves_the_model_as_it_was_also_after_an_error(small):
    network = small.model.diffusion_model
    weights, options = (
        {name: weight.clone() for name, weight in network.state_dict().items()},
        repr(small.model_options),
    )
    count(small, evaluate)
    with pytest.raises(RuntimeError):
        count(small, lambda clone: evaluate(clone, dataclasses.replace(SMALL, text=31)))
    assert all(torch.equal(weight, weights[name]) for name, weight in network.state_dict().items())
    assert repr(small.model_options) == options and not small.wrappers.get(WrappersMP.APPLY_MODEL)
    assert torch.zeros(1).add(1.0).item() == 1.0  # no mode is left behind


def test_published_sizes_in_little_memory():
    """Parameters as the models' papers and cards have them, in millions."""
    for name, millions in {"sd15": 860, "sdxl": 2567, "flux": 11_902, "qwen": 20_430}.items():
        model = published.PUBLISHED[name]
        parameters = list(published.build(model, model.full, torch.device("cpu")).model.diffusion_model.parameters())
        assert sum(parameter.numel() for parameter in parameters) == pytest.approx(millions * 1e6, rel=1e-3)
        storages = {parameter.untyped_storage().data_ptr(): parameter.nbytes for parameter in parameters}
        assert sum(storages.values()) < 1.1e9
