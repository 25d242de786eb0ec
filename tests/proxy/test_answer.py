"""What is ours to say, and what is put beside what is not: in the words of the route, for whoever may read it."""

import json

import pytest

from keepalive.core.callers import Key
from keepalive.core.errors import NotWarm
from keepalive.core.facts import ModelId, RequestEnded
from keepalive.http1 import Limits
from keepalive.proxy import Heartbeat
from tests.kit.fronted import (
    CHAT_BODY,
    CHAT_STREAM,
    SSE_HEAD,
    Keep,
    ask,
    chat,
    chunk,
    fronted,
    get,
    post,
    raw,
    says,
    split_answer,
    stream,
    without_comments,
)

PAGE = "Origin: https://mine.example"
MINE = {"allowed_origins": frozenset(["https://mine.example"])}
ROUTES = ["/v1/chat/completions", "/v1/messages", "/api/v1/chat", "/api/v0/chat/completions", "/x"]


def model(**how):
    keep = Keep()
    keep.add("m", **how)
    return keep


def may_read(headers):
    return headers.get(b"access-control-allow-origin") == b"https://mine.example"


# --- for pages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["warm", "cold"])
@pytest.mark.parametrize("streaming", [True, False])
async def test_a_page_may_read_an_answer_whatever_the_state_of_its_model(state, streaming):
    keep = model(state=state, load_seconds=0.1)
    async with fronted(says(CHAT_STREAM), keep=keep, heartbeat=0.05, **MINE) as (front, _):
        data = await raw(front.port, chat("m", PAGE, stream=streaming))

        assert may_read(split_answer(data)[1])
        assert data.lower().count(b"access-control-allow-origin:") == 1


async def test_a_page_may_read_why_not():
    keep = model(state="cold", fails=NotWarm("not enough memory"))
    async with fronted(keep=keep, limits=Limits(tick=0.02, body_bytes=1000), **MINE) as (front, upstream):
        status, headers, _ = await ask(front.port, chat("m", PAGE, stream=False))
        assert (status, may_read(headers)) == (503, True)

        status, headers, _ = await ask(front.port, post("/v1/chat/completions", b"x" * 2000, PAGE))
        assert (status, may_read(headers)) == (413, True)

        await upstream.stop()
        status, headers, _ = await ask(front.port, get("/v1/models", PAGE))
        assert (status, may_read(headers)) == (502, True)


async def test_a_page_without_a_key_may_read_that_and_its_preflight_needs_none():
    async with fronted(keys=(Key("a", "k1"),), **MINE) as (front, upstream):
        status, headers, _ = await ask(front.port, chat("m", PAGE))
        assert (status, may_read(headers)) == (401, True)

        asked = get("/v1/chat/completions", PAGE, "Access-Control-Request-Method: POST")
        status, headers, _ = await ask(front.port, asked.replace(b"GET", b"OPTIONS"))
        assert (status, may_read(headers)) == (204, True)
        assert upstream.requests == []


async def test_a_stranger_is_granted_nothing():
    async with fronted(**MINE) as (front, _):
        _, headers, _ = await ask(front.port, chat("m", "Origin: https://evil.example"))
        assert b"access-control-allow-origin" not in headers

        _, headers, _ = await ask(front.port, get("/"))
        assert b"access-control-allow-origin" not in headers


# --- in the layout of the route ---------------------------------------------------------------------


def layout(path, body):
    told = json.loads(body)
    if path == "/v1/messages":
        return told["type"] == "error" and bool(told["error"]["type"])
    return "error" in told if path == "/x" else bool(told["error"]["code"])


@pytest.mark.parametrize("path", ROUTES)
async def test_what_never_became_a_request_is_refused_in_the_layout_of_its_route(path):
    limits = Limits(tick=0.02, body_bytes=1000, head_bytes=2000, header_timeout=0.2)
    asked = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n".encode()
    sent = {
        413: asked + b"Content-Length: 2000\r\n\r\n",
        400: asked + b"no header\r\n\r\n",
        431: asked + b"A: " + b"x" * 3000 + b"\r\n\r\n",
        408: asked,
    }
    async with fronted(keep=model(), limits=limits) as (front, upstream):
        for status, data in sent.items():
            got, headers, body = split_answer(await raw(front.port, data))

            assert (got, headers[b"content-type"]) == (status, b"application/json")
            assert layout(path, body)

        in_chunks = asked + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"x" * 2000)
        got, _, body = split_answer(await raw(front.port, in_chunks))
        assert got == 413
        assert layout(path, body)
        assert upstream.requests == [] or path == "/x"


async def test_what_names_no_route_is_refused_in_plain_text():
    async with fronted() as (front, _):
        _, headers, _ = await ask(front.port, b"\x16\x03\x01\r\n\r\n")

        assert headers[b"content-type"].startswith(b"text/plain")


# --- streams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m", "stranger"])
async def test_proxies_are_told_to_let_every_stream_through(name):
    async with fronted(says(CHAT_STREAM), keep=model()) as (front, _):
        _, headers, body = await ask(front.port, chat(name))

        assert headers[b"x-accel-buffering"] == b"no"
        assert body == CHAT_BODY


async def test_what_a_server_says_about_buffering_stays():
    head = SSE_HEAD.replace(b"\r\n\r\n", b"\r\nX-Accel-Buffering: yes\r\nCache-Control: max-age=1\r\n\r\n")
    async with fronted(says(head + b"0\r\n\r\n"), keep=model()) as (front, _):
        _, headers, _ = await ask(front.port, chat())

        assert (headers[b"x-accel-buffering"], headers[b"cache-control"]) == (b"yes", b"max-age=1")


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("drip", [0, 1])
@pytest.mark.parametrize("state", ["warm", "cold"])
async def test_a_byte_order_mark_stays_at_the_beginning_and_nowhere_else(state, drip):
    marked = stream(BOM + CHAT_BODY) if not drip else stream(*[bytes([byte]) for byte in BOM + CHAT_BODY])
    keep = model(state=state, load_seconds=0.1)
    async with fronted(says(marked), keep=keep, heartbeat=60) as (front, _):
        _, _, body = await ask(front.port, chat())

        assert without_comments(body) == (CHAT_BODY if state == "cold" else BOM + CHAT_BODY)


async def test_who_cannot_read_comments_gets_none_inside_the_answer():
    import asyncio

    async def script(asking):
        await asking.send(SSE_HEAD + chunk(CHAT_BODY.partition(b"\n\n")[0] + b"\n\n"))
        await asyncio.sleep(0.3)
        await asking.send(chunk(CHAT_BODY.partition(b"\n\n")[2]) + b"0\r\n\r\n")

    reasoning = {"heartbeat": 0.02, "heartbeat_mode": Heartbeat.REASONING}
    async with fronted(script, keep=model(state="cold", load_seconds=0.1), **reasoning) as (front, _):
        _, _, body = await ask(front.port, chat())

        assert b"reasoning_content" in body
        assert b": keepalive" not in body
        assert body.endswith(CHAT_BODY)


# --- answers that say nothing -----------------------------------------------------------------------

SILENT = {
    "/v1/chat/completions": (
        b'{"choices":[{"message":{"role":"assistant","content":"","tool_calls":[]},"finish_reason":"stop"}]}',
        b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":"stop"}]}\n\n',
    ),
    "/v1/completions": (
        b'{"choices":[{"text":"","finish_reason":"stop"}]}',
        b'data: {"choices":[{"text":"","finish_reason":"stop"}]}\n\n',
    ),
    "/v1/responses": (
        b'{"output":[],"text":{"format":{"type":"text"}},"status":"completed"}',
        b'data: {"type":"response.completed","response":{"output":[]}}\n\n',
    ),
    "/v1/messages": (b'{"type":"message","content":[]}', b'data: {"type":"message_stop"}\n\n'),
    "/api/v1/chat": (
        b'{"output":[{"type":"message","content":""}]}',
        b'data: {"type":"chat.end","result":{"output":[]}}\n\n',
    ),
}
TOLD = {
    "/v1/chat/completions": b'{"choices":[{"message":{"content":null,"tool_calls":[{"id":"1"}]}}]}',
    "/v1/completions": b'{"choices":[{"text":" "}]}',
    "/v1/responses": b'{"output":[{"type":"function_call","arguments":"{}"}]}',
    "/v1/messages": b'{"type":"message","content":[{"type":"tool_use","id":"1"}]}',
    "/api/v1/chat": b'{"output":[{"type":"reasoning","content":"hm"}]}',
    "/v1/embeddings": b'{"data":[{"embedding":[]}]}',
}


def whole(body):
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


async def outcome_of(path, reply, streaming):
    async with fronted(says(reply), keep=model()) as (front, _):
        flag = b"true" if streaming else b"false"
        await ask(front.port, post(path, b'{"model":"m","stream":%b}' % flag))
        outcome = (await front.last()).outcome
        (ended,) = [
            fact for fact in front.keep.models[ModelId("local", "m")].facts if isinstance(fact, RequestEnded)
        ]
        return outcome, ended.answered


@pytest.mark.parametrize("path", SILENT)
async def test_a_whole_answer_without_one_word_is_empty_and_proves_nothing(path):
    body, events = SILENT[path]

    assert await outcome_of(path, whole(body), False) == ("empty", False)
    assert await outcome_of(path, stream(events), True) == ("empty", False)


async def test_an_answer_of_line_ends_alone_is_empty_and_proves_nothing():
    path, blank = "/v1/chat/completions", b'{"choices":[{"%b":{"content":"\\n\\n "},"finish_reason":"stop"}]}'

    assert await outcome_of(path, whole(blank % b"message"), False) == ("empty", False)
    assert await outcome_of(path, stream(b"data: %b\n\n" % (blank % b"delta")), True) == ("empty", False)


# Thoughts that nobody but their maker can read are thoughts.
SEALED = {
    "/v1/chat/completions": b'{"choices":[{"%b":{"content":"","reasoning_details":[{"data":"eA=="}]}}]}',
    "/v1/responses": b'{"output":[{"type":"reasoning","summary":[],"encrypted_content":"eA==","of":"%b"}]}',
    "/v1/messages": b'{"type":"%b","content":[{"type":"redacted_thinking","data":"eA=="}]}',
}


@pytest.mark.parametrize("path", TOLD)
async def test_a_call_of_a_tool_a_thought_and_a_vector_are_words(path):
    assert await outcome_of(path, whole(TOLD[path]), False) == ("ok", True)


@pytest.mark.parametrize("path", SEALED)
async def test_a_thought_that_cannot_be_read_is_a_word(path):
    event = b"data: %b\n\n" % (SEALED[path] % b"delta")

    assert await outcome_of(path, whole(SEALED[path] % b"message"), False) == ("ok", True)
    outcome, _ = await outcome_of(path, stream(event + SILENT[path][1]), True)
    assert outcome == "ok"


# --- between neighbours -----------------------------------------------------------------------------


async def test_what_is_for_the_next_neighbour_alone_goes_no_further():
    lines = ["Proxy-Authorization: Basic eA==", "Proxy-Connection: keep-alive", "TE: trailers", "X-Hop: 1"]
    further = ["Via: 1.1 nginx", "X-Forwarded-For: 10.0.0.9", "Forwarded: for=10.0.0.9"]
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nTrailer: X\r\nConnection: X-Back\r\nX-Back: 1\r\n\r\n"
    async with fronted(says(reply)) as (front, upstream):
        data = get("/", *lines, *further).replace(b"Connection: close", b"Connection: close, X-Hop")
        _, headers, _ = await ask(front.port, data)
        sent = upstream.requests[0].headers

        assert not {b"proxy-authorization", b"proxy-connection", b"te", b"x-hop"} & sent.keys()
        assert (sent[b"via"], sent[b"x-forwarded-for"]) == (b"1.1 nginx", b"10.0.0.9")
        assert sent[b"forwarded"] == b"for=10.0.0.9"
        assert not {b"trailer", b"x-back"} & headers.keys()


@pytest.mark.parametrize("path", ["/api/v1/models", "/api/v1/models/download/status/job_1"])
async def test_what_is_no_answer_of_a_model_need_have_no_word(path):
    async with fronted(says(whole(b'{"models": [{"key": "m"}]}'))) as (front, _):
        await ask(front.port, get(path))

        assert (await front.last()).outcome == "ok"
