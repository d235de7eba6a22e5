"""When Tidetable_PerturbedAttention acts and how strongly; which blocks can be named; bad values."""

import math

import comfy.samplers
import pytest
import torch

from tidetable.runtime.blocks import find_target
from tidetable.samplers.guidance.combine import relative_difference, rescaled_perturbed_guidance
from tidetable.tests.host.guidance_families import build_case, conds_for
from tidetable.tests.host.guidance_models import (
    LATENT,
    NEGATIVE,
    POSITIVE,
    SCALE,
    assert_close,
    build,
    counted,
    evaluate,
    node,
    normal,
    sample,
)


def rows_per_step(model, steps, sampler="euler", **options):
    guided, calls = counted(node(model, **options))
    runner = comfy.samplers.KSampler(guided, steps, "cpu", sampler, "simple", model_options=guided.model_options)
    runner.sample(normal(*LATENT), POSITIVE, NEGATIVE, 4.0, torch.zeros(LATENT), disable_pbar=True, seed=0)
    return [len(chunks) for _, chunks in calls]


# ── every n-th step ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["unet", "mmdit"])
def test_every_nth_counts_from_the_first_guided_step_and_the_others_cost_nothing(name):
    model = build(name)
    assert rows_per_step(model, 7, every_nth=3) == [3, 2, 2, 3, 2, 2, 3]
    inside = rows_per_step(model, 8, start_percent=0.3)
    first = inside.index(3)
    assert first > 0
    expected = [3 if i >= first and (i - first) % 2 == 0 else 2 for i in range(8)]
    assert rows_per_step(model, 8, start_percent=0.3, every_nth=2) == expected


def test_every_nth_of_a_sampler_with_several_evaluations_in_a_step():
    """DPM2 evaluates once at the step's start and once between its ends: both are that step's."""
    assert rows_per_step(build(), 4, "dpm_2", every_nth=2) == [3, 3, 2, 2, 3, 3, 2]


def test_every_nth_needs_the_schedule():
    model = node(build(), every_nth=2)

    def forget(executor, *args, **kwargs):
        args[2]["model_options"]["transformer_options"].pop("sample_sigmas")
        return executor(*args, **kwargs)

    model.add_wrapper("sampler_sample", forget)
    with pytest.raises(RuntimeError, match="does not tell its schedule.*every_nth to 1"):
        sample(model)


# ── stop ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def differences(model, steps):
    """The relative difference of cond and perturbed at every step, by hand."""
    found = []
    watched = node(model)

    def note(args):
        _, perturbed = args["model_options"]["tidetable_guidance_run"].get("prediction", (None, {}))
        found.extend(relative_difference(args["cond_denoised"], p) for p in perturbed.values())
        return args["denoised"]

    watched.model_options["sampler_post_cfg_function"].insert(0, note)
    sample(watched, steps=steps)
    return found


def test_stops_paying_once_the_difference_is_small_and_starts_anew_in_the_next_run():
    model = build()
    found = differences(model, 6)
    assert len(found) == 6
    threshold = sorted(found)[2]  # two of six steps are below
    stop = next(i for i, d in enumerate(found) if d < threshold)
    expected = [3 if i <= stop else 2 for i in range(6)]
    guided, calls = counted(node(model, stop_below=threshold))
    first = sample(guided, steps=6)
    assert [len(chunks) for _, chunks in calls] == expected
    calls.clear()
    assert torch.equal(sample(guided, steps=6), first)
    assert [len(chunks) for _, chunks in calls] == expected
    assert rows_per_step(model, 3, stop_below=min(found) / 2) == [3, 3, 3]


def test_each_node_stops_for_itself():
    model = build()
    both, calls = counted(node(node(model, stop_below=1.0), method="seg"))
    sample(both, steps=3)
    assert [len(chunks) for _, chunks in calls] == [4, 3, 3]


# ── how strongly ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["full", "partial"])
@pytest.mark.parametrize("name", ["unet", "mmdit"])
def test_rescale_is_the_rule_on_the_three_predictions(name, mode):
    model = build(name)
    cond, cfg, plain = evaluate(model, 1.0), evaluate(model, 4.0), evaluate(node(model), 1.0)
    perturbed = cond - (plain - cond) / SCALE
    got = evaluate(node(model, rescale=0.7, rescale_mode=mode), 4.0)
    assert_close(got, rescaled_perturbed_guidance(cfg, cond, perturbed, SCALE, 0.7, mode), 1e-4)


@pytest.mark.parametrize("name", ["unet", "mmdit"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.1, 0.7)])
def test_decay_is_a_power_of_what_is_left_in_log_snr(name, start, end):
    model = build(name)
    sampling = model.get_model_object("model_sampling")

    def log_snr(percent):
        sigma = float(sampling.percent_to_sigma(percent))
        if name == "mmdit":
            t = min(max(sigma, 0.001), 0.999)
            return 2 * math.log((1 - t) / t)
        return -2 * math.log(min(max(sigma, float(sampling.sigma_min)), float(sampling.sigma_max)))

    left = (log_snr(end) - log_snr(0.4)) / (log_snr(end) - log_snr(start))
    assert 0.1 < left < 0.9
    for decay in (1.0, 2.5):
        expected = evaluate(node(model, SCALE * left**decay))
        assert_close(evaluate(node(model, start_percent=start, end_percent=end, decay=decay)), expected, 1e-4)


def test_where_decay_has_reached_zero_nothing_is_paid():
    model = build()
    guided, calls = counted(node(model, decay=1.0, end_percent=0.4))
    assert torch.equal(evaluate(guided, percent=0.4), evaluate(model, percent=0.4))
    assert calls == [(4, [1, 0])]


# ── two in a row ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["flux", "qwen_image", "sdxl", "wan"])
def test_different_perturbations_get_a_row_each_in_one_forward_and_add_up(name):
    model, conds = build_case(name), conds_for(name)
    plain = evaluate(model, **conds)
    terms = [evaluate(node(model, 1.0, method=method), **conds) - plain for method in ("pag", "seg", "skip")]
    both, calls = counted(node(node(node(model, 1.0), 2.0, method="seg"), 0.5, method="skip"))
    assert_close(evaluate(both, **conds), plain + terms[0] + 2.0 * terms[1] + 0.5 * terms[2], 1e-4)
    assert [chunks for _, chunks in calls] == [[0, 0, 0, 1, 0]]


def test_the_same_perturbation_in_other_words_is_shared():
    model, conds = build_case("flux"), conds_for("flux")
    twice, calls = counted(node(node(model, 1.0, blocks="SINGLE 0", blur_sigma=3.0), 2.0, decay=0.0))
    assert_close(evaluate(twice, **conds), evaluate(node(model, 3.0), **conds))
    assert [chunks for _, chunks in calls] == [[0, 1, 0]]
    two_blurs, calls = counted(node(node(model, 1.0, method="seg"), 2.0, method="seg", blur_sigma=3.0))
    evaluate(two_blurs, **conds)
    assert [chunks for _, chunks in calls] == [[0, 0, 1, 0]]


# ── blocks ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "blocks", "places"),
    [
        ("flux", "double 1, single 0-1", [("double_blocks", 1), ("single_blocks", 0), ("single_blocks", 1)]),
        ("flux", " Singles 1 ,0, double 0", [("double_blocks", 0), ("single_blocks", 0), ("single_blocks", 1)]),
        ("flux", "single", [("single_blocks", 0), ("single_blocks", 1)]),
        ("flux", "middle", [("single_blocks", 0)]),
        ("wan", "blocks 0 - 2", [("blocks", 0), ("blocks", 1), ("blocks", 2)]),
        ("z_image", "layer 2", [("layers", 2)]),
        ("qwen_image", "block 0", [("transformer_blocks", 0)]),
        ("sdxl", "input 3, middle", [("input_blocks", 3), ("middle_block", 0)]),
        ("sdxl", "output 1-0", None),
        ("sdxl", "input 0", None),
        ("flux", "single 2", None),
        ("flux", "triple 1", None),
        ("flux", "3", None),
        ("flux", "", None),
        ("flux", "double 1,", None),
        ("flux", "double -1", None),
        ("flux", "double 1.5", None),
        ("flux", "single 0-999999999999", None),
    ],
)
def test_the_grammar_of_blocks(name, blocks, places):
    network = build_case(name).model.diffusion_model
    if places is not None:
        assert list(find_target(network, blocks).places) == places
        return
    there = {"flux": "double 0-1, single 0-1", "sdxl": "input 3, middle, output 0-1"}[name]
    with pytest.raises(ValueError, match=f"This model has: {there}\\. Write for example"):
        find_target(network, blocks)


def test_published_choice_of_sd3_counts_for_its_size_alone():
    network = build_case("sd3").model.diffusion_model
    network.joint_blocks.extend([network.joint_blocks[0]] * 21)
    assert find_target(network).places == (("joint_blocks", 13),)
    network.joint_blocks.append(network.joint_blocks[0])
    assert find_target(network).places == (("joint_blocks", 12),)


@pytest.mark.parametrize("method", ["pag", "skip"])
def test_several_blocks_are_more_than_each(method):
    model, conds = build_case("flux"), conds_for("flux")
    results = [
        evaluate(node(model, method=method, blocks=blocks), **conds)
        for blocks in ("double 1", "single 1", "double 1, single 1")
    ]
    assert (results[2] - results[0]).abs().max() > 0.01 and (results[2] - results[1]).abs().max() > 0.01


# ── bad values ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "peg"}, "method 'peg'.*pag, seg"),
        ({"rescale_mode": "half"}, "rescale_mode 'half'.*full, partial"),
        ({"blur_sigma": 0.0}, "blur_sigma.*-1 for infinite, got 0"),
        ({"blur_sigma": -2.0}, "blur_sigma.*got -2"),
        ({"blur_sigma": math.nan}, "blur_sigma.*nan"),
        ({"every_nth": 0}, "every_nth.*got 0"),
        ({"stop_below": -0.1}, "stop_below.*-0.1"),
        ({"stop_below": math.nan}, "stop_below.*nan"),
        ({"rescale": 1.5}, "rescale.*1.5"),
        ({"decay": math.inf}, "decay.*inf"),
        ({"decay": -1.0}, "decay.*-1"),
        ({"scale": 0.0, "every_nth": -3}, "every_nth.*-3"),
        ({"start_percent": 0.9, "end_percent": 0.1}, "start_percent 0.9 is not below end_percent 0.1"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        node(build(), **values)
