"""Official schedules: equal to diffusers' pipelines, whose numbers are in golden/diffusers-official.json."""

import json
import math

import pytest
import torch

from tidetable.schedules.families import FAMILIES, official_shift
from tidetable.schedules.official import RESPACINGS, official_sigmas
from tidetable.schedules.shift import shift_t
from tidetable.schedules.spacing import flow_grid, linear_quadratic
from tidetable.tests.test_architecture import ROOT


GOLDEN = json.loads((ROOT / "tests" / "golden" / "diffusers-official.json").read_text())
SCHEDULED = [family for family in FAMILIES.values() if family.placement is not None]
each_scheduled = pytest.mark.parametrize("family", SCHEDULED, ids=lambda family: family.key)


def cases(part):
    return [
        pytest.param(name, *map(int, size.replace("x", "/").split("/")), numbers, id=f"{name}-{size}")
        for name, curves in GOLDEN[part].items()
        for size, numbers in curves.items()
    ]


def difference(ours, theirs):
    """Largest |Δσ|, as a fraction of σ where that is above 1 (the axis of eps models goes to 80)."""
    theirs = torch.tensor(theirs, dtype=torch.float64)
    assert ours.shape == theirs.shape
    return float(((ours - theirs).abs() / theirs.clamp(min=1.0)).max())


@pytest.mark.parametrize(("key", "width", "height", "steps", "numbers"), cases("official"))
def test_equal_to_the_familys_pipeline_in_diffusers(key, width, height, steps, numbers):
    ours = official_sigmas(FAMILIES[key], steps, width, height)
    if numbers is None:
        # diffusers itself is off: with one step the stretch to the terminal divides 0 by 0, and Mochi's has no half.
        assert steps == 1 and ours.tolist() == [1.0, 0.0]
    else:
        assert difference(ours, numbers) <= 1e-6


@pytest.mark.parametrize(("name", "width", "height", "steps", "numbers"), cases("respaced"))
def test_equal_to_diffusers_re_spaced(name, width, height, steps, numbers):
    key, respacing = name.split("/")
    ours = official_sigmas(FAMILIES[key], steps, width, height, respacing=respacing)
    assert ours.tolist() == [1.0, 0.0] if numbers is None else difference(ours, numbers) <= 1e-6


def test_the_golden_numbers_cover_what_they_should():
    assert set(GOLDEN["versions"]) == {"diffusers", "torch", "numpy", "scipy"}
    for curves in GOLDEN["official"].values():
        assert len(curves) in (4, 16) and sum(numbers is not None for numbers in curves.values()) >= 3
    sizes = {"512x512", "1024x1024", "1664x928", "2048x2048"}
    assert {size.split("/")[0] for size in GOLDEN["official"]["qwen_image"]} == sizes
    # The only missing ones are single steps of families that stretch or split them.
    missing = {(k, n) for k, curves in GOLDEN["official"].items() for n, v in curves.items() if v is None}
    assert {key for key, _ in missing} == {"qwen_image", "ltxv", "ltx2", "mochi"}
    assert all(name.endswith("/1") for _, name in missing)


# ── where diffusers differs from the authors, or from what a schedule should be ─────────────────────


def double_shift(shift, steps):
    return shift_t(torch.linspace(1, shift_t(0.001, shift), steps, dtype=torch.float64), shift)


@pytest.mark.parametrize("key", ["sd3", "auraflow", "joyimage"])
@pytest.mark.parametrize("steps", [4, 20, 50])
def test_where_diffusers_counts_a_static_shift_twice(key, steps):
    family, shift = FAMILIES[key], official_shift(key, 1024, 1024)[0]
    theirs = torch.tensor(GOLDEN["official"][key][f"1024x1024/{steps}"], dtype=torch.float64)
    assert difference(double_shift(shift, steps), theirs[:-1].tolist()) <= 1e-6
    once = official_sigmas(family, steps, 1024, 1024, shift_once=True)
    # Shifted once, the last step starts at shift(1/steps); theirs at the shift of a shifted thousandth.
    assert float(once[-2]) == pytest.approx(shift_t(1 / steps, shift))
    assert float(theirs[-2]) == pytest.approx(shift_t(shift_t(0.001, shift), shift), abs=1e-7)
    assert float(theirs[-2]) < float(once[-2]) / 2


def test_sd3_ends_at_00893_in_diffusers_and_its_one_step_is_the_same():
    assert GOLDEN["official"]["sd3"]["1024x1024/20"][-2] == pytest.approx(0.00893, abs=5e-6)
    assert official_sigmas(FAMILIES["sd3"], 1, 1024, 1024).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("key", ["kandinsky5", "kandinsky5_image"])
def test_kandinskys_authors_shift_once_and_diffusers_port_twice(key):
    shift = official_shift(key, 1024, 1024)[0]
    ours = official_sigmas(FAMILIES[key], 20, 1024, 1024)
    theirs = GOLDEN["different"][key]["1024x1024/20"]
    assert difference(double_shift(shift, 20), theirs[:-1]) <= 1e-6
    assert float(ours[-2]) == pytest.approx(shift_t(0.05, shift)) and theirs[-2] < 0.3 * float(ours[-2])


@pytest.mark.parametrize("key", ["wan22_5b", "hidream"])
@pytest.mark.parametrize("steps", [4, 20, 50])
def test_unipcs_flow_sigmas_aim_at_a_thousandth_instead_of_0(key, steps):
    """Wan's and HiDream's pipelines sample with UniPC, whose equal steps in t end at 1/1000 before the final 0."""
    t = 1.0 - 0.999 * torch.arange(steps, dtype=torch.float64) / steps
    theirs = GOLDEN["different"][key][f"1024x1024/{steps}"]
    assert difference(shift_t(t, official_shift(key, 1024, 1024)[0]), theirs[:-1]) <= 1.1e-6  # it starts at 1 − 1e-6
    assert 1e-4 < difference(official_sigmas(FAMILIES[key], steps, 1024, 1024), theirs) < 5e-3


# ── laws ────────────────────────────────────────────────────────────────────────────────────────────


@each_scheduled
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 333])
def test_every_schedule_falls_strictly_to_zero_in_so_many_steps(family, steps):
    sigmas = official_sigmas(family, steps, family.default_width, family.default_height, family.default_length)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (steps + 1,) and float(sigmas[-1]) == 0.0
    assert bool((sigmas[1:] < sigmas[:-1]).all())
    if family.process == "flow":
        assert float(sigmas[0]) == pytest.approx(1.0, abs=2e-4)


@each_scheduled
def test_denoise_is_the_tail_of_a_longer_schedule(family):
    size = (family.default_width, family.default_height)
    assert torch.equal(official_sigmas(family, 10, *size, denoise=0.5), official_sigmas(family, 20, *size)[-11:])


def test_a_terminal_is_reached_and_survives_re_spacing():
    for respacing in RESPACINGS:
        sigmas = official_sigmas(FAMILIES["qwen_image"], 30, 1328, 1328, respacing=respacing)
        assert float(sigmas[-2]) == pytest.approx(0.02, abs=1e-12) and float(sigmas[0]) == 1.0


def test_ideograms_quantiles_have_the_rules_median():
    shift, mu = official_shift("ideogram4", 1024, 1024)
    sigmas = official_sigmas(FAMILIES["ideogram4"], 20, 1024, 1024)
    assert float(sigmas[10]) == pytest.approx(shift / (1 + shift)) and mu == pytest.approx(math.log(2.0))


@pytest.mark.parametrize("steps", [2, 3, 20, 65])
def test_linear_quadratic_is_smooth_where_it_bends(steps):
    """On the grid the slope before and after the joint agree to what a parabola's second difference allows."""
    x = 1.0 - linear_quadratic(flow_grid(), steps, 0.025)[:-1]
    half = steps // 2
    slope = 0.025 / half
    torch.testing.assert_close(x[: half + 1].diff(), torch.full((half,), slope, dtype=torch.float64))
    after = torch.cat([x[half:], torch.ones(1, dtype=torch.float64)]).diff()
    second = after.diff()
    assert bool((second >= -1e-12).all())
    if len(second):
        torch.testing.assert_close(second, second[0].expand(len(second)))
        assert float(after[0] - 0.5 * second[0]) == pytest.approx(slope)


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps must be 1 to 10000, got 0"),
        ({"steps": -3}, "steps must be .*got -3"),
        ({"steps": 10_001}, "steps must be .*got 10001"),
        ({"width": 0}, "at least 16 pixels .*0×1024"),
        ({"height": -16}, "at least 16 pixels .*1024×-16"),
        ({"length": 0}, "length must be at least 1 frame, got 0"),
        ({"denoise": 0.0}, "denoise must be .*got 0.0"),
        ({"denoise": 1.5}, "denoise must be .*got 1.5"),
        ({"denoise": math.nan}, "denoise must be .*nan"),
        ({"denoise": 0.001}, "steps must be .*got 20000"),
        ({"respacing": "cosine"}, "unknown re-spacing 'cosine'.*karras"),
    ],
)
def test_bad_numbers_are_named(changed, message):
    arguments = {"steps": 20, "width": 1024, "height": 1024} | changed
    with pytest.raises(ValueError, match=message):
        official_sigmas(FAMILIES["qwen_image"], **arguments)


def test_ten_thousand_steps_work_and_odd_sizes_lose_their_rest():
    assert official_sigmas(FAMILIES["flux"], 10_000, 1024, 1024).shape == (10_001,)
    odd, even = (official_sigmas(FAMILIES["flux"], 20, width, 928) for width in (1679, 1664))
    assert torch.equal(odd, even)


def test_what_has_no_published_schedule_is_refused_with_the_way_out():
    for family in FAMILIES.values():
        if family.placement is None:
            with pytest.raises(ValueError, match=f"{family.key}.*Tidetable_Schedule"):
                official_sigmas(family, 20, 1024, 1024)
    with pytest.raises(ValueError, match="999 steps .*got 1000"):
        official_sigmas(FAMILIES["sdxl"], 1000, 1024, 1024)
