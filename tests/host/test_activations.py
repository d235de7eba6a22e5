"""Activations in main memory: the same bits, everything large but the weights is sent, once, and comes back."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from tidetable.runtime.gradients import memory_saving
from tidetable.runtime.sharding import _shared
from tidetable.runtime.training import TrainingData, train_lora
from tidetable.tests.host.comparing import fingerprint
from tidetable.tests.host.gradient_cases import gradients, network_of, prepared, prompts_of, samples_of
from tidetable.training import activations
from tidetable.training.activations import Away, Offload
from tidetable.training.config import LoRAConfig, TrainConfig
from tidetable.training.distributed import PATIENCE
from tidetable.training.memory import MemoryConfig


FAMILIES = ("flux", "sd3", "sdxl")
LEAST = 2048


@pytest.fixture
def sent(monkeypatch):
    """(bytes of its memory, where it is, what was kept of it) of all that is saved; a threshold for tiny networks."""
    calls, keep = [], Offload.keep

    def spy(self, tensor):
        kept, storage = keep(self, tensor), tensor.untyped_storage()
        calls.append((storage.nbytes(), storage.data_ptr(), kept))
        return kept

    monkeypatch.setattr(activations, "LEAST_BYTES", LEAST)
    monkeypatch.setattr(Offload, "keep", spy)
    return calls


def gone(kept):
    return isinstance(kept, Away) and kept.held.away


def memory(checkpointing):
    return MemoryConfig(gradient_checkpointing=checkpointing, offload_activations=True)


@pytest.mark.parametrize("checkpointing", ["off", "blocks"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_same_bits_and_the_weights_stay(name, checkpointing, sent):
    model = network_of(name)
    before = fingerprint(model)
    with prepared(name, model) as (denoiser, trained, loss):
        network = denoiser.real.diffusion_model
        with memory_saving(network, MemoryConfig(gradient_checkpointing=checkpointing)):
            plain = gradients(denoiser, trained, loss)
        assert not sent
        own = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *trained.trainable())}
        with memory_saving(network, memory(checkpointing)):
            again = gradients(denoiser, trained, loss)
        with memory_saving(network, memory(checkpointing)), torch.no_grad():
            count = len(sent)
            loss()
            assert len(sent) == count
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    away = [(size, storage) for size, storage, kept in sent if gone(kept)]
    large = [(size, storage) for size, storage, _ in sent if size >= LEAST and storage not in own]
    assert away == large and len(away) > 5, "all that is large and no weight"
    if checkpointing == "off":
        assert [1 for size, storage, _ in sent if storage in own and size >= LEAST], "weights came by and stayed"
    assert fingerprint(model) == before


def test_recomputed_blocks_keep_their_inputs_only(sent):
    sizes = {}
    for checkpointing in ("off", "blocks"):
        with prepared("sd3", num_blocks=6) as (denoiser, trained, loss), ExitStack() as stack:
            stack.enter_context(memory_saving(denoiser.real.diffusion_model, memory(checkpointing)))
            gradients(denoiser, trained, loss)
        kept = {id(away.held): len(away.held.copy) for _, _, away in sent if gone(away)}
        sizes[checkpointing] = sum(kept.values())
        sent.clear()
    assert sizes["blocks"] < 0.4 * sizes["off"]


def test_views_of_one_memory_go_and_come_once_with_their_strides():
    store, x = Offload(), torch.arange(24.0).reshape(4, 6)
    views = [x, x.t(), x[:, 2:4], x[1:2].expand(3, 6)]
    kept = [store.keep(view) for view in views]
    assert len({id(away.held) for away in kept}) == 1
    returned = [store.back(away) for away in kept]
    assert len({tensor.data_ptr() - 4 * tensor.storage_offset() for tensor in returned}) == 1
    for tensor, view in zip(returned, views, strict=True):
        assert torch.equal(tensor, view) and tensor.stride() == view.stride()
    x += 1
    later = store.keep(x)
    assert later.held is not kept[0].held
    assert torch.equal(store.back(later), x) and torch.equal(store.back(kept[0]) + 1, x)
    conjugated = torch.randn(3, dtype=torch.complex64).conj()
    assert torch.equal(store.back(store.keep(conjugated)), conjugated)


def test_a_run_learns_the_same_bits(monkeypatch):
    monkeypatch.setattr(activations, "LEAST_BYTES", LEAST)
    data = TrainingData([{"samples": samples_of("flux")}], prompts_of("flux"))
    config = TrainConfig(steps=4, batch_size=2, learning_rate=1e-3, warmup_steps=0, seed=3)
    blocks = MemoryConfig(gradient_checkpointing="blocks")
    small = replace(blocks, base_weights="offload")
    pairs = ((None, memory("off")), (blocks, memory("blocks")), (small, replace(small, offload_activations=True)))
    for pair in pairs:
        plain, other = (
            train_lora(network_of("flux"), data, config, LoRAConfig(rank=2, lora_alpha=2.0), memory=settings).lora
            for settings in pair
        )
        assert all(torch.equal(plain[key], other[key]) for key in plain)


def test_gathered_weights_would_be_sent_and_are_refused():
    with prepared("sd3") as (denoiser, _, _):
        shared = _shared(denoiser, memory("off"), "turn shard_base off", PATIENCE)
        with pytest.raises(ValueError, match="offload_activations would send the weights .* or turn shard_base off"):
            shared.__enter__()
