"""The admin address over real sockets: what it shows, whom it refuses, and what it never says."""

import asyncio
import base64
import copy
import gzip
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from keepalive.admin.server import Access, Admin, is_known_host, server
from keepalive.core.facts import ListingStarted, ModelId
from keepalive.core.records import Upstream
from keepalive.observers import feed, logs
from keepalive.observers.feed import Feed
from tests.kit.live import PATIENCE, ask, asked, raw, until

CANARY = "sk-canary-4711"

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "keepalive",
}


def model(key: str, state: str = "warm", *, upstream: str = "local", wanted: bool = True) -> dict[str, Any]:
    return {
        "key": key,
        "upstream": upstream,
        "state": state,
        "wanted": wanted,
        "reason": None,
        "load": None,
    }


class Shown:
    """What the address is handed: a status that the test writes, and a note of what was asked for."""

    def __init__(self, *models: dict[str, Any]) -> None:
        self.document: dict[str, Any] = {"version": "1.0.0", "models": list(models)}
        self.asked: list[tuple[str, ModelId]] = []
        self.trouble: str | None = None
        self.stories: dict[ModelId, dict[str, Any]] = {}
        self.url = ""
        self.rendered = 0
        self.feed = Feed(self.status)

    def status(self) -> Mapping[str, Any]:
        self.rendered += 1
        return copy.deepcopy(self.document)

    def find(self, name: str) -> list[ModelId]:
        name = "acme/gemma" if name == "an-alias" else name
        models = self.document["models"]
        return [ModelId(m["upstream"], m["key"]) for m in models if m["key"].lower() == name.lower()]

    async def meant(self, name: str) -> list[ModelId]:
        return self.find(name)

    def offered(self) -> list[str]:
        return [m["key"] for m in self.document["models"]]

    def states(self) -> list[dict[str, Any]]:
        return copy.deepcopy(self.document["models"])

    @property
    def stopping(self) -> bool:
        return bool(self.document.get("draining"))

    def metrics(self, accept: str) -> tuple[bytes, str]:
        return f"# accept {accept}\n".encode(), "text/plain; version=0.0.4; charset=utf-8"

    def requests(self) -> Mapping[str, Any]:
        return {"requests": [], "unnamed": []}

    def alive(self) -> str | None:
        return self.trouble

    def history(self) -> Mapping[str, Any]:
        return {"kept": False, "reason": "it is kept in memory only"}

    def story(self, model: ModelId) -> Mapping[str, Any] | None:
        return self.stories.get(model)

    def warm(self, model: ModelId) -> None:
        self.asked.append(("warm", model))

    def release(self, model: ModelId) -> None:
        self.asked.append(("release", model))

    @property
    def id(self) -> str:
        return str(self.feed.look()["id"])

    def change(self) -> None:
        before = Upstream("local")
        self.feed.observe(ListingStarted(0.0, "local"), before, before)


@asynccontextmanager
async def listening(*models: dict[str, Any], access: Access | None = None) -> AsyncIterator[Shown]:
    shown = Shown(*models)
    runner = server(Admin(shown, shown.feed, access or Access()))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    shown.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    feeding = asyncio.create_task(shown.feed.run())
    try:
        yield shown
    finally:
        feeding.cancel()
        await runner.cleanup()


class Watcher:
    """One that watches `/api/events`, over a plain socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def of(cls, shown: Shown, query: str = "", header: str = "") -> "Watcher":
        place = urlsplit(shown.url)
        watcher = cls(*await asyncio.open_connection(place.hostname, place.port))
        head = f"GET /api/events{query} HTTP/1.1\r\nHost: localhost\r\n{header}\r\n"
        watcher.writer.write(head.encode())
        return watcher

    async def line(self) -> str:
        """The next line of an event stream: heads and chunk sizes are passed over."""
        async with asyncio.timeout(PATIENCE):
            while not (line := await self.reader.readline()).startswith((b"data:", b":")):
                assert line, "closed"
        return line.decode().strip()

    def leave(self) -> None:
        self.writer.transport.abort()


def error_of(answer: bytes) -> str:
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["error"])


# --- what it shows ----------------------------------------------------------------------------------


async def test_the_status_is_served_as_json() -> None:
    async with listening(model("medicine-llm")) as shown:
        status, headers, text = await asked(f"{shown.url}/api/status")

    assert status == 200
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert json.loads(text) == {**shown.document, "id": shown.id}


async def test_metrics_are_those_that_the_scraper_accepts() -> None:
    async with listening() as shown:
        status, headers, text = await asked(f"{shown.url}/metrics", Accept="application/openmetrics-text")

    assert (status, text) == (200, "# accept application/openmetrics-text\n")
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"


async def test_liveness_says_why_not_and_never_looks_at_models() -> None:
    async with listening(model("a", "backoff")) as shown:
        alive = await asked(f"{shown.url}/livez")
        shown.trouble = "the scheduler has not run for 12 s"
        dead = await asked(f"{shown.url}/livez")

    assert (alive[0], json.loads(alive[2])) == (200, {"alive": True, "reason": None})
    assert dead[0] == 503
    assert json.loads(dead[2]) == {"alive": False, "reason": "the scheduler has not run for 12 s"}


@pytest.mark.parametrize(
    ("query", "status", "not_ready"),
    [
        ("", 503, ["b"]),
        ("?model=a", 200, []),
        ("?model=b", 503, ["b"]),
        ("?model=a&model=b", 503, ["b"]),
        ("?model=off", 503, ["off"]),
        ("?model=org%2Fd", 200, []),
        ("?model=ORG/D", 200, []),
        ("?model=both", 200, []),
    ],
)
async def test_readiness_is_that_of_the_wanted_models_or_of_those_that_are_named(
    query: str, status: int, not_ready: list[str]
) -> None:
    models = [model("a"), model("b", "loading"), model("off", "cold", wanted=False), model("org/d")]
    models += [model("both", upstream="x"), model("both", "cold", upstream="y", wanted=False)]
    async with listening(*models) as shown:
        code, _, text = await asked(f"{shown.url}/readyz{query}")

    assert code == status
    assert [m["key"] for m in json.loads(text)["not_ready"]] == not_ready


async def test_readiness_says_which_model_is_not_and_why() -> None:
    load = {"elapsed_seconds": 3.0, "eta_seconds": 9.0, "attempt": 1}
    async with listening({**model("b", "loading"), "reason": "slow disk", "load": load}) as shown:
        _, _, text = await asked(f"{shown.url}/readyz")

    assert json.loads(text) == {
        "ready": False,
        "not_ready": [
            {"key": "b", "upstream": "local", "state": "loading", "reason": "slow disk", "load": load}
        ],
        "reason": None,
    }


async def test_readiness_of_a_daemon_that_is_ready_renders_nothing() -> None:
    async with listening(model("a"), model("off", "cold", wanted=False)) as shown:
        status, _, _ = await asked(f"{shown.url}/readyz")

    assert (status, shown.rendered) == (200, 0)


async def test_readiness_of_a_model_that_nobody_keeps_is_not_found() -> None:
    async with listening(model("a")) as shown:
        status, _, text = await asked(f"{shown.url}/readyz?model=a&model=nope&model=")

    assert (status, json.loads(text)) == (404, {"error": "no such model here: nope, "})


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("", ["a", "b", "b2", "c/d"]),
        ("?model=b", ["b", "b2"]),
        ("?model=c%2Fd&model=A", ["c/d", "a"]),
        ("?model=a&model=a", ["a"]),
    ],
)
async def test_the_history_of_all_models_is_told_or_of_those_that_are_asked_for(
    query: str, told: list[str]
) -> None:
    models = model("a"), model("b"), model("b", upstream="far"), model("c/d"), model("gone since")
    async with listening(*models) as shown:
        shown.stories = {
            ModelId("local", "a"): {"name": "a"},
            ModelId("local", "b"): {"name": "b"},
            ModelId("far", "b"): {"name": "b2"},
            ModelId("local", "c/d"): {"name": "c/d"},
        }
        status, headers, text = await asked(f"{shown.url}/api/history{query}")

    assert (status, headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    assert json.loads(text) == {
        "kept": False,
        "reason": "it is kept in memory only",
        "models": [{"name": name} for name in told],
    }


async def test_the_history_of_a_model_that_nobody_keeps_is_not_found() -> None:
    async with listening(model("a")) as shown:
        status, _, text = await asked(f"{shown.url}/api/history?model=a&model=nope")

    assert (status, json.loads(text)) == (404, {"error": "no such model here: nope"})


async def test_a_daemon_that_stops_is_not_ready_though_all_is_warm() -> None:
    async with listening(model("a")) as shown:
        shown.document["draining"] = True
        status, _, text = await asked(f"{shown.url}/readyz")

    assert status == 503
    assert json.loads(text) == {"ready": False, "not_ready": [], "reason": "the daemon is stopping"}


async def test_the_page_is_files_that_a_browser_asks_for_again_and_gets_when_they_have_changed() -> None:
    async with listening() as shown:
        for path, content_type in (
            ("/", "text/html; charset=utf-8"),
            ("/page.css", "text/css; charset=utf-8"),
            ("/page/start.js", "text/javascript; charset=utf-8"),
            ("/keepalive.js", "text/javascript; charset=utf-8"),
            ("/favicon.svg", "image/svg+xml"),
        ):
            status, headers, text = await asked(f"{shown.url}{path}")
            again = await asked(f"{shown.url}{path}", **{"If-None-Match": f'"x", {headers["ETag"]}'})
            changed = await asked(f"{shown.url}{path}", **{"If-None-Match": 'W/"0"'})
            head = await asked(f"{shown.url}{path}", "HEAD")

            assert (status, headers["Content-Type"]) == (200, content_type)
            assert headers["Cache-Control"] == "no-cache"
            assert (again[0], again[2], again[1]["ETag"]) == (304, "", headers["ETag"])
            assert (changed[0], changed[2]) == (200, text)
            assert (head[0], head[2], head[1]["Content-Length"]) == (200, "", headers["Content-Length"])


@pytest.mark.parametrize(
    "path",
    [
        *("/index.html", "/page/start.js/", "/page/", "/page", "/assets/page/start.js", "/start.js"),
        *("/__init__.py", "/../page/start.js", "/page/../keepalive.js", "/page//start.js"),
    ],
)
async def test_nothing_but_the_files_is_served(path: str) -> None:
    async with listening() as shown:
        answer = await raw(
            shown.url, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )

    assert answer.startswith(b"HTTP/1.1 404 Not Found\r\n")
    assert error_of(answer) == f"there is no {path} here"


@pytest.mark.parametrize(
    ("accepts", "is_packed"),
    [
        ("gzip", True),
        ("br, GZIP;q=0.5, *;q=0", True),
        ("gzip; q=0", False),
        ("deflate, br", False),
        ("", False),
        ("xgzip", False),
    ],
)
async def test_what_is_large_is_compressed_for_those_who_can_read_it(accepts: str, is_packed: bool) -> None:
    async with listening(*(model(f"model-{number}") for number in range(50))) as shown:
        for number in range(50):
            shown.stories[ModelId("local", f"model-{number}")] = {"key": f"model-{number}"}
        for path in ("/page/start.js", "/api/status", "/api/history"):
            head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: {accepts}\r\nConnection: close\r\n\r\n"
            head_bytes, _, body = (await raw(shown.url, head.encode())).partition(b"\r\n\r\n")
            plain = (await asked(f"{shown.url}{path}"))[2]

            assert (b"Content-Encoding: gzip\r\n" in head_bytes) is is_packed
            assert b"Vary: Accept-Encoding" in head_bytes
            assert (gzip.decompress(body) if is_packed else body).decode() == plain
            assert len(body) == int(head_bytes.lower().partition(b"content-length: ")[2].split()[0])


# --- events -----------------------------------------------------------------------------------------


async def test_whoever_watches_gets_the_status_at_once_and_again_when_it_changes() -> None:
    async with listening(model("a", "cold")) as shown:
        watcher = await Watcher.of(shown)
        first = await watcher.line()
        shown.document = {**shown.document, "models": [model("a")]}
        shown.change()
        second = await watcher.line()
        watcher.leave()

    assert json.loads(first.removeprefix("data: "))["models"][0]["state"] == "cold"
    assert json.loads(second.removeprefix("data: "))["models"][0]["state"] == "warm"


async def test_a_burst_of_changes_is_few_events_and_the_last_of_them_is_the_newest() -> None:
    async with listening() as shown:
        watcher = await Watcher.of(shown)
        await watcher.line()
        pushed = shown.feed.number
        for number in range(1000):
            shown.document["number"] = number
            shown.change()
        seen = [await watcher.line()]
        while json.loads(seen[-1].removeprefix("data: "))["number"] != 999:
            seen.append(await watcher.line())
        watcher.leave()

    assert shown.feed.number - pushed <= 2


async def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "PUSH_HEARTBEAT", 0.02)
    async with listening() as shown:
        watcher = await Watcher.of(shown)
        lines = [await watcher.line() for _ in range(3)]
        watcher.leave()

    assert lines[1:] == [": still here", ": still here"]


async def test_a_head_request_for_events_is_answered_and_watches_nothing() -> None:
    async with listening() as shown:
        answer = await raw(
            shown.url, b"HEAD /api/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )

    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Type: text/event-stream\r\n" in answer
    assert shown.feed.watching == 0


async def test_no_more_than_256_watch_and_a_place_is_free_as_soon_as_one_leaves() -> None:
    async with listening() as shown:
        watchers = [await Watcher.of(shown) for _ in range(256)]
        await until(lambda: shown.feed.watching == 256)
        status, headers, text = await asked(f"{shown.url}/api/events")
        watchers.pop().leave()
        await until(lambda: shown.feed.watching == 255)
        late = await Watcher.of(shown)
        first = await late.line()
        for watcher in [late, *watchers]:
            watcher.leave()
        await until(lambda: shown.feed.watching == 0)

    assert (status, headers["Retry-After"]) == (503, "10")
    assert json.loads(text) == {"error": "256 others watch already"}
    assert first.startswith("data: ")


async def test_whoever_has_read_the_status_is_told_only_what_changed_since() -> None:
    async with listening(model("a"), model("b", "cold")) as shown:
        before = json.loads((await asked(f"{shown.url}/api/status"))[2])["id"]
        # Between reading and watching.
        shown.document["models"][1]["state"] = "loading"
        shown.change()
        watcher = await Watcher.of(shown, f"?after={before}")
        first = [await watcher.line(), await watcher.line()]
        shown.document["models"][0]["state"] = "cold"
        shown.change()
        second = await watcher.line()
        watcher.leave()

    assert first[0] == ": nothing new so far"
    documents = [json.loads(line.removeprefix("data: ")) for line in (first[1], second)]
    assert [document["partial"] for document in documents] == [True, True]
    assert [[(m["key"], m["state"]) for m in document["models"]] for document in documents] == [
        [("b", "loading")],
        [("a", "cold")],
    ]
    assert documents[1]["id"] == shown.id


async def test_a_browser_that_comes_back_says_with_a_header_what_it_has() -> None:
    async with listening(model("a")) as shown:
        known = await Watcher.of(shown, header=f"Last-Event-ID: {shown.id}\r\n")
        unknown = await Watcher.of(shown, header="Last-Event-ID: of-an-earlier-life-7\r\n")
        lines = [await known.line(), await unknown.line()]
        known.leave()
        unknown.leave()

    assert lines[0] == ": nothing new so far"
    assert json.loads(lines[1].removeprefix("data: ")) == {**shown.document, "id": shown.id}


@pytest.mark.parametrize("size", [1_000_000, 8_000_000])
async def test_a_slow_reader_is_let_go_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The larger document does not even fit the buffers as the first event."""
    monkeypatch.setattr("keepalive.admin.server.SLOW_READER", 0.3)
    async with listening() as shown:
        shown.document["padding"] = "x" * size
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            place = urlsplit(shown.url)
            slow.connect((place.hostname, place.port))
            slow.sendall(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            slow.setblocking(False)
            await asyncio.get_running_loop().sock_recv(slow, 1)  # it watches

            def is_let_go() -> bool:
                shown.document["padding"] = "xy"[shown.feed.number % 2] * size
                shown.change()
                return shown.feed.watching == 0

            await until(is_let_go, "it is let go")
            shown.document.pop("padding")
            status, _, _ = await asked(f"{shown.url}/api/status")

    assert status == 200


# --- changes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/api/models/plain/warm", "plain"),
        ("/api/models/org/with/slash/warm", "org/with/slash"),
        ("/api/models/org%2Fwith%2Fslash/warm", "org/with/slash"),
        ("/api/models/100%25%20%3F/warm", "100% ?"),
        ("/api/models/m%C3%BCsli/warm", "müsli"),
        ("/api/models/odd/warm/warm", "odd/warm"),
        ("/api/models/PLAIN/warm", "plain"),
    ],
)
async def test_a_model_is_asked_for_by_its_key_however_that_is_written(path: str, key: str) -> None:
    keys = ("plain", "org/with/slash", "100% ?", "müsli", "odd/warm", "odd")
    async with listening(*(model(k, "cold") for k in keys)) as shown:
        status, _, text = await asked(f"{shown.url}{path}", "POST")

    assert status == 202
    assert shown.asked == [("warm", ModelId("local", key))]
    answer = json.loads(text)
    assert (answer["key"], answer["state"], len(answer["models"])) == (key, "cold", 1)


async def test_a_model_on_two_upstreams_is_released_on_both_or_on_the_one_that_is_named() -> None:
    async with listening(model("a", upstream="x"), model("a", upstream="y")) as shown:
        both = await asked(f"{shown.url}/api/models/a/release", "POST")
        one = await asked(f"{shown.url}/api/models/a/release?upstream=y", "POST")
        none = await asked(f"{shown.url}/api/models/a/release?upstream=z", "POST")

    assert [both[0], one[0], none[0]] == [202, 202, 404]
    assert [model.upstream for _, model in shown.asked] == ["x", "y", "y"]


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("POST", "/api/models/nope/warm", 404, "no such model here: nope; write a"),
        ("POST", "/api/models/nope/release", 404, "no such model here: nope"),
        ("POST", "/api/models/a/heat", 404, "POST to /api/models/KEY/warm or /api/models/KEY/release"),
        ("POST", "/api/models/a", 404, "POST to /api/models/KEY/warm or /api/models/KEY/release"),
        ("POST", "/api/models//warm", 404, "POST to /api/models/KEY/warm or /api/models/KEY/release"),
        ("GET", "/api/models/a/warm", 405, "a change is made with POST"),
        ("HEAD", "/api/models/a/warm", 405, ""),
        ("PUT", "/api/models/a/release", 405, "a change is made with POST"),
        ("POST", "/api/status", 405, "/api/status is read with GET"),
        ("DELETE", "/metrics", 405, "/metrics is read with GET"),
        ("GET", "/nothing", 404, "there is no /nothing here"),
        ("GET", "//metrics", 404, "there is no //metrics here"),
        ("GET", "/api/status/", 404, "there is no /api/status/ here"),
    ],
)
async def test_what_is_not_there_is_said_and_changes_nothing(
    method: str, path: str, status: int, error: str
) -> None:
    async with listening(model("a", "cold")) as shown:
        code, headers, text = await asked(f"{shown.url}{path}", method)

    assert code == status
    assert (json.loads(text)["error"] if text else "") == error
    assert ("Allow" in headers) is (status == 405)
    assert shown.asked == []


# --- who may ask ------------------------------------------------------------------------------------

HOSTS_KNOWN = [
    "127.0.0.1:9235",
    "192.168.1.20",
    "[::1]:9235",
    "[fe80::1]",
    "localhost",
    "LOCALHOST:1",
    "localhost.",
    "app.localhost:80",
    "ops.example.org",
    "OPS.example.org:9235",
]
HOSTS_UNKNOWN = [
    "",
    "evil.example",
    "evil.example:9235",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "ops.example.org.evil.example",
    "2130706433",
    "0x7f.1",
    "[evil]",
    "notlocalhost",
]


@pytest.mark.parametrize("host", HOSTS_KNOWN)
def test_this_machine_is_known_by_its_addresses_localhost_and_its_configured_names(host: str) -> None:
    assert is_known_host(host, ["Ops.Example.org"])


@pytest.mark.parametrize("host", HOSTS_UNKNOWN)
def test_any_other_name_is_unknown(host: str) -> None:
    assert not is_known_host(host, ["Ops.Example.org"])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/status", 403),
        ("GET", "/api/events", 403),
        ("GET", "/api/history", 403),
        ("GET", "/", 403),
        ("GET", "/nothing", 403),
        ("POST", "/api/models/a/warm", 403),
        ("GET", "/metrics", 200),
        ("GET", "/livez", 200),
        ("GET", "/readyz", 200),
    ],
)
async def test_a_rebound_name_neither_reads_nor_writes_but_probes_come_by_any(
    method: str, path: str, status: int
) -> None:
    async with listening(model("a")) as shown:
        code, _, text = await asked(f"{shown.url}{path}", method, Host="evil.example:9235")

    assert code == status
    if status == 403:
        assert json.loads(text) == {
            "error": "'evil.example' is not a name of this daemon; "
            "if it should be, add it to allowed_hosts under [server]"
        }
    assert shown.asked == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "http://localhost:3000"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://{host}", "Sec-Fetch-Site": "cross-site"},
    ],
)
async def test_a_page_from_elsewhere_changes_nothing(headers: dict[str, str]) -> None:
    async with listening(model("a")) as shown:
        sent = {name: value.format(host=urlsplit(shown.url).netloc) for name, value in headers.items()}
        answers = [
            await asked(f"{shown.url}/api/models/a/{verb}", "POST", **sent) for verb in ("warm", "release")
        ]

    assert [status for status, _, _ in answers] == [403, 403]
    assert json.loads(answers[0][2]) == {"error": "a page from elsewhere may not change anything here"}
    assert shown.asked == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://{host}"},
        {"Origin": "http://{host}", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ],
)
async def test_our_own_page_and_programs_may(headers: dict[str, str]) -> None:
    async with listening(model("a")) as shown:
        sent = {name: value.format(host=urlsplit(shown.url).netloc) for name, value in headers.items()}
        status, _, _ = await asked(f"{shown.url}/api/models/a/warm", "POST", **sent)

    assert (status, len(shown.asked)) == (202, 1)


KEYS = Access(keys={"ops": "right-key", "other": "second-key"})


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"Authorization: Bearer wrong\r\n",
        b"Authorization: Bearer right-ke\r\n",
        b"Authorization: Bearer right-keyy\r\n",
        b"Authorization: Bearer\r\n",
        b"Authorization: right-key\r\n",
        b"Authorization: Basic right-key\r\n",
        b"Authorization: Basic %b\r\n" % base64.b64encode(b"right-key"),
        b"Authorization: Basic %b\r\n" % base64.b64encode(b"right-key:"),
        b"Authorization: Basic %b\r\n" % base64.b64encode(b"ops:right-key:more"),
        b"Authorization: Basic %b=\r\n" % base64.b64encode(b"ops:right-key"),
        b"Authorization: Bearer r\xe9ight\r\n",
        "Authorization: Bearer \N{SNOWMAN}\r\n".encode(),
        b"Authorization: Bearer " + b"x" * 60_000 + b"\r\n",
        b"X-Api-Key: right-key\r\n",
    ],
)
async def test_without_a_right_key_nothing_is_shown_and_the_key_is_not_said_back(sent: bytes) -> None:
    async with listening(model("a"), access=KEYS) as shown:
        head = b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + sent + b"\r\n"
        answers = [
            await raw(shown.url, start + head)
            for start in (b"GET /api/status", b"GET /metrics", b"GET /api/events", b"POST /api/models/a/warm")
        ]

    for answer in answers:
        assert answer.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
        assert b"WWW-Authenticate: Bearer\r\n" in answer
        assert b'WWW-Authenticate: Basic realm="keepalive", charset="UTF-8"\r\n' in answer
        assert error_of(answer) == "this address wants a key of [auth]"
    assert shown.asked == []


async def test_any_of_the_keys_opens_and_probes_need_none() -> None:
    async with listening(model("a"), access=KEYS) as shown:
        first = await asked(f"{shown.url}/api/status", Authorization="Bearer right-key")
        second = await asked(f"{shown.url}/metrics", Authorization="bearer  second-key ")
        quoted = await asked(f"{shown.url}/metrics", Authorization='Bearer "second-key"')
        probes = [await asked(f"{shown.url}{path}") for path in ("/livez", "/readyz")]

    assert [first[0], second[0], quoted[0], probes[0][0], probes[1][0]] == [200] * 5


async def test_a_browser_gives_the_key_as_a_password_whatever_the_name() -> None:
    async with listening(model("a"), access=KEYS) as shown:
        answers = [
            await asked(f"{shown.url}/", Authorization=f"Basic {base64.b64encode(login).decode()}")
            for login in (b"ops:right-key", b":second-key", b"ops:wrong-key", b"right-key:ops")
        ]

    assert [status for status, _, _ in answers] == [200, 200, 401, 401]


# --- every answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_line", "more", "status"),
    [
        (b"GET /api/status", b"", 200),
        (b"GET /metrics", b"", 200),
        (b"GET /livez", b"", 200),
        (b"GET /readyz", b"", 200),
        (b"HEAD /api/events", b"", 200),
        (b"POST /api/models/a/warm", b"Content-Length: 0\r\n", 202),
        (b"POST /api/models/a/warm", b"Origin: http://evil.example\r\n", 403),
        (b"HEAD /", b"", 200),
        (b"GET /nothing", b"", 404),
        (b"POST /api/status", b"", 405),
        (b"GET /api/status", b"Content-Length: 1\r\nContent-Length: 2\r\n", 400),
        (b"GET /api/status", b"Bad\x00Name: x\r\n", 400),
        (b"GET http://localhost/api/status", b"", 400),
        (b"OPTIONS *", b"", 400),
        (b"GET /" + b"x" * 60_000, b"", 404),
        (b"GET /" + b"x" * 100_000, b"", 400),
        (b"GET //[x", b"", 404),
    ],
)
async def test_every_answer_carries_the_headers_that_keep_browsers_from_misusing_it(
    request_line: bytes, more: bytes, status: int
) -> None:
    async with listening(model("a")) as shown:
        answer = await raw(
            shown.url,
            request_line + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + more + b"\r\n",
        )

    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert first.split()[1] == str(status)
    expected = {**HEADERS, "Cache-Control": "no-cache"} if request_line == b"HEAD /" else HEADERS
    assert {name: headers.get(name) for name in HEADERS} == expected
    assert len(body) < 1000


MALFORMED = {
    "NUL in a value": b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\x00\r\n\r\n",
    "a value of 100 kB": b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b"
    + b"x" * 100_000
    + b"\r\n\r\n",
    "a body where a chunk size should be": b"POST /api/models/a/warm HTTP/1.1\r\nHost: localhost\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n%b\r\n",
    "no method": b"%b\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n"
    b"X-Secret: %b\r\n\r\n%b",
    "folded": b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: 1\r\n %b\r\nX : %b\r\n\r\n",
    "bare line feeds": b"GET / HTTP/1.1\nHost: localhost\nX-Secret: %b\r\r\n\n",
    "an unknown method": b"%b /api/status HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a version of its own": b"GET /%b HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n%b",
    "TLS": b"\x16\x03\x01\x02\x00\x01%b\r\n\r\n",
    "no Host": b"GET /api/status?key=%b HTTP/1.1\r\nConnection: close\r\n\r\n",
    "absolute": b"GET http://%b@evil/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "authority": b"CONNECT %b:443 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED)
async def test_a_malformed_request_is_refused_and_neither_said_back_nor_logged(
    request_bytes: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "log"
    with file.open("w") as stream:
        end_log = logs.start(level="debug", as_json=True, stream=stream)
        async with listening(model("a", "cold")) as shown:
            answer = await raw(shown.url, request_bytes.replace(b"%b", CANARY.encode()))
            fine = await asked(f"{shown.url}/api/status")
        end_log()
    log = file.read_text()

    assert answer.split(b" ", 2)[1][:1] in (b"4", b"5")
    assert b"Server: keepalive\r\n" in answer
    assert CANARY.encode() not in answer
    assert CANARY not in log
    assert "Traceback" not in log
    assert len(log.splitlines()) <= 1
    assert shown.asked == []
    assert fine[0] == 200


@pytest.mark.parametrize("version", [b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.2"])
async def test_versions_that_it_does_not_speak_are_refused(version: bytes) -> None:
    async with listening(model("a")) as shown:
        answer = await raw(
            shown.url,
            b"POST /api/models/a/warm " + version + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        )

    assert answer.split(b" ", 2)[1] in (b"400", b"505")
    assert shown.asked == []


async def test_http_1_0_is_answered() -> None:
    async with listening() as shown:
        answer = await raw(shown.url, b"GET /livez HTTP/1.0\r\n\r\n")

    assert b" 200 OK\r\n" in answer


async def test_a_body_that_never_ends_holds_up_nothing() -> None:
    async with listening(model("a", "cold")) as shown:
        answer = await raw(
            shown.url,
            b"POST /api/models/a/warm HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\nx",
        )

    assert answer.startswith(b"HTTP/1.1 202 Accepted\r\n")


async def test_an_idle_connection_and_a_head_that_dribbles_in_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepalive.admin.server.IDLE_TIMEOUT", 1.0)
    async with listening() as shown:
        idle, dribbling = await asyncio.gather(
            raw(shown.url, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            raw(shown.url, b"GET /livez HTTP/1.1\r\nHost: loc"),
        )

    assert idle.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"200" not in dribbling


def test_keys_do_not_show_in_a_repr() -> None:
    assert "right-key" not in repr(KEYS)


async def test_a_page_that_cannot_be_shown_is_an_error_without_its_reason() -> None:
    async with listening() as shown:
        shown.document = {"models": [], CANARY: object()}
        status, headers, text = await asked(f"{shown.url}/api/status")

    assert (status, json.loads(text)) == (500, {"error": "internal server error"})
    assert headers["X-Frame-Options"] == "DENY"


async def test_the_cap_counts_only_those_who_watch() -> None:
    async with listening() as shown:
        for _ in range(300):
            assert (await asyncio.to_thread(ask, f"{shown.url}/api/status"))[0] == 200

    assert shown.feed.watching == 0


async def test_some_models_are_asked_for_by_any_name_of_them() -> None:
    async with listening(model("acme/gemma"), model("qwen")) as shown:
        found = [
            await asked(f"{shown.url}/api/status?model={name}")
            for name in ("an-alias", "acme%2FGEMMA", "nobody")
        ]
        ready = await asked(f"{shown.url}/readyz?model=an-alias&model=QWEN")

    told = [json.loads(text) for _, _, text in found]
    assert [status for status, _, _ in (*found, ready)] == [200, 200, 404, 200]
    assert [[m["key"] for m in one["models"]] for one in told[:2]] == [["acme/gemma"]] * 2
    assert told[0]["named"] == ["an-alias"]
    assert told[2]["error"] == "no such model here: nobody"
