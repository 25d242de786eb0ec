"""Bodies in chunks, taken apart by llhttp."""

from collections.abc import Callable

import httptools

from keepalive.http1.heads import BadHead

# llhttp wants a head before the chunks. `Connection: close` makes it refuse whatever follows the last chunk
# instead of reading that as one more message.
_BEFORE = b"POST / HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"

#: How a chunk of so many bytes begins where it is written as nearly everybody does: its size in small digits alone.
CHUNK_SIZES = [b"%x\r\n" % size for size in range(4096)]

_NOTHING: list[bytes] = []

# The empty line that ends a body, and one byte before it.
_ENDING = 5


class Chunks:
    """One body in chunks: extensions and trailers are read over."""

    __slots__ = ("_last", "_parser", "_parts", "_whole", "between", "done", "followed", "on_body")

    def __init__(self) -> None:
        #: As long as there is a parser: what it has found, and what it calls.
        self._parts: list[bytes] = _NOTHING
        self.on_body: Callable[[bytes], None] | None = None
        self._last = b""
        self.done = False
        #: Something stood behind the last chunk. What it was is lost, so this connection is at its end.
        self.followed = False
        self._whole = True
        #: No chunk has begun that has not ended: one that is whole may be read by somebody else instead.
        self.between = True
        self._parser: httptools.HttpRequestParser | None = None

    def on_chunk_header(self) -> None:
        self._whole = False

    def on_chunk_complete(self) -> None:
        self._whole = True

    def on_message_complete(self) -> None:
        self.done = True

    def feed(self, data: bytes) -> bytes:
        """What of the body was in `data`. Raises BadHead; `rescued` has what came before it."""
        parser = self._parser
        if parser is None:
            self._parts = []
            self.on_body = self._parts.append
            parser = self._parser = httptools.HttpRequestParser(self)
            parser.feed_data(_BEFORE)
        try:
            parser.feed_data(data)
        except httptools.HttpParserError:
            # Never with the cause: its text may hold the caller's bytes, and a traceback would log them.
            if not self.done:
                raise BadHead(400, "the chunks of the body are malformed") from None
            self.followed = True
        # Of a size of which not all digits have come, the parser says nothing.
        self.between = self._whole and data.endswith(b"\r\n")
        self._last = data[-_ENDING:] if len(data) >= _ENDING else (self._last + data)[-_ENDING:]
        if self.done and (self._last[-4:] != b"\r\n\r\n" or self._last[:1] in (b"\r", b"\n")):
            self.followed = True  # by line ends: llhttp reads over those
        parts = self._parts
        return parts.pop() if len(parts) == 1 else self.rescued()

    def rest(self) -> None:
        """Between two chunks: lets go of what can be made anew. Call it now and then.

        A stream goes on for long, and a parser takes a tenth of its memory.
        """
        if self.between and not self.done:
            self._parser = self.on_body = None
            self._parts = _NOTHING

    def rescued(self) -> bytes:
        if not self._parts:
            return b""
        data = b"".join(self._parts)
        self._parts.clear()
        return data
