"""Noise processes: inverses, normalization, tables, and the one broadcast rule."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tidetable.schedules.process import VE, VP, Flow, expand


VP_SD = VP.from_betas()
PROCESSES = {
    "flow": Flow(),
    "vp": VP_SD,
    "vp-linear": VP.from_betas(1e-4, 0.02, kind="linear"),
    "vp-zero-terminal": VP_SD.zero_terminal(),
    "ve": VE(0.002, 80.0),
}
unit = st.floats(0.0, 1.0, allow_subnormal=False)


def grid(*shape: int) -> torch.Tensor:
    return torch.linspace(0.0, 1.0, math.prod(shape) + 2, dtype=torch.float64)[1:-1].reshape(shape)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@given(t=unit)
def test_time_survives_log_snr_and_ratio(process, t):
    # A log-SNR computed in float64 near t = 0 or 1 of flow cannot hold t to more digits than its own.
    assert float(process.t_from_log_snr(process.log_snr(t))) == pytest.approx(t, abs=1e-10)
    assert float(process.t_from_ratio(process.ratio(t))) == pytest.approx(t, abs=1e-10)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_definitions_agree(process):
    t = grid(257)
    alpha, sigma = process.alpha(t), process.sigma(t)
    torch.testing.assert_close(process.ratio(t), sigma / alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(process.log_snr(t), 2.0 * torch.log(alpha / sigma), rtol=1e-9, atol=1e-12)
    assert (process.log_snr(t).diff() < 0).all()


@pytest.mark.parametrize("name", [name for name in PROCESSES if name.startswith("vp")])
def test_variance_is_preserved(name):
    t = torch.linspace(0, 1, 1999, dtype=torch.float64)
    process = PROCESSES[name]
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-15)


def test_rows_of_the_table_are_exact():
    rows = torch.arange(1000, dtype=torch.float64) / 999
    table = torch.tensor(VP_SD.alpha_bar, dtype=torch.float64)
    torch.testing.assert_close(VP_SD.alpha(rows) ** 2, table, rtol=1e-11, atol=0)


def test_known_ends_of_stable_diffusion():
    assert float(VP_SD.ratio(0.0)) == pytest.approx(0.0291672, abs=1e-7)
    assert float(VP_SD.ratio(1.0)) == pytest.approx(14.614643, abs=1e-5)


def test_zero_terminal_is_pure_noise_only_at_the_end():
    process = VP_SD.zero_terminal()
    assert float(process.alpha(1.0)) == 0.0 and float(process.sigma(1.0)) == 1.0
    assert float(process.log_snr(1.0)) == -math.inf and float(process.t_from_ratio(math.inf)) == 1.0
    assert float(process.alpha(1.0 - 1e-9)) > 0.0
    # The same numbers as the schedule inside ComfyUI: 18.15 at 10 percent, 1.77 at 50 percent.
    assert float(process.ratio(0.9)) == pytest.approx(18.15, abs=0.01)
    assert float(process.ratio(0.5)) == pytest.approx(1.77, abs=0.01)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_dtype_and_shape_of_time_are_kept(process, dtype, shape):
    t = torch.full(shape, 0.4, dtype=dtype)
    for method in (process.alpha, process.sigma, process.log_snr, process.ratio, process.t_from_ratio):
        assert method(t).dtype == dtype and method(t).shape == shape
    assert process.sigma(0.4).dtype == torch.float64


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("dims", [3, 4, 5])
def test_mix_treats_each_sample_alone(process, dims):
    batch = 4
    shape = (batch, *(2, 3, 5)[: dims - 2], batch)  # the width equals the batch
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    t = grid(batch)
    mixed = process.mix(x0, eps, t)
    for i in range(batch):
        alone = process.mix(x0[i : i + 1], eps[i : i + 1], t[i])
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=0, atol=0)
        by_hand = float(process.alpha(t[i])) * x0[i] + float(process.sigma(t[i])) * eps[i]
        torch.testing.assert_close(mixed[i], by_hand, rtol=1e-14, atol=1e-14)


def test_marginal_variance_of_unit_data():
    generator = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(2, 200_000, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    for process in PROCESSES.values():
        expected = process.alpha(t) ** 2 + process.sigma(t) ** 2
        torch.testing.assert_close(process.mix(x0, eps, t).var(dim=1), expected, rtol=0.01, atol=0)


def test_expand_never_guesses():
    x = torch.zeros(2, 3, 4)
    assert expand(torch.tensor(0.5), x).shape == (1, 1, 1)
    assert expand(torch.tensor([0.1, 0.2]), x).shape == (2, 1, 1)
    for wrong in (torch.zeros(4), torch.zeros(3), torch.zeros(1), torch.zeros(2, 1, 1)):
        with pytest.raises(ValueError, match="per-sample"):
            expand(wrong, x)


def test_half_precision_latents_are_noised_in_float32():
    x0 = torch.ones(1, 3, 2, 2, dtype=torch.bfloat16)
    for t in (torch.tensor(0.001), torch.tensor([0.001])):
        mixed = Flow().mix(x0, torch.zeros_like(x0), t)
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed, torch.full_like(mixed, 0.999))


def test_processes_are_values():
    assert VP.from_betas() == VP_SD and hash(VP.from_betas()) == hash(VP_SD) and Flow() == Flow()
    assert VP_SD.zero_terminal() != VP_SD
    round_trip = VP.from_ratios(VP_SD.ratio(torch.arange(1000, dtype=torch.float64) / 999))
    torch.testing.assert_close(torch.tensor(round_trip.alpha_bar), torch.tensor(VP_SD.alpha_bar), rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    "alpha_bar", [(0.5,), (0.5, 0.9), (1.0, 0.5), (0.9, -0.1), (0.9, 0.9), (float("nan"), 0.1), (0.9, float("nan"))]
)
def test_impossible_tables_are_refused(alpha_bar):
    with pytest.raises(ValueError, match="alpha_bar"):
        VP(alpha_bar)


def test_other_bad_input():
    with pytest.raises(ValueError, match="sigma_min"):
        VE(1.0, 0.5)
    with pytest.raises(ValueError, match="kind"):
        VP.from_betas(kind="cosine")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="equal"):
        Flow().mix(torch.zeros(1, 3), torch.zeros(1, 4), 0.5)
    assert math.isnan(float(VP_SD.alpha(math.nan)))
