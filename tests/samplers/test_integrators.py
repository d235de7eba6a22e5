"""The integrators against a Gaussian mixture, whose denoiser, ODE and distribution are known exactly."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tidetable.samplers import SAMPLERS, require_sampler, sample
from tidetable.samplers.dpm_solver import fast_orders
from tidetable.samplers.euler import churned
from tidetable.samplers.multistep import adams_bashforth_weights
from tidetable.samplers.steps import SPACES, Guided, split_step
from tidetable.tests.gaussians import sliced_wasserstein, toy_mixture


MIXTURE = toy_mixture()
CONDITIONAL = MIXTURE.subset([0, 1])
each_space = pytest.mark.parametrize("space", SPACES.values(), ids=list(SPACES))
each_sampler = pytest.mark.parametrize("name", SAMPLERS)
STOCHASTIC = [name for name, spec in SAMPLERS.items() if spec.stochastic]
WITH_ETA = [name for name, spec in SAMPLERS.items() if "eta" in spec.options]
CFG_PP = [name for name, spec in SAMPLERS.items() if spec.cfg_pp]


def no_noise(start, end):
    raise AssertionError("a deterministic sampler drew noise")


def noise_like(x, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda start, end: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def marginal(space, sigma, count, seed=0):
    """Samples of the mixture at noise level sigma."""
    generator = torch.Generator().manual_seed(seed)
    x0 = MIXTURE.sample(count, generator)
    return space.alpha(sigma) * x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)


def levels(space, steps, end=0.0):
    """From pure noise in flow (shift 3), from 20 times the data in ve, to `end`."""
    if space.name == "flow":
        t = torch.linspace(1.0, end, steps + 1, dtype=torch.float64)
        return 3.0 * t / (1.0 + 2.0 * t)
    low = end or 0.03
    sigmas = torch.linspace(20.0 ** (1 / 7), low ** (1 / 7), steps if not end else steps + 1, dtype=torch.float64) ** 7
    return sigmas if end else torch.cat([sigmas, sigmas.new_zeros(1)])


def partial_levels(space, steps):
    high, low = (0.9, 0.2) if space.name == "flow" else (3.0, 0.3)
    return torch.linspace(high, low, steps + 1, dtype=torch.float64)


def draw(name, space, x, sigmas, noise=no_noise, mixture=MIXTURE, base=None, **options):
    return sample(name, mixture.denoiser(space, base), x, sigmas, space.name, noise, **options)


# ── order of convergence ────────────────────────────────────────────────────────────────────────────────────────────


@each_space
@pytest.mark.parametrize(
    ("name", "order"),
    [(name, order) for name, spec in SAMPLERS.items() for order in spec.orders if name not in ("ddpm", "dpm_adaptive")],
)
def test_order_of_convergence_of_the_deterministic_forms(space, name, order):
    x = marginal(space, float(partial_levels(space, 1)[0]), 200)
    truth = MIXTURE.trajectory(x, *partial_levels(space, 1).tolist(), space)
    option = {"order": order} if len(SAMPLERS[name].orders) > 1 else {}
    errors = []
    for steps in (18, 36, 72):  # dpm_fast ends with an order that depends on the remainder by 3
        y = draw(name, space, x, partial_levels(space, steps), eta=0.0, **option)
        errors.append(float((y - truth).norm(dim=1).median()))
    slope = math.log2(errors[0] / errors[2]) / 2.0
    # Orders 3 and 4 of a multistep method start with steps of orders 1 and 2, which leave a small error of order 2.
    least = min(order, 2) - 0.2
    assert slope > least, (slope, errors)
    assert errors[-1] < (0.02 if order == 1 else 1e-3)


@each_space
def test_higher_orders_of_ipndm_v_are_more_accurate(space):
    x = marginal(space, float(partial_levels(space, 1)[0]), 200)
    truth = MIXTURE.trajectory(x, *partial_levels(space, 1).tolist(), space)
    errors = [
        float((draw("ipndm_v", space, x, partial_levels(space, 40), order=order) - truth).norm(dim=1).median())
        for order in (1, 2, 3, 4)
    ]
    assert errors[0] > 5.0 * errors[1] > 5.0 * errors[2] > 5.0 * errors[3]


@each_space
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_adaptive_keeps_to_its_tolerance_whatever_the_schedule(space, order):
    ends = partial_levels(space, 1)
    x = marginal(space, float(ends[0]), 200)
    truth = MIXTURE.trajectory(x, *ends.tolist(), space)
    results = [draw("dpm_adaptive", space, x, sigmas, order=order) for sigmas in (ends, partial_levels(space, 30))]
    assert torch.equal(*results)
    assert float((results[0] - truth).norm(dim=1).median()) < 0.02


@given(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5))
def test_adams_bashforth_weights_are_exact_for_polynomials(steps):
    *past, step = steps
    nodes = [0.0]
    for length in past[1:]:
        nodes.append(nodes[-1] + length)
    weights = adams_bashforth_weights(nodes, -step)
    for power in range(len(nodes)):
        integral = (-step) ** (power + 1) / (power + 1)
        assert sum(w * node**power for w, node in zip(weights, nodes, strict=True)) == pytest.approx(integral, abs=1e-8)


def test_adams_bashforth_weights_are_the_classical_ones_on_even_steps():
    assert adams_bashforth_weights([0.0, -1.0, -2.0, -3.0], 1.0) == pytest.approx([55 / 24, -59 / 24, 37 / 24, -9 / 24])


@pytest.mark.parametrize("calls", range(30))
def test_dpm_fast_spends_exactly_its_calls(calls):
    assert sum(fast_orders(calls)) == calls


# ── where they end ──────────────────────────────────────────────────────────────────────────────────────────────────


@each_space
@pytest.mark.parametrize("name", [name for name, spec in SAMPLERS.items() if not spec.stochastic])
def test_deterministic_samplers_end_where_the_ode_ends(space, name):
    sigmas = levels(space, 60)
    x = marginal(space, float(sigmas[0]), 300)
    y = draw(name, space, x, sigmas, eta=0.0)
    truth = MIXTURE.trajectory(x, float(sigmas[0]), 0.0, space)
    assert float((y - truth).norm(dim=1).median()) < (0.05 if SAMPLERS[name].orders[0] == 1 else 0.02)


@each_space
@each_sampler
def test_the_model_is_asked_from_the_first_to_the_last_level_and_never_at_zero(space, name):
    asked, shown = [], []
    sigmas = levels(space, 7)
    x = marginal(space, float(sigmas[0]), 3)

    def denoise(x, sigma):
        asked.append(sigma)
        return MIXTURE.denoiser(space)(x, sigma)

    def report(i, x, sigma, denoised):
        shown.append(i)

    y = sample(name, denoise, x, sigmas, space.name, noise_like(x), report)
    assert torch.isfinite(y).all() and y.shape == x.shape
    assert max(asked) == asked[0] == sigmas[0]
    assert asked[-1] == pytest.approx(float(sigmas[-2])) and min(asked) > 0.0
    assert shown == sorted(shown) and shown[0] == 0 and shown[-1] == 6
    if name == "dpm_fast":
        assert len(asked) == 7


@each_space
@each_sampler
def test_one_step_is_one_denoising(space, name):
    sigmas = levels(space, 1) if space.name == "flow" else torch.tensor([20.0, 0.0])
    x = marginal(space, float(sigmas[0]), 5)
    expected = MIXTURE.denoised(x, space.alpha(float(sigmas[0])), float(sigmas[0]))
    assert torch.equal(draw(name, space, x, sigmas, noise_like(x)), expected)


# ── what stochastic ones draw ───────────────────────────────────────────────────────────────────────────────────────


def assert_marginal(space, x, sigma, distance):
    """x has the distribution of the mixture at noise level sigma."""
    assert sliced_wasserstein(x, marginal(space, sigma, len(x), seed=7)) < distance
    alpha = space.alpha(sigma)
    covariance = alpha**2 * MIXTURE.covariance() + sigma**2 * torch.eye(4)
    torch.testing.assert_close(x.mean(0), alpha * MIXTURE.mean(), rtol=0, atol=2.0 * distance)
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0, atol=3.0 * distance)


@each_space
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_draw_the_mixture(space, name):
    sigmas = levels(space, 100)
    x = marginal(space, float(sigmas[0]), 4000)
    y = draw(name, space, x, sigmas, noise_like(x))
    assert_marginal(space, y, 0.0, 0.05)
    torch.testing.assert_close(MIXTURE.mode_weights(y), MIXTURE.weights, rtol=0, atol=0.04)


@each_space
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_keep_the_marginal_on_the_way(space, name):
    """Half a schedule, as of KSamplerAdvanced with leftover noise, must end at its own noise level."""
    sigmas = partial_levels(space, 60)
    x = marginal(space, float(sigmas[0]), 4000)
    assert_marginal(space, draw(name, space, x, sigmas, noise_like(x)), float(sigmas[-1]), 0.05)


@each_space
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_churn_stays_on_the_marginal(space, name):
    sigmas = levels(space, 60)
    x = marginal(space, float(sigmas[0]), 4000)
    y = draw(name, space, x, sigmas, noise_like(x), churn=20.0)
    assert_marginal(space, y, 0.0, 0.06)
    assert not torch.equal(y, draw(name, space, x, sigmas))


@each_space
def test_churned_noise_levels(space):
    sigma, gamma = 0.5, 0.4
    x, raised = churned(marginal(space, sigma, 20000), sigma, gamma, space, noise_like(torch.empty(20000, 4)), 1.0)
    assert raised / space.alpha(raised) == pytest.approx((1.0 + gamma) * sigma / space.alpha(sigma))
    assert_marginal(space, x.double(), raised, 0.03)


# ── identities ──────────────────────────────────────────────────────────────────────────────────────────────────────


@each_space
@pytest.mark.parametrize("name", WITH_ETA)
def test_eta_zero_is_the_deterministic_form(space, name):
    sigmas = levels(space, 12)
    x = marginal(space, float(sigmas[0]), 20)
    y = draw(name, space, x, sigmas, no_noise, eta=0.0)
    if name in ("ddim", "reverse_sde"):
        torch.testing.assert_close(y, draw("euler", space, x, sigmas))
    elif name.startswith("res_multistep"):
        assert torch.equal(y, draw("res_multistep_cfg_pp", space, x, sigmas))
    else:  # the singlestep form has no other name: it is second order, as above
        assert (y - draw("euler", space, x, sigmas)).abs().max() > 1e-3


@each_space
@pytest.mark.parametrize("name", ["ipndm_v", "res_multistep_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_ancestral"])
def test_first_order_forms_equal_euler(space, name):
    sigmas = levels(space, 12)
    x = marginal(space, float(sigmas[0]), 20)
    y = draw(name, space, x, sigmas, order=1, eta=0.0)
    torch.testing.assert_close(y, draw("euler", space, x, sigmas))


@each_space
def test_ddim_with_eta_one_is_ddpm(space):
    sigmas = levels(space, 20)
    x = marginal(space, float(sigmas[0]), 20)
    ddim = draw("ddim", space, x, sigmas, noise_like(x), eta=1.0)
    torch.testing.assert_close(ddim, draw("ddpm", space, x, sigmas, noise_like(x)))
    first = draw("res_multistep_ancestral", space, x, sigmas, noise_like(x), order=1)
    torch.testing.assert_close(first, ddim)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_first_order_samplers_are_the_same_in_both_spaces(name):
    """x/(1 − t) turns flow into ve with sigma = t/(1 − t); first-order steps and their noise must not notice."""
    t = torch.linspace(0.95, 0.1, 16, dtype=torch.float64)
    x = marginal(SPACES["flow"], 0.95, 50)
    flow = draw(name, SPACES["flow"], x, t, noise_like(x), eta=0.7)
    ve = draw(name, SPACES["ve"], x / 0.05, t / (1.0 - t), noise_like(x), eta=0.7)
    torch.testing.assert_close(flow / 0.9, ve)


@given(st.floats(0.05, 1.0), st.floats(0.01, 0.99), st.floats(0.0, 1.0))
def test_an_ancestral_split_ends_at_the_right_signal_and_noise(start, fraction, eta):
    for space in SPACES.values():
        end = fraction * start
        split = split_step(space, start, end, eta)
        assert split.scale * space.alpha(split.down) == pytest.approx(space.alpha(end))
        assert (split.scale * split.down) ** 2 + split.sigma_up**2 == pytest.approx(end**2)


# ── CFG++ ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@each_space
@pytest.mark.parametrize("name", CFG_PP)
def test_cfg_pp_without_a_difference_is_the_plain_sampler(space, name):
    sigmas = levels(space, 12)
    x = marginal(space, float(sigmas[0]), 20)
    plain = draw(name, space, x, sigmas, noise_like(x))
    torch.testing.assert_close(draw(name, space, x, sigmas, noise_like(x), base=MIXTURE), plain)


@each_space
@pytest.mark.parametrize("name", ["dpmpp_2m_cfg_pp", "res_multistep_cfg_pp"])
def test_first_order_cfg_pp_is_the_papers(space, name):
    """Algorithm 2 of arXiv:2406.08070: the guided sample with the noise of the unconditional one."""
    sigmas = levels(space, 12)
    x = y = marginal(space, float(sigmas[0]), 20)
    for start, end in zip(sigmas.tolist(), sigmas[1:].tolist(), strict=False):
        guided, uncond = (mixture.denoised(y, space.alpha(start), start) for mixture in (CONDITIONAL, MIXTURE))
        y = space.alpha(end) * guided + end * (y - space.alpha(start) * uncond) / start
    got = draw(name, space, x, sigmas, mixture=CONDITIONAL, base=MIXTURE, order=1)
    torch.testing.assert_close(got, y)


@each_space
def test_gradient_estimation_begins_with_a_cfg_pp_step(space):
    sigmas = partial_levels(space, 1)
    x = marginal(space, float(sigmas[0]), 20)
    first = draw("dpmpp_2m_cfg_pp", space, x, sigmas, mixture=CONDITIONAL, base=MIXTURE)
    got = draw("gradient_estimation_cfg_pp", space, x, sigmas, mixture=CONDITIONAL, base=MIXTURE)
    torch.testing.assert_close(got, first)


def test_dpmpp_2s_cfg_pp_keeps_both_calls_differences():
    """Where guidance always adds the same offset, a step must move by it: ComfyUI's, which overwrites the first
    unconditional prediction by the second, does not."""
    offset = torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=torch.float64)
    x, start, end = marginal(SPACES["ve"], 3.0, 20), 3.0, 2.0
    middle = math.sqrt(start * end)

    def denoise(x, sigma):
        return Guided(0.5 * x + offset, 0.5 * x)

    sigmas = torch.tensor([start, end], dtype=torch.float64)
    got = sample("dpmpp_2s_ancestral_cfg_pp", denoise, x, sigmas, "ve", no_noise, eta=0.0)
    x_middle = middle / start * x + (1.0 - middle / start) * 0.5 * x + offset
    torch.testing.assert_close(got, end / start * x + (1.0 - end / start) * 0.5 * x_middle + offset)


# ── seeds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_same_noise_gives_the_same_sample(name):
    space = SPACES["flow"]
    sigmas = levels(space, 8)
    x = marginal(space, 1.0, 10)
    y = draw(name, space, x, sigmas, noise_like(x, 1))
    assert torch.equal(y, draw(name, space, x, sigmas, noise_like(x, 1)))
    assert not torch.allclose(y, draw(name, space, x, sigmas, noise_like(x, 2)))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_s_noise_zero_adds_nothing(name):
    space = SPACES["flow"]
    x = marginal(space, 1.0, 10)
    results = [draw(name, space, x, levels(space, 8), noise_like(x, seed), s_noise=0.0) for seed in (1, 2)]
    assert torch.equal(*results)


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "eulr"}, "unknown sampler 'eulr'.*euler"),
        ({"eta": math.nan}, "eta.*nan"),
        ({"eta": 1.5}, "eta.*1.5"),
        ({"s_noise": -1.0}, "s_noise.*-1"),
        ({"s_noise": math.inf}, "s_noise.*inf"),
        ({"churn": math.nan}, "churn.*nan"),
        ({"churn": 1e9}, "churn.*1e\\+09|churn.*1000000000"),
        ({"order": 7}, "ipndm_v has order 1 or 2 or 3 or 4, not 7"),
        ({"name": "heun", "order": 3}, "heun has order 2, not 3"),
        ({"name": "dpm_adaptive", "order": 1}, "dpm_adaptive has order 2 or 3, not 1"),
    ],
)
def test_bad_options(values, message):
    with pytest.raises(ValueError, match=message):
        require_sampler(**{"name": "ipndm_v", **values})


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([], "has 0 value"),
        ([1.0], "has 1 value"),
        ([1.0, math.nan, 0.0], r"sigmas\[1\] is nan"),
        ([math.inf, 1.0, 0.0], r"sigmas\[0\] is inf"),
        ([1.0, 0.5, -0.1], r"sigmas\[2\] is -0.1"),
        ([0.0, 0.5, 1.0], r"sigmas\[0\] = 0 is followed by 0.5"),
        ([1.0, 0.5, 0.5, 0.0], r"sigmas\[1\] = 0.5 is followed by 0.5"),
        ([14.6, 1.0, 0.0], "start at 14.6, but a flow model's"),
    ],
)
@each_sampler
def test_bad_sigmas(name, sigmas, message):
    with pytest.raises(ValueError, match=message):
        draw(name, SPACES["flow"], torch.zeros(1, 4), torch.tensor(sigmas))


@each_sampler
def test_a_model_without_a_noise_process_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is for flow and ve models, not for this model, which has no noise"):
        sample(name, MIXTURE.denoiser(SPACES["ve"]), torch.zeros(1, 4), torch.tensor([1.0, 0.0]), None, no_noise)


def test_dpm_adaptive_gets_past_a_model_that_jumps():
    """A prompt that begins halfway: no step is short enough for the tolerance there."""
    calls = []

    def denoise(x, sigma):
        calls.append(sigma)
        denoised = torch.full_like(x, 5.0 if sigma > 0.5 else -5.0)
        return Guided(denoised, denoised)

    y = sample("dpm_adaptive", denoise, torch.ones(2, 4), torch.tensor([1.0, 0.1, 0.0]), "flow", no_noise)
    torch.testing.assert_close(y, torch.full_like(y, -5.0))
    assert len(calls) < 300


def test_dpm_adaptive_stops_where_the_model_gives_nan():
    def broken(x, sigma):
        denoised = torch.full_like(x, math.nan if sigma < 0.5 else 0.0)
        return Guided(denoised, denoised)

    with pytest.raises(ValueError, match="dpm_adaptive cannot go on: the model's prediction near sigma 0.95"):
        sample("dpm_adaptive", broken, torch.ones(2, 4), torch.tensor([1.0, 0.1]), "flow", no_noise)
