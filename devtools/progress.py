"""A progress bar per node, fed by the messages of `client.Client.run`."""

import time
from collections.abc import Mapping
from typing import Any, TextIO

from .status import StatusLine


BAR_WIDTH = 24


class NodeProgress:
    """Shows which node of a prompt runs and how far it is: pass it as `on_event`.

    A node's title is `_meta.title` of the API prompt, else its display name in `object_info`, else its class.
    On a terminal the bar moves in place; in a log each node leaves one line when it is done.
    """

    def __init__(
        self,
        prompt: Mapping[str, Mapping[str, Any]],
        object_info: Mapping[str, Mapping[str, Any]] | None = None,
        stream: TextIO | None = None,
    ):
        info = object_info or {}
        self.titles = {
            node: value.get("_meta", {}).get("title")
            or info.get(value["class_type"], {}).get("display_name")
            or value["class_type"]
            for node, value in prompt.items()
        }
        self.status = StatusLine(stream)
        self._node: str | None = None
        self._since = 0.0
        self._done = 0
        self._cached = 0

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "executing":
            self._finish()
            self._node, self._since = data.get("node"), time.monotonic()
            if self._node is not None:
                self.status.update(self._line(""))
        elif kind == "progress" and self._node is not None:
            self.status.update(self._line(bar(data.get("value", 0), data.get("max", 0))))
        elif kind == "execution_cached":
            self._cached += len(data.get("nodes") or ())
        elif kind == "execution_success":
            self._finish()

    def _finish(self) -> None:
        if self._node is None:
            return
        seconds = time.monotonic() - self._since
        self.status.line(self._line(f"{bar(1, 1)}  {seconds:.1f} s"))
        self._node = None
        self._done += 1

    def _line(self, right: str) -> str:
        count = f"[{min(self._done + self._cached + 1, len(self.titles)):>2}/{len(self.titles)}]"
        title = self.titles.get(str(self._node), str(self._node))
        return f"  {count} {title:<34.34} {right}".rstrip()


def bar(value: float, maximum: float) -> str:
    """`value` of `maximum` as a bar with numbers; a bar without numbers when the whole is 1."""
    part = min(max(value / maximum, 0.0), 1.0) if maximum else 0.0
    filled = round(part * BAR_WIDTH)
    blocks = "█" * filled + "░" * (BAR_WIDTH - filled)
    return blocks if maximum == 1 else f"{blocks} {value:.0f}/{maximum:.0f}"
