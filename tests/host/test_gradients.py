"""The gradients of every network of ComfyUI's that is claimed: slopes, recomputed blocks, memory, frozen layers."""

import pytest
import torch

from tidetable.runtime.gradients import PROVEN_CLASSES, blocks_of, unproven
from tidetable.runtime.lora_keys import apply_lora, to_lora_model
from tidetable.tests.host.comparing import fingerprint
from tidetable.tests.host.gradient_cases import NETWORKS, PARAMETERS, PeakMemory, gradients, network_of, prepared
from tidetable.tests.host.guidance_families import is_there
from tidetable.training.recompute import recomputed


UNTRAINABLE = {"cosmos": "ModelSamplingCosmosRFlow"}
"""No native target here: the trainer refuses the sampling."""
WITHOUT_BACKWARD = {"anima": "rms_rope_split_half"}
"""A fused kernel of ComfyUI's that has no backward pass, whatever `in_training` says."""
CASES_HERE = [case for case in PARAMETERS if case.values[0] not in {**UNTRAINABLE, **WITHOUT_BACKWARD}]
_UNET = {"num_res_blocks": [2, 2], "transformer_depth": [1] * 4, "transformer_depth_output": [1] * 6}
DEEP = {
    "sd15": _UNET,
    "sdxl": _UNET,
    "sd3": {"num_blocks": 6},
    "auraflow": {"n_layers": 6, "n_double_layers": 3},
    "flux": {"depth": 3, "depth_single_blocks": 3},
    "flux2": {"depth": 3, "depth_single_blocks": 3},
    "chroma": {"depth": 3, "depth_single_blocks": 3},
    "hunyuan_video": {"depth": 3, "depth_single_blocks": 3},
    "qwen_image": {"num_layers": 6},
    "z_image": {"n_layers": 6},
    "omnigen2": {"num_layers": 6},
    "wan": {"num_layers": 6},
    "krea2": {"layers": 6},
    "ltxv": {"num_layers": 6},
}


def relative(found, expected):
    """Norm of the difference of two lists of gradients over the norm."""
    assert [g is None for g in found] == [g is None for g in expected]
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    difference = torch.stack([(a - b).square().sum() for a, b in pairs]).sum().sqrt()
    return (difference / torch.stack([b.square().sum() for _, b in pairs]).sum().sqrt()).item()


def slope(parameters, direction, loss, step):
    """Central difference of the loss along a direction of length 1."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(loss().double().item())
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=sign * step)
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("name", CASES_HERE)
def test_gradients_are_slopes_and_stay_the_same_when_blocks_are_recomputed(name):
    model = network_of(name)
    before = fingerprint(model)
    with prepared(name, model) as (denoiser, trained, loss):
        network = denoiser.real.diffusion_model
        assert not unproven(network), "a network that is tested here must be in PROVEN_CLASSES"
        plain = gradients(denoiser, trained, loss)
        with recomputed(blocks_of(network)):
            again = gradients(denoiser, trained, loss)
        assert relative(again, plain) < 1e-6
        rows = [i for i, g in enumerate(plain) if g is not None]
        length = torch.stack([plain[i].square().sum() for i in rows]).sum().sqrt().item()
        direction = [plain[i] / length for i in rows]
        parameters = [trained.trainable()[i] for i in rows]
        # Routed experts jump where a token changes its expert: of three steps one must agree.
        errors = [abs(slope(parameters, direction, loss, step) / length - 1) for step in (2e-2, 4e-3, 1e-3)]
        assert min(errors) < 0.02
        assert len(rows) >= 0.7 * len(plain)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", CASES_HERE)
def test_the_bypass_equals_the_saved_lora(name):
    model = network_of(name)
    with prepared(name, model) as (_, trained, loss), torch.no_grad():
        bypass, lora = loss().item(), to_lora_model(trained, {})
    with prepared(name, apply_lora(model, lora), scale=0.0) as (_, _, loss), torch.no_grad():
        merged = loss().item()
    with prepared(name, model, scale=0.0) as (_, _, loss), torch.no_grad():
        base = loss().item()
    assert abs(merged - bypass) < 1e-4 * bypass and abs(base - bypass) > 1e-3 * bypass


ROUTES = {"flux": ("double_block", 1), "sd3": ("double_block", 1), "qwen_image": ("double_block", 0)}


@pytest.mark.parametrize("name", ROUTES)
def test_a_block_that_others_replace_is_recomputed_all_the_same(name):
    """ComfyUI's `patches_replace` calls the block from inside somebody's function, with a dictionary of arguments."""
    calls = []

    def replacement(args, extra):
        calls.append(torch.is_grad_enabled())
        return {key: 0.9 * value for key, value in extra["original_block"](args).items()}

    def patch(_, args, kwargs):
        kwargs["transformer_options"]["patches_replace"] = {"dit": {ROUTES[name]: replacement}}
        return args, kwargs

    with prepared(name) as (denoiser, trained, loss):
        network, without = denoiser.real.diffusion_model, gradients(denoiser, trained, loss)
        handle = network.register_forward_pre_hook(patch, with_kwargs=True)
        plain = gradients(denoiser, trained, loss)
        with recomputed(blocks_of(network)):
            again = gradients(denoiser, trained, loss)
        handle.remove()
    assert len(calls) == 2 and relative(again, plain) < 1e-6 < relative(without, plain)


@pytest.mark.parametrize("name", [case for case in CASES_HERE if case.values[0] in DEEP])
def test_recomputing_blocks_keeps_the_peak_low(name):
    with prepared(name, tiles=4, **DEEP[name]) as (denoiser, trained, loss):
        gradients(denoiser, trained, loss)
        with PeakMemory() as plain:
            gradients(denoiser, trained, loss)
        with recomputed(blocks_of(denoiser.real.diffusion_model)), PeakMemory() as saving:
            gradients(denoiser, trained, loss)
    assert saving.peak <= 0.6 * plain.peak


@pytest.mark.parametrize("name", [case for case in CASES_HERE if case.values[0] in ("flux", "sd3", "sdxl")])
def test_a_frozen_layer_never_gets_a_weight_gradient(name):
    """Neither in `.grad`, nor on the way: no node of the graph computes one for a weight of the base."""
    with prepared(name) as (denoiser, trained, loss):
        base = {id(p) for p in denoiser.real.parameters()}
        assert not any(p.requires_grad for p in denoiser.real.parameters())
        with denoiser.gradient_context():
            value = loss()
            leaves, seen, todo = [], set(), [value.grad_fn]
            while todo:
                node = todo.pop()
                if node is None or node in seen:
                    continue
                seen.add(node)
                leaves += [node.variable] if hasattr(node, "variable") else []
                todo += [following for following, _ in node.next_functions]
            value.backward()
        assert leaves and not any(id(leaf) in base for leaf in leaves)
        assert {id(leaf) for leaf in leaves} <= {id(p) for p in trained.trainable()}
        assert all(p.grad is None for p in denoiser.real.parameters())


@pytest.mark.parametrize("name", CASES_HERE)
def test_no_attention_goes_past_the_differentiable_one(name, monkeypatch):
    """ComfyUI's own default here is not the one that training asks for: a call that reaches it took no options."""
    import comfy.ldm.modules.attention as host

    past = []
    for function in ("efficient_dot_product_attention", "attention_basic"):
        original = getattr(host, function)
        monkeypatch.setattr(host, function, lambda *a, f=original, **k: past.append(f) or f(*a, **k))
    with prepared(name) as (_, _, loss):
        loss()
    assert not past


@pytest.mark.parametrize("name", [case for case in PARAMETERS if case.values[0] in UNTRAINABLE])
def test_a_sampling_without_a_target_is_refused(name):
    with pytest.raises(ValueError, match="cannot be trained here"), prepared(name):
        pass


def test_every_class_that_is_claimed_is_tested():
    names = [case.values[0] for case in CASES_HERE]
    found = {type(network_of(name).model.diffusion_model).__name__ for name in names if is_there(NETWORKS[name])}
    elsewhere = (
        set() if all(is_there(NETWORKS[name]) for name in names) else {"SingleStreamDiT"}
    )  # Krea2: newer ComfyUI
    assert set(PROVEN_CLASSES) == found | elsewhere
