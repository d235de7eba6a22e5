"""Perturbed attention on diffusion transformers together with other conditioning, nodes and packs; interrupts."""

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.ops
import comfy.samplers
import pytest
import torch
from comfy import context_windows
from comfy.ldm.modules.attention import attention_basic
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras import nodes_sag, nodes_slg

from tidetable.runtime.blocks import find_target
from tidetable.tests.host.comparing import fingerprint
from tidetable.tests.host.guidance_cases import CASES, VIDEO
from tidetable.tests.host.guidance_families import build_case, conds_for, expected_for, is_there, prompt_for
from tidetable.tests.host.guidance_models import SCALE, assert_close, counted, evaluate, node, normal, slot_taken
from tidetable.tests.host.model_zoo import ZOO


# Double blocks, single blocks, one list, padding, only self-attention, fewer heads for keys.
SOME = ("sdxl", "flux_double", "flux", "qwen_image", "z_image", "wan", "lumina2")
some = pytest.mark.parametrize("name", SOME)
methods = pytest.mark.parametrize("method", ["pag", "seg", "shuffle", "skip"])


# ── conditioning ────────────────────────────────────────────────────────────────────────────────────────────────────


@some
@pytest.mark.parametrize("case", ["area", "mask", "two entries", "later in time"])
def test_conditioning_of_every_kind(name, case):
    if (name, case) == ("z_image", "area"):
        pytest.skip("padding hides from the hand-made computation where the smaller picture ends; lumina2 has none")
    model, conds = build_case(name), conds_for(name)
    height, width = CASES[name].latent[-2:]
    frames = CASES[name].latent[2:-2]
    mask = torch.ones(1, height, width)
    mask[..., : width // 2] = 0.0
    area = (*frames, height, width // 2, *(0 for _ in frames), 0, width // 2)
    conds["positive"] += {
        "area": prompt_for(name, 3, area=area, strength=0.7),
        "mask": prompt_for(name, 3, mask=mask, mask_strength=1.0),
        "two entries": prompt_for(name, 3),
        "later in time": prompt_for(name, 3, start_percent=0.9, end_percent=1.0),
    }[case]
    expected = expected_for(name, model, evaluate(model, **conds), **conds)
    assert_close(evaluate(node(model), **conds), expected, 1e-4)
    assert_close(evaluate(slot_taken(node(model)), **conds), expected, 1e-4)


@pytest.mark.parametrize("name", ["sdxl", "flux", "flux_double", "qwen_image", "wan"])
def test_prompts_of_unequal_length(name):
    model = build_case(name)
    conds = {**conds_for(name), "negative": prompt_for(name, 2, tokens=9)}
    assert_close(evaluate(node(model), **conds), expected_for(name, model, evaluate(model, **conds), **conds), 1e-4)


@some
def test_without_a_negative_prompt(name):
    model, conds = build_case(name), {**conds_for(name), "negative": []}
    for cfg in (1.0, 4.0):
        expected = expected_for(name, model, evaluate(model, cfg, **conds), **conds)
        assert_close(evaluate(node(model), cfg, **conds), expected, 1e-4)


REFERENCE = normal(1, 16, 8, 8, seed=9)
REFERENCES = {
    # name: (network, conditioning, the picture's tokens in what the tapped layer gets: 24 of them, and 16 of reference)
    "flux_double": ({}, {"reference_latents": [REFERENCE]}, slice(0, 24)),
    "flux": ({}, {"reference_latents": [REFERENCE]}, slice(6, 30)),
    "qwen_image": ({}, {"reference_latents": [REFERENCE[:, :, None]]}, slice(0, 24)),
    "omnigen2": ({}, {"reference_latents": [REFERENCE]}, slice(6 + 16, None)),
    "hidream": ({}, {"concat_latent_image": normal(1, 16, 8, 4, seed=9)}, slice(0, 32)),  # beside, not behind
    "krea2": ({"default_ref_method": "index"}, {"reference_latents": [REFERENCE[:, :, None]]}, slice(6, 30)),
    "wan": ({"in_dim_ref_conv": 16}, {"reference_latents": [normal(1, 16, 1, 8, 12, seed=9)]}, slice(24, None)),
}


@pytest.mark.parametrize("name", [name for name in REFERENCES if is_there(CASES[name])])
def test_reference_pictures_are_not_perturbed(name):
    network, options, tokens = REFERENCES[name]
    model, conds = build_case(name, **network), conds_for(name, **options)
    plain = evaluate(model, **conds)
    assert not torch.allclose(plain, evaluate(model, **conds_for(name)), atol=1e-3)  # the reference is used
    assert_close(evaluate(node(model), **conds), expected_for(name, model, plain, tokens, **conds), 1e-4)


def test_reference_picture_of_hunyuan_video():
    """ComfyUI's network takes one only in forwards of one row, so the perturbed row comes in one of its own."""
    name = "hunyuan_video_double"
    options = {"ref_latent": normal(1, 16, 1, 8, 8, seed=9)}
    model, conds = build_case(name), {**conds_for(name, **options), "shape": (1, *VIDEO[1:])}
    expected = expected_for(name, model, evaluate(model, 1.0, **conds), slice(16, None), **conds)
    assert_close(evaluate(node(model), 1.0, **conds), expected, 1e-4)


# ── other nodes and packs ───────────────────────────────────────────────────────────────────────────────────────────


@some
@methods
def test_attention_override_of_another_pack_is_called(name, method):
    """An override that computes attention another way, as attention backends do, and notes that it did."""
    model, conds, calls = build_case(name), conds_for(name), []
    expected = evaluate(node(model, method=method), **conds)

    def backend(_, *args, **kwargs):
        calls.append(args[0].shape)
        return attention_basic.__wrapped__(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = backend
    evaluate(model, 1.0, **conds)
    num_attentions = len(calls)
    calls.clear()
    assert_close(evaluate(node(model, method=method), **conds), expected, 1e-3)
    assert len(calls) == num_attentions


@pytest.mark.parametrize("name", ["flux", "qwen_image", "sd3", "wan"])
def test_cores_skip_layer_guidance_adds_up_on_either_side(name):
    model, conds = build_case(name), conds_for(name)

    def slg(model):
        return nodes_slg.SkipLayerGuidanceDiT.execute(model, 2.0, 0.0, 1.0, "0", "1").args[0]

    plain, skipped, ours = (evaluate(m, **conds) for m in (model, slg(model), node(model)))
    assert not torch.allclose(plain, skipped, atol=1e-3)
    for both in (slg(node(model)), node(slg(model))):
        assert_close(evaluate(both, **conds), skipped + ours - plain, 1e-4)


def test_cores_self_attention_guidance_adds_up():
    model, conds = build_case("sd15"), {**conds_for("sd15"), "shape": (1, 4, 16, 16)}

    def sag(model):
        return nodes_sag.SelfAttentionGuidance.execute(model, 0.5, 2.0).args[0]

    plain, core, ours = (evaluate(m, **conds) for m in (model, sag(model), node(model)))
    assert_close(evaluate(sag(node(model)), **conds), core + ours - plain, 1e-4)


def test_a_real_controlnet_runs_once_for_all_rows():
    model, calls = build_case("sd15"), []
    network = {k: v for k, v in ZOO["sd15"][1].items() if k != "out_channels" and k != "transformer_depth_output"}
    sizes = {**network, "hint_channels": 3, "num_heads": 8}
    control_model = comfy.cldm.cldm.ControlNet(**sizes, operations=comfy.ops.disable_weight_init)
    for i, p in enumerate(control_model.parameters()):
        p.data.copy_(normal(*p.shape, seed=i) / (p[0].numel() ** 0.5 if p.ndim > 1 else 10.0))
    control_model.requires_grad_(False)
    control_model.register_forward_hook(lambda _, __, out: calls.append(len(out["output"][0])))
    control = comfy.controlnet.ControlNet(control_model, load_device=torch.device("cpu"))
    control.set_cond_hint(normal(1, 3, 64, 96).sigmoid(), 1.0)
    conds = conds_for("sd15", control=control)
    plain = evaluate(model, **conds)
    assert not torch.allclose(plain, evaluate(model, **conds_for("sd15")), atol=1e-2)
    expected = expected_for("sd15", model, plain, **conds)
    calls.clear()
    assert_close(evaluate(node(model), **conds), expected, 1e-4)
    assert calls == [6]


@some
def test_lora_of_the_perturbed_block(name):
    model, conds = build_case(name), conds_for(name)
    tap = CASES[name].taps(model.model.diffusion_model)[0]
    key = next(k for k, p in model.model.diffusion_model.named_parameters() if p is tap.source.weight)
    low = normal(4, tap.source.weight.shape[1], seed=5)
    delta = normal(tap.source.weight.shape[0], 4, seed=6) @ low / low.shape[1]
    patched = model.clone()
    assert patched.add_patches({f"diffusion_model.{key}": (delta,)}, 1.0)
    expected = expected_for(name, patched, evaluate(patched, **conds), **conds)
    guided = evaluate(node(patched), **conds)
    assert_close(guided, expected, 1e-4)
    assert not torch.allclose(guided, evaluate(node(model), **conds), atol=1e-3)


def test_weight_hooks_on_the_positive_prompt_hold_for_its_perturbed_copy():
    model = build_case("flux")
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    weight = model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight
    hooks = comfy.hooks.create_hook_model_as_lora({key: weight + 0.2 * normal(*weight.shape)}, None, 1.0, 1.0)
    conds = {**conds_for("flux"), "positive": prompt_for("flux", 1, hooks=hooks)}
    hooked = model.clone()
    hooked.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    expected = expected_for("flux", hooked, evaluate(hooked, **conds), **conds)
    guided, calls = counted(node(hooked))
    assert_close(evaluate(guided, **conds), expected, 1e-4)
    assert sorted(chunks for _, chunks in calls) == [[0, 0], [1]]  # other weights, another forward


def test_context_windows_over_the_frames_of_a_video():
    model = build_case("wan")
    model.model_options["context_handler"] = context_windows.IndexListContextHandler(
        context_windows.get_matching_context_schedule("standard_static"),
        context_windows.get_matching_fuse_method("pyramid"),
        context_length=3,
        context_overlap=1,
        dim=2,
    )
    conds = {**conds_for("wan"), "shape": (1, *VIDEO[1:2], 7, *VIDEO[3:])}
    expected = expected_for("wan", model, evaluate(model, **conds), **conds)
    guided, calls = counted(node(model))
    assert_close(evaluate(guided, **conds), expected, 1e-4)
    assert len(calls) > 1
    for method in ("seg", "shuffle", "skip"):
        assert torch.isfinite(evaluate(node(model, method=method), **conds)).all()


@some
def test_a_tiler_shows_the_network_other_sizes(name):
    """A function wrapper that calls the model for each half of the width."""
    model, conds = build_case(name), conds_for(name)

    def halves(apply_model, params):
        parts = params["input"].chunk(2, -1)
        return torch.cat([apply_model(part, params["timestep"], **params["c"]) for part in parts], -1)

    model.set_model_unet_function_wrapper(halves)
    tokens = {"z_image": slice(32, 44), "lumina2": slice(6, 18)}.get(name)
    expected = expected_for(name, model, evaluate(model, **conds), tokens, **conds)
    assert_close(evaluate(node(model), **conds), expected, 1e-4)
    two = evaluate(node(node(model, 1.0), 1.0, method="seg"), **conds)
    plain, seg = evaluate(model, **conds), evaluate(node(model, 1.0, method="seg"), **conds)
    assert_close(two, seg + (expected - plain) / SCALE, 1e-4)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_compiled_models(name):
    """Compiled by dynamo, run eagerly; the node before and after a plain run, and no new graphs from step to step."""
    model, conds, graphs = build_case(name), conds_for(name), []
    torch._dynamo.reset()
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    plain = evaluate(model, **conds)
    for method in ("pag", "skip"):
        guided = node(compiled, method=method)
        expected = evaluate(node(model, method=method), **conds)
        assert_close(evaluate(guided, **conds), expected, 1e-4)
        evaluate(guided, percent=0.5, **conds)
        seen = len(graphs)
        assert seen > 0
        for percent in (0.55, 0.6, 0.65):
            evaluate(guided, percent=percent, **conds)
        assert len(graphs) == seen
        assert_close(evaluate(compiled, **conds), plain, 1e-4)
    torch._dynamo.reset()


# ── what it leaves behind ───────────────────────────────────────────────────────────────────────────────────────────


@some
@methods
@pytest.mark.parametrize("ending", ["finished", "interrupted"])
def test_nothing_is_left_on_the_network_when_it_is_interrupted_in_the_middle_of_a_forward(name, method, ending):
    model, conds = build_case(name), conds_for(name)
    plain = evaluate(model, **conds)
    network = model.model.diffusion_model
    (list_name, index), *_ = find_target(network).places
    block = getattr(network, list_name)
    block = block[1] if list_name == "middle_block" else block[index]
    guided, entered = node(model, method=method), []

    def interrupt(*_):
        entered.append(len(block._forward_hooks))
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    before = fingerprint(model), fingerprint(guided)
    if ending == "finished":
        evaluate(guided, **conds)
    else:
        last_leaf = [m for m in block.modules() if not list(m.children()) and list(m.parameters())][-1]
        handle = last_leaf.register_forward_pre_hook(interrupt)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            evaluate(guided, **conds)
        handle.remove()
        assert entered == [0 if name == "sdxl" and method != "skip" else 1]
    assert (fingerprint(model), fingerprint(guided)) == before
    assert torch.equal(evaluate(model, **conds), plain)
