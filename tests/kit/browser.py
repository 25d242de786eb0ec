"""A real Chromium for tests: pages in it, and everything that went wrong on them.

The fixture `browser` is one for each process that runs tests. Whoever uses it runs in the loop of the session:
`pytestmark = pytest.mark.asyncio(loop_scope="session")`.
Skips with a reason where there is no Chromium. `KEEPALIVE_CHROMIUM` names another binary.
"""

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from playwright.async_api import Browser, ConsoleMessage, Dialog, Error, Page, async_playwright, expect

from tests.kit.live import PATIENCE

# First the one that has no windows to draw for nobody: pages in it take half the processor.
CHROMIUM = os.environ.get("KEEPALIVE_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)

# Nothing of the browser's own may go over the network, and a root in a container has no sandbox.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Each name of `example` is this machine, for pages from elsewhere and for names that were rebound.
    "--host-resolver-rules=MAP *.example 127.0.0.1",
]


@dataclass
class Tab:
    """A page, with what its console, its scripts and its dialogs said."""

    page: Page
    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.type}: {message.text}")

    async def dialog(self, dialog: Dialog) -> None:
        self.dialogs.append(dialog.message)
        await dialog.dismiss()

    def error(self, error: Error) -> None:
        self.errors.append(f"uncaught: {error}")


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt install chromium-headless-shell")
    expect.set_options(timeout=PATIENCE * 1000)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield browser
        finally:
            await browser.close()


# A window and a process for it cost more than most tests: pages that a test has left wait here for the next one.
_left: WeakKeyDictionary[Browser, list[Page]] = WeakKeyDictionary()
VIEWPORT = {"width": 1280, "height": 720}


@contextlib.asynccontextmanager
async def tab(
    browser: Browser,
    *,
    viewport: Any = None,
    color_scheme: Any = "light",
    clock: float | None = None,
    motion: Any = "reduce",
    **options: Any,
) -> AsyncIterator[Tab]:
    """An empty page of this size and scheme. What it keeps it keeps by origin, and each server of a test has its own.

    Whoever wants more of it has a profile of its own: `options` as of `Browser.new_context`, or a `clock` that stands
    at this time until the test lets it go on, with `page.clock.run_for`.
    """
    waiting = _left.setdefault(browser, [])
    own = clock is not None or bool(options)
    page = waiting.pop() if waiting and not own else await (await browser.new_context(**options)).new_page()
    opened = Tab(page)
    listeners = {"console": opened.console, "pageerror": opened.error, "dialog": opened.dialog}
    try:
        if clock is not None:
            await page.clock.install(time=clock - 60)
            await page.clock.pause_at(clock)
        await page.set_viewport_size(viewport or VIEWPORT)
        # What moves for ever, such as the bar of a load, is drawn sixty times a second, and nobody looks.
        await page.emulate_media(color_scheme=color_scheme, reduced_motion=motion)
        for event, listener in listeners.items():
            page.on(event, listener)
        yield opened
        for event, listener in listeners.items():
            page.remove_listener(event, listener)
        # One that stands on an error page, or is on its way to one, is not used again.
        with contextlib.suppress(Error):
            if not own:
                await page.unroute_all(behavior="ignoreErrors")
                await page.evaluate("localStorage.clear()")
                await page.goto("about:blank")
                waiting.append(page)
    finally:
        if page not in waiting:
            await page.context.close()


async def eventually(page: Page, expression: str) -> None:
    """`expression` is true. Where a page's policy forbids `eval`, Playwright's own waiting does not work."""
    end = time.monotonic() + PATIENCE
    while not await page.evaluate(expression):
        assert time.monotonic() < end, f"not within {PATIENCE:.0f} s: {expression}"
        await asyncio.sleep(0.02)


async def frames(page: Page) -> None:
    """Whatever waited for a frame has had one."""
    await page.evaluate(
        "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )
