"""What was seen of each file: its content's name, its size, and what is wrong with it. Unchanged files are not read."""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..checkpoint import digest
from .images import BadImageError, decode, decode_mask, read_whole, size_of


RACY_NS = 2_000_000_000
"""A file that changed so shortly before it was read may change again within the clock's grain: it is not remembered."""


@dataclass
class Seen:
    """One picture or mask."""

    content: str
    """Its name by content: 32 hexadecimal digits of the SHA-256 of the file."""
    size: tuple[int, int]
    """(width, height), upright."""
    notes: tuple[str, ...]
    error: str
    """Why it cannot be used; empty where it can."""
    picture: Callable[[], Any]
    """Its pixels, with that content. BadImageError where the file has changed since."""


class Catalog:
    """Remembers files by path, size and time of change, in a JSON file beside the shards. Losing it costs time only."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, list] = self._load()
        self.changed = False

    def __enter__(self) -> "Catalog":
        return self

    def __exit__(self, *error: object) -> None:
        self.save()

    def look(self, source: Path | Tensor) -> Seen:
        return self._look(source, decode, "picture")

    def look_at_mask(self, source: Path | Tensor | None) -> Seen | None:
        """As `look`, for a mask; its pixels are [H, W, 1]."""
        if source is None:
            return None
        if isinstance(source, Tensor):
            source = source.reshape(*source.shape[-2:], 1)
        return self._look(source, lambda data: (decode_mask(data), []), "mask")

    def save(self) -> None:
        if not self.changed:
            return
        temporary = self.path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
        try:
            temporary.write_text(json.dumps(self.known), encoding="utf-8")
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
        self.changed = False

    def _load(self) -> dict[str, list]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        whole = isinstance(found, dict) and all(isinstance(entry, list) and len(entry) == 6 for entry in found.values())
        return found if whole else {}

    def _look(self, source: Path | Tensor, read: Callable[[bytes], tuple[Any, list[str]]], kind: str) -> Seen:
        if isinstance(source, Tensor):
            return Seen(digest(source), size_of(source), (), "", lambda: source)
        path = str(source.absolute())
        try:
            state = source.stat()
        except OSError as error:
            return Seen("", (0, 0), (), f"could not be read ({error.strerror})", _nothing)
        name = f"{kind} {path}"
        known = self.known.get(name)
        if known is not None and known[:2] == [state.st_size, state.st_mtime_ns]:
            _, _, content, size, notes, error = known
            return Seen(content, (size[0], size[1]), tuple(notes), error, lambda: _again(source, content, read))
        try:
            data, state = read_whole(source)
        except BadImageError as error:
            return Seen("", (0, 0), (), str(error), _nothing)
        found = _examine(data, read)
        if time.time_ns() - state.st_mtime_ns > RACY_NS:
            entry = [found.content, list(found.size), list(found.notes), found.error]
            self.known[name] = [state.st_size, state.st_mtime_ns, *entry]
            self.changed = True
        return found


def _examine(data: bytes, read: Callable[[bytes], tuple[Any, list[str]]]) -> Seen:
    content = hashlib.sha256(data).hexdigest()[:32]
    try:
        picture, notes = read(data)
    except BadImageError as error:
        return Seen(content, (0, 0), (), str(error), _nothing)
    return Seen(content, size_of(picture), tuple(notes), "", lambda: picture)


def _again(source: Path, content: str, read: Callable[[bytes], tuple[Any, list[str]]]) -> Image.Image | Tensor:
    data, _ = read_whole(source)
    if hashlib.sha256(data).hexdigest()[:32] != content:
        raise BadImageError("has changed while the data set was encoded: queue again")
    return read(data)[0]


def _nothing() -> Any:
    raise BadImageError("could not be read")
