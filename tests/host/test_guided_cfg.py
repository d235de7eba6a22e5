"""Tidetable_Guidance on tiny real ComfyUI models: what each rule computes, what it costs, what it refuses."""

import math

import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_apg, nodes_cfg, nodes_model_advanced, nodes_tcfg

from tidetable.nodes.guidance import Guidance
from tidetable.runtime.guided_cfg import CfgRules
from tidetable.tests.host.guidance_models import (
    LATENT,
    assert_close,
    build,
    counted,
    evaluate,
    make_guider,
    normal,
    rescale_cfg,
    sample,
)


MODELS = ("unet", "unet-deep", "mmdit")  # eps, v with zero terminal SNR, flow
PERCENT = 0.4
CFG = 4.0
ALL = {
    "tangential_damping": True,
    "zero_star": True,
    "apg_eta": 0.2,
    "apg_norm_threshold": 10.0,
    "apg_momentum": -0.5,
    "rescale": 0.7,
}


def rules(model, **changed):
    inputs = {entry.id: getattr(entry, "default", None) for entry in Guidance.GET_SCHEMA().inputs}
    return Guidance.execute(model, **{**{k: v for k, v in inputs.items() if k != "model"}, **changed}).args[0]


def predictions(model, percent=PERCENT):
    """(x, cond, uncond, sigma) of the model without any guidance, x as samplers hand it over."""
    seen = {}
    model = model.clone()

    def remember(args):
        seen.update(x=args["input"], cond=args["cond_denoised"], uncond=args["uncond_denoised"])
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(remember)
    evaluate(model, CFG, percent)
    sigma = float(model.get_model_object("model_sampling").percent_to_sigma(percent))
    return seen["x"], seen["cond"], seen["uncond"], sigma


def network_output(model, x, denoised, sigma):
    """The output of which ComfyUI would have made `denoised`: v of the VP models, velocity of the flow model."""
    if model.model.model_type.name == "FLOW":
        return (x - denoised) / sigma
    alpha, beta = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
    return alpha * (x - denoised) / sigma - beta * denoised


def denoised_from(model, x, output, sigma):
    if model.model.model_type.name == "FLOW":
        return x - sigma * output
    alpha, beta = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
    return alpha * alpha * x - beta * output


def by_hand(model, x, cond, uncond, sigma, cfg=CFG, before=None, **on):
    """All rules in the stated order, sample by sample in float64, without the pack's functions; and the APG update."""
    results, updates = [], []
    for i in range(len(x)):
        xi, c, u = (tensor[i].double() for tensor in (x, cond, uncond))
        if on.get("tangential_damping"):
            direction = torch.linalg.svd(torch.stack([(xi - u).flatten(), (xi - c).flatten()]), full_matrices=False)[2]
            u = xi - ((xi - u).flatten() @ direction[0] * direction[0]).view_as(u)
        if on.get("zero_star"):
            u = xi - ((xi - c) * (xi - u)).sum() / (xi - u).square().sum() * (xi - u)
        update = c - u + (on.get("apg_momentum", 0.0) * before[i] if before is not None else 0.0)
        updates.append(update)
        update = (
            update * min(1.0, on.get("apg_norm_threshold") / update.norm()) if "apg_norm_threshold" in on else update
        )
        along = (update * c).sum() / c.square().sum() * c
        guided = c + (cfg - 1) * (update - along + on.get("apg_eta", 1.0) * along)
        if on.get("rescale"):
            own, plain = (network_output(model, xi, d, sigma) for d in (guided, c))
            own = on["rescale"] * own * plain.std() / own.std() + (1 - on["rescale"]) * own
            guided = denoised_from(model, xi, own, sigma)
        results.append(guided)
    return torch.stack(results).float(), updates


# ── what it computes ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cfg", [1.0, CFG])
@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_node_is_no_node(name, cfg):
    model = build(name)
    fresh, calls = counted(rules(model))
    assert torch.equal(sample(fresh, cfg), sample(model, cfg))
    assert calls == [(4, [1, 0]) if cfg != 1.0 else (2, [0])] * 4
    assert rules(model).model_options == model.model_options


@pytest.mark.parametrize("rule", [*ALL, "all"])
@pytest.mark.parametrize("name", MODELS)
def test_each_rule_and_all_of_them_are_what_is_written_by_hand(name, rule):
    model, on = build(name), ALL if rule == "all" else {rule: ALL[rule]}
    expected, _ = by_hand(model, *predictions(model), **on)
    got = evaluate(rules(model, **on), CFG, PERCENT)
    assert_close(got, model.model.process_latent_out(expected))
    if rule != "apg_momentum":  # which begins at the second step
        assert (got - evaluate(model, CFG, PERCENT)).abs().max() > 1e-3 * got.abs().max()


@pytest.mark.parametrize("on", [{"rescale": 0.7}, ALL])
@pytest.mark.parametrize("name", MODELS)
def test_cfg_one_is_cond_bit_for_bit_and_still_costs_one_row(name, on):
    model = build(name)
    guided, calls = counted(rules(model, **on))
    assert torch.equal(sample(guided, 1.0), sample(model, 1.0))
    assert calls == [(2, [0])] * 4


@pytest.mark.parametrize("name", MODELS)
def test_full_rescale_gives_the_network_output_the_deviation_of_cond(name):
    model = build(name)
    x, cond, _, sigma = predictions(model)
    got = evaluate(rules(model, rescale=1.0), CFG, PERCENT)
    own, plain = (network_output(model, x, d, sigma).flatten(1).std(1) for d in (got, cond))
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=0.0)


def test_everything_is_per_sample():
    """A batch of two is two runs of one, momentum included."""
    model = rules(build("mmdit"), **ALL)
    both = run(model, "euler", normal(*LATENT))
    assert_close(run(model, "euler", normal(*LATENT)[:1]), both[:1], 1e-4)
    assert_close(run(model, "euler", normal(*LATENT)[1:]), both[1:], 1e-4)


# ── parity with ComfyUI's own nodes, and where they differ from the papers ──────────────────────────────────────────


@pytest.mark.parametrize("name", ["unet", "unet-deep"])
def test_rescale_is_core_rescale_cfg_on_eps_and_v(name):
    model = build(name)
    for percent in (0.05, PERCENT, 0.9):
        assert_close(evaluate(rules(model, rescale=0.7), CFG, percent), evaluate(rescale_cfg(model), CFG, percent))


def test_core_rescale_cfg_does_not_rescale_the_velocity_of_a_flow_model():
    """It rescales v of another process (0.3.75) or the clean latent (0.33.0)."""
    model = build("mmdit")
    got, core = (evaluate(node, CFG, PERCENT) for node in (rules(model, rescale=1.0), rescale_cfg(model, 1.0)))
    assert (got - core).abs().max() > 0.01 * got.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_tangential_damping_is_core_tcfg(name):
    model = build(name)
    core = nodes_tcfg.TCFG.execute(model).args[0]
    assert_close(evaluate(rules(model, tangential_damping=True)), evaluate(core), 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_core_cfg_zero_star_scales_denoised_by_the_scale_of_the_velocity(name):
    """The paper scales the velocity, x − denoised. They differ by x · (1 − cfg) · (1 − s), and agree where s is 1."""
    model = build(name)
    x, cond, uncond, _ = predictions(model)
    s = nodes_cfg.optimized_scale(x - cond, x - uncond)
    core = evaluate(nodes_cfg.CFGZeroStar.execute(model).args[0])
    assert_close(evaluate(rules(model, zero_star=True)), core + x * (1 - CFG) * (1 - s), 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_core_apg_at_cfg_is_the_paper_at_cfg_plus_one(name):
    """Core adds cfg times the projected update to cond, the paper (cfg − 1) times."""
    model = build(name)
    on = {name: ALL[name] for name in ("apg_eta", "apg_norm_threshold", "apg_momentum")}
    core = nodes_apg.APG.execute(model, *on.values()).args[0]
    assert_close(sample(rules(model, **on), CFG + 1), sample(core, CFG), 1e-4)


# ── where CFG acts ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MODELS)
def test_outside_the_interval_it_is_cond_and_uncond_is_not_computed(name):
    model = build(name)
    guided = rules(model, cfg_start_percent=0.3, cfg_end_percent=0.6)
    for percent, inside in [(0.1, False), (0.4, True), (0.8, False)]:
        watched, calls = counted(guided)
        assert torch.equal(evaluate(watched, CFG, percent), evaluate(model, CFG if inside else 1.0, percent))
        assert calls == [(4, [1, 0]) if inside else (2, [0])]


def test_the_interval_follows_a_shift_set_after_the_node():
    guided, calls = counted(rules(build("mmdit"), cfg_end_percent=0.6))
    shifted = nodes_model_advanced.ModelSamplingSD3().patch(guided, 12.0)[0]
    for percent, rows in [(0.5, 4), (0.7, 2)]:
        evaluate(shifted, CFG, percent)
        assert calls.pop()[0] == rows


def test_other_cfg_nodes_find_nothing_to_add_outside_the_interval():
    model = build("mmdit")
    guided = rules(model, cfg_end_percent=0.3)
    cond = evaluate(model, 1.0, 0.5)
    for add, *inputs in ((nodes_tcfg.TCFG,), (nodes_cfg.CFGZeroStar,), (nodes_apg.APG, 0.2, 20.0, -0.5)):
        assert_close(evaluate(add.execute(guided, *inputs).args[0], CFG, 0.5), cond)
        assert_close(evaluate(rules(add.execute(model, *inputs).args[0], cfg_end_percent=0.3), CFG, 0.5), cond)


def test_uncond_is_computed_where_somebody_asks_for_it():
    guided, calls = counted(rules(build("unet"), cfg_end_percent=0.3))
    guided.model_options["disable_cfg1_optimization"] = True
    seen = []
    guided.set_model_sampler_post_cfg_function(lambda args: seen.append(args["uncond_denoised"]) or args["denoised"])
    _, cond, uncond, _ = predictions(build("unet"), 0.5)
    assert_close(evaluate(guided, CFG, 0.5), cond)
    assert_close(seen[0], uncond)
    assert calls == [(4, [1, 0])]


# ── whole runs ──────────────────────────────────────────────────────────────────────────────────────────────────────


def run(model, sampler, noise, cfg=CFG, sigmas=None, latent=None, callback=None):
    if sigmas is None:
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 5)
    latent = torch.zeros_like(noise) if latent is None else latent
    return make_guider(model, cfg).sample(
        noise, latent, comfy.samplers.sampler_object(sampler), sigmas, callback=callback, disable_pbar=True, seed=3
    )


def distance(got, expected):
    """Mean difference relative to the largest value: over a run, random networks make much of some rounding."""
    return ((got - expected).abs().mean() / expected.abs().max()).item()


def guided_by_hand(model, on):
    """The model with its predictions combined by `by_hand`; the running average is kept per noise level."""
    model, kept = model.clone(), {}

    def combine(args):
        x, sigma = args["input"], float(args["sigma"][0])
        before = next((kept[s] for s in sorted(kept) if s > sigma), None)
        inside = on.get("outside") is None or not on["outside"](sigma)
        if not inside:
            return x - args["cond_denoised"]
        got, kept[sigma] = by_hand(
            model, x, args["cond_denoised"], args["uncond_denoised"], sigma, args["cond_scale"], before, **on
        )
        return x - got

    model.set_model_sampler_cfg_function(combine)
    return model


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_cfg_pp", "dpmpp_2m"])
@pytest.mark.parametrize("name", MODELS)
def test_all_rules_in_a_whole_run_with_momentum_per_step(name, sampler):
    model = build(name)
    noise = normal(1, *LATENT[1:])
    expected = run(guided_by_hand(model, ALL), sampler, noise)
    assert distance(run(rules(model, **ALL), sampler, noise), expected) < 2e-3
    assert distance(run(rules(model, **{**ALL, "apg_momentum": 0.0}), sampler, noise), expected) > 5e-3


@pytest.mark.parametrize("sampler", ["euler", "euler_cfg_pp"])
@pytest.mark.parametrize("name", MODELS)
def test_a_run_with_an_interval(name, sampler):
    """CFG++ steps along uncond, so it has the real one at every step; others pay for it inside the interval alone."""
    model, noise = build(name), normal(1, *LATENT[1:])
    limit = float(model.get_model_object("model_sampling").percent_to_sigma(0.5))
    expected = run(guided_by_hand(model, {**ALL, "outside": lambda sigma: sigma > limit}), sampler, noise)
    guided, calls = counted(rules(model, cfg_start_percent=0.5, **ALL))
    assert distance(run(guided, sampler, noise), expected) < 2e-3
    kinds = [kind for _, kind in calls]
    if sampler == "euler_cfg_pp":
        assert kinds == [[1, 0]] * 5
    else:
        assert kinds == [[0]] * kinds.count([0]) + [[1, 0]] * kinds.count([1, 0]) and 0 < kinds.count([0]) < 5


@pytest.mark.parametrize("name", MODELS)
def test_runs_do_not_know_of_each_other(name):
    guided = rules(build(name), **ALL)
    with torch.inference_mode():  # as in ComfyUI's executor
        first = sample(guided)
        sample(guided, steps=2)
        assert torch.equal(sample(guided), first)
        assert torch.equal(sample(guided.clone().clone()), first)


# ── zero-init ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sampler", ["euler", "euler_cfg_pp"])
def test_the_latent_stands_still_in_the_first_steps_and_uncond_is_not_computed(sampler):
    guided, calls = counted(rules(build("mmdit"), zero_init_steps=2))
    noise, seen = normal(*LATENT), []
    run(guided, sampler, noise, callback=lambda step, denoised, x, total: seen.append(x.clone()))
    assert all(torch.allclose(x, noise, atol=1e-6) for x in seen[:3])
    assert not torch.allclose(seen[3], noise, atol=1e-2)
    first = [1, 0] if sampler == "euler_cfg_pp" else [0]
    assert [kind for _, kind in calls] == [first] * 2 + [[1, 0]] * 3


def test_zero_init_is_for_runs_from_pure_noise():
    """In the second of two samplers, or with denoise below 1, the first steps are steps like others."""
    model = build("mmdit")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 5)[2:]
    latent = normal(*LATENT, seed=5)
    got, plain = (
        run(m, "euler", normal(*LATENT), sigmas=sigmas, latent=latent) for m in (rules(model, zero_init_steps=2), model)
    )
    assert torch.equal(got, plain)


@pytest.mark.parametrize("name", ["unet", "unet-deep"])
def test_zero_init_of_a_model_that_is_no_flow_is_an_error_in_words(name):
    with pytest.raises(RuntimeError, match=r"zero_init_steps 1.*flow models.*Set zero_init_steps to 0"):
        sample(rules(build(name), zero_init_steps=1))


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"cfg_start_percent": 0.5, "cfg_end_percent": 0.5}, "cfg_start_percent 0.5 is not below.*swap"),
        ({"cfg_start_percent": math.nan}, "cfg_start_percent.*nan"),
        ({"cfg_end_percent": 60.0}, "cfg_end_percent.*60"),
        ({"apg_momentum": 1.0}, "apg_momentum.*-0.99 and 0.99.*1.0"),
        ({"apg_norm_threshold": -1.0}, "apg_norm_threshold.*-1.0"),
        ({"apg_eta": math.inf}, "apg_eta.*inf"),
        ({"rescale": 1.5}, "rescale.*0.7 is usual.*1.5"),
        ({"zero_init_steps": -1}, "zero_init_steps.*-1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        CfgRules(**inputs)


def test_the_summary_states_the_order():
    model = build("mmdit")
    _, text = Guidance.execute(model, cfg_start_percent=0.1, cfg_end_percent=0.8, zero_init_steps=1, **ALL).args
    words = ["zero velocity in the first 1", "0.1 to 0.8", "TCFG", "optimized scale", "eta 0.2", "norm threshold 10"]
    places = [text.index(word) for word in [*words, "momentum -0.5", "rescale 0.7", "terms of other nodes"]]
    assert places == sorted(places)
    fresh = Guidance.execute(model).args[1]
    assert fresh.splitlines()[0] == "CFG"
