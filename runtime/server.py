"""The ComfyUI server that this process runs, where it runs one."""

import sys
from typing import Any


def prompt_server() -> Any | None:
    """ComfyUI's PromptServer, or None in a script or a test.

    Looked up, not imported: importing it there would start half of a server.
    """
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def json_response(data: Any) -> Any:
    """The server's answer to a request, with its own aiohttp."""
    return sys.modules["server"].web.json_response(data)
