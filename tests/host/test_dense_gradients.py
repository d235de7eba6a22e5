"""An adapter's gradients against plain PyTorch: those of the dense weights, by the chain rule, and in each dtype."""

import pytest
import torch

from tidetable.runtime.trainable import thawed
from tidetable.tests.host.gradient_cases import gradients, network_of, prepared
from tidetable.tests.host.test_gradients import CASES_HERE, relative


TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Of the change that the adapter makes: the merged weight is rounded to the dtype, the bypass is not."""


@pytest.mark.parametrize("name", CASES_HERE)
def test_gradients_are_those_of_the_merged_weights(name):
    """With W' = W + s · up @ down: dL/dup = s · dL/dW' @ downᵀ and dL/ddown = s · upᵀ @ dL/dW'."""
    with prepared(name) as (denoiser, trained, loss):
        bypass = gradients(denoiser, trained, loss)
        adapters, layers = trained.adapters, trained.layers
    model = network_of(name)
    with prepared(name, model, scale=0.0) as (denoiser, own, loss):
        with torch.no_grad():
            for layer, adapter in adapters.items():
                own.layers[layer].weight.add_(adapter.delta().to(own.layers[layer].weight))
        weights = [own.layers[layer].weight.requires_grad_(True) for layer in layers]
        with denoiser.gradient_context():
            loss().backward()
        dense = {layer: weight.grad for layer, weight in zip(layers, weights, strict=True)}
    expected = []
    for layer, adapter in adapters.items():
        grad = dense[layer]
        by_name = {} if grad is None else {
            id(adapter.up): adapter.scale * grad @ adapter.down.detach().T,
            id(adapter.down): adapter.scale * adapter.up.detach().T @ grad,
        }  # fmt: skip
        expected += [by_name.get(id(parameter)) for parameter in adapter.parameters()]
    assert relative(bypass, expected) < 1e-4


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [case for case in CASES_HERE if case.values[0] in ("sd15", "sd3", "flux")])
def test_the_merged_weights_answer_as_the_bypass_in_each_dtype(name, dtype):
    model = network_of(name)
    with torch.inference_mode(), thawed(model.model):
        model.model.diffusion_model.to(dtype)
    model.model.manual_cast_dtype = None
    answers = {}
    with prepared(name, model, scale=1.0) as (_, trained, loss), torch.no_grad():
        answers["bypass"] = loss().item()
        deltas = {layer: adapter.delta() for layer, adapter in trained.adapters.items()}
    with prepared(name, model, scale=0.0) as (_, own, loss), torch.no_grad():
        answers["base"] = loss().item()
        for layer, delta in deltas.items():
            weight = own.layers[layer].weight
            weight.copy_((weight.float() + delta).to(dtype))
        answers["merged"] = loss().item()
    change = abs(answers["bypass"] - answers["base"])
    assert change > 5e-3 * answers["base"]
    assert abs(answers["merged"] - answers["bypass"]) < TOLERANCE[dtype] * change
