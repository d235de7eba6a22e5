"""Plot Schedules and Plot Training: what is drawn is what was given."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageColor

from tidetable.nodes.plots import PlotSchedules, PlotTraining
from tidetable.runtime import canvas
from tidetable.runtime.canvas import COLORS, linear_axis, log_axis
from tidetable.runtime.model_sampling import patch_flow_shift, read_sampling
from tidetable.runtime.plots import _by_t_lines, running_mean
from tidetable.schedules.curves import positions
from tidetable.schedules.process import VP
from tidetable.schedules.spacing import SPACINGS, flow_grid, table_grid
from tidetable.schedules.spacing import schedule as spaced
from tidetable.tests.host.model_zoo import zoo


pytestmark = pytest.mark.usefixtures("in_a_node")
VP_GRID = table_grid(VP.from_betas().ratio(torch.arange(1000, dtype=torch.float64) / 999))
FALLING = torch.linspace(1.0, 0.0, 31)


def plot(quantity="sigma", process="auto", y_axis="auto", width=512, height=384, **schedules):
    # x_axis, theme and model are among the schedules: older saved graphs do not have them
    return PlotSchedules.execute(quantity, process, y_axis, width, height, **schedules).args[0]


def plot_loss(width=512, height=384, **loss_map):
    return PlotTraining.execute(loss_map, width, height).args[0]


def coverage(image, color, header=0.2):
    """How much of each pixel below the legend is this color on white, [H', W]; 0 where it is something else."""
    picture = 1.0 - image[0].numpy()[int(image.shape[1] * header) :]
    ink = 1.0 - np.array(ImageColor.getrgb(color)) / 255
    amount = (picture @ ink) / (ink @ ink)
    is_other = np.abs(picture - amount[..., None] * ink).max(axis=-1) > 0.04
    return np.where(is_other | (amount < 0.2), 0.0, amount)


def curve(image, color):
    """Center of the color in each column that has it: {column: row}."""
    amount = coverage(image, color)
    rows = np.arange(len(amount))[:, None]
    has = np.nonzero(amount.sum(axis=0) > 0.3)[0]
    return {int(c): float((amount[:, c] * rows[:, 0]).sum() / amount[:, c].sum()) for c in has}


def is_image(image, width=512, height=384, top=1.0):
    values = image.unique()
    return (
        image.shape == (1, height, width, 3) and image.dtype == torch.float32 and image.device.type == "cpu"
        and float(values.min()) >= 0.0 and float(values.max()) == (top or values.max()) <= 1.0 and len(values) > 10
    )  # fmt: skip


# ── axes ────────────────────────────────────────────────────────────────────────────────────────────

numbers = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(st.lists(numbers, min_size=1, max_size=20), st.integers(2, 12))
def test_a_linear_axis_holds_its_values_and_its_labels_are_true(values, count):
    axis = linear_axis(values, count)
    assert all(-1e-9 <= axis.position(value) <= 1 + 1e-9 for value in values)
    ticks = [value for value, _ in axis.ticks]
    steps = np.diff(ticks)
    assert len(ticks) <= 2 * count + 2 and np.allclose(steps, steps[:1], rtol=1e-6)
    labels = [label for _, label in axis.ticks]
    assert len(set(labels)) == len(labels)
    # A label may round, but never to the wrong side of the middle between two ticks.
    span = abs(steps[0]) if len(steps) else axis.high - axis.low
    assert all(abs(float(label) - value) < 0.5 * span for value, label in axis.ticks)


@given(st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=20), st.integers(3, 12))
def test_a_log_axis_holds_its_values_and_its_labels_are_true(values, count):
    axis = log_axis(values, count)
    assert all(-1e-9 <= axis.position(value) <= 1 + 1e-9 for value in values)
    assert all(float(label) == pytest.approx(value) for value, label in axis.ticks)
    assert axis.position(10.0 * values[0]) > axis.position(values[0])


def test_what_has_no_place_on_an_axis():
    for value in (math.nan, math.inf, -math.inf):
        assert linear_axis([0.0, 1.0], 5).position(value) is None
    assert log_axis([0.0, 1.0], 5).position(0.0) is None
    assert linear_axis([math.nan], 5).position(0.5) == pytest.approx(0.5)


def test_ticks_are_round_numbers():
    assert [label for _, label in linear_axis([0.0, 1.0], 5).ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert [label for _, label in linear_axis([0.0, 1e-4], 4).ticks] == ["0", "5e-5", "1e-4"]
    assert [label for _, label in log_axis([0.01, 100.0], 6).ticks] == ["0.01", "0.1", "1", "10", "100"]


# ── Plot Schedules ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("quantity", ["sigma", "t", "log_snr", "step_size"])
@pytest.mark.parametrize("grid", [flow_grid(3.0), VP_GRID], ids=["flow", "vp"])
def test_eight_schedules_in_one_picture(quantity, grid):
    given_schedules = {f"sigmas_{i + 1}": spaced(grid, name, 20).float() for i, name in enumerate(list(SPACINGS)[:6])}
    given_schedules |= {"sigmas_7": spaced(grid, "simple", 5), "sigmas_8": spaced(grid, "karras", 120)}
    image = plot(quantity, **given_schedules, **{f"label_{i}": f"schedule {i}" for i in range(1, 9)})
    assert is_image(image)
    for color in COLORS[:2]:
        assert coverage(image, color, header=0.3).sum() > 3


@pytest.mark.parametrize(("width", "height"), [(256, 256), (1024, 640), (4096, 256), (300, 1200)])
def test_size_is_as_asked(width, height):
    assert is_image(plot(width=width, height=height, sigmas_1=FALLING, label_1="a label"), width, height)


def test_a_falling_schedule_is_drawn_falling_and_straight():
    heights = curve(plot(sigmas_1=FALLING), COLORS[0])
    columns = np.array(sorted(heights))
    rows = np.array([heights[column] for column in columns])
    assert columns[-1] - columns[0] > 0.8 * 512
    slope, offset = np.polyfit(columns, rows, 1)
    assert slope > 0  # rows count downwards
    assert np.abs(rows - (slope * columns + offset)).max() < 2.0


def test_the_shift_is_visible_at_its_place():
    # At half of the steps an unshifted flow schedule is at .5 and a shift of 3 at .75: half and a quarter down.
    for sigmas, fraction in (
        (spaced(flow_grid(1.0), "simple", 100), 0.5),
        (spaced(flow_grid(3.0), "simple", 100), 0.25),
    ):
        heights = curve(plot(sigmas_1=sigmas), COLORS[0])
        columns = sorted(heights)
        middle = min(columns, key=lambda column: abs(column - (columns[0] + columns[-1]) / 2))
        top, bottom = heights[columns[0]], heights[columns[-1]]
        assert (heights[middle] - top) / (bottom - top) == pytest.approx(fraction, abs=0.02)


def test_labels_change_only_the_legend():
    plain, labelled = (plot(sigmas_1=FALLING, label_1=label)[0] for label in ("one", "two"))
    differing = (plain != labelled).any(dim=-1).nonzero()
    assert len(differing) > 0 and int(differing[:, 0].max()) < 0.25 * 384


def test_order_of_inputs_and_gaps_between_them_do_not_matter():
    assert torch.equal(plot(sigmas_2=FALLING, label_2="x", sigmas_5=None), plot(sigmas_7=FALLING, label_7="x"))


def test_log_axis_leaves_out_zero_and_says_so():
    with_zero = spaced(VP_GRID, "karras", 20)
    assert is_image(plot(sigmas_1=with_zero, y_axis="log"))
    assert not torch.equal(plot(sigmas_1=with_zero, y_axis="log"), plot(sigmas_1=with_zero, y_axis="linear"))
    assert torch.equal(plot(sigmas_1=with_zero, y_axis="log"), plot(sigmas_1=with_zero))  # auto, for sigmas up to 14.6
    assert torch.equal(plot(sigmas_1=FALLING, y_axis="linear"), plot(sigmas_1=FALLING))  # auto, for flow


@pytest.mark.parametrize("x_axis", ["t", "percent", "log_snr"])
@pytest.mark.parametrize("quantity", ["sigma", "t", "log_snr", "step_size"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_quantity_over_every_axis_on_light_and_dark(quantity, x_axis, theme):
    paper, colors = canvas.THEMES[theme].paper, canvas.THEMES[theme].lines
    image = plot(quantity, x_axis=x_axis, theme=theme, sigmas_1=FALLING, sigmas_2=spaced(VP_GRID, "karras", 9).float())
    assert is_image(image, top=None)
    assert image[0, 2, 2].tolist() == pytest.approx([c / 255 for c in ImageColor.getrgb(paper)])
    for color in colors[:2]:
        ink = torch.tensor(ImageColor.getrgb(color)) / 255
        assert ((image[0, 80:] - ink).abs().amax(dim=-1) < 0.03).sum() > 8


@pytest.mark.parametrize("theme", canvas.THEMES.values(), ids=canvas.THEMES)
def test_lines_and_text_stand_out_from_the_paper(theme):
    """WCAG 2.1's contrast ratio: 4.5 for text, 3 for lines (light's pale ones are told apart by dashes, too)."""
    for color, least in ((theme.ink, 7.0), (theme.muted, 4.5), *((line, 2.0) for line in theme.lines)):
        light, dark = sorted((luminance(color), luminance(theme.paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, color


def luminance(color):
    channels = (c / 255 for c in ImageColor.getrgb(color)[:3])
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_noise_stands_on_the_left_of_every_axis():
    for x_axis in ("step", "t", "percent", "log_snr"):
        heights = curve(plot(x_axis=x_axis, sigmas_1=FALLING), COLORS[0])
        columns = sorted(heights)
        assert heights[columns[0]] < heights[columns[-1]], x_axis  # rows count downwards, sigma falls


def test_sigma_over_t_is_a_straight_line_for_flow():
    uneven = spaced(flow_grid(6.0), "karras", 30)
    heights = curve(plot(x_axis="t", sigmas_1=uneven), COLORS[0])
    columns = np.array(sorted(heights))
    rows = np.array([heights[column] for column in columns])
    assert np.abs(rows - np.polyval(np.polyfit(columns, rows, 1), columns)).max() < 2.0


def test_the_model_says_what_percent_is():
    shifted = patch_flow_shift(zoo("sd3"), "shift", 4.0, 0.0, 64, 64)[0]
    sigmas = spaced(flow_grid(4.0), "trailing", 30)
    # Percent of a model undoes its shift: equal steps in percent, so the same picture as over the steps' fraction.
    with_model, without = (curve(plot(x_axis="percent", sigmas_1=sigmas, model=m), COLORS[0]) for m in (shifted, None))
    assert with_model == pytest.approx(without, abs=0.5)
    other = curve(plot(x_axis="percent", sigmas_1=spaced(flow_grid(4.0), "linear", 30), model=shifted), COLORS[0])
    common = sorted(set(other) & set(without))
    assert max(abs(other[column] - without[column]) for column in common) < 3.0, "one curve: sigma of percent"


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_percent_of_a_model_is_the_hosts(name):
    model = zoo(name)
    sampling = read_sampling(model)
    for percent in (0.1, 0.37, 0.5, 0.9):
        sigma = torch.tensor([float(sampling.host.percent_to_sigma(percent)), 0.0], dtype=torch.float64)
        assert positions(sigma, "percent", sampling.process, sampling.shift or 1.0) == pytest.approx(
            [percent, 1.0], abs=2e-5
        )


@pytest.mark.parametrize("label", ["", "   ", "Ä ü ñ", "中文标签", "σ → 0", "line\nbreak", "👩‍🔬", "x" * 200])
def test_any_reasonable_label(label):
    assert is_image(plot(sigmas_1=FALLING, label_1=label))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to plot: connect SIGMAS"),
        ({"sigmas_1": None, "label_1": "x"}, "nothing to plot"),
        ({"sigmas_1": torch.tensor([])}, "sigmas_1 has 0 value"),
        ({"sigmas_3": torch.tensor([1.0])}, "sigmas_3 has 1 value"),
        ({"sigmas_1": torch.tensor([1.0, math.nan, 0.0])}, r"sigmas_1\[1\] is nan"),
        ({"sigmas_1": torch.tensor([math.inf, 0.0])}, r"sigmas_1\[0\] is inf"),
        ({"sigmas_1": torch.tensor([0.0, 0.5, 1.0])}, "sigmas_1 must fall"),
        ({"sigmas_1": torch.tensor([1.0, -0.5])}, r"sigmas_1\[1\] is -0.5"),
        ({"sigmas_1": torch.zeros(2, 3)}, "one-dimensional"),
        ({"sigmas_1": "karras"}, "one-dimensional tensor .*got str"),
        ({"sigmas_1": FALLING, "label_1": "x" * 10_000}, "label_1 has 10000 characters; use at most 200"),
        ({"sigmas_1": FALLING, "quantity": "snr"}, "unknown quantity 'snr'; use one of sigma, t, log_snr, step_size"),
        ({"sigmas_1": FALLING, "x_axis": "time"}, "unknown x_axis 'time'; use one of step, t, percent, log_snr"),
        ({"sigmas_1": FALLING, "theme": "blue"}, "unknown theme 'blue'; use one of light, dark"),
        ({"sigmas_1": FALLING, "model": "sd3"}, "expected a diffusion MODEL, got str"),
        ({"sigmas_1": FALLING, "process": "ve"}, "unknown process 've'; use one of auto, flow, vp"),
        ({"sigmas_1": FALLING, "y_axis": "y" * 10_000}, "unknown y_axis 'yyy.*use one of auto, linear, log"),
        ({"sigmas_1": FALLING * 14, "process": "flow"}, "sigma 14 is no flow noise level"),
        ({"sigmas_1": FALLING, "width": 0}, "width must be 256 to 4096 pixels, got 0"),
        ({"sigmas_1": FALLING, "height": 10**6}, "height must be 256 to 4096 pixels, got 1000000"),
    ],
)
def test_bad_schedules_are_named(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        plot(**arguments)
    assert len(str(caught.value)) < 300


# ── Plot Training ───────────────────────────────────────────────────────────────────────────────────

LOSSES = [1.0 / step + 0.1 for step in range(1, 101)]


def test_a_full_record_has_all_panels():
    record = {
        "loss": LOSSES,
        "loss_smoothed": LOSSES,
        "lr": [1e-4] * 100,
        "grad_norm": [0.5 + 0.1 * (i % 3) for i in range(100)],
        "validation_steps": [25, 50, 75, 100],
        "validation_loss": [0.5, 0.4, 0.3, 0.2],
        "validation_base": 0.9,
    }
    image = plot_loss(768, 768, **record)
    assert is_image(image, 768, 768)
    for color in (COLORS[0], COLORS[1], COLORS[2], COLORS[4]):
        assert coverage(image, color, header=0.2).sum() > 20


def test_validation_by_t_is_drawn_as_shares_of_what_it_was():
    """Losses of any scale make the same panel, and one level that gets worse rises over one that gets better."""
    record = {"loss": LOSSES, "validation_steps": [0, 50, 100], "validation_loss": [0.5, 0.4, 0.4]}
    rows = {"validation_t": [0.1, 0.9], "validation_by_t": [[4.0, 0.1], [3.0, 0.11], [2.0, 0.14]]}
    scaled = {**rows, "validation_by_t": [[40.0, 0.3], [30.0, 0.33], [20.0, 0.42]]}
    image = plot_loss(768, 768, **record, **rows)
    assert torch.equal(image, plot_loss(768, 768, **record, **scaled))
    assert not torch.equal(image, plot_loss(768, 768, **record))
    lines = _by_t_lines({**record, **rows})
    assert [line.y[-1] for line in lines] == pytest.approx([1.0, 0.5, 1.4])


def test_cores_loss_map_of_tensors_is_the_same_picture():
    assert torch.equal(
        plot_loss(loss=LOSSES), plot_loss(loss=[torch.tensor(value, dtype=torch.float64) for value in LOSSES])
    )


def test_a_falling_loss_is_drawn_falling():
    heights = curve(plot_loss(loss=[1.0 - 0.01 * step for step in range(19)]), COLORS[0])
    rows = [heights[column] for column in sorted(heights)]
    assert rows[-1] - rows[0] > 100 and max(np.diff(rows)) < 8


def test_nan_losses_are_a_gap_with_a_note():
    losses = [0.5] * 10 + [math.nan] * 5 + [0.5] * 4
    whole, holed = (curve(plot_loss(loss=values), COLORS[0]) for values in ([0.5] * 19, losses))
    columns = sorted(set(whole) - set(holed))
    assert columns and max(columns) - min(columns) + 1 == len(columns), "one gap, not many"
    middle = (min(whole) + max(whole)) / 2
    assert min(columns) <= middle + 0.2 * 512 and len(columns) > 0.15 * 512
    note = plot_loss(loss=losses)[0, -30:] != plot_loss(loss=[0.5] * 19)[0, -30:]
    assert note.any()


@pytest.mark.parametrize(
    "losses",
    [
        [0.5],
        [0.5] * 300,
        [math.nan],
        [math.inf, 0.1],
        [math.nan] * 40,
        [1e-30, 1e30],
        [0.0, 0.0],
        [-1.0, 2.0],
        [1e300] * 3,
    ],
    ids=str,
)
def test_odd_runs_are_still_drawn(losses):
    assert is_image(plot_loss(loss=losses))


def test_the_running_mean_is_a_mean():
    values = [1.0, 3.0, math.nan, 5.0, math.nan, math.nan, math.nan]
    means = running_mean(values, 3)
    assert means[:6] == [1.0, 2.0, 2.0, 4.0, 5.0, 5.0] and math.isnan(means[6])


@pytest.mark.parametrize(
    ("loss_map", "message"),
    [
        (None, 'expected a LOSS_MAP with a list "loss".*NoneType'),
        ({}, "expected a LOSS_MAP.*nothing"),
        ({"lr": [1.0]}, "expected a LOSS_MAP.*'lr'"),
        ([0.1, 0.2], "expected a LOSS_MAP.*list"),
        ({"loss": []}, "no losses: no training step was finished"),
        ({"loss": "0.1"}, "loss must be a list of numbers, got str"),
        ({"loss": 0.1}, "loss must be a list of numbers, got float"),
        ({"loss": ["x" * 10_000]}, "loss must hold numbers, got str"),
        ({"loss": [None]}, "loss must hold numbers, got NoneType"),
        ({"loss": [torch.zeros(3)]}, "loss must hold numbers, got Tensor"),
        ({"loss": [0.1, 0.2], "lr": [0.1]}, "lr has 1 values but loss has 2"),
        ({"loss": [0.1], "loss_smoothed": [0.1, 0.2]}, "loss_smoothed has 2 values but loss has 1"),
        (
            {"loss": [0.1], "validation_steps": [1], "validation_loss": []},
            "validation_loss has 0 values but validation_s",
        ),
        (
            {
                "loss": [0.1],
                "validation_steps": [0, 1],
                "validation_loss": [1, 1],
                "validation_t": [0.5, 0.9],
                "validation_by_t": [[1.0, 1.0], [1.0]],
            },
            "a row of validation_by_t has 1 values but validation_t has 2",
        ),
        ({"loss": [0.1], "validation_base": "low"}, "validation_base must hold numbers, got str"),
    ],
)
def test_bad_loss_maps_are_named(loss_map, message):
    with pytest.raises(ValueError, match=message) as caught:
        PlotTraining.execute(loss_map, 512, 384)
    assert len(str(caught.value)) < 300


def test_a_size_that_cannot_be_is_named():
    with pytest.raises(ValueError, match="height must be 256 to 4096 pixels, got 8"):
        plot_loss(512, 8, loss=[0.1])


def test_fonts_cover_what_they_can():
    assert canvas.font_for("plain", 15) is canvas.font_for("also plain", 15)
    long = canvas.shorten("a very long label indeed", 15, 80)
    assert long.endswith("...") and canvas.font_for(long, 15).getlength(long) <= 80
    assert canvas.shorten("short", 15, 200) == "short"
