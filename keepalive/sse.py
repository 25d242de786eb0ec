"""Server-sent events: where one ends, what it says, how one is written.

Everything here is a function of the bytes alone, so how they were cut into chunks never matters.
"""

from dataclasses import dataclass

BOM = b"\xef\xbb\xbf"


class Splitter:
    """Finds where events end in a stream that is passed on unchanged. Keeps no bytes."""

    __slots__ = ("at_boundary",)

    def __init__(self) -> None:
        #: Nothing of an event has been fed yet, or its blank line has: a comment or an event may stand here.
        self.at_boundary: bool = True

    def feed(self, chunk: bytes) -> int:
        """The offset just behind the last event that is complete in `chunk`; 0 when none is."""
        raise NotImplementedError


class EventTooLong(ValueError):
    """One event is larger than the reader allows."""


@dataclass(frozen=True, slots=True)
class Event:
    """One dispatched event. `id` is the last one the stream set, as browsers keep it."""

    data: str
    event: str = "message"
    id: str = ""


@dataclass(frozen=True, slots=True)
class Comment:
    """One line that began with a colon, without it and one space behind it."""

    text: str


class Decoder:
    """Bytes to events and comments, in their order. An event that never saw its blank line is not dispatched."""

    def __init__(self, *, max_event_bytes: int = 16 * 1024 * 1024) -> None:
        self.max_event_bytes = max_event_bytes
        #: Milliseconds, as the stream last set it.
        self.retry: int | None = None

    def feed(self, chunk: bytes) -> list[Event | Comment]:
        """What became complete with `chunk`. Raises EventTooLong, after which nothing more can be fed."""
        raise NotImplementedError


def encode(data: str, *, event: str | None = None, id: str | None = None) -> bytes:
    """One event; every line break in `data` arrives as one LF."""
    raise NotImplementedError


def encode_comment(text: str) -> bytes:
    """One comment that ends with its own blank line; line breaks become spaces."""
    raise NotImplementedError
