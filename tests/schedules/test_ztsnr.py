"""Zero terminal SNR."""

import json
import math
from pathlib import Path

import pytest
import torch

from tidetable.schedules.process import VP
from tidetable.schedules.spacing import karras, schedule, table_grid
from tidetable.schedules.ztsnr import TERMINAL_ALPHA_BAR, cap_ratios, rescale_zero_terminal_snr, steps_above


# Written by tests/golden/diffusers_vp.py.
DIFFUSERS = json.loads((Path(__file__).parents[1] / "golden" / "diffusers-vp.json").read_text(encoding="utf-8"))


TABLES = {
    "scaled_linear": torch.tensor(VP.from_betas().alpha_bar, dtype=torch.float64),
    "linear": torch.tensor(VP.from_betas(1e-4, 0.02, kind="linear").alpha_bar, dtype=torch.float64),
}


@pytest.mark.parametrize("alpha_bar", TABLES.values(), ids=TABLES)
def test_keeps_the_first_and_zeroes_the_last(alpha_bar):
    rescaled = rescale_zero_terminal_snr(alpha_bar)
    assert float(rescaled[0]) == pytest.approx(float(alpha_bar[0]), rel=1e-15)
    assert float(rescaled[-1]) == 0.0
    assert (rescaled.diff() < 0).all() and (rescaled[1:] < alpha_bar[1:]).all()


@pytest.mark.parametrize("alpha_bar", TABLES.values(), ids=TABLES)
def test_is_affine_in_the_signal_coefficient_and_idempotent(alpha_bar):
    rescaled = rescale_zero_terminal_snr(alpha_bar)
    slope = rescaled.sqrt().diff() / alpha_bar.sqrt().diff()
    torch.testing.assert_close(slope, slope[0].expand_as(slope), rtol=1e-9, atol=0)
    torch.testing.assert_close(rescale_zero_terminal_snr(rescaled), rescaled, rtol=1e-14, atol=0)


def test_stand_in_is_the_hosts_largest_sigma():
    assert math.sqrt((1 - TERMINAL_ALPHA_BAR) / TERMINAL_ALPHA_BAR) == pytest.approx(4518.76, abs=0.01)


# ── parity with diffusers ───────────────────────────────────────────────────────────────────────────


def ratios(alpha_bar: torch.Tensor) -> torch.Tensor:
    return ((1.0 - alpha_bar) / alpha_bar).sqrt()


def tables(zero: bool) -> torch.Tensor:
    alpha_bar = TABLES["scaled_linear"]
    return rescale_zero_terminal_snr(alpha_bar).clamp(min=TERMINAL_ALPHA_BAR) if zero else alpha_bar


def noise_coefficient(sigmas: torch.Tensor) -> torch.Tensor:
    """sigma_t of the process, in 0 to 1, from the ratio sigma_t/alpha_t that diffusers and ComfyUI call sigma."""
    return sigmas / (1.0 + sigmas**2).sqrt()


@pytest.mark.parametrize("zero", [False, True], ids=["plain", "rescale_betas_zero_snr"])
@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_tables_are_those_of_diffusers(kind, zero):
    betas = {} if kind == "scaled_linear" else {"beta_start": 0.00085, "beta_end": 0.012}
    alpha_bar = torch.tensor(VP.from_betas(**betas, kind=kind).alpha_bar, dtype=torch.float64)
    alpha_bar = rescale_zero_terminal_snr(alpha_bar) if zero else alpha_bar
    theirs = {
        name: torch.tensor(values, dtype=torch.float64)
        for name, values in DIFFUSERS["tables"][f"{kind} zero terminal" if zero else kind].items()
    }
    ours = 1.0 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    torch.testing.assert_close(ours, theirs["betas"], rtol=0, atol=1e-7)
    torch.testing.assert_close(alpha_bar, theirs["alphas_cumprod"], rtol=0, atol=1e-6)
    assert (float(theirs["alphas_cumprod"][-1]) == 0.0) == zero


@pytest.mark.parametrize(
    "theirs",
    DIFFUSERS["schedules"],
    ids=lambda s: f"{s['scheduler']}-{'zero' if s['zero_terminal'] else 'plain'}-{s['spacing']}-{s['steps']}",
)
def test_schedules_visit_what_diffusers_visits(theirs):
    table, steps = ratios(tables(theirs["zero_terminal"])), theirs["steps"]
    if theirs["spacing"] == "trailing":
        ours = schedule(table_grid(table), "trailing", steps)
    else:  # their rows, in our table
        ours = torch.cat([table[[int(row) for row in theirs["timesteps"]]], torch.zeros(1, dtype=torch.float64)])
    rows = [round(float(VP.from_ratios(table).t_from_ratio(sigma)) * 999) for sigma in ours[:-1]]
    assert rows == theirs["timesteps"]
    if theirs["sigmas"] is None:  # DDIM has a table of alphas_cumprod alone
        return
    sigmas = torch.tensor(theirs["sigmas"], dtype=torch.float64)
    torch.testing.assert_close(noise_coefficient(ours), noise_coefficient(sigmas), rtol=0, atol=1e-6)
    if theirs["zero_terminal"] and theirs["spacing"] == "trailing":
        # Infinity has two stand-ins: diffusers takes alpha_bar 2⁻²⁴ and ComfyUI 4.897e-08.
        assert float(sigmas[0]) == pytest.approx(4096.0, abs=1e-3) and float(ours[0]) == pytest.approx(
            4518.76, abs=0.01
        )
        ours, sigmas = ours[1:], sigmas[1:]
    # Their 1 − alpha_bar is a float32 difference, which costs small sigmas digits.
    torch.testing.assert_close(ours, sigmas, rtol=3e-5, atol=0)


# ── the cap, and what a spacing makes of so long a range ────────────────────────────────────────────


@pytest.mark.parametrize("cap", [20.0, 160.0, 1000.0, 4000.0])
def test_the_cap_keeps_every_row_below_it_and_its_number(cap):
    table = ratios(tables(zero=True))
    capped = cap_ratios(table, cap)
    assert float(capped[-1]) == cap and (capped.diff() > 0).all()
    assert torch.equal(capped[:-1], table[: len(capped) - 1])
    # The last row moved no further than half-way to a neighbor, as any rounding to rows would move it.
    assert len(table) == len(capped) or cap < float((table[len(capped) - 1] * table[len(capped)]).sqrt())
    assert cap > float((table[len(capped) - 2] * table[len(capped) - 1]).sqrt())
    assert torch.equal(cap_ratios(capped, cap), capped)


def test_a_cap_above_the_table_changes_nothing():
    table = ratios(tables(zero=True))
    assert torch.equal(cap_ratios(table, 5000.0), table)


@pytest.mark.parametrize("cap", [0.0, -160.0, 0.03, math.nan])
def test_a_cap_below_the_table_is_refused(cap):
    with pytest.raises(ValueError, match=rf"above the second row.*0\.04207, got {cap}; 160 is usual"):
        cap_ratios(ratios(tables(zero=True)), cap)


def test_karras_spends_13_of_20_steps_above_the_plain_range():
    plain, zero = (table_grid(ratios(tables(zero))) for zero in (False, True))
    limit = float(plain.sigmas[-1])
    assert steps_above(karras(zero, 20), limit) == 13
    assert steps_above(karras(plain, 20), limit) == 0
    assert steps_above(schedule(zero, "trailing", 20), limit) == 3
    assert steps_above(karras(table_grid(cap_ratios(zero.sigmas, 160.0)), 20), limit) == 8
