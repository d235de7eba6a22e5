"""Laws of the densities over t."""

import math

import pytest
import torch
from scipy import stats

from tidetable.training.config import TrainConfig
from tidetable.training.densities import logit_normal_icdf
from tidetable.training.timesteps import sample_t, stratified_uniform


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_one_draw_in_each_stratum(count):
    u = stratified_uniform(count, generator())
    assert sorted((u * count).floor().long().tolist()) == list(range(count))


def test_strata_do_not_stick_to_batch_positions():
    first = torch.stack([stratified_uniform(4, generator(seed)) for seed in range(4000)])[:, 0]
    assert stats.kstest(first.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.1, 0.5), (-2.0, 1.5)])
def test_logit_normal_quantiles_invert_its_distribution(mean, std):
    u = torch.linspace(0.001, 0.999, 501, dtype=torch.float64)
    t = logit_normal_icdf(u, mean, std)
    cdf = stats.norm.cdf((torch.logit(t).numpy() - mean) / std)
    assert torch.allclose(torch.from_numpy(cdf), u, atol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 1.82, 3.0, 12.0])
def test_shifting_is_adding_its_logarithm_to_the_mean_path_by_path(shift):
    shifted = sample_t(TrainConfig(density="logit_normal"), 1000, True, shift, generator())
    moved = sample_t(TrainConfig(density="logit_normal", logit_mean=math.log(shift)), 1000, True, 1.0, generator())
    assert torch.allclose(shifted, moved, atol=1e-12)


def test_auto_is_logit_normal_on_flow_and_uniform_elsewhere():
    flow = sample_t(TrainConfig(), 20_000, True, 1.0, generator())
    other = sample_t(TrainConfig(), 20_000, False, 1.0, generator())
    assert stats.kstest(torch.logit(flow).numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(other.numpy(), "uniform").pvalue > 1e-3


def test_flow_draws_stay_inside_the_open_interval():
    t = sample_t(TrainConfig(logit_std=5.0), 100_000, True, 100.0, generator())
    assert t.min() > 0 and t.max() < 1
