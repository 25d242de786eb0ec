"""One caller's connection: heads and bodies in, one exchange at a time.

An exchange runs as one task. When the caller leaves (FIN, a half-close counts; RST), or turns out to have
sent nonsense, that task is cancelled at that instant, whatever it waits for: `gone` and `refused` tell which.
"""

import asyncio
import contextlib
import contextvars
import logging
import math
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Protocol

from keepalive.http1.bodies import Chunks
from keepalive.http1.exchange import REASONS, Exchange
from keepalive.http1.heads import (
    CHUNKED,
    BadHead,
    Familiar,
    Headers,
    HeadReader,
    RequestHead,
    head_so_far,
    request_head,
    request_reader,
    write_head,
)
from keepalive.http1.limits import Limits
from keepalive.http1.outbox import Outbox, Sender
from keepalive.http1.reply import Reply
from keepalive.http1.ticker import Ticker
from keepalive.http1.tunnel import Between, Tunnel, pause, resume
from keepalive.http1.turns import Turns
from keepalive.http1.vanished import next_look, sees_vanished
from keepalive.http1.watch import Watch

log = logging.getLogger("keepalive.http1")

# In the end, a caller who was only just accepted gets this long to say what is wanted.
LAST_REQUESTS = 0.5
# Seconds until another process may be there, for whoever never had his turn at this one.
RETRY_AFTER = 5
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


def _tell_bug(error: BaseException) -> None:
    # The text of an error may quote a caller's bytes, so where it happened has to do.
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else "?"
    log.error("http1.handler_failed", extra={"error": type(error).__name__, "where": where})


class Handler(Protocol):
    def __call__(self, exchange: "Exchange", /) -> Coroutine[object, object, None]: ...


class Refusal(Protocol):
    """Words an answer to bytes that never became a request: its headers and body.

    `head` has what could be read of one.
    """

    def __call__(self, status: int, message: str, head: RequestHead | None, /) -> tuple[Headers, bytes]: ...


#: Told of each such answer that no handler knows of. May not raise.
TurnedDown = Callable[[int, RequestHead | None], None]


class Owner(Protocol):
    """Who accepted it: a `Listener`."""

    handler: Handler
    refusal: Refusal
    loop: asyncio.AbstractEventLoop
    context: contextvars.Context  # for what is done when a request is over
    limits: Limits
    ticker: Ticker
    outbox: Outbox
    turns: Turns
    watch: Watch
    familiar: Familiar
    connections: "set[Connection]"
    closing: bool  # what is under way may end, and nothing begins
    turned_down: TurnedDown

    def forget(self, connection: "Connection", /) -> None: ...


class Connection(Sender):
    """One caller's connection: heads and bodies in, bytes out, and who is let go when."""

    __slots__ = (
        "_chunks",
        "_deadline",
        "_exchange",
        "_fresh",
        "_invited",
        "_left",
        "_lingering",
        "_look_at",
        "_reader",
        "_rest",
        "_tunnel",
        "_unread",
        "_window_bytes",
        "_window_ends",
        "_wire_bytes",
        "ending",
        "listener",
        "task",
        "write_paused",
    )

    def __init__(self, listener: Owner) -> None:
        super().__init__(listener.outbox)
        self.listener = listener
        self.write_paused = False
        self.ending = False  # this exchange is the last one on this connection
        self._fresh = True  # nothing was asked on it yet
        self._reader: HeadReader | None = None
        self._deadline = 0.0
        self._exchange: Exchange | None = None
        self.task: asyncio.Task[None] | None = None
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
        self._look_at = next_look(listener.loop.time())

    # --- from the transport -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.listener.connections.add(self)
        self.listener.ticker.add(self)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._tunnel is not None:
            self._tunnel.from_client(data)
        elif self._lingering:
            pass
        elif self._exchange is None:
            self._read_head(data)
        else:
            if not self._exchange.body_came:
                data = self._read_body(self._exchange, data)
            if data:
                self._rest += data
                if len(self._rest) > self.listener.limits.ahead_bytes:
                    self._stop_reading()

    def eof_received(self) -> bool:
        if self._tunnel is not None:
            return self._tunnel.client_ended()
        self._leave()
        self.flush()  # the transport is closed behind this, and what a finished answer ends with may still be here
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
            self._exchange.pause()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._tunnel is not None:
            resume(self._tunnel.upstream)
        elif self._exchange is not None:
            self._exchange.resume()

    def tick(self, now: float) -> None:
        if now >= self._look_at:
            self._look_at = next_look(now)
            if sees_vanished(self.transport):
                self.transport.abort()
                return
        if self._exchange is None:
            if now < self._deadline:
                return
            if self._lingering or self._reader is None or not self._reader.begun:
                self.transport.abort()
            else:
                self._turn_down(BadHead(408, "the head did not come in time"), head_so_far(self._reader))
        elif not self._exchange.body_came and self._invited and not self._unread and now >= self._window_ends:
            limits = self.listener.limits
            if self._window_bytes < limits.body_rate * limits.body_window:
                self._cut_short(BadHead(408, "the body comes too slowly"))
            self._window_bytes = 0
            self._window_ends = now + limits.body_window

    # --- the request ------------------------------------------------------------------------------

    def _await_head(self) -> None:
        self._deadline = self.listener.loop.time() + self.listener.limits.header_timeout

    def _read_head(self, data: bytes) -> None:
        found = self.listener.familiar.find(data) if self._reader is None else None
        if found is None:
            found = self._read_new_head(data)
            if found is None:
                return
        head, rest = found
        if head.body > self.listener.limits.body_bytes:
            self._turn_down(
                BadHead(413, f"the body is larger than {self.listener.limits.body_bytes} bytes"), head
            )
            return
        self._fresh = False
        self._left = max(head.body, 0)
        self._chunks = Chunks() if head.body == CHUNKED else None
        self._wire_bytes = 0
        self._invited = False
        exchange = self._exchange = Exchange(self, head)
        if rest and len(rest) == head.body:  # all of it has come, as nearly always
            exchange.take(rest)
            exchange.body_came = True
            self._left, rest = 0, b""
        self.listener.turns.begin(self._begin)
        if rest:
            self.data_received(rest)

    def _read_new_head(self, data: bytes) -> tuple[RequestHead, bytes] | None:
        """As `Familiar.find`, by the grammar; None where it has not come to its end, or is refused."""
        whole = self._reader is None
        reader = self._reader = self._reader or request_reader(self.listener.limits.head_bytes)
        try:
            rest = reader.feed(data)
            if rest is None:
                return None
            head = request_head(reader)
        except BadHead as bad:
            self._turn_down(bad, head_so_far(reader))
            return None
        self._reader = None
        if whole:
            self.listener.familiar.remember(data, head)
        return head, rest

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
            exchange.body_came = not self._left
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
                exchange.body_came = True
                # Where in `data` the body ended is not known, so a request behind it cannot be told from it.
                self.ending = self.ending or self._chunks.followed
                self._chunks = None
        exchange.take(piece)
        if exchange.awaited:
            exchange.wake()
        elif exchange.kept_bytes > limits.ahead_bytes and not exchange.body_came:
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
        if exchange.head.expects and not exchange.kept_bytes and not exchange.started:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

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

    def _begin(self) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if exchange.gone or exchange.refused is not None:
            self._settle(exchange)
            return
        try:
            answering = self.listener.handler(exchange)
        except Exception as error:  # noqa: BLE001  a bug costs this request and no other
            _tell_bug(error)
            self._settle(exchange)
            return
        self.task = self.listener.loop.create_task(answering)
        self.task.add_done_callback(self._done, context=self.listener.context)

    def _done(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _tell_bug(error)
        if self._exchange is not None:
            self._settle(self._exchange)

    def _settle(self, exchange: Exchange) -> None:
        """After the handler: the connection waits for its next request, or ends."""
        self._exchange = None
        self.task = None
        exchange.passes = None
        if exchange.gone or (self.transport.is_closing() and not exchange.finished):
            self.transport.abort()
        elif self.transport.is_closing():
            # It ends by itself once all is written, if that is taken.
            self._lingering = True
            self._deadline = self.listener.loop.time() + self.listener.limits.linger
        elif exchange.refused is not None and not exchange.started:
            self._refuse(exchange.refused, exchange.head)
        elif not exchange.started:
            closing = self.listener.closing
            bad = BadHead(503, "the proxy is shutting down") if closing else BadHead(500, "the proxy failed")
            self._refuse(bad, exchange.head)
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

    def _turn_down(self, bad: BadHead, head: RequestHead | None) -> None:
        """There was no request yet, so no handler tells of it."""
        self.listener.turned_down(bad.status, head)
        self._refuse(bad, head)

    def _refuse(self, bad: BadHead, head: RequestHead | None) -> None:
        """Answers what is no request, and ends the connection."""
        headers, body = self.listener.refusal(bad.status, bad.text, head)
        if bad.status == 503:  # only whoever shuts down says so of a request that may be sent again
            headers = [*headers, (b"Retry-After", b"%d" % RETRY_AFTER)]
        headers = [*headers, (b"Content-Length", b"%d" % len(body)), (b"Connection", b"close")]
        line = b"HTTP/1.1 %d %b" % (bad.status, REASONS.get(bad.status, b""))
        self.write(write_head(line, headers) + body)
        self._part(unfinished=True)

    def _part(self, *, unfinished: bool = False) -> None:
        """Ends the connection. What the caller still sends is read, or a reset would overtake the answer."""
        self._exchange = None
        self._reader = None
        self._lingering = True
        self._rest = b""
        self._deadline = self.listener.loop.time() + self.listener.limits.linger
        if not (unfinished or self._left or self._chunks is not None or self._unread):
            self.flush()
            self._deadline = math.inf  # all of it leaves as slowly as it is read, as any answer does
            self.transport.close()
            return
        self.read_on()
        self.flush()
        with contextlib.suppress(OSError):  # the caller may be gone already
            self.transport.write_eof()

    def _leave(self) -> None:
        """The caller has left: by FIN, half-close or reset."""
        exchange = self._exchange
        # Who leaves behind the whole answer, a moment before all is settled here, has it.
        if exchange is not None and not exchange.gone and not exchange.finished:
            exchange.gone = True
            self._interrupt(exchange)

    def _interrupt(self, exchange: Exchange) -> None:
        if self.task is not None and not exchange.finished:
            self.task.cancel()

    def _vanish(self) -> None:
        """The caller left while its bytes were not being read."""
        self._unread = False
        self.transport.abort()
        self._leave()

    def _cut_short(self, bad: BadHead) -> None:
        """The request turned out to be none while its exchange runs."""
        exchange = self._exchange
        if exchange is not None and exchange.refused is None and not exchange.gone:
            exchange.refuse(bad)
            self.ending = True
            self._interrupt(exchange)

    def turn_away(self) -> None:
        """It is all over, and his turn has not come: he is told so, as those are whose turn has."""
        if self._exchange is not None and self.task is None and not self._exchange.gone:
            self._settle(self._exchange)

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def reset(self) -> None:
        self.flush()
        sock = self.transport.get_extra_info("socket")
        if sock is not None and not self.transport.is_closing():
            # Without it an HTTP/1.0 caller, for whom the end of the connection is the end of the body, would
            # take a truncated answer for a whole one.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    async def join(self, reply: Reply, between: Between | None) -> None:
        """Tunnels until both directions have ended."""
        rest, self._rest = self._rest, b""
        self.flush()  # a tunnel writes to the transport itself
        tunnel = reply.hand_over(self.transport, between)
        self._tunnel = tunnel
        self.ending = True
        self.read_on()
        if rest:
            tunnel.from_client(rest)
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
            self.flush()
            self.transport.close()
