"""What the status page costs the daemon, the network and the browser: `python benchmarks/page.py`.

The real daemon, as a process of its own, keeps a hundred models on simulated LM Studios in a second process, at
the usual intervals. Pages are event streams as a browser holds them open, and one real Chromium where there is
one. Nothing here fails on a slow machine: the table says what was measured, beside what we want.
"""

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote, urlsplit

from idle import SETTLE_SECONDS, Daemon, Report, daemon, simulators, warm_up

SERVERS, MODELS_EACH = 5, 20
PAGES = 200
UPDATES = 20
CHANGES_PER_SECOND = 2.0
PAGE = Path(__file__).parents[1] / "keepalive" / "assets" / "page"
ASSETS = (
    "/",
    "/page.css",
    *(f"/page/{file.name}" for file in sorted(PAGE.iterdir())),
    "/keepalive.js",
    "/favicon.svg",
)
DATA = ("/api/status", "/api/history", "/api/prompts")


# --- the network --------------------------------------------------------------------------------------


async def get(url: str, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    """Bytes on the wire, head included, and the body."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    lines = [f"{method} {path} HTTP/1.1", f"Host: {place.netloc}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return len(answer), gzip.decompress(body) if b"Content-Encoding: gzip" in head else body


async def measure_size(report: Report, url: str) -> None:
    report.section(f"one page with {SERVERS * MODELS_EACH} models, as transferred")
    sizes = {path: (await get(url, path, Accept_Encoding="gzip"))[0] for path in (*ASSETS, *DATA)}
    for path, size in sizes.items():
        report.row(path, size / 1024, "KiB")
    report.row("all of it", sum(sizes.values()) / 1000, "kB", below=100.0)


# --- many pages ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def pages(url: str, count: int) -> AsyncIterator[list[int]]:
    """So many event streams, each read as it comes; the bytes that each has got."""
    identity = json.loads((await get(url, "/api/status"))[1])["id"]
    place = urlsplit(url)
    got = [0] * count

    async def watch(number: int) -> None:
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        writer.write(
            f"GET /api/events?after={quote(identity)} HTTP/1.1\r\nHost: {place.netloc}\r\n\r\n".encode()
        )
        try:
            while piece := await reader.read(65_536):
                got[number] += len(piece)
        finally:
            writer.close()

    watching = [asyncio.create_task(watch(number)) for number in range(count)]
    try:
        while not all(got):
            await asyncio.sleep(0.1)
        yield got
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)


async def used(subject: Daemon, seconds: float) -> float:
    """Percent of a core."""
    began, before = time.monotonic(), subject.cpu()
    await asyncio.sleep(seconds)
    return 100 * (subject.cpu() - before) / (time.monotonic() - began)


async def keep_changing(url: str, keys: list[str]) -> None:
    """A fleet that is not quiet: models are released and taken back."""
    for number in range(10**9):
        verb = "warm" if number // len(keys) % 2 else "release"
        await get(url, f"/api/models/{quote(keys[number % len(keys)])}/{verb}", "POST", Content_Length="0")
        await asyncio.sleep(1 / CHANGES_PER_SECOND)


async def measure_watching(report: Report, subject: Daemon, seconds: float) -> None:
    report.section(f"{PAGES} open pages, {seconds:.0f} s each row; CPU of the daemon")
    alone = await used(subject, seconds)
    async with pages(subject.admin, PAGES) as got:
        before = sum(got)
        watched = await used(subject, seconds)
        quiet = (sum(got) - before) / PAGES / seconds
        keys = [model["key"] for model in json.loads((await get(subject.admin, "/api/status"))[1])["models"]]
        changing = asyncio.create_task(keep_changing(subject.admin, keys))
        before = sum(got)
        busy = await used(subject, seconds)
        lively = (sum(got) - before) / PAGES / seconds
        changing.cancel()
        await asyncio.gather(changing, return_exceptions=True)
    report.row("nobody watches", alone, "% of a core")
    report.row("all watch", watched, "% of a core")
    report.row("their share", watched - alone, "% of a core", below=5.0)
    report.row("to each page", quiet, "bytes/s")
    report.row(f"all watch {CHANGES_PER_SECOND:.0f} changes a second", busy, "% of a core")
    report.row("to each page", lively, "bytes/s")


# --- the browser --------------------------------------------------------------------------------------

# When the first row was there, as the page's own clock says it.
FIRST_ROW = """
  const look = () => document.querySelector("#models > li h3")
    ? (window.firstRow = performance.now()) : requestAnimationFrame(look);
  look();
"""
PAINTED = "() => performance.getEntriesByName('first-contentful-paint')[0].startTime"


async def measure_browser(report: Report, url: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.kit.browser import CHROMIUM, chromium, tab

    report.section("in a browser")
    if CHROMIUM is None:
        print("  no Chromium here: apt install chromium-headless-shell")
        return
    async with chromium() as browser:
        bare, painted, shown = [], [], []
        for _ in range(5):
            async with tab(browser, motion="no-preference") as one:
                await one.page.goto(f"{url}/livez")
                await asyncio.sleep(0.5)
                bare.append(await one.page.evaluate(PAINTED))
            async with tab(browser, motion="no-preference") as one:
                await one.page.add_init_script(FIRST_ROW)
                await one.page.goto(url)
                while not await one.page.evaluate("window.firstRow"):
                    await asyncio.sleep(0.02)
                painted.append(await one.page.evaluate(PAINTED))
                shown.append(await one.page.evaluate("window.firstRow"))
        async with tab(browser, motion="no-preference") as one:
            await one.page.goto(url)
            await one.page.locator(".timeline").nth(99).wait_for()
            session = await one.page.context.new_cdp_session(one.page)
            await session.send("Performance.enable", {"timeDomain": "threadTicks"})

            async def busy() -> float:
                metrics = (await session.send("Performance.getMetrics"))["metrics"]
                return 1000 * next(m["value"] for m in metrics if m["name"] == "TaskDuration")

            await asyncio.sleep(SETTLE_SECONDS)
            before = await busy()
            await asyncio.sleep(10)
            ticking = (await busy() - before) / 10
            models = json.loads((await get(url, "/api/status"))[1])["models"]
            took = []
            for number in range(UPDATES):
                key = models[number]["key"]
                before = await busy()
                await get(url, f"/api/models/{quote(key)}/release", "POST", Content_Length="0")
                await asyncio.sleep(1)
                took.append(await busy() - before - ticking)
    report.row("first paint of bare text, median of 5", statistics.median(bare), "ms")
    report.row("first paint, median of 5", statistics.median(painted), "ms", below=200.0)
    report.row("models on the screen, median of 5", statistics.median(shown), "ms")
    report.row("main thread, each second", ticking, "ms")
    report.row(f"main thread, an update; median of {UPDATES}", statistics.median(took), "ms", below=50.0)
    report.row(f"main thread, an update; slowest of {UPDATES}", max(took), "ms", below=50.0)


async def measure(report: Report, subject: Daemon, seconds: float) -> None:
    await measure_size(report, subject.admin)
    await measure_watching(report, subject, seconds)
    await measure_browser(report, subject.admin)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the status page costs.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each row about CPU is watched")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    from keepalive import __version__

    load = os.getloadavg()[0]
    print(
        f"keepalive {__version__}, {platform.python_implementation()} {platform.python_version()}, "
        f"{os.cpu_count()} cores, load average before: {load:.1f}"
    )
    with simulators(SERVERS, MODELS_EACH) as urls, daemon(urls, MODELS_EACH) as subject:
        warm_up(subject)
        time.sleep(SETTLE_SECONDS)
        asyncio.run(measure(Report(), subject, options.seconds))


if __name__ == "__main__":
    main()
