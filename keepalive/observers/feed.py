"""The status as it changes, rendered once for all who watch.

Each document that differs from the one before it has a number, and with the daemon's life before it an id.
Whoever has a document asks for what came after its id, and gets the changes alone: the fields at the top, and
those upstreams and models that are no longer the same. So nothing is lost between reading the status and
watching it. While nobody watches, nothing is rendered.
"""

import asyncio
import json
import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keepalive.core.facts import Fact
from keepalive.core.records import Model, Upstream

Json = Mapping[str, Any]

# Changes come in bursts; nobody reads faster than this.
PUSH_INTERVAL = 0.25
PUSH_HEARTBEAT = 15.0
# Whoever falls behind further gets a whole document instead.
CHANGES_REMEMBERED = 64


class Feed:
    """An observer of the keeper."""

    def __init__(self, status: Callable[[], Json]) -> None:
        self._status = status
        self._life = secrets.token_hex(4)
        self._changed = asyncio.Event()
        self._pushed = asyncio.Event()
        self._pushed_number = 0
        self._stale = True  # something happened that `_document` does not show yet
        self._document: Json = {}
        self._whole: bytes | None = None  # `_document` as an event, once somebody needs it
        self._changes: deque[bytes] = deque(maxlen=CHANGES_REMEMBERED)  # the last of them led to `number`
        self.number = 0
        self.watching = 0

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        self.changed()

    def changed(self) -> None:
        self._stale = True
        if self.watching:
            self._changed.set()

    def look(self) -> Json:
        """The status as of now, with its id."""
        self._stale = False
        document = self._status()
        change = difference(self._document, document)
        if change is not None:
            self.number += 1
            self._changes.append(self._event(change))
            if self.watching:
                self._changed.set()
        self._document, self._whole = document, None
        return {"id": self._id, **document}

    async def run(self) -> None:
        while True:
            await self._changed.wait()
            self.push()
            await asyncio.sleep(PUSH_INTERVAL)

    def push(self) -> None:
        if self._stale:
            self.look()
        self._changed.clear()
        if self.number != self._pushed_number:
            self._pushed_number = self.number
            self._pushed.set()
            self._pushed = asyncio.Event()

    def place(self, after: str) -> int | None:
        """The number of this id, if what has changed since is still known."""
        if self._stale:
            self.look()
        life, _, number = after.partition("-")
        if life != self._life or not number.isascii() or not number.isdecimal() or len(number) > 20:
            return None
        return int(number) if 0 <= self.number - int(number) <= len(self._changes) else None

    def whole(self) -> tuple[int, bytes]:
        """The newest document as an event, for those who have none."""
        self.look()
        return self.number, self._whole_event()

    async def next(self, seen: int, *, partial: bool) -> tuple[int, bytes]:
        """What came after number `seen`; a comment when nothing changes for a while."""
        try:
            async with asyncio.timeout(PUSH_HEARTBEAT):
                while self.number == seen:
                    await self._pushed.wait()
        except TimeoutError:
            return seen, b": still here\n\n"
        behind = self.number - seen
        if not partial or behind > len(self._changes):
            return self.number, self._whole_event()
        return self.number, b"".join(list(self._changes)[-behind:])

    def _whole_event(self) -> bytes:
        if self._whole is None:
            self._whole = self._event(self._document)
        return self._whole

    @property
    def _id(self) -> str:
        return f"{self._life}-{self.number}"

    def _event(self, document: Json) -> bytes:
        text = json.dumps({"id": self._id, **document}, separators=(",", ":"))
        return f"id: {self._id}\ndata: {text}\n\n".encode()


def difference(before: Json, after: Json) -> Json | None:
    """What of `after` is new; None when nothing is, and all of it when there are other models than before."""
    parts = ("upstreams", "models")
    if any(_names(before.get(part, ())) != _names(after.get(part, ())) for part in parts):
        return after
    pairs = {part: zip(before.get(part, ()), after.get(part, ()), strict=True) for part in parts}
    changed = {part: [new for old, new in pairs[part] if new != old] for part in parts}
    # That time passes is no news.
    rest = after.keys() - {*parts, "now"}
    if not any(changed.values()) and all(name in before and after[name] == before[name] for name in rest):
        return None
    return {"partial": True, **after, **changed}


def _names(entries: Sequence[Json]) -> list[tuple[Any, Any, Any]]:
    return [(entry.get("name"), entry.get("upstream"), entry.get("key")) for entry in entries]
