"""Tidetable_Guidance together with other nodes, guiders and conditioning, and what it leaves behind."""

import pytest
import torch
from comfy_extras import nodes_custom_sampler, nodes_model_advanced, nodes_perpneg, nodes_sag, nodes_video_model

from tidetable.tests.host.comparing import fingerprint
from tidetable.tests.host.guidance_models import (
    FAMILIES,
    NEGATIVE,
    POSITIVE,
    assert_close,
    build,
    core_pag,
    counted,
    evaluate,
    expected_guidance,
    node,
    prompt,
    rescale_cfg,
    sample,
    slot_taken,
)
from tidetable.tests.host.test_guided_cfg import ALL, CFG, by_hand, predictions, rules


INTERVAL = {"cfg_start_percent": 0.3, "cfg_end_percent": 0.6}


# ── with perturbed attention, on either side ────────────────────────────────────────────────────────────────────────


ORDERS = {"before": lambda m, **on: node(rules(m, **on)), "after": lambda m, **on: rules(node(m), **on)}
each_order = pytest.mark.parametrize("order", ORDERS)


@each_order
@pytest.mark.parametrize("name", FAMILIES)
def test_perturbed_attention_is_added_to_the_guided_prediction_in_one_batched_call(name, order):
    model = build(name)
    expected = expected_guidance(model, by_hand(model, *predictions(model), **ALL)[0])
    both, calls = counted(ORDERS[order](model, **ALL))
    assert_close(evaluate(both, CFG), expected)
    assert calls == [(6, [0, 1, 0])]


@each_order
@pytest.mark.parametrize("name", FAMILIES)
def test_outside_the_interval_perturbed_attention_costs_two_rows(name, order):
    model = build(name)
    both, calls = counted(ORDERS[order](model, **INTERVAL))
    for percent, kinds in [(0.1, [0, 0]), (0.4, [0, 1, 0]), (0.8, [0, 0])]:
        expected = expected_guidance(model, evaluate(model, CFG if len(kinds) == 3 else 1.0, percent), percent=percent)
        assert_close(evaluate(both, CFG, percent), expected)
        assert calls.pop()[1] == kinds and not calls


@pytest.mark.parametrize("name", FAMILIES)
def test_the_order_in_the_graph_does_not_matter_over_a_run(name):
    model = build(name)
    one, other = (sample(make(model, **ALL, **INTERVAL)) for make in ORDERS.values())
    assert torch.equal(one, other)


def test_core_perturbed_attention_comes_after_as_well():
    model = build()
    expected = expected_guidance(model, by_hand(model, *predictions(model), **ALL)[0])
    assert_close(evaluate(rules(core_pag(model), **ALL), CFG), expected)
    assert_close(evaluate(core_pag(rules(model, **ALL)), CFG), expected)


# ── the order with nodes that say what the noise is ─────────────────────────────────────────────────────────────────


def shifted(model):
    return nodes_model_advanced.ModelSamplingSD3().patch(model, 6.0)[0]


def as_v(model):
    return nodes_model_advanced.ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]


@pytest.mark.parametrize(("name", "change"), [("mmdit", shifted), ("unet", as_v)])
def test_the_process_is_read_while_sampling(name, change):
    model = build(name)
    one, other = (sample(m) for m in (rules(change(model), **ALL, **INTERVAL), change(rules(model, **ALL, **INTERVAL))))
    assert torch.equal(one, other)
    assert (one - sample(rules(model, **ALL, **INTERVAL))).abs().max() > 0.01 * one.abs().max()


# ── who has the slot ────────────────────────────────────────────────────────────────────────────────────────────────


TAKERS = {
    "rescale_cfg": rescale_cfg,
    "linear_cfg": lambda model: nodes_video_model.VideoLinearCFGGuidance().patch(model, 1.0)[0],
    "cfg_function": lambda model: nodes_perpneg.PerpNeg.execute(model, prompt(3), 1.0).args[0],
}


@pytest.mark.parametrize("function", TAKERS)
def test_a_slot_taken_before_is_refused_and_one_taken_after_is_noticed(function):
    model, take = build(), TAKERS[function]
    with pytest.raises(ValueError, match=rf"in its own way \(comfy_extras.*{function}\).*Take that node out"):
        rules(take(model), **ALL)
    assert torch.equal(evaluate(rules(take(model))), evaluate(take(model)))  # all off: nothing to refuse
    with pytest.raises(RuntimeError, match=rf"do not act: a node after it.*{function}.*Take one of the two nodes out"):
        sample(take(rules(model, **ALL)))


def test_a_function_around_ours_is_heard():
    model = build()
    guided = rules(model, **ALL)
    ours = guided.model_options["sampler_cfg_function"]
    around = guided.clone()
    around.set_model_sampler_cfg_function(lambda args: 0.5 * ours(args))
    x = predictions(model)[0]
    assert_close(evaluate(around, CFG), x - 0.5 * (x - evaluate(guided, CFG)))


def test_two_in_a_row_are_refused_unless_one_is_off():
    model = build()
    with pytest.raises(ValueError, match="already has CFG rules.*in one node"):
        rules(rules(model, rescale=0.7), zero_star=True)
    expected = evaluate(rules(model, **ALL))
    assert torch.equal(evaluate(rules(rules(model), **ALL)), expected)
    assert torch.equal(evaluate(rules(rules(model, **ALL))), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_where_another_pack_evaluates_the_predictions_the_rules_are_the_same(name):
    model = build(name)
    assert torch.equal(evaluate(rules(slot_taken(model), **ALL)), evaluate(rules(model, **ALL)))
    for percent in (0.1, 0.4):
        got = evaluate(slot_taken(rules(model, **INTERVAL)), CFG, percent)
        assert_close(got, evaluate(rules(model, **INTERVAL), CFG, percent))


# ── guiders, conditioning, other users of uncond ────────────────────────────────────────────────────────────────────


def test_a_guider_that_combines_by_itself_is_an_error_in_words():
    guider = nodes_perpneg.Guider_PerpNeg(rules(build(), **ALL))
    guider.set_conds(POSITIVE, NEGATIVE, prompt(3))
    guider.set_cfg(CFG, 1.0)
    with pytest.raises(RuntimeError, match="this guider combines the predictions by itself. Use CFGGuider"):
        evaluate(guider.model_patcher, guider=guider)


@pytest.mark.parametrize("nested", [False, True])
def test_dual_cfg_is_guided_where_it_uses_cfg(nested):
    model = build()

    def dual_cfg(model):
        guider = nodes_custom_sampler.Guider_DualCFG(model)
        guider.set_conds(POSITIVE, prompt(3), NEGATIVE)
        guider.set_cfg(3.0, 2.0, nested=nested)
        return evaluate(model, guider=guider)

    def combine(args):
        x, sigma = args["input"], float(args["sigma"][0])
        on = (args["cond_denoised"], args["uncond_denoised"], sigma, args["cond_scale"])
        return x - by_hand(model, x, *on, **ALL)[0]

    expected = model.clone()
    expected.set_model_sampler_cfg_function(combine)
    assert_close(dual_cfg(rules(model, **ALL)), dual_cfg(expected))


@pytest.mark.parametrize("inside", [True, False])
def test_self_attention_guidance_finds_the_models_own_uncond(inside):
    """SAG asks for uncond (disable_cfg1_optimization) and adds a multiple of its distance from a blurred one."""
    model = build()
    on = {"cfg_end_percent": 0.9 if inside else 0.1}

    def add(model):
        return nodes_sag.SelfAttentionGuidance.execute(model, 0.5, 2.0).args[0]

    term = evaluate(add(model), CFG) - evaluate(model, CFG)
    assert term.abs().max() > 0.01
    for both in (add(rules(model, **on)), rules(add(model), **on)):
        assert_close(evaluate(both, CFG) - evaluate(rules(model, **on), CFG), term, 1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_conditioning_in_parts_is_combined_before_the_rules(name):
    model = build(name)
    conds = {
        "positive": POSITIVE + prompt(3, area=(8, 8, 4, 8), strength=0.7),
        "negative": prompt(2, tokens=4) + prompt(4, start_percent=0.9, end_percent=1.0),
    }
    seen = {}
    plain = model.clone()
    plain.set_model_sampler_post_cfg_function(lambda args: seen.update(args) or args["denoised"])
    evaluate(plain, CFG, **conds)
    sigma = float(seen["sigma"][0])
    expected, _ = by_hand(model, seen["input"], seen["cond_denoised"], seen["uncond_denoised"], sigma, **ALL)
    assert_close(evaluate(rules(model, **ALL), CFG, **conds), expected)


# ── what it leaves behind ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FAMILIES)
def test_the_original_stays_and_runs_leave_nothing_in_the_model(name):
    model = build(name)
    plain, before = sample(model), fingerprint(model)
    guided = rules(model, **ALL, **INTERVAL)
    after = fingerprint(guided)
    with pytest.raises(InterruptedError):
        sample(guided, callback=stop)
    sample(guided)
    assert fingerprint(model) == before and fingerprint(guided) == after
    assert torch.equal(sample(model), plain)


def stop(*_):
    raise InterruptedError
