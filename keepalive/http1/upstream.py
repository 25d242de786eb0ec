"""The upstream's side: requests out, answers in.

An answer is either complete or cut; nothing here makes the one look like the other. Closing a reply that is
not complete closes its connection at once, which is how the upstream is told to stop. Redirects are not
followed, cookies are not kept, and no proxy is taken from the environment.
"""

import asyncio
import contextlib
import errno
import ipaddress
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, cast
from urllib.parse import urlsplit

from keepalive.core.errors import Cut, TimedOut, Unexpected, Unreachable
from keepalive.http1.bodies import Chunks
from keepalive.http1.heads import (
    CHUNKED,
    UNTIL_CLOSE,
    BadHead,
    Headers,
    HeadReader,
    ReplyHead,
    listed,
    reply_head,
    reply_reader,
    write_head,
)
from keepalive.http1.limits import Limits
from keepalive.http1.ticker import Ticker

#: LM Studio and llama-server close idle connections after 5 s.
IDLE_SECONDS = 4.0
#: A kept connection that breaks so soon after a request was written had been closed before it was read.
STALE_SECONDS = 1.0
#: RFC 8305: so long the next address waits for the one before.
NEXT_ADDRESS_SECONDS = 0.25
#: Of an answer that nobody takes yet.
AHEAD_BYTES = 65_536


def pause(transport: asyncio.Transport) -> None:
    """Leaves a socket unread. Does nothing to one that is closing, which some loops would call an error."""
    if not transport.is_closing():
        transport.pause_reading()


def resume(transport: asyncio.Transport) -> None:
    if not transport.is_closing():
        transport.resume_reading()


class Tunnel:
    """Two connections whose bytes go to each other, once HTTP is over on both."""

    __slots__ = ("client", "ended", "half", "upstream")

    def __init__(self, client: asyncio.Transport, upstream: asyncio.Transport) -> None:
        self.client = client
        self.upstream = upstream
        self.half = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def half_closed(self, other: asyncio.Transport) -> bool:
        """One side has said its last; True while its connection stays open for the other direction."""
        if self.half or not other.can_write_eof():
            self.close()
            return False
        self.half = True
        if not other.is_closing():
            other.write_eof()
        return True

    def close(self) -> None:
        """Both, after what is still to be written."""
        self.client.close()
        self.upstream.close()


class Reply:
    """An upstream's answer: its head, then its body as it comes. `close` it in any case."""

    __slots__ = ("_ended", "_link", "_parts", "_parts_bytes", "_sink", "complete", "cut", "head")

    def __init__(self, link: "_Link", head: ReplyHead) -> None:
        self.head = head
        #: The whole body has come.
        self.complete = False
        #: The connection, or the framing, broke before the end of the body.
        self.cut = False
        self._link: _Link | None = link
        self._parts: list[bytes] = []
        self._parts_bytes = 0
        self._sink: Callable[[bytes], None] | None = None
        self._ended: asyncio.Future[None] | None = None

    def pour(self, sink: Callable[[bytes], None]) -> None:
        """From now on calls `sink` with the bytes of the body: at once with what is there, then as they come.

        `sink` runs inside the reading of the socket: it must be quick and must not raise.
        """
        self._sink = sink
        if self._parts:
            parts, self._parts = self._parts, []
            sink(b"".join(parts) if len(parts) > 1 else parts[0])
        if self._parts_bytes > AHEAD_BYTES:
            self.resume()

    async def ended(self) -> bool:
        """Waits for the end of the body; True when it was complete, False when it was cut."""
        while not (self.complete or self.cut):
            self._ended = asyncio.get_running_loop().create_future()
            await self._ended
        return self.complete

    async def read(self, limit: int) -> bytes:
        """The body until its end, or until `limit` bytes have come: `complete` and `cut` tell which."""
        taken = bytearray()
        while not (self.complete or self.cut) and self._parts_bytes < limit:
            self._ended = asyncio.get_running_loop().create_future()
            await self._ended
        for part in self._parts:
            taken += part
        self._parts.clear()
        return bytes(taken)

    def pause(self) -> None:
        if self._link is not None:
            pause(self._link.transport)

    def resume(self) -> None:
        if self._link is not None:
            resume(self._link.transport)

    def close(self) -> None:
        """No more of it is wanted. What was taken whole leaves its connection to the next request."""
        link, self._link = self._link, None
        self._sink = None
        self._parts.clear()
        if link is not None:
            link.let_go(self)

    def hand_over(self, client: asyncio.Transport) -> Tunnel:
        """Joins this connection, which answered 101, to `client`."""
        link, self._link = self._link, None
        if link is None or link.transport.is_closing():
            raise Cut("the upstream closed the connection that it had agreed to upgrade")
        return link.tunnel_to(client, b"".join(self._parts))

    # --- from the connection ----------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        if self._sink is not None:
            self._sink(data)
            return
        self._parts.append(data)
        before, self._parts_bytes = self._parts_bytes, self._parts_bytes + len(data)
        if before <= AHEAD_BYTES < self._parts_bytes and self._ended is None:
            self.pause()
        elif self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _end(self, *, complete: bool) -> None:
        if self.complete or self.cut:
            return
        self.complete = complete
        self.cut = not complete
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)


class _Link(asyncio.Protocol):
    """One connection to an upstream."""

    __slots__ = (
        "_answered",
        "_asked_upgrade",
        "_chunks",
        "_drained",
        "_got_bytes",
        "_head_began",
        "_left",
        "_method",
        "_paused",
        "_pool",
        "_reader",
        "_reply",
        "_tunnel",
        "idle_since",
        "lost",
        "reused",
        "transport",
        "upload",
    )

    transport: asyncio.Transport

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self.lost = False
        self.reused = False
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
        self._paused = False
        self._drained: asyncio.Future[None] | None = None
        self._tunnel: Tunnel | None = None

    # --- one request ------------------------------------------------------------------------------

    def ask(self, method: bytes, *, upgrade: bool) -> asyncio.Future[Reply]:
        """Expects one answer; the caller then writes the request to `transport`."""
        self._method = method
        self._asked_upgrade = upgrade
        self._reader = reply_reader(self._pool.limits.head_bytes)
        self._got_bytes = False
        self._reply = None
        self._answered = self._pool.loop.create_future()
        return self._answered

    @property
    def untouched(self) -> bool:
        """Not a byte of an answer has come."""
        return not self._got_bytes

    async def drained(self) -> None:
        while self._paused and not self.lost:
            if self._drained is None:
                self._drained = self._pool.loop.create_future()
            await asyncio.shield(self._drained)

    def let_go(self, reply: Reply | None) -> None:
        """The request is over for whoever asked."""
        self._pool.ticker.discard(self)
        sent = self._stop_upload()
        if (
            sent
            and reply is not None
            and reply.complete
            and reply is self._reply
            and not self.lost
            and not self.transport.is_closing()
            and self._pool.keeps(reply.head)
        ):
            self._reply = None
            self.reused = True
            resume(self.transport)  # a slow caller may have had it paused when the last byte came
            self._pool.keep(self)
        else:
            self.transport.abort()

    def _stop_upload(self) -> bool:
        upload, self.upload = self.upload, None
        if upload is None or upload.done():
            return True
        upload.cancel()
        return False

    def tunnel_to(self, client: asyncio.Transport, first: bytes) -> Tunnel:
        self._tunnel = Tunnel(client, self.transport)
        if first:
            client.write(first)
        return self._tunnel

    # --- from the transport -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._pool.links.add(self)

    def data_received(self, data: bytes) -> None:
        reply, chunks = self._reply, self._chunks
        if chunks is not None and reply is not None:
            # The hot path: bytes of a body in chunks.
            try:
                piece = chunks.feed(data)
            except BadHead:
                piece = chunks.rescued()
                if piece:
                    reply._take(piece)
                reply._end(complete=False)
                self.transport.abort()
                return
            if piece:
                sink = reply._sink
                if sink is not None:
                    sink(piece)
                else:
                    reply._take(piece)
            if chunks.done:
                self._chunks = None
                self._finish(reply, followed=chunks.followed)
            return
        if self._tunnel is not None:
            self._tunnel.client.write(data)
            return
        self._got_bytes = True
        if reply is None:
            if self._reader is None:
                # Bytes that nobody asked for: what they answer cannot be known, so nothing may follow them.
                self.transport.abort()
                return
            try:
                rest = self._read_head(data)
            except BadHead as bad:
                self._fail(Unexpected(f"{self._pool.name} answered with a malformed head: {bad.text}"))
                return
            if rest is None:
                return
            reply, data = self._reply, rest
            assert reply is not None
            if self._tunnel is None and reply.head.status == 101:
                if data:
                    reply._take(data)
                return
            if not data and reply.head.body != 0:
                return
        self._read_body(reply, data)

    def _read_head(self, data: bytes) -> bytes | None:
        while True:
            assert self._reader is not None
            rest = self._reader.feed(data)
            if rest is None:
                if self._reader.begun and not self._head_began:
                    # An upstream may think for as long as it likes, but not in the middle of a head.
                    self._head_began = self._pool.loop.time()
                    self._pool.ticker.add(self)
                return None
            head = reply_head(self._reader, self._method)
            if not 100 <= head.status <= 599:
                raise BadHead(502, "there is no such status")
            if head.status == 101:
                if not self._asked_upgrade or b"upgrade" not in listed(head.headers, b"connection"):
                    raise BadHead(502, "it switches protocols unasked")
            elif head.status < 200:
                self._reader = reply_reader(self._pool.limits.head_bytes)
                data = rest
                continue
            break
        self._head_began = 0.0
        self._pool.ticker.discard(self)
        self._reader = None
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
            reply._take(data)
        else:
            if reply.complete:
                self.transport.abort()
                return
            followed = len(data) > self._left
            if followed:
                data = data[: self._left]
            self._left -= len(data)
            if data:
                reply._take(data)
            if not self._left:
                self._finish(reply, followed=followed)

    def _finish(self, reply: Reply, *, followed: bool) -> None:
        if followed:
            # More than the framing said: it belongs to nobody.
            self.lost = True
            self.transport.abort()
        reply._end(complete=True)

    def eof_received(self) -> bool:
        if self._tunnel is not None:
            return self._tunnel.half_closed(self._tunnel.client)
        if self._reply is not None and self._left == UNTIL_CLOSE and self._chunks is None:
            self._reply._end(complete=True)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._pool.forget(self)
        if self._tunnel is not None:
            self._tunnel.close()
            return
        self._stop_upload()
        if self._answered is not None and not self._answered.done():
            self._salvage()
        if self._reply is not None:
            self._reply._end(complete=False)
        self._fail(Cut(f"{self._pool.name} closed the connection before it answered"))
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
            self._reply._end(complete=True)

    def pause_writing(self) -> None:
        if self._tunnel is not None:
            pause(self._tunnel.client)
        self._paused = True

    def resume_writing(self) -> None:
        if self._tunnel is not None:
            resume(self._tunnel.client)
        self._paused = False
        if self._drained is not None:
            self._drained.set_result(None)
            self._drained = None

    def tick(self, now: float) -> None:
        if self._head_began and now - self._head_began > self._pool.limits.header_timeout:
            self._fail(TimedOut(f"{self._pool.name} stopped in the middle of a head"))

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


class Pool:
    """The connections to one upstream. `url`: scheme, host, port, and perhaps a path before all others."""

    def __init__(
        self,
        url: str,
        *,
        name: str = "",
        connect_timeout: float = 5.0,
        limits: Limits | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an http or https URL")
        self.host = (
            parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode("ascii")
        )
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.prefix = parts.path.rstrip("/").encode("ascii")
        shown = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if parts.scheme == "https" else 80
        self.authority = (shown if self.port == default else f"{shown}:{self.port}").encode("ascii")
        #: For messages: the name that the config gives it, and where it is.
        self.name = f"{name} ({shown}:{self.port})" if name else f"{shown}:{self.port}"
        self.connect_timeout = connect_timeout
        self.limits = limits or Limits()
        self.loop = asyncio.get_running_loop()
        self.ticker = Ticker(self.limits.tick)
        self.links: set[_Link] = set()
        self._ssl = ssl_context or (ssl.create_default_context() if parts.scheme == "https" else None)
        self._idle: deque[_Link] = deque()
        self._address = _literal(self.host, self.port)

    async def send(
        self,
        method: bytes,
        target: bytes,
        headers: Headers,
        body: bytes = b"",
        *,
        more: Callable[[], Awaitable[bytes]] | None = None,
        framing: int | None = None,
        upgrade: bool = False,
        once: bool = False,
    ) -> Reply:
        """Asks, and waits for the head of the answer; for ever, if it takes that long.

        `headers` hold no Host and no framing. `framing` is the length of the body, or CHUNKED; by default
        that of `body`, and none when that is empty. `more` gives the bytes behind `body`, call by call, and
        nothing at their end.

        Raises Unreachable, Cut, TimedOut or Unexpected. A connection that was kept open and turns out to be
        closed is not an error while the request can be sent again: nobody has read it. What cannot be sent
        again, because of `more` or because it may be done `once` only, gets a connection of its own.
        """
        if framing is None:
            framing = len(body) if body else None
        lines = [(b"Host", self.authority), *headers]
        if framing == CHUNKED:
            lines.append((b"Transfer-Encoding", b"chunked"))
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
        elif framing is not None:
            lines.append((b"Content-Length", b"%d" % framing))
        head = write_head(b"%b %b%b HTTP/1.1" % (method, self.prefix, target), lines)
        alone = once or more is not None
        link = None if alone else self._kept()
        while True:
            if link is None:
                link = await self._connect()
            answered = link.ask(method, upgrade=upgrade)
            asked_at = self.loop.time()
            try:
                if len(body) < 65_536:
                    link.transport.write(head + body)
                else:
                    link.transport.write(head)
                    link.transport.write(body)
                if more is not None:
                    link.upload = self.loop.create_task(_upload(link, more, chunked=framing == CHUNKED))
                return await answered
            except Cut:
                stale = link.reused and link.untouched and self.loop.time() - asked_at < STALE_SECONDS
                if alone or not stale:
                    raise
                link = None
            except BaseException:
                link.let_go(None)
                raise

    def keeps(self, head: ReplyHead) -> bool:
        """Whether another request may follow this answer on its connection."""
        # llama-server closes after a stream without saying so, whatever its headers promise.
        return head.keeps_alive and head.body != UNTIL_CLOSE and not head.stream

    def keep(self, link: _Link) -> None:
        link.idle_since = self.loop.time()
        self._idle.append(link)
        if len(self._idle) == 1:
            self.ticker.add(self)

    def tick(self, now: float) -> None:
        while self._idle and now - self._idle[0].idle_since >= IDLE_SECONDS:
            self._idle.popleft().transport.close()
        if not self._idle:
            self.ticker.discard(self)

    def _kept(self) -> _Link | None:
        now = self.loop.time()
        while self._idle:
            link = self._idle.pop()
            if link.lost or link.transport.is_closing():
                continue
            if now - link.idle_since < IDLE_SECONDS:
                return link
            link.transport.close()
        return None

    def forget(self, link: _Link) -> None:
        self.links.discard(link)
        self.ticker.discard(link)
        with contextlib.suppress(ValueError):
            self._idle.remove(link)

    async def close(self) -> None:
        for link in list(self.links):
            link.transport.abort()
        self._idle.clear()
        await asyncio.sleep(0)

    # --- connecting -------------------------------------------------------------------------------

    async def _connect(self) -> _Link:
        try:
            async with asyncio.timeout(self.connect_timeout):
                if self._address is not None:
                    sock = await self._dial(*self._address)
                else:
                    sock = await self._race()
                try:
                    _, link = await self.loop.create_connection(
                        lambda: _Link(self),
                        sock=sock,
                        ssl=self._ssl,
                        server_hostname=self.host if self._ssl is not None else None,
                    )
                except BaseException:
                    sock.close()
                    raise
                return link
        except TimeoutError:
            raise Unreachable(
                f"{self.name} did not accept a connection in {self.connect_timeout:g} s"
            ) from None
        except ssl.SSLCertVerificationError as error:
            raise Unreachable(
                f"{self.name} shows a certificate that is not trusted ({error.verify_message.rstrip('.')}); "
                "if it is yours, name its issuer's file in SSL_CERT_FILE"
            ) from error
        except ssl.SSLError as error:
            raise Unreachable(f"{self.name} does not speak TLS as expected: {error.reason}") from error
        except socket.gaierror as error:
            raise Unreachable(f"{self.name}: its host name is not known") from error
        except OSError as error:
            refused = error.errno == errno.ECONNREFUSED
            why = (
                "refused the connection"
                if refused
                else f"cannot be reached ({error.strerror or 'no answer'})"
            )
            raise Unreachable(f"{self.name} {why}", refused=refused) from error

    async def _dial(self, family: int, address: tuple[Any, ...]) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self.loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return sock

    async def _race(self) -> socket.socket:
        """Every address of the name, each a moment after the one before, the two families in turn."""
        found = await self.loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        families: dict[int, deque[tuple[int, tuple[Any, ...]]]] = {}
        for family, _, _, _, address in found:
            families.setdefault(family, deque()).append((family, address))
        addresses: deque[tuple[int, tuple[Any, ...]]] = deque()
        while any(families.values()):
            addresses.extend(queue.popleft() for queue in families.values() if queue)
        dialling: set[asyncio.Task[socket.socket]] = set()
        problem: OSError | None = None
        won: socket.socket | None = None
        try:
            while won is None and (addresses or dialling):
                if addresses:
                    dialling.add(self.loop.create_task(self._dial(*addresses.popleft())))
                done, dialling = await asyncio.wait(
                    dialling,
                    timeout=NEXT_ADDRESS_SECONDS if addresses else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in done:
                    error = task.exception()
                    if error is None and won is None:
                        won = task.result()
                    elif error is None:
                        task.result().close()
                    elif isinstance(error, OSError):
                        # A refusal says more than a silence: somebody is there.
                        problem = (
                            problem if problem is not None and problem.errno == errno.ECONNREFUSED else error
                        )
                    else:
                        raise error
        finally:
            for task in dialling:
                task.cancel()
            for late in await asyncio.gather(*dialling, return_exceptions=True):
                if isinstance(late, socket.socket):
                    late.close()
        if won is None:
            raise problem or OSError("no address")
        return won


def _literal(host: str, port: int) -> tuple[int, tuple[Any, ...]] | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return (socket.AF_INET, (host, port)) if address.version == 4 else (socket.AF_INET6, (host, port, 0, 0))


async def _upload(link: _Link, more: Callable[[], Awaitable[bytes]], *, chunked: bool) -> None:
    while data := await more():
        if link.lost:
            return
        link.transport.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
        await link.drained()
    if chunked and not link.lost:
        link.transport.write(b"0\r\n\r\n")
