"""For the guidance tests: one tiny MODEL of every family, by ComfyUI's own classes, and how to weaken it by hand.

Families that the running ComfyUI does not have are skipped, visibly.
"""

import contextlib
import importlib
from typing import Any

import comfy.model_patcher
import comfy.supported_models
import pytest
import torch

from tidetable.tests.host.guidance_cases import CASES, TEXT, Case
from tidetable.tests.host.guidance_models import SCALE, evaluate, normal


def is_there(case: Case) -> bool:
    if case.module:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(case.module)
            return True
        return False
    return hasattr(comfy.supported_models, case.config)


CASE_PARAMETERS = [
    pytest.param(name, marks=pytest.mark.skipif(not is_there(case), reason=f"this ComfyUI has no {case.config}"))
    for name, case in CASES.items()
]


def build_case(name: str, **network: Any) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of the family with random weights of unit gain, so that every layer has an effect on the output."""
    return build_network(CASES[name], **network)


def build_network(case: Case, **network: Any) -> comfy.model_patcher.ModelPatcher:
    config = getattr(comfy.supported_models, case.config)({**case.network, **network})
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    model = config.get_model({}, "", device=cpu)
    for i, (key, p) in enumerate(model.diffusion_model.named_parameters()):
        random = normal(*p.shape, seed=i)
        fan_in = p[0].numel() if p.ndim > 1 else 1
        p.data.copy_(random / fan_in**0.5 if p.ndim > 1 else 0.1 * random + (0.0 if key.endswith("bias") else 1.0))
    model.requires_grad_(False).eval()
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def prompt_for(name: str, seed: int, tokens: int = TEXT, **options: Any) -> list:
    pooled = normal(1, 32, seed=seed + 100)
    return [[normal(1, tokens, 32, seed=seed), {"pooled_output": pooled, **CASES[name].options, **options}]]


def conds_for(name: str, **options: Any) -> dict:
    positive, negative = (prompt_for(name, seed, **options) for seed in (1, 2))
    return {"positive": positive, "negative": negative, "shape": CASES[name].latent}


def expected_for(name: str, model: Any, guided: torch.Tensor, tokens: slice | None = None, **conds: Any):
    """guided + SCALE · (cond − perturbed), both from plain evaluations of cond alone, weakened by hand."""
    cond = evaluate(model, cfg=1.0, **conds)
    with values_for(name, model, tokens):
        perturbed = evaluate(model, cfg=1.0, **conds)
    assert (cond - perturbed).abs().mean() > 1e-3 * cond.abs().mean()  # otherwise nothing would be tested
    return guided + SCALE * (cond - perturbed)


@contextlib.contextmanager
def values_for(name: str, model: Any, tokens: slice | None = None):
    """Every row weakened without the node: the layer after attention is handed v for the picture, by hooks.

    `tokens` are the picture's where they are not the usual ones.
    """
    handles = []
    for tap in CASES[name].taps(model.model.diffusion_model):
        kept = {}

        def give(_, args, tap=tap, kept=kept, picture=tokens or tap.tokens):
            x = args[0].clone()
            v = tap.read(kept["v"]) * tap.gate()
            x[:, picture, : v.shape[-1]] = v[:, picture]
            return (x, *args[1:])

        handles.append(tap.source.register_forward_hook(lambda _, __, out, kept=kept: kept.update(v=out)))
        handles.append(tap.after.register_forward_pre_hook(give))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
