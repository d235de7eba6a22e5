"""The other methods on every family, against the model weakened by hand; the text's tokens."""

import contextlib

import pytest
import torch

from tidetable.runtime.attention_targets import BlockTarget, unet_block
from tidetable.runtime.blocks import find_target
from tidetable.samplers.guidance.perturb import permutations_at
from tidetable.tests.host.guidance_cases import CASES
from tidetable.tests.host.guidance_families import CASE_PARAMETERS, build_case, conds_for
from tidetable.tests.host.guidance_models import SCALE, assert_close, evaluate, node, slot_taken


families = pytest.mark.parametrize("name", CASE_PARAMETERS)
PERCENT = 0.4


def modules_to_skip(network):
    target = find_target(network)
    if isinstance(target, BlockTarget):
        return [getattr(network, name)[index] for name, index in target.places]
    layers = [layer for place in target.places for layer in unet_block(network, place)]
    return [layer for layer in layers if hasattr(layer, "transformer_blocks")]


@contextlib.contextmanager
def left_out(module):
    """The module gives back those of its arguments that have the shapes of its results."""
    forward = module.forward

    def identity(*args, **kwargs):
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        kept = [x.clone() for x in given]
        output = forward(*args, **kwargs)
        several = isinstance(output, tuple)
        back = [next(k for k in kept if k.shape == o.shape) for o in (output if several else (output,))]
        return tuple(back) if several else back[0]

    module.forward = identity
    try:
        yield
    finally:
        del module.forward


@families
def test_skip_is_the_formula_with_the_block_left_out(name):
    model, conds = build_case(name), conds_for(name)
    guided = node(model, method="skip")
    cond = evaluate(model, 1.0, **conds)
    with contextlib.ExitStack() as stack:
        for module in modules_to_skip(model.model.diffusion_model):
            stack.enter_context(left_out(module))
        perturbed = evaluate(model, 1.0, **conds)
    assert (cond - perturbed).abs().mean() > 1e-3 * cond.abs().mean()
    for cfg in (1.0, 4.0):
        expected = evaluate(model, cfg, **conds) + SCALE * (cond - perturbed)
        assert_close(evaluate(guided, cfg, **conds), expected, 1e-4)
        assert_close(evaluate(slot_taken(guided), cfg, **conds), expected, 1e-4)


def recorded(model, taps, conds):
    """(queries of every attention; the first tapped attention's result) of the last forward, both [B, N, C]."""
    queries, results = [], []

    def override(function, q, k, v, *args, **kwargs):
        queries.append(q.transpose(1, 2).flatten(2) if kwargs.get("skip_reshape") else q)
        return function(q, k, v, *args, **kwargs)

    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    handle = taps[0].after.register_forward_pre_hook(lambda _, args: results.append(args[0]))
    evaluate(model, 1.0, percent=PERCENT, **conds)
    handle.remove()
    queries = queries[-len(queries) // len(results) :]
    width = min(queries[-1].shape[-1], results[-1].shape[-1])  # Flux's single blocks put the MLP's result beside it
    return queries, results[-1][..., :width] / taps[0].gate()


def split(x, tokens):
    """A sequence's tokens of the picture, and the others."""
    chosen = torch.zeros(x.shape[1], dtype=torch.bool)
    chosen[tokens] = True
    return x[:, chosen], x[:, ~chosen]


@families
def test_in_the_first_perturbed_attention_only_the_pictures_tokens_change(name):
    """All that comes in is still the same there, so that shuffled results and blurred queries can be told exactly."""
    model, conds = build_case(name), conds_for(name)
    taps = CASES[name].taps(model.model.diffusion_model)
    plain_queries, plain = recorded(model, taps, conds)
    plain_picture, plain_text = split(plain, taps[0].tokens)
    sigma = float(torch.tensor(float(model.get_model_object("model_sampling").percent_to_sigma(PERCENT))))  # as float32
    frames = CASES[name].latent[2] if len(CASES[name].latent) == 5 else 1
    size = plain_picture.shape[1]
    for method in ("pag", "seg", "shuffle"):
        queries, weakened = recorded(slot_taken(node(model, method=method)), taps, conds)
        picture, text = split(weakened, taps[0].tokens)
        assert not torch.allclose(picture, plain_picture, rtol=0.0, atol=1e-3 * plain.abs().max().item())
        torch.testing.assert_close(text, plain_text)
        if method == "shuffle":
            order = torch.randperm(size, generator=permutations_at(sigma))
            assert_close(picture, plain_picture[:, order])
        if method == "seg":
            before, after = next(pair for pair in zip(plain_queries, queries, strict=True) if not torch.equal(*pair))
            moved = (before != after).any(-1).any(0).nonzero().flatten()
            assert moved.tolist() == list(range(moved[0], moved[0] + size))
            means = before[:, moved].unflatten(1, (frames, -1)).mean(2, keepdim=True)
            assert_close(after[:, moved].unflatten(1, (frames, -1)), means.expand(-1, -1, size // frames, -1))
