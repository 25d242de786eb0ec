"""Sockets for a `Studio`: what it decides, put on the wire the way LM Studio's Express server does.

Idle connections are closed after 5 s, answers name `X-Powered-By: Express`, a restart closes the listening
socket, and cuts are real: FIN without the closing chunk, or RST.
"""

import asyncio
import contextlib
import logging
import socket
import struct
from types import TracebackType
from typing import Self

from aiohttp import WSMsgType, web

from keepalive.simulator.exchange import Cut, Reply, Request, json_reply
from keepalive.simulator.journal import Happened
from keepalive.simulator.sdk import SDK_PATHS, SdkSession
from keepalive.simulator.studio import Studio

KEEP_ALIVE_SECONDS = 5.0
# A reset drops what the kernel has not delivered yet; this gives it time to.
BEFORE_RESET_SECONDS = 0.03
# The port may be taken for a moment after a restart; a simulator that gives up would spoil its whole test.
REBIND_SECONDS = 0.1

log = logging.getLogger("keepalive.simulator")


class Server:
    """A listening simulator. `async with await serve(studio) as server:` or `close()` at the end."""

    def __init__(self, studio: Studio, host: str, prefix: str = "") -> None:
        if prefix and (not prefix.startswith("/") or prefix.endswith("/")):
            raise ValueError(f'the prefix is "{prefix}"; write it as /lm, with no slash at its end')
        self.studio = studio
        self.host = host
        self.prefix = prefix
        self.port = 0
        # aiohttp logs a malformed request with its bytes; they may hold a secret, and here they are meant.
        quiet = logging.getLogger("keepalive.simulator.http")
        quiet.setLevel(logging.CRITICAL + 1)
        self._web = web.Server(
            self._serve,
            handler_cancellation=True,  # a client that leaves cancels `Studio.handle`
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            access_log=None,
            logger=quiet,
            max_line_size=65_536,
            max_field_size=65_536,
            auto_decompress=False,
        )
        self._listener: asyncio.Server | None = None
        self._rebind: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.prefix}"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def listen(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._web, self.host, port)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening, end every connection, stop the studio's timers."""
        self._closed = True
        if self._power in self.studio.on_power:
            self.studio.on_power.remove(self._power)
        if self._rebind is not None:
            self._rebind.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._rebind
        if self._listener is not None:
            self._listener.close()
        self._drop_connections()
        await self._web.shutdown(1.0)
        self.studio.close()

    # restarts

    def _power(self, up: bool) -> None:
        if up:
            self._rebind = asyncio.get_running_loop().create_task(self._listen_again(self._rebind))
        else:
            if self._listener is not None:
                self._listener.close()
            self._drop_connections()

    async def _listen_again(self, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await asyncio.wait([earlier])
        while not self._closed and self.studio.up:
            try:
                await self.listen(self.port)
                return
            except OSError as error:
                self.studio.journal.write(Happened.LISTEN_FAILED, reason=error.strerror)
                await asyncio.sleep(REBIND_SECONDS)

    def _drop_connections(self) -> None:
        for connection in list(self._web.connections):
            if connection.transport is not None:
                connection.transport.abort()

    # one request

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        path, _, query = request.raw_path.partition("?")
        if not f"{path}/".startswith(f"{self.prefix}/"):
            return web.Response(status=404, text="Not Found")  # of whoever publishes it under that path
        path = path.removeprefix(self.prefix) or "/"
        if request.headers.get("Upgrade", "").lower() == "websocket" and path in SDK_PATHS:
            return await self._tunnel(request, path)
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = bytearray()
        while piece := await request.content.readany():
            body += piece
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            reply = await self.studio.handle(Request(request.method, path, query, headers, bytes(body)))
        except Cut as cut:
            return await self._cut(request, cut)
        except Exception:
            log.exception("the simulator itself failed on %s", request.method)
            reply = json_reply({"error": "the simulator itself failed; its log says how"}, 500)
        return await self._send(request, reply)

    async def _send(self, request: web.BaseRequest, reply: Reply) -> web.StreamResponse:
        headers = {**reply.headers, "Server": "lm-studio-simulator", "Date": self.studio.date()}
        if self.studio.tier != "openai":
            headers["X-Powered-By"] = "Express"
        if request.keep_alive:
            headers["Connection"] = "keep-alive"
            headers["Keep-Alive"] = f"timeout={KEEP_ALIVE_SECONDS:.0f}"
        if isinstance(reply.body, bytes):
            return web.Response(status=reply.status, headers=headers, body=reply.body)
        response = web.StreamResponse(status=reply.status, headers=headers)
        if request.version >= (1, 1):
            response.enable_chunked_encoding()
        try:
            await response.prepare(request)
            async for piece in reply.body:
                await response.write(piece)
            await response.write_eof()
        except Cut as cut:
            return await self._cut(request, cut)
        except ConnectionError:
            pass  # the client left while we wrote; closing the body tells the studio
        finally:
            await reply.body.aclose()  # type: ignore[attr-defined]  # the one kind of iterator that it makes
        if reply.close and request.transport is not None:
            request.transport.close()
        return response

    async def _cut(self, request: web.BaseRequest, cut: Cut) -> web.StreamResponse:
        """Break the connection. The response returned is for aiohttp alone: nothing of it can be written any
        more."""
        transport = request.transport
        if transport is not None and cut.how == "fin":
            transport.close()
        elif transport is not None:
            await asyncio.sleep(BEFORE_RESET_SECONDS)
            if sock := transport.get_extra_info("socket"):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        return web.Response()

    async def _tunnel(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        if self.studio.faults.look("websocket", route="sdk") == "refuse":
            self.studio.faults.take("websocket", route="sdk")
            return web.Response(status=426, text="Upgrade Required", headers={"Upgrade": "websocket"})
        tunnel = web.WebSocketResponse(max_msg_size=0, compress=False)
        await tunnel.prepare(request)

        async def send(frame: str | bytes) -> None:
            await (tunnel.send_str(frame) if isinstance(frame, str) else tunnel.send_bytes(frame))

        def hang_up() -> None:
            if request.transport is not None:
                request.transport.close()

        session = SdkSession(self.studio, path, send, hang_up)
        try:
            async for message in tunnel:
                if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                    await session.hear(message.data)
        except Cut:
            hang_up()
        finally:
            await session.close()
        return tunnel


async def serve(studio: Studio, host: str = "127.0.0.1", port: int = 0, prefix: str = "") -> Server:
    """Listen. Port 0 takes a free one; `server.url` says which. With a prefix everything stands under that path."""
    server = Server(studio, host, prefix)
    await server.listen(port)
    studio.mark = studio.mark or str(server.port)
    studio.on_power.append(server._power)
    return server
