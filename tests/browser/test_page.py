"""The real page in headless Chromium: it opens with the pack, loads every example workflow, and has no complaints.

Pictures are left in tests/output/. Both ways in which the page can draw nodes are tried.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from devtools import browser
from devtools.client import Client
from devtools.server import PACK_FOLDER
from devtools.workflow import to_prompt
from tidetable.tests.test_architecture import ROOT


pytestmark = pytest.mark.browser

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
OUTPUT = ROOT / "tests" / "output"
READY = "window.app?.extensionManager && app.canvas && app.graph"
# Without these, Chromium's own connections are tried and refused where there is no network.
CHROMIUM_OPTIONS = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@dataclass
class Page:
    """An open page, how it draws nodes, and what it said about our files."""

    page: Any
    mode: str
    complaints: list[str] = field(default_factory=list)

    def evaluate(self, code: str, argument=None):
        return self.page.evaluate(code, argument)

    def on_console(self, message) -> None:
        if message.type in ("error", "warning"):
            self._keep(f"{message.type}: {message.text} {message.location.get('url')}")

    def on_error(self, error) -> None:
        self._keep(f"{error.message} {error.stack}")

    def _keep(self, text: str) -> None:
        # The page itself and other packs have complaints of their own.
        if f"/extensions/{PACK_FOLDER}/" in text:
            self.complaints.append(text)


@pytest.fixture(scope="module")
def chromium():
    # Module scope: Playwright's event loop must be gone before other tests run their own.
    from playwright.sync_api import sync_playwright

    executable = browser.find()
    if executable is None:
        reason = "no Chromium found: install it (Debian: apt-get install chromium) or name it in TIDETABLE_BROWSER"
        pytest.fail(reason) if in_ci() else pytest.skip(reason)
    options = [*CHROMIUM_OPTIONS, *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])]
    with sync_playwright() as driver:
        instance = driver.chromium.launch(executable_path=executable, args=options)
        yield instance
        instance.close()


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


@pytest.fixture(params=["canvas", "vue"])
def page(request, chromium, comfy_server):
    """The page, ready, drawn the one or the other way; the messages that name our files are kept."""
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.VueNodes.Enabled": request.param == "vue",
        "Comfy.VueNodes.AutoScaleLayout": False,
    }
    Client(comfy_server.base_url).post("/settings", settings)
    context = chromium.new_context(viewport={"width": 2200, "height": 1400})
    context.add_init_script("localStorage.setItem('vueNodesBannerDismissed', 'true')")
    opened = Page(context.new_page(), request.param)
    opened.page.on("console", opened.on_console)
    opened.page.on("pageerror", opened.on_error)
    opened.page.goto(comfy_server.base_url)
    opened.page.wait_for_function(READY, timeout=90_000)
    opened.page.wait_for_timeout(1000)
    yield opened
    context.close()


def load(page: Page, workflow: dict) -> None:
    page.evaluate("async workflow => { await app.loadGraphData(workflow) }", workflow)
    page.page.wait_for_timeout(1000)


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
    assert_same_prompt(page, workflow, object_info)
    assert page.complaints == []


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


def save(page: Page, name: str) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    file = OUTPUT / f"{name}-{page.mode}.png"
    page.page.screenshot(path=file)
    assert file.stat().st_size > 10_000
