"""The real page in headless Chromium: it opens with the pack, loads every example workflow, and has no complaints.

Pictures are left in tests/output/. Both ways in which the page can draw nodes are tried.
"""

import json
from itertools import combinations
from pathlib import Path

import pytest

from devtools.workflow import to_prompt
from tidetable.tests.browser.pages import Page, load, save
from tidetable.tests.test_architecture import ROOT


pytestmark = pytest.mark.browser

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


def test_the_page_knows_our_nodes(page, object_info):
    ours = sorted(name for name in object_info if name.startswith("Tidetable_"))
    known = page.evaluate("Object.keys(LiteGraph.registered_node_types).filter(n => n.startsWith('Tidetable_'))")
    assert sorted(known) == ours
    assert page.complaints == []


def test_every_node_can_be_placed(page, object_info):
    """One of each, as from the menu: the widgets are there, and nothing is thrown on the way."""
    ours = [*sorted(name for name in object_info if name.startswith("Tidetable_")), "KSampler", "LoadImage"]
    placed = page.evaluate(
        """names => {
            app.graph.clear()
            app.canvas.ds.scale = 0.6
            app.canvas.ds.offset = [140, 140]
            return names.map((name, i) => {
                const node = LiteGraph.createNode(name)
                node.pos = [420 * (i % 5), 680 * Math.floor(i / 5)]
                app.graph.add(node)
                return {type: node.type, inputs: (node.inputs ?? []).map(input => input.name)}
            })
        }""",
        ours,
    )
    page.page.wait_for_timeout(500)
    save(page, "all-nodes")
    for name, node in zip(ours, placed, strict=True):
        assert node["type"] == name
        if name.startswith("Tidetable_"):
            order = object_info[name]["input_order"]
            assert set(node["inputs"]) <= {*order.get("required", ()), *order.get("optional", ())}
    assert_same_prompt(page, page.evaluate("app.graph.serialize()"), object_info)
    assert page.complaints == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_workflow_loads(page, object_info, path: Path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    load(page, workflow)
    loaded = page.evaluate(
        "app.graph._nodes.map(n => [String(n.id), n.type, n.type in LiteGraph.registered_node_types])"
    )
    assert sorted(loaded) == sorted([str(node["id"]), node["type"], True] for node in workflow["nodes"])
    save(page, path.stem)
    alerts = page.evaluate("[...document.querySelectorAll('.p-toast-message')].map(alert => alert.innerText)")
    assert alerts == [], "the page says that the file is not as it should be"
    assert_laid_out(page)
    assert_same_prompt(page, workflow, object_info)
    assert page.complaints == []


# Left, top, right, bottom of every node and group, in the graph's coordinates, as the page draws them.
BOXES = """() => {
    const {scale, offset} = app.canvas.ds
    const canvas = app.canvas.canvas.getBoundingClientRect()
    const drawn = node => {
        const element = LiteGraph.vueNodesMode && document.querySelector(`[data-node-id="${node.id}"]`)
        const {x, y, right, bottom} = element ? element.getBoundingClientRect() : {}
        if (element) return [[x - canvas.x, y - canvas.y], [right - canvas.x, bottom - canvas.y]]
            .flatMap(([x, y]) => [x / scale - offset[0], y / scale - offset[1]])
        const [left, top, width, height] = node.getBounding()
        return [left, top, left + width, top + height]
    }
    return {
        nodes: app.graph._nodes.map(node => [node.type, ...drawn(node)]),
        groups: app.graph._groups.map(({title, pos, size}) => [title, ...pos, pos[0] + size[0], pos[1] + size[1]]),
    }
}"""


def assert_laid_out(page: Page) -> None:
    """No node lies over another, and each lies in one of the groups, in whatever way its size is computed here."""
    boxes = page.evaluate(BOXES)
    problems = []
    for (one, *a), (other, *b) in combinations(boxes["nodes"], 2):
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]:
            problems.append(f"{one} {a} lies over {other} {b}")
    for name, left, top, right, bottom in boxes["nodes"]:
        if not any(g[0] <= left and g[1] <= top and right <= g[2] and bottom <= g[3] for _, *g in boxes["groups"]):
            problems.append(f"{name} {[left, top, right, bottom]} hangs out of its group")
    assert not problems, "\n".join(problems)


def assert_same_prompt(page: Page, workflow: dict, object_info: dict) -> None:
    """What the page would queue for the graph that it shows is what devtools makes of the saved `workflow`."""
    output = page.evaluate("async () => (await app.graphToPrompt()).output")
    ours = to_prompt(workflow, object_info)
    assert {i: node["class_type"] for i, node in output.items()} == {i: node["class_type"] for i, node in ours.items()}
    for node_id, node in output.items():
        inputs = {name: as_api(value) for name, value in node["inputs"].items()}
        assert inputs == ours[node_id]["inputs"], node["class_type"]


def as_api(value):
    """Node ids are strings in an API prompt, and numbers in the older page's links."""
    return [str(value[0]), value[1]] if isinstance(value, list) and len(value) == 2 else value
