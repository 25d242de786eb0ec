"""Server-sent events: where one ends, what it says, how one is written.

Everything here depends on the bytes alone, never on how they were cut into chunks. A line ends with CRLF,
LF or CR, in any mixture; an event ends with an empty line.
"""

import re
from dataclasses import dataclass
from typing import Final

BOM = b"\xef\xbb\xbf"


# What the bytes so far end with. From _BLANK_LF on, an event may begin here.
_IN_BOM: Final = 0  # inside the byte order mark at the very start
_LINE: Final = 1
_LF: Final = 2  # the end of a line that was not empty
_CR: Final = 3  # the same, where an LF may still belong to it
_BLANK_LF: Final = 4
_BLANK_CR: Final = 5
_START: Final = 6


class Splitter:
    """Finds where events end in a stream that is passed on unchanged. Keeps no bytes.

    A byte order mark counts only at the very start of a stream: whoever puts something before the first bytes
    has to take it away from them.
    """

    __slots__ = ("_at", "_bom_bytes")

    def __init__(self) -> None:
        self._at: int = _START
        self._bom_bytes = 0

    @property
    def at_boundary(self) -> bool:
        """The bytes so far are whole events: a comment or an event may stand here."""
        return self._at >= _BLANK_LF

    def feed(self, chunk: bytes) -> int:
        """The offset just behind the last event that is complete in `chunk`; 0 when none is."""
        # Nearly every chunk is whole events, and these two bytes are a boundary whatever stood before them.
        if chunk.endswith(b"\n\n"):
            self._at = _BLANK_LF
            return len(chunk)
        if not chunk:
            return 0
        begin = 0
        if self._at == _START or self._at == _IN_BOM:
            begin = self._skip_bom(chunk)
            if begin == len(chunk):
                return 0 if self._at == _IN_BOM else begin
        end = self._last_end(chunk, begin)
        last = chunk[-1]
        if end == len(chunk):
            self._at = _BLANK_CR if last == 0x0D else _BLANK_LF
        else:
            self._at = _LF if last == 0x0A else _CR if last == 0x0D else _LINE
        return end

    def _last_end(self, chunk: bytes, begin: int) -> int:
        """The offset behind the last empty line from `begin` on, where `_at` stands before it; `begin` if none."""
        pair = chunk.rfind(b"\n\n", begin)
        # One look tells that there is no CR to search for, which is true of all servers we met.
        if chunk.find(b"\r", max(pair, begin)) >= 0:
            pair = max(pair, chunk.rfind(b"\n\r", begin), chunk.rfind(b"\r\r", begin))
        end = pair + 2 if pair >= 0 else self._end_at(chunk, begin)
        if end and chunk[end - 1] == 0x0D and chunk[end : end + 1] == b"\n":
            end += 1  # the other half of one line end
        return end

    def _end_at(self, chunk: bytes, begin: int) -> int:
        """The same where no two line ends stand together: one at `begin` may follow one of the chunk before."""
        first = chunk[begin]
        if first == 0x0A:
            # After a CR, this LF is the other half of one line end.
            return begin if self._at == _LINE or self._at == _CR else begin + 1
        if first == 0x0D:
            return begin if self._at == _LINE else begin + 1
        return begin

    def _skip_bom(self, chunk: bytes) -> int:
        """The offset behind what belongs to a byte order mark; `_at` says what came before that offset."""
        missing = BOM[self._bom_bytes :]
        here = chunk[: len(missing)]
        if here == missing:
            self._at = _BLANK_LF
            return len(here)
        if missing.startswith(here):
            self._bom_bytes += len(here)
            self._at = _IN_BOM
            return len(here)
        self._at = _LINE if self._bom_bytes else _BLANK_LF
        return 0


class EventTooLong(ValueError):
    """One event is larger than its reader allows."""


@dataclass(frozen=True, slots=True)
class Event:
    """One dispatched event. `id` is the last one that the stream set, as browsers keep it."""

    data: str
    event: str = "message"
    id: str = ""


@dataclass(frozen=True, slots=True)
class Comment:
    """One line that began with a colon, without it and without one space behind it."""

    text: str


class Decoder:
    """Bytes to events and comments, in their order, as the HTML standard reads them.

    A comment comes out with the blank line behind it. What never saw its blank line never comes out.
    Memory is bounded by `max_event_bytes` and one chunk.
    """

    __slots__ = ("_first", "_id", "_pending", "_skip_lf", "max_event_bytes", "retry")

    def __init__(self, *, max_event_bytes: int = 16 * 1024 * 1024) -> None:
        self.max_event_bytes = max_event_bytes
        #: Milliseconds, as the stream last set it.
        self.retry: int | None = None
        self._first = True
        self._id = ""
        self._skip_lf = False
        self._pending = bytearray()

    def feed(self, chunk: bytes) -> list[Event | Comment]:
        """What became complete with `chunk`. After EventTooLong nothing more can be read from the stream."""
        if self._skip_lf and chunk:
            self._skip_lf = False
            if chunk.startswith(b"\n"):
                chunk = chunk[1:]
        if b"\r" in chunk:
            self._skip_lf = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if not chunk:
            return []

        # Only new bytes are searched, so that a large event in small chunks costs no more than its length.
        straddles = chunk.startswith(b"\n") and self._pending.endswith(b"\n")
        if not straddles and b"\n\n" not in chunk:
            self._keep(chunk)
            return []
        *complete, rest = (self._pending + chunk).split(b"\n\n")
        self._pending = bytearray()
        items: list[Event | Comment] = []
        for block in complete:
            if len(block) > self.max_event_bytes:
                raise EventTooLong(f"an event is larger than {self.max_event_bytes} bytes")
            if self._first:
                self._first = False
                block = block.removeprefix(BOM)
            self._read(block, items)
        if rest:
            self._keep(rest)
        return items

    def _keep(self, chunk: bytes | bytearray) -> None:
        self._pending += chunk
        if len(self._pending) > self.max_event_bytes + 1:  # the one may be the first LF of its end
            self._pending.clear()
            raise EventTooLong(f"an event is larger than {self.max_event_bytes} bytes")

    def _read(self, block: bytes | bytearray, items: list[Event | Comment]) -> None:
        data: list[str] = []
        kind = ""
        for line in block.decode("utf-8", "replace").split("\n"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                data.append(value)
            elif name == "event":
                kind = value
            elif name == "id":
                if "\0" not in value:
                    self._id = value
            elif name == "retry":
                if value.isascii() and value.isdigit():
                    self.retry = int(value[:18])  # a number with thousands of digits would raise
            elif not name and line:
                items.append(Comment(value))
        if data:
            items.append(Event("\n".join(data), kind or "message", self._id))


_LINE_END = re.compile(r"\r\n|\r|\n")


def encode(data: str, *, event: str | None = None, id: str | None = None) -> bytes:
    """One event; a line break in `data` arrives as LF, one in a name as a space."""
    lines = [f"data: {line}" for line in _LINE_END.split(data)]
    if id is not None:
        lines.insert(0, f"id: {_one_line(id)}")
    if event is not None:
        lines.insert(0, f"event: {_one_line(event)}")
    return ("\n".join(lines) + "\n\n").encode("utf-8", "replace")


def encode_comment(text: str) -> bytes:
    """One comment with its own blank line; a line break arrives as a space."""
    return f": {_one_line(text)}\n\n".encode("utf-8", "replace")


def _one_line(text: str) -> str:
    return _LINE_END.sub(" ", text)
