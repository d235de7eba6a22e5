"""The editing nodes on SIGMAS of real models, beside ComfyUI's own."""

import math

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler as core

from tidetable.nodes.schedule_editing import (
    EditSchedule,
    JoinSchedules,
    ScheduleFromText,
    ScheduleToText,
    SplitSchedule,
)
from tidetable.nodes.schedules import Schedule
from tidetable.runtime.model_sampling import patch_flow_shift
from tidetable.runtime.tiny import build_patcher
from tidetable.runtime.tiny_text import CONTEXT_WIDTH


pytestmark = pytest.mark.usefixtures("in_a_node")
NAMES = ("sdxl", "sd3", "flux", "wan", "flux-6", "sdxl-ztsnr")
SIGMAS = torch.linspace(1.0, 0.0, 11)


def schedule(model, spacing="trailing", steps=20, **options):
    return Schedule.execute(model, spacing, steps, 1.0, **options).args[0]


def edit(sigmas, operation, steps=20, axis="log_snr", value=1.0, low=0.0, high=0.0, keep_ends=True, **other):
    process = other.pop("process", "auto")
    return EditSchedule.execute(sigmas, operation, steps, axis, value, low, high, keep_ends, process, **other).args[0]


def split(sigmas, by="step", step=10, sigma=0.875, percent=0.5, log_snr=0.0, exact=False, process="auto", model=None):
    return SplitSchedule.execute(sigmas, by, step, sigma, percent, log_snr, exact, process, model).args


def join(*schedules):
    return JoinSchedules.execute(**{f"sigmas_{i}": sigmas for i, sigmas in enumerate(schedules, 1)}).args[0]


# ── beside ComfyUI's nodes ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [1, 7, 19])
def test_split_by_step_is_cores_split_and_joins_again(models, name, step):
    sigmas = schedule(models[name])
    parts = split(sigmas, step=step)
    for ours, theirs in zip(parts, core.SplitSigmas.execute(sigmas, step).args, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(join(*parts), sigmas)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("percent", [0.1, 0.35, 0.5, 0.8])
def test_split_by_percent_of_a_model_is_where_core_switches(models, name, percent):
    model = models[name]
    threshold = float(model.get_model_object("model_sampling").percent_to_sigma(percent))
    sigmas = schedule(model, "beta", 30)
    high, low = split(sigmas, "percent", percent=percent, model=model)
    assert (high[:-1] > threshold * (1 - 1e-5)).all() and float(low[0]) <= threshold * (1 + 1e-5)
    assert torch.equal(join(high, low), sigmas)
    high, low = split(sigmas, "percent", percent=percent, model=model, exact=True)
    assert float(high[-1]) == float(low[0]) == pytest.approx(threshold, rel=1e-5)


def test_split_by_percent_without_a_model_counts_steps():
    for percent, step in ((0.2, 2), (0.5, 5), (0.84, 8)):
        assert torch.equal(split(SIGMAS, "percent", percent=percent)[0], split(SIGMAS, step=step)[0])


@pytest.mark.parametrize("name", NAMES)
def test_split_by_log_snr(models, name):
    model = models[name]
    high, low = split(schedule(model), "log_snr", log_snr=-1.0, exact=True, model=model)
    sigma = 1 / (1 + math.exp(-0.5)) if name not in ("sdxl", "sdxl-ztsnr") else math.exp(0.5)
    assert float(low[0]) == float(high[-1]) == pytest.approx(sigma, rel=1e-6)


def test_split_at_wans_boundary(models):
    # Wan 2.2: the high-noise model does the steps whose t is 0.875 or above.
    sigmas = schedule(models["wan"], steps=30)
    high, low = split(sigmas, "sigma", sigma=0.875)
    assert (high[:-1] >= 0.875).all() and float(low[0]) <= 0.875
    assert len(high) + len(low) == len(sigmas) + 1


def test_flip_is_cores_flip(models):
    for name in NAMES:
        sigmas = schedule(models[name], "normal")
        flipped = edit(sigmas, "flip")
        assert torch.equal(flipped, core.FlipSigmas.execute(sigmas.clone()).args[0])
        assert torch.equal(edit(flipped, "flip")[:-1], sigmas[:-1])


def test_a_dragged_schedule_is_that_of_a_shifted_model(models):
    plain = patch_flow_shift(models["sd3"], "shift", 1.0, 0.0, 64, 64)[0]
    shifted = patch_flow_shift(models["sd3"], "shift", 5.0, 0.0, 64, 64)[0]
    dragged = edit(schedule(plain), "shift", value=5.0, model=plain)
    torch.testing.assert_close(dragged, schedule(shifted), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", ["log_snr", "sigma", "t"])
def test_resample_on_every_model(models, name, axis):
    sigmas = schedule(models[name], "karras", 12)
    assert torch.equal(edit(sigmas, "resample", 12, axis, model=models[name]), sigmas)
    fine = edit(sigmas, "resample", 36, axis, model=models[name])
    assert torch.equal(fine[::3], sigmas) and (fine.diff() < 0).all()


def test_two_halves_sample_what_the_whole_samples():
    model = build_patcher("mmdit-flow")
    generator = torch.Generator().manual_seed(0)
    noise, text = (torch.randn(shape, generator=generator) for shape in ((1, 3, 8, 8), (1, 4, CONTEXT_WIDTH)))
    cond, latent = [[text, {"pooled_output": text.mean(1)}]], torch.zeros(1, 3, 8, 8)
    euler = comfy.samplers.sampler_object("euler")

    def sample(noise, sigmas, latent):
        return comfy.sample.sample_custom(model, noise, 1.0, euler, sigmas, cond, cond, latent, seed=0)

    sigmas = schedule(model, steps=6)
    high, low = split(sigmas, "percent", percent=0.4, model=model)
    halves = sample(torch.zeros_like(noise), low, sample(noise, high, latent))
    torch.testing.assert_close(halves, sample(noise, sigmas, latent), rtol=1e-4, atol=1e-5)


# ── text ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", ["trailing", "karras", "log_snr", "laplace"])
@pytest.mark.parametrize("layout", ["line", "lines"])
def test_text_gives_the_same_sigmas_again(models, name, spacing, layout):
    sigmas = schedule(models[name], spacing, 50)
    shown = ScheduleToText.execute(sigmas, layout)
    assert shown.ui.value == shown.args[0]
    again = ScheduleFromText.execute(shown.args[0]).args[0]
    assert torch.equal(again, sigmas) and again.dtype == torch.float32


def test_a_rising_schedule_is_shown_and_not_read():
    text = ScheduleToText.execute(edit(SIGMAS, "flip"), "line").args[0]
    assert text.startswith("1e-04, 0.1, ")
    with pytest.raises(ValueError, match="flipped for unsampling"):
        ScheduleFromText.execute(text)


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────

BAD = [
    (torch.tensor([]), "0 value"),
    (torch.tensor([1.0]), "1 value"),
    (torch.tensor([1.0, math.nan, 0.0]), r"\[1\] is nan"),
    (torch.tensor([1.0, -0.5]), "is -0.5"),
    (torch.tensor([1.0, 0.5, 0.7, 0.0]), "is followed by 0.7"),
    (torch.zeros(2, 2), "one-dimensional"),
    ("1, 0", "got str"),
    (None, "got NoneType"),
]


@pytest.mark.parametrize(("sigmas", "message"), BAD)
def test_bad_sigmas_are_named_by_every_node(sigmas, message):
    for use in (
        lambda: edit(sigmas, "resample"),
        lambda: edit(sigmas, "flip"),
        lambda: split(sigmas),
        lambda: ScheduleToText.execute(sigmas, "line"),
        *([lambda: join(SIGMAS, sigmas)] if sigmas is not None else []),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            use()
        assert len(str(caught.value)) < 300


def test_other_bad_input_is_named(models):
    for bad, message in (
        (lambda: join(SIGMAS, None), "joining needs at least two schedules, got sigmas_1"),
        (lambda: join(SIGMAS, SIGMAS), "sigmas_2 starts at sigma 1, above 0 where sigmas_1 ends"),
        (lambda: split(SIGMAS, "time"), "unknown by 'time'; use one of step, sigma, percent, log_snr"),
        (lambda: split(SIGMAS, "percent", percent=1.5), "percent must be 0 to 1, got 1.5"),
        (lambda: split(SIGMAS, "percent", percent=math.nan), "percent must be 0 to 1, got nan"),
        (lambda: split(SIGMAS, "percent", percent=0.0), "splitting at step 0 leaves one part of the 10"),
        (
            lambda: split(schedule(models["sdxl"]), "percent", percent=0.0, model=models["sdxl"]),
            "leaves one part empty",
        ),
        (lambda: split(SIGMAS, "log_snr", process="ve"), "unknown process 've'; use one of auto, flow, vp"),
        (lambda: split(SIGMAS, "log_snr", log_snr=90.0), "leaves one part empty"),
        (lambda: split(SIGMAS, "percent", model="sd3"), "expected a diffusion MODEL, got str"),
        (
            lambda: edit(schedule(models["sdxl"]), "multiply", value=2.0, keep_ends=False, model=models["sdxl"]),
            "multiply leads to sigma 29.229., above the model's largest 14.6146",
        ),
        (lambda: edit(SIGMAS, "insert", value=0.5 + 1e-9), "cannot insert sigma 0.5"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            bad()
        assert len(str(caught.value)) < 300
