"""Faults on real sockets, with no HTTP library that could be kinder than the world is.

Script          what a server does with a connection: bytes to send, and the steps below
RawServer       plays a script for every connection and keeps what it was sent
Middleman       stands between a client and a server; cuts, resets, stalls or drips at a byte
RawClient       sends bytes as they are, whole or one by one, and reads what comes
never_accepting an address that nobody can connect to, where a connection hangs instead of being refused
epilogue        nothing of a test is left: file descriptors, tasks
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self


class Step:
    """Something to do other than to send bytes."""


@dataclass(frozen=True)
class Sleep(Step):
    seconds: float


class Read(Step):
    """Wait for one whole request, its body by Content-Length or chunked."""


class Fin(Step):
    """No more bytes from here; the other direction stays open."""


class Close(Step):
    pass


class Rst(Step):
    """Abort the connection: the other side gets ECONNRESET."""


class Hang(Step):
    """Neither read nor write any more, until the client leaves or the test ends."""


Script = Sequence[bytes | Step]


@dataclass
class Connection:
    """What one connection of a RawServer saw."""

    received: bytearray = field(default_factory=bytearray)
    requests: list[bytes] = field(default_factory=list)
    #: "fin" or "rst" once the other side ended; None while it has not.
    ended: str | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    ended_event: asyncio.Event = field(default_factory=asyncio.Event)


class RawServer:
    """Plays a script for each connection: the n-th one for the n-th, the last one for all further.

    `async with RawServer([b"HTTP/1.1 200 OK...", Rst()]) as server: server.port`
    A script that does not begin with a step waits for one request first.
    """

    def __init__(self, *scripts: Script, reads: bool = True, buffer: int | None = None) -> None:
        self.scripts = scripts
        self.reads = reads  # False: never read a byte
        self.buffer = buffer  # of the sockets, in bytes
        self.connections: list[Connection] = []
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def requests(self) -> list[bytes]:
        return [request for connection in self.connections for request in connection.requests]

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        if self.buffer:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.buffer)
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.buffer)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._tasks.add(asyncio.create_task(self._accept()))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._listener)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection()
            script = self.scripts[min(len(self.connections), len(self.scripts) - 1)] if self.scripts else ()
            self.connections.append(connection)
            self._tasks.add(asyncio.create_task(self._serve(sock, connection, script)))

    async def _serve(self, sock: socket.socket, connection: Connection, script: Script) -> None:
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        reader = asyncio.create_task(self._read(sock, connection, arrived)) if self.reads else None
        try:
            if self.reads and (not script or not isinstance(script[0], Step)):
                await self._request(connection, arrived)
            for step in script:
                match step:
                    case bytes():
                        await loop.sock_sendall(sock, step)
                    case Sleep(seconds):
                        await asyncio.sleep(seconds)
                    case Read():
                        await self._request(connection, arrived)
                    case Fin():
                        sock.shutdown(socket.SHUT_WR)
                    case Rst():
                        if reader is not None:
                            await _stopped(reader)
                        reset(sock)
                        return
                    case Close():
                        return
                    case Hang():
                        await connection.ended_event.wait()
                        return
            await connection.ended_event.wait()
        except (ConnectionError, OSError):
            pass  # the client left while it was being answered
        finally:
            if reader is not None:
                await _stopped(reader)
            sock.close()
            connection.over.set()

    async def _read(self, sock: socket.socket, connection: Connection, arrived: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(sock, 1 << 18):
                connection.received += data
                arrived.set()
            connection.ended = "fin"
        except OSError:
            connection.ended = "rst"
        connection.ended_event.set()
        arrived.set()

    async def _request(self, connection: Connection, arrived: asyncio.Event) -> None:
        """Takes the next whole request out of what was received."""
        done = sum(map(len, connection.requests))
        while (length := request_length(connection.received, done)) is None:
            if connection.ended:
                raise ConnectionResetError("left before a whole request was there")
            arrived.clear()
            await arrived.wait()
        connection.requests.append(bytes(connection.received[done : done + length]))


def request_length(data: bytes | bytearray, begin: int = 0) -> int | None:
    """How long the message that begins there is; None when it is not whole yet."""
    end = data.find(b"\r\n\r\n", begin)
    if end < 0:
        return None
    head = bytes(data[begin:end]).lower()
    at = end + 4
    if b"\r\ntransfer-encoding: chunked" in head:
        while True:
            line = data.find(b"\r\n", at)
            if line < 0:
                return None
            size = int(bytes(data[at:line]).split(b";")[0], 16)
            at = line + 2 + size + 2
            if size == 0:
                return at - begin if at <= len(data) else None
    _, found, rest = head.partition(b"\r\ncontent-length:")
    at += int(rest.split(b"\r\n")[0]) if found else 0
    return at - begin if at <= len(data) else None


def reset(sock: socket.socket) -> None:
    """Close with RST: unsent bytes are thrown away, the other side gets ECONNRESET."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def _stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def chunked(*parts: bytes, end: bool = True) -> bytes:
    """A chunked body, one chunk per part."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + (b"0\r\n\r\n" if end else b"")


def stream_of(*parts: bytes, end: bool = True) -> bytes:
    """A whole answer that streams events."""
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunked(*parts, end=end)
    )


def answer(body: bytes, status: bytes = b"200 OK", kind: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (
        status,
        kind,
        len(body),
        body,
    )


# --- between -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What happens to one direction: at byte `at`, or all along."""

    at: int | None = None
    #: "cut" ends both connections in order, "rst" aborts both, "stall" passes no further byte.
    then: str = "cut"
    bytes_per_second: float | None = None
    #: Whatever comes is passed on so many seconds later.
    delay: float = 0.0


PASS = Fault()


class Middleman:
    """A listener that passes bytes on to `port`, with a fault in either direction."""

    def __init__(self, port: int, *, up: Fault = PASS, down: Fault = PASS, at: int = 0) -> None:
        self.target = port
        self.up = up
        self.down = down
        self.port = at  # 0: one that is free
        self.connections = 0
        self.refuses = False
        #: Bytes passed, client to server and back.
        self.passed_up = 0
        self.passed_down = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=4096)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept())
        self._tasks.add(self._accepting)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._listener)
            self.connections += 1
            if self.refuses:
                reset(sock)
            else:
                self._tasks.add(asyncio.create_task(self._serve(sock)))

    def sever(self) -> None:
        """End the connections that there are."""
        for task in self._tasks - {self._accepting}:
            task.cancel()

    async def _serve(self, client: socket.socket) -> None:
        server = socket.socket()
        server.setblocking(False)
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.get_running_loop().sock_connect(server, ("127.0.0.1", self.target))
            pumps = [
                asyncio.create_task(self._pump(client, server, self.up, "passed_up")),
                asyncio.create_task(self._pump(server, client, self.down, "passed_down")),
            ]
            try:
                # "over" ends one direction as TCP does; everything else is the end of both.
                for ended in asyncio.as_completed(pumps):
                    if (how := await ended) == "over":
                        continue
                    if how == "rst":
                        await _all_stopped(pumps)
                        reset(client)
                        reset(server)
                    return
            finally:
                await _all_stopped(pumps)
        except OSError:
            reset(client)
        finally:
            client.close()
            server.close()

    async def _pump(self, source: socket.socket, sink: socket.socket, fault: Fault, counter: str) -> str:
        loop = asyncio.get_running_loop()
        passed = 0
        try:
            while True:
                size = 1 << 16
                if fault.bytes_per_second:
                    size = max(1, int(fault.bytes_per_second / 20))
                if fault.at is not None:
                    size = min(size, fault.at - passed)
                    if size <= 0:
                        if fault.then == "stall":
                            await asyncio.Event().wait()
                        return fault.then
                data = await loop.sock_recv(source, size)
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return "over"
                if fault.delay:
                    await asyncio.sleep(fault.delay)
                await loop.sock_sendall(sink, data)
                passed += len(data)
                setattr(self, counter, getattr(self, counter) + len(data))
                if fault.bytes_per_second:
                    await asyncio.sleep(len(data) / fault.bytes_per_second)
        except OSError:
            return "rst"


async def _all_stopped(tasks: Sequence[asyncio.Task[str]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# --- in front ----------------------------------------------------------------------------------------


class RawClient:
    """`async with RawClient(port) as client: await client.send(b"GET /..."); await client.read_all()`"""

    def __init__(self, port: int) -> None:
        self.port = port
        self.received = bytearray()
        #: The other side has ended; `was_reset` when it did not in order.
        self.ended = False
        self.was_reset = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await self._loop.sock_connect(self.sock, ("127.0.0.1", self.port))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.sock.close()

    async def send(self, data: bytes, *, bytewise: bool = False) -> None:
        """Sends all of it; `bytewise`: one byte per segment."""
        if not bytewise:
            await self._loop.sock_sendall(self.sock, data)
            return
        for at in range(len(data)):
            await self._loop.sock_sendall(self.sock, data[at : at + 1])
            await asyncio.sleep(0)

    async def read(self, size: int = 1 << 16) -> bytes:
        """What has come, or comes next; b"" at the end."""
        try:
            data = await self._loop.sock_recv(self.sock, size)
        except ConnectionError:
            self.was_reset = self.ended = True
            return b""
        self.ended = not data
        self.received += data
        return data

    async def read_all(self) -> bytes:
        """Everything up to the end of the connection."""
        while await self.read():
            pass
        return bytes(self.received)

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        reset(self.sock)


@contextlib.contextmanager
def never_accepting() -> Iterator[int]:
    """A port where a connection hangs: its queue is full, so the kernel drops what asks for more."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


# --- afterwards --------------------------------------------------------------------------------------


def open_fds() -> dict[int, str]:
    """The file descriptors of this process and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


@contextlib.asynccontextmanager
async def epilogue(
    *checks: Callable[[], Awaitable[object] | object], within: float = 30.0
) -> AsyncIterator[None]:
    """Around a test: afterwards no descriptor and no task may be there that was not there before.

    `checks` run then, too (gauges are 0, a warm request still streams); False or an exception is a failure.
    What takes a moment to go has `within` seconds.
    """
    fds, tasks = set(open_fds().values()), asyncio.all_tasks()
    yield
    for check in checks:
        result = check()
        if isinstance(result, Awaitable):
            result = await result
        assert result is not False, f"{check} failed"
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within
    while True:
        # By what they are, not by number: a number is given out again. epoll and eventfd belong to the loop.
        left = [name for name in open_fds().values() if name.startswith("socket:") and name not in fds]
        running = [task for task in asyncio.all_tasks() - tasks if not task.done()]
        if not left and not running:
            return
        if loop.time() > deadline:
            raise AssertionError(f"left behind: {left} {running}")
        await asyncio.sleep(0.01)
