"""Tidetable_PerturbedAttention on every family: what perturbed rows are, and that all else stays the model's own."""

import pytest
import torch

from tidetable.runtime.blocks import block_lists, find_target
from tidetable.tests.host.guidance_cases import CASES
from tidetable.tests.host.guidance_families import CASE_PARAMETERS, build_case, conds_for, expected_for
from tidetable.tests.host.guidance_models import assert_close, counted, evaluate, node, slot_taken


families = pytest.mark.parametrize("name", CASE_PARAMETERS)


@families
def test_pag_is_the_formula_with_identity_attention_computed_directly(name):
    model, conds = build_case(name), conds_for(name)
    guided = node(model)
    for cfg in (1.0, 4.0):
        expected = expected_for(name, model, evaluate(model, cfg, **conds), **conds)
        assert_close(evaluate(guided, cfg, **conds), expected, 1e-4)
        assert_close(evaluate(slot_taken(guided), cfg, **conds), expected, 1e-4)


@families
def test_auto_is_the_block_that_is_written(name):
    network = build_case(name).model.diffusion_model
    target = find_target(network)
    assert target == find_target(network, CASES[name].auto)
    names = [place[0] for place in target.places]
    assert set(names) <= set(block_lists(network))


@families
def test_cond_and_uncond_stay_the_models_own(name):
    model, conds = build_case(name), conds_for(name)

    def predictions(model):
        kept = []
        model = model.clone()
        model.set_model_sampler_pre_cfg_function(lambda args: kept.extend(args["conds_out"]) or args["conds_out"])
        evaluate(model, **conds)
        return kept

    plain, batched, separate = (predictions(m) for m in (model, node(model), slot_taken(node(model))))
    for p, b, s in zip(plain, batched, separate, strict=True):
        assert_close(b, p, 1e-4)
        assert torch.equal(s, p)


@families
@pytest.mark.parametrize("method", ["pag", "seg", "shuffle", "skip"])
def test_one_call_per_step_for_every_method_and_the_method_has_an_effect(name, method):
    model, conds = build_case(name), conds_for(name)
    guided, calls = counted(node(model, method=method))
    result = evaluate(guided, **conds)
    assert [chunks for _, chunks in calls] == [[0, 1, 0]]
    assert (result - evaluate(model, **conds)).abs().mean() > 1e-3 * result.abs().mean()
