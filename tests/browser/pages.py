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
