"""The trainer on one tiny network of every family that it claims, made by ComfyUI's own classes."""

import pytest
import torch

from tidetable.runtime.lora_keys import apply_lora, to_lora_model
from tidetable.runtime.tiny import NEAR_ZERO
from tidetable.runtime.trainable import training_session
from tidetable.runtime.training import TrainingData, train_lora
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.model_zoo import LATENT, ZOO, zoo
from tidetable.training.adapter_kinds import AdapterNetwork
from tidetable.training.adapter_settings import AdapterConfig
from tidetable.training.adapters import select_targets
from tidetable.training.config import LoRAConfig, TrainConfig
from tidetable.training.objective import loss_for_batch


T = (0.3, 0.8)


@pytest.fixture(params=ZOO)
def case(request):
    """(name, MODEL as loaders hand it over, latents [2, C, ...], two conditionings)."""
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        samples = torch.randn(2, *LATENT.get(request.param, (1, 16, 8, 8))[1:], generator=generator)
        texts = [torch.randn(1, 6, 32, generator=generator) for _ in range(2)]
        pooled = [torch.randn(1, 32, generator=generator) for _ in range(2)]
        positive = [[[text, {"pooled_output": pool}]] for text, pool in zip(texts, pooled, strict=True)]
        model = zoo(request.param)
        for name, parameter in model.model.diffusion_model.named_parameters():
            if name.endswith(NEAR_ZERO):  # or an adapter inside a residual branch would hardly reach the output
                parameter.mul_(50)
        yield request.param, inference_copy(model), samples, positive


def loss_of(denoiser, dataset):
    x0 = torch.stack(list(dataset.latents))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    t = denoiser.snap(torch.tensor(T, dtype=torch.float64))
    return loss_for_batch(denoiser, x0, dataset.conditions, eps, t).mean()


def adapters(denoiser, scale: float):
    layers = select_targets(dict(denoiser.real.diffusion_model.named_modules()), "attention_mlp")
    network = AdapterNetwork(layers, AdapterConfig(rank=4, lora_alpha=4.0), denoiser.device)
    generator = torch.Generator().manual_seed(2)
    for adapter in network.adapters.values():
        adapter.up.data = scale * torch.randn(adapter.up.shape, generator=generator)
    return network


def test_the_gradient_is_the_slope_of_the_loss(case):
    """Flux-type blocks change tensors in place that the backward pass needs:

    a gradient that exists may still be wrong.
    """
    _, model, samples, positive = case
    with training_session(model) as denoiser:
        dataset = denoiser.dataset(list(samples), positive)
        network = adapters(denoiser, 0.1)
        with network.installed():
            with denoiser.gradient_context():
                loss_of(denoiser, dataset).backward()
            trained = [p for p in network.trainable() if p.grad is not None]
            norm = torch.stack([p.grad.square().sum() for p in trained]).sum().sqrt()
            values = []
            for step in (2e-2, -2e-2):
                with torch.no_grad():
                    for p in trained:
                        p.add_(p.grad, alpha=float(step / norm))
                    values.append(loss_of(denoiser, dataset).double().item())
                    for p in trained:
                        p.sub_(p.grad, alpha=float(step / norm))
    slope = (values[0] - values[1]) / 4e-2
    assert norm > 0
    assert abs(slope - norm.item()) < 0.02 * norm.item()
    assert len(trained) >= 0.7 * len(network.trainable())  # Qwen's last block computes text that nobody reads


def test_the_bypass_equals_the_saved_lora(case):
    _, model, samples, positive = case
    with training_session(model) as denoiser, torch.no_grad():
        dataset, network = denoiser.dataset(list(samples), positive), adapters(denoiser, 0.1)
        base = loss_of(denoiser, dataset)
        with network.installed():
            bypass = loss_of(denoiser, dataset)
        lora = to_lora_model(network, {})
    with training_session(apply_lora(model, lora)) as denoiser, torch.no_grad():
        patched = loss_of(denoiser, denoiser.dataset(list(samples), positive))
    assert torch.allclose(bypass, patched, rtol=1e-4)
    assert not torch.allclose(base, patched, rtol=1e-3)


def test_a_run_learns_and_leaves_the_model_as_it_was(case):
    _, model, samples, positive = case
    before = fingerprint(model)
    config = TrainConfig(steps=30, batch_size=2, learning_rate=1e-2, warmup_steps=0, lr_schedule="constant")
    with torch.inference_mode():
        result = train_lora(
            model, TrainingData([{"samples": samples}], positive), config, LoRAConfig(rank=4, lora_alpha=4.0)
        )
    assert fingerprint(model) == before
    with training_session(model) as denoiser, torch.no_grad():
        base = loss_of(denoiser, denoiser.dataset(list(samples), positive))
    with training_session(result.model) as denoiser, torch.no_grad():
        trained = loss_of(denoiser, denoiser.dataset(list(samples), positive))
    assert trained < base
