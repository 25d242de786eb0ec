"""An upstream's answer, as whoever asked has it in hand.

An answer is either complete or cut; nothing here makes the one look like the other. Closing a reply that is
not complete closes its connection at once, which is how the upstream is told to stop.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from keepalive.core.errors import Cut
from keepalive.http1.heads import ReplyHead
from keepalive.http1.tunnel import Between, Tunnel, pause, resume

#: Of an answer that nobody takes yet.
AHEAD_BYTES = 65_536


# Shared by all, since most of the time nobody has any, and a stream goes on for long.
_NO_PARTS: list[bytes] = []


class ChunkSink(Protocol):
    """Who takes chunks as they stand on the wire."""

    def take_chunks(self, wire: bytes, /) -> int:
        """How many bytes of whole chunks it took. It must be quick and must not raise."""


class Source(Protocol):
    """The connection that it comes from."""

    transport: asyncio.Transport

    def let_go(self, reply: "Reply", /) -> None:
        """Nobody wants more of it."""

    def pour_chunks(self, reply: "Reply", /) -> None:
        """From now on its `chunk_sink` has them."""

    def tunnel_to(self, client: asyncio.Transport, first: bytes, between: Between | None, /) -> Tunnel: ...


class Reply:
    """An upstream's answer: its head, then its body as it comes. `close` it in any case."""

    __slots__ = (
        "_ended",
        "_link",
        "_parts",
        "_parts_bytes",
        "_read_bytes",
        "chunk_sink",
        "complete",
        "cut",
        "head",
        "sink",
    )

    def __init__(self, link: Source, head: ReplyHead) -> None:
        self.head = head
        #: The whole body has come.
        self.complete = False
        #: The connection, or the framing, broke before the end of the body.
        self.cut = False
        self._link: Source | None = link
        self._parts: list[bytes] = _NO_PARTS
        self._parts_bytes = 0
        self._read_bytes = 0
        self.sink: Callable[[bytes], None] | None = None
        self.chunk_sink: ChunkSink | None = None
        self._ended: asyncio.Future[None] | None = None

    def pour(self, sink: Callable[[bytes], None]) -> None:
        """From now on calls `sink` with the bytes of the body: at once with what is there, then as they come.

        `sink` runs inside the reading of the socket: it must be quick and must not raise.
        """
        self.sink = sink
        if self._parts:
            parts, self._parts = self._parts, _NO_PARTS
            sink(b"".join(parts) if len(parts) > 1 else parts[0])
        if self._parts_bytes > AHEAD_BYTES:
            self.resume()

    def pour_chunks(self, sink: ChunkSink) -> None:
        """Beside `pour`: `sink` is offered each chunk first, as it stands on the wire."""
        self.chunk_sink = sink
        if self._link is not None:
            self._link.pour_chunks(self)

    async def ended(self) -> bool:
        """Waits for the end of the body; True when it was complete, False when it was cut."""
        while not (self.complete or self.cut):
            await self.ending()
        return self.complete

    def ending(self) -> asyncio.Future[None]:
        """Done when the end has come, or bytes that nobody takes: without a step of ours that would wait as well."""
        self._ended = asyncio.get_running_loop().create_future()
        return self._ended

    async def read(self, limit: int) -> bytes:
        """The body until its end, or until `limit` bytes have come: `complete` and `cut` tell which."""
        if AHEAD_BYTES < self._parts_bytes < limit:
            self.resume()
        while not (self.complete or self.cut) and self._parts_bytes < limit:
            self._ended = asyncio.get_running_loop().create_future()
            await self._ended
        taken = b"".join(self._parts)
        self._parts = _NO_PARTS
        # Nobody waits any more, and what was taken is ahead of nobody.
        self._ended = None
        if self._parts_bytes > AHEAD_BYTES:
            self.resume()
        self._read_bytes += self._parts_bytes
        self._parts_bytes = 0
        return taken

    @property
    def begun(self) -> bytes:
        """What has come of the body, and nobody has taken yet."""
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    @property
    def kept_bytes(self) -> int:
        """Of the body: those that came before anybody took them as they come."""
        return self._read_bytes + self._parts_bytes

    def pause(self) -> None:
        if self._link is not None:
            pause(self._link.transport)

    def resume(self) -> None:
        if self._link is not None:
            resume(self._link.transport)

    def close(self) -> None:
        """No more of it is wanted. What was taken whole leaves its connection to the next request."""
        link, self._link = self._link, None
        self.sink = self.chunk_sink = None
        self._parts = _NO_PARTS
        if link is not None:
            link.let_go(self)

    def hand_over(self, client: asyncio.Transport, between: Between | None) -> Tunnel:
        """Joins this connection, which answered 101, to `client`."""
        link, self._link = self._link, None
        if link is None or link.transport.is_closing():
            raise Cut("the upstream closed the connection that it had agreed to upgrade")
        return link.tunnel_to(client, b"".join(self._parts), between)

    # --- from the connection, or from whoever gives it up ---------------------------------------------

    def take(self, data: bytes) -> None:
        if self.sink is not None:
            self.sink(data)
            return
        if self._parts is _NO_PARTS:
            self._parts = []
        self._parts.append(data)
        before, self._parts_bytes = self._parts_bytes, self._parts_bytes + len(data)
        if before <= AHEAD_BYTES < self._parts_bytes and self._ended is None:
            self.pause()
        elif self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def end(self, *, complete: bool) -> None:
        if self.complete or self.cut:
            return
        self.complete = complete
        self.cut = not complete
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
