"""Moments of one clock by another, which may be set, and which goes on while the first one sleeps."""

import random

import pytest

from keepalive.observers.dates import STEPS_REMEMBERED, Dates


class Machine:
    """Two clocks."""

    def __init__(self) -> None:
        self.uptime, self.time = 100.0, 1_000_000.0
        self.dates = Dates(lambda: self.uptime, lambda: self.time)

    def works(self, seconds: float) -> None:
        self.uptime += seconds
        self.time += seconds
        self.dates.look()

    def sleeps(self, seconds: float) -> None:
        self.time += seconds
        self.dates.look()


@pytest.mark.parametrize("seconds", [7200.0, -86_400.0, 0.5])
def test_what_was_before_a_sleep_or_a_step_keeps_its_time(seconds: float) -> None:
    machine = Machine()
    machine.works(50)
    machine.sleeps(seconds)
    machine.works(50)

    assert machine.dates(120.0) == 1_000_020.0
    assert machine.dates(149.9) == pytest.approx(1_000_049.9)
    assert machine.dates(160.0) == 1_000_060.0 + seconds
    assert machine.dates(machine.uptime) == machine.time
    assert machine.dates(machine.uptime + 30) == machine.time + 30


def test_the_same_moment_is_told_alike_however_the_clocks_are_read() -> None:
    machine, chance = Machine(), random.Random(0)
    told = set()
    for _ in range(1000):
        machine.works(1.0)
        machine.time += chance.uniform(-0.001, 0.001)
        machine.dates.look()
        told.add(machine.dates(120.0))

    assert told == {1_000_020.0}


def test_of_many_steps_the_last_are_remembered_and_the_first() -> None:
    machine = Machine()
    for _ in range(1000):
        machine.works(1.0)
        machine.sleeps(10.0)

    assert machine.dates(100.5) == 1_000_000.5
    assert machine.dates(machine.uptime) == machine.time
    assert machine.dates(machine.uptime - 50.5) == machine.time - 50.5 - 510
    assert len(machine.dates._since) == len(machine.dates._offsets) <= STEPS_REMEMBERED + 1
