"""Networks that nobody tested: proven on the first batch or refused. And MODELs that others have been at."""

import logging

import comfy.hooks
import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_torch_compile

from tidetable.runtime import tiny
from tidetable.runtime.gradients import unproven
from tidetable.runtime.training import TrainingData, train_lora
from tidetable.tests.host.comparing import fingerprint, inference_copy
from tidetable.tests.host.gradient_cases import network_of, prompts_of, samples_of
from tidetable.tests.host.guidance_families import CASES, is_there
from tidetable.tests.host.guidance_models import normal, prompt
from tidetable.training.adapter_settings import AdapterConfig
from tidetable.training.config import LoRAConfig, TrainConfig
from tidetable.training.memory import MemoryConfig


CONFIG = TrainConfig(steps=3, batch_size=2, learning_rate=1e-3, warmup_steps=0, seed=3)
LORA = LoRAConfig(rank=4, lora_alpha=4.0)
DATA = TrainingData([{"samples": normal(2, 3, 16, 16)}], [prompt(1), prompt(2)])


def model_of(**methods):
    """A tiny MMDiT; with methods, as a class of its own."""
    model = inference_copy(tiny.load_tiny_model("mmdit-flow"))
    if methods:
        network = model.model.diffusion_model
        network.__class__ = type("UnheardOf", (type(network),), methods)
    return model


def train(model, data=DATA, **settings):
    with torch.inference_mode():
        return train_lora(model, data, CONFIG, LORA, **settings)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class Wrong(torch.autograd.Function):
    """x, whose gradient is a third too small."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 1.5


def between_blocks(change):
    """A forward that changes what goes into the last block."""

    def forward(self, *args, **kwargs):
        def pre(block, args, kwargs):
            return tuple(change(a) for a in args), kwargs

        handle = self.joint_blocks[-1].register_forward_pre_hook(pre, with_kwargs=True)
        try:
            return type(self).__mro__[1].forward(self, *args, **kwargs)
        finally:
            handle.remove()

    return forward


@pytest.mark.parametrize("checkpointing", ["off", "blocks"])
def test_an_unknown_network_with_right_gradients_is_trained_to_the_same_bits(checkpointing, caplog):
    memory = MemoryConfig(gradient_checkpointing=checkpointing)
    with caplog.at_level(logging.INFO):
        unknown = train(model_of(forward=between_blocks(lambda x: x * 1.0)), memory=memory)
    assert "UnheardOf is not among the networks that are tested" in caplog.text
    assert "slopes differs by" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        known = train(model_of(), memory=memory)
    assert "slopes" not in caplog.text
    assert same(unknown.lora, known.lora)


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_the_proof_holds_for_every_kind_of_adapter(kind):
    adapter = AdapterConfig(kind=kind, rank=4, lora_alpha=4.0)
    assert train(model_of(forward=between_blocks(lambda x: x * 1.0)), adapter=adapter).lora


def test_the_proof_holds_in_bfloat16(caplog):
    model = model_of(forward=between_blocks(lambda x: x * 1.0))
    model.set_model_compute_dtype(torch.bfloat16)
    with caplog.at_level(logging.INFO):
        assert train(model).lora
    assert "slopes differs by" in caplog.text


BAD = {
    "a wrong backward": (Wrong.apply, r"the worst of \d+ slopes differs by \d+ %"),
    "no backward": (torch.Tensor.detach, r"weights without a gradient \(\d+ tensors\) change the loss"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_unknown_network_with_wrong_gradients_is_refused(case):
    change, message = BAD[case]
    model = model_of(forward=between_blocks(change))
    before = fingerprint(model)
    with pytest.raises(ValueError, match="UnheardOf is not among the networks that are tested .*" + message):
        train(model)
    assert fingerprint(model) == before


@pytest.mark.skipif(not is_there(CASES["anima"]), reason="this ComfyUI has no Anima")
def test_a_fused_kernel_without_a_backward_is_refused_by_name():
    model = network_of("anima")
    before = fingerprint(model)
    data = TrainingData([{"samples": samples_of("anima")}], prompts_of("anima"))
    with pytest.raises(ValueError, match="Anima is not among .* gradients are wrong: .*comfy_kitchen"):
        train(model, data)
    assert fingerprint(model) == before


def test_an_attention_that_may_have_no_backward_makes_every_network_unproven(monkeypatch):
    network = model_of().model.diffusion_model
    assert not unproven(network)
    monkeypatch.setattr(host_attention, "optimized_attention", host_attention.attention_sage)
    assert "attention_sage" in unproven(network)


# ── MODELs with something on them ───────────────────────────────────────────────────────────────────────────────────


def test_comfyuis_own_compile_node_changes_nothing_in_training():
    model = model_of()
    with torch.inference_mode():
        compiled = nodes_torch_compile.TorchCompileModel.execute(model, "inductor").args[0]
    before, wrappers = fingerprint(compiled), compiled.get_all_wrappers(WrappersMP.APPLY_MODEL)
    assert wrappers, "nothing was compiled: nothing is tested"
    result = train(compiled)
    assert same(result.lora, train(model).lora)
    assert fingerprint(compiled) == before
    assert result.model.get_all_wrappers(WrappersMP.APPLY_MODEL) == wrappers


@pytest.mark.parametrize("place", ["diffusion_model", "diffusion_model.joint_blocks.0"])
def test_a_compiled_network_in_place_of_the_model_is_refused(place):
    model = model_of()
    model.add_object_patch(place, torch.compile(model.get_model_object(place)))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"torch.compile of {place}.*connect the MODEL as it is before that node"):
        train(model)
    assert fingerprint(model) == before


def test_somebody_elses_hook_is_trained_through_and_stays():
    model, calls = model_of(), []
    layer = model.model.diffusion_model.joint_blocks[0].x_block.mlp
    handle = layer.register_forward_hook(lambda _, __, out: calls.append(torch.is_grad_enabled()) or 1.5 * out)
    before = fingerprint(model)
    result = train(model)
    assert True in calls and fingerprint(model) == before
    handle.remove()
    assert not same(result.lora, train(model).lora)


def test_hooks_on_the_conditioning_are_refused():
    hooked = [[prompt(1)[0][0], {**prompt(1)[0][1], "hooks": comfy.hooks.HookGroup()}]]
    model = model_of()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="a training conditioning cannot carry hooks"):
        train(model, TrainingData(DATA.latents, [hooked, prompt(2)]))
    assert fingerprint(model) == before


def test_recomputed_blocks_train_on_top_of_another_lora():
    model = model_of()
    before = fingerprint(model)
    first = train(model)
    modes = ("off", "blocks")
    plain, saving = (train(first.model, memory=MemoryConfig(gradient_checkpointing=mode)) for mode in modes)
    for key, value in plain.lora.items():
        assert torch.allclose(saving.lora[key], value, rtol=1e-4, atol=1e-6)
    assert not same(plain.lora, first.lora)
    comfy.model_management.unload_all_models()
    # ComfyUI's own patching and unpatching makes new tensors, with requires_grad False, of the weights it swapped.
    ignored = {"requires_grad": 0, "inference": 0}
    assert {**fingerprint(model), **ignored} == {**before, **ignored}


def test_a_model_with_recomputed_blocks_is_as_before_after_an_error(monkeypatch):
    from tidetable.training import engine

    model = model_of()
    before = fingerprint(model)
    monkeypatch.setattr(engine.Trainer, "_clip_gradients", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(model, memory=MemoryConfig(gradient_checkpointing="blocks"))
    assert fingerprint(model) == before
