"""Two connections that have become one, and how a socket is left unread."""

import asyncio


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
