"""WebSockets go through as bytes, both ways, without an idle limit."""

import asyncio
import hashlib

import pytest

from keepalive.http1 import Limits
from keepalive.proxy import Address
from tests.kit import live
from tests.kit.fronted import Keep, fronted, get, raw, says, split_answer

websockets = pytest.importorskip("websockets")
from websockets.asyncio.client import connect  # noqa: E402
from websockets.asyncio.server import serve  # noqa: E402

BOTH_LOOPS = True
QUICK = Limits(tick=0.02, header_timeout=0.2, body_window=0.1)


class Echo:
    def __init__(self):
        self.closed = None

    async def __aenter__(self):
        async def handler(socket):
            try:
                async for message in socket:
                    await socket.send(message)
            finally:
                self.closed = socket.close_code

        self._server = await serve(handler, "127.0.0.1", 0, max_size=None, compression=None)
        self.upstreams = {"local": Address(f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}")}
        return self

    async def __aexit__(self, *exc):
        self._server.close()
        await self._server.wait_closed()


async def test_u28_frames_of_any_size_come_back_and_close_codes_arrive():
    async with Echo() as echo, fronted(upstreams=echo.upstreams, limits=QUICK) as (front, _):
        async with connect(f"ws://127.0.0.1:{front.port}/llm", max_size=None, proxy=None) as socket:
            for size in (0, 1, 125, 126, 65_535, 65_536, 5 << 20, 64 << 20):
                message = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
                await socket.send(message)
                assert hashlib.sha256(await socket.recv()).digest() == hashlib.sha256(message).digest()
            await (await socket.ping())
            await asyncio.sleep(0.5)  # longer than every limit there is for requests
            await socket.send("still there")
            assert await socket.recv() == "still there"
            await socket.close(4001, "mine")
            await live.until(lambda: echo.closed is not None, "the other side was told")

        assert echo.closed == 4001
        assert (await front.last()).outcome == "ok"


async def test_u28_many_small_frames_in_order():
    async def send(socket):
        for number in range(20_000):
            await socket.send(str(number))

    async with (
        Echo() as echo,
        fronted(upstreams=echo.upstreams, limits=QUICK) as (front, _),
        connect(f"ws://127.0.0.1:{front.port}/llm", proxy=None) as socket,
    ):
        sending = asyncio.create_task(send(socket))
        for number in range(20_000):
            assert await socket.recv() == str(number)
        await sending
        await socket.close()


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 4\r\nX-Their: 1\r\n\r\nnope",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nX-Their: 1\r\n\r\nnope",
        b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 4\r\nX-Their: 1\r\n\r\nnope",
    ],
)
async def test_u28_a_refused_upgrade_passes_as_it_is(reply):
    async with fronted(says(reply)) as (front, upstream):
        data = get("/llm", "Upgrade: websocket", "Sec-WebSocket-Key: x").replace(
            b"Connection: close", b"Connection: Upgrade"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(4)
        writer.close()

        assert head.startswith(reply.split(b"\r\n")[0])
        assert b"X-Their: 1" in head
        assert body == b"nope"
        assert upstream.requests[0].headers[b"upgrade"] == b"websocket"
        assert upstream.requests[0].headers[b"connection"] == b"Upgrade"


UPGRADE = get("/llm", "Upgrade: websocket").replace(b"Connection: close", b"Connection: keep-alive, Upgrade")
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-A: b\r\n\r\n"


async def test_bytes_that_come_with_the_heads_are_not_lost():
    async def script(asking):
        await asking.send(SWITCH + b"first from there")
        assert await asking.reader.readexactly(16) == b"first from here!"
        await asking.send(b"ok")
        await asking.left()

    async with fronted(script) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(UPGRADE + b"first from here!")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert b"X-A: b" in head
        assert await reader.readexactly(18) == b"first from thereok"
        writer.close()


@pytest.mark.parametrize("first", ["caller", "upstream"])
async def test_u28_a_half_close_passes_and_the_other_direction_goes_on(first):
    async def script(asking):
        await asking.send(SWITCH)
        if first == "upstream":
            asking.writer.write_eof()
            assert await asking.reader.read(100) == b"after"
        else:
            assert await asking.reader.read() == b""
            await asking.send(b"after")
        asking.cut()

    async with fronted(script) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(UPGRADE)
        await reader.readuntil(b"\r\n\r\n")
        if first == "caller":
            writer.write_eof()
            assert await reader.read() == b"after"
        else:
            assert await reader.read() == b""
            writer.write(b"after")
        await asyncio.sleep(0.05)
        writer.close()
        assert (await front.last()).route == "sdk"


@pytest.mark.parametrize("who", ["caller", "upstream"])
@pytest.mark.parametrize("how", ["cut", "reset"])
async def test_u28_a_tunnel_cut_by_either_side_ends_on_both(who, how):
    told = asyncio.Event()

    async def script(asking):
        await asking.send(SWITCH)
        if who == "upstream":
            asking.cut() if how == "cut" else asking.reset()
        else:
            await asking.left()
            told.set()

    async with fronted(script) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(UPGRADE)
        await reader.readuntil(b"\r\n\r\n")
        if who == "upstream":
            assert await reader.read() == b""
        else:
            writer.transport.abort()
            async with asyncio.timeout(live.PATIENCE):
                await told.wait()
        writer.close()


async def test_a_tunnel_keeps_pace_with_who_reads_slowly():
    sent = 0

    async def script(asking):
        nonlocal sent
        await asking.send(SWITCH)
        while sent < 200_000_000:
            await asking.send(b"x" * 65536)
            sent += 65536

    async with fronted(script) as (front, _):
        _reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.transport.pause_reading()
        writer.write(UPGRADE)
        await live.until(lambda: sent)

        assert await live.stands_still(lambda: sent) < 50_000_000
        writer.transport.abort()


async def test_other_upgrades_are_not_offered_to_the_upstream():
    async with fronted() as (front, upstream):
        data = get("/x", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA").replace(
            b"Connection: close", b"Connection: close, Upgrade, HTTP2-Settings"
        )
        assert split_answer(await raw(front.port, data))[0] == 200

        assert b"upgrade" not in upstream.requests[0].headers
        assert b"http2-settings" not in upstream.requests[0].headers


async def test_the_sdks_handshake_goes_through():
    lmstudio = pytest.importorskip("lmstudio")
    import json
    import threading

    async def handler(socket):
        await socket.recv()
        await socket.send(json.dumps({"success": True}))
        async for message in socket:
            call = json.loads(message)
            if call.get("type") == "rpcCall":
                await socket.send(json.dumps({"type": "rpcResult", "callId": call["callId"], "result": []}))

    def greeting(connection, request):
        if request.path == "/lmstudio-greeting":
            response = connection.respond(200, '{"lmstudio":true}')
            response.headers["Content-Type"] = "application/json"
            return response
        return None

    server = await serve(handler, "127.0.0.1", 0, process_request=greeting)
    upstreams = {"local": Address(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")}
    async with fronted(upstreams=upstreams, keep=Keep()) as (front, _):
        found = []

        def use():
            with lmstudio.Client(f"127.0.0.1:{front.port}") as client:
                found.append(client.llm.list_loaded())

        thread = threading.Thread(target=use)
        thread.start()
        await asyncio.to_thread(thread.join, 10)

        assert found == [[]]
        server.close()
        await server.wait_closed()
