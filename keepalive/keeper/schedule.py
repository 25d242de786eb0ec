"""APScheduler, which says that time has passed and owns no work.

Two facts about it shape this file. It lives by the wall clock: set back by a day, it would sleep for a day;
a watch on the monotonic clock notices a step and starts it anew. And by default it skips a job that is a
second late: ours run however late they are, once.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from apscheduler.schedulers.asyncio import AsyncIOScheduler

TICK = 1.0
# Steps below this are the slewing of NTP and the jitter of a busy machine.
STEP = 2.0


class Schedule:
    """Calls `tick` every second, and `jumped(seconds)` when the wall clock was set or the machine slept.

    `missed(n)` is told how many runs a delay has swallowed.
    """

    def __init__(
        self,
        tick: Callable[[], None],
        jumped: Callable[[float], None],
        missed: Callable[[int], None],
        *,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tick = tick
        self._jumped = jumped
        self._missed = missed
        self._wall = wall
        self._clock = clock
        self._offset = wall() - clock()
        self.ran_at = clock()
        self._bug: Exception | None = None
        logging.getLogger("apscheduler").setLevel(logging.ERROR)
        self._scheduler = AsyncIOScheduler(
            timezone="UTC",
            job_defaults={"coalesce": True, "misfire_grace_time": None, "max_instances": 1},
        )
        self._scheduler.add_job(self._run, "interval", seconds=TICK, id="tick")

    async def run(self) -> None:
        """Turn until cancelled."""
        self.ran_at = self._clock()
        self._scheduler.start()
        try:
            while True:
                await asyncio.sleep(TICK)
                if self._bug is not None:
                    raise self._bug
                self._watch()
        finally:
            self._scheduler.shutdown(wait=False)

    def late(self) -> float:
        """Seconds since the scheduler last ran a job."""
        return self._clock() - self.ran_at

    async def _run(self) -> None:
        now = self._clock()
        swallowed = round((now - self.ran_at) / TICK) - 1
        self.ran_at = now
        if swallowed > 0:
            self._missed(swallowed)
        try:
            self._watch()
            self._tick()
        except Exception as bug:
            self._bug = bug  # the library would log it and go on; a bug ends the daemon, and systemd starts a clean one
            raise

    def _watch(self) -> None:
        offset = self._wall() - self._clock()
        step, self._offset = offset - self._offset, offset
        if abs(step) < STEP:
            return
        # The job's next run is a wall time that may now lie a day ahead.
        self._scheduler.reschedule_job("tick", trigger="interval", seconds=TICK)
        self._jumped(step)
