"""The callers' side: who is accepted, and how that ends."""

import asyncio
import contextlib
import contextvars
import errno
import logging
import socket

from keepalive.http1.connection import Connection, Handler, Refusal, TurnedDown
from keepalive.http1.heads import Familiar, Headers, RequestHead
from keepalive.http1.limits import Limits
from keepalive.http1.outbox import Outbox
from keepalive.http1.ticker import Ticker
from keepalive.http1.turns import Turns
from keepalive.http1.vanished import notice_vanished
from keepalive.http1.watch import Watch

log = logging.getLogger("keepalive.http1")


# Callers that are accepted and not connected to their protocol yet: before more come, all others have a turn.
OPENED_AT_ONCE = 64


_NO_FAMILY = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)


def plain_refusal(status: int, message: str, head: RequestHead | None) -> tuple[Headers, bytes]:
    return [(b"Content-Type", b"text/plain; charset=utf-8")], message.encode() + b"\n"


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


class Listener:
    """Accepts callers and runs `handler` for each of their requests."""

    def __init__(
        self,
        handler: Handler,
        sockets: list[socket.socket],
        limits: Limits,
        refusal: Refusal = plain_refusal,
        turned_down: TurnedDown = lambda _status, _head: None,
        *,
        shared: bool = False,
    ) -> None:
        self.handler = handler
        self._shared = shared
        self.limits = limits
        self.refusal = refusal
        self.turned_down = turned_down
        self.loop = asyncio.get_running_loop()
        self.context = contextvars.copy_context()
        self.ticker = Ticker(limits.tick)
        self.outbox = Outbox(self.loop)
        self.turns = Turns(self.loop)
        self.watch = Watch()
        self.familiar = Familiar()
        self.connections: set[Connection] = set()
        self.closing = False
        self.sockets = sockets
        self._opening: set[asyncio.Task[None]] = set()
        self._quiet_until = 0.0
        self._room = asyncio.Event()
        self._room.set()
        self._idle: set[asyncio.Future[None]] = set()
        self._accepting = [self.loop.create_task(self._accept(sock)) for sock in sockets]

    @property
    def port(self) -> int:
        return int(self.sockets[0].getsockname()[1])

    def forget(self, connection: Connection) -> None:
        self.ticker.discard(connection)
        self.connections.discard(connection)
        self._room.set()

    async def _accept(self, listening: socket.socket) -> None:
        # Its own loop, because a server that is full must leave callers in the kernel's queue: asyncio's own
        # would accept them, or fail at accepting them and say so thousands of times. And asyncio's `sock_accept`,
        # when it is cancelled, may lose a caller whom it has accepted already.
        while not self.closing:
            if len(self.connections) + len(self._opening) >= self.limits.connections:
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
            # Beside each other: one after the other, newcomers would wait a turn of the loop for each of those before
            # them, and those turns are long when there are many who already ask.
            self._begin(sock)
            if len(self._opening) >= OPENED_AT_ONCE:
                await asyncio.sleep(0)

    async def _open(self, sock: socket.socket) -> None:
        try:
            sock.setblocking(False)
            if sock.family != getattr(socket, "AF_UNIX", None):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                notice_vanished(sock)
            await self.loop.connect_accepted_socket(lambda: Connection(self), sock)
        except OSError:
            sock.close()

    def _empty_queue(self, listening: socket.socket) -> None:
        """Who waits to be accepted on a socket that is closed is reset, and not told why."""
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listening.accept()
                self._begin(sock)

    def _begin(self, sock: socket.socket) -> None:
        opening = self.loop.create_task(self._open(sock))
        self._opening.add(opening)
        opening.add_done_callback(self._opened)

    def _opened(self, opening: asyncio.Task[None]) -> None:
        self._opening.discard(opening)
        self._room.set()

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
            if not self._shared:
                self._empty_queue(sock)
            sock.close()
        await asyncio.gather(*self._opening, return_exceptions=True)
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
        for connection in list(self.connections):
            connection.turn_away()
        tasks = [connection.task for connection in self.connections if connection.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self.connections):
            connection.transport.abort()
        await asyncio.sleep(0)
        self.watch.close()


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets for every address of `host`. Raises OSError."""
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    seen: set[tuple[object, ...]] = set()
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            if address in seen:
                continue
            seen.add(address)
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError as error:
                if error.errno not in _NO_FAMILY:
                    raise
                missing = error  # a kernel without IPv6 has addresses of it all the same
                continue
            sockets.append(sock)
            sock.setblocking(False)
            # Listen where connections of an earlier life still fade. On Windows, which does not mind them, that
            # option would let two programs listen in one place.
            option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
            sock.setsockopt(socket.SOL_SOCKET, option, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if port == 0 and len(sockets) > 1:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            sock.bind(address)
            sock.listen(1024)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    if missing is not None and not sockets:
        raise missing
    return sockets


async def serve(
    handler: Handler,
    *,
    sockets: list[socket.socket],
    limits: Limits | None = None,
    refusal: Refusal = plain_refusal,
    turned_down: TurnedDown = lambda _status, _head: None,
    shared: bool = False,
) -> Listener:
    """Serves `handler` on listening, non-blocking `sockets` (see `bind`), which it closes in the end.

    `shared`: somebody else has them open, too, so that whoever waits in their queue then waits for another process.
    """
    return Listener(handler, sockets, limits or Limits(), refusal, turned_down, shared=shared)
