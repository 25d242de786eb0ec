"""A turn of the loop begins only so many requests; the others begin in the next ones, in the order in which they came.

Every callback that is ready runs in one turn, and what takes several turns (a listing, a ping, a health check: each of
them a connection, a request and an answer) waits for all the others in each of them. Hundreds of callers who ask at the
same time would make a turn take as long as all of their requests together.
"""

import asyncio
from collections import deque
from collections.abc import Callable

#: Ten milliseconds of work.
BEGUN_AT_ONCE = 32


class Turns:
    """When the requests of a listener begin."""

    __slots__ = ("_begun", "_loop", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._begun = 0  # in this turn
        self._waiting: deque[Callable[[], None]] = deque()

    def begin(self, start: Callable[[], None]) -> None:
        """Calls `start` now, or in one of the next turns."""
        if self._begun >= BEGUN_AT_ONCE:
            self._waiting.append(start)
            return
        if not self._begun:
            self._loop.call_soon(self._next)
        self._begun += 1
        start()

    def _next(self) -> None:
        self._begun = min(len(self._waiting), BEGUN_AT_ONCE)
        if self._begun:
            self._loop.call_soon(self._next)
        for _ in range(self._begun):
            self._waiting.popleft()()
