"""Loads the checkout as `tidetable` and, where COMFYUI_PATH is set, makes the real ComfyUI importable."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest


TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

sys.path.insert(0, str(ROOT))
from devtools import loading  # noqa: E402


loading.load_checkout()  # also takes ROOT off sys.path again

HOST = loading.comfyui_path()
HOST_TESTS = (TESTS / "host", TESTS / "browser")


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


@pytest.fixture(scope="session")
def comfy_server():
    """A real ComfyUI server with the pack in it, shared by all tests of the session."""
    from devtools.server import Server

    with Server() as server:
        yield server


@pytest.fixture
def client(comfy_server):
    """A new connection to the shared server."""
    from devtools.client import Client

    return Client(comfy_server.base_url)


@pytest.fixture(scope="session")
def object_info(comfy_server):
    """The server's definitions of all nodes, by id."""
    from devtools.client import Client

    return Client(comfy_server.base_url).object_info()


def pytest_configure(config: pytest.Config) -> None:
    if HOST is None:
        if in_ci():
            raise pytest.UsageError("COMFYUI_PATH is not set, so the host tests cannot run: use `python3 dev.py test`.")
        return
    base = tempfile.mkdtemp(prefix="tidetable-tests-")
    config.add_cleanup(lambda: shutil.rmtree(base, ignore_errors=True))
    loading.prepare_host(base)


def pytest_report_header(config: pytest.Config) -> str:
    return f"ComfyUI: {HOST or 'none (COMFYUI_PATH is not set), host tests are left out'}"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if HOST is None and collection_path in HOST_TESTS else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(folder in item.path.parents for folder in HOST_TESTS):
            item.add_marker(pytest.mark.host)
        if HOST is None and item.get_closest_marker("host"):
            item.add_marker(pytest.mark.skip(reason="needs ComfyUI: set COMFYUI_PATH or use `python3 dev.py test`"))
