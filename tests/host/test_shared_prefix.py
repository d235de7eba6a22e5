"""Blocks before the perturbed one, computed once: the same predictions at fewer FLOPs, or the ordinary way."""

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import pytest
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy_extras import nodes_freelunch
from torch.utils.flop_counter import FlopCounterMode

from tidetable.runtime.blocks import find_target
from tidetable.runtime.guidance import METHODS, perturbed_attention
from tidetable.runtime.shared_prefix import is_wanted, prefix_of
from tidetable.tests.host.guidance_cases import CASES
from tidetable.tests.host.guidance_families import CASE_PARAMETERS, build_case, conds_for
from tidetable.tests.host.guidance_models import (
    FAMILIES,
    LATENT,
    NEGATIVE,
    POSITIVE,
    SPECS,
    assert_close,
    build,
    counted,
    evaluate,
    normal,
    prompt,
    sample,
    slot_taken,
)


SHARED = [(4, [1, 0]), (2, [0])]  # cond and uncond, then the copy alone
BATCHED = [(6, [0, 1, 0])]


def node(model, shared_prefix="on", scale=3.0, **options):
    return perturbed_attention(
        model, scale, **{"start_percent": 0.0, "end_percent": 1.0, **options}, shared_prefix=shared_prefix
    )


# ── the same predictions ────────────────────────────────────────────────────────────────────────────────────────────


def assert_shared(model, guided, cfg=4.0, tolerance=3e-6, **options):
    """`guided` shares, and gives what a forward of the perturbed copy alone gives.

    The tolerance, relative to the largest value, is scale 3 times 1e-6, the rounding of cond and uncond in one batch.
    """
    (watched, calls), (plain, plain_calls) = counted(guided), counted(model)
    got, cond = evaluate(watched, cfg, **options), evaluate(plain, cfg, **options)
    expected = evaluate(slot_taken(guided), cfg, **options)
    assert (expected - cond).abs().max() > 0.01 * cond.abs().max()  # otherwise nothing would be tested
    assert_close(got, expected, tolerance)
    assert calls[: len(plain_calls)] == plain_calls
    copies = [kind for _, kinds in calls[len(plain_calls) :] for kind in kinds]
    assert copies == [0] * sum(kinds.count(0) for _, kinds in plain_calls)


@pytest.mark.parametrize("name", CASE_PARAMETERS)
def test_families(name):
    model = build_case(name)
    assert_shared(model, node(model), **conds_for(name))


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_half_precision(name):
    model = build_case(name)
    network = model.model.diffusion_model.to(torch.bfloat16)
    network.dtype = torch.bfloat16
    assert_shared(model, node(model), tolerance=0.1, **conds_for(name))  # bfloat16: 8 bits


@pytest.mark.parametrize("name", FAMILIES)
def test_runs_do_not_know_of_each_other(name):
    guided = node(build(name))
    first = sample(guided)
    with torch.inference_mode():  # as in ComfyUI's executor
        sample(guided, cfg=1.0, steps=2)
        assert torch.equal(sample(guided), first)
        assert torch.equal(sample(guided.clone().clone()), first)


PLACES = {
    "sdxl": ["output 1", "middle, output 0"],
    "sd3": ["joint 2", "joint 1-2"],
    "auraflow": ["single 1", "single 0, single 1"],
    "flux": ["double 1", "single 1", "double 1, single 0-1"],
    "qwen_image": ["transformer 2"],
    "wan": ["blocks 1, blocks 2"],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "blocks"), [(name, blocks) for name in PLACES for blocks in PLACES[name]])
def test_places_and_methods(name, blocks, method):
    model = build_case(name)
    assert_shared(model, node(model, method=method, blocks=blocks), cfg=1.0, **conds_for(name))


def half_mask():
    mask = torch.zeros(1, *LATENT[2:])
    mask[..., : LATENT[3] // 2] = 1.0
    return mask


CONDS = {
    "plain": {},
    "cfg 1": {"cfg": 1.0},
    "one picture": {"shape": (1, *LATENT[1:])},
    "two entries": {"positive": POSITIVE + prompt(3)},
    "area": {"positive": POSITIVE + prompt(3, area=(8, 8, 4, 8), strength=0.7)},
    "area in the negative": {"negative": NEGATIVE + prompt(3, area=(8, 8, 4, 8), strength=0.7)},
    "mask": {"positive": prompt(1, mask=half_mask(), mask_strength=1.0) + prompt(3)},
    "longer prompt": {"positive": prompt(1, tokens=9), "negative": prompt(2, tokens=4)},
    "later in time": {"positive": prompt(1, start_percent=0.9, end_percent=1.0) + prompt(3)},
}


@pytest.mark.parametrize("case", CONDS)
@pytest.mark.parametrize("name", SPECS)
def test_conditioning_of_every_kind(name, case):
    model = build(name)
    assert_shared(model, node(model), **CONDS[case])


@pytest.mark.parametrize("name", FAMILIES)
def test_outside_the_interval_and_at_scale_zero_there_is_one_call(name):
    model = build(name)
    for percent, expected in [(0.1, SHARED[:1]), (0.4, SHARED), (0.8, SHARED[:1])]:
        guided, calls = counted(node(model, start_percent=0.3, end_percent=0.6))
        result = evaluate(guided, percent=percent)
        assert calls == expected
        assert torch.equal(result, evaluate(model, percent=percent)) is (len(expected) == 1)
    guided, calls = counted(node(model, scale=0.0))
    assert torch.equal(evaluate(guided), evaluate(model))
    assert calls == SHARED[:1]


# ── with others ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Residuals(comfy.controlnet.ControlBase):
    """Residuals for transformers that depend on the row, as a ControlNet's do; one for all rows, and a gap, too."""

    def __init__(self, *shape):
        super().__init__()
        self.patterns, self.calls = [normal(*shape, seed=i) for i in range(3)], []

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.calls.append(batched_number)
        rows = x_noisy.flatten(1)[:, :1, None]
        residuals = [rows * self.patterns[0], self.patterns[1][None], rows * self.patterns[2]]
        return {"input": residuals, "middle": [], "output": [residuals[0], None, residuals[2]]}

    def copy(self):
        return self


@pytest.mark.parametrize(("name", "width"), [("sd3", 64), ("flux_double", 96), ("flux", 96), ("qwen_image", 96)])
def test_residuals_in_transformers(name, width):
    """They are added in place between the blocks, before and after the perturbed one, and computed once."""
    model, control, conds = build_case(name), Residuals(24, width), conds_for(name)
    without = evaluate(model, **conds)
    for entries in (conds["positive"], conds["negative"]):
        entries[0][1]["control"] = control
    assert not torch.allclose(evaluate(model, **conds), without, atol=1e-2 * without.abs().max().item())
    assert_shared(model, node(model), **conds)
    control.calls.clear()
    evaluate(node(model), **conds)
    assert control.calls == [2]


def test_controlnet_of_a_unet():
    """Residuals of a real one, which the U-Net takes out of their lists; two entries share it, a third has none."""
    model = build("unet")
    network = {k: v for k, v in SPECS["unet"].network.items() if k not in ("out_channels", "transformer_depth_output")}
    net = comfy.cldm.cldm.ControlNet(**network, hint_channels=3, operations=comfy.ops.disable_weight_init)
    for i, p in enumerate(net.parameters()):
        p.data.copy_(normal(*p.shape, seed=i) / p[0].numel() ** 0.5 if p.ndim > 1 else normal(*p.shape, seed=i))
    control = comfy.controlnet.ControlNet(net.requires_grad_(False), load_device=torch.device("cpu"))
    control.set_cond_hint(torch.rand(1, 3, LATENT[2] * 8, LATENT[3] * 8), 0.5)
    forwards = []
    net.register_forward_hook(lambda _, __, out: forwards.append(len(out["output"][0])))
    conds = {"positive": [*prompt(1, control=control), *prompt(3, control=control), *prompt(4)]}
    plain = evaluate(model, positive=[*prompt(1), *prompt(3), *prompt(4)])
    assert not torch.allclose(evaluate(model, **conds), plain, atol=1e-2 * plain.abs().max().item())
    assert_shared(model, node(model), **conds)
    forwards.clear()
    evaluate(node(model), **conds)
    assert forwards == [2 * LATENT[0]]


def test_freeu():
    model = nodes_freelunch.FreeU_V2().patch(build_case("sdxl"), 1.3, 1.4, 0.9, 0.2)[0]
    model.set_model_output_block_patch(lambda h, hsp, options: (1.5 * h, 0.5 * hsp))
    assert_shared(model, node(model), **conds_for("sdxl"))


def test_other_attention():
    model = build_case("flux")
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **k: 0.5 * f(*a, **k)
    assert_shared(model, node(model), **conds_for("flux"))


@pytest.mark.parametrize("case", ["plain", "area in the negative"])  # there, cond gets an entry with uncond's id
def test_without_memory_for_a_batch_comfyui_splits_it_and_the_result_stays(case):
    model = build()
    model.model.memory_usage_factor = 1e12
    guided, calls = counted(node(model))
    evaluate(guided, **CONDS[case])
    assert {rows for rows, _ in calls} == {2}
    assert_shared(model, node(model), **CONDS[case])


def test_two_nodes_with_other_blocks():
    model = build_case("flux")
    guided = node(node(model, blocks="single 0"), blocks="single 1", method="skip")
    watched, calls = counted(guided)
    assert_close(evaluate(watched, **conds_for("flux")), evaluate(slot_taken(guided), **conds_for("flux")), 2e-6)
    assert calls == [(4, [1, 0]), (4, [0, 0])]


# ── what it costs ───────────────────────────────────────────────────────────────────────────────────────────────────


def flops(model, **options):
    """FLOPs of one evaluation by the innermost module they are counted in, and all."""
    with FlopCounterMode(display=False) as counter:
        evaluate(model, **options)
    return counter.get_total_flops()


def flops_before(model, place, **options):
    """FLOPs of one cond row's share in what `find_prefix` leaves out, from the modules' own counts."""
    network = model.model.diffusion_model
    prefix = prefix_of(network, {place})
    names = {module: f"{type(network).__name__}.{name}" for name, module in network.named_modules()}
    with FlopCounterMode(display=False) as counter:
        evaluate(model, **options)
    counts = counter.get_flop_counts()
    return sum(sum(counts[names[module]].values()) for module in prefix.before if names[module] in counts) / 2


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("sdxl", ("middle_block", 0)),
        ("sd3", ("joint_blocks", 1)),
        ("flux", ("single_blocks", 0)),
        ("wan", ("blocks", 1)),
    ],
)
def test_flops_of_the_blocks_before_are_saved(name, place):
    model, conds = build_case(name), conds_for(name)
    batched, shared = flops(node(model, "off"), **conds), flops(node(model), **conds)
    before = flops_before(model, place, **conds)
    assert before > 0.2 * batched / 3
    # At least these: in the copy alone, attention that would be thrown away is not computed either.
    assert 0 <= batched - shared - before < 0.02 * batched


def on_meta(network_class, **sizes):
    return network_class(**sizes, dtype=torch.float16, device="meta", operations=comfy.ops.disable_weight_init)


def test_auto_shares_where_much_comes_before_in_networks_that_are_not_small():
    unet = {"image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "legacy": False}
    unet |= {"model_channels": 320, "num_head_channels": 64}
    sdxl = {"num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "context_dim": 2048, "transformer_depth_middle": 10}
    sdxl |= {"transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
    sd15 = {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "context_dim": 768, "transformer_depth_middle": 1}
    sd15 |= {"transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3}
    flux = {**CASES["flux"].network, "hidden_size": 3072, "num_heads": 24, "axes_dim": [16, 56, 56], "mlp_ratio": 4.0}
    flux |= {"depth": 19, "depth_single_blocks": 38}
    networks = {"sdxl": on_meta(UNetModel, **unet, **sdxl), "sd15": on_meta(UNetModel, **unet, **sd15)}
    networks |= {"flux": on_meta(Flux, **flux), "tiny": build("unet").model.diffusion_model}
    for name, blocks, on_cpu, on_gpu in [
        ("sdxl", "middle", True, True),
        ("sd15", "middle", True, False),
        ("flux", "single 9", True, True),
        ("flux", "double 3", False, False),
        ("tiny", "middle", False, False),
    ]:
        places = find_target(networks[name], blocks).places
        for device, expected in [("cpu", on_cpu), ("cuda", on_gpu)]:
            assert is_wanted("auto", networks[name], places, torch.device(device)) is expected, (name, blocks, device)
            assert is_wanted("on", networks[name], places, torch.device(device))
            assert not is_wanted("off", networks[name], places, torch.device(device))


def test_other_modes_are_refused():
    with pytest.raises(ValueError, match="shared_prefix.*sometimes.*auto"):
        node(build(), "sometimes")
