"""A lock between processes: the operating system drops it when its holder dies, so it cannot go stale."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


if os.name == "nt":
    import msvcrt

    def _try_lock(handle) -> bool:
        try:
            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(handle) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextmanager
def file_lock(path: Path, on_wait: Callable[[], None] = lambda: None, poll_seconds: float = 0.2) -> Iterator[int]:
    """Hold the lock file `path` exclusively. `on_wait` is called once when another process has it.

    Yields the file descriptor of the lock: a child process that inherits it keeps the lock until it ends too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as handle:
        if not _try_lock(handle):
            on_wait()
            while not _try_lock(handle):
                time.sleep(poll_seconds)
        yield handle.fileno()  # closing the file releases the lock
