"""APScheduler under a frozen clock and a stepping one: time passes for everybody, or jumps for some."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import pytest
from freezegun import freeze_time

from keepalive.keeper import schedule
from keepalive.keeper.schedule import Schedule
from tests.kit.live import until

START = datetime(2026, 3, 27, 12, 0, tzinfo=UTC)


class Heard:
    """What a schedule tells those whom it serves."""

    def __init__(self) -> None:
        self.ticks = 0
        self.jumps: list[float] = []
        self.missed = 0

    def tick(self) -> None:
        self.ticks += 1

    def count(self, missed: int) -> None:
        self.missed += missed


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def turning(
    heard: Heard, wall: Callable[[], float] | None = None, clock: Callable[[], float] | None = None
) -> AsyncIterator[Schedule]:
    clocks = {name: value for name, value in (("wall", wall), ("clock", clock)) if value is not None}
    running = Schedule(heard.tick, heard.jumps.append, heard.count, **clocks)
    task = asyncio.create_task(running.run())
    await asyncio.sleep(0)
    try:
        yield running
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def settled(running: Schedule) -> None:
    """What is due by the frozen clock has run."""
    running._scheduler.wakeup()
    for _ in range(20):
        await asyncio.sleep(0)


async def test_it_ticks_once_a_second() -> None:
    heard = Heard()
    with freeze_time(START, real_asyncio=True) as frozen:
        async with turning(heard, clock=Clock(0.0)) as running:
            await settled(running)
            before = heard.ticks
            for _ in range(60):
                frozen.tick(timedelta(seconds=1))
                await settled(running)

    assert (before, heard.ticks) == (0, 60)


async def test_however_late_it_is_it_runs_and_only_once() -> None:
    heard = Heard()
    with freeze_time(START, real_asyncio=True) as frozen:
        async with turning(heard, clock=Clock(0.0)) as running:
            frozen.tick(timedelta(hours=5))
            await settled(running)

    assert heard.ticks == 1


async def test_what_a_delay_has_swallowed_is_counted() -> None:
    heard, clock = Heard(), Clock(0.0)
    with freeze_time(START, real_asyncio=True) as frozen:
        async with turning(heard, wall=lambda: clock.now, clock=clock) as running:
            for seconds in (1, 1, 7, 1):
                clock.now += seconds
                frozen.tick(timedelta(seconds=seconds))
                await settled(running)

    assert (heard.ticks, heard.missed, heard.jumps) == (4, 6, [])


@pytest.mark.parametrize("days", [1, -1])
async def test_a_step_of_the_wall_clock_is_told_once_and_the_ticks_go_on(days: int) -> None:
    heard, clock = Heard(), Clock(0.0)
    with freeze_time(START, real_asyncio=True) as frozen:
        offset = START.timestamp()
        async with turning(heard, wall=lambda: clock.now + offset, clock=clock) as running:
            clock.now += 1
            frozen.tick(timedelta(seconds=1))
            await settled(running)
            offset += days * 86_400
            frozen.move_to(START + timedelta(days=days, seconds=1))
            running._watch()  # the monotonic watch, which a clock that was set back does not delay
            told = list(heard.jumps)
            before = heard.ticks
            for _ in range(10):
                clock.now += 1
                frozen.tick(timedelta(seconds=1))
                await settled(running)

    assert told == [days * 86_400.0]
    assert heard.jumps == told
    assert heard.ticks - before in (9, 10)


@pytest.mark.parametrize(("slew", "jumps"), [(0.5, []), (-0.5, []), (1.9, []), (2.5, [2.5]), (-2.5, [-2.5])])
def test_small_steps_are_no_jumps(slew: float, jumps: list[float]) -> None:
    heard, clock, wall = Heard(), Clock(0.0), Clock(1_000_000.0)
    running = Schedule(heard.tick, heard.jumps.append, heard.count, wall=wall, clock=clock)

    wall.now += slew
    running._watch()
    running._watch()

    assert heard.jumps == jumps


def test_a_clock_that_is_slewed_for_hours_never_jumps() -> None:
    heard, clock, wall = Heard(), Clock(0.0), Clock(1_000_000.0)
    running = Schedule(heard.tick, heard.jumps.append, heard.count, wall=wall, clock=clock)

    for _ in range(3600):
        clock.now += 1
        wall.now += 1.0005
        running._watch()

    assert heard.jumps == []


async def test_the_monotonic_watch_notices_a_clock_that_was_set_back_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Set back by a day, APScheduler itself would sleep for a day."""
    monkeypatch.setattr(schedule, "TICK", 0.1)
    heard = Heard()
    with freeze_time(START, real_asyncio=True, tick=True) as frozen:
        async with turning(heard, wall=lambda: datetime.now(UTC).timestamp()):
            await until(lambda: heard.ticks >= 2)
            frozen.move_to(START - timedelta(days=1))
            await until(lambda: heard.jumps)
            seen = heard.ticks
            await until(lambda: heard.ticks >= seen + 3)

    assert [round(jump, -3) for jump in heard.jumps] == [-86_000.0]


async def test_lateness_is_the_time_since_it_last_ran() -> None:
    heard, clock = Heard(), Clock(50.0)
    with freeze_time(START, real_asyncio=True) as frozen:
        async with turning(heard, wall=lambda: clock.now, clock=clock) as running:
            clock.now += 12
            late = running.late()
            frozen.tick(timedelta(seconds=12))
            await settled(running)
            then = running.late()

    assert (late, then) == (12.0, 0.0)


async def test_it_ends_when_it_is_cancelled() -> None:
    heard = Heard()

    async with turning(heard) as running:
        assert running._scheduler.running
    await asyncio.sleep(0)

    assert not running._scheduler.running


async def test_a_tick_that_fails_ends_the_schedule_with_its_error() -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    heard = Heard()
    running = Schedule(fail, heard.jumps.append, heard.count)

    with pytest.raises(RuntimeError, match="a bug"):
        await running.run()
