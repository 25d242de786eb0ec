"""The hot path: what an upstream's answer is poured into.

Bytes go to the caller first, unchanged, and are looked at afterwards; what looks at them cannot stop them.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Final, Protocol

from keepalive.http1 import CHUNK_SIZES, Reply, Writer
from keepalive.protocols.meter import GAP_BOUNDS, Meter, Words, closing_quote
from keepalive.protocols.sse import BOM, Splitter

#: Of an event that is not complete yet: held back, so that what a caller has always ends where an event does.
HELD_BACK_BYTES: Final = 262_144
#: Of a body: kept, because an error may stand in it whatever its status says.
FIRST_BYTES: Final = 4096

Push = Callable[[bytes], None]

_CHUNK_SIZES: Final = len(CHUNK_SIZES)
#: From so many bytes on the size of a chunk, as it stands on the wire, has three digits.
_THREE_DIGITS: Final = len(CHUNK_SIZES[256]) + 256 + len(b"\r\n")

# An error says so at once, and so much is enough to see it.
_LOOK_BYTES: Final = 64
_ERRORS: Final = (b'{"error"', b'{"type":"error"')


async def first_event(reply: Reply) -> bytes:
    """The beginning of a stream, with its first event whole if it is one to be held back."""
    split, first = Splitter(), b""
    while len(first) < HELD_BACK_BYTES and (data := await reply.read(1)):
        first += data
        if split.feed(data):
            break
    return first


async def first_error(reply: Reply) -> bytes:
    """The beginning of a body, no more than tells it from an error; an error whole, within `HELD_BACK_BYTES`."""
    first = b""
    while _may_be_error(first) and (data := await reply.read(1)):
        first += data
        if looks_like_error(first):
            return first + await reply.read(HELD_BACK_BYTES)
    return first


def no_error(first: bytes, *, stream: bool) -> bool:
    """Whether so much of a body is enough to see that it is none."""
    enough = first.endswith(b"\n\n") if stream else len(first) >= _LOOK_BYTES
    return enough and b'"error"' not in first


def _may_be_error(first: bytes) -> bool:
    """Whether what is still to come may make an error of it."""
    if not first or len(first) >= _LOOK_BYTES:
        return not first
    begun = b"".join(first.split())
    return any(error.startswith(begun) for error in _ERRORS)


def looks_like_error(first: bytes) -> bool:
    first = first[:_LOOK_BYTES]
    return b"error" in first and b"".join(first.split()).startswith(_ERRORS)


class Speaker(Protocol):
    """Who may have said something of ours before the upstream's first byte."""

    spoke: bool


class Whole:
    """A body of any kind."""

    __slots__ = ("_push", "_words", "bytes", "first")

    def __init__(self, push: Push, words: Words | None = None) -> None:
        self._push = push
        self._words = words
        self.bytes = 0
        self.first = b""

    def take(self, data: bytes) -> None:
        self._push(data)
        self.bytes += len(data)
        if len(self.first) < FIRST_BYTES:
            self.first += data[:FIRST_BYTES]
        if self._words is not None:
            self._words.feed(data)

    @property
    def empty(self) -> bool:
        """An object, as an answer is, without one word in it."""
        words = self._words
        return words is not None and not words.said and self.first.lstrip().startswith(b"{")


class Events:
    """A stream of events. What the caller has of it ends where an event does: the upstream may die within one."""

    __slots__ = (
        "_now",
        "_prefix",
        "_push",
        "_push_on",
        "_speaker",
        "_splitter",
        "_suffix",
        "_tail",
        "bytes",
        "meter",
        "torn",
        "writer",
    )

    def __init__(
        self, push: Push, now: Callable[[], float], meter: Meter, speaker: Speaker | None = None
    ) -> None:
        self._push: Push = self._push_first
        self._push_on = push
        self._speaker = speaker
        self._now = now
        self._splitter = Splitter()
        self._tail: bytearray | None = None  # of an event that has begun
        # What chunks of the known form have around their text. Empty where they are not looked for: while something is
        # held back, and where what came last ended no event as nearly all do.
        self._prefix = self._suffix = b""
        #: Who has chunks that are passed on as they stand on the wire, if that is how the answer is written.
        self.writer: Writer | None = None
        self.bytes = 0
        #: None once it has failed.
        self.meter: Meter | None = meter
        #: The caller has a part of an event, because that one was too large to be held back.
        self.torn = False

    def take_chunks(self, wire: bytes) -> int:
        """As they stand on the wire, those of them that the caller can have as they are."""
        # Nearly always one read is one chunk, and that one event which differs from those before in its text alone.
        # So much is seen without taking it apart, and what is passed on whole need not be put together again.
        meter, writer, prefix = self.meter, self.writer, self._prefix
        if not prefix or meter is None or writer is None:
            return 0
        suffix = self._suffix
        whole = len(wire)
        size_line = 4 if whole < _THREE_DIGITS else 5
        size = whole - size_line - 2
        if (
            size < _CHUNK_SIZES
            and wire.endswith(suffix)
            and wire.startswith(prefix, size_line)
            and wire.startswith(CHUNK_SIZES[size])
        ):
            quote = wire.find(b'"', size_line + len(prefix))
            if quote == whole - len(suffix) or closing_quote(wire, quote) == whole - len(suffix):
                writer.write(wire)
                self.bytes += size
                # As `meter.count` does: these are the steps that are taken most often of all.
                now = self._now()
                meter.gaps[bisect_left(GAP_BOUNDS, now - meter.event_at)] += 1
                meter.event_at = now
                return whole
        at = events = passed = 0
        while at < whole:
            begin = wire.find(b"\n", at, at + 6) + 1
            if not wire.startswith(prefix, begin):
                break
            quote = wire.find(b'"', begin + len(prefix))
            if not wire.startswith(suffix, quote):
                quote = closing_quote(wire, quote)
                if not wire.startswith(suffix, quote):
                    break
            end = quote + len(suffix)
            size = end - begin - 2
            if not (size < _CHUNK_SIZES and wire.startswith(CHUNK_SIZES[size], at)):
                break
            at = end
            events += 1
            passed += size
        if events:
            writer.write(wire if at == whole else wire[:at])
            self.bytes += passed
            meter.count(self._now(), events)
        return at

    def take(self, data: bytes) -> None:
        end = self._splitter.feed(data)
        if at_end := end == len(data) and not self._tail:
            self._push(data)
            self.torn = False
        else:
            self._take_part(data, end)
        self.bytes += len(data)
        meter = self.meter
        if meter is not None:
            try:
                meter.feed(self._now(), data)
            except Exception:  # noqa: BLE001  a measurement may fail, a stream may not
                self.meter = meter = None
        if meter is not None and at_end and data.endswith(b"\n\n"):
            self._prefix, self._suffix = meter.prefix, meter.wire_suffix
        else:
            self._prefix = b""

    def _push_first(self, data: bytes) -> None:
        # A byte order mark is one at the very start alone: behind a comment of ours it would be a part of the
        # first line, and the first event lost. The splitter holds one back until it is whole.
        self._push = self._push_on
        spoke = self._speaker is not None and self._speaker.spoke
        self._push(data.removeprefix(BOM) if spoke else data)

    def _take_part(self, data: bytes, end: int) -> None:
        tail = self._tail or bytearray()
        if end:
            tail += memoryview(data)[:end]
            self._push(bytes(tail))
            tail = bytearray(memoryview(data)[end:])
            self.torn = False
        else:
            tail += data
        if len(tail) > HELD_BACK_BYTES:
            self._push(bytes(tail))
            tail.clear()
            self.torn = True
        self._tail = tail or None

    def finish(self) -> None:
        """The upstream is through: what it did not end as an event is the caller's, too."""
        self._push(bytes(self._tail or b""))
