"""The only time the simulator knows: the running loop's, plus what a test chose to skip.

Under a loop with a virtual clock everything runs as fast as that loop; under a real one `advance` makes an
idle timer of an hour, or a load of two minutes, end now. Timers fire in the order of their time, then of
creation.
"""

import asyncio
from collections.abc import Callable


class Timer:
    __slots__ = ("_clock", "_handle", "_ring", "n", "when")

    def __init__(self, clock: "Clock", n: int, when: float, ring: Callable[[], None]) -> None:
        self._clock = clock
        self._handle: asyncio.TimerHandle | None = None
        self._ring = ring
        self.n = n
        self.when = when

    def arm(self, at: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = asyncio.get_running_loop().call_at(at, self.fire)

    def fire(self) -> None:
        self.cancel()
        self._ring()

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._clock.forget(self)


class Clock:
    def __init__(self) -> None:
        self._skipped = 0.0
        self._timers: dict[int, Timer] = {}
        self._count = 0

    def now(self) -> float:
        try:
            return asyncio.get_running_loop().time() + self._skipped
        except RuntimeError:
            return self._skipped  # a world that is furnished before its loop runs

    def call_at(self, when: float, ring: Callable[[], None]) -> Timer:
        self._count += 1
        timer = Timer(self, self._count, when, ring)
        self._timers[timer.n] = timer
        timer.arm(when - self._skipped)
        return timer

    def call_later(self, seconds: float, ring: Callable[[], None]) -> Timer:
        return self.call_at(self.now() + seconds, ring)

    def advance(self, seconds: float) -> None:
        """Skip time. Whatever was due on the way happens in its order, each at its own moment."""
        if seconds < 0:
            raise ValueError(f"advance: {seconds} is negative; time does not go back")
        target = self.now() + seconds
        while due := [timer for timer in self._timers.values() if timer.when <= target]:
            first = min(due, key=lambda timer: (timer.when, timer.n))
            self._skipped += max(0.0, first.when - self.now())
            first.fire()
        self._skipped += max(0.0, target - self.now())
        for timer in list(self._timers.values()):
            timer.arm(timer.when - self._skipped)

    def forget(self, timer: Timer) -> None:
        self._timers.pop(timer.n, None)

    def stop(self) -> None:
        for timer in list(self._timers.values()):
            timer.cancel()
