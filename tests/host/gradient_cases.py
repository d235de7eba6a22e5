"""For the gradient tests: tiny networks of ComfyUI's own classes with an adapter, a batch, and ways to measure them."""

from contextlib import contextmanager

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tidetable.runtime.trainable import training_session
from tidetable.tests.host.comparing import inference_copy
from tidetable.tests.host.guidance_cases import CASES, TEXT, Case
from tidetable.tests.host.guidance_families import CASE_PARAMETERS, build_network
from tidetable.tests.host.guidance_models import normal
from tidetable.training.adapters import LoRANetwork, select_targets
from tidetable.training.config import LoRAConfig
from tidetable.training.objective import loss_for_batch


LTXV = {
    "image_model": "ltxv",
    "in_channels": 128,
    "cross_attention_dim": 96,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "caption_channels": 32,
    "num_layers": 2,
}
_MASK = {"attention_mask": torch.ones(1, TEXT, dtype=torch.long)}
NETWORKS = {**CASES, "ltxv": Case("LTXV", LTXV, (2, 128, 2, 4, 6), "", lambda network: [], _MASK)}
PARAMETERS = [*CASE_PARAMETERS, pytest.param("ltxv")]


def network_of(name, **network):
    """The family's MODEL, its weights inference tensors as ComfyUI's loaders make them."""
    with torch.inference_mode():
        return inference_copy(build_network(NETWORKS[name], **network))


def samples_of(name, tiles=1):
    """Two latents of the family, `tiles` times as wide and as high as in its other tests."""
    *others, height, width = NETWORKS[name].latent
    return normal(*others, tiles * height, tiles * width, seed=5)


def prompts_of(name):
    options = NETWORKS[name].options
    return [
        [[normal(1, TEXT, 32, seed=seed), {"pooled_output": normal(1, 32, seed=seed + 100), **options}]]
        for seed in (1, 2)
    ]


def adapters(denoiser, scale=0.1, targets="linear"):
    layers = select_targets(dict(denoiser.real.diffusion_model.named_modules()), targets)
    network = LoRANetwork(layers, LoRAConfig(rank=2, lora_alpha=2.0), denoiser.device)
    generator = torch.Generator().manual_seed(2)
    for adapter in network.adapters.values():
        adapter.up.data = scale * torch.randn(adapter.up.shape, generator=generator)
    return network


def loss_of(denoiser, dataset):
    x0 = torch.stack(list(dataset.latents))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    t = denoiser.snap(torch.tensor((0.3, 0.8), dtype=torch.float64))
    return loss_for_batch(denoiser, x0, dataset.conditions, eps, t).mean()


@contextmanager
def prepared(name, model=None, tiles=1, scale=0.1, **network):
    """(denoiser, adapters, loss) of a family inside a session."""
    with training_session(model or network_of(name, **network)) as denoiser:
        dataset, trained = denoiser.dataset(list(samples_of(name, tiles)), prompts_of(name)), adapters(denoiser, scale)
        with trained.installed():
            yield denoiser, trained, lambda: loss_of(denoiser, dataset)


def gradients(denoiser, trained, loss):
    with denoiser.gradient_context():
        loss().backward()
    found = [p.grad for p in trained.trainable()]
    for p in trained.trainable():
        p.grad = None
    return found


class PeakMemory(TorchDispatchMode):
    """The largest number of bytes of tensors that were alive at once among those made inside."""

    def __init__(self):
        super().__init__()
        self.alive, self.total, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.total += storage.nbytes()
        if self.total > self.peak:  # as if nothing had been freed: look closer
            self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
            self.total = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.total)
        return result
