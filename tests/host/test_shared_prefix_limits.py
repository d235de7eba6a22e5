"""The blocks before the perturbed one are not shared where that is not possible; and nothing of it is left behind."""

import uuid

import comfy.hooks
import comfy.model_management
import pytest
import torch
from comfy import context_windows
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras import nodes_easycache

from tidetable.runtime.guidance import perturbed_attention
from tidetable.runtime.reentry import CannotShare, Prefix, recording, resuming
from tidetable.runtime.shared_prefix import evaluate_shared, find_prefix
from tidetable.tests.host.comparing import fingerprint
from tidetable.tests.host.guidance_families import build_case, conds_for
from tidetable.tests.host.guidance_models import (
    FAMILIES,
    LATENT,
    assert_close,
    build,
    counted,
    evaluate,
    prompt,
    sample,
)


SHARED = [(4, [1, 0]), (2, [0])]  # cond and uncond, then the copy alone
BATCHED = [(6, [0, 1, 0])]


def node(model, shared_prefix="on", **options):
    return perturbed_attention(model, 3.0, 0.0, 1.0, shared_prefix=shared_prefix, **options)


# ── where it is not possible ────────────────────────────────────────────────────────────────────────────────────────


def windows(model):
    model.model_options["context_handler"] = context_windows.IndexListContextHandler(
        context_windows.get_matching_context_schedule("standard_static"),
        context_windows.get_matching_fuse_method("pyramid"),
        context_length=16,
        context_overlap=8,
        dim=3,
    )


def same_block(args, extra):
    return extra["original_block"](args)


OBSTACLES = {
    "context windows": windows,
    "model function wrapper": lambda m: m.set_model_unet_function_wrapper(
        lambda f, p: f(p["input"], p["timestep"], **p["c"])
    ),
    "block cache": lambda m: m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", lambda f, *a, **k: f(*a, **k)),
    "replaced block": lambda m: m.set_model_patch_replace(same_block, "dit", "double_block", 0),
    "patch that mixes rows": lambda m: m.set_model_attn1_output_patch(lambda out, extra: out),
    "patch of blocks": lambda m: m.set_model_patch(lambda args: args, "double_block"),
    "patch of input blocks": lambda m: m.set_model_input_block_patch(lambda h, options: h),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("name", FAMILIES)
def test_falls_back_to_the_batch(name, obstacle):
    model = build(name)
    OBSTACLES[obstacle](model)
    (on, calls), (off, calls_off) = counted(node(model)), counted(node(model, "off"))
    shape = (1, *LATENT[1:])
    assert torch.equal(evaluate(on, shape=shape), evaluate(off, shape=shape))
    assert calls == calls_off


@pytest.mark.parametrize("name", FAMILIES)
def test_modules_that_others_have_changed(name):
    model = build(name)
    network = model.model.diffusion_model
    block = network.input_blocks[1][0] if name == "unet" else network.joint_blocks[0]
    guided, calls = counted(node(model))
    handle = block.register_forward_hook(lambda *_: None)
    evaluate(guided)
    handle.remove()
    block.forward = block.forward
    evaluate(guided)
    assert vars(block).pop("forward") == block.forward
    evaluate(guided)
    assert calls == [*BATCHED, *BATCHED, *SHARED]


def test_first_block_has_nothing_before_it():
    model = build_case("flux")
    guided, calls = counted(node(model, blocks="double 0"))
    evaluate(guided, **conds_for("flux"))
    assert calls == BATCHED
    model = build_case("sd15")
    guided, calls = counted(node(model, blocks="input 3, middle"))
    evaluate(guided, **conds_for("sd15"))
    assert calls == BATCHED


def test_compiled_networks_are_left_alone():
    model, found = build(), []

    def slot(args):
        found.append(find_prefix(args, [("middle_block", 0)]))
        return [args["input"]] * 2

    model.set_model_sampler_calc_cond_batch_function(slot)
    evaluate(model)
    set_torch_compile_wrapper(model, backend="eager")
    evaluate(model)
    assert [prefix is None for prefix in found] == [False, True]


def test_conds_that_change_weights():
    guided, calls = counted(node(build()))
    evaluate(guided, positive=prompt(1, hooks=comfy.hooks.create_hook_lora({}, 1.0, 1.0)))
    assert calls == [(4, [0, 0]), (2, [1])]


def test_easycache_may_skip_the_network():
    results = []
    for sharing in ("on", "off"):
        guided, calls = counted(node(build(), sharing))
        guided = nodes_easycache.EasyCacheNode.execute(guided, 0.5, 0.15, 0.95, False).args[0]
        results.append((sample(guided, steps=12), calls))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


class Network(torch.nn.Module):
    """One like a transformer, whose last layer may see what an early block gave."""

    dtype = torch.float32

    def __init__(self, way_around):
        super().__init__()
        self.way_around = way_around
        self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x, timesteps, **_):
        h = early = self.blocks[0](x)
        for block in self.blocks[1:]:
            h = torch.tanh(block(h))
        return h + early if self.way_around else h


@pytest.mark.parametrize("way_around", [False, True])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_a_way_around_the_blocks_is_noticed(cfg, way_around):
    model, network, seen = build(), Network(way_around).requires_grad_(False), []
    model.add_object_patch("diffusion_model", network)
    prefix = Prefix(tuple(network.blocks[:2]), network.blocks[2])

    def apply(apply_model, params):
        return apply_model(params["input"], params["timestep"], **params["c"])

    def slot(args):
        copy = [{**entry, "uuid": uuid.uuid4()} for entry in args["conds"][0]]
        predictions, copies = evaluate_shared(args, [copy], prefix, lambda wrapper: wrapper, apply)
        seen.append(copies and copies[0] - predictions[0])
        return predictions

    plain = evaluate(model, cfg)
    model.set_model_sampler_calc_cond_batch_function(slot)
    assert torch.equal(evaluate(model, cfg), plain)
    (difference,) = seen
    assert difference is None if way_around else difference.abs().max() < 1e-6


def test_what_did_not_work_is_done_in_the_ordinary_way_and_not_tried_again():
    """A wrapper that nobody knows, and that goes through the network twice for every call."""
    model = build()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "twice", lambda f, *a, **k: 0.5 * (f(*a, **k) + f(*a, **k)))
    guided, calls = counted(node(model))
    assert_close(sample(guided, steps=3), sample(node(model, "off"), steps=3), 1e-4)
    assert calls[::2] == calls[1::2]
    assert calls[::2] == [*SHARED, *BATCHED, *BATCHED]


@pytest.mark.parametrize("forwards", [[], ["another"], ["this", "this"]])
def test_rows_that_were_not_recorded_once(forwards):
    """Packs with an evaluation of their own may not name the cond entries of a forward, or go through one in parts."""
    network, records, resumed = Network(way_around=False).requires_grad_(False), {}, []
    prefix = Prefix(tuple(network.blocks[:2]), network.blocks[2])

    def params(name):
        options = {"transformer_options": {"uuids": [name]} if name else {}}
        return {"input": torch.zeros(2, 3, 4, 4), "cond_or_uncond": [0], "c": options}

    def apply(apply_model, params):
        return network(params["input"], None)

    for name in ["", *forwards]:
        recording(apply, prefix, records)(None, params(name))
    for name in ["", "this"]:
        with pytest.raises(CannotShare):
            resumed.append(resuming(apply, prefix, records)(None, params(name)))
    recording(apply, prefix, records)(None, params("new"))
    assert torch.equal(resuming(apply, prefix, records)(None, params("new")), apply(None, params("new")))
    assert not resumed


# ── what it leaves behind ───────────────────────────────────────────────────────────────────────────────────────────


class Fault(Exception):
    pass


def cancel():
    comfy.model_management.interrupt_current_processing()
    comfy.model_management.throw_exception_if_processing_interrupted()


def fail():
    raise Fault


@pytest.mark.parametrize("evaluation", ["first", "second"])
@pytest.mark.parametrize(
    ("ending", "raised"), [(cancel, comfy.model_management.InterruptProcessingException), (fail, Fault)]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_left_behind(name, ending, raised, evaluation):
    model = build(name)
    guided = node(model)
    before, plain = (fingerprint(model), fingerprint(guided)), sample(model)
    good = sample(guided)
    assert (fingerprint(model), fingerprint(guided)) == before
    broken = guided.clone()

    def attention(function, q, *args, **kwargs):
        kinds = kwargs["transformer_options"]["cond_or_uncond"]
        if (kinds == [0]) is (evaluation == "second"):
            assert during_one_evaluation(model) == (evaluation == "second")
            ending()
        return function(q, *args, **kwargs)

    broken.model_options["transformer_options"]["optimized_attention_override"] = attention
    with pytest.raises(raised):
        sample(broken)
    assert (fingerprint(model), fingerprint(guided)) == before
    assert torch.equal(sample(model), plain)
    assert torch.equal(sample(guided), good)


def during_one_evaluation(model):
    """Whether modules of the network have been told to compute nothing."""
    return any("forward" in vars(module) for module in model.model.modules())
