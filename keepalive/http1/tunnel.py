"""Two connections that have become one, and how a socket is left unread."""

import asyncio
from typing import Protocol


def pause(transport: asyncio.Transport) -> None:
    """Leaves a socket unread. Does nothing to one that is closing, which some loops would call an error."""
    if not transport.is_closing():
        transport.pause_reading()


def resume(transport: asyncio.Transport) -> None:
    if not transport.is_closing():
        transport.resume_reading()


class Between(Protocol):
    """Reads along in a tunnel, and may keep what the caller says for a while. Nothing of it may raise."""

    def opened(self, tunnel: "Tunnel", /) -> None: ...

    def said(self, data: bytes, /) -> bytes:
        """What of the caller's goes on now; the rest is sent by `Tunnel.send`."""

    def left(self) -> bytes:
        """The caller has said its last: what of it still goes on."""

    def answered(self, data: bytes, /) -> None:
        """The upstream's; it has gone on already."""


class Tunnel:
    """Two connections whose bytes go to each other, once HTTP is over on both."""

    __slots__ = ("_between", "_full", "_held", "client", "ended", "half", "upstream")

    def __init__(
        self, client: asyncio.Transport, upstream: asyncio.Transport, between: Between | None = None
    ) -> None:
        self.client = client
        self.upstream = upstream
        self.half = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._between = between
        self._full = False  # the upstream reads more slowly than it is written to
        self._held = False  # enough is kept of what the caller says
        if between is not None:
            between.opened(self)

    def from_client(self, data: bytes) -> None:
        if self._between is not None:
            data = self._between.said(data)
        self.send(data)

    def from_upstream(self, data: bytes) -> None:
        self.client.write(data)
        if self._between is not None:
            self._between.answered(data)

    def send(self, data: bytes) -> None:
        if data and not self.upstream.is_closing():
            self.upstream.write(data)

    def tell(self, data: bytes) -> None:
        """What the caller hears beside what the upstream says."""
        if not self.client.is_closing():
            self.client.write(data)

    def fill(self, full: bool) -> None:
        """Whether the upstream has enough to read."""
        self._full = full
        self._read_client()

    def hold(self, held: bool) -> None:
        """Whether no more is wanted of the caller for now."""
        if held is not self._held:
            self._held = held
            self._read_client()

    def _read_client(self) -> None:
        (pause if self._full or self._held else resume)(self.client)

    def client_ended(self) -> bool:
        if self._between is not None:
            self.send(self._between.left())
        return self.half_closed(self.upstream)

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
