"""One process at a time in a run's folder: a file that says who is there, and how to tell that nobody is any more."""

import contextlib
import json
import os
import platform
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import psutil


NAME = "running.json"
SECONDS_BETWEEN_TOUCHES = 20.0
SILENT = 600.0
"""Seconds without a sign of life after which a process of another machine is taken to be gone."""
CLOCK = 60.0
"""Seconds by which setting the clock may move a process's start time."""


class RunLock:
    """Held from `RunLock(folder)` to `release`. ValueError where another process holds it; OSError from the disk.

    A lock whose process has ended is taken over: on this machine its process is looked for, and for another machine (a
    shared disk, or a container that was started anew) its file must have been silent for ten minutes.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self.mine = {
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "host": platform.node(),
            "key": uuid.uuid4().hex,
        }
        self.touched = time.monotonic()
        self._take()

    def _take(self) -> None:
        for _ in range(2):
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                if is_held(self.path.parent):
                    break
                self.path.unlink(missing_ok=True)
                continue
            try:
                os.write(handle, json.dumps(self.mine).encode())
            except OSError:
                self.path.unlink()
                raise
            finally:
                os.close(handle)
            return
        raise ValueError(self._taken_by(_read(self.path) or {}))

    def check(self) -> None:
        """ValueError where somebody else has taken the folder meanwhile: nothing may be written then.

        A file that is gone or cannot be read says nothing about anybody else.
        """
        holder = _read(self.path)
        if holder and holder.get("key") != self.mine["key"]:
            raise ValueError(self._taken_by(holder))

    def touch(self) -> None:
        """A sign of life, now and then."""
        if time.monotonic() - self.touched > SECONDS_BETWEEN_TOUCHES:
            self.touched = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Safe to call twice, and when somebody else holds it."""
        holder = _read(self.path)
        if holder and holder.get("key") == self.mine["key"]:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _taken_by(self, holder: Mapping[str, object]) -> str:
        return (
            f"the run {self.path.parent.name!r} is being trained by another ComfyUI (process {holder.get('pid')} on "
            f"{holder.get('host')}): wait for it or stop it there, or set resume to 'off' to start another run beside "
            f"it. If there is no such process any more, delete {self.path}"
        )


def is_held(folder: Path) -> bool:
    """Whether a process that is still there holds the folder."""
    path = folder / NAME
    holder = _read(path)
    return holder is not None and not _gone(holder, path)


def _read(path: Path) -> dict[str, object] | None:
    """None where there is no such file; {} where it is damaged, which a crash may do to it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _gone(holder: Mapping[str, object], path: Path) -> bool:
    """Whether the process that wrote this has ended. Its start time tells it from a later one of the same number."""
    pid, started = holder.get("pid"), holder.get("started")
    if holder.get("host") == platform.node() and isinstance(pid, int) and isinstance(started, float):
        if pid == os.getpid():
            return True  # ComfyUI runs one prompt at a time: it is a run of ours that did not end in order
        try:
            process = psutil.Process(pid)
            return abs(process.create_time() - started) > CLOCK or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False
    try:
        return time.time() - path.stat().st_mtime > SILENT
    except OSError:
        return False
