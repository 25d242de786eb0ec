"""One connection to an upstream: requests out, heads and bodies in."""

import asyncio
import contextlib
import errno
import socket
from typing import Protocol

from keepalive.core.errors import Cut, TimedOut, Unexpected
from keepalive.http1.bodies import Chunks
from keepalive.http1.heads import (
    CHUNKED,
    UNTIL_CLOSE,
    BadHead,
    HeadReader,
    ReplyHead,
    reply_head,
    reply_reader,
    whole_reply,
)
from keepalive.http1.limits import Limits
from keepalive.http1.outbox import Outbox, Sender
from keepalive.http1.reply import ChunkSink, Reply
from keepalive.http1.ticker import Ticker
from keepalive.http1.tunnel import Between, Tunnel, resume
from keepalive.http1.vanished import next_look, sees_vanished


class Owner(Protocol):
    """Who opened it, and may use it again: a `Pool`."""

    name: str
    limits: Limits
    loop: asyncio.AbstractEventLoop
    ticker: Ticker
    outbox: Outbox
    links: "set[Link]"

    def keeps(self, head: ReplyHead, /) -> bool:
        """Whether another request may follow this answer on its connection."""

    def keep(self, link: "Link", /) -> None: ...
    def forget(self, link: "Link", /) -> None: ...


class Link(Sender):
    """One connection to an upstream."""

    __slots__ = (
        "_answered",
        "_asked_upgrade",
        "_chunk_sink",
        "_chunks",
        "_drained",
        "_got_bytes",
        "_head_began",
        "_left",
        "_look_at",
        "_method",
        "_owner",
        "_paused",
        "_reader",
        "_reply",
        "_tunnel",
        "idle_since",
        "lost",
        "reused",
        "streamed",
        "upload",
    )

    def __init__(self, pool: Owner) -> None:
        super().__init__(pool.outbox)
        self._owner = pool
        self.lost = False
        self.reused = False
        #: Its last answer was a stream of events.
        self.streamed = False
        self.idle_since = 0.0
        #: Sends what is still to come of the request body.
        self.upload: asyncio.Task[None] | None = None
        self._method = b""
        self._asked_upgrade = False
        self._reader: HeadReader | None = None
        self._answered: asyncio.Future[Reply] | None = None
        self._got_bytes = False
        self._head_began = 0.0
        self._reply: Reply | None = None
        self._left = 0
        self._chunks: Chunks | None = None
        #: That of the reply, while no chunk has begun.
        self._chunk_sink: ChunkSink | None = None
        self._paused = False
        self._drained: asyncio.Future[None] | None = None
        self._tunnel: Tunnel | None = None
        self._look_at = next_look(pool.loop.time())

    # --- one request ------------------------------------------------------------------------------

    def ask(self, method: bytes, *, upgrade: bool) -> asyncio.Future[Reply]:
        """Expects one answer; the caller then writes the request."""
        self._method = method
        self._asked_upgrade = upgrade
        self._got_bytes = False
        self._reply = None
        self._answered = self._owner.loop.create_future()
        return self._answered

    @property
    def untouched(self) -> bool:
        """Not a byte of an answer has come."""
        return not self._got_bytes

    async def drained(self) -> None:
        while self._paused and not self.lost:
            if self._drained is None:
                self._drained = self._owner.loop.create_future()
            await asyncio.shield(self._drained)

    def let_go(self, reply: Reply | None) -> None:
        """The request is over for whoever asked."""
        self._chunk_sink = None
        sent = self._stop_upload()
        if (
            sent
            and reply is not None
            and reply.complete
            and reply is self._reply
            and not self.lost
            and not self.transport.is_closing()
            and self._owner.keeps(reply.head)
        ):
            self._reply = None
            self.reused = True
            self.streamed = reply.head.stream
            resume(self.transport)  # a slow caller may have had it paused when the last byte came
            self._owner.keep(self)
        else:
            self.transport.abort()

    def _stop_upload(self) -> bool:
        upload, self.upload = self.upload, None
        if upload is None or upload.done():
            return True
        upload.cancel()
        return False

    def tunnel_to(self, client: asyncio.Transport, first: bytes, between: Between | None) -> Tunnel:
        self.flush()
        self._tunnel = Tunnel(client, self.transport, between)
        if first:
            self._tunnel.from_upstream(first)
        return self._tunnel

    # --- from the transport -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._owner.links.add(self)
        self._owner.ticker.add(self)

    def pour_chunks(self, reply: Reply) -> None:
        if reply is self._reply and self._chunks is not None and self._chunks.between:
            self._chunk_sink = reply.chunk_sink

    def data_received(self, data: bytes) -> None:
        chunk_sink = self._chunk_sink
        if chunk_sink is not None:
            # The hot path: whole chunks of a body. Beside hundreds of other streams nothing that is looked at here
            # is in the processor's caches, so nothing is looked at that need not be.
            taken = chunk_sink.take_chunks(data)
            if taken == len(data):
                return
            data = data[taken:]
        reply, chunks = self._reply, self._chunks
        if chunks is not None and reply is not None:
            try:
                piece = chunks.feed(data)
            except BadHead:
                self._break_off(reply, chunks)
                return
            if piece:
                sink = reply.sink
                if sink is not None:
                    sink(piece)
                else:
                    reply.take(piece)
            if chunks.done:
                self._chunks = self._chunk_sink = None
                self._finish(reply, followed=chunks.followed)
            else:
                self._chunk_sink = reply.chunk_sink if chunks.between else None
        elif self._tunnel is not None:
            self._tunnel.from_upstream(data)
        elif reply is not None:
            self._read_body(reply, data)
        else:
            self._begin(data)

    def _begin(self, data: bytes) -> None:
        """Bytes of a head, and perhaps of what follows it."""
        self._got_bytes = True
        if self._answered is None:
            # Bytes that nobody asked for: what they answer cannot be known, so nothing may follow them.
            self.transport.abort()
            return
        try:
            rest = self._read_head(data)
        except BadHead as bad:
            self._fail(Unexpected(f"{self._owner.name} answered with a malformed head: {bad.text}"))
            return
        reply = self._reply
        if rest is None or reply is None:
            return
        if reply.head.status == 101:
            if rest:
                reply.take(rest)
        elif rest or reply.head.body == 0:
            self._read_body(reply, rest)

    def _break_off(self, reply: Reply, chunks: Chunks) -> None:
        """The framing is broken: what came before that is still the caller's."""
        self._chunk_sink = None
        piece = chunks.rescued()
        if piece:
            reply.take(piece)
        reply.end(complete=False)
        self.transport.abort()

    def _read_head(self, data: bytes) -> bytes | None:
        limit = self._owner.limits.head_bytes
        while True:
            whole = whole_reply(data, limit, self._method) if self._reader is None else None
            if whole is not None:
                head, rest = whole
            else:
                reader = self._reader = self._reader or reply_reader(limit)
                behind = reader.feed(data)
                if behind is None:
                    if reader.begun and not self._head_began:
                        # An upstream may think for as long as it likes, but not in the middle of a head.
                        self._head_began = self._owner.loop.time()
                    return None
                head, rest = reply_head(reader, self._method), behind
                self._reader = None
            if not 100 <= head.status <= 599:
                raise BadHead(502, "there is no such status")
            if head.status == 101:
                if not self._asked_upgrade or b"upgrade" not in head.listed(b"connection"):
                    raise BadHead(502, "it switches protocols unasked")
            elif head.status < 200:
                self._head_began = 0.0  # that one has come to its end
                data = rest
                continue
            break
        self._head_began = 0.0
        self._left = head.body
        self._chunks = Chunks() if head.body == CHUNKED else None
        self._reply = Reply(self, head)
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(self._reply)
        self._answered = None
        return rest

    def _read_body(self, reply: Reply, data: bytes) -> None:
        if self._chunks is not None:
            self.data_received(data)
        elif self._left == UNTIL_CLOSE:
            reply.take(data)
        else:
            if reply.complete:
                self.transport.abort()
                return
            followed = len(data) > self._left
            if followed:
                data = data[: self._left]
            self._left -= len(data)
            if data:
                reply.take(data)
            if not self._left:
                self._finish(reply, followed=followed)

    def _finish(self, reply: Reply, *, followed: bool) -> None:
        if followed:
            # More than the framing said: it belongs to nobody.
            self.lost = True
            self.transport.abort()
        reply.end(complete=True)

    def eof_received(self) -> bool:
        if self._tunnel is not None:
            return self._tunnel.half_closed(self._tunnel.client)
        if self._reply is not None and self._left == UNTIL_CLOSE and self._chunks is None:
            self._reply.end(complete=True)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._owner.forget(self)
        if self._tunnel is not None:
            self._tunnel.close()
            return
        self._stop_upload()
        if self._answered is not None and not self._answered.done():
            self._salvage()
        if self._reply is not None:
            self._reply.end(complete=False)
        # The kernel gave up on it: by then it may know no way there any more.
        silently = isinstance(exc, OSError) and exc.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH)
        how = "is gone without a word" if silently else "closed the connection before it answered"
        self._fail(Cut(f"{self._owner.name} {how}"))
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def _salvage(self) -> None:
        """An upstream that answers and closes without reading breaks our writing before our reading."""
        sock = self.transport.get_extra_info("socket")
        if sock is None or self.transport.get_extra_info("sslcontext") is not None:
            return
        with contextlib.suppress(OSError, ValueError, AttributeError):
            while data := _receive(sock):
                self.data_received(data)
        if self._reply is not None and self._left == UNTIL_CLOSE and self._chunks is None:
            self._reply.end(complete=True)

    def pause_writing(self) -> None:
        if self._tunnel is not None:
            self._tunnel.fill(True)
        self._paused = True

    def resume_writing(self) -> None:
        if self._tunnel is not None:
            self._tunnel.fill(False)
        self._paused = False
        if self._drained is not None:
            self._drained.set_result(None)
            self._drained = None

    def tick(self, now: float) -> None:
        if self._chunks is not None:
            self._chunks.rest()
        if self._head_began and now - self._head_began > self._owner.limits.header_timeout:
            self._fail(TimedOut(f"{self._owner.name} stopped in the middle of a head"))
        elif now >= self._look_at:
            self._look_at = next_look(now)
            if sees_vanished(self.transport):
                self._fail(Cut(f"{self._owner.name} is gone without a word"))

    def _fail(self, error: Exception) -> None:
        answered, self._answered = self._answered, None
        if answered is not None and not answered.done():
            answered.set_exception(error)
        if not self.lost:
            self.transport.abort()


def _receive(sock: socket.socket) -> bytes:
    # The transport's socket object may forbid recv, its descriptor does not.
    with socket.socket(fileno=socket.dup(sock.fileno())) as twin:
        twin.setblocking(False)
        return twin.recv(65_536)
