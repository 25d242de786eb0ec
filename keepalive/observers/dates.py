"""When something was, by the wall clock of then.

The keeper's clock stands still while the machine sleeps, and does not notice when somebody sets the wall clock.
What happened before keeps the time that it had, and the same text each time it is told.
"""

from bisect import bisect
from collections.abc import Callable
from math import inf

# Both clocks are slewed together: what is more than reading one after the other is a step.
STEP = 0.1
STEPS_REMEMBERED = 100


class Dates:
    """Turns moments of `clock` into Unix seconds, as `wall` tells them."""

    def __init__(self, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self._clock = clock
        self._wall = wall
        self._since = [-inf]
        self._offsets = [wall() - clock()]

    def look(self) -> None:
        """Notice a step; to be called about once a second."""
        now = self._clock()
        offset = self._wall() - now
        if abs(offset - self._offsets[-1]) > STEP:
            self._since.append(now)
            self._offsets.append(offset)
            del self._since[1:-STEPS_REMEMBERED], self._offsets[1:-STEPS_REMEMBERED]

    def __call__(self, moment: float) -> float:
        return moment + self._offsets[bisect(self._since, moment) - 1]
