"""Run pip with a progress line, a log, and one clear line when it fails. Standard library only."""

import os
import queue
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .environment import last_line
from .errors import DevError, DiskFullError
from .status import StatusLine


# Settings of the user's that would send the packages somewhere else than into the environment.
_MISLEADING = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV", "PYTHONPATH", "PYTHONHOME")
_DOWNLOADING = re.compile(r"^\s*Downloading (?:\S*/)?(\S+) \(([\d.]+) ?([kMG]?)B\)")
_UNITS = {"": 1e-6, "k": 1e-3, "M": 1.0, "G": 1e3}
_BIG_MB = 20
_NETWORK = (
    "Failed to establish a new connection",
    "NewConnectionError",
    "Name or service not known",
    "Temporary failure in name resolution",
    "Max retries exceeded",
    "Connection refused",
    "Connection reset",
    "ConnectTimeout",
    "ReadTimeout",
    "Read timed out",
    "ProxyError",
    "SSLError",
    "IncompleteRead",
    "Connection broken",
)


class NotOfferedError(DevError):
    """The configured package sources do not have it for this Python and machine."""


class Pip:
    """pip of one Python. `temporary` is where it downloads to, on the same disk as the environment.

    The file descriptors in `inherited` stay open in its process: with a lock among them, a pip that outlives a killed
    dev.py keeps the next one out until it is done.
    """

    def __init__(self, python: Path, log: Path, temporary: Path, status: StatusLine, inherited: tuple[int, ...] = ()):
        self.python, self.log, self.temporary, self.status = python, log, temporary, status
        self.inherited = inherited if os.name == "posix" else ()
        self.variables = {name: value for name, value in os.environ.items() if name not in _MISLEADING}
        self.variables |= {"TMPDIR": str(temporary), "PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1"}
        temporary.mkdir(parents=True, exist_ok=True)

    def install(self, title: str, *arguments: str) -> None:
        """Install; raises DevError when pip fails."""
        self._run(title, "install", *arguments)

    def download(self, title: str, *arguments: str) -> None:
        """Download only; raises DevError when pip fails."""
        self._run(title, "download", *arguments)

    def _command(self, verb: str, *arguments: str) -> list[str]:
        options = ("--no-input", "--disable-pip-version-check", "--progress-bar", "off")
        return [str(self.python), "-m", "pip", verb, *options, *arguments]

    def _run(self, title: str, verb: str, *arguments: str) -> None:
        command = self._command(verb, *arguments)
        lines: list[str] = []
        progress = _Progress(title, self.temporary)
        started = time.monotonic()
        self.status.line(f"Fetching {title} …")
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self.variables,
            pass_fds=self.inherited,
        )
        try:
            with self.log.open("a") as log:
                log.write(f"$ {' '.join(command)}\n")
                for line in _lines_of(process):
                    if line is not None:
                        log.write(line + "\n")
                        lines.append(line)
                        announcement = progress.read(line)
                        if announcement:
                            self.status.line(announcement)
                    self.status.update(progress.text())
        finally:
            if process.poll() is None:
                process.terminate()
            returncode = process.wait()
        if returncode:
            raise self.failure(title, lines)
        self.status.line(f"Fetching {title} … done ({time.monotonic() - started:.0f} s)")

    def failure(self, title: str, output: list[str]) -> DevError:
        """The error with the one line that says what to do about pip's `output`."""
        text = "\n".join(output)
        if "No space left on device" in text or "Disk quota exceeded" in text:
            return DiskFullError(self.temporary)
        if any(sign in text for sign in _NETWORK):
            return DevError(
                f"Could not download {title}: check the network, the proxy and pip's own settings, then run the same "
                f"command again, it goes on where it stopped. Details: {self.log}"
            )
        missing = re.search(r"No matching distribution found for (\S+)", text)
        if missing:
            return NotOfferedError(
                f"No {missing.group(1)} is offered for this Python ({self.python}) and machine: "
                f"run dev.py with another Python (3.10 to 3.14), or check pip's index settings. Details: {self.log}"
            )
        problems = [line for line in output if line.startswith("ERROR")] or output
        return DevError(f"Fetching {title} failed ({last_line(problems[0] if problems else '')}). Details: {self.log}")


class _Progress:
    """What pip is doing, read off its lines; how far a download is, read off the growth of its temporary folder."""

    def __init__(self, title: str, folder: Path):
        self.title, self.folder = title, folder
        self._doing = "asking what is needed"
        self._size_mb = 0.0
        self._base = 0

    def read(self, line: str) -> str | None:
        """Take in a line of pip's; returns a line worth keeping on the screen, if it is one."""
        found = _DOWNLOADING.match(line)
        if found and not found.group(1).endswith(".metadata"):
            self._doing = f"downloading {found.group(1)}"
            self._size_mb = float(found.group(2)) * _UNITS[found.group(3)]
            self._base = _folder_size(self.folder)
            return f"  {self._doing} ({self._size_mb:.0f} MB)" if self._size_mb >= _BIG_MB else None
        if line.startswith("Installing collected packages"):
            self._doing, self._size_mb = f"installing {line.count(',') + 1} packages", 0
            return "  " + self._doing
        if line.startswith("Collecting "):
            self._doing, self._size_mb = f"looking for {line.split()[1]}", 0
        return None

    def text(self) -> str:
        if not self._size_mb:
            return f"  {self.title}: {self._doing}"
        done = min((_folder_size(self.folder) - self._base) / 1e6, self._size_mb)
        return f"  {self.title}: {self._doing}, {max(done, 0):.0f} of {self._size_mb:.0f} MB"


def _lines_of(process: subprocess.Popen[str]) -> Iterator[str | None]:
    """Yield the lines that `process` prints, and None whenever half a second passes without one."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def _folder_size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total
