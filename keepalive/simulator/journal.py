"""What happened, in order: the simulator's own account, against which tests judge a client.

It never holds a prompt, an answer or a token. It is bounded: a reader that polls with `since` sees a gap in
`n` when it was too slow.
"""

from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import Any

KEPT = 20_000


class Happened(StrEnum):
    REQUEST = "request"  # method, path, route, model (as asked), stream, max_tokens (1: a ping)
    REPLY = "reply"  # request, status
    CLIENT_GONE = "client.gone"  # request, phase
    CUT = "cut"  # request, how: we broke the connection
    LOAD_STARTED = "load.started"  # model, instance_id, owner, copies (listed or loading before this one)
    LOAD_ENDED = "load.ended"  # model, instance_id, owner, seconds
    LOAD_FAILED = "load.failed"  # model, instance_id, owner, reason
    LOAD_CANCELLED = "load.cancelled"  # model, instance_id, owner
    EVICTED = "evicted"  # model, instance_id, owner, by, generating, queued
    EXPIRED = "expired"  # model, instance_id, owner, idle_seconds
    UNLOADED = "unloaded"  # model, instance_id, owner, by, generating, queued
    CRASHED = "crashed"  # model, instance_id, owner, stays_listed, generating, queued
    RELOADED = "reloaded"  # model, instance_id: the engine came back by itself
    GENERATION_STARTED = "generation.started"  # request, route, model, instance_id, owner, asked
    # request, model, instance_id, tokens, prompt, cached (words), outcome
    GENERATION_ENDED = "generation.ended"
    DOWN = "restart.down"  # seconds
    UP = "restart.up"
    VANISHED = "vanished"  # seconds; ends with restart.up
    FAULTS = "faults.changed"  # names
    TIER = "tier.changed"  # tier
    SDK = "sdk.opened"  # path
    LISTEN_FAILED = "listen.failed"  # reason


Event = dict[str, Any]


class Journal:
    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._events: deque[Event] = deque(maxlen=KEPT)
        self.count = 0
        # Called in the middle of what happens: react with `loop.call_soon`, or at once to a "request".
        self.watchers: list[Callable[[Event], None]] = []

    def write(self, kind: Happened, **fields: Any) -> None:
        self.count += 1
        event: Event = {"n": self.count, "t": round(self._now(), 6), "kind": kind.value, **fields}
        self._events.append(event)
        for watcher in list(self.watchers):
            watcher(event)

    def since(self, n: int) -> list[Event]:
        return [event for event in self._events if event["n"] > n]
