"""How long an answer that has begun has been silent, and its end when that was too long.

The wait for its first byte is not counted, and neither is the time in which the caller has us not read. Where LM Studio
itself says that the model rests, nothing more will come: then `RESTING` is long enough.
"""

from typing import Final, Protocol

from keepalive.http1 import Caller, Reply, Ticker

#: A longer time between two turns of the clock is none in which we listened: the machine slept, or we were stopped.
LONGEST_TURN: Final = 5.0
#: Of a silence, how much has to be seen to be rest.
RESTING: Final = 30.0


class Call(Protocol):
    """Whose answer it is."""

    caller: Caller

    def passed_bytes(self) -> int | None:
        """Of the answer, once it passes."""

    def resting(self) -> tuple[float, float] | None:
        """For how long the model has been seen to rest, and how long ago that was."""


class Silence:
    """Listens to one answer, from `begin` to `stop`."""

    __slots__ = (
        "_bytes",
        "_call",
        "_reply",
        "_rested",
        "_seconds",
        "_ticker",
        "_timeout",
        "_turned",
        "begun",
        "stalled",
    )

    def __init__(self, reply: Reply, call: Call, timeout: float | None, ticker: Ticker) -> None:
        self._reply = reply
        self._call = call
        self._timeout = timeout
        self._rested = False
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
        if self._rested:
            return f"the answer had begun, and then LM Studio was seen to do nothing for {RESTING:g} s"
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
        taken = self._call.passed_bytes()
        came = self._reply.kept_bytes if taken is None else taken
        if came != self._bytes:
            self._bytes, self._seconds, self.begun = came, 0.0, True
        elif self.begun and not self._call.caller.paused:
            self._seconds += passed
            if self._timeout is None:
                return
            self._rested = self._seconds >= RESTING and self._rests()
            if self._rested or self._seconds >= self._timeout:
                self.stalled = True
                self.stop()
                self._reply.end(complete=False)

    def _rests(self) -> bool:
        seen = self._call.resting()
        if seen is None:
            return False
        rest, ago = seen
        # Only what was seen of this silence counts: before it the model may have rested, too.
        return min(rest, self._seconds - ago) >= RESTING
