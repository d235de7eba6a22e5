"""Tidetable_PerturbedAttention on tiny real ComfyUI models: what it computes, what it costs, what it refuses."""

import math

import comfy.ops
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_model_advanced

from tidetable.tests.host.guidance_models import (
    FAMILIES,
    SPECS,
    assert_close,
    build,
    core_pag,
    counted,
    evaluate,
    expected_guidance,
    node,
    sample,
    slot_taken,
    value_taps,
)


# ── what it computes ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("name", SPECS)
def test_result_is_the_formula_with_identity_attention_computed_directly(name, cfg):
    model = build(name)
    expected = expected_guidance(model, evaluate(model, cfg))
    assert_close(evaluate(node(model), cfg), expected)
    assert_close(evaluate(slot_taken(node(model)), cfg), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_inside_the_batch_only_picture_tokens_of_the_perturbed_rows_become_their_values(name):
    model = build(name)
    source, read, after = value_taps(model.model.diffusion_model)[0]
    text = [] if name == "unet" else [model.model.diffusion_model.joint_blocks[1].context_block.attn]
    kept = {}
    handles = [
        source.register_forward_hook(lambda _, __, out: kept.update(v=read(out))),
        after.register_forward_pre_hook(lambda _, args: kept.update(out=args[0])),
        *[a.proj.register_forward_pre_hook(lambda _, args: kept.update(text=args[0])) for a in text],
    ]
    evaluate(node(model))
    for handle in handles:
        handle.remove()
    perturbed, uncond, cond = kept["out"].chunk(3)
    v_perturbed, v_uncond, v_cond = kept["v"].chunk(3)
    assert torch.equal(perturbed, v_perturbed) and torch.allclose(v_perturbed, v_cond, atol=1e-5)
    assert not torch.allclose(cond, v_cond, atol=0.01) and not torch.allclose(uncond, v_uncond, atol=0.01)
    for block_text in [kept["text"]] if text else []:  # text tokens go on attending to everything
        perturbed_text, _, cond_text = block_text.chunk(3)
        assert_close(perturbed_text, cond_text)


@pytest.mark.parametrize("name", ["unet", "unet-deep"])
def test_parity_with_core_on_unets(name):
    model = build(name)
    for cfg in (1.0, 4.0):
        assert_close(evaluate(node(model), cfg), evaluate(core_pag(model), cfg))
        assert torch.equal(evaluate(slot_taken(node(model)), cfg), evaluate(core_pag(model), cfg))
    assert_close(sample(node(model)), sample(core_pag(model)), 1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_cond_and_uncond_stay_those_of_the_model(name):
    model = build(name)

    def predictions(model):
        kept = []
        model = model.clone()
        model.set_model_sampler_pre_cfg_function(lambda args: kept.extend(args["conds_out"]) or args["conds_out"])
        evaluate(model)
        return kept

    plain, batched, separate = (predictions(m) for m in (model, node(model), slot_taken(node(model))))
    assert [len(p) for p in (plain, batched, separate)] == [2, 2, 2]
    for p, b, s in zip(plain, batched, separate, strict=True):
        assert_close(b, p)
        assert torch.equal(s, p)


# ── what it costs ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("cfg", "chunks"), [(4.0, [0, 1, 0]), (1.0, [0, 0])])
def test_one_forward_per_step_and_no_patch_sees_a_third_kind_of_row(name, cfg, chunks):
    model, calls = counted(node(build(name)))
    sample(model, cfg, steps=3)
    assert calls == [(2 * len(chunks), chunks)] * 3


@pytest.mark.parametrize("name", FAMILIES)
def test_scale_zero_is_no_node(name):
    model = build(name)
    off, calls = counted(node(model, scale=0.0))
    assert torch.equal(sample(off), sample(model))
    assert calls == [(4, [1, 0])] * 4
    assert {k: v for k, v in off.model_options.items() if k.startswith("sampler")} == {}


@pytest.mark.parametrize("name", FAMILIES)
def test_outside_the_interval_nothing_is_added_and_nothing_paid(name):
    model = build(name)
    guided = node(model, start_percent=0.3, end_percent=0.6)
    for percent, inside in [(0.1, False), (0.4, True), (0.8, False)]:
        watched, calls = counted(guided)
        result = evaluate(watched, percent=percent)
        assert calls == [(6, [0, 1, 0])] if inside else [(4, [1, 0])]
        assert torch.equal(result, evaluate(model, percent=percent)) is not inside
        watched, calls = counted(slot_taken(guided))
        evaluate(watched, percent=percent)
        assert len(calls) == 1 + inside


def test_interval_follows_a_shift_set_after_the_node():
    """At shift 3, half of the way is sigma 0.75; at shift 12 sigma 0.75 comes long after 0.6 of the way."""
    guided, calls = counted(node(build("mmdit"), end_percent=0.6))
    shifted = nodes_model_advanced.ModelSamplingSD3().patch(guided, 12.0)[0]
    for percent, chunks in [(0.5, 3), (0.7, 2)]:
        evaluate(shifted, percent=percent)
        assert len(calls.pop()[1]) == chunks


def test_without_memory_for_a_batch_comfyui_splits_it_and_the_result_stays():
    model = build()
    expected = evaluate(node(model))
    model.model.memory_usage_factor = 1e12
    guided, calls = counted(node(model))
    assert_close(evaluate(guided), expected)
    assert sorted(calls) == [(2, [0]), (2, [0]), (2, [1])]


# ── what it refuses ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": math.nan}, "scale.*nan"),
        ({"scale": math.inf}, "scale.*inf"),
        ({"scale": -1.0}, "scale.*-1"),
        ({"scale": 1e6}, "scale.*1000000"),
        ({"start_percent": math.nan}, "start_percent.*nan"),
        ({"start_percent": 0.5, "end_percent": 0.5}, "start_percent 0.5 is not below end_percent 0.5"),
        ({"end_percent": 50.0}, "end_percent.*50"),
        ({"scale": 0.0, "start_percent": 2.0}, "start_percent.*2"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        node(build(), **values)


@pytest.mark.parametrize(
    "network", [{"transformer_depth_middle": -1}, {"transformer_depth_middle": -2}, {"disable_middle_self_attn": True}]
)
def test_unet_without_self_attention_in_the_middle_takes_the_nearest_block_that_has_it(network):
    """Two levels with one ResBlock each: the first block after the middle has self-attention."""
    model = build(**network)
    assert torch.equal(sample(node(model)), sample(node(model, blocks="output 0")))
    with pytest.raises(ValueError, match="no self-attention in its middle.*This model has: input"):
        node(model, blocks="middle")


def test_unet_without_any_self_attention():
    model = build(transformer_depth=[0] * 8, transformer_depth_output=[0] * 12, transformer_depth_middle=-1)
    with pytest.raises(ValueError, match="has no blocks that can be perturbed.*U-Net without self-attention"):
        node(model)


def test_other_networks_are_refused_with_their_blocks():
    from comfy.ldm.pixart.pixartms import PixArtMS

    network = PixArtMS(depth=2, hidden_size=32, num_heads=2, model_max_length=8, operations=comfy.ops.manual_cast)
    model = build()
    model.add_object_patch("diffusion_model", network)
    with pytest.raises(ValueError, match=r"PixArtMS has no blocks.*Supported: U-Nets, SD3,.*blocks: 2 x PixArtMSBlock"):
        node(model)
    assert node(model, scale=0.0).model is model.model  # off is off for every model


def test_networks_whose_sequences_are_not_known_are_refused_though_they_derive_from_a_known_one():
    from comfy.ldm.wan.model import WanModel

    class SCAILWanModel(WanModel):  # ComfyUI 0.33 has one of that name
        pass

    sizes = {"dim": 48, "ffn_dim": 32, "freq_dim": 16, "text_dim": 16, "num_heads": 2, "num_layers": 3}
    model = build()
    model.add_object_patch("diffusion_model", SCAILWanModel(**sizes, operations=comfy.ops.manual_cast))
    with pytest.raises(ValueError, match="SCAILWanModel has no blocks.*blocks: 3 x WanAttentionBlock"):
        node(model)


@pytest.mark.parametrize("taken", [False, True])
def test_unet_hook_taken_away_by_another_pack(taken):
    model = build()

    def strip(executor, *args, **kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, dict) and "patches_replace" in value:
                value.pop("patches_replace")
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "strip", strip)
    with pytest.raises(RuntimeError, match="U-Net blocks middle, .*0 of 1.*Another node"):
        sample(slot_taken(node(model)) if taken else node(model))


def test_mmdit_block_skipped_by_another_pack():
    model = build("mmdit")
    model.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 1)
    with pytest.raises(RuntimeError, match="SD3 blocks joint 1, .*0 of 1.*Another node"):
        sample(node(model))
