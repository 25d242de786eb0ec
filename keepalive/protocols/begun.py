"""A streamed OpenAI response as far as it has come: what the events that end it in its place have to go on with."""

import json
import re
from typing import Final

from keepalive.protocols import sse

#: Its first event is kept so far: it holds the response's names, and behind them what was asked, however long.
_FIRST_BYTES: Final = 16 * 1024

_NUMBER: Final = re.compile(rb'"sequence_number"\s*:\s*([0-9]{1,15})')
_FAILED: Final = re.compile(rb'"type"\s*:\s*"response\.failed"')
_ID: Final = re.compile(rb'"id"\s*:\s*"([A-Za-z0-9_.:-]{1,128})"')

# Of the response that has begun: what names it. What it was asked is not repeated.
_NAMES: Final = ("id", "object", "created_at", "model", "previous_response_id", "store", "metadata")


class Begun:
    """Handed the bytes that a caller has, in pieces that end where events do. Never raises."""

    __slots__ = ("_first", "_last", "failed")

    def __init__(self) -> None:
        self._first = b""
        self._last = b""
        #: It has said itself that it failed, in the event that is for it.
        self.failed = False

    def feed(self, data: bytes) -> None:
        if len(self._first) < _FIRST_BYTES:
            self._first += data[: _FIRST_BYTES - len(self._first)]
        if b"sequence_number" in data:
            self._last = data
        if b".failed" in data and not self.failed:
            self.failed = _FAILED.search(data) is not None

    @property
    def next_number(self) -> int:
        """The sequence number of the next event: OpenAI's own count from 0."""
        found = _NUMBER.findall(self._last)
        return int(found[-1]) + 1 if found else 0

    def response(self) -> dict[str, object]:
        """What the first event says of the response."""
        try:
            for event in sse.Decoder().feed(self._first):
                told = json.loads(event.data) if isinstance(event, sse.Event) else None
                found = told.get("response") if isinstance(told, dict) else None
                if isinstance(found, dict):
                    return {name: found[name] for name in _NAMES if name in found}
        except (ValueError, RecursionError):
            pass
        named = _ID.search(self._first)
        return {} if named is None else {"id": named[1].decode("ascii")}
