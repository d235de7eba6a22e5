"""The folders of pictures that the page offers on Dataset Folder: what lies under ComfyUI's input folder."""

import asyncio
import os
from pathlib import Path
from typing import Any

import folder_paths

from ..training.dataset.scan import IMAGE_ENDINGS
from .server import json_response, prompt_server


PATH = "/tidetable/folders"
MAX_DEPTH = 3
MAX_FILES = 200_000
"""Directory entries that one answer looks at; what comes later is not offered."""


def serve_folders() -> None:
    """Add the route to the running server; without a server, or with the route already there, do nothing."""
    routes = getattr(prompt_server(), "routes", None)
    if routes is None or any(getattr(route, "path", None) == PATH for route in routes):
        return

    @routes.get(PATH)
    async def _folders(request):
        # Not on the server's own loop: folders may be large.
        base = Path(folder_paths.get_input_directory())
        return json_response(await asyncio.get_running_loop().run_in_executor(None, offered, base))


def offered(base: Path) -> dict[str, Any]:
    """{"folders": [{"name": with / between, "pictures": in it and below}], "taken": every name directly in `base`}.

    Hidden folders are left out, and links are not followed. A folder that cannot be read has no pictures.
    """
    budget = MAX_FILES

    def look(folder: Path, name: str, depth: int) -> tuple[int, list[dict[str, Any]]]:
        nonlocal budget
        pictures, below = 0, []
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            return 0, []
        for entry in found:
            budget -= 1
            if budget < 0 or entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                count, names = look(Path(entry.path), f"{name}/{entry.name}" if name else entry.name, depth + 1)
                pictures, below = pictures + count, below + names
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_ENDINGS:
                pictures += 1
        own = [{"name": name, "pictures": pictures}] if pictures and 0 < depth <= MAX_DEPTH else []
        return pictures, own + below

    try:
        taken = sorted(os.listdir(base))
    except OSError:
        taken = []
    return {"folders": look(base, "", 0)[1], "taken": taken}
