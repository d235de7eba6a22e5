"""Chromium, and a page in it, drawn in both ways that the page knows."""

import os

import pytest

from devtools import browser
from devtools.client import Client
from tidetable.tests.browser.pages import Page


READY = "window.app?.extensionManager && app.canvas && app.graph"
# Without these, Chromium's own connections are tried and refused where there is no network.
CHROMIUM_OPTIONS = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def chromium():
    # Module scope: Playwright's event loop must be gone before other tests run their own.
    from playwright.sync_api import sync_playwright

    executable = browser.find()
    if executable is None:
        reason = "no Chromium found: install it (Debian: apt-get install chromium) or name it in TIDETABLE_BROWSER"
        pytest.fail(reason) if in_ci() else pytest.skip(reason)
    options = [*CHROMIUM_OPTIONS, *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])]
    with sync_playwright() as driver:
        instance = driver.chromium.launch(executable_path=executable, args=options)
        yield instance
        instance.close()


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


@pytest.fixture(params=["canvas", "vue"])
def page(request, chromium, comfy_server):
    """The page, ready, drawn the one or the other way; the messages that name our files are kept."""
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.VueNodes.Enabled": request.param == "vue",
        "Comfy.VueNodes.AutoScaleLayout": False,
    }
    Client(comfy_server.base_url).post("/settings", settings)
    context = chromium.new_context(viewport={"width": 2200, "height": 1400})
    context.add_init_script("localStorage.setItem('vueNodesBannerDismissed', 'true')")
    opened = Page(context.new_page(), request.param)
    opened.page.on("console", opened.on_console)
    opened.page.on("pageerror", opened.on_error)
    opened.page.set_default_timeout(120_000)
    opened.page.goto(comfy_server.base_url)
    opened.page.wait_for_function(READY)
    opened.page.wait_for_timeout(1000)
    yield opened
    context.close()
