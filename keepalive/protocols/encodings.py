"""Content codings of a request body: read beside it, for what it names. What is passed on stays as it came.

LM Studio unpacks what a caller packed, so a model that we did not see inside would be a way past the keeper.
"""

import zlib
from collections.abc import Iterable, Iterator
from typing import Final

#: What is unpacked in one go: a few bytes can hold a thousand times as many.
PIECE_BYTES: Final = 65_536

_WINDOWS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_GZIP: Final = b"\x1f\x8b"
_MOST: Final = 4  # codings on top of each other; nobody needs two


class BadEncoding(Exception):
    """A body that is not what its Content-Encoding says; `str()` is a sentence for its caller."""


def codings(values: Iterable[bytes]) -> list[str] | None:
    """What was applied to a body, the last first, by its Content-Encoding headers; None: one that is not known."""
    names = [part.strip().lower() for value in values for part in value.decode("latin-1").split(",")]
    found = [name for name in names if name not in ("", "identity")]
    return found[::-1] if len(found) <= _MOST and all(name in _WINDOWS for name in found) else None


class Unpacker:
    """Takes the codings off a body while it comes, a piece at a time."""

    __slots__ = ("_layers",)

    def __init__(self, names: list[str]) -> None:
        self._layers = [_Layer(name) for name in names]

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What `data` held, in pieces; more than that is not in memory at once. Raises BadEncoding."""
        return self._through(data, 0)

    def _through(self, data: bytes, at: int) -> Iterator[bytes]:
        if at == len(self._layers):
            yield data
            return
        for piece in self._layers[at].feed(data):
            yield from self._through(piece, at + 1)

    def finish(self) -> None:
        """The body is over. Raises BadEncoding where what it holds is not."""
        for layer in self._layers:
            layer.finish()


class _Layer:
    __slots__ = ("_behind", "_name", "_reader")

    def __init__(self, name: str) -> None:
        self._name = name
        self._reader = zlib.decompressobj(_WINDOWS[name])
        self._behind = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        full = False  # there may be more, though all was taken in
        while data or full:
            if self._reader.eof:
                data = self._next(data)
                if not data:
                    return
            try:
                piece = self._reader.decompress(data, PIECE_BYTES)
            except zlib.error:
                raise BadEncoding(f"the body is not {self._name}, as its Content-Encoding says") from None
            eof = self._reader.eof
            data = self._reader.unused_data if eof else self._reader.unconsumed_tail
            full = not eof and len(piece) == PIECE_BYTES
            if piece:
                yield piece

    def _next(self, data: bytes) -> bytes:
        """Behind the end of one gzip file another one counts, and everything else is read over, as Node does it."""
        data, self._behind = self._behind + data, b""
        if self._name == "deflate" or not data.startswith(_GZIP):
            self._behind = data[:2]  # may be half of a beginning, and is none for good with its second byte
            return b""
        self._reader = zlib.decompressobj(_WINDOWS[self._name])
        return data

    def finish(self) -> None:
        if not self._reader.eof:
            raise BadEncoding(f"the body ends in the middle of its {self._name} data")


def unpacked(body: bytes, names: list[str]) -> bytes:
    """A body that was read as such before, without its codings: for whoever has to change it."""
    if not names:
        return body
    unpacker = Unpacker(names)
    return b"".join(unpacker.feed(body))


def readable(body: bytes, encodings: Iterable[bytes]) -> bytes:
    """What an answer with these Content-Encoding headers says, as far as one piece goes; else `body`.

    Callers take packed answers, and a server in between packs LM Studio's errors like everything else.
    """
    names = codings(encodings)
    if not names:
        return body
    try:
        return next(Unpacker(names).feed(body), b"")
    except BadEncoding:
        return body
