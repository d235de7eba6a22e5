"""Find Chromium for the browser tests, and install Debian's where that is possible. Standard library only."""

import os
import shutil
import subprocess
from pathlib import Path

from .environment import ROOT
from .status import StatusLine


NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome", "msedge")
PLACES = (
    "/usr/bin/chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)


def find() -> str | None:
    """The executable of an installed Chromium or Chrome: TIDETABLE_BROWSER, the PATH, or its usual place."""
    named = os.environ.get("TIDETABLE_BROWSER")
    candidates = [named] if named else [*NAMES, *PLACES]
    return next((found for found in map(shutil.which, candidates) if found), None)


def is_wanted(pytest_arguments: list[str]) -> bool:
    """Whether this pytest run can reach the browser tests: it names no paths, or one that is or holds tests/browser."""
    if any("not browser" in argument for argument in pytest_arguments):
        return False
    paths = [ROOT / argument.split("::")[0] for argument in pytest_arguments if not argument.startswith("-")]
    paths = [path.resolve() for path in paths if path.exists()]
    folder = (ROOT / "tests" / "browser").resolve()
    return not paths or any(path in (folder, *folder.parents) or folder in path.parents for path in paths)


def can_install() -> bool:
    """As root on Debian and its relatives."""
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    return is_root and Path("/etc/debian_version").exists() and shutil.which("apt-get") is not None


def install(status: StatusLine | None = None) -> str | None:
    """Install Debian's Chromium where we may; returns its path, or None where that was not possible."""
    if not can_install():
        return None
    status = status or StatusLine()
    status.line("Installing Debian's chromium for the browser tests …")
    variables = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    log = ROOT / ".dev" / "chromium.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        for command in (
            ["apt-get", "update"],
            ["apt-get", "install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"],
        ):
            done = subprocess.run(command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    found = find()
    if done.returncode or not found:
        status.line(f"Could not install chromium, so the browser tests cannot run. Details: {log}")
    return found
