"""Which shards of a cache nothing needs any more. Every encoding leaves a list of the records that it uses beside them.

A shard is unused when it is older than so many days and no list from the last so many days has a record of it. Whole
shards only: what is used is never moved, because a training that runs may read it.
"""

import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import digest
from .store import PATTERN, Store


LISTS = "used-*.json"
WORKING = "encoding-*.tmp"
LEFT_BEHIND = ("*.damaged", "*.tmp")
DAY = 86_400.0
SILENT = 3600.0
"""Seconds without a sign of life after which an encoding is taken to be gone."""
SECONDS_BETWEEN_TOUCHES = 20.0
LOOKED_BACK = 30
"""Days of the report where nothing is to be removed."""


class UnreadableListError(ValueError):
    """What a data set uses is not known."""


@dataclass(frozen=True, slots=True)
class Unused:
    """Files that nothing needs, and how large the cache is. Sizes are bytes."""

    files: tuple[Path, ...]
    bytes: int
    """Of these files."""
    partly: int
    """Of unused records in shards that are used."""
    total: int


def note_use(folder: Path, keys: Iterable[str]) -> None:
    """Leave a list of a data set's records; the same data set has the same list."""
    names = sorted(set(keys))
    path = folder / f"used-{digest(names)}.json"
    temporary = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(json.dumps(names), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def find_unused(store: Store, days: float) -> Unused:
    """What no encoding of the last `days` days uses. Shards that `store` does not know yet are left alone.

    UnreadableListError where a list is damaged: what it says may be needed.
    """
    before = time.time() - days * DAY
    used = {key for path in store.folder.glob(LISTS) if _changed(path) >= before for key in _listed(path)}
    needed = {place.name for key, place in store.places.items() if key in used}
    partly = sum(place.nbytes for key, place in store.places.items() if key not in used and place.name in needed)
    shards = [path for path in store.shards if path.name not in needed]
    others = [path for pattern in (LISTS, *LEFT_BEHIND) for path in store.folder.glob(pattern)]
    files = tuple(path for path in (*shards, *others) if _changed(path) < before)
    return Unused(files, sum(map(_size, files)), partly, sum(map(_size, store.folder.glob(PATTERN))))


def remove_unused(store: Store, days: float) -> Unused | None:
    """Delete what `find_unused` finds, and say what that was; None where another process encodes into this cache."""
    if _others_at_work(store.folder):
        return None
    found = find_unused(store, days)
    store.close()  # Windows deletes no file that is open
    gone = tuple(path for path in found.files if _delete(path))
    return Unused(gone, found.bytes - sum(map(_size, found.files)), found.partly, found.total)


class AtWork:
    """The sign that an encoding fills a cache, which nothing is removed from meanwhile."""

    def __init__(self, path: Path):
        self.path = path
        self.touched = 0.0

    def touch(self) -> None:
        if time.monotonic() - self.touched > SECONDS_BETWEEN_TOUCHES:
            self.touched = time.monotonic()
            self.path.touch()


@contextmanager
def at_work(folder: Path) -> Iterator[AtWork]:
    sign = AtWork(folder / f"encoding-{uuid.uuid4().hex[:16]}.tmp")
    sign.touch()
    try:
        yield sign
    finally:
        sign.path.unlink(missing_ok=True)


def _others_at_work(folder: Path) -> bool:
    """Whether more than this encoding has been alive within the last hour."""
    return sum(time.time() - _changed(path) < SILENT for path in folder.glob(WORKING)) > 1


def _listed(path: Path) -> list[str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:  # removed just now
        return []
    except (OSError, ValueError) as error:
        raise UnreadableListError(f"{path} cannot be read ({error}): delete it") from error
    return [str(key) for key in found]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _delete(path: Path) -> bool:
    with suppress(OSError):
        path.unlink()
        return True
    return False
