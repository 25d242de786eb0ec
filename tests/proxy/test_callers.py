"""What callers can do to us: nonsense, slowness, leaving, keys and foreign pages. Each as raw bytes."""

import asyncio
import contextlib
import hashlib
import json
import logging
import socket
import time
from dataclasses import replace

import pytest

from keepalive.core.callers import Key
from keepalive.core.facts import ModelId, RequestEnded
from keepalive.http1 import Limits
from keepalive.proxy import Address
from tests.kit import live
from tests.kit.fronted import (
    CHAT_BODY,
    CHAT_STREAM,
    SSE_HEAD,
    Keep,
    ask,
    chat,
    chunk,
    delta,
    fronted,
    get,
    leave,
    post,
    raw,
    says,
    split_answer,
)

BOTH_LOOPS = True
CANARY = b"sk-canary-7f3a"


def warm(**how):
    keep = Keep()
    keep.add("m", **how)
    return keep


def now():
    return asyncio.get_running_loop().time()


# --- C1: malformed heads, without echo --------------------------------------------------------------

MALFORMED = [
    b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: %b\x00\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: " + b"a" * 70_000 + b"%b\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n%b is no size\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %b\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\nA: %b\r\n\r\n",
    b"GET /%b HTTP/3.0\r\nHost: x\r\n\r\n",
    b"GET /a\xff%b HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n %b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: %b@x\r\n\r\n",
    b"%b\r\n\r\n",
    b"GET http://%b/ HTTP/1.1\r\nHost: x\r\n\r\n",
]


@pytest.mark.parametrize("template", MALFORMED, ids=range(len(MALFORMED)))
@pytest.mark.parametrize("drip", [0, 1])
async def test_c1_malformed_heads_are_refused_without_echo_and_reach_nobody(template, drip, caplog):
    caplog.set_level(logging.DEBUG)
    data = template.replace(b"%b", CANARY)
    if drip and len(data) > 1000:
        drip = 997
    async with fronted(keep=warm()) as (front, upstream):
        answer = await raw(front.port, data, drip=drip)

        assert split_answer(answer)[0] in (400, 414, 431, 501, 505)
        assert b"Connection: close\r\n" in answer
        assert CANARY not in answer
        assert CANARY.decode() not in caplog.text
        assert upstream.requests == []


async def test_c1_a_refused_request_is_never_two():
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
    heads = [
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nContent-Length: 44\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA: b\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: localhost\r\nX:\r\n y\r\n\r\n",
    ]
    async with fronted() as (front, upstream):
        for head in heads:
            answer = await raw(front.port, head + smuggled)
            assert answer.count(b"HTTP/1.1 ") == 1
        # Where in what was read a body in chunks ended is not known: nothing behind it is a request.
        answer = await raw(
            front.port,
            b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled,
        )
        assert answer.count(b"HTTP/1.1 ") == 1

        assert [asking.head.split(b" ")[1] for asking in upstream.requests] == [b"/"]


async def test_requests_sent_ahead_are_answered_one_after_the_other():
    async def script(asking):
        path = asking.head.split(b" ")[1]
        await asyncio.sleep(0.02)
        await asking.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(path), path))

    ahead = b"".join(
        b"POST /%d HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nGET /" % number
        for number in range(10)
    )
    async with fronted(script) as (front, upstream):
        answer = await raw(front.port, ahead + get("/last"))

        assert [part[-2:] for part in answer.split(b"HTTP/1.1 200")][1:-1] == [b"/%d" % n for n in range(10)]
        assert answer.endswith(b"/last")
        assert upstream.bodies[:10] == [b"GET /"] * 10


# --- C2, C6: leaving --------------------------------------------------------------------------------


async def has_left(front):
    """A busy machine may be late. A caller whose leaving went unnoticed would stay for ever."""
    await live.until(lambda: not front.proxy.in_progress, "the caller is seen to have left")


def drained(listening):
    """Reads what the kernel held of the only connection, up to its end."""
    with listening.accept()[0] as connection, contextlib.suppress(ConnectionResetError):
        connection.settimeout(live.PATIENCE)
        while connection.recv(1 << 20):
            pass


@pytest.mark.parametrize("how", ["close", "half-close", "reset"])
@pytest.mark.parametrize("phase", ["silence", "head", "stream", "upload", "stuck upload", "json"])
async def test_c2_leaving_is_noticed_in_every_phase_and_the_upstream_told(how, phase, request):
    told = asyncio.Event()

    async def script(asking):
        if phase in ("head", "stream"):
            await asking.send(SSE_HEAD + (chunk(delta("a")) if phase == "stream" else b""))
        if phase == "json":
            await asking.send(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"id"')
        await asking.left()
        told.set()

    # The kernel answers for it, and nobody reads: an upload gets stuck in the buffers.
    stuck = socket.create_server(("127.0.0.1", 0))
    request.addfinalizer(stuck.close)
    upstreams = {"local": Address(f"http://127.0.0.1:{stuck.getsockname()[1]}")}
    async with fronted(script, keep=warm(), upstreams=upstreams if phase == "stuck upload" else None) as (
        front,
        upstream,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        if phase == "upload":
            writer.write(b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nabc")
        elif phase == "stuck upload":
            writer.write(b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000000\r\n\r\n")
            for _ in range(200):
                writer.write(b"x" * 65536)
                await asyncio.sleep(0)
                if writer.transport.get_write_buffer_size():
                    break
        else:
            writer.write(chat(stream=phase != "json"))
        await live.until(lambda: front.proxy.in_progress == 1, "the request has begun")
        if phase == "stuck upload":
            await live.stands_still(writer.transport.get_write_buffer_size)
            how = "reset"  # a FIN waits behind what cannot be sent
        elif phase != "upload":
            await live.until(lambda: upstream.requests, "the upstream was asked")
        if phase in ("head", "stream", "json"):
            await reader.readuntil({"head": b"\r\n\r\n", "stream": b"\n\n\r\n", "json": b'{"id"'}[phase])
        leave(writer, how)

        await has_left(front)
        if phase == "stuck upload":
            await asyncio.to_thread(drained, stuck)
        elif phase != "upload":
            async with asyncio.timeout(live.PATIENCE):
                await told.wait()
        assert (await front.last()).outcome == "client_gone"
        writer.transport.abort()
    stuck.close()


async def test_c2_forty_instants():
    async def script(asking):
        await asyncio.sleep(0.01)
        await asking.send(SSE_HEAD)
        for _ in range(10):
            await asyncio.sleep(0.002)
            await asking.send(chunk(delta("a")))
        await asking.send(b"0\r\n\r\n")

    async with fronted(script, keep=warm()) as (front, _upstream):
        for instant in range(40):
            _, writer = await asyncio.open_connection("127.0.0.1", front.port)
            data = chat()
            writer.write(data[: len(data) * (instant + 1) // 10])
            await asyncio.sleep(instant * 0.001)
            leave(writer, ("close", "half-close", "reset")[instant % 3])
            await has_left(front)
            writer.close()
        ended = [
            fact for fact in front.keep.models[ModelId("local", "m")].facts if isinstance(fact, RequestEnded)
        ]
        started = len(front.keep.models[ModelId("local", "m")].facts) - len(ended)

        assert len(ended) == started


# --- C4: slow readers -------------------------------------------------------------------------------


async def test_c4_who_does_not_read_slows_the_upstream_and_costs_little():
    sent = 0

    async def script(asking):
        nonlocal sent
        await asking.send(SSE_HEAD)
        piece = chunk((b"data: " + b"x" * 8000 + b"\n\n") * 8)
        while sent < 200_000_000:
            await asking.send(piece)
            sent += len(piece)

    async with fronted(script, keep=warm()) as (front, _upstream):
        sock = socket.create_connection(("127.0.0.1", front.port))
        sock.sendall(chat())
        await live.until(lambda: sent)
        assert await live.stands_still(lambda: sent) < 50_000_000
        connection = next(iter(front.listener.connections))
        assert connection.transport.get_write_buffer_size() < 1_000_000
        sock.close()

        await has_left(front)


# --- C5, C8, C11, C12: bodies -----------------------------------------------------------------------


@pytest.mark.clock_jumps
async def test_c5_a_head_that_never_ends_is_408_and_a_silent_connection_is_closed():
    async with fronted(limits=Limits(tick=0.02, header_timeout=0.3)) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        silent, silent_writer = await asyncio.open_connection("127.0.0.1", front.port)
        began = now()
        writer.write(b"GET / HT")
        got = await reader.read()
        nothing = await silent.read()

        assert got.startswith(b"HTTP/1.1 408 ")
        assert nothing == b""
        assert now() - began == pytest.approx(0.3, abs=0.05)
        writer.close()
        silent_writer.close()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/other"])
async def test_c5_a_body_that_drips_is_cut_off(path):
    limits = Limits(tick=0.02, body_window=0.3, body_rate=1000)
    async with fronted(limits=limits, keep=warm()) as (front, _upstream):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n" % path.encode())

        async def drip():
            for _ in range(100):
                writer.write(b"x")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        got = await reader.read(1000)

        assert got.startswith(b"HTTP/1.1 408 ")
        dripping.cancel()
        writer.close()
        assert (await front.last()).outcome == "rejected"


@pytest.mark.clock_jumps
async def test_c5_a_body_that_is_fast_enough_may_take_long():
    limits = Limits(tick=0.02, body_window=0.1, body_rate=100)
    async with fronted(limits=limits) as (front, upstream):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(
            b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 600\r\nConnection: close\r\n\r\n"
        )
        for _ in range(20):
            writer.write(b"x" * 30)
            await asyncio.sleep(0.03)
        assert split_answer(await reader.read())[0] == 200
        assert upstream.bodies == [b"x" * 600]
        writer.close()


async def test_c8_more_than_the_cap_is_413_before_it_is_read():
    limits = Limits(tick=0.02, body_bytes=10_000)
    async with fronted(limits=limits) as (front, _upstream):
        declared = await ask(front.port, post("/x", b"").replace(b"Length: 0", b"Length: 1000000000000"))
        chunked = await ask(
            front.port,
            b"POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            + chunk(b"x" * 5000) * 1000,
        )

        assert (declared[0], chunked[0]) == (413, 413)


async def test_c8_a_body_that_grows_over_the_cap_is_counted_with_its_reason():
    limits = Limits(tick=0.02, body_bytes=10_000)
    async with fronted(limits=limits, keep=warm()) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head)
        await live.until(lambda: front.proxy.in_progress, "the request has begun")
        writer.write(chunk(b" " * 5000) * 3)

        assert split_answer(await reader.read())[0] == 413
        last = await front.last()
        assert (last.outcome, last.error) == ("rejected", "too_large")
        writer.close()


async def test_c8_a_truncated_body_is_not_forwarded():
    async with fronted(keep=warm()) as (front, upstream):
        _, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(chat()[:-5])
        await live.until(lambda: front.proxy.in_progress, "the request has begun")
        writer.close()
        await front.last()

        assert upstream.requests == []


async def test_c8_100_mb_passes_both_ways_with_the_same_hash():
    block = bytes(range(256)) * 4096
    size = 100 * len(block)

    async def script(asking):
        await asking.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(100):
            await asking.send(block)

    async with fronted(script, limits=Limits(tick=0.02, body_bytes=1 << 28)) as (front, upstream):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(
            b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % size
        )
        for _ in range(100):
            writer.write(block)
            await writer.drain()
        await reader.readuntil(b"\r\n\r\n")
        got = hashlib.sha256()
        while more := await reader.read(1 << 20):
            got.update(more)
        writer.close()

        wanted = hashlib.sha256(block * 100).hexdigest()
        assert hashlib.sha256(upstream.bodies[0]).hexdigest() == wanted
        assert got.hexdigest() == wanted


async def test_c11_a_body_in_chunks_with_extensions_and_trailers_arrives_equal():
    wire = b'3;x="y"\r\n{"m\r\n' + chunk(b'odel":"m"') + chunk(b"}") + b"0\r\nX-T: 1\r\n\r\n"
    data = (
        b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Connection: close\r\n\r\n" + wire
    )
    async with fronted(keep=warm()) as (front, upstream):
        for drip in (0, 1):
            assert (await ask(front.port, data, drip=drip))[0] == 200

        assert upstream.bodies == [b'{"model":"m"}'] * 2


async def test_c11_bodies_in_chunks_are_streamed_on_where_no_model_is_read():
    async with fronted() as (front, upstream):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(
            b"POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        )
        for _ in range(5):
            writer.write(chunk(b"abc"))
            await asyncio.sleep(0.01)
        writer.write(b"0\r\n\r\n")
        assert split_answer(await reader.read())[0] == 200
        writer.close()

        assert upstream.requests[0].headers[b"transfer-encoding"] == b"chunked"
        assert upstream.bodies == [b"abc" * 5]


async def test_c11_a_million_single_byte_chunks_cost_linear_time():
    head = (
        b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n"
        b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    )
    async with fronted(keep=warm()) as (front, upstream):
        bodies, took = [], []
        for size in (30_000, 300_000):
            bodies.append(b'{"model":"m","input":"' + b"x" * size + b'"}')
            wire = b"".join(b"1\r\n%c\r\n" % byte for byte in bodies[-1]) + b"0\r\n\r\n"
            began = time.process_time()
            assert (await ask(front.port, head + wire))[0] == 200
            took.append(time.process_time() - began)

        assert upstream.bodies == bodies
        # Ten times as long for ten times as many. Were each looked at for each, it would be a hundred times.
        assert took[1] < 35 * took[0]


@pytest.mark.clock_jumps
async def test_c12_continue_is_said_once_even_while_the_model_is_cold_and_not_forwarded():
    keep = warm(state="cold", load_seconds=0.5)
    async with fronted(keep=keep) as (front, upstream):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        head, _, body = chat(stream=False).partition(b"\r\n\r\n")
        writer.write(head + b"\r\nExpect: 100-continue\r\n\r\n")
        began = now()
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert now() - began < 0.1
        writer.write(body)
        status, _, got = split_answer(await reader.read())
        writer.close()

        assert (status, got) == (200, b"fine")
        assert b"expect" not in upstream.requests[0].headers


async def test_c12_who_is_refused_is_not_told_to_continue():
    async with fronted(keys=(Key("a", "k"),)) as (front, _upstream):
        head = post("/v1/chat/completions", b"").replace(b"Length: 0", b"Length: 9").partition(b"\r\n\r\n")[0]
        answer = await raw(front.port, head + b"\r\nExpect: 100-continue\r\n\r\n")

        assert answer.startswith(b"HTTP/1.1 401 ")


# --- C14, C17, C18: methods and versions ------------------------------------------------------------


async def test_c14_bytes_that_are_not_ascii_pass_unaltered():
    async with fronted() as (front, upstream):
        await raw(front.port, get("/").replace(b"\r\n\r\n", b"\r\nX-Name: caf\xe9\r\n\r\n"))

        assert upstream.requests[0].headers[b"x-name"] == b"caf\xe9"


@pytest.mark.parametrize(
    "method", [b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE", b"PROPFIND", b"PATCH", b"XYZ"]
)
async def test_c17_every_method_passes_and_loads_nothing(method):
    keep = warm(state="cold", load_seconds=60)
    async with fronted(keep=keep) as (front, upstream):
        answer = await raw(front.port, get("/v1/chat/completions").replace(b"GET", method))

        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"Access-Control" not in answer
        assert answer.endswith(b"\r\n\r\n" if method == b"HEAD" else b"fine")
        assert upstream.requests[0].head.startswith(method + b" /v1/chat/completions HTTP/1.1\r\n")
        assert keep.warm_asked == 0


async def test_options_for_the_server_itself_passes():
    async with fronted() as (front, upstream):
        await raw(front.port, get("*").replace(b"GET", b"OPTIONS"))

        assert upstream.requests[0].head.startswith(b"OPTIONS * HTTP/1.1\r\n")


async def test_c18_http_1_0_is_answered_unchunked_and_closed_with_heartbeats():
    keep = warm(state="cold", load_seconds=0.3)
    async with fronted(says(CHAT_STREAM), keep=keep, heartbeat=0.1) as (front, _):
        data = chat().replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Connection: close\r\n", b"")
        head, _, body = (await raw(front.port, data)).partition(b"\r\n\r\n")

        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"Transfer-Encoding" not in head
        assert b"Connection: close" in head
        assert body.startswith(b": keepalive")
        assert body.endswith(CHAT_BODY)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /a\r\n", 400),
        (b"GET /a HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500, 400),
        (b"EHLO example.org\r\n", 400),
    ],
)
async def test_c18_other_protocols_are_refused(data, status):
    async with fronted() as (front, _):
        answer = await ask(front.port, data)

        assert answer[0] == status
        if data[0] == 0x16:
            assert b"plain HTTP" in answer[2]


# --- C20 to C22: who may ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        ("Origin: https://evil.example",),
        ("Origin: null",),
        ("Sec-Fetch-Site: cross-site",),
        ("Sec-Fetch-Site: same-site", "Origin: http://localhost:3000"),
        ("Origin: https://evil.example", "Content-Type: text/plain"),
    ],
)
async def test_c20_foreign_pages_cause_no_load(headers):
    keep = warm(state="cold")
    async with fronted(keep=keep) as (front, upstream):
        status, _, body = await ask(front.port, chat("m", *headers))

        assert status == 403
        assert b"server.allowed_origins" in body
        assert keep.warm_asked == 0
        assert upstream.requests == []
        last = await front.last()
        assert (last.outcome, last.error) == ("rejected", "origin")


@pytest.mark.parametrize(
    "headers",
    [
        ("Origin: https://mine.example", "Sec-Fetch-Site: cross-site"),
        ("Sec-Fetch-Site: same-origin",),
        ("Sec-Fetch-Site: none",),
        ("Origin: http://localhost",),
        (),
    ],
)
async def test_c20_own_pages_may(headers):
    async with fronted(
        says(CHAT_STREAM), keep=warm(), allowed_origins=frozenset(["https://mine.example"])
    ) as (front, _):
        assert (await ask(front.port, chat("m", *headers)))[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"evil.example:1235", 403),
        (b"localhost.evil.example", 403),
        (b"127.0.0.1.nip.io", 403),
        (b"localhost:1235", 200),
        (b"127.0.0.1", 200),
        (b"[::1]:1235", 200),
        (b"10.0.0.7", 200),
        (b"mine.example", 200),
        (b"MINE.example.:1", 200),
    ],
)
async def test_c21_names_that_are_not_ours_are_refused(host, status):
    async with fronted(allowed_hosts=frozenset(["mine.example"])) as (front, _upstream):
        got, _, body = await ask(front.port, get("/").replace(b"Host: localhost", b"Host: " + host))

        assert got == status
        assert (b"server.allowed_hosts" in body) == (status == 403)


async def test_c21_a_listener_with_keys_may_have_any_name():
    async with fronted(keys=(Key("a", "k1"),), loopback=False) as (front, _):
        data = get("/", "Authorization: Bearer k1").replace(b"Host: localhost", b"Host: lm.example")
        assert (await ask(front.port, data))[0] == 200


KEYS = (Key("alice", "key-of-alice"), Key("bob", "ключ"))


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Authorization: Bearer wrong",),
        ("Authorization: Bearer key-of-alic",),
        ("Authorization: Bearer key-of-alicee",),
        ("Authorization: Basic key-of-alice",),
        ("Authorization: key-of-alice wrong",),
        ("Authorization: Bearer ",),
        ("x-api-key: nope",),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/v1/chat", "/x"])
async def test_c22_without_a_key_401_in_the_layout_of_the_route_before_the_body(headers, path):
    async with fronted(keep=warm(), keys=KEYS) as (front, upstream):
        data = post(path, b"", *headers).replace(b"Length: 0", b"Length: 100")
        status, got, body = await ask(front.port, data)

        assert status == 401
        assert got[b"www-authenticate"] == b"Bearer"
        assert ("type" in json.loads(body)) == (path == "/v1/messages")
        assert upstream.requests == []


@pytest.mark.parametrize(
    "header",
    [
        "Authorization: Bearer key-of-alice",
        "authorization: bearer key-of-alice",
        "X-Api-Key: key-of-alice",
        "api-key: key-of-alice",
        "Authorization: Basic dXNlcjprZXktb2YtYWxpY2U=",
    ],
)
async def test_c22_the_callers_key_is_replaced_by_the_upstreams_token(header):
    async with fronted(keys=KEYS) as (front, upstream):
        address = Address(f"http://127.0.0.1:{upstream.port}", token="sk-lm-theirs")
        front.proxy.configure(replace(front.proxy.settings, upstreams={"local": address}))
        assert (await ask(front.port, get("/", header)))[0] == 200

        assert upstream.requests[0].headers[b"authorization"] == b"Bearer sk-lm-theirs"
        assert b"key-of-alice" not in upstream.requests[0].head
        assert b"dXNlcjprZXktb2YtYWxpY2U=" not in upstream.requests[0].head
        assert (await front.last()).key == "alice"


async def test_c22_keys_may_be_any_text():
    async with fronted(keys=KEYS) as (front, upstream):
        assert (await ask(front.port, get("/", "Authorization: Bearer ключ")))[0] == 200
        assert b"authorization" not in upstream.requests[0].headers


async def test_without_keys_and_token_a_callers_own_token_passes():
    async with fronted() as (front, upstream):
        await ask(front.port, get("/", "Authorization: Bearer sk-lm-mine"))

        assert upstream.requests[0].headers[b"authorization"] == b"Bearer sk-lm-mine"


async def test_what_a_head_says_is_found_out_anew_once_the_settings_have_changed():
    asked = get("/v1/models", "Authorization: Bearer key-of-alice")
    async with fronted() as (front, upstream):
        settings = front.proxy.settings
        address = f"http://127.0.0.1:{upstream.port}"
        answers = [(await ask(front.port, asked))[0] for _ in range(2)]
        front.proxy.configure(replace(settings, keys=KEYS))
        answers.append((await ask(front.port, asked))[0])
        front.proxy.configure(replace(settings, upstreams={"local": Address(address, token="theirs")}))
        answers.append((await ask(front.port, asked))[0])
        front.proxy.configure(replace(settings, keys=(Key("bob", "of-bob"),)))
        answers.append((await ask(front.port, asked))[0])

        shown = [request.headers.get(b"authorization") for request in upstream.requests]
        assert answers == [200, 200, 200, 200, 401]
        assert shown == [b"Bearer key-of-alice", b"Bearer key-of-alice", None, b"Bearer theirs"]


async def test_a_key_is_shown_nowhere():
    assert "key-of-alice" not in repr(KEYS)
    assert "sk-lm" not in repr(Address("http://x", token="sk-lm"))


# --- C23, connections -------------------------------------------------------------------------------


async def test_c23_many_requests_on_one_connection():
    async with fronted() as (front, upstream):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        request = b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for _ in range(2000):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert await reader.readexactly(4) == b"fine"
        writer.close()

        assert upstream.connections == 1


async def test_more_connections_than_the_cap_wait_in_the_kernel():
    async with fronted(limits=Limits(tick=0.02, connections=5)) as (front, _):
        held = [await asyncio.open_connection("127.0.0.1", front.port) for _ in range(5)]
        while len(front.listener.connections) < 5:
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(ask(front.port, get("/")))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        for _, writer in held:
            writer.close()

        assert (await waiting)[0] == 200


# --- secrets ----------------------------------------------------------------------------------------


async def test_no_secret_is_logged_or_kept(caplog):
    caplog.set_level(logging.DEBUG)
    secret = "canary-prompt-5512"
    async with fronted(says(CHAT_STREAM), keep=warm(), keys=(Key("a", "canary-key"),)) as (front, _):
        body = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"%b"}]}' % secret.encode()
        await ask(
            front.port, post("/v1/chat/completions?q=canary-query", body, "Authorization: Bearer canary-key")
        )

        assert "canary" not in repr(await front.last())
    assert "canary" not in caplog.text


async def test_a_bug_in_the_handler_is_500_and_its_text_stays_out_of_the_log(monkeypatch, caplog):
    async with fronted() as (front, _):

        def broken(name, *, default=True):
            raise RuntimeError("canary")

        front.keep.meaning = broken
        status, _, body = await ask(front.port, chat())
        del front.keep.meaning

        assert status == 500
        assert b"canary" not in body
        assert "canary" not in caplog.text
        assert "http1.handler_failed" in caplog.text


# --- the end ----------------------------------------------------------------------------------------


async def test_d3_stopping_ends_streams_with_an_error_event_and_refuses_new_ones():
    async def script(asking):
        await asking.send(SSE_HEAD + chunk(delta("a")) + chunk(b"data: half"))
        await asking.left()

    keep = warm()
    keep.add("cold", state="cold", load_seconds=60)
    async with fronted(script, keep=keep, epilogue=False) as (front, _upstream):
        kept, writer = await asyncio.open_connection("127.0.0.1", front.port)
        streaming, streaming_writer = await asyncio.open_connection("127.0.0.1", front.port)
        streaming_writer.write(chat())
        begun = await streaming.readuntil(b"\n\n\r\n")
        held = asyncio.create_task(ask(front.port, chat("cold")))
        plain = asyncio.create_task(ask(front.port, chat("cold", stream=False)))
        await live.until(lambda: front.proxy.waiting == 2, "both are held")
        await front.listener.stop_accepting()
        assert await kept.read() == b""
        writer.close()
        front.proxy.stop()
        streamed = split_answer(begun + await streaming.read())
        streaming_writer.close()
        for status, _, body in (streamed, await held):
            assert status == 200
            assert (
                json.loads(body.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]["code"]
                == "shutting_down"
            )
            assert b"half" not in body
        assert (await plain)[0] == 503
        async with asyncio.timeout(live.PATIENCE):
            await front.listener.emptied()
        assert front.proxy.in_progress == 0
