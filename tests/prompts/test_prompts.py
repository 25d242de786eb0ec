"""The streaming prompt API, in the real daemon before a simulated LM Studio, and before scripted ones."""

import asyncio
import codecs
import contextlib
import gzip
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepalive.client import Chunk, Client, Done, ModelLoading
from keepalive.config import Prompt
from keepalive.core.callers import Key, Outcome
from keepalive.core.errors import NotWarm
from keepalive.core.facts import ModelId, WarmAsked
from keepalive.prompts import PATHS, Prompts, Settings, serves
from keepalive.prompts.asked import Order, Refusal, read_order
from keepalive.service.daemon import Daemon
from keepalive.simulator.models import SimModel
from keepalive.simulator.studio import Studio
from tests.kit import PROJECT
from tests.kit.fronted import (
    CHAT_STREAM,
    CHUNK,
    DONE,
    SSE_HEAD,
    STOP,
    Asking,
    Front,
    Keep,
    Script,
    Upstream,
    chat,
    chunk,
    delta,
    fronted,
    get,
    leave,
    says,
    stream,
)
from tests.kit.fronted import ask as http_ask
from tests.kit.fronted import post as http_post
from tests.kit.live import (
    PATIENCE,
    DaemonProcess,
    SimulatorProcess,
    ask,
    asked,
    daemon,
    ending,
    loads,
    settings,
    simulator,
    until,
)

KEY = "acme/x"
EXECUTE = "/api/prompts/execute/stream"
PROMPTS = f"""
[[prompts]]
id = 28
title = "Teste Simples"
model = "{KEY}"
content = "Explain {{{{topic}}}} to a {{{{ who }}}}."
"""
# A load ends when a test says so.
LONG = 1000.0
ASKED = {"promptId": 28, "variables": {"topic": "SSE", "who": "nurse"}}


@contextlib.asynccontextmanager
async def front(
    *models: SimModel, server: str = "", prompts: str = PROMPTS, **faults: Any
) -> AsyncIterator[tuple[Daemon, Studio]]:
    """A daemon before a simulator. Whatever the test does: nothing is loaded on demand, nor twice."""
    async with simulator(*(models or (SimModel(KEY, load_seconds=0.2),)), **faults) as upstream:
        async with daemon(settings(upstream.url, KEY, server=server) + prompts) as running:
            yield running, upstream.studio
        begun = [e for e in upstream.studio.log(0) if e["kind"] == "load.started"]
        assert [e for e in begun if e["owner"] == "jit" or e["copies"] > 0] == []
    assert running.status()["models"][0]["in_flight"] == 0
    assert running.status()["models"][0]["waiting"] == 0


async def post(url: str, body: Any, path: str = EXECUTE, **headers: str) -> tuple[int, Any, str]:
    return await asked(url + path, "POST", body, **{"Content-Type": "application/json", **headers})


def events(text: str) -> list[dict[str, Any]]:
    """The events of a whole stream, each of which is one line of data."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks), blocks
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def unchunked(body: bytes) -> str:
    """A body in chunks, as text."""
    text = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        text, body = text + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return text.decode()


def skipping(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """How to have seconds passed for the running loop and all its timers."""
    loop = asyncio.get_running_loop()
    began, skipped = loop.time, 0.0

    def skip(seconds: float) -> None:
        nonlocal skipped
        skipped += seconds

    monkeypatch.setattr(loop, "time", lambda: began() + skipped)
    return skip


async def test_a_prompt_for_a_cold_model_is_told_of_the_load_and_then_streams() -> None:
    async with front(SimModel(KEY, load_seconds=LONG)) as (running, studio):
        reader, writer = await open_post(running.url, {**ASKED, "maxTokens": 4})
        head = await reader.readuntil(b"\r\n\r\n")
        begun = b"".join([await reader.readuntil(b'"Loading acme/x"') for _ in range(2)])
        await until(lambda: loads(studio) == 1, "LM Studio loads")
        studio.advance(LONG)
        told = events(unchunked(begun + await reader.readuntil(b"0\r\n\r\n")))
        writer.close()

        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"\r\ncontent-type: text/event-stream\r\n" in head.lower()
        assert b"\r\ncache-control: no-cache\r\n" in head.lower()
        assert b"\r\nx-accel-buffering: no\r\n" in head.lower()
        assert told[0] == {
            "type": "start",
            "promptId": 28,
            "promptTitle": "Teste Simples",
            "modelId": KEY,
            "modelName": KEY,
            "lmStudioModelId": KEY,
        }
        loading = [event for event in told if event["type"] == "model_loading"]
        assert len(loading) >= 2
        assert loading[-1]["message"] == "Loading acme/x"
        assert loading[-1]["elapsed"] > loading[-2]["elapsed"]
        assert told[-5:-1] == [
            {"type": "chunk", "content": "This", "chunkNumber": 1},
            {"type": "chunk", "content": " answer", "chunkNumber": 2},
            {"type": "chunk", "content": " comes", "chunkNumber": 3},
            {"type": "chunk", "content": " from", "chunkNumber": 4},
        ]
        assert told[-1]["type"] == "done"
        assert (told[-1]["totalChunks"], told[-1]["outputLength"]) == (4, 22)
        assert told[-1]["duration"] >= loading[-1]["elapsed"] - loading[-2]["elapsed"]
        assert loads(studio) == 1


async def test_the_configured_prompts_are_listed_with_their_variables() -> None:
    async with front() as (running, _):
        status, _, text = await asked(running.url + "/api/prompts")

        assert status == 200
        assert json.loads(text) == {
            "success": True,
            "data": [
                {
                    "id": 28,
                    "title": "Teste Simples",
                    "model": KEY,
                    "variables": ["topic", "who"],
                    "maxTokens": None,
                }
            ],
        }


async def test_a_model_is_warmed_up_on_demand() -> None:
    async with front() as (running, studio):
        status, _, text = await post(running.url, {"modelId": KEY}, "/api/models/warmup")
        answer = json.loads(text)

        assert status == 200
        assert answer["success"] is True
        assert answer["data"]["modelId"] == KEY
        assert answer["data"]["warmupDuration"] >= 0
        assert loads(studio) == 1


# --- from the status page -------------------------------------------------------------------------


async def test_the_admin_address_leads_on_to_the_client_address() -> None:
    async with front() as (running, _):
        status, headers, text = await post(running.admin_url, {**ASKED, "maxTokens": 3})
        listed = await asked(running.admin_url + "/api/prompts")
        warmed = await post(running.admin_url, {"modelId": KEY}, "/api/models/warmup")
        wrong = await post(running.admin_url, {"promptId": 29})

        assert status == 200
        assert headers["Content-Type"] == "text/event-stream"
        assert headers["X-Accel-Buffering"] == "no"
        assert headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert [e["content"] for e in events(text) if e["type"] == "chunk"] == ["This", " answer", " comes"]
        assert events(text)[-1]["type"] == "done"
        assert json.loads(listed[2])["data"][0]["variables"] == ["topic", "who"]
        assert json.loads(warmed[2])["data"]["modelId"] == KEY
        assert wrong[0] == 404
        assert json.loads(wrong[2])["error"]["code"] == "prompt_not_found"


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "localhost:0"])
async def test_the_admin_address_finds_the_client_address_wherever_it_listens(listen: str) -> None:
    async with simulator(SimModel(KEY)) as upstream:
        text = settings(upstream.url, KEY).replace('listen = "127.0.0.1:0"', f'listen = "{listen}"', 1)
        async with daemon(text + PROMPTS) as running:
            status, _, text = await post(running.admin_url, {**ASKED, "maxTokens": 1})

    assert status == 200
    assert events(text)[-1]["type"] == "done"


async def test_the_status_page_needs_no_key_of_the_client_address() -> None:
    auth = '[auth]\nclient_keys = [{ name = "page", env = "WARD" }]\n'
    async with simulator(SimModel(KEY)) as upstream:
        text = settings(upstream.url, KEY) + PROMPTS + auth
        async with daemon(text, environ={"WARD": "s3cret-of-the-ward"}) as running:
            status, _, answer = await post(running.admin_url, {**ASKED, "maxTokens": 1})
            without = await post(running.url, ASKED)
            own = await post(
                running.url, {**ASKED, "maxTokens": 1}, Authorization="Bearer s3cret-of-the-ward"
            )

    assert status == 200
    assert events(answer)[-1]["type"] == "done"
    assert without[0] == 401
    assert without[1]["WWW-Authenticate"] == "Bearer"
    assert json.loads(without[2])["error"]["code"] == "invalid_api_key"
    assert own[0] == 200


async def test_a_foreign_page_gets_nowhere_through_the_admin_address() -> None:
    foreign = {"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"}
    async with front() as (running, studio):
        before = len(studio.log(0))
        for path in (EXECUTE, "/api/models/warmup"):
            for headers in foreign:
                status, _, text = await post(running.admin_url, {**ASKED, "modelId": KEY}, path, **headers)

                assert status == 403
                assert json.loads(text)["error"]["code"] == "forbidden"
        asked_for = [e for e in studio.log(before) if e["kind"] == "request" and e["route"] == "chat"]
        assert [e for e in asked_for if e["max_tokens"] != 1] == []


async def test_the_admin_address_bounds_what_is_sent_through_it() -> None:
    async with front() as (running, _):
        body = {"prompt": "x" * 2**21, "model": KEY}
        status, _, text = await post(running.admin_url, body)

        assert status == 413
        assert json.loads(text)["error"]["code"] == "request_entity_too_large"


# --- before a scripted upstream ---------------------------------------------------------------------

CONFIGURED = [
    Prompt(id=28, title="Teste Simples", model="m", content="Explain {{topic}} to a {{ who }}."),
    Prompt(id="plain", title="Plain", model="m", content="Say hello.", max_tokens=7),
    Prompt(id="only", title="Only a variable", model="m", content="{{text}}"),
]


@contextlib.asynccontextmanager
async def scripted(
    script: Script | None = None, *, heartbeat: float = 0.2, keep: Keep | None = None, **how: Any
) -> AsyncIterator[tuple[Front, Upstream]]:
    """The prompt API and the proxy before `script`, with one model "m", that is warm unless `keep` says."""
    if keep is None:
        keep = Keep()
        keep.add("m")
    body_bytes = how.pop("body_bytes", 1_000_000)
    async with fronted(script or says(CHAT_STREAM), keep=keep, heartbeat=heartbeat, **how) as (
        front,
        upstream,
    ):
        proxy = front.proxy

        def warm(model: ModelId) -> None:
            keep.record(WarmAsked(0.0, model))

        prompts = Prompts(proxy, proxy.admit, keep, warm, proxy.ticker, front.seen.append)
        origins = proxy.settings.allowed_origins
        prompts.settings = Settings(CONFIGURED, keep.offered, heartbeat, body_bytes, origins)

        def handle(exchange: Any) -> Any:
            return prompts(exchange) if serves(exchange.head) else proxy(exchange)

        front.listener.handler = handle
        front.prompts = prompts  # type: ignore[attr-defined]
        yield front, upstream
        assert prompts._held == set()
        assert prompts._reading_bytes == 0


def prompt(body: Any, *headers: str, path: str = EXECUTE) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http_post(path, data, "Content-Type: application/json", *headers)


PLAIN = {"promptId": "plain"}


def kinds(body: bytes) -> list[str]:
    return [event["type"] for event in events(body.decode())]


async def test_a_prompt_is_asked_for_as_one_message_of_the_user() -> None:
    async with scripted() as (front, upstream):
        values = {"topic": "{{who}}", "who": "«nurse» \\1 $& {{topic}}", "unused": 1}
        status, _, body = await http_ask(front.port, prompt({"promptId": 28, "variables": values}))
        await http_ask(front.port, prompt(PLAIN))
        await http_ask(front.port, prompt({**PLAIN, "maxTokens": 3, "modelId": "M"}))
        inline = {"prompt": "a {{n}} b {{ n }} {{yes}}", "model": "m", "variables": {"n": 1.5, "yes": True}}
        await http_ask(front.port, prompt(inline))
        asked = [json.loads(body) for body in upstream.bodies]

        assert status == 200
        assert asked[0] == {
            "model": "m",
            "stream": True,
            "messages": [{"role": "user", "content": "Explain {{who}} to a «nurse» \\1 $& {{topic}}."}],
        }
        assert asked[1]["max_tokens"] == 7
        assert asked[2]["max_tokens"] == 3
        assert asked[3]["messages"][0]["content"] == "a 1.5 b 1.5 true"
        head = upstream.requests[0].head
        assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
        assert b"heartbeat" not in head.lower()
        assert events(body.decode())[1:3] == [
            {"type": "chunk", "content": "Hel", "chunkNumber": 1},
            {"type": "chunk", "content": "lo", "chunkNumber": 2},
        ]


async def test_a_request_counts_as_one_of_the_prompts_in_what_is_measured() -> None:
    keep = Keep()
    keep.add("m", state="cold", load_seconds=0.1)
    async with scripted(keep=keep) as (front, _):
        await http_ask(front.port, prompt(PLAIN))
        answered = await front.last()
        await http_ask(front.port, prompt({"promptId": 29}))
        refused = await front.last()
        await http_ask(front.port, prompt({"modelId": "m"}, path="/api/models/warmup"))
        warmed = await front.last()

        assert (answered.route, answered.outcome, answered.start) == ("prompts", Outcome.OK, "cold")
        assert answered.first_token_seconds is not None
        assert (refused.route, refused.outcome, refused.status) == ("prompts", Outcome.REJECTED, 404)
        assert (warmed.route, warmed.outcome, warmed.status) == ("warmup", Outcome.OK, 200)


NO_OBJECT = "the body is no object"
WRONG: list[tuple[Any, int, str | None, str]] = [
    # promptId
    ({"promptId": 29}, 404, "promptId", "29 is no prompt here; write 28"),
    ({"promptId": "plane"}, 404, "promptId", '"plane" is no prompt here; write plain'),
    ({"promptId": "xyzzy"}, 404, "promptId", "write 28 or plain or only"),
    ({}, 400, "promptId", "is missing"),
    ({"promptId": None}, 400, "promptId", "is missing"),
    ({"promptId": True}, 400, "promptId", "is neither a number nor text"),
    ({"promptId": 28.5}, 400, "promptId", "is neither a number nor text"),
    ({"promptId": [28]}, 400, "promptId", "is neither a number nor text"),
    ({"promptId": "plain", "prompt": "x"}, 400, "prompt", "stands beside promptId"),
    ({"promptId": "plain", "model": "m"}, 400, "model", "write modelId"),
    # models
    ({"promptId": "plain", "modelId": "n"}, 404, "modelId", 'write "m"'),
    ({"promptId": "plain", "modelId": 1}, 400, "modelId", "is not text"),
    ({"promptId": "plain", "modelId": " "}, 400, "modelId", "is empty"),
    ({"prompt": "x"}, 400, "model", "is missing"),
    ({"prompt": "x", "model": "nobody's"}, 404, "model", "is no model that is kept here"),
    ({"prompt": "", "model": "m"}, 400, "prompt", "is empty"),
    ({"prompt": 7, "model": "m"}, 400, "prompt", "is not text"),
    # variables
    ({"promptId": 28}, 400, "variables.topic", "is missing; variables.who: is missing"),
    ({"promptId": 28, "variables": {"topic": "x"}}, 400, "variables.who", "is missing"),
    ({"promptId": 28, "variables": ["x"]}, 400, "variables", "is no object"),
    ({"promptId": "only", "variables": {"text": None}}, 400, "variables.text", "is neither text"),
    ({"promptId": "only", "variables": {"text": ["x"]}}, 400, "variables.text", "is neither text"),
    ({"promptId": "only", "variables": {"text": {}}}, 400, "variables.text", "is neither text"),
    ({"promptId": "only", "variables": {"text": " \n"}}, 400, "variables", "leave nothing of the prompt"),
    ({"prompt": "{{__class__}}", "model": "m"}, 400, "variables.__class__", "is missing"),
    (b'{"promptId":"only","variables":{"text":1e400}}', 400, "variables.text", "is neither text"),
    (b'{"promptId":"only","variables":{"text":"\\ud83d"}}', 400, "variables.text", "half a character"),
    (b'{"promptId":"only","variables":{"text":"x","text":"y"}}', 400, "text", "more than once"),
    # numbers
    *(({**PLAIN, "maxTokens": n}, 400, "maxTokens", "is no whole number") for n in (0, -1, 2**31, 1.5, "7")),
    *(({**PLAIN, "timeout": n}, 400, "timeout", "is no number from 1") for n in (0, -1, 2**31, "x", True, [])),
    (b'{"promptId":"plain","timeout":1e400}', 400, "timeout", "is no number from 1"),
    (b'{"promptId":"plain","timeout":NaN}', 400, None, "a number that is none"),
    (b'{"promptId":%b}' % (b"9" * 5000), 400, None, "thousands of digits"),
    # bodies
    (b"", 400, None, "is not JSON"),
    (b"{", 400, None, "is not JSON"),
    (b"[28]", 400, None, NO_OBJECT),
    (b'"28"', 400, None, NO_OBJECT),
    (b"null", 400, None, NO_OBJECT),
    (b'{"promptId":"\xff"}', 400, None, "is not UTF-8"),
    (b'{"promptId":"plain","promptId":28}', 400, "promptId", "more than once"),
    (b'{"promptId":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, None, "nested too deeply"),
    (b'{"promptId":"plain","x":"%b"}' % (b"y" * 1_000_000), 413, None, "larger than 1000000 bytes"),
    ({"prompt": "{{a}}" * 50, "model": "m", "variables": {"a": "x" * 50_000}}, 413, "variables", "larger"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "field", "words"), WRONG)
async def test_bad_input_is_told_before_the_stream_begins(
    body: Any, status: int, field: str | None, words: str
) -> None:
    async with scripted() as (front, upstream):
        got, headers, answer = await http_ask(front.port, prompt(body))
        told = json.loads(answer)

        assert got == status
        assert headers[b"content-type"] == b"application/json"
        assert told["success"] is False
        assert told["error"]["field"] == field
        assert words in told["error"]["message"]
        assert told["error"]["code"]
        assert upstream.requests == []


async def test_everything_that_is_wrong_is_said_at_once_and_no_value_is_repeated() -> None:
    body = {
        "promptId": 28,
        "modelId": "mm",
        "variables": {"topic": ["secret-1"], "other": {"secret-2": 1}},
        "maxTokens": "secret-3",
        "timeout": -4,
    }
    async with scripted() as (front, _):
        status, _, answer = await http_ask(front.port, prompt(body))
        told = json.loads(answer)["error"]

        assert status == 400
        assert [part.partition(":")[0] for part in told["message"].split("; ") if ":" in part] == [
            "variables.topic",
            "variables.other",
            "maxTokens",
            "timeout",
            "modelId",
            "variables.who",
        ]
        assert "secret" not in told["message"]


async def test_a_hundred_mistakes_are_counted_and_not_all_told() -> None:
    template = "".join(f"{{{{v{n}}}}}" for n in range(100))
    async with scripted() as (front, _):
        _, _, answer = await http_ask(front.port, prompt({"prompt": template, "model": "m"}))
        told = json.loads(answer)["error"]

        assert told["code"] == "missing_variables"
        assert told["message"].endswith("variables.v19: is missing; and 80 more")


@pytest.mark.parametrize("name", ["__class__", "__init__.__globals__", "0", "ação"])
async def test_a_variable_is_a_name_and_nothing_else(name: str) -> None:
    async with scripted() as (front, upstream):
        body = {"prompt": f"<{{{{{name}}}}}>", "model": "m", "variables": {name: "text"}}
        status, _, _ = await http_ask(front.port, prompt(body))

        assert status == 200
        assert json.loads(upstream.bodies[0])["messages"][0]["content"] == "<text>"


async def test_a_variable_of_ten_megabytes_arrives_whole() -> None:
    async with scripted(body_bytes=16_000_000) as (front, upstream):
        text = "é" * 5_000_000
        body = json.dumps({"promptId": "only", "variables": {"text": text}}, ensure_ascii=False).encode()
        status, _, _ = await http_ask(front.port, prompt(body))

        assert status == 200
        assert json.loads(upstream.bodies[0])["messages"][0]["content"] == text


@pytest.mark.parametrize(
    ("request_", "status", "header", "field"),
    [
        (http_post(EXECUTE, b"{}", "Content-Type: text/plain"), 415, b"", "Content-Type"),
        (http_post(EXECUTE, b"{}"), 415, b"", "Content-Type"),
        (prompt(PLAIN, "Content-Encoding: br"), 415, b"", "Content-Encoding"),
        (prompt(PLAIN, "Content-Encoding: gzip"), 400, b"", "Content-Encoding"),
        (get(EXECUTE), 405, b"POST", None),
        (get("/api/models/warmup"), 405, b"POST", None),
        (prompt({}, path="/api/prompts"), 405, b"GET, HEAD", None),
        (get(EXECUTE).replace(b"GET", b"OPTIONS"), 405, b"POST", None),
        (prompt({}, path="/api/models/warmup"), 400, b"", "modelId"),
        (prompt({"modelId": "n"}, path="/api/models/warmup"), 404, b"", "modelId"),
        (prompt([], path="/api/models/warmup"), 400, b"", None),
    ],
)
async def test_what_is_asked_in_another_way_is_told_how(
    request_: bytes, status: int, header: bytes, field: str | None
) -> None:
    async with scripted() as (front, upstream):
        got, headers, answer = await http_ask(front.port, request_)

        assert got == status
        assert headers.get(b"allow", b"") == header
        assert json.loads(answer)["error"]["field"] == field
        assert upstream.requests == []


def packed(body: bytes, coding: str = "gzip") -> bytes:
    return http_post(EXECUTE, body, "Content-Type: application/json", f"Content-Encoding: {coding}")


async def test_a_body_may_be_packed_as_on_every_other_route() -> None:
    async with scripted() as (front, upstream):
        body = {"prompt": "packed", "model": "m"}
        status, _, _ = await http_ask(front.port, packed(gzip.compress(json.dumps(body).encode())))

        assert status == 200
        assert json.loads(upstream.bodies[0])["messages"][0]["content"] == "packed"


async def test_a_byte_order_mark_is_read_over() -> None:
    async with scripted() as (front, _):
        body = codecs.BOM_UTF8 + json.dumps({"prompt": "marked", "model": "m"}).encode()
        status, _, _ = await http_ask(front.port, packed(body, "identity"))

        assert status == 200


async def test_what_is_packed_counts_by_what_it_holds_and_has_to_be_whole() -> None:
    async with scripted(body_bytes=100_000) as (front, upstream):
        body = gzip.compress(json.dumps({"prompt": "a" * 10_000_000, "model": "m"}).encode())
        large, _, _ = await http_ask(front.port, packed(body))
        cut, _, answer = await http_ask(front.port, packed(gzip.compress(b'{"prompt": "a"}')[:-9]))

        assert (large, cut) == (413, 400)
        assert json.loads(answer)["error"]["message"] == "the body ends in the middle of its gzip data"
        assert upstream.requests == []


@pytest.mark.parametrize("path", ["/api/prompts/", "/API/prompts", "/api/prompts%2Fexecute", "//api/prompts"])
async def test_other_spellings_of_our_paths_are_for_the_upstream(path: str) -> None:
    async with scripted(says(b"HTTP/1.1 418 I\r\nContent-Length: 0\r\n\r\n")) as (front, upstream):
        status, _, _ = await http_ask(front.port, get(path))

        assert status == 418
        assert upstream.requests[0].head.startswith(b"GET %b HTTP" % path.encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("promptId", "prompt", "model", "modelId", "variables", "maxTokens", "timeout")
LIKELY = st.sampled_from(["plain", "m", "{{a}}", {"a": "b"}, {"topic": 1, "who": True}, 1, 28, "only"])
OBJECTS = st.dictionaries(st.sampled_from(FIELDS), LIKELY | JSON, max_size=7)


@given(
    OBJECTS.map(lambda value: json.dumps(value).encode()) | JSON.map(json.dumps).map(str.encode) | st.binary()
)
def test_whatever_is_sent_is_an_order_or_a_refusal(body: bytes) -> None:
    def find(key: str) -> list[ModelId]:
        return [ModelId("local", "m")] if key == "m" else []

    def read() -> Order | Refusal:
        try:
            return read_order(body, Settings(CONFIGURED, lambda: ["m"], body_bytes=10_000), find)
        except Refusal as refusal:
            return refusal

    found = read()

    if isinstance(found, Refusal):
        assert 400 <= found.status < 500
        assert 0 < len(str(found)) < 10_000
    else:
        asked = json.loads(found.body())
        assert asked["messages"][0]["content"].strip()
        assert asked["model"] == "m"


@given(st.dictionaries(st.sampled_from("abc"), st.text("ab{} \\$&"), min_size=3), st.text("abc{} "))
def test_values_are_put_in_once_whatever_they_hold(values: dict[str, str], between: str) -> None:
    names = "abcba"
    template = between.replace("{", "(").join(f"{{{{{name}}}}}" for name in ("", *names, ""))
    body = json.dumps({"prompt": f"x{template}", "model": "m", "variables": values}).encode()
    order = read_order(body, Settings(), lambda key: [ModelId("local", key)])
    whole = between.replace("{", "(").join(["{{}}", *(values[name] for name in names), "{{}}"])

    assert order.text == f"x{whole}"


# --- what the upstream does -------------------------------------------------------------------------


async def told_of(script: Script, body: Any = PLAIN) -> list[dict[str, Any]]:
    async with scripted(script) as (front, _):
        status, _, answer = await http_ask(front.port, prompt(body))

        assert status == 200
        return events(answer.decode())[1:]


def refuses(status: bytes, body: bytes, kind: bytes = b"application/json") -> Script:
    head = b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (status, kind, len(body))
    return says(head + body)


UNREADABLE = "the upstream sent an event that cannot be read"
EVENTLESS = "the upstream answered {} without events"


@pytest.mark.parametrize(
    ("script", "message", "code"),
    [
        (refuses(b"400 Bad Request", b'{"error":{"message":"too long","code":"ctx"}}'), "too long", "ctx"),
        (refuses(b"400 Bad Request", b'{"error":"flat"}'), "flat", "upstream_400"),
        (refuses(b"500 Oops", b"<html>", b"text/html"), EVENTLESS.format(500), "upstream_500"),
        (refuses(b"200 OK", b'{"error":"Unexpected endpoint"}'), "Unexpected endpoint", "upstream_200"),
        (refuses(b"200 OK", b'{"choices":[]}'), EVENTLESS.format(200), "upstream_200"),
        (refuses(b"500 Oops", b'{"error":' + b"[" * 70_000), EVENTLESS.format(500), "upstream_500"),
        (says(stream(b'data: {"error":{"message":"no memory","code":"oom"}}\n\n')), "no memory", "oom"),
        (says(stream(b'event: error\ndata: {"error":"gone"}\n\n', DONE)), "gone", "upstream_error"),
        (says(stream(b"data: {not json}\n\n")), UNREADABLE, "upstream_error"),
        (says(stream(b"data: 7\n\n")), UNREADABLE, "upstream_error"),
        (says(stream(b"data: " + b"[" * 100_000 + b"\n\n")), UNREADABLE, "upstream_error"),
        (says(stream()), "the upstream's answer ended before its end", "upstream_cut"),
        (says(SSE_HEAD, then="cut"), "the upstream's answer was cut", "upstream_cut"),
        (says(SSE_HEAD, then="reset"), "the upstream's answer was cut", "upstream_cut"),
        (says(b"garbage\r\n\r\n"), None, "upstream_cut"),
    ],
)  # fmt: skip
async def test_what_goes_wrong_after_the_start_is_an_error_event(
    script: Script, message: str | None, code: str
) -> None:
    told = await told_of(script)

    assert len(told) == 1
    assert told[0]["type"] == "error"
    assert told[0]["code"] == code
    assert message in (None, told[0]["message"])


async def test_what_came_before_an_error_has_been_told() -> None:
    error = b'data: {"error":"The model has crashed without additional information."}\n\n'
    told = await told_of(says(stream(delta("Hel"), error, delta("lo"), DONE)))

    assert [event["type"] for event in told] == ["chunk", "error"]
    assert told[1]["message"] == "The model has crashed without additional information."


async def test_a_cut_at_any_byte_leaves_whole_events_and_an_end() -> None:
    whole = delta("Hel") + delta("lo") + STOP + DONE
    at = 0

    async def script(asking: Asking) -> None:
        await asking.send(SSE_HEAD + chunk(whole[:at]) if at else SSE_HEAD)
        asking.cut()

    async with scripted(script) as (front, _):
        for at in range(len(whole) + 1):
            _, _, answer = await http_ask(front.port, prompt(PLAIN))
            chunks = whole[:at].count(b"\n\n", 0, len(delta("Hel") + delta("lo")))
            end = "done" if at == len(whole) else "error"

            assert kinds(answer) == ["start", *["chunk"] * chunks, end]


async def test_the_bytes_of_an_answer_may_come_one_by_one() -> None:
    told = await told_of(says(CHAT_STREAM, drip=1))

    assert [event["type"] for event in told] == ["chunk", "chunk", "done"]
    assert (told[2]["totalChunks"], told[2]["outputLength"]) == (2, 5)


async def test_reasoning_is_kept_apart_from_the_answer() -> None:
    thought = CHUNK + b'"delta":{"reasoning_content":"hm","content":""}}]}\n\n'
    other = CHUNK + b'"delta":{"reasoning":"so","content":null}}]}\n\n'
    usage = b'data: {"choices":[],"usage":{"total_tokens":9}}\n\n'
    role = CHUNK + b'"delta":{"role":"assistant"}}]}\n\n'
    told = await told_of(says(stream(role, thought, other, delta("yes"), STOP, usage, DONE)))

    assert told[:3] == [
        {"type": "reasoning", "content": "hm"},
        {"type": "reasoning", "content": "so"},
        {"type": "chunk", "content": "yes", "chunkNumber": 1},
    ]
    assert told[3]["outputLength"] == 3


async def test_every_character_arrives_also_half_of_one() -> None:
    halves = [CHUNK + b'"delta":{"content":"%b"}}]}\n\n' % half for half in (b"\\ud83d", b"\\ude42")]
    lines = CHUNK + '"delta":{"content":"a\\nb\\r\\n\u2028é日"}}]}\n\n'.encode()
    told = await told_of(says(stream(*halves, lines, STOP)))

    assert told[0]["content"] + told[1]["content"] == "\ud83d\ude42"
    assert told[2]["content"] == "a\nb\r\n\u2028é日"
    assert told[3]["type"] == "done"


async def test_an_event_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepalive.prompts.stream.LAST_SECONDS", 0.1)

    async def script(asking: Asking) -> None:
        await asking.send(SSE_HEAD)
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                await asking.send(chunk(b"data: " + b"x" * 1_000_000))
            await asking.left()

    async with scripted(script) as (front, _):
        _, _, answer = await http_ask(front.port, prompt(PLAIN))

        assert events(answer.decode())[1] == {
            "type": "error",
            "message": "the upstream sent an event that is too large",
            "code": "upstream_error",
        }


# --- waiting, leaving, ending -------------------------------------------------------------------------


async def test_a_caller_that_waits_is_told_for_how_long_and_how_much_longer() -> None:
    keep = Keep()
    it = keep.add("m", state="loading", elapsed=31.2, eta=62.0)
    loading = asyncio.get_running_loop().create_future()
    it.loading = loading  # type: ignore[assignment]
    async with scripted(keep=keep) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(prompt(PLAIN))
        await reader.readuntil(b"\r\n\r\n")
        begun = b"".join([await reader.readuntil(b'"model_loading"') for _ in range(2)])
        it.state = "warm"
        loading.set_result(None)
        answer = unchunked(begun + await reader.readuntil(b"0\r\n\r\n"))
        writer.close()
        told = events(answer)

        assert told[1] == {
            "type": "model_loading",
            "message": "Loading m",
            "estimatedTime": 93200,
            "elapsed": 31200,
        }
        # Each second one, and in between signs of life, of which some may be late.
        assert told[-1]["type"] == "done"
        assert "\n\n: keep-alive\n\n" in answer


@pytest.mark.clock_jumps
async def test_a_base_url_may_begin_with_a_heartbeat_mode_and_off_leaves_the_silence_alone() -> None:
    bodies = {}
    for mode in ("off", "comment", "loud"):
        keep = Keep()
        keep.add("m", state="loading", load_seconds=20.0)
        async with scripted(keep=keep, heartbeat=0.5) as (front, _):
            answer = await http_ask(front.port, prompt(PLAIN, path=f"/heartbeat/{mode}{EXECUTE}"))
            bodies[mode] = answer[0], answer[2]

    assert (bodies["off"][0], b": keep-alive" in bodies["off"][1]) == (200, False)
    assert (bodies["comment"][0], b": keep-alive" in bodies["comment"][1]) == (200, True)
    assert bodies["loud"][0] == 404
    assert json.loads(bodies["loud"][1])["error"]["code"] == "unknown_heartbeat"


async def test_silence_is_filled_also_within_an_answer() -> None:
    heard = asyncio.Event()

    async def script(asking: Asking) -> None:
        await asking.send(SSE_HEAD + chunk(delta("Hel") + b"data: {"))
        await heard.wait()
        await asking.send(chunk(b'"choices":[]}\n\n' + delta("lo") + STOP + DONE) + b"0\r\n\r\n")

    async with scripted(script, heartbeat=0.1) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(prompt(PLAIN))
        await reader.readuntil(b"\r\n\r\n")
        begun = await reader.readuntil(b'"Hel"')
        filled = b"".join([await reader.readuntil(b": keep-alive\n\n") for _ in range(2)])
        heard.set()
        answer = unchunked(begun + filled + await reader.readuntil(b"0\r\n\r\n"))
        writer.close()

        assert kinds(answer.encode()) == ["start", "chunk", "chunk", "done"]


async def test_what_is_refused_at_once_keeps_its_status() -> None:
    keep = Keep()
    keep.add("m", state="backoff", fails=NotWarm("m cannot be had now: no memory", 77.0))
    async with scripted(keep=keep) as (front, upstream):
        keep.models[ModelId("local", "m")].loading = asyncio.get_running_loop().create_future()  # type: ignore[assignment]
        keep.models[ModelId("local", "m")].loading.set_result(None)  # type: ignore[union-attr, arg-type]
        warmed = await http_ask(front.port, prompt({"modelId": "m"}, path="/api/models/warmup"))
        status, headers, answer = await http_ask(front.port, prompt(PLAIN))

        for got in (warmed, (status, headers, answer)):
            assert got[0] == 503
            assert got[1][b"retry-after"] == b"77"
            assert json.loads(got[2])["error"] == {
                "message": "m cannot be had now: no memory",
                "code": "model_not_ready",
                "field": None,
            }
        assert upstream.requests == []


async def test_the_bound_on_the_first_chunk_ends_a_wait_and_tells_the_upstream() -> None:
    left = asyncio.Event()

    async def script(asking: Asking) -> None:
        await asking.left()
        left.set()

    async with scripted(script) as (front, _):
        _, _, answer = await http_ask(front.port, prompt({**PLAIN, "timeout": 150}))
        async with asyncio.timeout(PATIENCE):
            await left.wait()

        assert events(answer.decode())[1:] == [
            {"type": "error", "message": "no answer began within 150 ms", "code": "timeout"}
        ]
        assert (await front.last()).outcome is Outcome.TIMEOUT


async def test_the_bound_on_the_first_chunk_covers_the_load() -> None:
    keep = Keep()
    keep.add("m", state="loading", load_seconds=60.0)
    async with scripted(keep=keep) as (front, upstream):
        _, _, answer = await http_ask(front.port, prompt({**PLAIN, "timeout": 150}))

        assert kinds(answer) == ["start", "model_loading", "error"]
        message = "no answer began within 150 ms; m is loading"
        assert events(answer.decode())[-1] == {"type": "error", "message": message, "code": "timeout"}
        assert upstream.requests == []


@pytest.mark.parametrize("first", [delta("Hel"), CHUNK + b'"delta":{"reasoning_content":"hm"}}]}\n\n'])
async def test_the_bound_on_the_first_chunk_ends_with_it(
    first: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = asyncio.Event()

    async def script(asking: Asking) -> None:
        await asking.send(SSE_HEAD + chunk(first))
        await passed.wait()
        await asking.send(chunk(delta("lo") + STOP + DONE) + b"0\r\n\r\n")

    async with scripted(script) as (front, _):
        skip = skipping(monkeypatch)
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(prompt({**PLAIN, "timeout": 20_000}))
        await reader.readuntil(b"\r\n\r\n")
        begun = await reader.readuntil(b"chunk" if b'"Hel"' in first else b"reasoning")
        skip(21.0)
        begun += await reader.readuntil(b": keep-alive")  # whatever was due by now has been done
        passed.set()
        answer = unchunked(begun + await reader.readuntil(b"0\r\n\r\n"))
        writer.close()

        assert kinds(answer.encode())[-2:] == ["chunk", "done"]


async def test_patience_can_be_said_as_to_the_proxy() -> None:
    keep = Keep()
    keep.add("m", state="loading", load_seconds=60.0)
    async with scripted(keep=keep) as (front, _):
        _, _, answer = await http_ask(front.port, prompt(PLAIN, "Prefer: wait=0"))
        warmed = await http_ask(
            front.port, prompt({"modelId": "m"}, "Prefer: wait=0", path="/api/models/warmup")
        )

        assert events(answer.decode())[-1]["code"] == "model_not_ready"
        assert warmed[0] == 503
        assert warmed[1][b"retry-after"] == b"5"
        assert json.loads(warmed[2])["error"]["message"] == "m is loading and did not get warm in time"


@pytest.mark.parametrize("how", ["fin", "half-close", "reset"])
@pytest.mark.parametrize("phase", ["body", "load", "silence", "chunks"])
async def test_a_caller_may_leave_at_any_time_and_everybody_hears_of_it(phase: str, how: str) -> None:
    keep = Keep()
    keep.add("m", **({"state": "loading", "load_seconds": 60.0} if phase == "load" else {}))
    left: list[float] = []

    async def script(asking: Asking) -> None:
        if phase == "chunks":
            await asking.send(SSE_HEAD + chunk(delta("Hel")))
        left.append(await asking.left())

    async with scripted(script, keep=keep) as (front, upstream):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        whole = prompt(PLAIN)
        writer.write(whole[:-3] if phase == "body" else whole)
        if phase == "body":
            await until(lambda: front.prompts._held, "the body is being read")  # type: ignore[attr-defined]
        elif phase == "load":
            await until(lambda: keep.waiting, "it waits for the model")
            await reader.readuntil(b"model_loading")
        elif phase == "silence":
            await until(lambda: upstream.requests, "the upstream was asked")
            await reader.readuntil(b'"start"')
        else:
            await reader.readuntil(b'"Hel"')
        leave(writer, "half-close" if how == "half-close" else "reset" if how == "reset" else "fin")
        await until(lambda: not front.proxy.in_progress and not keep.waiting, "it is over")
        await until(lambda: not front.prompts._held, "nothing waits for it")  # type: ignore[attr-defined]
        if phase in ("silence", "chunks"):
            await until(lambda: left, "the upstream was told")
        if phase != "body":
            assert (await front.last()).outcome is Outcome.CLIENT_GONE
        writer.close()


async def test_a_caller_may_leave_as_soon_as_it_is_done() -> None:
    released = asyncio.Event()

    async def script(asking: Asking) -> None:
        await asking.send(SSE_HEAD + chunk(delta("Hel") + STOP + DONE))
        await released.wait()
        await asking.send(b"0\r\n\r\n")

    async with scripted(script) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(prompt(PLAIN))
        await reader.readuntil(b"0\r\n\r\n")
        writer.close()
        await asyncio.sleep(0.05)
        released.set()

        assert (await front.last()).outcome is Outcome.OK


async def test_an_upstream_that_says_done_and_then_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepalive.prompts.stream.LAST_SECONDS", 0.1)
    left = asyncio.Event()

    async def script(asking: Asking) -> None:
        await asking.send(SSE_HEAD + chunk(delta("Hel") + STOP + DONE))
        await asking.left()
        left.set()

    async with scripted(script) as (front, _):
        _, _, answer = await http_ask(front.port, prompt(PLAIN))
        async with asyncio.timeout(PATIENCE):
            await left.wait()

        assert kinds(answer) == ["start", "chunk", "done"]


async def test_who_does_not_read_slows_the_upstream_and_costs_little() -> None:
    sent = 0

    async def script(asking: Asking) -> None:
        nonlocal sent
        await asking.send(SSE_HEAD)
        piece = chunk(delta("x" * 4000) * 16)
        while True:
            await asking.send(piece)
            sent += len(piece)

    async with scripted(script) as (front, _):
        sock = socket.create_connection(("127.0.0.1", front.port))
        sock.sendall(prompt(PLAIN))
        await until(lambda: sent, "it streams")
        before = -1
        while before != sent:  # until nothing moves for a while
            before = sent
            await asyncio.sleep(0.5)
        connection = next(iter(front.listener.connections))
        buffered = connection.transport.get_write_buffer_size()
        sock.close()
        await until(lambda: not front.proxy.in_progress, "it is over")

        assert buffered < 1_000_000


async def test_when_the_daemon_ends_each_caller_is_told() -> None:
    keep = Keep()
    keep.add("m", state="loading", load_seconds=60.0)

    async with scripted(keep=keep, epilogue=False) as (front, _):
        whole = prompt(PLAIN)
        held = asyncio.create_task(http_ask(front.port, whole))
        warming = asyncio.create_task(
            http_ask(front.port, prompt({"modelId": "m"}, path="/api/models/warmup"))
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(whole[:-3])
        prompts = front.prompts  # type: ignore[attr-defined]
        await until(lambda: keep.waiting == 2 and len(prompts._held) == 2, "all of them wait")
        prompts.stop()
        front.proxy.stop()
        _, _, told = await held
        warmed, _, _ = await warming
        half = await reader.read()
        writer.close()
        late, _, _ = await http_ask(front.port, whole)

        assert events(told.decode())[-1]["code"] == "shutting_down"
        assert warmed == 503
        assert half.startswith(b"HTTP/1.1 503 ")
        assert late == 503


async def test_bodies_that_are_being_read_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepalive.prompts.api.READING_BYTES", 100_000)
    async with scripted() as (front, _):
        whole = prompt({"promptId": "only", "variables": {"text": "x" * 80_000}})
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(whole[:-3])
        await until(lambda: front.prompts._reading_bytes > 70_000, "one is being read")  # type: ignore[attr-defined]
        status, headers, answer = await http_ask(front.port, whole)
        writer.write(whole[-3:])
        first = await reader.read()
        writer.close()

        assert status == 503
        assert headers[b"retry-after"] == b"1"
        assert json.loads(answer)["error"]["code"] == "overloaded"
        assert first.startswith(b"HTTP/1.1 200 ")


# --- who may ask ----------------------------------------------------------------------------------

ORIGIN = "https://chat.example.org"
PATHS_OF_OURS = sorted(path.decode() for path in PATHS)


@pytest.mark.parametrize("path", PATHS_OF_OURS)
@pytest.mark.parametrize(
    "header", ["Origin: https://evil.example", "Sec-Fetch-Site: cross-site", "Host: evil.example"]
)
async def test_a_foreign_page_may_not_ask(path: str, header: str) -> None:
    async with scripted(allowed_origins=frozenset({ORIGIN})) as (front, upstream):
        data = http_post(path, b"{", "Content-Type: application/json", header)
        if header.startswith("Host"):
            data = data.replace(b"Host: localhost\r\n", b"")
        status, headers, answer = await http_ask(front.port, data)

        assert status == 403
        assert json.loads(answer)["error"]["code"] in ("origin", "host")
        assert b"access-control-allow-origin" not in headers
        assert upstream.requests == []
        assert front.keep.warm_asked == 0


@pytest.mark.parametrize("path", PATHS_OF_OURS)
async def test_a_page_that_is_allowed_may_ask_and_read(path: str) -> None:
    async with scripted(allowed_origins=frozenset({ORIGIN}), keys=(Key("ward", "s3cret"),)) as (front, _):
        asked = [f"Origin: {ORIGIN}", "Sec-Fetch-Site: cross-site", "Access-Control-Request-Method: POST"]
        status, headers, body = await http_ask(front.port, get(path, *asked).replace(b"GET", b"OPTIONS", 1))
        own, others, _ = await http_ask(
            front.port, prompt(PLAIN, f"Origin: {ORIGIN}", "Authorization: Bearer s3cret", path=path)
        )

        assert (status, body) == (204, b"")
        assert headers[b"access-control-allow-origin"] == ORIGIN.encode()
        assert b"content-type" in headers[b"access-control-allow-headers"]
        assert headers[b"access-control-allow-methods"].split(b",")[0] in (b"POST", b"GET")
        assert headers[b"vary"] == b"Origin"
        assert own in (200, 400, 405)
        assert others[b"access-control-allow-origin"] == ORIGIN.encode()
        assert others[b"vary"] == b"Origin"


async def test_the_routes_of_the_upstream_are_allowed_to_the_same_pages() -> None:
    async with scripted(allowed_origins=frozenset({ORIGIN})) as (front, upstream):
        _, headers, _ = await http_ask(front.port, chat("m", f"Origin: {ORIGIN}"))

        assert headers[b"access-control-allow-origin"] == ORIGIN.encode()
        assert len(upstream.requests) == 1


async def test_a_key_is_asked_for_before_the_body_and_passed_to_nobody() -> None:
    async with scripted(keys=(Key("ward", "s3cret"),)) as (front, upstream):
        whole = prompt(PLAIN, "Expect: 100-continue")
        refused, headers, answer = await http_ask(front.port, whole[: whole.index(b"\r\n\r\n") + 4])
        wrong, _, _ = await http_ask(front.port, prompt(PLAIN, "Authorization: Bearer s3cre"))
        status, _, _ = await http_ask(front.port, prompt(PLAIN, "Authorization: Bearer s3cret"))
        seen = await front.last()

        assert (refused, wrong, status) == (401, 401, 200)
        assert headers[b"www-authenticate"] == b"Bearer"
        assert json.loads(answer)["error"]["code"] == "invalid_api_key"
        assert seen.key == "ward"
        assert b"s3cret" not in upstream.requests[0].head


async def test_the_module_for_browsers_is_there_for_everybody() -> None:
    source = (PROJECT / "keepalive" / "assets" / "keepalive.js").read_bytes()
    async with scripted(keys=(Key("ward", "s3cret"),), allowed_origins=frozenset({ORIGIN})) as (front, _):
        status, headers, body = await http_ask(front.port, get("/keepalive.js", f"Origin: {ORIGIN}"))
        tag = f"If-None-Match: {headers[b'etag'].decode()}"
        again, _, nothing = await http_ask(front.port, get("/keepalive.js", tag))

        assert (status, body) == (200, source)
        assert headers[b"content-type"] == b"text/javascript; charset=utf-8"
        assert headers[b"x-content-type-options"] == b"nosniff"
        assert headers[b"cache-control"] == b"no-cache"
        assert headers[b"access-control-allow-origin"] == ORIGIN.encode()
        assert (again, nothing) == (304, b"")


# --- more from the status page ---------------------------------------------------------------------


async def open_post(url: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A prompt that has been asked, for a test that reads the answer as it comes."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(prompt(body).replace(b"Host: localhost", f"Host: {host}".encode()))
    return reader, writer


async def test_a_page_that_leaves_is_gone_at_the_client_address_too() -> None:
    async with front(answer_tokens=100_000) as (running, studio):
        reader, writer = await open_post(running.admin_url, ASKED)
        await reader.readuntil(b'"chunkNumber":3')
        writer.close()

        await until(lambda: running.status()["models"][0]["in_flight"] == 0, "the daemon knows")
        await until(lambda: not studio.in_flight, "LM Studio knows")


async def test_a_page_that_does_not_read_is_waited_for() -> None:
    async with front(answer_tokens=10_000, token_seconds=0.0, answer_text="x" * 4000) as (running, studio):
        host, _, port = running.admin_url.removeprefix("http://").rpartition(":")
        sock = socket.create_connection((host, int(port)))
        sock.sendall(prompt(ASKED))

        def said() -> int:
            return max((call.tokens for call in studio.calls.values()), default=0)

        await until(lambda: said() > 1, "it is answered")
        before = -1
        while before != said():  # until nothing moves for a while
            before = said()
            await asyncio.sleep(0.7)
        still = studio.in_flight
        sock.close()

        assert still == 1
        assert before * 4000 < 30_000_000
        await until(lambda: not studio.in_flight, "LM Studio knows")


async def test_a_client_address_that_is_gone_is_said_to_the_page() -> None:
    async with front() as (running, _):
        await running._front._listener.stop_accepting()  # type: ignore[union-attr]
        status, headers, text = await post(running.admin_url, ASKED)

        assert status == 503
        assert headers["Retry-After"] == "5"
        assert json.loads(text)["error"]["code"] == "service_unavailable"


# --- its life -------------------------------------------------------------------------------------


async def test_a_reload_holds_from_the_next_request_on(tmp_path: Path) -> None:
    async with simulator(SimModel(KEY), answer_tokens=40, token_seconds=0.02) as upstream:
        text = settings(upstream.url, KEY)
        async with daemon(text + PROMPTS, path=tmp_path / "config.toml") as running:
            reader, writer = await open_post(running.url, ASKED)
            await reader.readuntil(b'"chunkNumber":3')
            other = PROMPTS.replace("id = 28", "id = 29").replace("Explain", "Say")
            (tmp_path / "config.toml").write_text(text + other)
            running.reload()
            gone = await post(running.url, ASKED)
            new = await post(running.url, {**ASKED, "promptId": 29, "maxTokens": 1})
            listed = await asked(running.url + "/api/prompts")
            first = await reader.read()
            writer.close()

    assert gone[0] == 404
    assert events(new[2])[0]["promptId"] == 29
    assert [prompt["id"] for prompt in json.loads(listed[2])["data"]] == [29]
    assert b'"totalChunks":40' in first


async def test_what_is_open_may_end_and_is_then_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with simulator(SimModel(KEY), answer_tokens=100_000, token_seconds=0.05) as upstream:
        text = settings(upstream.url, KEY, server='drain_timeout = "60s"') + PROMPTS
        async with daemon(text) as running:
            skip = skipping(monkeypatch)
            await until(lambda: states(running) == {"warm"}, "warm")
            long, of_long = await open_post(running.url, ASKED)
            short, of_short = await open_post(running.url, {**ASKED, "maxTokens": 8})
            await long.readuntil(b'"chunkNumber":1')
            await short.readuntil(b'"chunkNumber":1')
            running.stop()
            second = await short.read()
            skip(60.0)
            first = await long.read()
            of_long.close()
            of_short.close()

    assert b'"code":"shutting_down"' in first
    assert first.endswith(b"0\r\n\r\n")
    assert b'"totalChunks":8' in second


def test_of_what_was_said_nothing_is_kept(tmp_path: Path) -> None:
    canary = "canary-4711"
    simulated = SimulatorProcess(tmp_path, f"{KEY}:20ms")
    with ending(simulated):
        simulated.faults(answer_text=f"{canary}-answer")
        running = DaemonProcess(
            tmp_path, settings(simulated.url, KEY, server='log_level = "debug"') + PROMPTS
        )
        with ending(running):
            client = running.events("daemon.started")[0]["listen"]
            kind = {"Content-Type": "application/json"}
            values = {"topic": f"{canary}-value", "who": f"{canary}-value"}
            said = ask(client + EXECUTE, "POST", {"promptId": 28, "variables": values}, **kind)[2]
            inline = {"prompt": f"{canary}-prompt", "model": KEY}
            ask(client + EXECUTE, "POST", inline, **kind)
            wrong = [
                {"promptId": 28, "variables": {"topic": [f"{canary}-value"]}},
                {"promptId": 28, "variables": f"{canary}-value"},
                {"prompt": [f"{canary}-prompt"], "model": KEY},
                {"prompt": f"{canary}-prompt {{{{x}}}}", "model": KEY, "maxTokens": f"{canary}-value"},
                f"{canary}-prompt",
            ]
            refused = "".join(ask(client + EXECUTE, "POST", body, **kind)[2] for body in wrong)
            simulated.faults(stream_breaks="error")
            ask(client + EXECUTE, "POST", inline, **kind)
            shown = "".join(ask(running.url + path)[2] for path in ("/metrics", "/api/status"))
            running.signal(signal.SIGTERM)
            assert running.ended() == 0
            log = running.out.read_text() + running.err.read_text()

    assert f"{canary}-answer" in said
    assert '"route":"prompts"' in log.replace(" ", "")
    assert canary not in log
    assert canary not in shown
    assert canary not in refused


# --- the figures of the original --------------------------------------------------------------------

# It streamed 1,999 chunks with 7,170 characters, and lost 75 of 100 prompts to models that were not loaded.
CHUNKS, CHARACTERS = 1999, 7170
WORDS = " ".join(["abc"] * 1174 + ["ab"] * 825)


async def test_1999_chunks_and_7170_characters_arrive_without_an_error() -> None:
    async with front(answer_tokens=CHUNKS, answer_text=WORDS, token_seconds=0.0) as (running, _):
        async with Client(running.url) as client:
            told = [event async for event in client.stream_prompt(28, ASKED["variables"])]
        pieces = [event for event in told if isinstance(event, Chunk)]

        assert [piece.number for piece in pieces] == list(range(1, CHUNKS + 1))
        assert "".join(piece.text for piece in pieces) == WORDS
        assert len(WORDS) == CHARACTERS
        assert isinstance(told[-1], Done)
        assert (told[-1].chunks, told[-1].characters) == (CHUNKS, CHARACTERS)


async def test_sixty_streams_at_once_each_get_all_of_their_own() -> None:
    faults = {"answer_tokens": CHUNKS, "answer_text": WORDS, "token_seconds": 0.0, "parallel": 60}
    async with front(SimModel(KEY, load_seconds=1.0), **faults) as (running, studio):

        async def one(client: Client, tokens: int) -> tuple[str, Done]:
            text = ""
            async for event in client.stream_prompt(28, ASKED["variables"], max_tokens=tokens):
                if isinstance(event, Chunk):
                    text += event.text
            assert isinstance(event, Done)
            return text, event

        async with Client(running.url) as client:
            told = await asyncio.gather(*(one(client, 100 + n) for n in range(60)))

        for n, (text, done) in enumerate(told):
            assert text == " ".join(WORDS.split()[: 100 + n])
            assert done.chunks == 100 + n
        assert loads(studio) == 1


@contextlib.asynccontextmanager
async def hurrying(studio: Studio, times: float) -> AsyncIterator[None]:
    """The simulator's time passes quicker."""

    async def hurry() -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            now = time.monotonic()
            studio.advance((now - last) * (times - 1))
            last = now

    task = asyncio.create_task(hurry())
    try:
        yield
    finally:
        task.cancel()


async def test_an_answer_may_take_longer_than_five_minutes_of_the_simulator() -> None:
    async with front(answer_tokens=64, token_seconds=5.0) as (running, studio):
        await until(lambda: states(running) == {"warm"}, "warm")
        began = studio.clock.now()
        async with hurrying(studio, 600):
            _, _, text = await post(running.url, ASKED)

        assert studio.clock.now() - began > 300
        assert events(text)[-1]["totalChunks"] == 64


@pytest.mark.timeout(500)
@pytest.mark.skipif(
    not os.environ.get("KEEPALIVE_SLOW_TESTS"),
    reason="takes more than five minutes; set KEEPALIVE_SLOW_TESTS=1",
)
async def test_an_answer_may_take_longer_than_five_minutes() -> None:
    async with front(answer_tokens=64, token_seconds=5.0) as (running, _), Client(running.url) as client:
        told = [event async for event in client.stream_prompt(28, ASKED["variables"])]

        assert isinstance(told[-1], Done)
        assert told[-1].chunks == 64
        assert told[-1].seconds > 300


def states(running: Daemon) -> set[str]:
    return {model["state"] for model in running.status()["models"]}


async def test_of_a_hundred_cold_starts_of_two_minutes_none_is_lost() -> None:
    keys = [f"acme/{n}" for n in range(50)]
    models = [SimModel(key, load_seconds=120.0) for key in keys]

    async def told(client: Client, key: str) -> list[Any]:
        return [event async for event in client.stream_prompt(prompt="hello", model=key, max_tokens=3)]

    async with simulator(*models, token_seconds=0.0, prompt_seconds=0.0) as upstream:
        pace = 'ping_interval = "1h"\nlease = "2h"'
        text = settings(upstream.url, *keys, upstream="max_loading = 50", defaults=pace)
        async with daemon(text) as running, Client(running.url) as client, hurrying(upstream.studio, 600):
            starts = await asyncio.gather(*(told(client, key) for key in keys))
            for key in keys:
                upstream.studio.evict(key)
            await until(lambda: "warm" not in states(running), "no model is warm")
            starts += await asyncio.gather(*(told(client, key) for key in keys))
        begun = loads(upstream.studio)

    assert len(starts) == 100
    for events in starts:
        assert isinstance(events[1], ModelLoading)
        assert isinstance(events[-1], Done)
        assert (events[-1].chunks, events[-1].characters) == (3, 17)
    assert begun == 100
