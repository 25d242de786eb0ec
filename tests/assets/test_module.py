"""The module for browsers, in a real Chromium: its parser at every split, its element, its hook in a React app.

The daemon and the simulator are the real ones, but where a server has to misbehave in ways that they never do.
"""

import asyncio
import contextlib
import json
import re
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from playwright.async_api import Browser, Locator, Page, expect

from keepalive.service.daemon import Daemon
from keepalive.simulator.models import SimModel
from keepalive.simulator.studio import Studio
from tests.assets.react.build import bundle, snippets
from tests.kit import PROJECT
from tests.kit.browser import Tab, eventually, frames, tab
from tests.kit.live import (
    DaemonProcess,
    SimulatorProcess,
    daemon,
    ending,
    loads,
    model,
    settings,
    simulator,
    until,
)
from tests.kit.ports import at_ports, reserved

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    # A browser for each worker is half a minute of a processor in all, and its first pages cost more than the next.
    pytest.mark.xdist_group("the module in a browser"),
]

MODULE = PROJECT / "keepalive" / "assets" / "keepalive.js"
KEY = "medicine-llm"
PROMPTS = f"""
[[prompts]]
id = 28
title = "Teste Simples"
model = "{KEY}"
content = "Explain {{{{topic}}}} to a nurse."

[[prompts]]
id = "greet"
title = "Greet"
model = "{KEY}"
content = "Say hello."
max_tokens = 3
"""
# Of a page that asks a daemon at another origin.
FOREIGN = "default-src 'self' http://127.0.0.1:*"
CSP = "default-src 'self'; base-uri 'none'; frame-ancestors 'none'"
DOCUMENT = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<title>a page</title></head><body>{}</body></html>"""
STREAM = "/api/prompts/execute/stream"
# A load ends when a test says so.
LONG = 1000.0
EVIL = '<img src=x onerror="alert(1)"><script>alert(2)</script>&lt;'


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return bundle(tmp_path_factory.mktemp("react") / "app")


# --- servers ----------------------------------------------------------------------------------------


class Answer:
    """The stream that a script writes."""

    def __init__(self, request: web.Request, asked: Any) -> None:
        self.request = request
        self.asked = asked
        self.response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})

    async def send(self, data: bytes) -> None:
        if not self.response.prepared:
            await self.response.prepare(self.request)
        await self.response.write(data)

    async def say(self, **event: Any) -> None:
        await self.send(b"data: " + json.dumps(event).encode() + b"\n\n")

    async def start(self, name: str = KEY) -> None:
        await self.say(type="start", promptId=28, promptTitle="Teste", modelId=name, modelName=name)

    async def done(self, chunks: int, characters: int) -> None:
        await self.say(type="done", totalChunks=chunks, duration=2100, outputLength=characters)


Script = Callable[[Answer], Awaitable[web.StreamResponse | None]]


class Site:
    """A server for pages of ours, and in place of the daemon: it plays a script for each prompt."""

    def __init__(self, policy: str) -> None:
        self.url = ""
        self.policy = policy
        self.pages: dict[str, tuple[str, bytes]] = {
            "/": ("text/html", DOCUMENT.format("").encode()),
            "/keepalive.js": ("text/javascript", MODULE.read_bytes()),
            "/favicon.ico": ("image/x-icon", b""),
        }
        self.prompts: list[dict[str, Any]] = [
            {"id": 28, "title": "Teste", "model": KEY, "variables": ["topic"]}
        ]
        self.models: list[str] = []
        self.script: Script | None = None
        self.asked: list[Any] = []
        self.left = 0  # callers that went before their answer was complete

    async def serve(self, request: web.Request) -> web.StreamResponse:
        if request.path == STREAM:
            self.asked.append(await request.json())
            answer = Answer(request, self.asked[-1])
            assert self.script is not None
            try:
                return await self.script(answer) or answer.response
            except (asyncio.CancelledError, ConnectionError):
                self.left += 1
                raise
        if request.path == "/api/prompts":
            return web.json_response({"success": True, "data": self.prompts})
        if request.path == "/api/status":
            return web.json_response({"models": [{"key": key, "state": "warm"} for key in self.models]})
        kind, body = self.pages.get(request.path, ("text/plain", b""))
        status = 200 if request.path in self.pages else 404
        return web.Response(
            status=status, body=body, content_type=kind, headers={"Content-Security-Policy": self.policy}
        )


@contextlib.asynccontextmanager
async def site(policy: str = CSP) -> AsyncIterator[Site]:
    serving = Site(policy)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", serving.serve)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        serving.url = "http://127.0.0.1:{}".format(*runner.addresses[0][1:])
        yield serving
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def front(origin: str = "", **faults: Any) -> AsyncIterator[tuple[Daemon, Studio]]:
    """A daemon before a simulator, with its model warm."""
    server = f'allowed_origins = ["{origin}"]' if origin else ""
    async with (
        simulator(SimModel(KEY, load_seconds=LONG), **faults) as upstream,
        daemon(settings(upstream.url, KEY, server=server, upstream=BY_HTTP) + PROMPTS) as running,
    ):
        await load_ends(upstream.studio, 1)
        await until(lambda: model(running, KEY)["state"] == "warm")
        yield running, upstream.studio


async def load_ends(studio: Studio, number: int) -> None:
    """The load with this number."""
    await until(lambda: loads(studio) == number, "LM Studio loads")
    studio.advance(LONG)


async def evicted(running: Daemon, studio: Studio) -> None:
    """The model is out of memory, and on its way back."""
    studio.evict(KEY)
    await until(lambda: model(running, KEY)["state"] == "loading")


@contextlib.asynccontextmanager
async def opened(browser: Browser, url: str, **options: Any) -> AsyncIterator[Tab]:
    async with tab(browser, **options) as here:
        await here.page.goto(url)
        yield here


# --- the wire ---------------------------------------------------------------------------------------

# A byte order mark, every kind of line end, comments, data over several lines, other fields, several bytes
# for one character.
RECORDED = (
    b'\xef\xbb\xbf: hello\r\ndata: {"type":"start","promptTitle":"Se\xc3\xb1or"}\r\n\r\n'
    b': keep-alive\n\nid: 1\nevent: message\ndata:{"type":"model_loading",\rdata: "elapsed":1000}\r\r'
    b'retry: 5\n\ndata: {"type":"chunk",\r\ndata:"content":"\xf0\x9f\x98\x80\\n"}\n\n'
    b'data: {"type":"chunk","content":" : a\\tb"}\r\r\n'
    b'data: {"type":"later","content":"\xe2\x82\xac"}\n\n'
    b'data: {"type":"done","totalChunks":2}\n\n'
    b'data: {"type":"chunk","content":"never seen"}\n\n'
)
EVENTS = [
    {"type": "start", "promptTitle": "Señor"},
    {"type": "model_loading", "elapsed": 1000},
    {"type": "chunk", "content": "😀\n"},
    {"type": "chunk", "content": " : a\tb"},
    {"type": "later", "content": "€"},
    {"type": "done", "totalChunks": 2},
]
# `read(pieces)`: what streamPrompt makes of a body that comes in these pieces; also what it raises.
READ = """
const { streamPrompt } = await import("/keepalive.js");
const answer = (pieces, init) => async (url, { signal }) => new Response(new ReadableStream({
  start(controller) {
    signal.addEventListener("abort", () => { try { controller.error(signal.reason) } catch {} });
    for (const piece of pieces) controller.enqueue(piece);
    if (!init?.open) controller.close();
  },
}), { headers: { "Content-Type": "text/event-stream; charset=utf-8" }, ...init });
const told = (error) => ({ ...error, message: error.message });
const read = async (fetch, options) => {
  const events = [];
  try {
    for await (const event of streamPrompt({ promptId: 28 }, { fetch, ...options })) events.push(event);
  } catch (error) {
    return [...events, told(error)];
  }
  return events;
};
const bytes = (text) => new TextEncoder().encode(text);
"""


async def run(page: Page, script: str, argument: Any = None) -> Any:
    return await page.evaluate(f"async (given) => {{ {READ} {script} }}", argument)


@pytest_asyncio.fixture(loop_scope="session")
async def plain(browser: Browser) -> AsyncIterator[Page]:
    """A page that shows nothing."""
    async with site() as serving, opened(browser, serving.url) as here:
        yield here.page
        assert here.errors == []


async def test_a_stream_reads_the_same_wherever_the_network_splits_it(plain: Page) -> None:
    found = await run(
        plain,
        """
        const whole = new Uint8Array(given);
        const pieces = [...whole].map((_, i) => [whole.slice(0, i), whole.slice(i)]);
        pieces.push([...whole].map((byte) => new Uint8Array([byte])));
        const seen = new Set();
        for (const split of pieces) seen.add(JSON.stringify(await read(answer(split))));
        return [pieces.length, ...seen].map((one) => JSON.parse(one));
        """,
        list(RECORDED),
    )

    assert found == [len(RECORDED) + 1, EVENTS]


async def test_an_error_event_is_raised_after_what_came_before(plain: Page) -> None:
    found = await run(
        plain,
        """return await read(answer([bytes(
          'data: {"type":"chunk","content":"a"}\\n\\ndata: {"type":"error","message":"it crashed","code":"E"}\\n\\n'
        )]));""",
    )

    assert found[0] == {"type": "chunk", "content": "a"}
    assert found[1:] == [raised("it crashed", "E")]


def raised(message: str, code: str | None, **more: Any) -> dict[str, Any]:
    return {
        "name": "StreamingPromptError",
        "message": message,
        "code": code,
        "status": None,
        "field": None,
        "retryAfter": None,
        **more,
    }


LOST = "The connection broke off before the answer was complete."
OTHER = "What answers here is not keepalive"


@pytest.mark.parametrize(
    ("body", "init", "expected"),
    [
        ("", {}, raised(LOST, "connection_lost")),
        ('data: {"type":"done"}', {}, raised(LOST, "connection_lost")),
        ("data: no\n\n", {}, raised(f"{OTHER}: an event that is none.", "bad_answer")),
        ("data: null\n\n", {}, raised(f"{OTHER}: an event that is none.", "bad_answer")),
        (
            "<p>",
            {"headers": {"Content-Type": "text/html"}},
            raised(f"{OTHER}: no event stream.", "bad_answer"),
        ),
        (
            '{"success":false,"error":{"message":"topic is missing","code":"c","field":"variables.topic"}}',
            {"status": 400, "headers": {"Retry-After": "7"}},
            raised("topic is missing", "c", status=400, field="variables.topic", retryAfter=7),
        ),
        ('{"error":"not here"}', {"status": 403}, raised("not here", None, status=403)),
        ("<h1>Bad Gateway", {"status": 502, "statusText": "Oops"}, raised("HTTP 502 Oops", None, status=502)),
    ],
)
async def test_whatever_ends_an_answer_says_what_it_was(
    plain: Page, body: str, init: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = await run(plain, "return await read(answer([bytes(given[0])], given[1]));", [body, init])

    assert found == [expected]


async def test_a_date_to_come_back_at_is_told_in_seconds(plain: Page) -> None:
    (found,) = await run(
        plain,
        """const now = Date.parse("2026-11-22T10:01:40Z");
        Date.now = () => now;
        const later = new Date(now + 90_000).toUTCString();
        return await read(answer([], { status: 503, headers: { "Retry-After": later } }));""",
    )

    assert found["retryAfter"] == 90


async def test_an_event_without_an_end_does_not_fill_the_memory(plain: Page) -> None:
    found = await run(
        plain,
        """
        let count = 0;
        const fetch = async () => new Response(new ReadableStream({
          pull(controller) {
            count += 1;
            controller.enqueue(bytes("data: " + "x".repeat(65536) + "\\n".repeat(count % 2)));
          },
        }), { headers: { "Content-Type": "text/event-stream" } });
        const [error] = await read(fetch);
        return [error.code, count < 400];
        """,
    )

    assert found == ["bad_answer", True]


async def test_nobody_there_is_said_with_what_may_be_wrong(browser: Browser) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free = f"http://127.0.0.1:{probe.getsockname()[1]}"
    async with site() as serving, opened(browser, serving.url) as here:
        (found,) = await run(here.page, "return await read(undefined, { baseUrl: given });", free)

    question = f"Is keepalive running, and is {serving.url} among its allowed_origins?"
    assert found == raised(f"There is no answer from {free}. {question}", "unreachable")


async def test_silence_is_a_lost_connection(plain: Page) -> None:
    found = await run(plain, "return await read(answer([], { open: true }), { idleTimeout: 50 });")

    assert found == [raised(LOST, "connection_lost")]


async def test_leaving_the_loop_ends_the_request_at_once(browser: Browser) -> None:
    async def endless(answer: Answer) -> None:
        await answer.start()
        await asyncio.Event().wait()

    async with site() as serving, opened(browser, serving.url) as here:
        serving.script = endless
        await run(here.page, "for await (const event of streamPrompt({})) break;")
        await until(lambda: serving.left == 1, "the first one left")
        ended = await run(
            here.page,
            """
            const events = streamPrompt({}, { idleTimeout: 0 });
            await events.next();
            const waiting = events.next();
            return [await events.return("x"), await waiting];
            """,
        )
        await until(lambda: serving.left == 2, "the second one left")
        reason = await run(
            here.page,
            """
            const controller = new AbortController();
            const events = streamPrompt({}, { signal: controller.signal });
            await events.next();
            setTimeout(() => controller.abort(new Error("enough")));
            return [
              await events.next().catch((error) => error.message),
              await streamPrompt({}, { signal: controller.signal }).next().catch((error) => error.message),
            ];
            """,
        )
        await until(lambda: serving.left == 3, "the third one left")

    assert ended == [{"value": "x", "done": True}, {"value": None, "done": True}]
    assert reason == ["enough", "enough"]
    assert len(serving.asked) == 3
    assert here.errors == []


async def test_a_whole_answer_leaves_its_connection_to_the_next_one(browser: Browser) -> None:
    """Also when the end of the body comes only after its last event has been taken."""
    ports = []
    taken = asyncio.Event()

    async def slow_to_end(answer: Answer) -> None:
        ports.append(answer.request.transport.get_extra_info("peername"))  # type: ignore[union-attr]
        await answer.done(0, 0)
        await taken.wait()

    async with site() as serving, opened(browser, serving.url) as here:
        serving.script = slow_to_end
        for n in range(3):
            taken.clear()
            await run(here.page, "return await read();")
            taken.set()
            # There is an entry once all of the answer has come.
            ended = f"performance.getEntriesByName('{serving.url}{STREAM}').length === {n + 1}"
            await eventually(here.page, ended)

    assert len(ports) == 3
    assert len(set(ports)) == 1
    assert serving.left == 0


async def test_what_came_with_the_last_thing_before_a_cancel_is_nobodys(plain: Page) -> None:
    found = await run(
        plain,
        """
        const { PromptRun } = await import("/keepalive.js");
        const chunk = (content) => `data: ${JSON.stringify({ type: "chunk", content })}\\n\\n`;
        const once = (does) => {
          const told = [];
          const run = new PromptRun({
            fetch: answer([bytes(chunk("a") + chunk("b") + chunk("c"))]),
            onEvent: (event) => told.push(event.content) === 1 && does(run),
          });
          const after = () => [run.getSnapshot().status, run.getSnapshot().content];
          return run.execute({}).then((state) => [told, state.status, ...after()]);
        };
        return [await once((run) => run.cancel()), await once((run) => run.reset())];
        """,
    )

    assert found == [[["a"], "cancelled", "cancelled", "a"], [["a"], "cancelled", "idle", ""]]


# --- the element ------------------------------------------------------------------------------------

ELEMENT = '<script type="module" src="/keepalive.js"></script>{}'
# What it says aloud, and the events it dispatches.
LISTEN = """() => {
  window.heard = [];
  window.told = [];
  const element = document.querySelector("streaming-prompt-executor");
  const live = element.shadowRoot.querySelector("[role=status]");
  new MutationObserver(() => window.heard.push(live.textContent)).observe(live, { childList: true });
  for (const type of ["start", "model_loading", "reasoning", "chunk", "done", "error"])
    element.addEventListener(type, ({ detail }) => window.told.push([type, detail.content ?? detail.code ?? null]));
}"""


class Element:
    """An executor on a page."""

    def __init__(self, here: Tab) -> None:
        self.tab = here
        self.page = here.page
        self.host = here.page.locator("streaming-prompt-executor")

    def button(self, name: str) -> Locator:
        return self.host.get_by_role("button", name=name)

    def at(self, name: str) -> Locator:
        return self.host.locator(f"#{name}")

    async def reaches(self, label: str) -> None:
        await expect(self.at("label")).to_have_text(label)

    async def state(self) -> Any:
        return await self.host.evaluate("(element) => element.state")

    async def heard(self) -> list[str]:
        return list(await self.page.evaluate("window.heard"))

    async def told(self) -> list[list[Any]]:
        return list(await self.page.evaluate("window.told"))


@contextlib.asynccontextmanager
async def element(
    browser: Browser,
    origin: str,
    html: str = "<streaming-prompt-executor></streaming-prompt-executor>",
    **options: Any,
) -> AsyncIterator[Element]:
    async with tab(browser, **options) as here:

        async def blank(route: Any) -> None:
            headers = {"Content-Security-Policy": CSP}
            await route.fulfill(
                content_type="text/html", headers=headers, body=DOCUMENT.format(ELEMENT.format(html))
            )

        await here.page.route(f"{origin}/blank", blank)
        await here.page.goto(f"{origin}/blank")
        await eventually(here.page, "!!customElements.get('streaming-prompt-executor')")
        shown = Element(here)
        await here.page.evaluate(LISTEN)
        yield shown
        assert here.dialogs == []


# Over HTTP LM Studio says itself how long a load took, so that the next one is estimated by minutes.
BY_HTTP = 'sdk = "off"'
PLAIN = "<streaming-prompt-executor></streaming-prompt-executor>"
PROMPT = PLAIN.replace(">", """ prompt-id="28" variables='{"topic": "SSE"}'>""", 1)


async def test_a_cold_start_shows_the_load_and_then_the_answer(browser: Browser) -> None:
    async with front(answer_tokens=12) as (running, studio):
        async with element(browser, running.admin_url, PROMPT) as shown:
            await evicted(running, studio)
            await shown.button("Run").click()
            await shown.reaches("Loading model…")
            await expect(shown.host.get_by_role("progressbar", name="Loading model")).to_be_visible()
            await expect(shown.at("clock")).to_have_text(re.compile(r"^\d+ s · about \d+ minutes to go$"))
            await expect(shown.at("detail")).to_have_text(KEY)
            loading = await shown.state()
            await load_ends(studio, 2)
            await shown.reaches("Done")
            state, heard, told = await shown.state(), await shown.heard(), await shown.told()
            figures = await shown.at("figures").inner_text()

            assert shown.tab.errors == []
        done = model(running, KEY)["loads"]

    assert loading["isModelLoading"] is True
    # That the last one took a thousand seconds is all that is known.
    assert loading["progress"]["estimatedTime"] == pytest.approx(1_000_000, rel=0.01)
    assert (state["status"], state["error"], state["isStreaming"]) == ("done", None, False)
    assert state["metadata"]["promptTitle"] == "Teste Simples"
    assert state["metadata"]["lmStudioModelId"] == KEY
    assert state["progress"]["chunks"] == state["metadata"]["totalChunks"] == 12
    assert state["progress"]["outputLength"] == len(state["content"])
    assert [kind for kind, _ in told if kind != "model_loading"] == ["start", *["chunk"] * 12, "done"]
    assert "".join(text for kind, text in told if kind == "chunk") == state["content"]
    # All of the answer may come with one frame; then nobody hears that it is on its way.
    first, second, *others, last = heard
    assert (first, [said for said in others if said != "Answering…"]) == ("Waiting for the answer…", [])
    assert re.fullmatch(r"Loading model…, about \d+ minutes to go", second), heard
    assert re.fullmatch(rf"Done: 12 chunks, {len(state['content'])} characters, \d+(\.\d+)? s", last)
    assert re.sub(r"[\d.]+", "N", figures).split("\n") == [
        *("First token", "N s", "Chunks", "N", "Chunks per second", "N", "Characters", "N", "Time", "N s")
    ]
    assert done == 2


async def test_between_two_events_the_bar_goes_on_and_a_late_one_does_not_turn_it_back(
    browser: Browser,
) -> None:
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def script(answer: Answer) -> None:
        await answer.start()
        while True:
            await answer.say(**await events.get())

    async with site() as serving, element(browser, serving.url, PROMPT, clock=0) as shown:
        serving.script = script
        page, comes = shown.page, 0

        async def passes(milliseconds: int) -> float:
            """Where the bar stands then; below 0: it says only that something goes on."""
            await page.clock.run_for(milliseconds)
            return round(float(await shown.at("bar").evaluate("(bar) => bar.position")), 2)

        async def tells(**event: Any) -> None:
            nonlocal comes
            comes += 1
            events.put_nowait(event)
            await eventually(page, f"window.told.length === {comes + 1}")

        await shown.button("Run").click()
        await eventually(page, "window.told.length === 1")
        await tells(type="model_loading", message=f"Loading {KEY}", elapsed=1000, estimatedTime=4000)
        bar = [await passes(100) for _ in range(11)]
        clock = await shown.at("clock").inner_text()
        await tells(type="model_loading", message=f"Loading {KEY}", elapsed=1500, estimatedTime=4000)
        late = await passes(20)
        await tells(type="model_loading", message=f"Loading {KEY}", elapsed=0, estimatedTime=4000)
        anew = await passes(100)
        over = await passes(4000)
        any_moment = await shown.at("clock").inner_text()
        await passes(2000)
        longer = await shown.at("clock").inner_text()
        await tells(type="chunk", content="Hel", chunkNumber=1)
        await passes(100)
        await shown.reaches("Answering…")
        heard = await shown.heard()

        assert shown.tab.errors == []

    assert bar == sorted(set(bar))
    assert bar[-1] == pytest.approx(0.525, abs=0.03)
    assert clock == "2 s · about 2 seconds to go"
    assert late >= bar[-1]
    assert anew == pytest.approx(0.025, abs=0.03)
    assert over == -1
    assert (any_moment, longer) == ("4 s · any moment now", "6 s · longer than usual")
    assert heard == [
        "Waiting for the answer…",
        "Loading model…, about 3 seconds to go",
        "Loading model…, longer than usual",
        "Answering…",
    ]


async def test_a_load_that_takes_longer_says_so_and_shows_no_full_bar(browser: Browser) -> None:
    async def late(answer: Answer) -> None:
        await answer.start()
        for second in range(2):
            await answer.say(
                type="model_loading",
                message=f"Waiting for {KEY} (cold)",
                elapsed=2800 + second,
                estimatedTime=1000,
            )
        await asyncio.Event().wait()

    async with site() as serving, element(browser, serving.url, PROMPT) as shown:
        serving.script = late
        await shown.button("Run").click()
        await expect(shown.at("clock")).to_have_text(re.compile(r"^\d+ s · longer than usual$"))

        assert await shown.at("bar").evaluate("(bar) => bar.position") == -1
        await expect(shown.at("detail")).to_have_text(f"Waiting for {KEY} (cold)")
        assert (await shown.heard())[-1] == "Loading model…, longer than usual"
        assert shown.tab.errors == []


async def test_a_load_that_nobody_can_estimate_counts_its_seconds(browser: Browser) -> None:
    async def unknown(answer: Answer) -> None:
        await answer.start()
        await answer.say(type="model_loading", message=f"Loading {KEY}", elapsed=61_000, estimatedTime=None)
        await asyncio.Event().wait()

    async with site() as serving, element(browser, serving.url, PROMPT) as shown:
        serving.script = unknown
        await shown.button("Run").click()
        await expect(shown.at("clock")).to_have_text(re.compile(r"^(6[1-9]|[7-9]\d|\d{3}) s$"))

        assert (await shown.heard())[-1] == "Loading model…"
        assert (await shown.state())["progress"]["fraction"] is None


async def test_an_answer_that_breaks_is_kept_and_asked_anew(browser: Browser) -> None:
    async with front(answer_tokens=5) as (running, studio):
        studio.set_faults(stream_breaks="error", stream_breaks_after=3)
        async with element(browser, running.admin_url, PROMPT) as shown:
            await shown.button("Run").click()
            await shown.reaches("Failed")
            state, told = await shown.state(), await shown.told()
            await expect(shown.at("message")).to_have_text(state["error"])
            await expect(shown.at("advice")).to_have_text("Retry asks anew.")
            await expect(shown.at("answer")).to_have_text(state["content"])
            assert (await shown.heard())[-1] == f"Failed: {state['error']} Retry asks anew."

            studio.set_faults(stream_breaks="no")
            await shown.button("Retry").click()
            await shown.reaches("Done")
            after = await shown.state()

            assert shown.tab.errors == []

    assert (state["progress"]["chunks"], state["isStreaming"], bool(state["error"])) == (3, False, True)
    assert [kind for kind, _ in told] == ["start", "chunk", "chunk", "chunk", "error"]
    assert (after["progress"]["chunks"], after["error"]) == (5, None)


async def test_a_mistake_in_the_form_is_marked_where_it_is(browser: Browser) -> None:
    async def refuse(answer: Answer) -> web.StreamResponse:
        error = {"message": "variables.topic: is missing", "code": "missing", "field": "variables.topic"}
        return web.json_response(
            {"success": False, "error": error}, status=400, headers={"Retry-After": "90"}
        )

    async with site() as serving, element(browser, serving.url, PROMPT) as shown:
        serving.script = refuse
        await shown.button("Run").click()
        await shown.reaches("Failed")

        await expect(shown.at("message")).to_have_text("variables.topic: is missing")
        await expect(shown.at("advice")).to_have_text("Retry in 90 seconds.")
        await expect(shown.host.get_by_label("topic")).to_have_attribute("aria-invalid", "true")


async def test_a_cancelled_answer_stops_the_model(browser: Browser) -> None:
    async with front(answer_tokens=5000, token_seconds=0.05) as (running, studio):
        async with element(browser, running.admin_url, PROMPT) as shown:
            for cancel in (shown.button("Cancel").click, lambda: shown.page.keyboard.press("Escape")):
                before = gone(studio)
                await shown.button("Run").click()
                await expect(shown.at("answer")).not_to_be_empty()
                await cancel()
                await shown.reaches("Cancelled")
                state = await shown.state()
                await until(lambda before=before: gone(studio) == before + 1, "LM Studio is told")
                # Nothing of it comes any more.
                await frames(shown.page)

                assert await shown.state() == state
                assert (state["status"], state["error"], state["isStreaming"]) == ("cancelled", None, False)
                assert state["content"] != ""
                await expect(shown.button("Run")).to_be_focused()
                assert (await shown.heard())[-1] == "Cancelled"
            assert shown.tab.errors == []
        await until(lambda: model(running, KEY)["in_flight"] == 0)


def gone(studio: Studio) -> int:
    return sum(event["kind"] == "client.gone" for event in studio.log(0))


async def test_an_element_taken_off_the_page_cancels_and_one_that_moves_does_not(browser: Browser) -> None:
    async def endless(answer: Answer) -> None:
        await answer.start()
        while True:
            await answer.say(type="chunk", content="a", chunkNumber=1)
            await asyncio.sleep(0.02)

    async with site() as serving, element(browser, serving.url, PROMPT) as shown:
        serving.script = endless
        await shown.button("Run").click()
        await expect(shown.at("answer")).not_to_be_empty()
        await shown.host.evaluate(
            "(it) => { window.it = it; document.body.append(document.createElement('main')); "
            "document.querySelector('main').append(it); }"
        )
        length = len((await shown.state())["content"])
        await eventually(shown.page, f"window.it.state.content.length > {length}")
        assert serving.left == 0

        await shown.page.evaluate("window.it.remove()")
        await until(lambda: serving.left == 1, "the request has ended")
        assert await shown.page.evaluate("window.it.state.status") == "cancelled"
        assert shown.tab.errors == []


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGTERM])
async def test_a_daemon_that_restarts_is_an_error_and_the_retry_works(
    browser: Browser, tmp_path: Path, ended_by: signal.Signals
) -> None:
    upstream = await asyncio.to_thread(SimulatorProcess, tmp_path, f"{KEY}:0.05")
    with ending(upstream), reserved(2) as ports:
        upstream.faults(answer_tokens=5000, token_seconds=0.05)
        text = settings(upstream.url, KEY, server='drain_timeout = "100ms"') + PROMPTS
        text = at_ports(text, ports)
        first = await asyncio.to_thread(DaemonProcess, tmp_path, text)
        with ending(first):
            await asyncio.to_thread(first.reaches, KEY, "warm")
            async with element(browser, first.url, PROMPT) as shown:
                await shown.button("Run").click()
                await expect(shown.at("answer")).not_to_be_empty()
                first.signal(ended_by)
                await shown.reaches("Failed")
                state = await shown.state()
                code = await shown.host.evaluate("(element) => element.state.failure.code")
                # The address of the page may be there a little longer.
                await shown.button("Retry").click()
                await expect(shown.button("Retry")).to_be_visible()
                between = (await shown.state())["error"]
                await asyncio.to_thread(first.ended)
                await shown.button("Retry").click()
                await expect(shown.at("message")).to_have_text(
                    "There is no answer from the server. Is keepalive running?"
                )
                upstream.faults(answer_tokens=5)
                second = await asyncio.to_thread(DaemonProcess, tmp_path, text, "second")
                with ending(second):
                    await shown.button("Retry").click()
                    await shown.reaches("Done")
                    after = await shown.state()

    # Killed, it says nothing; stopped, it has a last word.
    assert between != "internal server error"
    assert code == ("connection_lost" if ended_by is signal.SIGKILL else "shutting_down")
    assert state["content"] != ""
    assert (after["progress"]["chunks"], after["error"]) == (5, None)


async def test_what_a_server_says_is_text_and_never_markup(browser: Browser) -> None:
    async def evil(answer: Answer) -> web.StreamResponse | None:
        if len(serving.asked) > 2:
            return web.json_response({"error": {"message": EVIL, "code": EVIL, "field": EVIL}}, status=400)
        await answer.say(type="start", promptTitle=EVIL, modelId=EVIL, modelName=EVIL)
        await answer.say(type="model_loading", message=EVIL, elapsed=1, estimatedTime=EVIL)
        await answer.say(type="click", content=EVIL)
        await answer.say(type="reasoning", content=EVIL)
        await answer.say(type="chunk", content=EVIL)
        if len(serving.asked) == 2:
            await answer.say(type="error", message=EVIL, code=EVIL)
        else:
            await answer.done(1, len(EVIL))
        return None

    async with site() as serving:
        serving.script = evil
        serving.prompts = [{"id": EVIL, "title": EVIL, "model": KEY, "variables": [EVIL, "__proto__"]}]
        serving.models = [EVIL]
        async with element(browser, serving.url) as shown:
            await expect(shown.at("choice")).to_contain_text(EVIL)
            await expect(shown.at("variables")).to_contain_text(EVIL)
            for n, label in enumerate(("Done", "Failed", "Failed")):
                await shown.button("Run").click()
                await until(lambda n=n: len(serving.asked) == n + 1)
                await shown.reaches(label)
            await expect(shown.at("message")).to_have_text(EVIL)
            await shown.at("choice").select_option(index=1)
            inside = await shown.host.evaluate("(it) => it.shadowRoot.querySelectorAll('img, script').length")
            clicks = [kind for kind, _ in await shown.told() if kind == "click"]

            assert shown.tab.dialogs == []
            assert [error for error in shown.tab.errors if "400" not in error] == []
    assert inside == 0
    assert clicks == []
    assert serving.asked[0] == {"promptId": EVIL, "variables": {EVIL: "", "__proto__": ""}}


async def test_the_status_page_lets_one_choose_a_prompt_or_a_model_and_stream_it(browser: Browser) -> None:
    async with front(answer_tokens=8) as (running, _studio), opened(browser, running.admin_url) as here:
        shown = Element(here)
        options = shown.at("choice").locator("option")
        await expect(options).to_have_text(["Teste Simples", "Greet", f"{KEY} · warm"])
        await shown.host.get_by_label("topic").fill("SSE")
        await shown.button("Run").click()
        await shown.reaches("Done")
        first = (await shown.state())["metadata"]

        await shown.at("choice").select_option(label="Greet")
        await expect(shown.at("variables")).to_be_hidden()
        await shown.button("Run").click()
        await expect(shown.at("chunks")).to_have_text("3")

        await shown.at("choice").select_option(label=f"{KEY} · warm")
        await shown.host.get_by_label("Prompt", exact=True).fill("Explain {{topic}} to {{ who }}, {{topic}}!")
        await shown.host.get_by_label("who").fill("a nurse")
        request = await shown.host.evaluate("(it) => it.request")
        await shown.button("Run").click()
        await shown.reaches("Done")
        last = (await shown.state())["metadata"]

        assert here.errors == []

    assert (first["promptId"], first["totalChunks"]) == (28, 8)
    # What was typed before is there again.
    assert request["variables"] == {"topic": "SSE", "who": "a nurse"}
    assert (last["promptId"], last["modelId"], last["totalChunks"]) == (None, KEY, 8)


async def test_there_may_be_nothing_to_run(browser: Browser) -> None:
    async with site() as serving:
        serving.prompts = []
        async with element(browser, serving.url) as shown:
            await expect(shown.at("note")).to_have_text("Neither prompts nor models are configured.")
            await expect(shown.button("Run")).to_have_attribute("aria-disabled", "true")
            await shown.host.evaluate("(it) => { it.models = [{ key: 'a', state: 'cold' }, 'b', 'a']; }")
            await expect(shown.at("choice").locator("option")).to_have_text(["a", "b"])
            await shown.host.evaluate("(it) => { it.models = null; it.baseUrl = '/nowhere'; }")
            await expect(shown.at("note")).to_have_text("What can be run is not known: HTTP 404 Not Found")


async def test_a_person_with_a_keyboard_runs_cancels_and_asks_again(browser: Browser) -> None:
    async with front(answer_tokens=400) as (running, _):
        html = '<streaming-prompt-executor prompt-id="28"></streaming-prompt-executor>'
        async with element(browser, running.admin_url, html) as shown:
            press = shown.page.keyboard.press
            await expect(shown.host.get_by_label("topic")).to_be_visible()
            await press("Tab")
            await shown.page.keyboard.type("SS")
            await press("Shift+Enter")
            await shown.page.keyboard.type("E")
            assert (await shown.host.evaluate("(it) => it.request"))["variables"] == {"topic": "SS\nE"}
            await press("Enter")
            await expect(shown.at("answer")).not_to_be_empty()
            await press("Escape")
            await shown.reaches("Cancelled")
            await expect(shown.host.get_by_label("topic")).to_be_focused()

            await press("Tab")
            await expect(shown.button("Run")).to_be_focused()
            await press("Space")
            await expect(shown.at("answer")).not_to_be_empty()
            await press("Tab")
            await expect(shown.button("Cancel")).to_be_focused()
            await press("Space")
            await shown.reaches("Cancelled")
            await expect(shown.button("Run")).to_be_focused()

            for name in ("answer", "copy", "retry"):
                await press("Tab")
                await expect(shown.at(name)).to_be_focused()
            await press("Enter")
            await expect(shown.button("Cancel")).to_be_focused()
            await press("Escape")
            await shown.reaches("Cancelled")
            assert shown.tab.errors == []


async def test_an_own_prompt_has_lines_and_is_sent_with_control_and_enter(browser: Browser) -> None:
    async def echo(answer: Answer) -> None:
        await answer.done(0, 0)

    html = (
        f'<streaming-prompt-executor model="{KEY}" max-tokens="7" timeout="900"></streaming-prompt-executor>'
    )
    async with site() as serving, element(browser, serving.url, html) as shown:
        serving.script = echo
        await shown.host.get_by_label("Prompt", exact=True).press("Control+Enter")
        assert serving.asked == []  # there is nothing to ask yet
        await shown.page.keyboard.type("one\ntwo {{n}} {{reportValidity}}")
        await shown.host.evaluate("(it) => { it.variables = { n: 3, reportValidity: true }; }")
        await shown.host.get_by_label("reportValidity").fill("no")
        await shown.host.get_by_label("Prompt", exact=True).press("Control+Enter")
        await shown.reaches("Done")

    assert serving.asked == [
        {
            "prompt": "one\ntwo {{n}} {{reportValidity}}",
            "model": KEY,
            "maxTokens": 7,
            "timeout": 900,
            "variables": {"n": 3, "reportValidity": "no"},
        }
    ]


async def test_what_a_screen_reader_finds(browser: Browser) -> None:
    async def short(answer: Answer) -> None:
        await answer.start()
        await answer.say(type="reasoning", content="hm")
        await answer.say(type="chunk", content="A <b>short</b> answer.", chunkNumber=1)
        await answer.done(1, 22)

    async with site() as serving, element(browser, serving.url, PROMPT) as shown:
        serving.script = short
        await expect(shown.at("title")).to_have_text("Teste")
        before = await shown.page.locator("body").aria_snapshot()
        await shown.button("Run").click()
        await shown.reaches("Done")
        after = await shown.page.locator("body").aria_snapshot()
        heard = await shown.heard()

    assert before.splitlines() == [
        "- paragraph: Teste",
        "- text: topic",
        '- textbox "topic": SSE',
        '- button "Run"',
        "- status",
    ]
    assert [re.sub(r"[\d.]+ s", "N s", line) for line in after.splitlines()[4:]] == [
        "- text: Done medicine-llm",
        "- group: Reasoning",
        '- region "Answer": A <b>short</b> answer.',
        "- term: First token",
        "- definition: N s",
        "- term: Chunks",
        '- definition: "1"',
        "- term: Chunks per second",
        "- definition: –",
        "- term: Characters",
        '- definition: "22"',
        "- term: Time",
        "- definition: N s",
        '- button "Copy"',
        '- button "Retry"',
        '- status: "Done: 1 chunk, 22 characters, N s"',
    ]
    assert heard[-1] == "Done: 1 chunk, 22 characters, 2.1 s"
    assert not any("short" in said for said in heard)


async def test_the_answer_is_copied_with_and_without_a_clipboard(browser: Browser) -> None:
    async def short(answer: Answer) -> None:
        await answer.say(type="chunk", content="line 1\n  line 2 😀", chunkNumber=1)
        await answer.done(1, 17)

    permissions = ["clipboard-read", "clipboard-write"]
    async with site() as serving, element(browser, serving.url, PROMPT, permissions=permissions) as shown:
        serving.script = short
        await shown.button("Run").click()
        await shown.reaches("Done")
        read = "navigator.clipboard.readText()"
        await shown.button("Copy").click()
        await expect(shown.button("Copied")).to_be_visible()
        first = await shown.page.evaluate(read)
        assert (await shown.heard())[-1] == "Copied"
        await expect(shown.button("Copy")).to_be_visible()

        await shown.page.evaluate("navigator.clipboard.writeText('')")
        await shown.page.evaluate("navigator.clipboard.writeText = undefined")
        await shown.button("Copy").click()
        await expect(shown.button("Copied")).to_be_focused()
        second = await shown.page.evaluate(read)

        assert shown.tab.errors == []
    assert (first, second) == ("line 1\n  line 2 😀", "line 1\n  line 2 😀")


LINES = "".join(f"{n} {'lorem ipsum dolor sit amet ' * (n % 7)}\n" for n in range(2000))


async def test_a_long_answer_is_whole_and_follows_its_end_only_while_the_reader_does(
    browser: Browser,
) -> None:
    more = asyncio.Event()
    pieces = [LINES[at : at + 100] for at in range(0, len(LINES), 100)]

    async def long(answer: Answer) -> None:
        await answer.start()
        for n, piece in enumerate(pieces):
            if n == len(pieces) // 2:
                await more.wait()
            await answer.say(type="chunk", content=piece, chunkNumber=n + 1)
        await answer.done(len(pieces), len(LINES))

    async with site() as serving, element(browser, serving.url, PROMPT) as shown:
        serving.script = long
        answer = shown.at("answer")
        below = "(it) => it.scrollHeight - it.scrollTop - it.clientHeight"
        await shown.button("Run").click()
        half = sum(map(len, pieces[: len(pieces) // 2]))
        await eventually(
            shown.page, f"document.querySelector('streaming-prompt-executor').state.content.length === {half}"
        )
        assert await answer.evaluate(below) < 2
        await answer.evaluate("(it) => { it.scrollTop = 300; }")
        await frames(shown.page)  # it has heard of that
        more.set()
        await shown.reaches("Done")

        assert await answer.evaluate("(it) => it.scrollTop") == 300
        assert await answer.evaluate("(it) => it.textContent") == LINES
        selected = """(it) => { getSelection().selectAllChildren(it); return getSelection().toString(); }"""
        assert (await answer.evaluate(selected)).strip() == LINES.strip()
        assert shown.tab.errors == []


async def test_it_fits_a_phone_and_follows_the_colours_of_its_page(browser: Browser) -> None:
    async def short(answer: Answer) -> None:
        await answer.start("a-very-long-model-name/" * 6)
        await answer.say(type="chunk", content="word" * 200, chunkNumber=1)
        await answer.done(1, 800)

    seen = []
    for scheme in ("light", "dark"):
        options = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme}
        async with site() as serving, element(browser, serving.url, PROMPT, **options) as shown:
            serving.script = short
            await shown.button("Run").click()
            await shown.reaches("Done")
            assert await shown.page.evaluate("document.documentElement.scrollWidth") == 360
            seen.append(await shown.host.evaluate("(it) => getComputedStyle(it).color"))

    assert seen == ["rgb(28, 32, 36)", "rgb(230, 232, 234)"]


async def test_a_page_gives_it_colours_whatever_it_calls_them_itself(browser: Browser) -> None:
    async with site() as serving, element(browser, serving.url, PROMPT) as shown:
        await shown.host.evaluate("""(it) => {
          it.style.setProperty("--line", "rgb(1, 2, 3)");
          it.style.setProperty("--keepalive-line", "var(--line)");
        }""")
        colour = await shown.host.get_by_label("topic").evaluate("(it) => getComputedStyle(it).borderColor")

    assert colour == "rgb(1, 2, 3)"


# --- the hook ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def app(
    browser: Browser, application: bytes, serving: Site, query: str, **options: Any
) -> AsyncIterator[Tab]:
    """The React application on the origin of `serving`."""
    serving.pages["/app.js"] = ("text/javascript", application)
    script = '<script type="module" src="/app.js"></script>'
    serving.pages["/app"] = ("text/html", DOCUMENT.format(script).encode())
    async with opened(browser, f"{serving.url}/app?{query}", **options) as here:
        if "ask" not in query:
            await eventually(here.page, "window.bench.commits > 0")
        yield here
        assert here.dialogs == []


STATE = "window.bench.state"
ASKED = {"promptId": 28, "variables": {"topic": "SSE"}}


async def execute(page: Page, request: Any = ASKED) -> None:
    await page.evaluate("(request) => { window.bench.execute(request); }", request)


async def becomes(page: Page, status: str) -> Any:
    await eventually(page, f"window.bench.state.status === '{status}'")
    return await page.evaluate(STATE)


async def test_the_hook_tells_of_a_cold_start_across_origins(browser: Browser, application: bytes) -> None:
    async with (
        site(FOREIGN) as serving,
        front(serving.url, answer_tokens=6) as (running, studio),
        app(browser, application, serving, f"base={running.url}") as here,
    ):
        idle = await here.page.evaluate(STATE)
        await evicted(running, studio)
        await execute(here.page)
        waiting = await here.page.evaluate(STATE)
        loading = await becomes(here.page, "loading")
        more = f"window.bench.state.progress.elapsed > {loading['progress']['elapsed']}"
        await eventually(here.page, more)
        later = await here.page.evaluate(STATE)
        await load_ends(studio, 2)
        done = await becomes(here.page, "done")
        functions = await here.page.evaluate("window.bench.functions.size")

        assert here.errors == []

    assert (idle["status"], idle["content"], idle["isStreaming"], idle["metadata"]) == (
        "idle",
        "",
        False,
        None,
    )
    assert (waiting["isStreaming"], waiting["content"]) == (True, "")
    assert (loading["isStreaming"], loading["isModelLoading"], loading["error"]) == (True, True, None)
    assert loading["progress"]["message"] == f"Loading {KEY}"
    assert 0 <= loading["progress"]["fraction"] < later["progress"]["fraction"] < 1
    assert (done["isStreaming"], done["isModelLoading"], done["error"]) == (False, False, None)
    assert done["metadata"] == {
        "promptId": 28,
        "promptTitle": "Teste Simples",
        "modelId": KEY,
        "modelName": KEY,
        "lmStudioModelId": KEY,
        "totalChunks": 6,
        "duration": done["progress"]["duration"],
        "outputLength": len(done["content"]),
    }
    assert done["progress"]["chunks"] == 6
    assert done["progress"]["outputLength"] == len(done["content"])
    assert functions == 3


async def test_the_hook_tells_of_an_answer_that_breaks_and_works_again(
    browser: Browser, application: bytes
) -> None:
    async with site(FOREIGN) as serving, front(serving.url, answer_tokens=5) as (running, studio):
        studio.set_faults(stream_breaks="error", stream_breaks_after=2)
        async with app(browser, application, serving, f"base={running.url}") as here:
            await execute(here.page)
            failed = await becomes(here.page, "failed")
            code = await here.page.evaluate(f"{STATE}.failure.code")
            studio.set_faults(stream_breaks="no")
            await execute(here.page)
            done = await becomes(here.page, "done")
            await here.page.evaluate("window.bench.reset()")
            idle = await becomes(here.page, "idle")

            await execute(here.page, {"promptId": 29})
            refused = await becomes(here.page, "failed")

    assert (failed["progress"]["chunks"], failed["isStreaming"], bool(failed["error"])) == (2, False, True)
    assert code
    assert (done["error"], done["failure"], done["progress"]["chunks"]) == (None, None, 5)
    assert idle["content"] == ""
    assert "29 is no prompt here" in refused["error"]


async def test_the_hook_cancels_and_is_cancelled_by_the_next_one_and_by_its_end(
    browser: Browser, application: bytes
) -> None:
    slow = {"answer_tokens": 5000, "token_seconds": 0.05}
    async with site(FOREIGN) as serving, front(serving.url, **slow) as (running, studio):
        async with app(browser, application, serving, f"base={running.url}") as here:
            await execute(here.page)
            await eventually(here.page, f"{STATE}.progress.chunks > 2")
            await here.page.evaluate("window.bench.cancel()")
            cancelled = await becomes(here.page, "cancelled")
            await until(lambda: gone(studio) == 1, "LM Studio is told")
            assert await here.page.evaluate(STATE) == cancelled

            first = await here.page.evaluate_handle(
                f"({{ over: window.bench.execute({json.dumps(ASKED)}) }})"
            )
            await eventually(here.page, f"{STATE}.progress.chunks > 2")
            await execute(here.page, {"promptId": "greet"})
            done = await becomes(here.page, "done")
            ended = await first.evaluate("({ over }) => over")
            await until(lambda: gone(studio) == 2, "LM Studio is told")

            await execute(here.page)
            await eventually(here.page, f"{STATE}.status === 'answering'")
            await here.page.evaluate("window.bench.show(false)")
            await until(lambda: gone(studio) == 3, "LM Studio is told")

            assert here.errors == []
        await until(lambda: model(running, KEY)["in_flight"] == 0)

    assert (cancelled["isStreaming"], cancelled["error"]) == (False, None)
    assert (ended["status"], ended["isStreaming"]) == ("cancelled", False)
    assert (done["metadata"]["promptTitle"], done["progress"]["chunks"]) == ("Greet", 3)


async def test_mounted_twice_by_strict_mode_the_hook_leaves_one_answer(
    browser: Browser, application: bytes
) -> None:
    alone = asyncio.Event()

    async def short(answer: Answer) -> None:
        await answer.start()
        await alone.wait()
        await answer.say(type="chunk", content="once", chunkNumber=1)
        await answer.done(1, 4)

    async with site() as serving:
        serving.script = short
        async with app(browser, application, serving, "at-once=%7B%22promptId%22:28%7D") as here:
            await eventually(here.page, f"{STATE}.metadata !== null")
            await until(lambda: len(serving.asked) - serving.left == 1, "there is one answer")
            alone.set()
            done = await becomes(here.page, "done")

            assert here.errors == []
    assert done["content"] == "once"
    assert len(serving.asked) - serving.left == 1


async def test_two_thousand_chunks_between_two_frames_are_one_render(
    browser: Browser, application: bytes
) -> None:
    text = [f"{n} " for n in range(2000)]
    drawn = asyncio.Event()

    async def quick(answer: Answer) -> None:
        await answer.start()
        for n, piece in enumerate(text):
            await answer.say(type="chunk", content=piece, chunkNumber=n + 1)
        await drawn.wait()
        await answer.done(2000, len("".join(text)))

    async with site() as serving:
        serving.script = quick
        # Where no time passes, there is no frame.
        async with app(browser, application, serving, "", clock=0) as here:
            commits = await here.page.evaluate("window.bench.commits")
            await execute(here.page)
            await eventually(here.page, "window.bench.events === 2001")
            begun = await here.page.evaluate("[window.bench.commits, window.bench.state.content]")
            await here.page.clock.run_for(20)
            await eventually(here.page, f"{STATE}.progress.chunks === 2000")
            answering = await here.page.evaluate("[window.bench.commits, window.bench.state.content]")
            drawn.set()
            await becomes(here.page, "done")
            last = await here.page.evaluate("[window.bench.commits, window.bench.state.content]")

    assert begun == [commits + 1, ""]
    assert answering == [commits + 2, "".join(text)]
    assert last == [commits + 3, "".join(text)]


async def test_a_daemon_that_restarts_under_the_hook(
    browser: Browser, application: bytes, tmp_path: Path
) -> None:
    async with site(FOREIGN) as serving:
        upstream = await asyncio.to_thread(SimulatorProcess, tmp_path, f"{KEY}:0.05")
        with ending(upstream), reserved(2) as ports:
            upstream.faults(answer_tokens=5000, token_seconds=0.05)
            server = f'allowed_origins = ["{serving.url}"]'
            text = at_ports(settings(upstream.url, KEY, server=server) + PROMPTS, ports)
            first = await asyncio.to_thread(DaemonProcess, tmp_path, text)
            with ending(first):
                await asyncio.to_thread(first.reaches, KEY, "warm")
                async with app(browser, application, serving, f"base=http://127.0.0.1:{ports[0]}") as here:
                    await execute(here.page)
                    await eventually(here.page, f"{STATE}.progress.chunks > 2")
                    first.kill()
                    failed = await becomes(here.page, "failed")
                    upstream.faults(answer_tokens=5)
                    second = await asyncio.to_thread(DaemonProcess, tmp_path, text, "second")
                    with ending(second):
                        await execute(here.page)
                        done = await becomes(here.page, "done")

    assert failed["error"] == LOST
    assert failed["content"] != ""
    assert (done["progress"]["chunks"], done["error"]) == (5, None)


# --- the document -----------------------------------------------------------------------------------


async def test_the_component_of_the_document_asks_and_cancels(browser: Browser, application: bytes) -> None:
    async with (
        site(FOREIGN) as serving,
        front(serving.url, answer_tokens=400) as (running, _),
        app(browser, application, serving, f"ask&base={running.url}") as here,
    ):
        await here.page.get_by_role("button", name="Ask").click()
        await expect(here.page.locator("pre")).not_to_be_empty()
        await here.page.get_by_role("button", name="Cancel").click()
        await expect(here.page.get_by_role("button", name="Cancel")).to_be_hidden()

        assert here.errors == []


async def test_the_other_examples_of_the_document_run(browser: Browser) -> None:
    (html,) = snippets("html")
    listening, iterating = (js for js in snippets("js") if not js.startswith("//"))
    async with site(FOREIGN) as serving, front(serving.url, answer_tokens=4) as (running, _):
        html, iterating = (text.replace("http://127.0.0.1:1235", running.url) for text in (html, iterating))
        html += '<script type="module" src="/listen.js"></script>'
        serving.pages["/doc"] = ("text/html", DOCUMENT.format(html).encode())
        serving.pages["/listen.js"] = ("text/javascript", listening.encode())
        serving.pages["/ask.js"] = ("text/javascript", iterating.encode())
        async with tab(browser) as here:
            said: list[str] = []
            here.page.on("console", lambda message: said.append(message.text))
            await here.page.goto(f"{serving.url}/doc")
            shown = Element(here)
            await expect(shown.host.get_by_label("topic")).to_have_value("SSE")
            await expect(shown.at("title")).to_have_text("Teste Simples")
            await shown.button("Run").click()
            await shown.reaches("Done")
            content = (await shown.state())["content"]
            answer = await here.page.evaluate("import('/ask.js').then(({ ask }) => ask('SSE'))")

            assert here.errors == []
    assert content
    assert content in said
    assert answer == content


async def test_the_document_names_what_there_is(plain: Page) -> None:
    text = (PROJECT / "docs" / "browser.md").read_text()
    state = await run(
        plain,
        """
        const { PromptRun } = await import("/keepalive.js");
        const state = new PromptRun().getSnapshot();
        return [Object.keys(state), Object.keys(state.progress)];
        """,
    )
    tokens = set(re.findall(r"--keepalive(-[a-z-]+)", MODULE.read_text()))

    assert [name for name in [*state[0], *state[1]] if f"`{name}`" not in text] == []
    assert [name for name in tokens if f"`{name}`" not in text and f"`--keepalive{name}`" not in text] == []
