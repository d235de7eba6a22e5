"""Laws of the perturbations, of rescaling and of when guidance acts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from tidetable.samplers.guidance.combine import perturbed_guidance, relative_difference, rescaled_perturbed_guidance
from tidetable.samplers.guidance.interval import decayed, step_of
from tidetable.samplers.guidance.perturb import (
    Picture,
    blur,
    blur_matrix,
    blurred_query_attention,
    permutations_at,
    shuffled_attention,
    skipped_block,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax_attention(q, k, v):
    return torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1) @ v


# ── blurred queries ─────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 12), st.floats(0.05, 200.0))
def test_blur_weights_are_symmetric_and_sum_to_one_on_both_sides(size, sigma):
    weights = blur_matrix(size, sigma)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights, weights.T)
    torch.testing.assert_close(weights.sum(0), torch.ones(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 7])
def test_blur_goes_from_the_identity_to_the_mean(size):
    mean = torch.full((size, size), 1.0 / size, dtype=torch.float64)
    assert torch.equal(blur_matrix(size, math.inf), mean)
    torch.testing.assert_close(blur_matrix(size, 9.999 * size), mean)  # the limit is reached before it is assumed
    torch.testing.assert_close(blur_matrix(size, 0.05), torch.eye(size, dtype=torch.float64))
    assert torch.equal(blur_matrix(size, 0.0), torch.eye(size, dtype=torch.float64))


def test_blurs_after_each_other_add_their_variances():
    torch.testing.assert_close(blur_matrix(9, 3.0) @ blur_matrix(9, 4.0), blur_matrix(9, 5.0))


@pytest.mark.parametrize("sigma", [0.8, 2.0, 7.0])
def test_blur_is_scipys_with_mirrored_edges_frame_by_frame(sigma):
    grid = (3, 6, 9)
    x = torch.randn(2, 3 * 6 * 9, 4, generator=torch.Generator().manual_seed(1))
    frames = x.double().reshape(2, *grid, 4).numpy()
    expected = gaussian_filter(frames, (0, 0, sigma, sigma, 0), mode="reflect", truncate=12)
    torch.testing.assert_close(blur(x, grid, sigma), torch.from_numpy(expected).reshape(x.shape).float())


def test_infinite_blur_gives_every_query_the_mean_of_its_frame_and_halves_stay_halves():
    x = torch.randn(2, 2 * 3 * 4, 8, generator=torch.Generator().manual_seed(1))
    means = x.unflatten(1, (2, 12)).mean(2, keepdim=True).expand(-1, -1, 12, -1).flatten(1, 2)
    torch.testing.assert_close(blur(x, (2, 3, 4), math.inf), means)
    assert blur(x.half(), (2, 3, 4), 1.0).dtype == torch.half


@pytest.mark.parametrize("heads_apart", [False, True])
def test_blurred_queries_change_only_the_pictures_results_in_the_chosen_rows(heads_apart):
    q, k, v = (normal(3, 8, 4, seed=i) for i in range(3))
    picture, rows = Picture(slice(2, None), (1, 2, 3)), [slice(1, 2)]

    def attention(q):
        return softmax_attention(q.flatten(2), k, v)

    got = blurred_query_attention(attention, q.unflatten(2, (2, 2)) if heads_apart else q, rows, picture, math.inf)
    plain = attention(q)
    mean = q[1:2, 2:].mean(1, keepdim=True).expand(-1, 6, -1)
    # The blur itself is computed in single precision.
    torch.testing.assert_close(got[1:2, 2:], softmax_attention(mean, k[1:2], v[1:2]), atol=1e-6, rtol=1e-6)
    assert torch.equal(got[[0, 2]], plain[[0, 2]])
    torch.testing.assert_close(got[1, :2], plain[1, :2])


# ── shuffled tokens ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_shuffling_the_results_is_what_shuffled_tokens_give():
    """Self-attention of tokens in another order is its result in that order; here for the picture's tokens alone."""
    tokens, rows = slice(2, None), [slice(1, 2)]
    x = normal(3, 8, 4)
    permutation = torch.randperm(6, generator=permutations_at(0.5))
    shuffled = x.clone()
    shuffled[1, 2:] = x[1, 2:][permutation]
    got = shuffled_attention(lambda q: softmax_attention(q, x, x), x, rows, tokens, permutation)
    torch.testing.assert_close(got, softmax_attention(shuffled, shuffled, shuffled))


def test_permutations_depend_on_the_noise_level_alone():
    first, again, other = (torch.randperm(64, generator=permutations_at(s)) for s in (0.7, 0.7, 0.7000001))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ── skipped blocks ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_skipped_block_keeps_the_rows_and_writes_into_nothing():
    before, output = normal(4, 6, 8), normal(4, 6, 8, seed=1)
    plain = output.clone()
    got = skipped_block(output, [before[1:2], before[3:4]], [slice(1, 2), slice(3, 4)])
    assert torch.equal(got[[1, 3]], before[[1, 3]]) and torch.equal(got[[0, 2]], plain[[0, 2]])
    assert torch.equal(output, plain)


# ── rescale ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 5, 8, 8)])
def test_rescale_zero_is_plain_guidance_and_it_is_linear_in_rescale(shape):
    denoised, cond, perturbed = (normal(*shape, seed=i) for i in range(3))
    plain = rescaled_perturbed_guidance(denoised, cond, perturbed, 3.0, 0.0)
    assert torch.equal(plain, perturbed_guidance(denoised, cond, perturbed, 3.0))
    for mode in ("full", "partial"):
        half, whole = (rescaled_perturbed_guidance(denoised, cond, perturbed, 3.0, r, mode) for r in (0.5, 1.0))
        torch.testing.assert_close(half, (plain + whole) / 2)


@pytest.mark.parametrize("mode", ["full", "partial"])
def test_whole_rescale_shrinks_the_term_by_the_ratio_of_the_spreads(mode):
    denoised, cond, perturbed = (normal(2, 3, 8, 8, seed=i) for i in range(3))
    guided = rescaled_perturbed_guidance(denoised, cond, perturbed, 3.0, 1.0, mode)
    for i in range(2):  # by itself for each sample
        term = 3.0 * (cond[i] - perturbed[i])
        whole = (denoised[i] if mode == "full" else cond[i]) + term
        torch.testing.assert_close(guided[i] - denoised[i], term * cond[i].std() / whole.std())


def test_rescale_without_cfg_is_the_same_in_both_modes_and_agreement_needs_none():
    cond, perturbed = normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1)
    full, partial = (rescaled_perturbed_guidance(cond, cond, perturbed, 3.0, 0.7, mode) for mode in ("full", "partial"))
    assert torch.equal(full, partial)
    assert torch.equal(rescaled_perturbed_guidance(cond, cond, cond, 3.0, 1.0), cond)
    flat = torch.zeros_like(cond)
    assert torch.equal(rescaled_perturbed_guidance(flat, flat, flat, 3.0, 1.0), flat)


def test_relative_difference_is_a_fraction_of_the_prediction():
    cond = normal(2, 3, 8, 8)
    assert relative_difference(cond, 0.75 * cond) == pytest.approx(0.25)
    assert relative_difference(100.0 * cond, 75.0 * cond) == pytest.approx(0.25)


# ── when ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_steps_begin_at_their_sigma_and_reach_down_to_the_next():
    sigmas = [8.0, 4.0, 2.0, 1.0, 0.0]
    assert [step_of(s, sigmas) for s in sigmas[:-1]] == [0, 1, 2, 3]
    assert [step_of(s, sigmas) for s in (9.0, 6.0, 4.00001, 3.0, 0.3)] == [0, 0, 1, 1, 3]


@given(st.floats(-10, 10), st.floats(0, 5))
def test_decay_falls_from_one_to_zero_and_zero_is_constant(log_snr, decay):
    weight = decayed(log_snr, -8.0, 8.0, decay)
    assert 0.0 <= weight <= 1.0
    assert decayed(log_snr, -8.0, 8.0, 0.0) == 1.0
    assert decayed(-8.0, -8.0, 8.0, decay) == 1.0
    assert decayed(8.0, -8.0, 8.0, decay + 0.1) == 0.0
    assert decayed(log_snr + 0.5, -8.0, 8.0, decay) <= weight
    assert decayed(log_snr, 8.0, 8.0, decay) == 1.0


def test_decay_one_is_linear_in_log_snr():
    assert [decayed(x, -6.0, 2.0, 1.0) for x in (-6.0, -4.0, -2.0, 2.0)] == pytest.approx([1.0, 0.75, 0.5, 0.0])
