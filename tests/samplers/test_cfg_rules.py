"""The rules of classifier-free guidance as plain tensor functions: laws, and computations done another way."""

import math

import pytest
import torch

from tidetable.samplers.guidance.combine import classifier_free_guidance, rescaled_guidance
from tidetable.samplers.guidance.momentum import running_average, step_level
from tidetable.samplers.guidance.project import damp_tangential, inner, optimized_scale, projected_guidance


SHAPES = [(2, 3, 4, 4), (3, 2, 5, 4, 4), (2, 6, 7)]
each_shape = pytest.mark.parametrize("shape", SHAPES)
close = torch.testing.assert_close


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(shape):
    """Two predictions with something in common."""
    shared = normal(*shape, seed=9)
    return shared + 0.5 * normal(*shape, seed=1), 0.8 * shared + 0.5 * normal(*shape, seed=2)


RULES = {
    "cfg": lambda cond, uncond: classifier_free_guidance(cond, uncond, 4.0),
    "rescale": lambda cond, uncond: rescaled_guidance(classifier_free_guidance(cond, uncond, 4.0), cond, 0.7),
    "tcfg": damp_tangential,
    "zero star": optimized_scale,
    "apg": lambda cond, uncond: projected_guidance(cond, cond - uncond, 4.0, 0.2, 3.0),
    "momentum": lambda cond, uncond: running_average(cond - uncond, -0.5, 1.0, 1.0)[0],
}


@each_shape
@pytest.mark.parametrize("name", RULES)
def test_every_sample_is_guided_by_itself(name, shape):
    cond, uncond = pair(shape)
    together = RULES[name](cond, uncond)
    for i in range(len(cond)):
        close(RULES[name](cond[i : i + 1], uncond[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("name", RULES)
def test_how_a_sample_is_laid_out_does_not_matter(name):
    cond, uncond = pair((2, 3, 4, 4))
    got = RULES[name](cond.flatten(1), uncond.flatten(1))
    close(got, RULES[name](cond, uncond).flatten(1))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("which", ["cond", "uncond", "both"])
def test_vanishing_predictions_and_agreement_give_numbers(name, which):
    cond, uncond = pair((2, 3, 4, 4))
    cond, uncond = cond * (which == "uncond"), uncond * (which == "cond")
    assert torch.isfinite(RULES[name](cond, uncond)).all()
    assert torch.isfinite(RULES[name](uncond, uncond)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inner_products_of_large_half_precision_tensors_do_not_overflow(dtype):
    cond, uncond = (10 * normal(1, 4, 64, 64, seed=i).to(dtype) for i in range(2))
    assert inner(cond, cond).item() > torch.finfo(torch.float16).max
    for name, rule in RULES.items():
        got = rule(cond, uncond)
        assert torch.isfinite(got).all() and got.dtype == dtype, name


# ── CFG, RescaleCFG ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_scale_one_is_cond_and_scale_zero_uncond():
    cond, uncond = pair((2, 3, 4, 4))
    close(classifier_free_guidance(cond, uncond, 1.0), cond)
    assert torch.equal(classifier_free_guidance(cond, uncond, 0.0), uncond)


@each_shape
def test_rescale_zero_leaves_and_one_gives_the_deviation_of_cond(shape):
    cond, uncond = pair(shape)
    guided = classifier_free_guidance(cond, uncond, 6.0)
    assert torch.equal(rescaled_guidance(guided, cond, 0.0), guided)
    full = rescaled_guidance(guided, cond, 1.0)
    close(full.flatten(1).std(1), cond.flatten(1).std(1))
    close(rescaled_guidance(guided, cond, 0.25), 0.25 * full + 0.75 * guided)


def test_rescale_of_a_constant_is_the_constant():
    cond, flat = normal(1, 3, 4, 4), torch.full((1, 3, 4, 4), 2.0, dtype=torch.float64)
    assert torch.equal(rescaled_guidance(flat, cond, 0.7), flat)


# ── TCFG ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@each_shape
@pytest.mark.parametrize("length", [0.1, 1.0, 3.0])
def test_damping_is_the_projection_on_the_first_singular_vector(shape, length):
    cond, uncond = pair(shape)
    uncond = length * uncond
    _, _, vh = torch.linalg.svd(torch.stack([uncond, cond], 1).flatten(2), full_matrices=False)
    direction = vh[:, 0]
    expected = (uncond.flatten(1) * direction).sum(1, keepdim=True) * direction
    close(damp_tangential(cond, uncond).flatten(1), expected)


def test_damping_leaves_parallel_predictions_and_what_is_damped_is_orthogonal():
    cond, uncond = pair((2, 3, 4, 4))
    close(damp_tangential(cond, -0.3 * cond), -0.3 * cond)
    damped = damp_tangential(cond, uncond)
    close(inner(uncond - damped, damped), torch.zeros(2, 1, 1, 1, dtype=torch.float64))
    assert (inner(damped, damped) < inner(uncond, uncond)).all()


def test_damping_does_not_depend_on_the_unit_or_the_axes_of_the_scores():
    cond, uncond = pair((1, 12))
    turn = torch.linalg.qr(normal(12, 12)).Q
    close(damp_tangential(7 * cond @ turn, 7 * uncond @ turn), 7 * damp_tangential(cond, uncond) @ turn)


# ── CFG-Zero* ───────────────────────────────────────────────────────────────────────────────────────────────────────


@each_shape
def test_the_optimized_scale_leaves_the_least_distance(shape):
    cond, uncond = pair(shape)
    best = optimized_scale(cond, uncond)
    solved = [
        torch.linalg.lstsq(u.reshape(-1, 1), c.reshape(-1, 1)).solution for c, u in zip(cond, uncond, strict=True)
    ]
    close(best.flatten(), torch.stack(solved).flatten())

    def distance(scale):
        return inner(cond - scale * uncond, cond - scale * uncond)

    assert (distance(best) < distance(best + 0.01)).all() and (distance(best) < distance(best - 0.01)).all()


def test_the_optimized_scale_of_a_multiple_is_its_factor():
    _, uncond = pair((2, 3, 4, 4))
    close(optimized_scale(1.7 * uncond, uncond), torch.full((2, 1, 1, 1), 1.7, dtype=torch.float64))


# ── APG ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@each_shape
def test_eta_one_without_a_threshold_is_cfg_and_scale_one_is_cond(shape):
    cond, uncond = pair(shape)
    close(projected_guidance(cond, cond - uncond, 5.0, 1.0), classifier_free_guidance(cond, uncond, 5.0))
    assert torch.equal(projected_guidance(cond, cond - uncond, 1.0, 0.3, 2.0), cond)


@each_shape
def test_eta_weighs_the_part_along_cond_alone(shape):
    cond, uncond = pair(shape)
    moves = {eta: projected_guidance(cond, cond - uncond, 5.0, eta) - cond for eta in (0.0, 0.4, 1.0)}
    close(inner(moves[0.0], cond), torch.zeros_like(inner(cond, cond)), atol=1e-9, rtol=0.0)
    close(inner(moves[0.4], cond), 0.4 * inner(moves[1.0], cond))
    along = cond.flatten(1) / cond.flatten(1).norm(dim=1, keepdim=True)  # the projector written out
    matrix = torch.eye(along.shape[1], dtype=along.dtype) - along[:, :, None] * along[:, None, :]
    close(moves[0.0].flatten(1), 4.0 * (matrix @ (cond - uncond).flatten(1)[:, :, None])[:, :, 0])


@each_shape
def test_the_threshold_shortens_only_what_is_longer(shape):
    cond, uncond = pair(shape)
    update = cond - uncond
    length = inner(update, update).sqrt()
    update[0] *= 0.1 / length[0]
    update[1:] *= 9.0 / length[1:]
    moved = projected_guidance(cond, update, 2.0, 1.0, 2.0) - cond
    close(moved[:1], update[:1])
    close(moved[1:], update[1:] * 2.0 / 9.0)


# ── momentum ────────────────────────────────────────────────────────────────────────────────────────────────────────


GRID = [8.0, 4.0, 2.0, 1.0, 0.0]


def walk(sigmas, momentum=-0.5):
    """Running averages of the numbers 1, 10, 100, … at these calls."""
    past, averages = (), []
    for i, sigma in enumerate(sigmas):
        value = torch.tensor([10.0**i], dtype=torch.float64)
        average, past = running_average(value, momentum, sigma, step_level(sigma, GRID), past)
        averages.append(average.item())
    return averages


def test_one_call_a_step_is_the_recursion_of_the_paper():
    assert walk([8.0, 4.0, 2.0, 1.0]) == [1.0, 9.5, 95.25, 952.375]
    assert walk([8.0, 4.0], momentum=0.0) == [1.0, 10.0]


def test_momentum_is_the_sum_of_decaying_steps():
    got = walk([8.0, 4.0, 2.0, 1.0], 0.3)
    assert got == pytest.approx([sum(10.0**j * 0.3 ** (i - j) for j in range(i + 1)) for i in range(4)])


def test_a_second_call_at_the_next_level_counts_as_part_of_that_step():
    """Heun: 8, then 4 twice, then 2 twice. A step that was looked at ahead is replaced when it is reached."""
    averages = walk([8.0, 4.0, 4.0, 2.0, 2.0])
    assert averages == [1.0, 10 - 0.5, 100 - 0.5, 1000 - 0.5 * 99.5, 10000 - 0.5 * 99.5]


def test_calls_between_two_levels_use_the_steps_before_and_leave_no_trace():
    averages = walk([8.0, 6.0, 4.0, 3.0, 2.0])
    assert averages == [1.0, 10.0, 100 - 0.5, 1000 - 0.5, 10000 - 0.5 * 99.5]


def test_going_back_up_forgets_what_came_after():
    averages = walk([8.0, 4.0, 2.0, 4.0, 2.0])  # as heunpp2 looks two steps ahead
    assert averages[3:] == [1000 - 0.5, 10000 - 0.5 * 999.5]
    assert walk([8.0, 4.0, 8.0])[2] == 100.0


@pytest.mark.parametrize(
    ("sigma", "level"), [(8.0, 8.0), (9.0, 9.0), (7.9, 8.0), (4.0, 4.0), (4.0 * (1 + 1e-7), 4.0), (0.5, 1.0)]
)
def test_the_level_of_a_call_is_where_its_step_begins(sigma, level):
    assert math.isclose(step_level(sigma, GRID), level, rel_tol=1e-6)
