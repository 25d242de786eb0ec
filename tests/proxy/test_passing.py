"""What passes through, unchanged."""

import asyncio
from dataclasses import replace

import pytest

from keepalive.core.errors import UpstreamError
from keepalive.lmstudio.client import Client
from keepalive.proxy import Address
from tests.kit.fronted import (
    CHAT_BODY,
    CHAT_STREAM,
    Keep,
    ask,
    chat,
    fronted,
    get,
    says,
)


async def test_a_get_passes():
    async with fronted() as (front, upstream):
        status, headers, body = await ask(front.port, get("/v1/models?x=%E9&y", "X-Mine: 1"))

        assert (status, body) == (200, b"fine")
        assert headers[b"content-type"] == b"text/plain"
        assert upstream.requests[0].head.startswith(b"GET /v1/models?x=%E9&y HTTP/1.1\r\n")
        assert upstream.requests[0].headers[b"x-mine"] == b"1"
        assert b"connection" not in upstream.requests[0].headers


async def test_a_stream_of_a_warm_model_passes_byte_for_byte():
    keep = Keep()
    keep.add("m")
    async with fronted(says(CHAT_STREAM), keep=keep) as (front, _):
        status, headers, body = await ask(front.port, chat())

        assert (status, body) == (200, CHAT_BODY)
        assert headers[b"x-keepalive-model-state"] == b"warm"
        assert b"wait;dur=0.0" in headers[b"server-timing"]
        seen = await front.last()
        assert (seen.outcome, seen.start, seen.route, seen.status) == ("ok", "warm", "chat", 200)


async def test_an_upstream_that_stands_under_a_path_is_asked_there():
    websocket = get("/llm", "Upgrade: websocket").replace(b"Connection: close", b"Connection: close, Upgrade")
    async with fronted() as (front, upstream):
        address = Address(f"http://127.0.0.1:{upstream.port}/team/lm")
        front.proxy.configure(replace(front.proxy.settings, upstreams={"local": address}))
        await ask(front.port, get("/v1/models?x=1"))
        await ask(front.port, chat("stranger"))
        await ask(front.port, websocket)
        await ask(front.port, get("*").replace(b"GET", b"OPTIONS"))
        client = Client("local", address.url)
        with pytest.raises(UpstreamError):
            await client.listing()
        await client.close()

        asked = [asking.head.split(b" ")[1] for asking in upstream.requests]
        assert asked[:4] == [
            b"/team/lm/v1/models?x=1",
            b"/team/lm/v1/chat/completions",
            b"/team/lm/llm",
            b"*",
        ]
        assert asked[4:] == [b"/team/lm/lmstudio-greeting"]


def unless_silent(body):
    """An upstream that says this, and below `/silent/` nothing at all."""

    async def answer(asking):
        if b"/silent/" in asking.head:
            await asking.left()
        else:
            await says(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))(asking)

    return answer


@pytest.mark.clock_jumps
async def test_a_server_that_is_known_to_be_away_keeps_the_models_of_the_others_from_nobody():
    took, loop = [], asyncio.get_running_loop()
    async with fronted(unless_silent(b'{"data":[{"id": "m"}]}'), epilogue=False) as (front, upstream):
        here = Address(f"http://127.0.0.1:{upstream.port}")
        both = {"here": here, "silent": Address(f"{here.url}/silent")}
        front.proxy.configure(replace(front.proxy.settings, upstreams=both))
        for away in (set(), {"silent"}):
            front.keep.away = away
            began = loop.time()
            _, _, body = await ask(front.port, get("/v1/models"))
            took.append(round(loop.time() - began))
            assert b'"m"' in body

    assert took == [10, 1]


@pytest.mark.clock_jumps
async def test_who_has_an_answer_that_is_gone_on_from_is_known_as_soon_as_one_says_so():
    loop = asyncio.get_running_loop()
    async with fronted(unless_silent(b'{"id": "resp_1"}'), epilogue=False) as (front, upstream):
        here = Address(f"http://127.0.0.1:{upstream.port}")
        both = {"silent": Address(f"{here.url}/silent"), "here": here}
        front.proxy.configure(replace(front.proxy.settings, upstreams=both))
        began = loop.time()
        _, _, body = await ask(front.port, get("/v1/responses/resp_1"))

        assert body == b'{"id": "resp_1"}'
        assert loop.time() - began < 1
