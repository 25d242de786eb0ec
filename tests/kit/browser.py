"""A real Chromium for tests: pages in it, and everything that went wrong on them.

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

import pytest
from playwright.async_api import Browser, ConsoleMessage, Dialog, Page, async_playwright

from tests.kit.live import PATIENCE

CHROMIUM = os.environ.get("KEEPALIVE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

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


@contextlib.asynccontextmanager
async def chromium(*arguments: str) -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, *arguments])
        try:
            yield browser
        finally:
            await browser.close()


@contextlib.asynccontextmanager
async def tab(browser: Browser, **options: Any) -> AsyncIterator[Tab]:
    """A fresh profile with one page; `options` as of `Browser.new_context`."""
    context = await browser.new_context(**options)
    try:
        page = await context.new_page()
        opened = Tab(page)
        page.on("console", opened.console)
        page.on("pageerror", lambda error: opened.errors.append(f"uncaught: {error}"))
        page.on("dialog", opened.dialog)
        yield opened
    finally:
        await context.close()


async def eventually(page: Page, expression: str) -> None:
    """`expression` is true. Where a page's policy forbids `eval`, Playwright's own waiting does not work."""
    end = time.monotonic() + PATIENCE
    while not await page.evaluate(expression):
        assert time.monotonic() < end, f"not within {PATIENCE:.0f} s: {expression}"
        await asyncio.sleep(0.02)
