"""The status page in a real Chromium: before a real daemon and simulator, and before pictures that a test writes.

Nothing may ever be said on its console: an error, a violation of the content security policy, a script that
failed. `KEEPALIVE_SCREENSHOTS=1` writes the pictures of the documentation.
"""

import asyncio
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from operator import gt
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from playwright.async_api import Browser, Error, Page, Route, expect

from keepalive import config
from keepalive.admin.server import Access, Admin, server
from keepalive.admin.status import utc
from keepalive.core.facts import ModelId
from keepalive.observers.feed import Feed
from keepalive.service.daemon import Daemon
from keepalive.simulator.models import SimModel
from keepalive.simulator.studio import Studio
from tests.kit import PROJECT
from tests.kit.browser import Tab, chromium, eventually, tab
from tests.kit.live import (
    PATIENCE,
    DaemonProcess,
    SimulatorProcess,
    asked,
    daemon,
    ending,
    loads,
    settings,
    simulator,
    until,
)
from tests.kit.npm import packages
from tests.kit.ports import at_ports, reserved

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    # A browser for each worker is half a minute of a processor in all, and its first pages cost more than the next.
    pytest.mark.xdist_group("the page in a browser"),
]

MEDICINE = SimModel("medicine-llm", size_bytes=7_200_000_000, load_seconds=0.05)
QWEN = SimModel("qwen/qwen3-4b-2507", size_bytes=2_500_000_000, load_seconds=0.05)
# Its load ends when the test says so.
LONG = 1000.0
SLOW = SimModel("medicine-llm", load_seconds=LONG)
PROMPT = """
[[prompts]]
id = 28
title = "Teste Simples"
model = "medicine-llm"
content = "Explain {{topic}} to a nurse."
"""
NOW = 1_795_341_700.0  # 2026-11-22T10:01:40Z, on the clock of a written daemon


@asynccontextmanager
async def opened(browser: Browser, url: str, *, quiet: bool = True, **options: Any) -> AsyncIterator[Tab]:
    """The page at `url`. When the test is over, nothing was said on its console (`quiet`), and no dialog came up."""
    async with tab(browser, **options) as shown:
        await shown.page.goto(url)
        yield shown
    assert shown.dialogs == []
    assert shown.errors == [] or not quiet


@asynccontextmanager
async def kept(
    *models: SimModel, more: str = "", path: Path | None = None, **faults: Any
) -> AsyncIterator[tuple[Daemon, Studio]]:
    """A daemon that keeps these models on a simulator."""
    async with simulator(*models, **faults) as upstream:
        # Over HTTP LM Studio says itself how long a load took.
        text = settings(upstream.url, *(m.key for m in models), upstream='sdk = "off"') + more
        async with daemon(text, path=path) as running:
            yield running, upstream.studio


async def load_ends(studio: Studio) -> None:
    await until(lambda: loads(studio, SLOW.key) == 1, "LM Studio loads it")
    studio.advance(LONG)


def row(page: Page, key: str) -> Any:
    """The row of a model."""
    return page.locator("#models > li").filter(has=page.get_by_role("heading", name=key, exact=True))


def icon(page: Page) -> Any:
    return page.locator("link[rel=icon]")


def answer(page: Page) -> Any:
    """The one line that answers it all."""
    return page.get_by_role("heading", level=1)


# --- pictures that a test writes ----------------------------------------------------------------------


def written(key: str, state: str = "warm", **more: Any) -> dict[str, Any]:
    """A model as `/api/status` shows it."""
    return {
        "key": key,
        "upstream": "local",
        "state": state,
        "since": utc(NOW - 7300),
        "wanted": True,
        "listed": True,
        "busy": False,
        "in_flight": 0,
        "waiting": 0,
        "instance_id": key if state == "warm" else None,
        "instances": int(state == "warm"),
        "ours": state == "warm",
        "context_length": 8192 if state == "warm" else None,
        "load": None,
        "last_load_seconds": 61.8,
        "loads": 3,
        "evictions": 2,
        "last_eviction": {"at": utc(NOW - 7400), "cause": "timer"},
        "last_ping": {"at": utc(NOW - 120), "outcome": "ok", "seconds": 0.21},
        "next_ping_at": utc(NOW + 180) if state == "warm" else None,
        "retry_at": None,
        "reason": None,
        **more,
    }


class Written:
    """A daemon that is whatever a test says."""

    def __init__(self, *models: Mapping[str, Any], **more: Any) -> None:
        upstream = {"name": "local", "url": "http://127.0.0.1:1234", "state": "up", "tier": "v1"}
        self.document: dict[str, Any] = {
            "version": "1.0.0",
            "now": utc(NOW),
            "ready": False,
            "started_at": utc(NOW - 90_000),
            "scraped_at": utc(NOW - 7),
            "config": {"ok": True, "mistakes": []},
            "upstreams": [{**upstream, "since": utc(NOW - 90_000), "error": None}],
            "models": list(models),
            "draining": False,
            **more,
        }
        self.asked: list[tuple[str, ModelId]] = []
        self.stories: dict[ModelId, dict[str, Any]] = {}
        self.requested: list[dict[str, Any]] = []
        self.unnamed: list[dict[str, Any]] = []
        self.heard: Counter[tuple[str, str]] = Counter()  # requests, by method and the end of their path
        self.feed = Feed(self.status)
        self.url = ""

    def becomes(self, *models: Mapping[str, Any], **more: Any) -> None:
        self.document = {**self.document, "models": list(models), **more}
        self.feed.changed()

    def status(self) -> Mapping[str, Any]:
        return self.document

    def find(self, name: str) -> list[ModelId]:
        return [ModelId(m["upstream"], m["key"]) for m in self.document["models"] if m["key"] == name]

    async def meant(self, name: str) -> list[ModelId]:
        return self.find(name)

    def offered(self) -> list[str]:
        return [m["key"] for m in self.document["models"]]

    def states(self) -> Any:
        return self.document["models"]

    @property
    def stopping(self) -> bool:
        return bool(self.document["draining"])

    def history(self) -> Mapping[str, Any]:
        return {"kept": True, "reason": None}

    def story(self, model: ModelId) -> Mapping[str, Any]:
        nothing = {"loads": [], "evictions": [], "timeline": [], "pings": {}}
        known = self.stories.get(model, {})
        names = {"key": model.key, "upstream": model.upstream}
        return {**names, **nothing, "waits": {"requests": 0, "seconds": 0}, **known}

    def warm(self, model: ModelId) -> None:
        self.asked.append(("warm", model))

    def release(self, model: ModelId) -> None:
        self.asked.append(("release", model))

    def metrics(self, accept: str) -> tuple[bytes, str]:
        return b"", "text/plain"

    def requests(self) -> Mapping[str, Any]:
        return {"requests": self.requested, "unnamed": self.unnamed}

    def alive(self) -> str | None:
        return None

    async def forward(self, request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
        return web.json_response({"success": True, "data": []}, headers=headers)


class Heard(Admin):
    """Notes what comes in."""

    heard: Counter[tuple[str, str]]

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.heard[request.method, request.path.rpartition("/")[2]] += 1
        return await super().handle(request)


@asynccontextmanager
async def served(world: Written, access: Access | None = None) -> AsyncIterator[Written]:
    """The real admin address before a written daemon."""
    admin = Heard(world, world.feed, access or Access())
    admin.heard = world.heard
    runner = server(admin)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    world.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    feeding = asyncio.create_task(world.feed.run())
    try:
        yield world
    finally:
        feeding.cancel()
        await runner.cleanup()


# --- is it warm? --------------------------------------------------------------------------------------


async def test_one_sees_models_load_and_get_warm(browser: Browser) -> None:
    async with kept(SLOW, QWEN) as (running, studio), opened(browser, running.admin_url) as shown:
        page = shown.page
        await expect(answer(page)).to_contain_text("medicine-llm is loading: ")
        await expect(page).to_have_title(re.compile("medicine-llm is loading"))
        await expect(icon(page)).to_have_attribute("href", "/favicon-loading.svg")
        await expect(row(page, "medicine-llm").get_by_role("progressbar")).to_be_visible()
        await expect(row(page, QWEN.key)).to_contain_text("Waits for its turn: medicine-llm is loading")

        await load_ends(studio)
        await expect(answer(page)).to_have_text("Both models are warm")
        await expect(page).to_have_title("Both models are warm · keepalive")
        await expect(icon(page)).to_have_attribute("href", "/favicon-warm.svg")
        await expect(row(page, "medicine-llm").get_by_role("progressbar")).to_be_hidden()
        await expect(row(page, "medicine-llm")).to_contain_text("last load 17 min")
        await expect(
            row(page, QWEN.key).get_by_role("img", name="Last 1 load; the newest took")
        ).to_be_visible()


async def test_a_load_moves_each_second_by_the_daemons_clock_whatever_the_browsers_says(
    browser: Browser,
) -> None:
    load = {"elapsed_seconds": 62.0, "eta_seconds": 50.0, "attempt": 2}
    loading = written("medicine-llm", "loading", load=load, waiting=3)
    async with served(Written(loading)) as world, tab(browser, clock=NOW - 3 * 3600) as shown:
        page = shown.page
        await page.goto(world.url)
        bar = row(page, "medicine-llm").get_by_role("progressbar")
        for passed in (0, 1, 30):
            await page.clock.run_for(passed * 1000)
            seconds = 62 + passed if passed < 2 else 93
            told = f"{seconds} s, about {112 - seconds} s to go"
            await expect(answer(page)).to_have_text(f"medicine-llm is loading: {told}; 3 requests wait")
            await expect(page.locator("#models .left")).to_have_text(f"{told}, attempt 2")
            assert await bar.evaluate("bar => bar.value") == pytest.approx(seconds / 112, abs=0.001)
        assert shown.errors == []


async def test_a_load_whose_progress_is_told_is_drawn_by_it(browser: Browser) -> None:
    load = {"elapsed_seconds": 3.0, "eta_seconds": None, "attempt": 1, "progress": 0.43}
    world = Written(written("medicine-llm", "loading", load=load))
    async with served(world) as world, opened(browser, world.url) as shown:
        bar = row(shown.page, "medicine-llm").get_by_role("progressbar")
        await expect(shown.page.locator("#models .left")).to_have_text(
            re.compile(r"^\d s so far, 43 % done$")
        )

        assert await bar.evaluate("bar => bar.value") == pytest.approx(0.43)


ANSWERS = {
    "All 3 models are warm": [written("a"), written("b"), written("c")],
    "a is warm; 2 others are not wanted now": [
        written("a"),
        written("b", "cold", wanted=False, reason="released by hand"),
        written("c", "cold", wanted=False),
    ],
    "Nothing is loaded: models come when somebody asks for them": [
        written(k, "cold", wanted=False, keep="auto") for k in "ab"
    ],
    "None of the 2 models is wanted now": [written(k, "cold", wanted=False) for k in "ab"],
    "a failed: no memory; next try in 3 min": [
        written("a", "backoff", reason="no memory", retry_at=utc(NOW + 200)),
        written("b"),
    ],
    "a is cold: waits for a turn": [written("a", "cold", reason="waits for a turn"), written("b")],
    "1 of 4 models warm: 1 failing, 1 loading, 1 cold; 1 request waits": [
        written("a", "backoff"),
        written("b", "loading", load={"elapsed_seconds": 1, "eta_seconds": None, "attempt": 1}, waiting=1),
        written("c", "cold"),
        written("d"),
    ],
    "a is not there: LM Studio does not list this key; listed are b": [
        written("a", "cold", listed=False, reason="LM Studio does not list this key; listed are b")
    ],
    "a is not known yet: LM Studio has not been asked yet": [
        written("a", "unknown", reason="LM Studio has not been asked yet")
    ],
}


async def test_the_answer_is_one_line(browser: Browser) -> None:
    """Of each picture, whichever was there before."""
    async with served(Written()) as world, opened(browser, world.url, clock=NOW) as shown:
        for text, models in ANSWERS.items():
            world.becomes(*models)
            await expect(answer(shown.page)).to_have_text(text)


TROUBLES: dict[str, dict[str, tuple[str, str | None]]] = {
    "gpu does not answer: 1 model cannot be kept warm": {
        "gpu": ("down", "nothing listens"),
        "local": ("up", None),
    },
    "gpu refuses our token: 1 model cannot be kept warm": {
        "gpu": ("unauthorized", "LM Studio wants an API token"),
        "local": ("up", None),
    },
    "gpu and local do not answer: no model can be kept warm": {
        "gpu": ("down", "nothing listens"),
        "local": ("down", "nothing listens"),
    },
}


async def test_an_upstream_in_trouble_comes_first(browser: Browser) -> None:
    models = [written("a", "unknown", upstream="gpu"), written("b")]
    async with served(Written(*models)) as world, opened(browser, world.url) as shown:
        for text, upstreams in TROUBLES.items():
            since = {"url": "http://x", "tier": None, "since": utc(NOW - 60)}
            entries = [
                {"name": name, "state": state, "error": error, **since}
                for name, (state, error) in upstreams.items()
            ]
            world.becomes(*models, upstreams=entries)
            await expect(answer(shown.page)).to_have_text(text)
            for name, (state, error) in upstreams.items():
                await expect(shown.page.locator("#upstreams")).to_contain_text(f"{name} {state}")
                if error:
                    await expect(shown.page.locator("#notices")).to_contain_text(error)


def cluster(error: str | None = None, **holders: str) -> dict[str, Any]:
    """As daemon a of two shows it."""
    return {
        "name": "ward",
        "instance": "a",
        "engine": {"up": error is None, "error": error},
        "members": [{"instance": "a"}, {"instance": "b"}],
        "holders": holders,
        "differences": ["only b keeps <i>x</i> on local"],
    }


async def test_of_several_daemons_the_page_says_who_acts_and_when_nobody_does(browser: Browser) -> None:
    world = Written(written("a"), cluster=cluster(local="b"))
    async with served(world), opened(browser, world.url, clock=NOW) as shown:
        strip, notices = shown.page.locator("#upstreams li"), shown.page.locator("#notices li")
        await expect(strip).to_contain_text("http://127.0.0.1:1234 · b acts")
        await expect(shown.page.locator("footer")).to_contain_text("cluster ward: a (this one), b")
        await expect(notices).to_have_text(
            "The daemons of this cluster differ: only b keeps <i>x</i> on local"
        )

        world.becomes(written("a"), cluster=cluster(local="a"))
        await expect(strip).to_contain_text(" · this daemon acts (a)")

        world.becomes(written("a"), cluster=cluster("etcd at http://e:2379 did not answer", local="b"))
        await expect(notices.first).to_have_text(
            "Nothing is loaded or unloaded, what is warm is served: etcd at http://e:2379 did not answer"
        )
        await expect(strip).not_to_contain_text("acts")

        versions = [{"instance": "a", "version": "1.1.0"}, {"instance": "b", "version": "1.0.0"}]
        world.becomes(written("a"), cluster={**cluster(local="b"), "members": versions})
        await expect(shown.page.locator("footer")).to_contain_text(
            "cluster ward: a (this one) 1.1.0, b 1.0.0 ·"
        )


async def test_what_the_rows_say(browser: Browser) -> None:
    at = NOW - 3600
    copies = {"instances": 2, "reason": "2 copies are in memory"}
    evicted = {"last_eviction": {"at": utc(at), "cause": "displaced"}}
    timeout = {"last_ping": {"at": utc(NOW - 200), "outcome": "timeout", "seconds": 60.0}, "busy": True}
    world = Written(
        written("a", in_flight=2, waiting=1, **evicted), written("b", **copies), written("c", **timeout)
    )
    world.stories[ModelId("local", "a")] = {
        "loads": [
            {"at": utc(at), "outcome": "failed", "seconds": 3.0},
            {"at": utc(at + 300), "outcome": "ok", "seconds": 61.8},
        ],
        "evictions": [{"at": utc(at), "cause": "displaced"}],
        "timeline": [
            {"at": utc(NOW - 86_400), "state": "warm"},
            {"at": utc(at), "state": "cold"},
            {"at": utc(at + 60), "state": "loading"},
            {"at": utc(at + 600), "state": "warm"},
        ],
        "waits": {"requests": 4, "seconds": 240.0},
        "pings": {"ok": 280, "wrong_model": 1},
    }
    async with served(world), opened(browser, world.url, clock=NOW) as shown:
        page, first = shown.page, row(shown.page, "a")
        await expect(page.locator("footer")).to_contain_text("metrics last read 7 s ago")
        # A model's history is asked for a moment later.
        await page.clock.run_for(3_000)
        for text in (
            "warm for 2 h",
            "8,192 tokens",
            "1 waiting, 2 in flight",
            "next ping in 2 min",
            "evicted 60 min ago: another model took its place",
            "last load 62 s",
        ):
            await expect(first).to_contain_text(text)
        await expect(first.get_by_role("img", name="Last 24 h: warm 99 %, cold under 1 %")).to_be_visible()
        await expect(first.get_by_role("img", name="Last 2 loads, 1 of them without success")).to_be_visible()
        await expect(row(page, "b")).to_contain_text("2 copies are in memory")
        await expect(page.locator("#notices")).to_contain_text("b is in memory 2 times")
        await expect(row(page, "c")).to_contain_text("warm, busy")
        await expect(row(page, "c")).to_contain_text("ping 3 min ago: timeout")
        await expect(page.locator("header #figures")).to_contain_text("4 min in 4 requests")

        await first.get_by_text("Details").click()
        for text in ("a, loaded by keepalive", "280 ok, 1 wrong model", "3.0 s, failed"):
            await expect(first).to_contain_text(text)


async def test_the_page_is_painted_before_its_modules_have_come(browser: Browser) -> None:
    async with served(Written(written("a"))) as world, tab(browser) as shown:
        page, held = shown.page, asyncio.Event()

        async def hold(route: Any) -> None:
            await held.wait()
            await route.continue_()

        # All but the classic script that sets the theme, without which the other one would flash by.
        await page.route(re.compile(r"/page/(?!theme)\w+\.js$"), hold)
        await page.goto(world.url, wait_until="commit")
        await eventually(page, "performance.getEntriesByName('first-contentful-paint').length === 1")
        await expect(answer(page)).to_have_text("Asking the daemon")
        held.set()
        await expect(answer(page)).to_have_text("a is warm")
        assert shown.errors == []


async def test_on_a_phone_all_that_a_row_says_begins_at_its_left(browser: Browser) -> None:
    phone = {"viewport": {"width": 390, "height": 844}}
    never = written("never-loaded", "cold", last_load_seconds=None, last_eviction=None)
    async with served(Written(written("a"), never)) as world, opened(browser, world.url, **phone) as shown:
        await expect(row(shown.page, never["key"]).locator(".traffic")).to_have_text("idle")
        lefts = await shown.page.locator("#models > li").evaluate_all(
            """rows => rows.map((row) => [".day", ".cost", ".traffic", "summary"].map((part) => row.querySelector(part))
                 .filter((part) => part.checkVisibility()).map((part) => part.getBoundingClientRect().left))"""
        )

    assert lefts == [[16] * 4, [16] * 3]


async def test_the_day_says_what_was_at_the_time_under_the_pointer(browser: Browser) -> None:
    world = Written(written("a"))
    timeline = [{"at": utc(NOW - 86_400), "state": "warm"}, {"at": utc(NOW - 43_200), "state": "cold"}]
    world.stories[ModelId("local", "a")] = {"timeline": timeline}
    async with served(world), opened(browser, world.url) as shown:
        chart = row(shown.page, "a").locator(".timeline")
        box = await chart.bounding_box()
        assert box is not None
        said = []
        for part in (0.25, 0.75):
            await chart.hover(position={"x": box["width"] * part, "y": 10})
            said.append(await shown.page.locator("#tip").inner_text())

    assert [text.split()[1] for text in said] == ["warm", "cold"]


# --- warm and release ---------------------------------------------------------------------------------


async def test_a_row_offers_what_makes_sense_for_its_model(browser: Browser) -> None:
    missing = written("missing-one", "cold", listed=False)
    world = lively()
    world.becomes(*world.document["models"], missing)
    async with served(world), opened(browser, world.url) as shown:
        offered = {}
        for one in world.document["models"]:
            buttons = row(shown.page, one["key"]).locator(".act button:visible")
            await expect(buttons.last).to_be_visible()
            offered[one["key"]] = await buttons.all_inner_texts()

    assert offered == {
        "warm-one": ["Release"],
        "loading-one": ["Release"],
        "failing-one": ["Try now", "Release"],
        # Nothing of it is in memory that could be let go.
        "cold-one": ["Warm"],
        "unknown-one": ["Release"],
        "off-one": ["Warm"],
        "missing-one": ["Warm"],
    }


async def test_a_model_is_released_and_taken_back_at_the_press_of_a_button(browser: Browser) -> None:
    async with kept(MEDICINE) as (running, studio), opened(browser, running.admin_url) as shown:
        page = shown.page
        await expect(answer(page)).to_have_text("medicine-llm is warm")
        await page.get_by_role("button", name="Release medicine-llm").click()
        await expect(row(page, "medicine-llm")).to_contain_text("Released by hand")
        await expect(answer(page)).to_have_text("The only model is not wanted now")
        await until(lambda: not studio.state()["models"][0]["instances"], "LM Studio has unloaded it")
        # The focus stayed on the button that was pressed, which now does the contrary.
        await page.keyboard.press("Enter")
        await expect(answer(page)).to_have_text("medicine-llm is warm")

        assert loads(studio) == 2
        await expect(page.locator("header #figures")).to_contain_text("Loads, 24 h2")


async def test_a_failing_model_is_tried_again_at_once_when_somebody_has_mended_it(browser: Browser) -> None:
    async with (
        kept(MEDICINE, load_result="fail") as (running, studio),
        opened(browser, running.admin_url) as shown,
    ):
        page = shown.page
        await expect(answer(page)).to_contain_text("medicine-llm failed: ")
        await expect(row(page, "medicine-llm")).to_contain_text("Next try in ")
        await expect(icon(page)).to_have_attribute("href", "/favicon-failing.svg")
        studio.set_faults(load_result="ok")
        await page.get_by_role("button", name="Try now").click()
        await expect(answer(page)).to_have_text("medicine-llm is warm")


async def test_a_change_that_is_refused_says_why(browser: Browser) -> None:
    async with served(Written(written("a"))) as world, opened(browser, world.url, quiet=False) as shown:
        page = shown.page
        await expect(answer(page)).to_have_text("a is warm")
        # The config was read again a moment ago, and the page has yet to hear of it.
        world.document = {**world.document, "models": []}
        await page.get_by_role("button", name="Release a").click()
        await expect(page.get_by_role("alert")).to_have_text("Could not release it: no such model here: a")
        await expect(page.get_by_role("button", name="Release a")).to_be_enabled()
        await expect(page.get_by_role("button", name="Release a")).to_be_focused()
        assert all("404 (Not Found)" in error for error in shown.errors)


async def test_a_model_on_two_upstreams_is_asked_for_on_its_own(browser: Browser) -> None:
    models = [written("org/a b?", upstream="x"), written("org/a b?", upstream="y")]
    upstreams = [
        {"name": name, "url": "", "state": "up", "tier": "v1", "since": utc(NOW), "error": None}
        for name in "xy"
    ]
    async with (
        served(Written(*models, upstreams=upstreams)) as world,
        opened(browser, world.url) as shown,
    ):
        await shown.page.get_by_role("button", name="Release org/a b?").nth(1).click()
        await until(lambda: world.asked)

    assert world.asked == [("release", ModelId("y", "org/a b?"))]


async def test_memory_is_a_bar_of_who_has_it_and_says_who_goes_next_and_who_waits(browser: Browser) -> None:
    def one(key: str, state: str = "warm", **more: Any) -> dict[str, Any]:
        return written(key, state, wanted=False, keep="auto", memory_bytes=8_000_000_000, **more)

    known = {
        "budget_bytes": 40 * 10**9,
        "used_bytes": 30 * 10**9,
        "source": "config",
        "strangers": [{"key": "x", "bytes": 6 * 10**9}],
        "next_to_go": ["b"],
        "waiting": ["c"],
    }
    local = {"name": "local", "url": "", "state": "up", "tier": "v1", "since": utc(NOW), "error": None}
    kept_always = written("k", keep="always", memory_bytes=8_000_000_000)
    waits = one("c", "cold", waiting=2, reason="waits for room: it takes 8.0 GB, and 2.0 GB are free")
    async with (
        served(
            Written(kept_always, one("a"), one("b"), waits, upstreams=[{**local, "memory": known}])
        ) as world,
        opened(browser, world.url) as shown,
    ):
        room = shown.page.locator("#upstreams .memory")
        await expect(room.locator("p")).to_have_text("Memory: 30.0 GB of 40.0 GB; c waits for room")
        await expect(room.locator(".who li")).to_have_text(
            ["k 8.0 GB (always kept)", "a 8.0 GB", "b 8.0 GB (goes next)", "x 6.0 GB (not ours)"]
        )
        kinds = [await part.get_attribute("data-what") for part in await room.locator(".shares span").all()]
        widths = await room.locator(".shares span").evaluate_all("all => all.map((one) => one.style.width)")
        await expect(shown.page.get_by_role("button", name="Release a")).to_be_visible()
        await expect(shown.page.get_by_role("button", name="Warm c")).to_be_visible()
        await expect(answer(shown.page)).to_contain_text("c is cold: waits for room")
        figures = await shown.page.locator("#figures div").first.inner_text()
        await shown.page.set_viewport_size({"width": 390, "height": 844})
        phone = await shown.page.locator("#upstreams .detail").last.bounding_box()
        world.becomes(kept_always, upstreams=[{**local, "memory": None}])
        await expect(room).to_be_hidden()

    assert kinds == ["always", "auto", "next", "foreign"]
    assert widths == ["20%", "20%", "20%", "15%"]
    assert figures.split() == ["Warm", "3", "of", "4"]
    assert phone is not None
    assert phone["width"] > 300


# --- the playground -----------------------------------------------------------------------------------


async def test_a_prompt_is_run_from_the_page_and_told_of_the_load(browser: Browser) -> None:
    async with (
        kept(SLOW, more=PROMPT, answer_text="It streams.", answer_tokens=2) as (running, studio),
        opened(browser, running.admin_url) as shown,
    ):
        page = shown.page
        await page.get_by_label("topic").fill("SSE")
        await page.get_by_role("button", name="Run").click()
        await expect(page.get_by_text("Loading model…").first).to_be_visible()
        await expect(answer(page)).to_contain_text("; 1 request waits")
        await load_ends(studio)
        await expect(page.get_by_role("region", name="Answer")).to_contain_text("It streams.")

        assert loads(studio) == 1
        await expect(page.locator("header #figures")).to_contain_text("in 1 request")


# --- as it changes ------------------------------------------------------------------------------------


async def test_open_details_the_focus_and_a_selection_outlive_every_change(browser: Browser) -> None:
    async with served(Written(written("a"), written("b"))) as world, opened(browser, world.url) as shown:
        page = shown.page
        first = row(page, "a")
        await first.get_by_text("Details").click()
        await first.get_by_text("loaded by keepalive").click(click_count=3)
        await page.get_by_role("button", name="Release b").focus()
        selected = await page.evaluate("getSelection().toString()")
        for number in range(1, 4):
            world.becomes(
                written("a", in_flight=number),
                written("b", "loading", load={"elapsed_seconds": number, "eta_seconds": 9, "attempt": 1}),
            )
            await expect(first).to_contain_text(f"{number} in flight")

        await expect(row(page, "b")).to_contain_text("about")
        await expect(first.get_by_text("loaded by keepalive")).to_be_visible()
        await expect(page.get_by_role("button", name="Release b")).to_be_focused()
        assert "loaded by keepalive" in selected
        assert await page.evaluate("getSelection().toString()") == selected


async def test_what_a_model_has_read_ahead_stands_in_its_details_and_what_it_has_not_among_the_notices(
    browser: Browser,
) -> None:
    primed = {
        "openings": 2, "of": 2, "tokens": 21400, "at": "2026-11-22T10:01:35.000Z", "under_way": False, "reason": None,
    }  # fmt: skip
    async with (
        served(Written(written("a", primed=primed), written("b"))) as world,
        opened(browser, world.url) as shown,
    ):
        page = shown.page
        for key in "ab":
            await row(page, key).get_by_text("Details").click()

        await expect(row(page, "a")).to_contain_text("2 of 2 openings, 21,400 tokens at ")
        await expect(row(page, "b")).not_to_contain_text("Read ahead")
        await expect(page.locator("#notices li")).to_have_count(0)
        reason = "priming has not made answers faster: …"
        world.becomes(written("a", primed={**primed, "reason": reason}), written("b"))
        await expect(page.locator("#notices li")).to_contain_text(reason)
        await expect(row(page, "a").locator("details")).to_contain_text(reason)


async def test_models_come_and_go_with_the_config(browser: Browser) -> None:
    async with served(Written(written("a"), written("b"))) as world, opened(browser, world.url) as shown:
        page = shown.page
        await expect(answer(page)).to_have_text("Both models are warm")
        world.becomes(written("c"), written("b"), written("d", "cold"))
        await expect(answer(page)).to_contain_text("d is cold")
        names = await page.locator("#models h3").all_inner_texts()
        world.becomes()
        await expect(answer(page)).to_have_text("No models are configured")
        await expect(page.locator("#models")).to_contain_text('key = "qwen/qwen3-4b-2507"')
        world.becomes(written("e"))
        await expect(answer(page)).to_have_text("e is warm")
        await expect(page.locator("#models")).not_to_contain_text("qwen")

    assert names == ["c", "b", "d"]


async def test_where_models_come_when_somebody_asks_the_page_says_how_to_ask(browser: Browser) -> None:
    async with (
        served(Written(config={"ok": True, "mistakes": [], "path": None, "unlisted": "auto"})) as world,
        opened(browser, world.url) as shown,
    ):
        await expect(answer(shown.page)).to_have_text("Models are loaded when somebody asks")
        await expect(shown.page.locator("#models")).to_contain_text("http://127.0.0.1:1235/v1")
        await expect(shown.page.locator("#models")).not_to_contain_text("[[models]]")


async def test_every_mistake_of_a_rejected_config_is_shown(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    async with (
        kept(MEDICINE, path=path) as (running, _),
        opened(browser, running.admin_url) as shown,
    ):
        page = shown.page
        await expect(answer(page)).to_have_text("medicine-llm is warm")
        good = path.read_text()
        path.write_text(good.replace('"100ms"', '"100"') + 'upstrem = "local"\n')
        running.reload()
        await expect(page.locator("#notices li")).to_have_count(2)
        await expect(page.locator("#notices")).to_contain_text("upstrem")
        await expect(page.locator("#notices")).to_contain_text('"100" has no unit')
        path.write_text(good)
        running.reload()
        await expect(page.locator("#notices li")).to_have_count(0)


async def test_a_daemon_that_stops_says_so(browser: Browser) -> None:
    async with served(Written(written("a"))) as world, opened(browser, world.url) as shown:
        world.becomes(written("a"), draining=True)
        await expect(answer(shown.page)).to_have_text("The daemon is stopping; models stay loaded")


# --- the daemon is gone -------------------------------------------------------------------------------


async def test_a_page_that_stays_open_over_a_restart_says_so_and_goes_on_by_itself(
    browser: Browser, tmp_path: Path
) -> None:
    studio = await asyncio.to_thread(SimulatorProcess, tmp_path, "medicine-llm:0.05")
    with ending(studio), reserved(2) as ports:
        text = at_ports(settings(studio.url, "medicine-llm"), ports)
        first = await asyncio.to_thread(DaemonProcess, tmp_path, text, "first")
        with ending(first):
            async with opened(browser, first.url, quiet=False) as shown:
                page = shown.page
                button = page.get_by_role("button", name="Release medicine-llm")
                await expect(answer(page)).to_have_text("medicine-llm is warm")
                await page.evaluate("window.stayed = true")
                await button.focus()
                first.signal(signal.SIGKILL)
                await expect(answer(page)).to_have_text(re.compile(r"^Lost contact \d+ s ago, trying again$"))
                await expect(icon(page)).to_have_attribute("href", "/favicon-gone.svg")
                await expect(button).to_be_disabled()
                await expect(row(page, "medicine-llm")).to_be_visible()
                await expect(page.locator("#notices")).to_contain_text("What you see is as of ")
                second = await asyncio.to_thread(DaemonProcess, tmp_path, text, "second")
                with ending(second):
                    await expect(answer(page)).to_have_text("medicine-llm is warm")
                    await expect(button).to_be_enabled()
                    await expect(button).to_be_focused()
                    await expect(page.locator("#notices li")).to_have_count(0)
                    await button.click()
                    # The first one loaded it.
                    await expect(row(page, "medicine-llm")).to_contain_text(
                        "not wanted; stays, as somebody else"
                    )

                    # What the first one may not have had the time to send comes from the second.
                    await expect(page.locator("streaming-prompt-executor")).to_have_count(1)
                    assert await page.evaluate("window.stayed") is True
                    odd = [
                        error for error in shown.errors if "Failed to load resource: net::ERR_" not in error
                    ]
                    assert odd == []


async def test_a_playground_that_could_not_be_had_is_asked_for_again(browser: Browser) -> None:
    async with served(Written(written("a"))) as world, tab(browser) as shown:
        page, asked = shown.page, asyncio.Event()

        async def refused(route: Route) -> None:
            asked.set()
            await route.abort()

        await page.route("**/keepalive.js", refused)
        await page.goto(world.url)
        await asked.wait()
        playground = page.locator("streaming-prompt-executor")
        while (
            not await playground.count()
        ):  # each picture has it asked for, once the browser has told the page
            world.becomes(written("a"), *[written("b")] * (len(world.document["models"]) == 1))
            await page.evaluate("new Promise(requestAnimationFrame)")

        await expect(playground).to_have_count(1)
        assert all("net::ERR_FAILED" in error for error in shown.errors)


async def test_a_connection_that_falls_silent_is_given_up(browser: Browser) -> None:
    """A stopped daemon accepts connections, and a cut network does not even refuse them."""
    async with served(Written(written("a"))) as world, tab(browser, clock=NOW) as shown:
        page = shown.page
        await page.goto(world.url)
        await expect(page.locator("#contact")).to_have_text("live")
        await page.route("**/api/**", lambda route: None)
        await page.clock.run_for(39_000)
        await expect(page.locator("#contact")).to_have_text("live")
        await page.clock.run_for(2_000)
        await expect(answer(page)).to_have_text("Lost contact 1 s ago, trying again")
        await expect(page.locator("#notices")).to_contain_text(
            "Nothing was heard for 40 s. What you see is as of "
        )


# Counts how often the page has set itself to wait for its next look: it then listens for a nudge, too.
WAITS = """{
  const add = window.addEventListener;
  window.waits = 0;
  window.addEventListener = function (type, ...rest) {
    add.call(window, type, ...rest);
    if (type === "online") window.waits += 1;
  };
}"""


async def test_where_too_many_watch_the_page_looks_each_five_seconds(browser: Browser) -> None:
    """By the page's own clock; until then it looked each quarter of a second, whatever it said."""
    async with served(Written(written("a", in_flight=1))) as world, tab(browser, clock=NOW) as shown:
        world.feed.watching = 256
        page, notice = shown.page, shown.page.locator("#notices")
        await page.add_init_script(WAITS)
        looked: list[str] = []
        page.on("request", lambda sent: looked.extend([sent.url] if "/api/status" in sent.url else []))

        async def waits(times: int) -> None:
            """Until it has been refused so often, and its next pause has begun."""
            async with asyncio.timeout(PATIENCE):
                while await page.evaluate("window.waits") < times:
                    await asyncio.sleep(0.01)

        await page.goto(world.url)
        # Quickly at first, lest a moment's trouble be felt.
        for turn, pause in enumerate((250, 500, 1000, 2000, 4000, 5000, 5000), start=1):
            await waits(turn)
            await expect(notice).to_have_text("Not live, looked at every 5 s: 256 others watch already")
            before = len(looked)
            await page.clock.run_for(pause - 10)
            assert len(looked) == before
            await page.clock.run_for(20)
            await until(lambda before=before: len(looked) > before, "it looked again")
        await waits(8)
        await expect(answer(page)).to_have_text("a is warm")
        world.becomes(written("a", in_flight=2))
        await page.clock.run_for(5000)
        await expect(row(page, "a")).to_contain_text("2 in flight")
        await expect(page.get_by_role("button", name="Release a")).to_be_enabled()
        await waits(9)
        world.feed.watching = 0
        # Somebody who comes back to the page does not wait for the next look.
        await page.evaluate("dispatchEvent(new Event('online'))")
        await expect(page.locator("#contact")).to_have_text("live")
        await expect(page.locator("#notices li")).to_have_count(0)
        assert all("503 (Service Unavailable)" in error for error in shown.errors)


# --- whoever uses it ----------------------------------------------------------------------------------


async def test_everything_can_be_done_by_keyboard(browser: Browser) -> None:
    async with kept(MEDICINE) as (running, _), opened(browser, running.admin_url) as shown:
        page, press = shown.page, shown.page.keyboard.press
        await expect(answer(page)).to_have_text("medicine-llm is warm")
        await press("Tab")
        await expect(page.get_by_role("link", name="To the models")).to_be_focused()
        await press("Tab")
        await press("ArrowRight")
        await expect(page.locator("html")).to_have_attribute("data-theme", "light")
        await page.get_by_role("link", name="To the models").focus()
        await press("Enter")
        await press("Tab")
        await expect(page.get_by_role("button", name="Release medicine-llm")).to_be_focused()
        await press("Enter")
        await expect(row(page, "medicine-llm")).to_contain_text("Released by hand")
        await press("Enter")
        await expect(answer(page)).to_have_text("medicine-llm is warm")
        await press("Tab")
        await press("Enter")
        await expect(row(page, "medicine-llm")).to_contain_text("Since the daemon started")
        await press("Tab")
        focused = await page.evaluate("document.activeElement.localName")

    assert focused == "streaming-prompt-executor"


async def test_the_theme_follows_the_system_until_somebody_chooses_and_the_choice_is_remembered(
    browser: Browser,
) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    async with (
        served(Written(written("a"))) as world,
        opened(browser, world.url, color_scheme="dark") as shown,
    ):
        page = shown.page
        dark = await page.evaluate(background)
        await page.emulate_media(color_scheme="light")
        light = await page.evaluate(background)
        await page.get_by_label("Dark").check()
        chosen = await page.evaluate(background)
        await page.reload()
        await expect(answer(page)).to_have_text("a is warm")
        remembered = await page.evaluate(background)
        await page.get_by_label("Auto").check()
        followed = await page.evaluate(background)

    assert dark != light
    assert (chosen, remembered, followed) == (dark, dark, light)


# Of each text, the contrast with what is behind it; WCAG's formula. An element that shows none has none.
CONTRASTS = """() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const read = (colour) => {
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = colour;
    paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const node of document.querySelectorAll("body *:not(script):not(.unseen):not(.skip)")) {
    const text = [...node.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join("").trim();
    if (!text || !node.checkVisibility() || node.disabled) continue;
    let behind = node;
    while (behind && read(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const [a, b] = [getComputedStyle(node).color, getComputedStyle(behind ?? document.body).backgroundColor]
      .map((colour) => light(read(colour).slice(0, 3))).sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), text]);
  }
  return found;
}"""


def lively() -> Written:
    """One of each state."""
    load = {"elapsed_seconds": 62.0, "eta_seconds": 50.0, "attempt": 1}
    return Written(
        written("warm-one"),
        written("loading-one", "loading", load=load, waiting=3),
        written("failing-one", "backoff", reason="no memory", retry_at=utc(NOW + 200)),
        written("cold-one", "cold", reason="waits for its turn"),
        written("unknown-one", "unknown"),
        written("off-one", "cold", wanted=False, reason="released by hand"),
        config={"ok": False, "mistakes": ["config.toml:3: wrong"]},
    )


async def test_all_text_can_be_read_in_both_themes(browser: Browser) -> None:
    async with served(lively()) as world, opened(browser, world.url) as shown:
        await expect(row(shown.page, "off-one")).to_be_visible()
        for scheme in ("light", "dark"):
            await shown.page.emulate_media(color_scheme=scheme)
            contrasts = await shown.page.evaluate(CONTRASTS)

            assert len(contrasts) > 40
            assert [(scheme, text) for contrast, text in contrasts if contrast < 4.5] == []


async def test_no_state_is_told_by_colour_alone(browser: Browser) -> None:
    async with served(lively()) as world, opened(browser, world.url) as shown:
        page = shown.page
        await expect(row(page, "off-one")).to_be_visible()
        shapes = await page.locator("#models .sign").evaluate_all(
            "signs => signs.map(sign => sign.innerHTML)"
        )
        words = await page.locator("#models .state").all_inner_texts()

    assert len(set(shapes)) == 6
    assert words == ["warm", "loading", "backoff", "cold", "unknown", "cold"]


OUTSIDE = """() => [...document.querySelectorAll("main *, header *")].filter((n) => n.checkVisibility()
  && !n.closest(".unseen, svg, streaming-prompt-executor")
  && n.getBoundingClientRect().right > innerWidth + 1).map((n) => n.outerHTML)"""


@pytest.mark.parametrize("few", [True, False])
async def test_nothing_is_wider_than_the_screen(browser: Browser, few: bool) -> None:
    many = [
        written(f"team/model-{number:02}-instruct-q4", ["warm", "backoff"][number % 2])
        for number in range(20)
    ]
    models = lively().document["models"] if few else many
    async with served(Written(*models)) as world, opened(browser, world.url) as shown:
        page = shown.page
        await expect(page.locator("#models > li")).to_have_count(len(models))
        await page.locator("summary").first.click()
        for width in (320, 360, 768, 1280, 1920):
            await page.set_viewport_size({"width": width, "height": 800})

            assert await page.evaluate("document.documentElement.scrollWidth") == width
            assert await page.evaluate(OUTSIDE) == []


# --- who asked, and what for ---------------------------------------------------------------------------


def request(model: str | None = "gemma", **more: Any) -> dict[str, Any]:
    """One as `/api/requests` shows it."""
    return {
        "at": utc(NOW - 60), "model": model, "upstream": model and "local", "route": "chat", "start": "cold",
        "outcome": "ok", "status": 200, "wait_seconds": 31.2, "first_token_seconds": 31.9, "tokens_per_second": 48.7,
        "seconds": 40.0, **more,
    }  # fmt: skip


async def test_the_last_requests_are_told_without_a_word_of_what_was_said(browser: Browser) -> None:
    world = Written(written("gemma"))
    world.requested = [
        request(),
        request(None, wait_seconds=0.0, first_token_seconds=None, tokens_per_second=None),
        request(outcome="upstream_error", status=502, error="upstream_cut"),
        *(request() for _ in range(20)),
    ]
    async with served(world), opened(browser, world.url) as shown:
        rows = shown.page.locator("#requests-list tr")
        await expect(rows).to_have_count(12)
        cells = [await rows.nth(n).locator("th, td:not(:first-child)").all_inner_texts() for n in range(3)]
        rest = await shown.page.locator("#requests-rest").inner_text()

    assert cells == [
        ["gemma", "chat", "waited 31 s", "first token 32 s", "49 tokens/s", "40 s", "ok"],
        ["another model", "chat", "", "", "", "40 s", "ok"],
        [
            "gemma",
            "chat",
            "waited 31 s",
            "first token 32 s",
            "49 tokens/s",
            "40 s",
            "upstream error (502, upstream_cut)",
        ],
    ]
    assert rest == "and 11 earlier ones in the last 15 minutes"


@pytest.mark.parametrize(
    ("source", "about"),
    [
        ({"path": "/etc/x.toml", "unlisted": "pass"}, "These lines keep what was asked for:"),
        ({"path": "/etc/x.toml", "unlisted": "auto"}, "These lines pin what was asked for:"),
        (
            {"path": None, "unlisted": "auto"},
            "There is no config: what is asked for is kept while memory lasts. As config.toml, these lines pin what "
            "was asked for or is loaded; keepalive init writes them, too:",
        ),
    ],
)
async def test_what_was_asked_for_and_no_config_names_stands_there_with_lines_that_would(
    browser: Browser, source: dict[str, Any], about: str
) -> None:
    odd = 'odd "name" \\ of é'
    world = Written(written(odd), config={"ok": True, "mistakes": [], **source})
    kept = source["unlisted"] == "auto"
    world.unnamed = [
        {"key": odd, "upstream": "local", "requests": 12, "kept": kept},
        {"key": "<b>gemma</b>", "upstream": "local", "requests": 1, "kept": kept},
    ]
    world.unnamed.append({"key": "by-hand", "upstream": "local", "requests": 0, "kept": False})
    async with served(world), opened(browser, world.url) as shown:
        await expect(shown.page.locator("#unnamed-about")).to_have_text(about)
        said = await shown.page.locator("#unnamed-list li").all_inner_texts()
        lines = await shown.page.locator("#unnamed-lines").inner_text()

    assert said[1] == "<b>gemma</b>: 1 request" + ("" if kept else ", passed on as they came")
    assert said[2] == "by-hand: loaded by somebody else"
    models = config.parse(lines, "the page", {}).models
    assert [(model.key, model.context_length) for model in models] == [
        (odd, 8192),
        ("<b>gemma</b>", None),
        ("by-hand", None),
    ]


async def test_a_model_that_nobody_keeps_is_found_on_the_page_of_a_real_daemon(browser: Browser) -> None:
    async with simulator(QWEN, MEDICINE) as upstream, daemon(settings(upstream.url, QWEN.key)) as running:
        await until(lambda: running.status()["ready"], "it is warm")
        for key in (QWEN.key, MEDICINE.key, "sk-lm-canary"):
            body = {"model": key, "messages": [{"role": "user", "content": "CANARY"}], "max_tokens": 1}
            await asked(f"{running.url}/v1/chat/completions", "POST", body)
        told = (await asked(f"{running.admin_url}/api/requests"))[2]
        async with opened(browser, running.admin_url) as shown:
            await expect(shown.page.locator("#requests-list tr")).to_have_count(3)
            lines = await shown.page.locator("#unnamed-lines").inner_text()

    assert "canary" not in told.lower()
    assert lines.split() == ["[[models]]", "key", "=", '"medicine-llm"']


async def test_an_open_row_tells_what_it_takes_and_who_waits(browser: Browser) -> None:
    model = written("gemma", memory_bytes=8_540_000_000, memory_source="estimate", waiting=2, in_flight=1)
    async with served(Written(model)) as world, opened(browser, world.url) as shown:
        await row(shown.page, "gemma").locator("summary").click()
        facts = row(shown.page, "gemma").locator("details dl div")
        # They are written once the row has opened, which is told to the page behind the click.
        await expect(facts.filter(has_text="Now")).to_have_text(
            "Now 2 requests wait, 1 answer under way", use_inner_text=True
        )
        await expect(facts.filter(has_text="Memory")).to_have_text(
            "Memory 8.5 GB, by LM Studio's estimate", use_inner_text=True
        )


# --- for everybody ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [390, 1280])
async def test_axe_finds_nothing_to_complain_of(browser: Browser, width: int) -> None:
    axe = (packages(Path(__file__).parent / "package.json", "axe") / "axe-core/axe.min.js").read_text()
    world = lively()
    world.requested, world.unnamed = [request(), request(outcome="timeout", status=504)], [
        {"key": "other", "upstream": "local", "requests": 3, "kept": False}
    ]  # fmt: skip
    viewport = {"width": width, "height": 900}
    async with served(world), opened(browser, world.url, viewport=viewport) as shown:
        page = shown.page
        await expect(page.locator("#unnamed-lines")).to_be_visible()
        await page.locator("summary").first.click()
        # As the browser's own script: the page's policy lets no other in.
        session = await page.context.new_cdp_session(page)
        await session.send("Runtime.evaluate", {"expression": axe})
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            call = (
                "axe.run(document, {resultTypes: ['violations']}).then((r) => JSON.stringify(r.violations))"
            )
            ran = await session.send("Runtime.evaluate", {"expression": call, "awaitPromise": True})
            violations = json.loads(ran["result"]["value"])

            assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in violations] == []


# --- whom it must not trust ---------------------------------------------------------------------------

HOSTILE = {
    "markup": "<img src=x onerror=alert(1)>",
    "script": "</script><script>alert(1)</script>",
    "address": "javascript:alert(1)",
    "separators": "a\u2028b\u2029c\u202egnirts\u202c",
    "quotes": '"\'`onmouseover=alert(1) x="',
    "long": "x" * 100_000,
    "long words": "W " * 50_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
async def test_whatever_somebody_else_says_is_text(browser: Browser, text: str) -> None:
    upstream = {"name": text, "url": text, "state": "down", "tier": text, "since": utc(NOW), "error": text}
    models = [
        written(text, "backoff", upstream=text, reason=text, retry_at=utc(NOW + 60)),
        written(f"{text}2", "warm", upstream=text, instances=2, instance_id=text),
        written(
            f"{text}3", "loading", load={"elapsed_seconds": 1, "eta_seconds": 5, "attempt": 1}, reason=text
        ),
    ]
    world = Written(*models, upstreams=[upstream], config={"ok": False, "mistakes": [text]})
    world.stories[ModelId(text, text)] = {
        "loads": [{"at": utc(NOW), "outcome": text, "seconds": 1}],
        "evictions": [{"at": utc(NOW), "cause": text}],
        "timeline": [{"at": utc(NOW - 5), "state": text}, {"at": utc(NOW - 1), "state": "__proto__"}],
        "pings": {text: 1},
    }
    async with (
        served(world),
        opened(browser, world.url, viewport={"width": 360, "height": 800}) as shown,
    ):
        page = shown.page
        await expect(page.locator("#models > li")).to_have_count(3)
        await page.locator("summary").first.click()
        await expect(page.locator(".events").first).to_contain_text("Last evictions")
        foreign = await page.evaluate(
            """() => [...document.querySelectorAll("img, script:not([src]), iframe, [onerror], [onmouseover]")].length
              + [...document.querySelectorAll("a")].filter((a) => !a.getAttribute("href").startsWith("#")).length"""
        )
        width = await page.evaluate("document.documentElement.scrollWidth")
        height = await page.evaluate("document.documentElement.scrollHeight")

        assert foreign == 0
        assert width == 360
        assert height < 9000
        if len(text) < 100:
            assert await page.locator("#models h3").first.inner_text() == text


async def test_what_lm_studio_says_of_a_load_that_failed_is_text(browser: Browser) -> None:
    reason = HOSTILE["markup"] + HOSTILE["script"]
    async with (
        kept(MEDICINE, load_result="fail", load_fail_reason=reason) as (running, _),
        opened(browser, running.admin_url) as shown,
    ):
        await expect(row(shown.page, "medicine-llm")).to_contain_text(reason)


ATTACKS = """async (url) => {
  const form = document.createElement("form");
  Object.assign(form, { method: "POST", action: url + "/api/models/a/release", target: "sink" });
  const sink = document.createElement("iframe");
  sink.name = "sink";
  document.body.append(sink, form);
  form.submit();
  const boxed = document.createElement("iframe");
  boxed.sandbox = "allow-scripts allow-forms";
  const change = `${url}/api/models/a/release`;
  // In turn: what a frame has asked for and not sent yet is gone with the page that its form leaves behind.
  boxed.srcdoc = `<form method=POST action="${change}"></form><script>
    fetch("${change}", { method: "POST", mode: "no-cors" }).finally(() => document.forms[0].submit())
    </` + "script>";
  document.body.append(boxed);
  const tries = [];
  for (const verb of ["warm", "release"]) {
    const target = `${url}/api/models/a/${verb}`;
    tries.push(fetch(target, { method: "POST", mode: "no-cors", credentials: "include" }));
    const simple = { mode: "no-cors", body: "{}", headers: { "Content-Type": "text/plain" } };
    tries.push(fetch(target, { method: "POST", ...simple }));
    tries.push(fetch(target, { method: "POST", headers: { "X-Own": "1" } }));
    tries.push(fetch(target, { method: "PUT" }));
    const image = new Image();
    image.src = target;
    navigator.sendBeacon(target, "x");
  }
  const read = await Promise.allSettled([fetch(url + "/api/status").then((answer) => answer.text())]);
  await Promise.allSettled(tries);
  return read[0].status;
}"""


# Of each verb: fetches with and without a body, and a beacon; preflights of the two that are not simple; an image.
ATTEMPTS = Counter(
    {
        **{("POST", verb): 3 for verb in ("warm", "release")},
        **{("OPTIONS", verb): 2 for verb in ("warm", "release")},
        **{("GET", verb): 1 for verb in ("warm", "release")},
    }
)
# Two forms, and a fetch out of a sandbox.
ATTEMPTS["POST", "release"] += 3


@asynccontextmanager
async def foreign() -> AsyncIterator[str]:
    """A page from elsewhere; empty. Returns its address, for a browser that maps *.example here."""

    async def handle(request: web.BaseRequest) -> web.Response:
        return web.Response(text="<!doctype html><title>elsewhere</title>", content_type="text/html")

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://evil.example:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_a_page_from_elsewhere_changes_nothing_and_reads_nothing(browser: Browser) -> None:
    async with served(Written(written("a"))) as world, foreign() as elsewhere, tab(browser) as shown:
        await shown.page.goto(elsewhere)
        read = await shown.page.evaluate(ATTACKS, world.url)
        # All have come, also those that nobody there hears the end of: forms, images, beacons.
        await until(lambda: world.heard >= ATTEMPTS, "all that was tried has come")
        # That the attacks would do something: from our own page, one of them does.
        await shown.page.goto(world.url)
        await shown.page.evaluate("fetch('/api/models/a/warm', { method: 'POST' })")
        await until(lambda: world.asked)

    assert read == "rejected"
    assert world.asked == [("warm", ModelId("local", "a"))]
    assert shown.dialogs == []


async def test_a_rebound_name_reads_nothing(browser: Browser) -> None:
    async with served(Written(written("secret-model"))) as world, tab(browser) as shown:
        port = urlsplit(world.url).port
        answers = {}
        for path in ("/", "/api/status", "/api/events", "/api/history", "/page/start.js", "/api/prompts"):
            got = await shown.page.goto(f"http://rebound.example:{port}{path}")
            assert got is not None
            answers[path] = (got.status, "secret-model" in await got.text())
        probe = await shown.page.goto(f"http://rebound.example:{port}/livez")

    assert set(answers.values()) == {(403, False)}
    assert probe is not None
    assert probe.status == 200


async def test_a_name_of_its_own_that_is_configured_is_served(browser: Browser) -> None:
    async with served(Written(written("a")), Access(hosts=("ops.example",))) as world, tab(browser) as shown:
        await shown.page.goto(f"http://ops.example:{urlsplit(world.url).port}/")
        await expect(answer(shown.page)).to_have_text("a is warm")


async def test_the_page_is_in_nobodys_frame(browser: Browser) -> None:
    async with served(Written(written("a"))) as world, foreign() as elsewhere, tab(browser) as shown:
        page = shown.page
        await page.goto(elsewhere)
        await page.evaluate(
            "url => { const f = document.createElement('iframe'); f.src = url; document.body.append(f) }",
            world.url,
        )
        await until(lambda: shown.errors)
        framed = [await frame.locator("#answer").count() for frame in page.frames[1:]]

    assert any("frame-ancestors 'none'" in error for error in shown.errors)
    assert framed == [0]


async def test_with_a_key_the_browser_asks_for_a_password_and_the_page_works(browser: Browser) -> None:
    access = Access(keys={"ops": "right-key"})
    async with served(Written(written("a")), access) as world:
        async with opened(
            browser, world.url, http_credentials={"username": "ops", "password": "right-key"}
        ) as shown:
            page = shown.page
            await expect(page.locator("#contact")).to_have_text("live")
            world.becomes(written("a", "cold"))
            await expect(answer(page)).to_contain_text("a is cold")
            await page.get_by_role("button", name="Warm a").click()
            await until(lambda: world.asked)
        async with tab(browser) as shown:
            # With nobody to ask for the password, one browser shows the refusal, and another ends it before that.
            ended, refused = "", None
            try:
                refused = await shown.page.goto(world.url)
            except Error as error:
                ended = str(error)

            asked = refused is not None and "Basic realm" in refused.headers["www-authenticate"]
            assert asked or "ERR_INVALID_AUTH_CREDENTIALS" in ended


# --- a hundred of them --------------------------------------------------------------------------------

KINDS = ("warm", "warm", "warm", "loading", "backoff")


def hundred(changed: int = -1) -> list[dict[str, Any]]:
    load = {"elapsed_seconds": 10, "eta_seconds": 100, "attempt": 1}
    return [
        written(
            f"team-{number % 7}/model-{number:02}-8b-instruct",
            state,
            load=load if state == "loading" else None,
            reason="LM Studio answered 500: Error loading model." if state == "backoff" else None,
            in_flight=int(number == changed),
        )
        for number in range(100)
        for state in (KINDS[number % 5],)
    ]


def with_stories(world: Written) -> Written:
    """Ten loads and evictions each in the last day."""
    for one in world.document["models"]:
        times = [NOW - 86_400 + 8000 * number for number in range(10)]
        world.stories[ModelId("local", one["key"])] = {
            "loads": [{"at": utc(at + 60), "outcome": "ok", "seconds": 55.0 + at % 7} for at in times],
            "evictions": [{"at": utc(at), "cause": "displaced"} for at in times],
            "timeline": [
                {"at": utc(at + after), "state": state}
                for at in times
                for after, state in ((0, "cold"), (5, "loading"), (60, "warm"))
            ],
            "waits": {"requests": 10, "seconds": 300.0},
            "pings": {"ok": 280},
        }
    return world


async def test_a_hundred_models_are_found_by_state_and_by_name(browser: Browser) -> None:
    async with served(Written(*hundred())) as world, opened(browser, world.url) as shown:
        page, visible = shown.page, shown.page.locator("#models > li:visible")
        await expect(answer(page)).to_have_text("60 of 100 models warm: 20 failing, 20 loading")
        await expect(visible).to_have_count(100)
        await page.get_by_label("failing 20").check()
        await expect(visible).to_have_count(20)
        await page.get_by_label("Find a model").fill("model-04")
        await expect(visible).to_have_count(1)
        await page.get_by_label("Find a model").fill("")
        changed = [{**m, "state": "warm"} for m in hundred()]
        world.becomes(*changed)
        await expect(visible).to_have_count(0)
        await page.get_by_label("All 100").check()
        await expect(visible).to_have_count(100)
        # What is wrong with many is said once, and leads to them.
        world.becomes(*hundred())
        await page.get_by_role("button", name="18 others").click()
        await expect(visible).to_have_count(20)


# The rows that are written to, by name, from here on.
WATCH = """() => { window.touched = new Set();
  new MutationObserver((changes) => {
    for (const { target } of changes) {
      const row = (target.nodeType === 1 ? target : target.parentElement).closest("#models > li");
      touched.add(row ? row.querySelector("h3").textContent : "the list");
    }
  }).observe(document.querySelector("#models"),
    { subtree: true, childList: true, attributes: true, characterData: true });
}"""


async def test_a_hundred_models_are_small_and_a_change_touches_only_the_rows_that_it_is_about(
    browser: Browser,
) -> None:
    """What makes it quick, rather than how quick it was today: `benchmarks/page.py` tells that."""
    world = with_stories(Written(*hundred()))
    names = [model["key"] for model in world.document["models"]]
    async with served(world), tab(browser, clock=NOW) as shown:
        page = shown.page
        network = await page.context.new_cdp_session(page)
        received: list[float] = []
        network.on("Network.loadingFinished", lambda event: received.append(event["encodedDataLength"]))
        await network.send("Network.enable")
        await page.goto(world.url)
        await expect(page.locator(".timeline")).to_have_count(100)
        await expect(page.locator("#contact")).to_have_text("live")
        await page.clock.run_for(100)
        await expect(page.get_by_label("Prompt or model")).to_be_visible()
        await page.evaluate(WATCH)
        touched = []
        for number in range(10):
            world.becomes(*hundred(number))
            await expect(row(page, names[number])).to_contain_text("1 in flight")
            touched.append(set(await page.evaluate("[...touched]")))
            await page.evaluate("touched.clear()")

        assert 10_000 < sum(received) < 100_000
        assert touched == [{names[0]}, *({names[n - 1], names[n]} for n in range(1, 10))]
        assert shown.errors == []


# --- a day of it --------------------------------------------------------------------------------------

SCREENSHOTS = PROJECT / "docs" if os.environ.get("KEEPALIVE_SCREENSHOTS") else None

TWO_SERVERS = """
[server]
listen = "127.0.0.1:0"
admin_listen = "127.0.0.1:0"
state_dir = "{state}"

[[upstreams]]
name = "gpu-1"
url = "{gpu}"

[[upstreams]]
name = "desk"
url = "{desk}"

[defaults]
refresh_interval = "100ms"
ping_interval = "20m"

[[models]]
key = "medicine-llm"
upstream = "gpu-1"
context_length = 8192

[[models]]
key = "google/gemma-3-27b-it"
upstream = "gpu-1"

[[models]]
key = "qwen/qwen3-4b-2507"
upstream = "gpu-1"

[[models]]
key = "text-embedding-nomic-embed-text-v1.5"
upstream = "desk"

[[prompts]]
id = 28
title = "Explain to a nurse"
model = "medicine-llm"
content = "Explain {{{{topic}}}} to a nurse."
"""


def listings(studio: Studio) -> int:
    return sum(
        event["kind"] == "request" and event["route"] in ("list", "list_v0") for event in studio.log(0)
    )


class Day:
    """A daemon and two LM Studios in one event loop, whose clock skips hours when told."""

    def __init__(self, *studios: Studio) -> None:
        self.skipped = 0.0
        self.studios = studios
        self.begun: Counter[str] = Counter()
        self.running: Daemon

    def monotonic(self) -> float:
        return time.monotonic() + self.skipped

    def time(self) -> float:
        return time.time() + self.skipped - 86_000

    def model(self, key: str) -> dict[str, Any]:
        return next(m for m in self.running.status()["models"] if m["key"] == key)

    async def reaches(self, key: str, state: str) -> None:
        await until(lambda: self.model(key)["state"] == state, f"{key} is {state}")

    async def passes(self, seconds: float) -> None:
        """Time passes while nobody waits for an answer."""
        await until(lambda: not any(m["waiting"] or m["in_flight"] for m in self.running.status()["models"]))
        await self.skips(seconds)

    async def skips(self, seconds: float) -> None:
        """Time passes while nothing is due, and each LM Studio is asked what it has since."""
        await until(self.is_settled, "all that is due is answered")
        self.skipped += seconds
        before = [listings(studio) + 1 for studio in self.studios]
        await until(lambda: all(map(gt, map(listings, self.studios), before)))
        await until(self.is_settled, "all that got due is answered")

    def is_settled(self) -> bool:
        """No upstream is in trouble, and no ping is due or on its way."""
        known = self.running.status()
        warm = (model for model in known["models"] if model["state"] == "warm")
        pinged = all((model["next_ping_at"] or "") > known["now"] for model in warm)
        return pinged and all(upstream["state"] == "up" for upstream in known["upstreams"])

    async def begins(self, key: str) -> None:
        """LM Studio loads it."""
        self.begun[key] += 1
        await until(lambda: sum(loads(s, key) for s in self.studios) == self.begun[key], f"{key} loads")

    async def loads(self, key: str, seconds: float) -> None:
        """Its load takes about so long."""
        await self.begins(key)
        await self.skips(seconds)
        await self.reaches(key, "warm")

    async def ask(self, key: str, words: int) -> None:
        """A caller with a streaming request, who stays until the end."""
        place = urlsplit(self.running.url)
        body = json.dumps(
            {
                "model": key,
                "stream": True,
                "max_tokens": words,
                "messages": [{"role": "user", "content": "?"}],
            }
        )
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        try:
            writer.write((head + body).encode())
            await reader.read()
        finally:
            writer.close()


@pytest.mark.asyncio(loop_scope="function")
async def test_a_day_with_its_troubles_can_be_told_from_the_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    medicine = SimModel("medicine-llm", size_bytes=8_540_000_000)
    gemma = SimModel("google/gemma-3-27b-it", size_bytes=16_800_000_000)
    qwen = SimModel("qwen/qwen3-4b-2507", size_bytes=2_500_000_000)
    took = {medicine.key: (58, 71, 54), gemma.key: (104, 92, 118, 104), qwen.key: (19, 21)}
    seconds = [{"value": s, "model": key, "times": 1} for key in took for s in took[key]]
    nomic = SimModel("text-embedding-nomic-embed-text-v1.5", "embedding", 84_106_624, load_seconds=0.5)
    async with (
        simulator(medicine, gemma, qwen, token_seconds=0.2, answer_tokens=5000, load_seconds=seconds) as gpu,
        simulator(nomic, SimModel("llama-3.2-3b")) as desk,
    ):
        desk.studio.tier = "v0"
        day = Day(gpu.studio, desk.studio)
        monkeypatch.setattr("keepalive.service.daemon.time", day)
        monkeypatch.setattr(asyncio.get_running_loop(), "time", day.monotonic)
        text = TWO_SERVERS.format(gpu=gpu.url, desk=desk.url, state=tmp_path)
        async with daemon(text, wall=day.time) as day.running, asyncio.TaskGroup() as callers:
            asking: list[asyncio.Task[None]] = []

            def begin(key: str, words: int) -> None:
                asking.append(callers.create_task(day.ask(key, words)))

            await day.reaches(nomic.key, "warm")
            for one in (medicine, gemma, qwen):
                await day.loads(one.key, took[one.key][0])
            await day.passes(8.9 * 3600)
            # Somebody unloads it, and people ask for it at once.
            gpu.studio.evict(gemma.key)
            await day.reaches(gemma.key, "loading")
            begin(gemma.key, 1)
            begin(gemma.key, 1)
            await until(lambda: day.model(gemma.key)["waiting"] == 2)
            await day.loads(gemma.key, 92)
            await day.passes(4.8 * 3600)
            # Somebody asks for another model, and LM Studio 0.3 makes room for it.
            desk.studio.load("llama-3.2-3b", seconds=0)
            desk.studio.evict(nomic.key)
            await until(lambda: day.model(nomic.key)["evictions"])
            await day.passes(3.1 * 3600)
            gpu.studio.restart(LONG)
            await until(lambda: day.running.status()["upstreams"][0]["state"] == "down")
            gpu.studio.advance(LONG)
            # No time passes before: the first load may have begun.
            await day.loads(medicine.key, 71)
            await day.loads(gemma.key, 118)
            await day.loads(qwen.key, 21)
            await day.passes(4.2 * 3600)
            day.running.release(ModelId("desk", nomic.key))
            # It crashes under somebody's eyes.
            begin(medicine.key, 5000)
            await until(lambda: day.model(medicine.key)["in_flight"] and gpu.studio.in_flight)
            gpu.studio.crash(medicine.key)
            await day.reaches(medicine.key, "loading")
            begin(medicine.key, 1)
            await until(lambda: day.model(medicine.key)["waiting"])
            await day.loads(medicine.key, 54)
            await day.passes(2.1 * 3600)
            gpu.studio.set_faults(load_result={"value": "guardrail", "model": qwen.key})
            gpu.studio.evict(qwen.key)
            await day.reaches(qwen.key, "backoff")
            await day.passes(100)
            gpu.studio.evict(gemma.key)
            await day.begins(gemma.key)
            for _ in range(3):
                begin(gemma.key, 1)
            await until(lambda: day.model(gemma.key)["waiting"] == 3)
            await day.skips(60)
            for _ in range(2):
                begin(medicine.key, 5000)
            await until(lambda: day.model(medicine.key)["in_flight"] == 2)
            await asked(f"{day.running.admin_url}/metrics")
            wide = {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"}
            phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"}
            folder = SCREENSHOTS or tmp_path
            async with chromium() as browser:
                for name, screen in (("page", wide), ("page-phone", phone)):
                    async with opened(browser, day.running.admin_url, **screen) as shown:
                        page = shown.page
                        await expect(page.locator(".timeline")).to_have_count(4)
                        await expect(row(page, medicine.key)).to_contain_text("2 in flight")
                        await expect(row(page, medicine.key)).to_contain_text("it crashed")
                        await expect(row(page, gemma.key)).to_contain_text("unloaded by hand")
                        await expect(row(page, gemma.key)).to_contain_text("3 waiting")
                        await expect(row(page, nomic.key)).to_contain_text("another model took its place")
                        # Who asks while a ping is due may wait for a moment, too.
                        waited = re.compile(r"\d min in \d requests")
                        await expect(page.locator("header #figures")).to_contain_text(waited)
                        await expect(page.locator("footer")).to_contain_text("metrics last read")
                        await expect(page.get_by_label("topic")).to_be_visible()
                        await page.screenshot(path=folder / f"{name}.png", full_page=True)
            for task in asking:
                task.cancel()
