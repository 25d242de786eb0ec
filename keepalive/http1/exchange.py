"""One request of one caller, and the answer to it."""

import asyncio
from http import HTTPStatus
from typing import Protocol

from keepalive.http1.heads import BadHead, Headers, RequestHead, write_head
from keepalive.http1.reply import Reply
from keepalive.http1.tunnel import Between

REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


# Shared by all, since most of the time nobody has any, and a stream goes on for long.
_NO_PIECES: list[bytes] = []


class Caller(Protocol):
    """Who asks and is answered: an `Exchange`, or whoever asks in the name of one."""

    passes: "Passing | None"

    @property
    def head(self) -> RequestHead: ...
    @property
    def gone(self) -> bool: ...
    @property
    def refused(self) -> BadHead | None: ...
    @property
    def started(self) -> bool: ...
    @property
    def finished(self) -> bool: ...
    @property
    def paused(self) -> bool: ...
    @property
    def body_ended(self) -> bool: ...

    def forget_head(self) -> None:
        """Of the head nobody needs more than the method any more: a stream goes on for long."""

    async def read(self) -> bytes: ...
    def read_whole(self) -> bytes | None:
        """All of the request body, where it has come in one piece; else `read` it."""

    async def drained(self) -> None: ...
    def start(
        self, status: int, headers: Headers, *, reason: bytes | None = None, length: int | None = None
    ) -> None: ...
    def push(self, data: bytes) -> None: ...
    def flush(self) -> None: ...
    def chunk_writer(self) -> "Writer | None":
        """Who writes a chunk of the body as it stands on the wire, where that is how the body is written."""

    def finish(self) -> None: ...
    def cancel(self) -> None:
        """Cancels whoever answers."""

    def answer(self, status: int, headers: Headers, body: bytes) -> None: ...
    def abort(self) -> None: ...
    async def tunnel(self, reply: Reply, headers: Headers, between: Between | None) -> None: ...


class Passing(Protocol):
    """What passes to a caller, and can wait while the caller reads too slowly: a `Reply`."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Writer(Protocol):
    """Who sends bytes as they are."""

    def write(self, data: bytes, /) -> None: ...


class Connection(Writer, Protocol):
    """What the exchange stands on."""

    ending: bool  # this exchange is the last one on it
    write_paused: bool

    def invite(self) -> None:
        """Somebody waits for the body."""

    def read_on(self) -> None:
        """There is room for more of it."""

    def reset(self) -> None: ...
    def cancel(self) -> None:
        """Cancels whoever answers."""

    async def join(self, reply: Reply, between: Between | None, /) -> None: ...


class Exchange:
    """One request of one caller, and the answer to it."""

    __slots__ = (
        "_bodiless",
        "_chunked",
        "_connection",
        "_counted",
        "_drained",
        "_head",
        "_pieces",
        "_reader",
        "body_came",
        "finished",
        "gone",
        "head",
        "kept_bytes",
        "passes",
        "paused",
        "refused",
        "started",
    )

    def __init__(self, connection: Connection, head: RequestHead) -> None:
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
        self.passes: Passing | None = None
        self._head = b""
        self._bodiless = False
        self._chunked = False
        self._counted = True  # the answer's end can be told without closing the connection
        self._drained: asyncio.Future[None] | None = None
        self._pieces: list[bytes] = _NO_PIECES
        self._reader: asyncio.Future[None] | None = None
        #: Of the request body: what nobody has read yet, and whether all of it is there.
        self.kept_bytes = 0
        self.body_came = head.body == 0

    # --- the request ------------------------------------------------------------------------------

    @property
    def body_ended(self) -> bool:
        """Every byte of the request body has been read by `read`."""
        return self.body_came and not self._pieces

    def forget_head(self) -> None:
        """Of the head nobody needs more than the method any more: a stream goes on for long."""
        if self.head.like.shared:
            self.head = self.head.like  # which is there in any case
        else:
            self.head.forget()
            self.head.reading = None

    def read_whole(self) -> bytes | None:
        """All of the request body, where it has come in one piece; else `read` it."""
        if not self.body_came or len(self._pieces) != 1:
            return None
        self.kept_bytes = 0
        self._connection.read_on()
        (data,), self._pieces = self._pieces, _NO_PIECES
        return data

    async def read(self) -> bytes:
        """The next bytes of the request body; empty at its end."""
        while not self._pieces and not self.body_came:
            self._connection.invite()
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if not self._pieces:
            return b""
        data = b"".join(self._pieces) if len(self._pieces) > 1 else self._pieces[0]
        self._pieces = _NO_PIECES
        self.kept_bytes = 0
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
        if not head.keeps_alive or not self._counted or connection.ending or not self.body_came:
            connection.ending = True
            headers.append((b"Connection", b"close"))
        phrase = REASONS.get(status, b"") if reason is None else reason
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
        self._connection.write(data)

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
            self._connection.write(self._head)
            self._head = b""

    def chunk_writer(self) -> Writer | None:
        """Once the head has left. Bytes written to a caller who has left since go nowhere."""
        return self._connection if self._chunked and not self._head else None

    def finish(self) -> None:
        """The answer is complete."""
        if self.finished:
            return
        self.finished = True
        if self.gone:
            return
        if self._chunked:
            self._connection.write(self._head + b"0\r\n\r\n")
            self._head = b""
        else:
            self.flush()

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """A whole answer at once."""
        self.start(status, headers, length=len(body))
        self.push(body)
        self.finish()

    def cancel(self) -> None:
        """Cancels whoever answers."""
        self._connection.cancel()

    def abort(self) -> None:
        """Ends the connection so that the caller cannot take what it has for the whole answer."""
        self.finished = True
        if not self.gone:
            self._connection.reset()

    async def tunnel(self, reply: Reply, headers: Headers, between: Between | None) -> None:
        """Answers 101 and joins both connections until both directions have ended. No limits of any kind."""
        assert not self.started
        self.started = True
        self._connection.write(write_head(b"HTTP/1.1 101 Switching Protocols", headers))
        await self._connection.join(reply, between)
        self.finished = True

    # --- from the connection ----------------------------------------------------------------------

    @property
    def awaited(self) -> bool:
        """Somebody waits in `read`."""
        return self._reader is not None and not self._reader.done()

    def take(self, piece: bytes) -> None:
        """The next bytes of the request body."""
        if piece:
            if self._pieces is _NO_PIECES:
                self._pieces = []
            self._pieces.append(piece)
            self.kept_bytes += len(piece)

    def wake(self) -> None:
        if self._reader is not None:
            self._reader.set_result(None)

    def refuse(self, bad: BadHead) -> None:
        """It turned out to be no request: what came of its body is nobody's."""
        self.refused = bad
        self.body_came = True
        self._pieces = _NO_PIECES

    def pause(self) -> None:
        self.paused = True
        if self.passes is not None:
            self.passes.pause()

    def resume(self) -> None:
        self.paused = False
        if self._drained is not None:
            self._drained.set_result(None)
            self._drained = None
        if self.passes is not None:
            self.passes.resume()
