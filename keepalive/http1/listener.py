"""The callers' side: connections in, one exchange at a time on each.

An exchange runs as one task. When the caller leaves (FIN, a half-close counts; RST), or turns out to have
sent nonsense, that task is cancelled at that instant, whatever it waits for: `gone` and `refused` tell which.
"""

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Protocol, cast

from keepalive.http1.bodies import Chunks
from keepalive.http1.heads import (
    CHUNKED,
    BadHead,
    Headers,
    HeadReader,
    RequestHead,
    request_head,
    request_reader,
    write_head,
)
from keepalive.http1.limits import Limits
from keepalive.http1.ticker import Ticker
from keepalive.http1.upstream import Reply, Tunnel, pause, resume
from keepalive.http1.watch import Watch

log = logging.getLogger("keepalive.http1")

# In the end, a caller who was only just accepted gets this long to say what is wanted.
LAST_REQUESTS = 0.5
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class Handler(Protocol):
    def __call__(self, exchange: "Exchange", /) -> Awaitable[None]: ...


class Refusal(Protocol):
    """Words an answer to bytes that never became a request: its headers and body."""

    def __call__(self, status: int, message: str, /) -> tuple[Headers, bytes]: ...


def plain_refusal(status: int, message: str) -> tuple[Headers, bytes]:
    return [(b"Content-Type", b"text/plain; charset=utf-8")], message.encode() + b"\n"


class Exchange:
    """One request of one caller, and the answer to it."""

    __slots__ = (
        "_bodiless",
        "_body_ended",
        "_chunked",
        "_connection",
        "_counted",
        "_drained",
        "_head",
        "_kept_bytes",
        "_pieces",
        "_reader",
        "finished",
        "gone",
        "head",
        "on_pause",
        "on_resume",
        "paused",
        "refused",
        "started",
    )

    def __init__(self, connection: "_Connection", head: RequestHead) -> None:
        self._connection = connection
        self.head = head
        #: The caller has left; its task is being cancelled.
        self.gone = False
        #: The request turned out not to be one; its task is being cancelled.
        self.refused: BadHead | None = None
        self.started = False
        self.finished = False
        #: The caller reads more slowly than it is written to.
        self.paused = connection.write_paused
        self.on_pause: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None
        self._head = b""
        self._bodiless = False
        self._chunked = False
        self._counted = True  # the answer's end can be told without closing the connection
        self._drained: asyncio.Future[None] | None = None
        self._pieces: list[bytes] = []
        self._kept_bytes = 0
        self._reader: asyncio.Future[None] | None = None
        self._body_ended = head.body == 0

    # --- the request ------------------------------------------------------------------------------

    @property
    def body_ended(self) -> bool:
        """Every byte of the request body has been read by `read`."""
        return self._body_ended and not self._pieces

    async def read(self) -> bytes:
        """The next bytes of the request body; empty at its end."""
        while not self._pieces and not self._body_ended:
            self._connection.invite()
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if not self._pieces:
            return b""
        data = b"".join(self._pieces) if len(self._pieces) > 1 else self._pieces[0]
        self._pieces.clear()
        self._kept_bytes = 0
        self._connection.read_on()
        return data

    # --- the answer -------------------------------------------------------------------------------

    def start(
        self, status: int, headers: Headers, *, reason: bytes | None = None, length: int | None = None
    ) -> None:
        """The status line and headers; they leave with the first bytes of the body, or at `flush`.

        The framing is decided here: `length` is the size of the body where it is known beforehand.
        """
        assert not self.started
        self.started = True
        connection, head = self._connection, self.head
        headers = list(headers)
        if head.method == b"HEAD" or status in (204, 304):
            self._bodiless = True
            if length is not None:
                headers.append((b"Content-Length", b"%d" % length))
        elif length is not None:
            headers.append((b"Content-Length", b"%d" % length))
        elif head.minor == 1:
            headers.append((b"Transfer-Encoding", b"chunked"))
            self._chunked = True
        else:
            self._counted = False
        if not head.keeps_alive or not self._counted or connection.ending or not self._body_ended:
            connection.ending = True
            headers.append((b"Connection", b"close"))
        phrase = _REASONS.get(status, b"") if reason is None else reason
        self._head = write_head(b"HTTP/1.1 %d %b" % (status, phrase), headers)

    def push(self, data: bytes) -> None:
        """Writes bytes of the body now; `paused` and `drained` are the back-pressure."""
        if not data or self.gone:
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        elif self._bodiless:
            return
        if self._head:
            data = self._head + data
            self._head = b""
        self._connection.transport.write(data)

    async def write(self, data: bytes) -> None:
        """Writes bytes of the body and waits while the caller reads too slowly."""
        self.push(data)
        if self.paused:
            await self.drained()

    async def drained(self) -> None:
        while self.paused:
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)

    def flush(self) -> None:
        """Sends the head if no byte of the body has taken it along."""
        if self._head and not self.gone:
            self._connection.transport.write(self._head)
            self._head = b""

    def finish(self) -> None:
        """The answer is complete."""
        if self.finished:
            return
        self.finished = True
        if self.gone:
            return
        if self._chunked:
            self._connection.transport.write(self._head + b"0\r\n\r\n")
            self._head = b""
        else:
            self.flush()

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """A whole answer at once."""
        self.start(status, headers, length=len(body))
        self.push(body)
        self.finish()

    def abort(self) -> None:
        """Ends the connection so that the caller cannot take what it has for the whole answer."""
        self.finished = True
        if not self.gone:
            self._connection.reset()

    async def tunnel(self, reply: Reply, headers: Headers) -> None:
        """Answers 101 and joins both connections until both directions have ended. No limits of any kind."""
        assert not self.started
        self.started = True
        self._connection.transport.write(write_head(b"HTTP/1.1 101 Switching Protocols", headers))
        await self._connection.join(reply)
        self.finished = True


class _Connection(asyncio.Protocol):
    """One caller's connection: heads and bodies in, bytes out, and who is let go when."""

    __slots__ = (
        "_chunks",
        "_deadline",
        "_exchange",
        "_fresh",
        "_invited",
        "_left",
        "_lingering",
        "_reader",
        "_rest",
        "_running",
        "_task",
        "_tunnel",
        "_unread",
        "_window_bytes",
        "_window_ends",
        "_wire_bytes",
        "ending",
        "listener",
        "transport",
        "write_paused",
    )

    transport: asyncio.Transport

    def __init__(self, listener: "Listener") -> None:
        self.listener = listener
        self.write_paused = False
        self.ending = False  # this exchange is the last one on this connection
        self._fresh = True  # nothing was asked on it yet
        self._reader: HeadReader | None = None
        self._deadline = 0.0
        self._exchange: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        self._running = False
        self._left = 0
        self._chunks: Chunks | None = None
        self._wire_bytes = 0
        self._window_bytes = 0
        self._window_ends = 0.0
        self._invited = False
        self._rest = b""
        self._unread = False
        self._lingering = False
        self._tunnel: Tunnel | None = None

    # --- from the transport -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.listener.connections.add(self)
        self.listener.ticker.add(self)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._tunnel is not None:
            self._tunnel.upstream.write(data)
        elif self._lingering:
            pass
        elif self._exchange is None:
            self._read_head(data)
        else:
            if not self._exchange._body_ended:
                data = self._read_body(self._exchange, data)
            if data:
                self._rest += data
                if len(self._rest) > self.listener.limits.ahead_bytes:
                    self._stop_reading()

    def eof_received(self) -> bool:
        if self._tunnel is not None:
            return self._tunnel.half_closed(self._tunnel.upstream)
        self._leave()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._read_watched()
        self.listener.forget(self)
        if self._tunnel is not None:
            # Who goes first is no matter here: it is how tunnels end.
            self._tunnel.close()
            if self._exchange is not None:
                self._exchange.gone = True
            if not self._tunnel.ended.done():
                self._tunnel.ended.set_result(None)
        self._leave()

    def pause_writing(self) -> None:
        self.write_paused = True
        if self._tunnel is not None:
            pause(self._tunnel.upstream)
        elif self._exchange is not None:
            self._exchange.paused = True
            if self._exchange.on_pause is not None:
                self._exchange.on_pause()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._tunnel is not None:
            resume(self._tunnel.upstream)
        elif self._exchange is not None:
            exchange = self._exchange
            exchange.paused = False
            if exchange._drained is not None:
                exchange._drained.set_result(None)
                exchange._drained = None
            if exchange.on_resume is not None:
                exchange.on_resume()

    def tick(self, now: float) -> None:
        if self._exchange is None:
            if now < self._deadline:
                return
            if self._lingering or self._reader is None or not self._reader.begun:
                self.transport.abort()
            else:
                self._refuse(BadHead(408, "the head did not come in time"))
        elif (
            not self._exchange._body_ended and self._invited and not self._unread and now >= self._window_ends
        ):
            limits = self.listener.limits
            if self._window_bytes < limits.body_rate * limits.body_window:
                self._cut_short(BadHead(408, "the body comes too slowly"))
            self._window_bytes = 0
            self._window_ends = now + limits.body_window

    # --- the request ------------------------------------------------------------------------------

    def _await_head(self) -> None:
        limits = self.listener.limits
        self._reader = request_reader(limits.head_bytes)
        self._deadline = self.listener.loop.time() + limits.header_timeout

    def _read_head(self, data: bytes) -> None:
        reader = self._reader
        assert reader is not None
        try:
            rest = reader.feed(data)
            if rest is None:
                return
            head = request_head(reader)
            if head.body > self.listener.limits.body_bytes:
                raise BadHead(413, f"the body is larger than {self.listener.limits.body_bytes} bytes")
        except BadHead as bad:
            self._refuse(bad)
            return
        self._reader = None
        self._fresh = False
        self._left = max(head.body, 0)
        self._chunks = Chunks() if head.body == CHUNKED else None
        self._wire_bytes = 0
        self._invited = False
        exchange = self._exchange = Exchange(self, head)
        self._task = self.listener.loop.create_task(self._run(exchange))
        if rest:
            self.data_received(rest)

    def _read_body(self, exchange: Exchange, data: bytes) -> bytes:
        """Takes the body's part of `data`; returns what stands behind it."""
        limits = self.listener.limits
        self._window_bytes += len(data)
        after = b""
        if self._chunks is None:
            piece = data
            if len(data) > self._left:
                piece, after = data[: self._left], data[self._left :]
            self._left -= len(piece)
            exchange._body_ended = not self._left
        else:
            self._wire_bytes += len(data)
            if self._wire_bytes > limits.body_bytes:
                self._cut_short(BadHead(413, f"the body is larger than {limits.body_bytes} bytes"))
                return b""
            try:
                piece = self._chunks.feed(data)
            except BadHead as bad:
                self._cut_short(bad)
                return b""
            if self._chunks.done:
                exchange._body_ended = True
                # Where in `data` the body ended is not known, so a request behind it cannot be told from it.
                self.ending = self.ending or self._chunks.followed
                self._chunks = None
        if piece:
            exchange._pieces.append(piece)
            exchange._kept_bytes += len(piece)
        if exchange._reader is not None and not exchange._reader.done():
            exchange._reader.set_result(None)
        elif exchange._kept_bytes > limits.ahead_bytes and not exchange._body_ended:
            self._stop_reading()
        return after

    def invite(self) -> None:
        """Somebody waits for the body: from now on it has to come, and `Expect: 100-continue` is met."""
        exchange = self._exchange
        if self._invited or exchange is None:
            return
        self._invited = True
        self._window_bytes = 0
        self._window_ends = self.listener.loop.time() + self.listener.limits.body_window
        if exchange.head.expects and not exchange._kept_bytes and not exchange.started:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _stop_reading(self) -> None:
        if not self._unread and not self.transport.is_closing():
            self._unread = True
            self.transport.pause_reading()
            sock = self.transport.get_extra_info("socket")
            if sock is not None:
                self.listener.watch.add(sock, self._vanish)

    def _read_watched(self) -> None:
        if self._unread:
            self._unread = False
            sock = self.transport.get_extra_info("socket")
            if sock is not None:
                self.listener.watch.discard(sock)

    def read_on(self) -> None:
        if self._unread and len(self._rest) <= self.listener.limits.ahead_bytes:
            self._read_watched()
            if not self.transport.is_closing():
                self.transport.resume_reading()
                self._window_bytes = 0
                self._window_ends = self.listener.loop.time() + self.listener.limits.body_window

    # --- the exchange -----------------------------------------------------------------------------

    async def _run(self, exchange: Exchange) -> None:
        self._running = True
        try:
            if not exchange.gone and exchange.refused is None:
                await self.listener.handler(exchange)
        except asyncio.CancelledError:
            if exchange.refused is None and not exchange.gone:
                self._settle(exchange)
                raise
        except Exception as error:  # noqa: BLE001  a bug costs this request and no other
            # The text of an error may quote a caller's bytes, so where it happened has to do.
            place = error.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else "?"
            log.error("http1.handler_failed", extra={"error": type(error).__name__, "where": where})
        self._settle(exchange)

    def _settle(self, exchange: Exchange) -> None:
        """After the handler: the connection waits for its next request, or ends."""
        self._exchange = None
        self._task = None
        self._running = False
        exchange.on_pause = exchange.on_resume = None
        if exchange.gone or self.transport.is_closing():
            self.transport.abort()
        elif exchange.refused is not None and not exchange.started:
            self._refuse(exchange.refused)
        elif not exchange.started:
            self._refuse(BadHead(500, "the proxy failed"))
        elif not exchange.finished:
            self.reset()
        elif self.ending or self.listener.closing:
            self._part()
        else:
            self._await_head()
            rest, self._rest = self._rest, b""
            self.read_on()
            if rest:
                self._read_head(rest)

    def _refuse(self, bad: BadHead) -> None:
        """Answers what is no request, and ends the connection."""
        headers, body = self.listener.refusal(bad.status, bad.text)
        headers = [*headers, (b"Content-Length", b"%d" % len(body)), (b"Connection", b"close")]
        line = b"HTTP/1.1 %d %b" % (bad.status, _REASONS.get(bad.status, b""))
        self.transport.write(write_head(line, headers) + body)
        self.listener.refusals += 1
        self._part(unfinished=True)

    def _part(self, *, unfinished: bool = False) -> None:
        """Ends the connection. What the caller still sends is read, or a reset would overtake the answer."""
        self._exchange = None
        self._reader = None
        self._lingering = True
        self._rest = b""
        self._deadline = self.listener.loop.time() + self.listener.limits.linger
        if not (unfinished or self._left or self._chunks is not None or self._unread):
            self.transport.close()
            return
        self.read_on()
        with contextlib.suppress(OSError):  # the caller may be gone already
            self.transport.write_eof()

    def _leave(self) -> None:
        """The caller has left: by FIN, half-close or reset."""
        exchange = self._exchange
        if exchange is not None and not exchange.gone:
            exchange.gone = True
            self._interrupt(exchange)

    def _interrupt(self, exchange: Exchange) -> None:
        # A task that is cancelled before its first step never takes one, so that one looks for itself.
        if self._task is not None and self._running and not exchange.finished:
            self._task.cancel()

    def _vanish(self) -> None:
        """The caller left while its bytes were not being read."""
        self._unread = False
        self.transport.abort()
        self._leave()

    def _cut_short(self, bad: BadHead) -> None:
        """The request turned out to be none while its exchange runs."""
        exchange = self._exchange
        if exchange is not None and exchange.refused is None and not exchange.gone:
            exchange.refused = bad
            exchange._body_ended = True
            exchange._pieces.clear()
            self.ending = True
            self._interrupt(exchange)

    def reset(self) -> None:
        sock = self.transport.get_extra_info("socket")
        if sock is not None and not self.transport.is_closing():
            # Without it an HTTP/1.0 caller, for whom the end of the connection is the end of the body, would
            # take a truncated answer for a whole one.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    async def join(self, reply: Reply) -> None:
        """Tunnels until both directions have ended."""
        rest, self._rest = self._rest, b""
        tunnel = reply.hand_over(self.transport)
        self._tunnel = tunnel
        self.ending = True
        self.read_on()
        if rest:
            tunnel.upstream.write(rest)
        try:
            await tunnel.ended
        finally:
            tunnel.close()

    def shut_idle(self) -> None:
        """Closes the connection if no request is being read or answered on it.

        One that was only just accepted is owed an answer: its request is on the way.
        """
        if self._exchange is not None or self._lingering:
            return
        if self._fresh or (self._reader is not None and self._reader.begun):
            self._deadline = min(self._deadline, self.listener.loop.time() + LAST_REQUESTS)
        else:
            self.transport.close()


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


class Listener:
    """Accepts callers and runs `handler` for each of their requests."""

    def __init__(
        self, handler: Handler, sockets: list[socket.socket], limits: Limits, refusal: Refusal = plain_refusal
    ) -> None:
        self.handler = handler
        self.limits = limits
        self.refusal = refusal
        self.loop = asyncio.get_running_loop()
        self.ticker = Ticker(limits.tick)
        self.watch = Watch()
        self.connections: set[_Connection] = set()
        self.closing = False
        #: Answers to bytes that never became a request.
        self.refusals = 0
        self.sockets = sockets
        self._opening = 0
        self._quiet_until = 0.0
        self._room = asyncio.Event()
        self._room.set()
        self._idle: set[asyncio.Future[None]] = set()
        self._accepting = [self.loop.create_task(self._accept(sock)) for sock in sockets]

    @property
    def port(self) -> int:
        return int(self.sockets[0].getsockname()[1])

    def forget(self, connection: _Connection) -> None:
        self.ticker.discard(connection)
        self.connections.discard(connection)
        self._room.set()

    async def _accept(self, listening: socket.socket) -> None:
        # Its own loop, because a server that is full must leave callers in the kernel's queue: asyncio's own
        # would accept them, or fail at accepting them and say so thousands of times. And asyncio's `sock_accept`,
        # when it is cancelled, may lose a caller whom it has accepted already.
        while not self.closing:
            if len(self.connections) + self._opening >= self.limits.connections:
                self._room.clear()
                await self._room.wait()
                continue
            try:
                sock, _ = listening.accept()
            except (BlockingIOError, InterruptedError):
                await self._readable(listening)
                continue
            except OSError as error:
                if self.loop.time() >= self._quiet_until:
                    self._quiet_until = self.loop.time() + 60.0
                    log.warning("http1.accept_failed", extra={"errno": error.errno})
                await asyncio.sleep(1.0)
                continue
            self._opening += 1
            try:
                sock.setblocking(False)
                if sock.family != getattr(socket, "AF_UNIX", None):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await self.loop.connect_accepted_socket(lambda: _Connection(self), sock)
            except OSError:
                sock.close()
            finally:
                self._opening -= 1

    async def _readable(self, listening: socket.socket) -> None:
        """Waits until somebody may be there to be accepted, or nobody will be any more."""
        woken = self.loop.create_future()
        self._idle.add(woken)
        self.loop.add_reader(listening, _wake, woken)
        try:
            await woken
        finally:
            self.loop.remove_reader(listening)
            self._idle.discard(woken)

    async def stop_accepting(self) -> None:
        """No new callers; those who are idle are let go, the others after their present request."""
        self.closing = True
        self._room.set()
        for woken in self._idle:
            _wake(woken)
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for sock in self.sockets:
            sock.close()
        for connection in list(self.connections):
            connection.shut_idle()

    async def emptied(self) -> None:
        """Waits until the last connection is gone. Bound it with a timeout."""
        while self.connections:
            self._room.clear()
            await self._room.wait()

    async def close(self) -> None:
        """Ends everything now."""
        await self.stop_accepting()
        tasks = [connection._task for connection in self.connections if connection._task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self.connections):
            connection.transport.abort()
        await asyncio.sleep(0)
        self.watch.close()


def bind(host: str, port: int, *, backlog: int = 1024) -> list[socket.socket]:
    """Listening sockets for every address of `host`. Raises OSError."""
    sockets: list[socket.socket] = []
    seen: set[tuple[object, ...]] = set()
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            if address in seen:
                continue
            seen.add(address)
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if port == 0 and len(sockets) > 1:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            sock.bind(address)
            sock.listen(backlog)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


async def serve(
    handler: Handler,
    *,
    sockets: list[socket.socket],
    limits: Limits | None = None,
    refusal: Refusal = plain_refusal,
) -> Listener:
    """Serves `handler` on listening, non-blocking `sockets` (see `bind`), which it closes in the end."""
    return Listener(handler, sockets, limits or Limits(), refusal)
