"""Tidetable_PerturbedAttention together with other conditioning, nodes and packs, and what it leaves behind."""

import comfy.controlnet
import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy import context_windows
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras import nodes_custom_sampler, nodes_easycache, nodes_perpneg

from tidetable.tests.host.guidance_models import (
    FAMILIES,
    LATENT,
    NEGATIVE,
    POSITIVE,
    SCALE,
    assert_close,
    build,
    core_pag,
    counted,
    evaluate,
    expected_guidance,
    node,
    normal,
    prompt,
    rescale_cfg,
    sample,
    slot_taken,
)


# ── with others ─────────────────────────────────────────────────────────────────────────────────────────────────────


def half_mask():
    mask = torch.zeros(1, *LATENT[2:])
    mask[..., : LATENT[3] // 2] = 1.0
    return mask


CONDS = {
    "two entries": {"positive": POSITIVE + prompt(3)},
    "area": {"positive": POSITIVE + prompt(3, area=(8, 8, 4, 8), strength=0.7)},
    "mask": {"positive": prompt(1, mask=half_mask(), mask_strength=1.0) + prompt(3)},
    "longer prompt": {"positive": prompt(1, tokens=9), "negative": prompt(2, tokens=4)},
    "later in time": {"positive": prompt(1, start_percent=0.9, end_percent=1.0) + prompt(3)},
}


@pytest.mark.parametrize("case", CONDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_conditioning_of_every_kind(name, case):
    model = build(name)
    expected = expected_guidance(model, evaluate(model, **CONDS[case]), **CONDS[case])
    assert_close(evaluate(node(model), **CONDS[case]), expected)
    assert_close(evaluate(slot_taken(node(model)), **CONDS[case]), expected)


class Residuals(comfy.controlnet.ControlBase):
    """A control whose residuals depend on the row, as a ControlNet's do."""

    def __init__(self, key, shape):
        super().__init__()
        self.key, self.pattern, self.calls = key, normal(*shape), []

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.calls.append(batched_number)
        rows = x_noisy[:, 0, 0, 0].view(-1, *[1] * (self.pattern.ndim - 1))
        return {"input": [], "middle": [], "output": [], self.key: [rows * self.pattern]}

    def copy(self):
        return self


@pytest.mark.parametrize(
    ("name", "key", "shape"), [("unet", "middle", (1, 64, 1, 1)), ("mmdit", "output", (1, 1, 128))]
)
def test_control_objects_are_shared_so_that_they_run_once(name, key, shape):
    model, control = build(name), Residuals(key, shape)
    conds = {"positive": prompt(1, control=control), "negative": prompt(2, control=control)}
    expected = expected_guidance(model, evaluate(model, **conds), **conds)
    assert not torch.allclose(expected, evaluate(node(model)), atol=1e-3)
    control.calls.clear()
    assert_close(evaluate(node(model), **conds), expected)
    assert control.calls == [3]


@pytest.mark.parametrize("name", FAMILIES)
def test_composes_with_rescale_cfg_on_either_side(name):
    model = build(name)
    expected = expected_guidance(model, evaluate(rescale_cfg(model)))
    assert_close(evaluate(rescale_cfg(node(model))), expected)
    assert_close(evaluate(node(rescale_cfg(model))), expected)


def test_composes_with_core_pag_on_either_side():
    model = build()
    expected = evaluate(core_pag(model, 2 * SCALE))
    assert_close(evaluate(core_pag(node(model))), expected)
    assert_close(evaluate(node(core_pag(model))), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_in_a_row_add_up_at_the_price_of_one(name):
    model = build(name)
    twice, calls = counted(node(node(model, 1.0), 2.0))
    assert_close(evaluate(twice), evaluate(node(model, 3.0)))
    assert calls == [(6, [0, 1, 0])]


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_attention_override_of_another_pack_is_called(name, taken):
    """An override that halves all attention: the result is the formula for the model that attends like this."""
    model = build(name)
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **k: 0.5 * f(*a, **k)
    expected = expected_guidance(model, evaluate(model))
    assert_close(evaluate(slot_taken(node(model)) if taken else node(model)), expected)


@pytest.mark.parametrize("key", [("middle", 0), ("middle", 0, 0)])
def test_attn1_patches_of_another_pack_are_called(key):
    model = build()
    model.set_model_attn1_patch(lambda q, k, v, extra: (q, k * 0.5, v * 2.0))
    model.set_model_attn1_output_patch(lambda out, extra: out * 0.9)
    model.set_model_patch_replace(
        lambda q, k, v, extra: optimized_attention(q, k, v, extra["n_heads"]) * 1.5, "attn1", *key
    )
    for kind, *elsewhere in [("attn2", "middle", 0), *(("attn1", "output", i) for i in range(9))]:
        model.set_model_patch_replace(lambda q, k, v, extra: q * 0.5, kind, *elsewhere)
    expected = expected_guidance(model, evaluate(model))
    assert_close(evaluate(node(model)), expected)


def test_patches_of_attention_that_mix_rows_see_cond_and_uncond_alone():
    """ComfyUI's NAG (newer versions) steers the first cond chunk it finds away from the uncond chunk."""
    model, seen = build(), []

    def from_uncond(out, extra):
        kinds = extra["cond_or_uncond"]
        seen.append(tuple(kinds))
        if 0 in kinds and 1 in kinds:
            chunks = list(out.chunk(len(kinds)))
            chunks[kinds.index(0)] = chunks[kinds.index(0)].lerp(chunks[kinds.index(1)], -1.0)
            out = torch.cat(chunks)
        return out

    model.set_model_attn1_output_patch(from_uncond)
    kept = []
    for patched in (model.clone(), node(model)):
        patched.set_model_sampler_pre_cfg_function(lambda args: kept.append(args["conds_out"]) or args["conds_out"])
        evaluate(patched)
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    assert set(seen) == {(1, 0), (0,)}


def test_block_replacement_of_another_pack_is_called():
    model = build("mmdit")

    def louder(args, extra):
        out = extra["original_block"](args)
        return {"img": out["img"] * 1.5, "txt": out["txt"]}

    for index in range(3):
        model.set_model_patch_replace(louder, "dit", "double_block", index)
    assert_close(evaluate(node(model)), expected_guidance(model, evaluate(model)))


@pytest.mark.parametrize("name", FAMILIES)
def test_model_function_wrapper_that_rearranges_rows(name):
    """A tiler may order rows as it likes, so the perturbed prediction is evaluated alone, where all rows are alike."""
    model, kinds = build(name), []

    def backwards(apply_model, params):
        kinds.extend(params["cond_or_uncond"])
        c = {k: v.flip(0) if isinstance(v, torch.Tensor) else v for k, v in params["c"].items()}
        return apply_model(params["input"].flip(0), params["timestep"].flip(0), **c).flip(0)

    model.set_model_unet_function_wrapper(backwards)
    expected = expected_guidance(model, evaluate(model))
    kinds.clear()
    assert_close(evaluate(node(model)), expected)
    assert kinds == [1, 0, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_guiders_that_do_not_ask_the_slot(name):
    model = build(name)

    def perp_neg(model):
        guider = nodes_perpneg.Guider_PerpNeg(model)
        guider.set_conds(POSITIVE, NEGATIVE, prompt(3))
        guider.set_cfg(4.0, 1.0)
        return evaluate(model, guider=guider)

    def dual_cfg(model):
        guider = nodes_custom_sampler.Guider_DualCFG(model)
        guider.set_conds(POSITIVE, prompt(3), NEGATIVE)
        guider.set_cfg(3.0, 2.0, nested=True)
        return evaluate(model, guider=guider)

    assert_close(perp_neg(node(model)), expected_guidance(model, perp_neg(model)))
    outer = 2.0  # the nested guider multiplies what it guides by its second scale
    assert_close(dual_cfg(node(model)), expected_guidance(model, dual_cfg(model), outer * SCALE))


class ProbingGuider(comfy.samplers.CFGGuider):
    """Asks the slot about another latent and throws the answer away, then evaluates without it."""

    def predict_noise(self, x, timestep, model_options, seed=None):
        conds = [self.conds["positive"], self.conds["negative"]]
        about = {"conds": conds, "sigma": timestep, "model": self.inner_model, "model_options": model_options}
        model_options["sampler_calc_cond_batch_function"]({**about, "input": 0.5 * x})
        cond, uncond = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        return comfy.samplers.cfg_function(
            self.inner_model, cond, uncond, self.cfg, x, timestep, model_options, cond=conds[0], uncond=conds[1]
        )


def test_a_prediction_for_another_latent_is_not_used():
    model = build()
    guider = ProbingGuider(node(model))
    guider.set_conds(POSITIVE, NEGATIVE)
    guider.set_cfg(4.0)
    assert_close(evaluate(guider.model_patcher, guider=guider), expected_guidance(model, evaluate(model)))


def test_guider_without_a_cond_prediction_is_told():
    guider = nodes_custom_sampler.Guider_DualCFG(node(build()))
    guider.set_conds(POSITIVE, prompt(3), NEGATIVE)
    guider.set_cfg(1.0, 1.0, nested=False)
    with pytest.raises(RuntimeError, match="leaves out the conditional prediction.*cfg"):
        evaluate(guider.model_patcher, guider=guider)


@pytest.mark.parametrize("name", FAMILIES)
def test_context_windows(name):
    """Windows over the picture's width, as video models have them over time."""
    model = build(name)
    model.model_options["context_handler"] = context_windows.IndexListContextHandler(
        context_windows.get_matching_context_schedule("standard_static"),
        context_windows.get_matching_fuse_method("pyramid"),
        context_length=16,
        context_overlap=8,
        dim=3,
    )
    shape = (1, *LATENT[1:])
    expected = expected_guidance(model, evaluate(model, shape=shape), shape=shape)
    guided, calls = counted(node(model))
    assert_close(evaluate(guided, shape=shape), expected)
    assert len(calls) > 1
    assert all(chunks == [0, 1, 0] for _, chunks in calls)


def test_easycache_may_skip_the_network():
    model = nodes_easycache.EasyCacheNode.execute(node(build()), 0.5, 0.15, 0.95, False).args[0]
    forwards = []
    model.set_model_input_block_patch(lambda h, options: forwards.append(options["block"]) or h)
    assert torch.isfinite(sample(model, steps=12)).all()
    assert 0 < forwards.count(("input", 0)) < 12


# ── what it leaves behind ───────────────────────────────────────────────────────────────────────────────────────────


def footprint(model):
    """Everything about a MODEL that a node could have changed."""
    hooks = [
        (name, list(m._forward_hooks), list(m._forward_pre_hooks), sorted(vars(m)))
        for name, m in model.model.named_modules()
    ]
    state = {key: value.clone() for key, value in model.model.state_dict().items()}
    patcher = repr((model.model_options, model.object_patches, model.wrappers, model.callbacks, model.patches))
    return hooks, state, patcher


def assert_same_footprint(a, b):
    assert a[0] == b[0] and a[2] == b[2] and a[1].keys() == b[1].keys()
    assert all(torch.equal(a[1][key], b[1][key]) for key in a[1])


class Fault(Exception):
    pass


def faulty(*_, **__):
    raise Fault


def cancel(*_):
    comfy.model_management.interrupt_current_processing()
    comfy.model_management.throw_exception_if_processing_interrupted()


@pytest.mark.parametrize("ending", ["finished", "cancelled", "failed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_left_behind(name, ending):
    model = build(name)
    plain = sample(model)
    before = footprint(model)
    guided = node(model)
    guided_before = footprint(guided)
    if ending == "finished":
        sample(guided)
    elif ending == "cancelled":
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(guided, callback=cancel)
    else:
        broken = guided.clone()
        broken.model_options["transformer_options"]["optimized_attention_override"] = faulty
        with pytest.raises(Fault):
            sample(broken)
    assert_same_footprint(footprint(model), before)
    assert_same_footprint(footprint(guided), guided_before)
    assert torch.equal(sample(model), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_runs_do_not_know_of_each_other_and_clones_are_as_good(name):
    guided = node(build(name))
    with torch.inference_mode():  # as in ComfyUI's executor
        first = sample(guided)
        sample(guided, cfg=1.0, steps=2)
        assert torch.equal(sample(guided), first)
        assert torch.equal(sample(guided.clone().clone()), first)
    assert torch.equal(sample(guided), first)
