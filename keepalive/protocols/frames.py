"""WebSocket messages in bytes that are somebody else's (RFC 6455): where each begins and ends, and what it says.

The bytes pass through as they came. Only the place of a control frame changes: one between the fragments of a message
is handed out before them, as its sender could have sent it. What is not understood (an extension, a broken frame) is
handed out at once, and so is all that follows it: whoever reads beside a connection must not be its judge.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

_FINAL: Final = 0x80
_RESERVED: Final = 0x70  # an extension's: the payload is not what was said
_MASKED: Final = 0x80
_CONTINUED, _CLOSE = 0x0, 0x8
_OPCODES: Final = frozenset((_CONTINUED, 0x1, 0x2, _CLOSE, 0x9, 0xA))
_CONTROL_BYTES: Final = 125


_TEXT, _PLAIN_LENGTH, _WIDE_LENGTH = 0x1, 126, 65_536
GOING_AWAY: Final = 1001


def text_frame(text: bytes) -> bytes:
    """A message of a server's."""
    return _frame(_TEXT, text, masked=False)


def close_frame(code: int, *, masked: bool) -> bytes:
    return _frame(_CLOSE, code.to_bytes(2), masked=masked)


def _frame(opcode: int, payload: bytes, *, masked: bool) -> bytes:
    length = len(payload)
    if length < _PLAIN_LENGTH:
        size = bytes([length])
    elif length < _WIDE_LENGTH:
        size = bytes([126]) + length.to_bytes(2)
    else:
        size = bytes([127]) + length.to_bytes(8)
    first, second = _FINAL | opcode, size[0] | (_MASKED if masked else 0)
    # A mask is there to spoil what a web page makes a browser say. These are no such words: zeros will do.
    return bytes([first, second]) + size[1:] + (bytes(4) if masked else b"") + payload


class Kind(StrEnum):
    MESSAGE = "message"  # whole, and read
    CONTROL = "control"  # a ping or a pong
    CLOSE = "close"
    UNREAD = "unread"  # a part of a message that is too large, or bytes that are not understood


@dataclass(frozen=True, slots=True)
class Piece:
    data: bytes  # as it came
    kind: Kind
    text: bytes = b""  # what a message says


class FrameReader:
    """One direction of one connection. `limit` bounds what it keeps: a larger message is handed out unread."""

    __slots__ = ("_buffer", "_large", "_left", "_limit", "_masked", "_open", "_raw", "_text", "deaf")

    def __init__(self, *, masked: bool, limit: int) -> None:
        self._masked = masked  # callers mask what they send, servers do not
        self._limit = limit
        self._buffer = bytearray()  # of a frame that has not come to its end
        self._raw = bytearray()  # frames of a message that has not
        self._text = bytearray()
        self._open = False  # a message has begun and not ended
        self._large = False  # and it is handed out unread
        self._left = 0  # bytes of its present frame that are still to come
        self.deaf = False  # it met what it does not understand

    def feed(self, data: bytes) -> list[Piece]:
        if self.deaf:
            return [Piece(data, Kind.UNREAD)]
        self._buffer += data
        return list(self._pieces())

    @property
    def between(self) -> bool:
        """Whether it stands between two messages, so that a frame of somebody else's has a place."""
        return not (self._buffer or self._raw or self._left or self._open or self.deaf)

    def rest(self) -> bytes:
        """What came and was not handed out: the connection ends before the end of a message."""
        data = bytes(self._raw + self._buffer)
        self._raw.clear()
        self._buffer.clear()
        return data

    def _pieces(self) -> Iterator[Piece]:
        while self._buffer:
            if self._left:
                piece = self._take(min(self._left, len(self._buffer)))
                self._left -= len(piece)
                yield Piece(piece, Kind.UNREAD)
                continue
            if not self._understood():
                self.deaf = True
                yield Piece(self.rest(), Kind.UNREAD)
                return
            head = self._head()
            if head is None:
                return
            size = sum(head)
            final, opcode = self._buffer[0] & _FINAL, self._buffer[0] & 0x0F
            if opcode < _CLOSE and (self._large or len(self._raw) + size > self._limit):
                self._left = size
                self._large = self._open = not final
                if self._raw:
                    yield Piece(self._whole(), Kind.UNREAD)
                continue
            if len(self._buffer) < size:
                return
            frame = self._take(size)
            if opcode >= _CLOSE:
                yield Piece(frame, Kind.CLOSE if opcode == _CLOSE else Kind.CONTROL)
                continue
            self._open = not final
            self._raw += frame
            self._text += self._payload(frame, head[0])
            if final:
                text = bytes(self._text)
                yield Piece(self._whole(), Kind.MESSAGE, text)

    def _understood(self) -> bool:
        """As far as the frame in the buffer has come."""
        first = self._buffer[0]
        opcode = first & 0x0F
        if first & _RESERVED or opcode not in _OPCODES:
            return False
        if opcode < _CLOSE and (opcode == _CONTINUED) is not self._open:
            return False
        if len(self._buffer) == 1:
            return True
        second = self._buffer[1]
        if bool(second & _MASKED) is not self._masked:
            return False
        return opcode < _CLOSE or bool(first & _FINAL and second & 0x7F <= _CONTROL_BYTES)

    def _head(self) -> tuple[int, int] | None:
        """The bytes of the head, and of the payload; None where the head has not come."""
        if len(self._buffer) < 2:
            return None
        length = self._buffer[1] & 0x7F
        wide = {126: 2, 127: 8}.get(length, 0)
        size = 2 + wide + (4 if self._masked else 0)
        if len(self._buffer) < size:
            return None
        return size, int.from_bytes(self._buffer[2 : 2 + wide]) if wide else length

    def _payload(self, frame: bytes, head: int) -> bytes:
        if not self._masked:
            return frame[head:]
        length = len(frame) - head
        mask = (frame[head - 4 : head] * (length // 4 + 1))[:length]
        return (int.from_bytes(frame[head:]) ^ int.from_bytes(mask)).to_bytes(length)

    def _take(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _whole(self) -> bytes:
        raw = bytes(self._raw)
        self._raw.clear()
        self._text.clear()
        return raw
