"""One coarse clock for what happens when nothing does: a timer per stream would cost more than its bytes."""

import asyncio
import logging
from typing import Protocol

log = logging.getLogger("keepalive.http1")


class Ticking(Protocol):
    def tick(self, now: float) -> None: ...


class Ticker:
    """Calls `tick` of each member every `interval` seconds; sleeps while there are none."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._members: set[Ticking] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._members)

    def add(self, member: Ticking) -> None:
        self._members.add(member)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.interval, self._turn)

    def discard(self, member: Ticking) -> None:
        # The timer goes on to its next turn: most members stay for a millisecond, and are followed by others.
        self._members.discard(member)

    def _turn(self) -> None:
        if not self._members:
            self._timer = None
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self.interval, self._turn)
        now = loop.time()
        for member in list(self._members):
            try:
                member.tick(now)
            except Exception as error:  # noqa: BLE001  one bad member must not stop the clock of all others
                log.error("http1.tick_failed", extra={"error": type(error).__name__})
                self.discard(member)
