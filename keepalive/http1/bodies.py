"""Bodies in chunks, taken apart by llhttp."""

import httptools

from keepalive.http1.heads import BadHead

# llhttp wants a head before the chunks. `Connection: close` makes it refuse whatever follows the last chunk
# instead of reading that as one more message.
_BEFORE = b"POST / HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"


class Chunks:
    """One body in chunks: extensions and trailers are read over."""

    __slots__ = ("_parser", "_parts", "done", "followed", "on_body")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.done = False
        #: Something stood behind the last chunk. What it was is lost, so this connection is at its end.
        self.followed = False
        self.on_body = self._parts.append
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(_BEFORE)

    def on_message_complete(self) -> None:
        self.done = True

    def feed(self, data: bytes) -> bytes:
        """What of the body was in `data`. Raises BadHead; `rescued` has what came before it."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            # Never with the cause: its text may hold the caller's bytes, and a traceback would log them.
            if not self.done:
                raise BadHead(400, "the chunks of the body are malformed") from None
            self.followed = True
        parts = self._parts
        return parts.pop() if len(parts) == 1 else self.rescued()

    def rescued(self) -> bytes:
        data = b"".join(self._parts)
        self._parts.clear()
        return data
