"""The client in Python: before the real daemon, and before servers that send whatever comes to their mind."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from keepalive.client import (
    AnswerFailed,
    Chunk,
    Client,
    ClientError,
    ConnectionFailed,
    Done,
    Event,
    ModelLoading,
    Prompt,
    Reasoning,
    RequestRefused,
    Start,
    StreamBroken,
)
from keepalive.core.errors import KeepaliveError
from keepalive.service.daemon import Daemon
from keepalive.simulator.models import SimModel
from tests.kit.live import daemon, loads, settings, simulator, until
from tests.kit.raw import Close, Fin, RawServer, Read, Rst, Sleep, answer, chunked, epilogue, stream_of

KEY = "acme/x"
PROMPTS = f"""
[[prompts]]
id = 28
title = "Simple test"
model = "{KEY}"
content = "Explain {{{{topic}}}} to a {{{{ who }}}}."
max_tokens = 5
"""
ASKED: dict[str, Any] = {"variables": {"topic": "SSE", "who": "nurse"}}
MESSAGES = [{"role": "user", "content": "hello"}]


def data(**event: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps(event).encode()


START = data(
    type="start", promptId=28, promptTitle="Simple test", modelId="m", modelName="M", lmStudioModelId="m:2"
)
LOADING = data(type="model_loading", message="Loading m", estimatedTime=93200, elapsed=31200)
CHUNK = data(type="chunk", content="Olá 🙂", chunkNumber=1)
DONE = data(type="done", totalChunks=1, duration=1500, outputLength=5)
STREAM = (START, LOADING, b": keep-alive\n\n", data(type="reasoning", content="hm"), CHUNK, DONE)
TOLD = [
    Start(28, "Simple test", "m", "M", "m:2"),
    ModelLoading("Loading m", 31.2, 93.2),
    Reasoning("hm"),
    Chunk("Olá 🙂", 1),
    Done(1, 1.5, 5),
]


def url(server: RawServer) -> str:
    return f"http://127.0.0.1:{server.port}"


async def collect(events: AsyncGenerator[Any]) -> list[Any]:
    return [event async for event in events]


@contextlib.asynccontextmanager
async def asking(*script: Any, **how: Any) -> AsyncIterator[tuple[Client, RawServer]]:
    """A client before a server that plays `script`; afterwards nothing is left open."""
    async with epilogue(), RawServer(script) as server, Client(url(server), **how) as client:
        yield client, server


async def collect_into(got: list[Any], events: AsyncGenerator[Any]) -> None:
    """What comes before it raises counts, too."""
    async for event in events:
        got.append(event)  # noqa: PERF401


@contextlib.asynccontextmanager
async def kept(*, load_seconds: float, **faults: Any) -> AsyncIterator[tuple[Daemon, Client]]:
    """A daemon before a simulator, and a client."""
    async with simulator(SimModel(KEY, load_seconds=load_seconds), **faults) as upstream:
        async with daemon(settings(upstream.url, KEY) + PROMPTS) as running, Client(running.url) as client:
            yield running, client
        assert loads(upstream.studio) == 1


# --- before the daemon ------------------------------------------------------------------------------


async def test_a_prompt_is_streamed_from_a_cold_model() -> None:
    async with kept(load_seconds=1.5) as (_, client):
        told: list[Event] = await collect(client.stream_prompt(28, ASKED["variables"]))

    assert told[0] == Start(28, "Simple test", KEY, KEY, KEY)
    waits = [event for event in told if isinstance(event, ModelLoading)]
    assert len(waits) >= 2
    assert waits[-1].message == "Loading acme/x"
    assert 0 < waits[-1].elapsed_seconds < 60
    chunks = [event for event in told if isinstance(event, Chunk)]
    assert chunks == [
        Chunk("This", 1),
        Chunk(" answer", 2),
        Chunk(" comes", 3),
        Chunk(" from", 4),
        Chunk(" a", 5),
    ]
    done = told[-1]
    assert isinstance(done, Done)
    assert (done.chunks, done.characters) == (5, 24)
    assert done.seconds >= 1


async def test_a_chat_is_streamed_in_the_same_events() -> None:
    async with simulator(SimModel(KEY, load_seconds=1.0)) as upstream:
        text = settings(upstream.url, KEY, server='heartbeat = "100ms"\nheartbeat_mode = "reasoning"')
        async with daemon(text) as running, Client(running.url + "/v1/") as client:
            told = await collect(client.stream_chat(KEY, MESSAGES, max_tokens=3))
            again = await collect(client.stream_chat(KEY, MESSAGES, max_tokens=3))

    waits = [event for event in told if isinstance(event, ModelLoading)]
    assert waits[-1].message == "acme/x is loading"
    assert told[len(waits) : -1] == [Chunk("This", 1), Chunk(" answer", 2), Chunk(" comes", 3)]
    assert isinstance(told[-1], Done)
    assert (told[-1].chunks, told[-1].characters) == (3, 17)
    assert [type(event) for event in again] == [Chunk, Chunk, Chunk, Done]


async def test_prompts_are_listed_and_models_warmed_up() -> None:
    async with kept(load_seconds=0.3) as (_, client):
        seconds = await client.warmup(KEY)
        prompts = await client.prompts()
        inline = await collect(client.stream_prompt(prompt="Say {{x}}", model=KEY, variables={"x": 1}))
        with pytest.raises(RequestRefused) as unknown:
            await client.warmup("acme/y")
        with pytest.raises(RequestRefused) as missing:
            await collect(client.stream_prompt(28, {"topic": "SSE"}))

    assert 0 <= seconds < 60
    assert prompts == [Prompt(28, "Simple test", KEY, ("topic", "who"), 5)]
    assert inline[0] == Start(None, None, KEY, KEY, KEY)
    assert (unknown.value.status, unknown.value.code) == (404, "model_not_found")
    assert unknown.value.field == "modelId"
    assert (missing.value.status, missing.value.field) == (400, "variables.who")
    assert str(missing.value) == "variables.who: is missing"


async def test_who_does_not_want_to_wait_is_told_when_to_come_again() -> None:
    async with kept(load_seconds=60.0) as (_, client):
        with pytest.raises(RequestRefused) as refused:
            await client.warmup(KEY, wait=0.2)
        with pytest.raises(AnswerFailed) as late:
            await collect(client.stream_prompt(28, ASKED["variables"], first_chunk_timeout=0.1))

    assert refused.value.status == 503
    assert refused.value.retry_after is not None
    assert refused.value.retry_after >= 1
    assert late.value.code == "timeout"


async def test_a_client_with_a_key_is_let_in() -> None:
    auth = '[auth]\nclient_keys = [{ name = "ward", env = "WARD" }]\n'
    async with simulator(SimModel(KEY)) as upstream:
        text = settings(upstream.url, KEY) + PROMPTS + auth
        async with daemon(text, environ={"WARD": "s3cret"}) as running:
            async with Client(running.url, key="s3cret") as client:
                told = await collect(client.stream_prompt(28, ASKED["variables"]))
            async with Client(running.url) as client:
                with pytest.raises(RequestRefused) as refused:
                    await collect(client.stream_prompt(28, ASKED["variables"]))
                with pytest.raises(RequestRefused) as chat:
                    await collect(client.stream_chat(KEY, MESSAGES))

    assert isinstance(told[-1], Done)
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
    assert (chat.value.status, chat.value.code) == (401, "invalid_api_key")


async def test_one_client_has_as_many_streams_at_once_as_it_likes() -> None:
    async with kept(load_seconds=0.5, parallel=150, token_seconds=0.0) as (_, client):
        streams = [client.stream_prompt(28, ASKED["variables"]) for _ in range(150)]
        told = await asyncio.gather(*map(collect, streams))

    assert [(events[-1].chunks, events[-1].characters) for events in told] == [(5, 24)] * 150


# --- bytes ------------------------------------------------------------------------------------------


async def test_what_is_asked_is_one_small_json() -> None:
    async with asking(stream_of(*STREAM), Close()) as (client, server):
        await collect(client.stream_prompt(28, {"a": 1}, model="n", max_tokens=5, first_chunk_timeout=1.5))
        head, _, body = server.requests[0].partition(b"\r\n\r\n")

    assert head.startswith(b"POST /api/prompts/execute/stream HTTP/1.1\r\n")
    assert b"content-type: application/json" in head.lower()
    assert json.loads(body) == {
        "promptId": 28,
        "variables": {"a": 1},
        "modelId": "n",
        "maxTokens": 5,
        "timeout": 1500,
    }


async def test_the_stream_reads_the_same_wherever_it_is_cut() -> None:
    whole = stream_of(*STREAM)
    begin = whole.index(b"\r\n\r\n") + 4
    scripts = [(whole[:at], Sleep(0.001), whole[at:], Close()) for at in range(begin, len(whole))]
    async with epilogue(), RawServer(*scripts) as server, Client(url(server)) as client:
        for _ in scripts:
            assert await collect(client.stream_prompt(28)) == TOLD


@pytest.mark.parametrize("end", [b"\r\n", b"\r", b"\n"])
async def test_the_stream_reads_the_same_with_any_line_end_and_byte_by_byte(end: bytes) -> None:
    body = b"\xef\xbb\xbf" + b"".join(STREAM).replace(b"\n", end)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n"
    pieces = [step for byte in body for step in (bytes([byte]), Sleep(0.0))]
    async with asking(head, *pieces, Close()) as (client, _):
        assert await collect(client.stream_prompt(28)) == TOLD


async def test_kinds_of_events_that_come_later_are_passed_over() -> None:
    later = (data(type="later", x=1), b'event: ping\ndata: {"type":"ping"}\n\n')
    async with asking(stream_of(START, *later, CHUNK, DONE), Close()) as (client, _):
        assert await collect(client.stream_prompt(28)) == [TOLD[0], TOLD[3], TOLD[4]]


def delta(**fields: Any) -> bytes:
    return data(choices=[{"index": 0, "delta": fields, "finish_reason": None}])


STOP = data(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
HEARTBEATS = (
    b": keepalive model=m state=cold elapsed=0.0\n\n"
    b": keepalive model=m state=loading elapsed=12.0 eta=96.4\n\n"
    b": keepalive model=m state=warm elapsed=120.0\n\n"
    b": somebody else's\n\n"
)
CHAT = (HEARTBEATS, delta(role="assistant"), delta(reasoning_content="hm"), delta(content="yes"), STOP)


@pytest.mark.parametrize(
    "script",
    [
        (stream_of(*CHAT, b"data: [DONE]\n\n"), Close()),
        (stream_of(*CHAT), Close()),
        (stream_of(*CHAT, b"data: [DONE]\n\n", end=False), Fin()),
        (stream_of(*CHAT, b"data: [DONE]\n\n", delta(content="more")), Close()),
    ],
    ids=["whole", "without [DONE]", "cut behind [DONE]", "more behind [DONE]"],
)
async def test_a_chat_tells_of_the_wait_of_thoughts_and_of_its_end(script: Any) -> None:
    async with asking(*script) as (client, _):
        told = await collect(client.stream_chat("m", MESSAGES))

    assert told[:-1] == [
        ModelLoading("m is cold", 0.0, None),
        ModelLoading("m is loading", 12.0, 108.4),
        Reasoning("hm"),
        Chunk("yes", 1),
    ]
    assert isinstance(told[-1], Done)
    assert (told[-1].chunks, told[-1].characters) == (1, 3)


# --- what goes wrong ----------------------------------------------------------------------------------


def test_all_that_can_go_wrong_is_one_family() -> None:
    kinds = (ConnectionFailed, RequestRefused, AnswerFailed, StreamBroken)

    assert all(issubclass(kind, ClientError) for kind in kinds)
    assert issubclass(ClientError, KeepaliveError)


async def test_nobody_there_is_a_connection_that_failed() -> None:
    async with RawServer([Close()]) as server:
        port = server.port
    async with Client(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(ConnectionFailed, match="does not answer"):
            await collect(client.stream_prompt(28))
        with pytest.raises(ConnectionFailed):
            await client.prompts()


@pytest.mark.parametrize(
    "script", [(Read(), Close()), (Read(), Rst()), (b"HTTP/1.1 200 O", Fin()), (b"SSH\r\n\r\n", Close())]
)
async def test_an_answer_that_never_began_is_a_connection_that_failed(script: Any) -> None:
    async with asking(*script) as (client, _):
        with pytest.raises(ConnectionFailed):
            await collect(client.stream_prompt(28))


REFUSALS: list[tuple[bytes, dict[str, Any]]] = [
    (
        answer(b'{"success":false,"error":{"message":"no","code":"c","field":"f"}}', b"404 Not Found"),
        {"message": "no", "status": 404, "code": "c", "field": "f", "retry_after": None},
    ),
    (
        answer(b'{"error":{"message":"late","code":"model_not_ready"}}', b"503 X\r\nRetry-After: 7"),
        {"message": "late", "status": 503, "code": "model_not_ready", "field": None, "retry_after": 7.0},
    ),
    (
        answer(b'{"error":"flat"}'),  # LM Studio itself, which answers unknown routes so
        {"message": "flat", "status": 200, "code": None, "field": None, "retry_after": None},
    ),
    (
        answer(b"<html>", b"502 Bad Gateway", b"text/html"),
        {"message": "the answer is 502 Bad Gateway", "status": 502},
    ),
    (answer(b"", b"302 Found\r\nLocation: http://127.0.0.1:1/"), {"status": 302}),
    (answer(b"[" * 100_000, b"500 Oops"), {"status": 500, "message": "the answer is 500 Oops"}),
]


@pytest.mark.parametrize(("said", "told"), REFUSALS)
@pytest.mark.parametrize("how", ["prompt", "chat", "warmup"])
async def test_a_refusal_says_what_the_answer_says(said: bytes, told: dict[str, Any], how: str) -> None:
    async with asking(said, Close()) as (client, _):
        ways: dict[str, Callable[[], Awaitable[object]]] = {
            "prompt": lambda: collect(client.stream_prompt(28)),
            "chat": lambda: collect(client.stream_chat("m", MESSAGES)),
            "warmup": lambda: client.warmup("m"),
        }
        with pytest.raises(RequestRefused) as refused:
            await ways[how]()

    found = {name: getattr(refused.value, name, str(refused.value)) for name in told}
    assert found == told


@pytest.mark.parametrize(
    "script",
    [
        (stream_of(START, CHUNK), Close()),
        (stream_of(START, CHUNK, end=False), Fin()),
        (stream_of(START, CHUNK, end=False), Sleep(0.1), Rst()),
        (stream_of(START, CHUNK, DONE[:-2]), Close()),
        (stream_of(START, CHUNK, b"data: {\n\n"), Close()),
        (stream_of(START, CHUNK, b"data: 7\n\n"), Close()),
        (stream_of(START, CHUNK, b'data: {"type":"chunk"}\n\n'), Close()),
        (stream_of(START, CHUNK, LOADING.replace(b"31200", b'"x"')), Close()),
        (stream_of(START, CHUNK, b"data: " + b"[" * 100_000 + b"\n\n"), Close()),
        (stream_of(START, CHUNK, b"data: " + b"x" * 17_000_000), Close()),
    ],
    ids=["no end", "fin", "reset", "half end", "half json", "number", "no content", "time", "deep", "long"],
)  # fmt: skip
async def test_a_stream_that_is_broken_says_so_after_what_came_whole(script: Any) -> None:
    got: list[Any] = []
    async with asking(*script) as (client, _):
        with pytest.raises(StreamBroken):
            await collect_into(got, client.stream_prompt(28))

    assert got == [TOLD[0], TOLD[3]]


async def test_an_error_event_is_raised_with_its_code() -> None:
    error = data(type="error", message="the upstream's answer was cut", code="upstream_cut")
    async with asking(stream_of(START, error), Close()) as (client, _):
        with pytest.raises(AnswerFailed, match="answer was cut") as failed:
            await collect(client.stream_prompt(28))

    assert failed.value.code == "upstream_cut"


@pytest.mark.parametrize(
    ("end", "kind", "words"),
    [
        (b'data: {"error":{"message":"crashed","code":"x"}}\n\n', AnswerFailed, "crashed"),
        (b"data: {\n\n", StreamBroken, "not what a daemon sends"),
        (b"", StreamBroken, "before the answer was whole"),
    ],
)
async def test_a_chat_that_goes_wrong_says_so(end: bytes, kind: type[ClientError], words: str) -> None:
    got: list[Any] = []
    async with asking(stream_of(delta(content="a"), *([end] if end else [])), Close()) as (client, _):
        with pytest.raises(kind, match=words):
            await collect_into(got, client.stream_chat("m", MESSAGES))

    assert got == [Chunk("a", 1)]


async def test_silence_is_borne_unless_a_bound_was_asked_for() -> None:
    script = (stream_of(START, end=False), Sleep(0.5), chunked(CHUNK, DONE), Close())
    async with asking(*script) as (client, _):
        assert await collect(client.stream_prompt(28)) == [TOLD[0], TOLD[3], TOLD[4]]
    async with asking(*script, idle_timeout=0.1) as (client, _):
        with pytest.raises(StreamBroken):
            await collect(client.stream_prompt(28))


# --- leaving ------------------------------------------------------------------------------------------


def open_stream(client: Client, route: str) -> AsyncGenerator[Any]:
    return client.stream_prompt(28) if route == "prompt" else client.stream_chat("m", MESSAGES)


UNENDING = {"prompt": stream_of(START, CHUNK, end=False), "chat": stream_of(delta(content="a"), end=False)}


@pytest.mark.parametrize("route", ["prompt", "chat"])
@pytest.mark.parametrize("how", ["break", "aclose", "cancel", "timeout", "raise", "client"])
async def test_a_stream_that_is_left_is_over_at_once_for_the_other_side(route: str, how: str) -> None:
    async with asking(UNENDING[route], Sleep(0)) as (client, server):
        match how:
            case "break":
                async for _ in open_stream(client, route):
                    break
            case "aclose":
                events = open_stream(client, route)
                await anext(events)
                await events.aclose()
            case "raise":
                with contextlib.suppress(ZeroDivisionError):
                    async for _ in open_stream(client, route):
                        1 / 0  # noqa: B018
            case "client":
                events = open_stream(client, route)
                await anext(events)
                await client.aclose()
                with pytest.raises(StreamBroken):
                    await collect(events)
            case "timeout":
                events = open_stream(client, route)
                with pytest.raises(TimeoutError):  # noqa: PT012
                    async with asyncio.timeout(None) as limit:
                        await anext(events)
                        limit.reschedule(asyncio.get_running_loop().time() + 0.1)
                        await collect(events)
            case "cancel":
                task = asyncio.create_task(collect(open_stream(client, route)))
                await until(lambda: server.requests, "it was asked")
                await asyncio.sleep(0.1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        await until(lambda: server.connections[0].ended, "the server sees the end")


@pytest.mark.parametrize("phase", ["answer", "load", "chunks"])
async def test_a_daemon_hears_of_it_and_tells_lm_studio(phase: str) -> None:
    faults = {"prompt_seconds": 60.0} if phase == "answer" else {"answer_tokens": 5000}
    load = 60.0 if phase == "load" else 0.1
    async with simulator(
        SimModel(KEY, load_seconds=load), **faults, prompt_finishes_after_disconnect=False
    ) as upstream:
        text = settings(upstream.url, KEY, defaults='ping_interval = "1h"\nlease = "5h"')
        async with daemon(text) as running, Client(running.url) as client:
            if phase == "answer":
                upstream.studio.set_faults(prompt_seconds=0.0)
            if phase != "load":
                await client.warmup(KEY)
            if phase == "answer":
                upstream.studio.set_faults(prompt_seconds=60.0)
            wanted = {"answer": Start, "load": ModelLoading, "chunks": Chunk}[phase]
            async for event in client.stream_prompt(prompt="x", model=KEY):
                if isinstance(event, wanted):
                    if phase == "answer":
                        await until(lambda: upstream.studio.in_flight, "it works on it")
                    break
            model = lambda: running.status()["models"][0]  # noqa: E731
            await until(lambda: not model()["in_flight"] and not model()["waiting"], "the daemon knows")
            if phase != "load":
                await until(lambda: not upstream.studio.in_flight, "LM Studio knows")
