"""An open ComfyUI page, and what tests do with it."""

from dataclasses import dataclass, field
from typing import Any

from devtools.server import PACK_FOLDER
from tidetable.tests.test_architecture import ROOT


OUTPUT = ROOT / "tests" / "output"


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


def load(page: Page, workflow: dict) -> None:
    page.evaluate("async workflow => { await app.loadGraphData(workflow) }", workflow)
    page.page.wait_for_timeout(1000)


def save(page: Page, name: str) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    file = OUTPUT / f"{name}-{page.mode}.png"
    page.page.screenshot(path=file)
    assert file.stat().st_size > 10_000


def node_box(page: Page, *node_ids: str) -> dict[str, float]:
    """The part of the screen that these nodes fill, in pixels, with a margin."""
    boxes = [
        page.evaluate(
            """id => {
                const element = document.querySelector(`[data-node-id="${id}"]`)
                if (LiteGraph.vueNodesMode && element) {
                    const {x, y, right, bottom} = element.getBoundingClientRect()
                    return [x, y, right, bottom]
                }
                const [x, y, w, h] = app.canvas.graph.nodes.find(node => String(node.id) === id).getBounding()
                const rect = app.canvas.canvas.getBoundingClientRect()
                const at = offset => app.canvas.ds.convertOffsetToCanvas(offset)
                return [at([x, y]), at([x + w, y + h])].flatMap(([x, y]) => [rect.x + x, rect.y + y])
            }""",
            node_id,
        )
        for node_id in node_ids
    ]
    left, top, right, bottom = (f(box[i] for box in boxes) for i, f in enumerate((min, min, max, max)))
    return {"x": left - 12, "y": top - 12, "width": right - left + 24, "height": bottom - top + 24}


def save_part(page: Page, name: str, box: dict[str, float]) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    page.page.screenshot(path=OUTPUT / f"{name}-{page.mode}.png", clip=box)
