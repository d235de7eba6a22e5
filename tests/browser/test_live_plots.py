"""Live curves: a widget is dragged in the real page, and what is drawn meanwhile is what Python computes for it."""

import json
import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from devtools.server import PACK_FOLDER
from tidetable.nodes.model_sampling import FlowShift
from tidetable.nodes.schedules import Schedule
from tidetable.runtime.shells import family_shell
from tidetable.runtime.tiny import build_patcher
from tidetable.schedules.shift import shift_t
from tidetable.tests.browser.pages import Page, node_box, save_part


pytestmark = pytest.mark.browser

FLOW_SHIFT, SCHEDULE, PLOT, TINY = (
    f"Tidetable_{name}" for name in ("FlowShift", "Schedule", "PlotSchedules", "LoadTinyModel")
)
AXES_HEIGHT = 24  # of MARGIN in web/curves.js, above and below the plot
SHIFT_OF = {"canvas": 5.0, "vue": 7.0}  # differing, so that no node is cached and all run
# A graph from [type, [x, y], {widget: value}, {input: [index of node, output]}]; returns the ids.
BUILD = """nodes => {
    app.graph.clear()
    app.canvas.ds.scale = 1
    app.canvas.ds.offset = [120, 120]
    const made = nodes.map(([type, pos, widgets]) => {
        const node = LiteGraph.createNode(type)
        node.pos = pos
        app.graph.add(node)
        for (const [name, value] of Object.entries(widgets)) {
            const widget = node.widgets.find(w => w.name === name)
            widget.value = value
            widget.callback?.(value)
        }
        return node
    })
    nodes.forEach(([type, pos, widgets, links], i) => {
        for (const [name, [from, slot]] of Object.entries(links)) {
            made[from].connect(slot, made[i], made[i].inputs.findIndex(input => input.name === name))
        }
    })
    app.canvas.setDirty(true, true)
    return made.map(node => String(node.id))
}"""
# What the panel of a node shows: its texts, and the points of its curves in pixels, y upwards.
READ = """id => {
    const node = app.canvas.graph.nodes.find(node => String(node.id) === id)
    const element = node?.widgets.find(widget => widget.name === 'curve')?.element
    if (!element) return {connected: false, facts: '', message: '', choice: null, curves: {}}  // being rebuilt
    const part = name => element.querySelector('.tidetable-' + name)
    const points = path => [...path.getAttribute('d').matchAll(/[ML](\\S+) (\\S+?)(?=[ML]|$)/g)]
        .map(([, x, y]) => [Number(x), -Number(y)])
    return {
        connected: element.isConnected,
        width: part('chart').clientWidth,
        height: part('chart').clientHeight,
        facts: part('head').querySelector('span').textContent,
        message: part('message').textContent,
        choice: part('head').querySelector('select').hidden ? null
            : part('head').querySelector('select').selectedOptions[0]?.text,
        curves: part('chart').hidden ? {} : Object.fromEntries(
            [...element.querySelectorAll('path')].map(path => [path.dataset.label, points(path)])),
    }
}"""
VALUE = """([id, name]) => app.canvas.graph.nodes.find(node => String(node.id) === id)
    .widgets.find(widget => widget.name === name).value"""
SET = """([id, name, value]) => {
    const widget = app.canvas.graph.nodes.find(node => String(node.id) === id).widgets.find(w => w.name === name)
    widget.value = value
    widget.callback?.(value)
}"""


@pytest.fixture(autouse=True)
def _as_in_a_node():
    with torch.inference_mode():
        yield


def build(page: Page, *nodes) -> list[str]:
    return page.evaluate(BUILD, list(nodes))


def forget_models(page: Page) -> None:
    """As if nothing had run yet. After the first panel is there, which asks the server."""
    page.page.wait_for_timeout(700)
    page.evaluate(
        """async folder => {
            const { earlier, models } = await import(`/extensions/${folder}/upstream.js`)
            earlier.clear()
            models.clear()
        }""",
        PACK_FOLDER,
    )


def until(page: Page, node_id: str, is_as_wanted, seconds: float = 60.0) -> dict:
    """What the node's panel shows once that is as wanted; fails with what it shows instead."""
    deadline = time.monotonic() + seconds
    while True:
        shown = page.evaluate(READ, node_id)
        if is_as_wanted(shown):
            return shown
        assert time.monotonic() < deadline, json.dumps(shown)[:2000]
        page.page.wait_for_timeout(50)


def draws(shown: dict, label: str, expected: list[float], low: float = 0.0, high: float = 1.0) -> bool:
    """Whether this curve's points are the expected values on an axis from low to high, to a fraction of a pixel."""
    curve = next((points for name, points in shown["curves"].items() if name.startswith(label)), None)
    if curve is None or len(curve) != len(expected) or not shown["connected"]:
        return False
    size = shown["height"] - AXES_HEIGHT
    drawn = np.array(curve)[:, 1] / size + 1.0
    return bool(np.abs(drawn - (np.array(expected) - low) / (high - low)).max() * size < 0.05)


def schedule(model, **widgets) -> list[float]:
    return Schedule.execute(model, **widgets).args[0].tolist()


def drag(page: Page, node_id: str, name: str, seen) -> None:
    """Drag a number's widget with the mouse; `seen` is called while the button is held, at several values."""
    x, y, width = widget_box(page, node_id, name)
    mouse = page.page.mouse
    mouse.move(x + 0.5 * width, y)
    mouse.down()
    for share in (0.48, 0.45, 0.41, 0.36):
        mouse.move(x + share * width, y, steps=4)
        seen()
    mouse.up()


def widget_box(page: Page, node_id: str, name: str) -> tuple[float, float, float]:
    """Left end, middle height and width of a widget's value on the screen."""
    if page.mode == "vue":
        rows = page.page.locator(f'[data-node-id="{node_id}"] .lg-node-widget')
        row = next(rows.nth(i) for i in range(rows.count()) if name in rows.nth(i).inner_text().split())
        slider = row.locator('[data-slider-impl], [role="slider"]').first
        box = row.bounding_box()
        thumb = slider.bounding_box()
        middle = thumb["x"] + thumb["width"] / 2
        return middle - box["width"] * 0.5, thumb["y"] + thumb["height"] / 2, box["width"]
    return tuple(
        page.evaluate(
            """([id, name]) => {
                const node = app.canvas.graph.nodes.find(node => String(node.id) === id)
                const widget = node.widgets.find(widget => widget.name === name)
                const at = offset => app.canvas.ds.convertOffsetToCanvas(offset)
                const [left, y] = at([node.pos[0] + 15, node.pos[1] + widget.y + 12])
                const [right] = at([node.pos[0] + node.size[0] - 15, 0])
                const rect = app.canvas.canvas.getBoundingClientRect()
                return [rect.x + left, rect.y + y, right - left]
            }""",
            [node_id, name],
        )
    )


def test_a_curve_follows_the_mouse(page: Page, client):
    """denoise of Schedule is dragged: at each stop the curve is the schedule for the value that the widget has then."""
    _, node = build(page, [TINY, [0, 0], {"name": "mmdit-flow"}, {}], [SCHEDULE, [300, 0], {}, {"model": [0, 0]}])
    model = build_patcher("mmdit-flow")
    until(page, node, lambda shown: draws(shown, "sigma", torch.linspace(1, 0, 21).tolist()))
    history = client.get("/history")
    values = []

    def seen():
        page.page.wait_for_timeout(150)
        values.append(page.evaluate(VALUE, [node, "denoise"]))
        expected = schedule(model, spacing="trailing", steps=20, denoise=values[-1])
        shown = until(page, node, lambda shown: draws(shown, "sigma", expected))
        assert shown["facts"].startswith(f"20 steps · sigma {expected[0]:.4g} ")

    drag(page, node, "denoise", seen)
    assert len(set(values)) == len(values) and all(a > b for a, b in pairwise(values)), values
    assert client.get("/history") == history and client.get("/prompt")["exec_info"]["queue_remaining"] == 0
    save_part(page, "live-schedule", node_box(page, node))
    assert page.complaints == []


def test_flow_shift_shows_the_shift_that_it_would_set(page: Page):
    """A given shift needs no model; an official one needs its family, which the user can name before anything ran."""
    (node,) = build(page, [FLOW_SHIFT, [0, 0], {"mode": "shift"}, {}])
    forget_models(page)
    shares = np.linspace(1.0, 0.0, 51)

    def follows() -> dict:
        shift = page.evaluate(VALUE, [node, "shift"])
        expected = shift_t(torch.as_tensor(shares), shift).tolist()
        shown = until(page, node, lambda shown: draws(shown, "shifted", expected))
        assert draws(shown, "shift 1", shares.tolist())
        assert shown["facts"] == f"shift {shift:.4f} · mu {np.log(shift):.4f}"
        return shown

    follows()
    before = page.evaluate(VALUE, [node, "shift"])
    if page.mode == "canvas":
        drag(page, node, "shift", follows)
    else:  # plain numbers cannot be dragged in the older frontend's Vue mode
        field = page.page.locator(f'[data-node-id="{node}"] .lg-node-widget').nth(1).locator("input")
        box = field.bounding_box()
        page.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.page.mouse.down()
        for distance in (20, 40, 60):
            page.page.mouse.move(box["x"] + box["width"] / 2 + distance, box["y"] + box["height"] / 2, steps=5)
            follows()
        page.page.mouse.up()
        if page.evaluate(VALUE, [node, "shift"]) == before:
            field.click(click_count=3)
            page.page.keyboard.type("7.5")
            page.page.keyboard.press("Enter")
    page.page.wait_for_timeout(200)
    assert page.evaluate(VALUE, [node, "shift"]) != before
    assert follows()["choice"] is None

    page.evaluate(SET, [node, "mode", "official"])
    shown = until(page, node, lambda shown: "choose a family" in shown["message"])
    assert shown["curves"] == {}
    save_part(page, "live-shift-asks", node_box(page, node))
    select = page.page.locator(".tidetable-live select")
    select.select_option("qwen_image")
    for name, value in (("width", 1664), ("height", 928)):
        page.evaluate(SET, [node, name, value])
    _, shift, mu = FlowShift.execute(family_shell("qwen_image").patcher(), "official", 1.0, 0.0, 1664, 928).args[:3]
    shown = until(page, node, lambda shown: shown["facts"] == f"shift {shift:.4f} · mu {mu:.4f}")
    assert draws(shown, "shifted", shift_t(torch.as_tensor(shares), shift).tolist())
    save_part(page, "live-shift", node_box(page, node))
    assert page.complaints == []


def test_plot_schedules_follows_what_feeds_it(page: Page):
    _, shift, first, second, _, plot = build(
        page,
        [TINY, [0, 0], {"name": "mmdit-flow"}, {}],
        [FLOW_SHIFT, [280, 0], {"mode": "shift", "shift": 3.0}, {"model": [0, 0]}],
        [SCHEDULE, [620, 0], {}, {"model": [1, 0]}],
        [SCHEDULE, [620, 400], {"spacing": "karras"}, {"model": [1, 0]}],
        ["BasicScheduler", [280, 500], {}, {"model": [1, 0]}],
        [PLOT, [960, 0], {"label_2": "ρ"}, {"sigmas_1": [2, 0], "sigmas_2": [3, 0], "sigmas_4": [4, 0]}],
    )
    for value in (3.0, 9.0):
        page.evaluate(SET, [shift, "shift", value])
        model = FlowShift.execute(build_patcher("mmdit-flow"), "shift", value, 0.0, 64, 64).args[0]
        expected = {
            "sigmas_1 (20 steps)": schedule(model, spacing="trailing", steps=20, denoise=1.0),
            "ρ (20 steps)": schedule(model, spacing="karras", steps=20, denoise=1.0),
        }
        shown = until(
            page,
            plot,
            lambda shown: (
                set(shown["curves"]) == set(expected)  # noqa: B023
                and all(draws(shown, name, values) for name, values in expected.items())  # noqa: B023
            ),
        )
        assert "sigmas_4 comes from BasicScheduler, which is known only when it runs" in shown["message"]
    page.evaluate(SET, [plot, "quantity", "step_size"])
    falls = {name: [a - b for a, b in pairwise(values)] for name, values in expected.items()}
    ends = [f(fall for one in falls.values() for fall in one) for f in (min, max)]
    until(page, plot, lambda shown: all(draws(shown, name, fall, *ends) for name, fall in falls.items()))
    save_part(page, "live-plot", node_box(page, shift, first, second, plot))
    assert page.complaints == []


def test_a_model_is_known_once_it_ran(page: Page):
    """Behind a node of somebody else the model is unknown: the panel asks, and after a run it knows."""
    _, _, node, plot, _ = build(
        page,
        [TINY, [0, 0], {"name": "mmdit-flow"}, {}],
        ["ModelSamplingSD3", [280, 0], {"shift": SHIFT_OF[page.mode]}, {"model": [0, 0]}],
        [SCHEDULE, [560, 0], {"steps": 4}, {"model": [1, 0]}],
        [PLOT, [900, 0], {}, {"sigmas_1": [2, 0]}],
        ["PreviewImage", [1280, 0], {}, {"images": [3, 0]}],
    )
    forget_models(page)
    shown = until(page, node, lambda shown: "Run it once, or choose a family" in shown["message"])
    assert shown["curves"] == {} and shown["choice"] == "choose a family …"
    assert "sigmas_1: The model is known only" in until(page, plot, lambda shown: shown["message"])["message"]
    page.evaluate("async () => { await app.queuePrompt(0, 1) }")
    expected = shift_t(torch.linspace(1, 0, 5, dtype=torch.float64), SHIFT_OF[page.mode]).tolist()
    for one in (node, plot):
        until(page, one, lambda shown: draws(shown, "sig", expected))
    assert page.evaluate(READ, node)["choice"].startswith("as run: Tidetable")
    save_part(page, "live-as-run", node_box(page, node, plot))
    page.page.locator(".tidetable-live select").first.select_option("flux")
    model = family_shell("flux").patcher()
    expected = schedule(model, spacing="trailing", steps=4, denoise=1.0)
    for one in (node, plot):
        until(page, one, lambda shown: draws(shown, "sig", expected))
    output = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert set(output[node]["inputs"]) == {entry.id for entry in Schedule.GET_SCHEMA().inputs}
    assert page.complaints == []


UNDO = """async () => {
    const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker
    await tracker.undo()
}"""
CAPTURE = """() => {
    const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker
    tracker.captureCanvasState ? tracker.captureCanvasState() : tracker.checkState()
    return tracker.undoQueue.length
}"""


def ids_of(page: Page, node_type: str) -> list[str]:
    return page.evaluate(
        "type => app.canvas.graph.nodes.filter(node => node.type === type).map(node => String(node.id))", node_type
    )


def lines(page: Page, node: str, steps: int) -> dict:
    expected = torch.linspace(1, 0, steps + 1).tolist()
    shown = until(page, node, lambda shown: draws(shown, "sigma", expected))
    if page.mode == "vue":  # what the user sees is this element and no copy of it
        shown_there = page.page.locator(f'[data-node-id="{node}"] .tidetable-live path')
        assert shown_there.count() == 1 and shown_there.first.is_visible()
    return shown


def test_undo_redo_copy_and_collapse_keep_the_curve(page: Page):
    _, node = build(page, [TINY, [0, 0], {"name": "mmdit-flow"}, {}], [SCHEDULE, [300, 0], {}, {"model": [0, 0]}])
    lines(page, node, 20)
    page.evaluate(CAPTURE)
    page.page.wait_for_timeout(300)  # the newer page takes what follows at once for the same change
    page.evaluate(SET, [node, "steps", 8])
    lines(page, node, 8)
    depth = page.evaluate(CAPTURE)
    page.page.wait_for_timeout(500)
    assert page.evaluate(CAPTURE) == depth, "the panel itself is no change of the workflow"
    page.evaluate(UNDO)
    lines(page, node, 20)
    page.evaluate(UNDO.replace("undo", "redo"))
    lines(page, node, 8)

    page.evaluate(
        """id => {
            const node = app.canvas.graph.nodes.find(node => String(node.id) === id)
            app.canvas.selectItems([node])
            app.canvas.copyToClipboard()
            app.canvas.pasteFromClipboard({ connectInputs: true })
        }""",
        node,
    )
    page.page.wait_for_timeout(500)
    (copy,) = set(ids_of(page, SCHEDULE)) - {node}
    lines(page, copy, 8)
    page.evaluate(SET, [copy, "steps", 3])
    lines(page, copy, 3)
    lines(page, node, 8)

    collapse = "id => app.canvas.graph.nodes.find(node => String(node.id) === id).collapse()"
    page.evaluate(collapse, node)
    page.page.wait_for_timeout(500)
    page.evaluate(SET, [node, "steps", 5])
    page.evaluate(collapse, node)
    page.page.wait_for_timeout(500)
    lines(page, node, 5)
    assert page.complaints == []


def test_a_subgraph_is_looked_into_and_out_of(page: Page):
    """Flow Shift and Schedule in a subgraph, the model outside: the plot outside and the nodes inside show the same."""
    _, shift, node, plot = build(
        page,
        [TINY, [0, 0], {"name": "mmdit-flow"}, {}],
        [FLOW_SHIFT, [280, 0], {"mode": "shift", "shift": 4.0}, {"model": [0, 0]}],
        [SCHEDULE, [620, 0], {"steps": 6}, {"model": [1, 0]}],
        [PLOT, [960, 0], {}, {"sigmas_1": [2, 0]}],
    )
    page.evaluate(
        """ids => {
            const nodes = app.graph.nodes.filter(node => ids.includes(String(node.id)))
            app.canvas.selectItems(nodes)
            app.graph.convertToSubgraph(new Set(nodes))
        }""",
        [shift, node],
    )
    page.page.wait_for_timeout(800)
    expected = shift_t(torch.linspace(1, 0, 7, dtype=torch.float64), 4.0).tolist()
    until(page, plot, lambda shown: draws(shown, "sig", expected))
    page.evaluate("app.canvas.setGraph([...app.graph.subgraphs.values()][0])")
    page.page.wait_for_timeout(1000)
    (inner,) = ids_of(page, SCHEDULE)
    (inner_shift,) = ids_of(page, FLOW_SHIFT)
    until(page, inner, lambda shown: draws(shown, "sigma", expected))
    page.evaluate(SET, [inner_shift, "shift", 2.0])
    expected = shift_t(torch.linspace(1, 0, 7, dtype=torch.float64), 2.0).tolist()
    until(page, inner, lambda shown: draws(shown, "sigma", expected))
    save_part(page, "live-subgraph", node_box(page, inner, inner_shift))
    page.evaluate("app.canvas.setGraph(app.graph)")
    page.page.wait_for_timeout(1000)
    until(page, plot, lambda shown: draws(shown, "sig", expected))
    assert page.complaints == []
