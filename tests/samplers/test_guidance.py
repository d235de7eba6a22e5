"""Guidance rules and perturbations as plain tensor functions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tidetable.samplers.guidance.combine import perturbed_guidance
from tidetable.samplers.guidance.interval import Interval
from tidetable.samplers.guidance.perturb import flagged_rows, identity_attention


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax_attention(q, k, v):
    """One head over [B, N, C]; `v` may have its heads apart, as [B, N, 1, C]."""
    return torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1) @ v.flatten(2)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 5, 4, 4), (1, 6, 7)])
def test_scale_zero_and_agreement_leave_the_prediction(shape):
    denoised, cond, perturbed = (normal(*shape, seed=i) for i in range(3))
    assert torch.equal(perturbed_guidance(denoised, cond, perturbed, 0.0), denoised)
    assert torch.equal(perturbed_guidance(denoised, cond, cond, 7.0), denoised)


def test_guidance_is_linear_in_scale_and_starts_from_the_result_so_far():
    denoised, cond, perturbed = (normal(2, 3, 4, 4, seed=i) for i in range(3))
    one, three = (perturbed_guidance(denoised, cond, perturbed, scale) for scale in (1.0, 3.0))
    torch.testing.assert_close(three - denoised, 3 * (one - denoised))
    torch.testing.assert_close(perturbed_guidance(one, cond, perturbed, 2.0), three)


def test_guidance_without_cfg_extrapolates_from_perturbed_through_cond():
    cond, perturbed = normal(1, 2, seed=1), normal(1, 2, seed=2)
    torch.testing.assert_close(perturbed_guidance(cond, cond, perturbed, 3.0), perturbed + 4.0 * (cond - perturbed))


@pytest.mark.parametrize("heads_apart", [False, True])
def test_identity_attention_equals_attention_with_the_identity_as_map(heads_apart):
    q, k, v = (normal(3, 7, 4, seed=i) for i in range(3))
    rows, text = [slice(1, 2)], 3
    maps = torch.softmax(q @ k.transpose(1, 2) / 2.0, -1)
    maps[1, text:] = torch.eye(7, dtype=torch.float64)[text:]  # picture tokens see themselves, text tokens everything
    values = v.unflatten(2, (1, 4)) if heads_apart else v
    got = identity_attention(lambda q: softmax_attention(q, k, values), q, values, rows, slice(text, None))
    torch.testing.assert_close(got, maps @ v)


def test_identity_attention_leaves_other_rows_bit_for_bit_and_writes_into_nothing():
    q, k, v = (normal(4, 6, 8, seed=i) for i in range(3))
    plain = softmax_attention(q, k, v)
    kept = plain.clone(), v.clone()
    got = identity_attention(lambda _: plain, q, v, [slice(0, 1), slice(3, 4)])
    assert torch.equal(got[1:3], plain[1:3]) and torch.equal(got[[0, 3]], v[[0, 3]])
    assert torch.equal(plain, kept[0]) and torch.equal(v, kept[1])


def test_identity_attention_of_everything_needs_no_attention():
    v = normal(4, 6, 8)

    def attention(*_):
        raise AssertionError("not needed")

    for tokens in (slice(None), slice(0, 6)):
        assert torch.equal(identity_attention(attention, v, v, [slice(0, 2), slice(2, 4)], tokens), v)


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 5))
def test_flagged_rows_are_the_rows_of_the_flagged_chunks(flags, size):
    rows = flagged_rows(size * len(flags), flags)
    chosen = torch.zeros(size * len(flags), dtype=torch.bool)
    for row in rows:
        chosen[row] = True
    assert chosen.tolist() == [flag for flag in flags for _ in range(size)]


def test_flagged_rows_of_a_batch_that_is_not_made_of_chunks():
    with pytest.raises(ValueError, match="7 rows.*3 chunks"):
        flagged_rows(7, [True, False, False])


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_interval_contains_exactly_the_percents_between_its_ends(a, b, percent):
    if a == b:
        return
    interval = Interval(min(a, b), max(a, b))
    assert interval.contains(-percent, lambda p: -p) == (min(a, b) <= percent <= max(a, b))


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (math.nan, 1.0, "start_percent.*nan"),
        (0.0, math.inf, "end_percent.*inf"),
        (-0.1, 1.0, "start_percent.*-0.1"),
        (0.0, 100.0, "end_percent.*100"),
        (0.5, 0.5, "0.5 is not below.*scale to 0"),
        (0.8, 0.2, "0.8 is not below"),
    ],
)
def test_interval_refuses_what_makes_no_sense(start, end, message):
    with pytest.raises(ValueError, match=message):
        Interval(start, end)
