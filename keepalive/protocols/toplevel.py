"""The top level of a JSON object that is too large to be parsed, while it comes."""

import re
from collections.abc import Collection
from typing import Final

from keepalive.protocols.json_text import parsed


class TopLevel:
    """Walks through a JSON object, sees its own keys, and passes over everything deeper at the speed of C.

    Keeps the last value of each of `keys`, raw, up to one byte more than `most`: the one tells that something is
    missing. And where in the whole it stands.
    """

    __slots__ = (
        "_base",
        "_began",
        "_depth",
        "_escaped",
        "_expect",
        "_keeps",
        "_key",
        "_keys",
        "_limit",
        "_most",
        "_raw",
        "_string",
        "_taken",
        "bare",
        "opened",
        "spans",
        "values",
    )

    # What has to come next at the top level.
    START, KEY_OR_END, KEY, COLON, VALUE, SCALAR, COMMA, END, BROKEN = range(9)

    # Possessive throughout: what was passed over is never tried again, so the cost is linear.
    SPACE: Final = re.compile(rb"[ \t\n\r]*+")
    SCALAR_BYTES: Final = re.compile(rb"[-+.0-9A-Za-z]*+")
    # To the end of a string, of the chunk, or to a backslash that is the chunk's last byte.
    STRING_REST: Final = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
    # To the next bracket, or to a string that does not end in this chunk.
    NESTED: Final = re.compile(rb'(?:[^"{}\[\]]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)

    def __init__(self, keys: Collection[str], most: int) -> None:
        self.values: dict[str, bytes] = {}
        #: Where the last value of each of `keys` begins and ends, in bytes of all that came.
        self.spans: dict[str, tuple[int, int]] = {}
        #: Where the object's first key may stand, and whether it has none.
        self.opened = 0
        self.bare = True
        self._base = 0  # bytes before this chunk
        self._began = 0
        self._keys = keys
        self._most = most
        self._expect = self.START
        self._depth = 0  # of brackets inside the top-level object
        self._string = False  # inside a string that an earlier chunk began
        self._escaped = False  # and behind its backslash
        self._key = ""
        self._keeps = False  # the bytes of this key or value are wanted
        self._limit = 0
        self._raw = bytearray()
        self._taken = 0

    @property
    def complete(self) -> bool:
        """It has been an object, from the first byte to the last."""
        return self._expect == self.END

    def feed(self, chunk: bytes) -> None:
        at = 0
        end = len(chunk)
        self._taken = 0  # from here on, bytes of this chunk belong to what is kept
        while at < end and self._expect != self.BROKEN:
            if self._string:
                at = self._pass_string(chunk, at)
            elif self._depth:
                at = self._pass_nested(chunk, at)
            else:
                at = self._step(chunk, at)
        if self._keeps:
            self._keep(chunk, end)
        self._base += end

    def _step(self, chunk: bytes, at: int) -> int:
        """One token of the top level; `at` stands outside of strings and brackets."""
        expect = self._expect
        if expect == self.SCALAR:
            at = _past(self.SCALAR_BYTES, chunk, at)
            if at < len(chunk):
                self._value_ended(chunk, at)
            return at
        at = _past(self.SPACE, chunk, at)
        if at == len(chunk):
            return at
        byte = chunk[at]
        if expect == self.VALUE:
            self._begin_to_keep(at, self._key in self._keys, self._most)
            if byte == 0x22:
                self._string = True
            elif byte in b"{[":
                self._depth = 1
            elif byte in b"-0123456789tfnNI":  # NaN and Infinity as in `JSON`
                self._expect = self.SCALAR
            else:
                self._expect = self.BROKEN
        elif byte == 0x22 and expect in (self.KEY, self.KEY_OR_END):
            self._begin_to_keep(at, True, 256)  # enough for our own keys with every letter escaped
            self._string = True
        elif byte == 0x3A and expect == self.COLON:
            self._expect = self.VALUE
        elif byte == 0x2C and expect == self.COMMA:
            self._expect = self.KEY
        elif byte == 0x7D and expect in (self.COMMA, self.KEY_OR_END):
            self._expect = self.END
        elif byte == 0x7B and expect == self.START:
            self._expect = self.KEY_OR_END
            self.opened = self._base + at + 1
        else:
            self._expect = self.BROKEN
        return at + 1

    def _pass_string(self, chunk: bytes, at: int) -> int:
        if self._escaped:
            self._escaped = False
            at += 1
        # A picture has no backslash: its end is found fastest by its quote alone.
        quote = chunk.find(b'"', at)
        if chunk.find(b"\\", at, quote if quote >= 0 else len(chunk)) >= 0:
            quote = _past(self.STRING_REST, chunk, at)
            if chunk[quote : quote + 1] == b"\\":
                self._escaped = True
                return quote + 1
        if not 0 <= quote < len(chunk):
            return len(chunk)
        self._string = False
        if not self._depth:
            if self._expect == self.VALUE:
                self._value_ended(chunk, quote + 1)
            else:
                self._key_ended(chunk, quote + 1)
        return quote + 1

    def _pass_nested(self, chunk: bytes, at: int) -> int:
        at = _past(self.NESTED, chunk, at)
        if at == len(chunk):
            return at
        byte = chunk[at]
        at += 1
        if byte == 0x22:
            self._string = True
        elif byte in b"{[":
            self._depth += 1
        else:
            self._depth -= 1
            if not self._depth:
                self._value_ended(chunk, at)
        return at

    def _begin_to_keep(self, at: int, keeps: bool, limit: int) -> None:
        self._keeps = keeps
        self._limit = limit
        self._taken = at
        self._began = self._base + at
        self._raw.clear()

    def _keep(self, chunk: bytes, end: int) -> None:
        room = self._limit + 1 - len(self._raw)
        if room > 0:
            self._raw += chunk[self._taken : min(end, self._taken + room)]

    def _key_ended(self, chunk: bytes, end: int) -> None:
        self._keep(chunk, end)
        self._keeps = False
        self._expect = self.COLON
        self.bare = False
        key = parsed(bytes(self._raw)) if len(self._raw) <= self._limit else None
        self._key = key if isinstance(key, str) else ""

    def _value_ended(self, chunk: bytes, end: int) -> None:
        self._expect = self.COMMA
        if self._keeps:
            self._keep(chunk, end)
            self._keeps = False
            self.values[self._key] = bytes(self._raw)
            self.spans[self._key] = (self._began, self._base + end)


def _past(pattern: re.Pattern[bytes], chunk: bytes, at: int) -> int:
    match = pattern.match(chunk, at)
    return match.end() if match else at
