"""The upstream's side: requests out, answers in.

Redirects are not followed, cookies are not kept, and no proxy is taken from the environment.
"""

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from keepalive.core.errors import Cut
from keepalive.http1.dial import dial, explained, literal, race
from keepalive.http1.heads import CHUNKED, UNTIL_CLOSE, Headers, ReplyHead, write_head
from keepalive.http1.limits import Limits
from keepalive.http1.link import Link
from keepalive.http1.outbox import Outbox
from keepalive.http1.reply import Reply
from keepalive.http1.ticker import Ticker

#: LM Studio and llama-server close idle connections after 5 s.
IDLE_SECONDS = 4.0
#: A kept connection that breaks so soon after a request was written had been closed before it was read.
STALE_SECONDS = 1.0
#: A smaller body is copied behind its head, so that both leave in one segment.
COPIED_BYTES = 65_536


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
        self.outbox = Outbox(self.loop)
        self.links: set[Link] = set()
        self._ssl = ssl_context or (ssl.create_default_context() if parts.scheme == "https" else None)
        self._idle: deque[Link] = deque()
        # llama-server closes after a stream without saying so, whatever its headers promise: seen once, it is
        # expected from then on, lest every request that follows a stream is sent twice.
        self._ends_with_streams = False
        self._address = literal(self.host, self.port)

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
        begin = self.begin(method, target, headers)
        return await self.send_on(method, begin, body, more=more, framing=framing, upgrade=upgrade, once=once)

    async def send_on(
        self,
        method: bytes,
        begin: bytes,
        body: bytes,
        *,
        more: Callable[[], Awaitable[bytes]] | None = None,
        framing: int | None = None,
        upgrade: bool = False,
        once: bool = False,
    ) -> Reply:
        """As `send`, with a head that has begun already."""
        if framing is None and body:
            framing = len(body)
        if framing is None:
            head = begin + b"\r\n"
        elif framing == CHUNKED:
            head = begin + b"Transfer-Encoding: chunked\r\n\r\n"
        else:
            head = b"%bContent-Length: %d\r\n\r\n" % (begin, framing)
        if framing == CHUNKED and body:
            body = _chunk(body)
        alone = once or more is not None
        link = None if alone else self._kept()
        while True:
            if link is None:
                link = await self._connect()
            answered = link.ask(method, upgrade=upgrade)
            asked_at = self.loop.time()
            try:
                if len(body) < COPIED_BYTES:
                    link.write(head + body)
                else:
                    link.write(head)
                    link.write(body)
                if more is not None:
                    link.upload = self.loop.create_task(_upload(link, more, chunked=framing == CHUNKED))
                return await answered
            except Cut:
                stale = link.reused and link.untouched and self.loop.time() - asked_at < STALE_SECONDS
                if alone or not stale:
                    raise
                self._ends_with_streams = self._ends_with_streams or link.streamed
                link = None
            except BaseException:
                link.let_go(None)
                raise

    def begin(self, method: bytes, target: bytes, headers: Headers) -> bytes:
        """A head but for its end, where the framing of the body is told."""
        prefix = b"" if target == b"*" else self.prefix  # that one is for the server itself
        first_line = b"%b %b%b HTTP/1.1" % (method, prefix, target)
        return write_head(first_line, [(b"Host", self.authority), *headers]).removesuffix(b"\r\n")

    def keeps(self, head: ReplyHead) -> bool:
        """Whether another request may follow this answer on its connection."""
        return head.keeps_alive and head.body != UNTIL_CLOSE and not (head.stream and self._ends_with_streams)

    def keep(self, link: Link) -> None:
        link.idle_since = self.loop.time()
        self._idle.append(link)
        if len(self._idle) == 1:
            self.ticker.add(self)

    def tick(self, now: float) -> None:
        while self._idle and now - self._idle[0].idle_since >= IDLE_SECONDS:
            self._idle.popleft().transport.close()
        if not self._idle:
            self.ticker.discard(self)

    def _kept(self) -> Link | None:
        now = self.loop.time()
        while self._idle:
            link = self._idle.pop()
            if link.lost or link.transport.is_closing():
                continue
            if now - link.idle_since < IDLE_SECONDS:
                return link
            link.transport.close()
        return None

    def forget(self, link: Link) -> None:
        self.links.discard(link)
        self.ticker.discard(link)
        with contextlib.suppress(ValueError):
            self._idle.remove(link)
            if link.streamed and self.loop.time() - link.idle_since < STALE_SECONDS:
                self._ends_with_streams = True

    async def close(self) -> None:
        for link in list(self.links):
            link.transport.abort()
        self._idle.clear()
        await asyncio.sleep(0)

    async def _connect(self) -> Link:
        with explained(self.name, self.connect_timeout):
            async with asyncio.timeout(self.connect_timeout):
                sock = await (dial(*self._address) if self._address else race(self.host, self.port))
                try:
                    _, link = await self.loop.create_connection(
                        lambda: Link(self),
                        sock=sock,
                        ssl=self._ssl,
                        server_hostname=self.host if self._ssl is not None else None,
                    )
                except BaseException:
                    sock.close()
                    raise
                return link


async def _upload(link: Link, more: Callable[[], Awaitable[bytes]], *, chunked: bool) -> None:
    while data := await more():
        if link.lost:
            return
        link.write(_chunk(data) if chunked else data)
        await link.drained()
    if chunked and not link.lost:
        link.write(b"0\r\n\r\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
