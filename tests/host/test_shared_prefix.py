"""Blocks before the perturbed one, computed once: the same predictions at fewer FLOPs, or the ordinary way."""

import pytest
import torch

from tidetable.runtime.guidance import perturbed_attention
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
    expected_guidance,
    prompt,
)


SHARED = [(4, [1, 0]), (2, [0])]  # cond and uncond, then the copy alone
BATCHED = [(6, [0, 1, 0])]


def node(model, shared_prefix="on", scale=3.0, **options):
    return perturbed_attention(
        model, scale, **{"start_percent": 0.0, "end_percent": 1.0, **options}, sharing=shared_prefix
    )


# ── the same predictions ────────────────────────────────────────────────────────────────────────────────────────────


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
    options = {key: value for key, value in CONDS[case].items() if key != "cfg"}
    expected = expected_guidance(model, evaluate(model, **CONDS[case]), **options)
    (plain, plain_calls), (guided, calls) = counted(model), counted(node(model))
    evaluate(plain, **CONDS[case])
    assert_close(evaluate(guided, **CONDS[case]), expected)
    assert calls[: len(plain_calls)] == plain_calls
    copies = calls[len(plain_calls) :]
    assert copies and not any(kind for _, kinds in copies for kind in kinds)


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
