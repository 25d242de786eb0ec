"""How long an answer that has begun has been silent, and its end when that was too long.

The wait for its first byte is not counted, and neither is the time in which the caller has us not read.
"""

from collections.abc import Callable
from typing import Final

from keepalive.http1 import Caller, Reply, Ticker

#: A longer time between two turns of the clock is none in which we listened: the machine slept, or we were stopped.
LONGEST_TURN: Final = 5.0


class Silence:
    """Listens to one answer, from `begin` to `stop`; `came` is how many bytes of it have come."""

    __slots__ = (
        "_bytes",
        "_caller",
        "_came",
        "_reply",
        "_seconds",
        "_ticker",
        "_timeout",
        "_turned",
        "begun",
        "stalled",
    )

    def __init__(
        self, reply: Reply, caller: Caller, came: Callable[[], int], timeout: float | None, ticker: Ticker
    ) -> None:
        self._reply = reply
        self._caller = caller
        self._came = came
        self._timeout = timeout
        self._ticker = ticker
        self._bytes = 0
        self._seconds = 0.0
        self._turned = 0.0
        #: An error is no work of the model: it begins with its head.
        self.begun = reply.head.status >= 400
        #: It was given up.
        self.stalled = False

    @property
    def seconds(self) -> float | None:
        """None while it has not begun."""
        return self._seconds if self.begun else None

    @property
    def why(self) -> str:
        return f"the answer had begun, and then nothing came for {self._timeout or 0:g} s"

    def begin(self, now: float) -> None:
        self._turned = now
        self._ticker.add(self)

    def stop(self) -> None:
        self._ticker.discard(self)

    def tick(self, now: float) -> None:
        passed = min(now - self._turned, LONGEST_TURN)
        self._turned = now
        # Looked at here, so that the hot path has nothing to say to us.
        came = self._came()
        if came != self._bytes:
            self._bytes, self._seconds, self.begun = came, 0.0, True
        elif self.begun and not self._caller.paused:
            self._seconds += passed
            if self._timeout is not None and self._seconds >= self._timeout:
                self.stalled = True
                self.stop()
                self._reply.end(complete=False)
