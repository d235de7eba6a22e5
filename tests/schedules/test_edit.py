"""Editing a schedule: what it keeps, what undoes it, and what it refuses."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidetable.schedules import edit
from tidetable.schedules.curves import log_snr_from_sigma, process_for, sigma_from_log_snr, sigma_from_t, t_from_sigma
from tidetable.schedules.process import VP, Flow
from tidetable.schedules.spacing import schedule
from tidetable.tests.schedules.test_spacing import GRIDS


FLOW, SD = Flow(), VP.from_betas()
CASES = {
    "flow": (schedule(GRIDS["flow-3"], "trailing", 20), FLOW),
    "flow-tail": (schedule(GRIDS["flow"], "beta", 12, 0.6), FLOW),
    "vp": (schedule(GRIDS["vp"], "karras", 20), SD),
    "vp-open": (schedule(GRIDS["vp"], "trailing", 20)[:-3], SD),
    "vp-zero-terminal": (schedule(GRIDS["vp-zero-terminal"], "trailing", 9), SD.zero_terminal()),
    "one-step": (torch.tensor([1.0, 0.0], dtype=torch.float64), FLOW),
}
each_case = pytest.mark.parametrize(("sigmas", "process"), CASES.values(), ids=CASES)
each_axis = pytest.mark.parametrize("axis", edit.EDIT_AXES)


@st.composite
def falling(draw, largest=20.0, least=2):
    levels = draw(st.lists(st.floats(2.0**-10, largest, width=32), min_size=least, max_size=40, unique=True))
    return torch.tensor(sorted(levels, reverse=True), dtype=torch.float64)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("process", [FLOW, SD])
@settings(deadline=None)
@given(sigma=st.floats(0.03, 0.999))
def test_axes_and_back(process, sigma):
    sigma = torch.tensor(sigma, dtype=torch.float64)
    close(sigma_from_t(t_from_sigma(sigma, process), process), sigma)
    close(sigma_from_log_snr(log_snr_from_sigma(sigma, process), process), sigma)


# ── resample ────────────────────────────────────────────────────────────────────────────────────────


@each_case
@each_axis
def test_resampling_to_the_same_number_is_the_identity(sigmas, process, axis):
    assert torch.equal(edit.resample(sigmas, len(sigmas) - 1, axis, process), sigmas)


@each_case
@each_axis
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_resampling_keeps_the_ends_and_falls(sigmas, process, axis, steps):
    result = edit.resample(sigmas, steps, axis, process)
    assert len(result) == steps + 1 and (result.diff() < 0).all()
    assert float(result[0]) == float(sigmas[0]) and float(result[-1]) == float(sigmas[-1])


@each_case
@each_axis
@pytest.mark.parametrize("factor", [2, 3])
def test_a_finer_schedule_goes_through_the_levels_and_back(sigmas, process, axis, factor):
    steps = len(sigmas) - 1
    fine = edit.resample(sigmas, factor * steps, axis, process)
    assert torch.equal(fine[::factor], sigmas)
    close(edit.resample(fine, steps, axis, process), sigmas)


def test_between_the_levels_it_is_straight_on_its_axis():
    sigmas, process = CASES["flow"]
    for axis, place in (("sigma", lambda s: s), ("log_snr", lambda s: log_snr_from_sigma(s, FLOW))):
        fine = place(edit.resample(sigmas, 40, axis, process))[2:-2]
        close(fine[1::2], (fine[0:-2:2] + fine[2::2]) / 2)
    # log-SNR has no place for pure noise and for 0: these two steps are halved in sigma
    fine = edit.resample(sigmas, 40, "log_snr", process)
    close(fine[[1, -2]], (sigmas[[0, -1]] + sigmas[[1, -2]]) / 2)


# ── shift, multiply, ends ───────────────────────────────────────────────────────────────────────────


@each_case
@settings(deadline=None)
@given(shift=st.floats(0.2, 8.0), other=st.floats(0.2, 8.0))
def test_shifts_compose_and_move_log_snr(sigmas, process, shift, other):
    moved = edit.drag(sigmas, shift, process, keep_ends=False)
    close(edit.drag(moved, 1 / shift, process, keep_ends=False), sigmas)
    close(edit.drag(moved, other, process, False), edit.drag(sigmas, shift * other, process, False))
    inside = sigmas[1:-1]
    difference = log_snr_from_sigma(moved[1:-1], process) - log_snr_from_sigma(inside, process)
    torch.testing.assert_close(difference, torch.full_like(inside, -2 * math.log(shift)), rtol=1e-7, atol=1e-7)
    kept = edit.drag(sigmas, shift, process)
    assert kept[0] == sigmas[0] and kept[-1] == sigmas[-1] and torch.equal(kept[1:-1], moved[1:-1])


def test_dragging_a_flow_schedule_is_another_shift_of_the_model():
    plain = schedule(GRIDS["flow"], "trailing", 20)
    close(edit.drag(plain, 3.0, FLOW), schedule(GRIDS["flow-3"], "trailing", 20))


@settings(deadline=None)
@given(sigmas=falling(), factor=st.floats(0.1, 10.0))
def test_multiply(sigmas, factor):
    close(edit.multiply(edit.multiply(sigmas, factor, False), 1 / factor, False), sigmas)
    kept = edit.multiply(sigmas, factor)
    assert kept[0] == sigmas[0] and kept[-1] == sigmas[-1]


def test_other_ends():
    sigmas = CASES["vp"][0]
    assert float(edit.edit(sigmas, "set_first", SD, value=14.0)[0]) == 14.0
    changed = edit.edit(sigmas, "set_last", SD, value=0.01)
    assert float(changed[-1]) == 0.01 and torch.equal(changed[:-1], sigmas[:-1])
    assert float(sigmas[-1]) == 0.0, "the schedule that was handed in stays as it is"


# ── clip, insert, flip ──────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(sigmas=falling(), low=st.floats(0.0, 5.0), high=st.floats(5.5, 20.0))
def test_clip_keeps_the_range_and_clips_once(sigmas, low, high):
    if not (low < float(sigmas[0]) and float(sigmas[-1]) < high):
        with pytest.raises(ValueError, match="nothing is left between"):
            edit.clip(sigmas, low, high)
        return
    result = edit.clip(sigmas, low, high)
    assert float(result[0]) == min(float(sigmas[0]), high) and float(result[-1]) == max(float(sigmas[-1]), low)
    assert (result.diff() < 0).all() and torch.equal(edit.clip(result, low, high), result)
    inside = sigmas[(sigmas > low) & (sigmas < high)]
    assert set(inside.tolist()) <= set(result.tolist())


def test_no_limits_change_nothing():
    sigmas = CASES["flow"][0]
    assert torch.equal(edit.clip(sigmas, 0.0, 0.0), sigmas)


@settings(deadline=None)
@given(sigmas=falling(least=3))
def test_inserting_what_was_taken_out(sigmas):
    at = len(sigmas) // 2
    without = torch.cat([sigmas[:at], sigmas[at + 1 :]])
    if (without.diff() / without[:-1] < -3e-6).all() and (sigmas.diff() / sigmas[:-1] < -3e-6).all():
        assert torch.equal(edit.insert(without, float(sigmas[at])), sigmas)


@settings(deadline=None)
@given(sigmas=falling())
def test_flipping_twice(sigmas):
    flipped = edit.flip(sigmas)
    assert (flipped.diff() > 0).all() and torch.equal(flipped.flip(0), sigmas)


def test_a_flipped_schedule_starts_above_zero():
    flipped = edit.flip(CASES["flow"][0])
    assert float(flipped[0]) == edit.FLIPPED_ZERO and float(flipped[-1]) == 1.0
    assert (edit.flip(torch.tensor([1.0, 1e-5, 0.0], dtype=torch.float64)).diff() > 0).all()


# ── split and join ──────────────────────────────────────────────────────────────────────────────────


@each_case
def test_the_parts_join_to_the_whole(sigmas, process):
    for step in range(1, len(sigmas) - 1):
        high, low = edit.split(sigmas, step)
        assert len(high) == step + 1 and high[-1] == low[0]
        assert torch.equal(edit.join([high, low], ["a", "b"]), sigmas)


@settings(deadline=None)
@given(sigmas=falling(largest=1.0, least=3), where=st.floats(0.0, 1.0))
def test_splitting_at_a_level(sigmas, where):
    level = float(sigmas[1] + where * (sigmas[-2] - sigmas[1]))
    high, low = edit.split_at_level(sigmas, level, exact=False)
    assert float(low[0]) <= level * (1 + 1e-6) and (high[:-1] >= level * (1 - 1e-5)).all()
    assert torch.equal(edit.join([high, low], ["a", "b"]), sigmas)
    high, low = edit.split_at_level(sigmas, level, exact=True)
    assert high[-1] == low[0] and float(low[0]) == pytest.approx(level, rel=2e-6)
    assert set(sigmas.tolist()) <= set(torch.cat([high, low]).tolist())


def test_join_writes_equal_ends_once_and_keeps_a_gap():
    a, b, c = (torch.tensor(values, dtype=torch.float64) for values in ([1.0, 0.5], [0.5 + 1e-8, 0.25], [0.2, 0.0]))
    assert edit.join([a, b, c], ["a", "b", "c"]).tolist() == [1.0, 0.5, 0.25, 0.2, 0.0]


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("operation", "options", "message"),
    [
        ("smooth", {}, "unknown operation 'smooth'; use one of resample, shift, multiply, "),
        ("resample", {"steps": 0}, "steps must be 1 to 10000, got 0"),
        ("resample", {"axis": "snr"}, "unknown axis 'snr'; use one of log_snr, sigma, t"),
        ("shift", {"value": 0.0}, "shift must be a finite number above 0, got 0"),
        ("multiply", {"value": -2.0}, "factor must be a finite number above 0, got -2.0"),
        ("multiply", {"value": math.nan}, "factor must be .*nan"),
        ("multiply", {"value": 1.5, "keep_ends": False}, "multiply leads to sigma 1.5, but a flow model's pure noise"),
        ("multiply", {"value": 1.5}, r"multiply's result must fall .*\[0\] = 1 is followed by 1.4"),
        ("set_first", {"value": 0.5}, r"set_first's result must fall .*\[0\] = 0.5 is followed by"),
        ("set_first", {"value": math.inf}, r"set_first's result\[0\] is inf"),
        ("set_last", {"value": -1.0}, r"set_last's result\[20\] is -1"),
        ("clip", {"low": 0.5, "high": 0.25}, "clip needs 0 <= low < high, got low 0.5 and high 0.25"),
        ("clip", {"low": 1.0, "high": 2.0}, "nothing is left between 1 and 2: the schedule runs from 1 to 0"),
        ("insert", {"value": 1.5}, "cannot insert sigma 1.5: it must lie between the first level 1 and the last 0"),
        ("insert", {"value": 0.75}, "cannot insert sigma 0.75"),
    ],
)
def test_bad_edits_are_named(operation, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        edit.edit(CASES["flow"][0], operation, FLOW, **options)
    assert len(str(caught.value)) < 400


def test_bad_splits_and_joins_are_named():
    sigmas = CASES["flow"][0]
    for step in (0, -1, 20, 50):
        message = rf"splitting at step {step} leaves one part of the 20 step\(s\) empty; split at step 1 to 19"
        with pytest.raises(ValueError, match=message):
            edit.split(sigmas, step)
    with pytest.raises(ValueError, match="a schedule of one step cannot be split"):
        edit.split(CASES["one-step"][0], 1)
    for level in (1.0, 2.0, 0.0, 0.01, math.nan):
        with pytest.raises(ValueError, match=rf"splitting at sigma {level:g} leaves one part empty: .*from 1 over"):
            edit.split_at_level(sigmas, level, exact=False)
    with pytest.raises(ValueError, match=re.escape("b starts at sigma 1, above 0 where a ends")):
        edit.join([sigmas, sigmas], ["a", "b"])


def test_the_process_of_a_list_that_no_model_explains():
    assert isinstance(process_for(torch.tensor([1.0, 0.0]), "auto"), Flow)
    assert process_for(torch.tensor([14.6, 0.0]), "auto") == SD == process_for(torch.tensor([0.5, 0.0]), "vp")
    assert process_for(torch.tensor([4518.0, 0.0]), "auto") == SD.zero_terminal()
    with pytest.raises(ValueError, match="sigma 14.6 is no flow noise level"):
        process_for(torch.tensor([14.6, 0.0]), "flow")
