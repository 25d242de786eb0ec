"""What is remembered: of one model, in memory and on disk, and by real daemons that are killed."""

import json
import os
import random
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from keepalive.core.apply import apply
from keepalive.core.explain import eta
from keepalive.core.facts import (
    Entry,
    Fact,
    Instance,
    Listed,
    LoadEnded,
    LoadOutcome,
    LoadsRecalled,
    LoadStarted,
    ModelId,
    PingEnded,
    PingOutcome,
    PingStarted,
    Tier,
    WaitEnded,
    WaitStarted,
)
from keepalive.core.records import Cause, Model
from keepalive.core.states import State
from keepalive.observers.history import History, writer
from keepalive.observers.history.store import APPLICATION, BOUNDS, VERSION, Past, Place, Store
from keepalive.observers.history.story import (
    CHANGES_MAX,
    DAY,
    HOUR,
    HOURS_MAX,
    OFF,
    Asked,
    Changed,
    Evicted,
    Loaded,
    Pinged,
    Story,
    Waited,
)
from keepalive.observers.history.story import Entry as Row
from keepalive.observers.history.writer import ROWS_WAITING, Writer
from keepalive.simulator.models import SimModel
from tests.kit.live import (
    DaemonProcess,
    SimulatorProcess,
    ask,
    asked,
    daemon,
    ending,
    model,
    settings,
    simulator,
    until,
    wait_until,
)

GEMMA = ModelId("local", "gemma")
HERE = "http://127.0.0.1:1234"
NOON = 1_795_348_800.0  # 2026-11-22T12:00:00Z

W, C, L = State.WARM, State.COLD, State.LOADING


def told(*entries: Row) -> Story:
    story = Story()
    for entry in entries:
        story.add(entry)
    return story


def changes(*pairs: tuple[float, str]) -> Story:
    return told(*(Changed(NOON + at, state) for at, state in pairs))


def line(story: Story, now: float = 0.0) -> list[tuple[float, str]]:
    return [(at - NOON, state) for at, state in story.timeline(NOON + now)]


# --- one model ------------------------------------------------------------------------------------


def test_the_timeline_begins_with_the_state_of_a_day_ago() -> None:
    story = changes((-DAY - 900, C), (-DAY - 60, W), (-600, C), (-500, W))

    assert line(story) == [(-DAY, W), (-600, C), (-500, W)]


def test_or_when_anything_is_known() -> None:
    assert line(changes((-600, C), (-500, W))) == [(-600, C), (-500, W)]
    assert line(Story()) == []


def test_a_state_that_did_not_last_or_did_not_change_is_no_entry() -> None:
    assert line(changes((-600, C), (-600, L), (-500, W), (-400, W))) == [(-600, L), (-500, W)]
    assert line(changes((-600, W), (-500, C), (-500, W), (-400, C))) == [(-600, W), (-400, C)]


@pytest.mark.parametrize("back", [7200.0, DAY, 400 * DAY])
def test_after_a_clock_was_set_back_the_day_begins_with_what_came_then(back: float) -> None:
    story = changes((-600, C), (-500, W), (-400 - back, C), (-300 - back, W))

    assert line(story, -200 - back) == [(-400 - back, C), (-300 - back, W)]


def test_a_clock_that_was_far_ahead_for_a_while_does_no_harm() -> None:
    story = changes((-600, C), (400 * DAY, W), (-400, C), (-300, W))

    assert line(story, -200) == [(-600, C), (-300, W)]


def test_what_the_clock_of_then_puts_into_the_future_is_now_at_the_latest() -> None:
    assert line(changes((-600, C), (7200, W))) == [(-600, C), (0, W)]


def test_what_ended_more_than_a_day_ago_is_forgotten() -> None:
    story = Story()
    for hour in range(100):
        story.add(Changed(NOON + hour * HOUR, (C, W)[hour % 2]))

    assert len(story.changes) == 25


def test_of_a_model_that_flaps_the_shortest_states_go_first() -> None:
    story = changes((-40_000, W), (-36_000, C), (-30_000, W))
    for second in range(0, 2 * CHANGES_MAX, 2):
        story.add(Changed(NOON - 20_000 + second, C))
        story.add(Changed(NOON - 20_000 + second + 1, W))

    assert len(story.changes) <= CHANGES_MAX
    assert line(story)[:3] == [(-40_000, W), (-36_000, C), (-30_000, W)]
    assert all(a[1] != b[1] for a, b in zip(line(story), line(story)[1:], strict=False))


def test_twenty_loads_and_evictions_are_remembered() -> None:
    story = told(*(Loaded(NOON + n, LoadOutcome.OK, n) for n in range(30)))
    for n in range(30):
        story.add(Evicted(NOON + n, Cause.CRASH, 1.0))

    assert [load.seconds for load in story.loads] == list(range(10, 30))
    assert [lost.at for lost in story.evictions] == [NOON + n for n in range(10, 30)]


def test_waits_and_pings_are_those_of_the_last_day() -> None:
    story = told(
        Waited(NOON - 25 * HOUR, 100.0, True),
        Waited(NOON - 23 * HOUR, 2.0, True),
        Waited(NOON, 3.0, False),
        Pinged(NOON - 25 * HOUR, PingOutcome.OK, 0.1),
        Pinged(NOON - HOUR, PingOutcome.OK, 0.1),
        Pinged(NOON, PingOutcome.TIMEOUT, 60.0),
        Waited(NOON + 2 * HOUR, 50.0, True),  # before the clock was set back
    )

    assert story.waits_lately(NOON) == (2, 5.0)
    assert story.pings_lately(NOON) == {
        PingOutcome.OK: 1,
        PingOutcome.ERROR: 0,
        PingOutcome.TIMEOUT: 1,
        PingOutcome.WRONG_MODEL: 0,
        PingOutcome.REFUSED: 0,
        PingOutcome.SKIPPED: 0,
    }


def test_hours_are_bounded_however_the_clock_jumps() -> None:
    chance, story = random.Random(0), Story()
    for _ in range(2000):
        at = NOON + chance.randrange(-(10**8), 10**8)
        story.add(Waited(at, 1.0, True))
        story.add(Pinged(at, PingOutcome.OK, 1.0))

    assert (len(story.waits), len(story.pings)) == (HOURS_MAX, HOURS_MAX)


def test_what_an_earlier_life_left_behind_comes_first() -> None:
    past = told(
        Loaded(NOON - 9000, LoadOutcome.OK, 7.0),
        Changed(NOON - 9000, W),
        Evicted(NOON - 8000, Cause.TIMER, 300.0),
        Waited(NOON - 60, 2.0, True),
        Pinged(NOON - 60, PingOutcome.OK, 0.1),
        Changed(NOON - 7000, OFF),
    )
    own = told(
        Changed(NOON - 600, State.UNKNOWN),
        Loaded(NOON - 500, LoadOutcome.OK, 8.0),
        Waited(NOON - 30, 3.0, True),
        Pinged(NOON - 30, PingOutcome.OK, 0.1),
    )
    own.begin_with(past)

    assert [load.seconds for load in own.loads] == [7.0, 8.0]
    assert [lost.cause for lost in own.evictions] == [Cause.TIMER]
    assert line(own) == [(-9000, W), (-7000, OFF), (-600, State.UNKNOWN)]
    assert own.waits_lately(NOON) == (2, 5.0)
    assert own.pings_lately(NOON)[PingOutcome.OK] == 2


# --- from facts -----------------------------------------------------------------------------------


class Life:
    """A model whose facts the history observes; its clock is the wall's, noon at 0."""

    def __init__(self, history: History, model: ModelId = GEMMA) -> None:
        self.history = history
        self.model = Model(id=model)

    def goes(self, *facts: Fact) -> "Life":
        for fact in facts:
            before, self.model = self.model, apply(self.model, fact)
            self.history.observe(fact, before, self.model)
        return self


def listed(at: float, *instances: str) -> Listed:
    entry = Entry("gemma", instances=tuple(Instance(i) for i in instances))
    return Listed(at, "local", at, Tier.V1, {"gemma": entry})


def loaded(at: float, seconds: float) -> Iterable[Fact]:
    return (
        listed(at),
        LoadStarted(at + 0.1, GEMMA),
        LoadEnded(at + 0.2, GEMMA, LoadOutcome.OK, seconds + 1, seconds=seconds, instance_id="gemma"),
        listed(at + 0.3, "gemma"),
        PingStarted(at + 0.4, GEMMA),
        PingEnded(at + 0.5, GEMMA, PingOutcome.OK, 0.1),
    )


def test_what_is_worth_remembering_is_taken_from_the_facts() -> None:
    history = History(lambda: NOON)
    history.configure({GEMMA: HERE})
    Life(history).goes(
        *loaded(1.0, 6.5),
        listed(2.0),
        LoadStarted(2.1, GEMMA),
        LoadEnded(2.2, GEMMA, LoadOutcome.FAILED, 0.1, message="no"),
        WaitStarted(2.3, GEMMA),
        WaitEnded(9.3, GEMMA, 7.0, served=False),
    )
    story = history.story(GEMMA)

    assert story is not None
    assert list(story.loads) == [Loaded(NOON, LoadOutcome.OK, 6.5), Loaded(NOON, LoadOutcome.FAILED, 0.1)]
    assert list(story.evictions) == [Evicted(NOON, Cause.BY_HAND, pytest.approx(0.5))]
    assert [change.state for change in story.changes] == [
        State.UNKNOWN, State.COLD, State.LOADING, State.WARM, State.COLD, State.LOADING, State.BACKOFF,
    ]  # fmt: skip
    assert story.waits_lately(NOON) == (1, 7.0)
    assert story.pings_lately(NOON)[PingOutcome.OK] == 1


def test_a_model_that_leaves_the_config_is_forgotten_and_one_that_stays_is_not() -> None:
    history, other = History(lambda: NOON), ModelId("local", "other")
    history.configure({GEMMA: HERE, other: HERE})
    before = history.story(GEMMA)
    history.configure({GEMMA: HERE})
    Life(history, other).goes(listed(1.0))

    assert history.story(GEMMA) is before
    assert history.story(other) is None


# --- the file -------------------------------------------------------------------------------------

PLACE = Place(HERE, "gemma")
OTHER = Place(HERE, "other")
SOME: tuple[Row, ...] = (
    Changed(NOON - 600, State.UNKNOWN),
    Loaded(NOON - 500, LoadOutcome.FAILED, 1.5),
    Loaded(NOON - 400, LoadOutcome.OK, 12.5),
    Changed(NOON - 400, W),
    Pinged(NOON - 300, PingOutcome.OK, 0.25),
    Pinged(NOON - 299, PingOutcome.OK, 0.5),
    Pinged(NOON - 200, PingOutcome.TIMEOUT, 60.0),
    Waited(NOON - 400, 12.0, True),
    Waited(NOON - 400, 3.0, False),
    Evicted(NOON - 100, Cause.RESTART, 99.5),
    Changed(NOON - 100, C),
)


@contextmanager
def opened(path: Path, began: float = NOON - 1000, now: float = NOON) -> Iterator[Store]:
    with closing(Store(path, began, now)) as found:
        yield found


def written(
    path: Path, *rows: Row, place: Place = PLACE, began: float = NOON - 1000, now: float = NOON
) -> Path:
    """The file of a life that wrote these and ended at `now`."""
    with opened(path, began, now) as found:
        found.write([(place, row) for row in rows], now)
    return path


def look(path: Path, question: str) -> list[tuple[Any, ...]]:
    """What another program reads in it."""
    with closing(sqlite3.connect(path)) as database:
        return database.execute(question).fetchall()


def test_all_that_was_written_is_read_again(tmp_path: Path) -> None:
    path = written(tmp_path / "sub" / "h.db", *SOME)
    with opened(path) as found:
        past, nothing = found.read(PLACE, NOON), found.read(OTHER, NOON)
    story, want = past.story, told(*SOME)

    assert past.loads == (12.5,)
    assert (story.loads, story.evictions, story.changes) == (want.loads, want.evictions, want.changes)
    assert (story.pings, story.waits) == (want.pings, want.waits)
    assert nothing.loads == ()
    assert nothing.story.timeline(NOON) == []
    assert look(path, "SELECT outcome, count, seconds FROM pings ORDER BY outcome") == [
        ("ok", 2, 0.75),
        ("timeout", 1, 60.0),
    ]
    assert look(path, "SELECT datetime(hour, 'unixepoch'), requests, served, seconds FROM waits") == [
        ("2026-11-22 11:00:00", 2, 1, 15.0)
    ]


def test_a_key_on_another_server_is_another_model(tmp_path: Path) -> None:
    path = written(tmp_path / "h.db", Loaded(NOON, LoadOutcome.OK, 7.0), place=Place("http://far:1", "gemma"))
    with opened(path) as found:
        assert found.read(PLACE, NOON).loads == ()


def test_the_last_loads_that_succeeded_are_recalled_oldest_first(tmp_path: Path) -> None:
    rows = [Loaded(NOON + n, LoadOutcome.OK, n) for n in range(9)]
    failed = [Loaded(NOON + 10 + n, LoadOutcome.FAILED, 0.1) for n in range(50)]
    with opened(written(tmp_path / "h.db", *rows, *failed)) as found:
        past = found.read(PLACE, NOON + 100)

    assert past.loads == (4, 5, 6, 7, 8)
    assert len(past.story.loads) == 20


def test_how_often_a_model_was_asked_for_in_the_last_day_is_recalled(tmp_path: Path) -> None:
    times = (NOON - 2 * DAY, NOON - 7200, NOON - 90, NOON - 70, NOON - 65, NOON + 600)
    with opened(written(tmp_path / "h.db", *(Asked(at, 2.0) for at in times))) as found:
        past, nothing = found.read(PLACE, NOON), found.read(OTHER, NOON)

    assert past.asked == ((65.0, 3), (7200.0, 1))
    assert nothing.asked == ()


def test_short_requests_of_one_second_are_one_row_that_counts_them(tmp_path: Path) -> None:
    short = [(PLACE, Asked(NOON - 9.5 + n / 1024, n / 1024)) for n in range(400)]
    others = [
        (PLACE, Asked(NOON - 9.25, 1.0)),
        (OTHER, Asked(NOON - 9.25, 0.5)),
        (PLACE, Asked(NOON - 8.75, 0.5)),
    ]
    path = tmp_path / "h.db"
    with opened(path) as store:
        store.write([*short, *others], NOON)
        past = store.read(PLACE, NOON)

    assert look(path, f"SELECT at - {NOON}, seconds, count, model FROM requests ORDER BY model, at") == [
        (-9.5, 399 / 1024, 400, 1), (-9.25, 1.0, 1, 1), (-8.75, 0.5, 1, 1), (-9.25, 0.5, 1, 2),
    ]  # fmt: skip
    assert past.asked == ((8.75, 402),)


def test_a_file_without_counts_is_gone_on_with(tmp_path: Path) -> None:
    path = written(tmp_path / "h.db", Asked(NOON - 70, 2.0), Asked(NOON - 9, 2.0))
    with closing(sqlite3.connect(path)) as database:
        database.execute("ALTER TABLE requests DROP COLUMN count")
        database.execute("PRAGMA user_version = 2")
    written(path, Asked(NOON - 5, 2.0), began=NOON)
    with opened(path) as found:
        assert found.read(PLACE, NOON).asked == ((5.0, 2), (70.0, 1))


def test_a_file_of_version_1_is_gone_on_with(tmp_path: Path) -> None:
    path = written(tmp_path / "h.db", *SOME)
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE requests")
        database.execute("PRAGMA user_version = 1")
    written(path, Asked(NOON - 5, 2.0), began=NOON)
    with opened(path) as found:
        past = found.read(PLACE, NOON)

    assert (past.loads, past.asked) == ((12.5,), ((5.0, 1),))
    assert look(path, "PRAGMA user_version") == [(VERSION,)]


def test_between_two_lives_nobody_watched(tmp_path: Path) -> None:
    path = written(tmp_path / "h.db", *SOME, now=NOON - 60)
    written(path, Changed(NOON, State.UNKNOWN), began=NOON, now=NOON + 30)
    with opened(path, NOON + 60, NOON + 60) as found:
        story = found.read(PLACE, NOON + 60).story

    assert line(story, 60) == [
        (-600, "unknown"),
        (-400, "warm"),
        (-100, "cold"),
        (-60, "off"),
        (0, "unknown"),
        (30, "off"),
    ]


def test_a_life_that_loses_its_file_for_a_while_is_one_life(tmp_path: Path) -> None:
    path = written(tmp_path / "h.db", *SOME, began=NOON - 700)
    with opened(path, NOON - 700) as found:
        story = found.read(PLACE, NOON).story

    assert OFF not in [state for _, state in line(story)]
    assert look(path, "SELECT began FROM lives") == [(NOON - 700,)]


@pytest.mark.parametrize("jump", [-DAY, -400 * DAY, 400 * DAY])
def test_a_clock_that_jumps_between_two_lives_leaves_a_line_in_order(tmp_path: Path, jump: float) -> None:
    path = written(tmp_path / "h.db", *SOME)
    at = NOON + jump
    later = (Changed(at + 1, State.UNKNOWN), Loaded(at + 9, LoadOutcome.OK, 8.0), Changed(at + 9, W))
    written(path, *later, began=at, now=at + 10)
    with opened(path, at + 100, at + 100) as found:
        past = found.read(PLACE, at + 100)
    timeline = past.story.timeline(at + 100)

    assert past.loads == (12.5, 8.0)
    assert [load.seconds for load in past.story.loads] == [1.5, 12.5, 8.0]
    assert timeline == sorted(timeline, key=lambda change: change.at)
    assert [state for _, state in timeline][-3:] == ["unknown", "warm", "off"]
    assert all(at + 100 - DAY <= when <= at + 100 for when, _ in timeline)


def test_rows_are_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    with opened(tmp_path / "h.db") as found:
        limits = {table: rows for table, _, _, rows in BOUNDS}
        count = limits["states"] + 100
        found.write(((PLACE, Changed(NOON + n, (W, C)[n % 2])) for n in range(count)), NOON)
        found.write(((PLACE, Loaded(NOON + n, LoadOutcome.OK, n)) for n in range(limits["loads"] + 7)), NOON)
        found.prune(NOON, by_age=False)
    with opened(tmp_path / "h.db") as found:
        past = found.read(PLACE, NOON + count)

    assert look(tmp_path / "h.db", "SELECT count(*), min(at) FROM states WHERE state != 'off'") == [
        (limits["states"], NOON + 100)
    ]
    assert look(tmp_path / "h.db", "SELECT count(*), min(seconds) FROM loads") == [(limits["loads"], 7)]
    assert past.loads[-1] == limits["loads"] + 6
    assert (tmp_path / "h.db").stat().st_size < 30 * 2**20


def test_what_is_counted_by_the_hour_is_bounded_too(tmp_path: Path) -> None:
    places = [Place(HERE, f"model-{n}") for n in range(500)]
    rows = [
        (place, row)
        for hour in range(450)
        for place in places
        for row in (Waited(NOON - hour * HOUR, 1.0, True),)
    ]
    with opened(tmp_path / "h.db") as found:
        found.write(rows, NOON)
        found.prune(NOON, by_age=False)

    assert look(tmp_path / "h.db", "SELECT count(*) FROM waits")[0][0] <= 200_000
    assert look(tmp_path / "h.db", "SELECT max(hour) FROM waits") == [(int(NOON),)]


def test_what_is_old_goes_each_after_its_own_time(tmp_path: Path) -> None:
    with opened(tmp_path / "h.db") as found:
        for days in range(0, 100, 5):
            at = NOON - days * DAY
            rows: tuple[Row, ...] = (
                Loaded(at, LoadOutcome.OK, days), Evicted(at, Cause.CRASH, 1.0), Changed(at, W),
                Pinged(at, PingOutcome.OK, 1.0), Waited(at, 1.0, True), Asked(at, 1.0),
            )  # fmt: skip
            found.write([(PLACE, row) for row in rows], NOON)
        found.prune(NOON, by_age=True)
    counts = {table: look(tmp_path / "h.db", f"SELECT count(*) FROM {table}")[0][0] for table, *_ in BOUNDS}

    assert counts == {
        "loads": 19, "evictions": 19, "states": 7, "pings": 2, "waits": 19, "lives": 1, "requests": 19,
    }  # fmt: skip


# --- the thread that owns it ----------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "GATHER", 0.02)
    monkeypatch.setattr(writer, "RETRY", 0.1)


class Keeping:
    """A writer with what it says."""

    def __init__(self, path: Path, now: float = NOON) -> None:
        self.path = path
        self.said: list[str] = []
        self.pasts: list[Past] = []
        self.writer = Writer(path, lambda: now, lambda error: self.said.append(str(error)))

    def __enter__(self) -> "Keeping":
        self.writer.ask([PLACE], lambda pasts: self.pasts.append(pasts[PLACE]))
        self.writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.end()
        assert "history" not in [thread.name for thread in threading.enumerate()]

    def put(self, *rows: Row) -> "Keeping":
        for row in rows:
            self.writer.put(PLACE, row)
        return self

    @property
    def past(self) -> Past:
        """What it gave back, once it has."""
        return wait_until(lambda: self.pasts, "the file is read")[0]

    def in_trouble(self, words: str) -> str:
        def told() -> str | None:
            trouble = self.writer.trouble or ""
            return trouble if words in trouble.removeprefix(str(self.path)) else None

        return str(wait_until(told, f"trouble: {words}"))

    def keeps(self) -> bool:
        return wait_until(lambda: self.writer.trouble is None, "it is kept")


def rows_in(path: Path) -> int:
    with suppress(sqlite3.Error):
        return int(look(path, "SELECT count(*) FROM loads")[0][0])
    return -1


LOAD = Loaded(NOON, LoadOutcome.OK, 5.0)


def test_what_one_writer_keeps_the_next_gives_back(tmp_path: Path) -> None:
    with Keeping(tmp_path / "h.db") as first:
        first.put(*SOME)
        assert first.past.loads == ()
    with Keeping(tmp_path / "h.db", NOON + 100) as second:
        past = second.past

    assert past.loads == (12.5,)
    assert [state for _, state in line(past.story, 100)] == ["unknown", "warm", "cold", "off"]
    assert first.said == second.said == []
    assert (tmp_path / "h.db").stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("hasty")
def test_a_file_that_was_cut_off_anywhere_costs_no_more_than_itself(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.db", *SOME * 50).read_bytes()
    path, damaged = tmp_path / "h.db", 0
    chance = random.Random(0)
    places = {0, 1, 15, 16, 60, 99, 100, 511, 512, 4095, 4096, 4097, len(whole) - 1}
    for size in sorted(places | {chance.randrange(len(whole)) for _ in range(60)}):
        for rest in tmp_path.glob("h.db*"):
            rest.unlink()
        path.write_bytes(whole[:size])
        with Keeping(path) as keeping:
            past = keeping.put(LOAD).past
            keeping.keeps()
        aside = path.with_name("h.db.damaged")

        assert past.loads in ((), (12.5,) * 5), size
        assert look(path, "PRAGMA integrity_check") == [("ok",)], size
        assert look(path, "SELECT seconds FROM loads ORDER BY id DESC LIMIT 1") == [(5.0,)], size
        assert len(keeping.said) == aside.exists() <= 1, (size, keeping.said)
        if aside.exists():
            damaged += 1
            assert aside.stat().st_size == size
            assert "h.db is damaged (" in keeping.said[0], size
            assert f"it is now {aside}, and a new one is begun" in keeping.said[0], size
    assert damaged > 60


@pytest.mark.usefixtures("hasty")
def test_a_file_with_random_bytes_in_it_costs_no_more_than_itself(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.db", *SOME * 50).read_bytes()
    path, chance = tmp_path / "h.db", random.Random(1)
    for round_ in range(120):
        for rest in tmp_path.glob("h.db*"):
            rest.unlink()
        content = bytearray(whole)
        for _ in range(chance.choice((1, 1, 3, 30, 3000))):
            content[chance.randrange(100 * (round_ % 2), len(content))] = chance.randrange(256)
        path.write_bytes(bytes(content) if round_ % 10 else chance.randbytes(chance.randrange(9000)))
        with Keeping(path) as keeping:
            keeping.put(LOAD)
            wait_until(
                lambda: keeping.writer.trouble is None or "left" in keeping.writer.trouble or keeping.said
            )

        if keeping.writer.trouble is None:
            assert look(path, "SELECT seconds FROM loads ORDER BY id DESC LIMIT 1") == [(5.0,)], round_
            for past in keeping.pasts:
                json.dumps(past.story.timeline(NOON))


def test_all_that_is_not_what_was_written_is_passed_over(tmp_path: Path) -> None:
    path = written(tmp_path / "h.db", *SOME)
    with closing(sqlite3.connect(path)) as database:
        for values in (
            "'x', 'ok', 1",
            "-1, 'ok', 1",
            "1e300, 'ok', 1",
            "1, 'odd', 1",
            "1, 'ok', 'x'",
            "1, 'ok', -9e99",
        ):
            database.execute(f"INSERT INTO loads (model, at, outcome, seconds) VALUES (1, {values})")
        database.execute("INSERT INTO states (model, at, state) VALUES (1, 1, 'melting')")
        database.execute("INSERT INTO states (model, at, state) VALUES (1, 1, CAST(x'ff00fe' AS TEXT))")
        database.execute("INSERT INTO evictions (model, at, cause, idle_seconds) VALUES (1, 1, 'aliens', 1)")
        database.execute("INSERT INTO pings VALUES (1, 'noon', 'ok', 'many', NULL)")
        database.execute(f"INSERT INTO waits VALUES (1, {NOON}, 'many', NULL, 1)")
        database.commit()
    with opened(path) as found:
        past = found.read(PLACE, NOON)

    assert past.loads == (12.5,)
    assert list(past.story.loads) == list(told(*SOME).loads)
    assert past.story.changes == told(*SOME).changes
    assert past.story.waits == told(*SOME).waits


@pytest.mark.usefixtures("hasty")
def test_a_file_of_a_newer_version_is_left_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "h.db", *SOME)
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {VERSION + 1}")
        database.execute("CREATE TABLE wishes (id)")
        database.execute("PRAGMA journal_mode = DELETE")
    before = path.read_bytes()
    with Keeping(path) as keeping:
        keeping.put(LOAD)
        trouble = keeping.in_trouble("newer")
    words = f"a newer keepalive has written it (version {VERSION + 1}, and this one knows {VERSION})"

    assert trouble == f"{path}: {words}"
    assert keeping.said == [
        f"history.path: nothing can be kept in {path} ({words}); it is remembered until the daemon ends"
    ]
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.db", "h.db.lock"]


@pytest.mark.usefixtures("hasty")
def test_a_newer_version_that_is_only_in_the_log_of_the_file_is_seen(tmp_path: Path) -> None:
    path = written(tmp_path / "h.db", *SOME)
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {VERSION + 1}")
        with Keeping(path) as keeping:
            keeping.in_trouble("newer")


@pytest.mark.usefixtures("hasty")
def test_the_database_of_another_program_is_left_as_it_is(tmp_path: Path) -> None:
    for mark in (0, 1234):
        path = tmp_path / f"{mark}.db"
        with closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE loads (id)")
            database.execute(f"PRAGMA application_id = {mark}")
        before = path.read_bytes()
        with Keeping(path) as keeping:
            keeping.put(LOAD).in_trouble("that is a database of another program")

        assert path.read_bytes() == before


def test_the_file_says_whose_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "h.db", *SOME)

    assert look(path, "PRAGMA application_id") == [(APPLICATION,)]
    assert look(path, "PRAGMA user_version") == [(VERSION,)]


@pytest.mark.usefixtures("hasty")
def test_a_second_daemon_leaves_the_file_to_the_first_and_takes_it_over(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    with Keeping(path) as second_to_end:
        first = second_to_end.put(LOAD)
        first.keeps()
        with Keeping(path, NOON + 9) as second:
            trouble = second.put(LOAD).in_trouble("another")
            first.writer.end()
            second.keeps()
            past = second.past

    assert trouble == f"{path}: another daemon keeps its history there"
    assert past.loads == (5.0,)
    assert rows_in(path) == 2


@pytest.mark.usefixtures("hasty")
def test_nobody_waits_while_somebody_else_holds_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "h.db", *SOME)
    with closing(sqlite3.connect(path, isolation_level=None)) as holder, Keeping(path) as keeping:
        keeping.keeps()
        holder.execute("BEGIN EXCLUSIVE")
        for _ in range(ROWS_WAITING + 1000):
            keeping.put(LOAD)
        trouble = keeping.in_trouble("database is locked")
        keeping.put(Loaded(NOON, LoadOutcome.OK, 77.0))
        holder.execute("COMMIT")
        keeping.keeps()
        wait_until(
            lambda: look(path, "SELECT count(*) FROM loads WHERE seconds = 77") == [(1,)], "the newest"
        )

    assert trouble.endswith("h.db: database is locked")
    assert len(keeping.said) == 1
    assert ROWS_WAITING - 100 <= rows_in(path) <= ROWS_WAITING + 1100


@pytest.mark.usefixtures("hasty")
def test_a_disk_that_hangs_is_said_and_holds_up_neither_the_daemon_nor_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "STUCK", 0.05)
    monkeypatch.setattr(writer, "LAST_WORDS", 0.05)
    path, answers = tmp_path / "h.db", threading.Event()
    hung = Writer(path, lambda: NOON, lambda error: None)
    # The thread stands still in the middle of its work, as in a call that does not come back.
    hung.ask([PLACE], lambda pasts: answers.wait() and None)
    hung.start()
    try:
        trouble = wait_until(lambda: "answered" in (hung.trouble or "") and hung.trouble, "it is noticed")
        for _ in range(2 * ROWS_WAITING):
            hung.put(PLACE, LOAD)
        hung.end()
    finally:
        answers.set()
    wait_until(lambda: "history" not in [thread.name for thread in threading.enumerate()], "it ends")

    assert trouble == f"{path}: the disk has not answered for 0 s"
    assert rows_in(path) == ROWS_WAITING


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "that is no regular file"),
        (os.mkdir, "is a directory"),
        (lambda path: os.symlink("/proc/self/nothing/at/all", path), "no such file or directory"),
    ],
)
def test_a_path_that_is_no_file_is_trouble_and_no_more(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    make(tmp_path / "h.db")
    with Keeping(tmp_path / "h.db") as keeping:
        keeping.put(LOAD).in_trouble(words)


@pytest.mark.usefixtures("hasty")
def test_a_folder_that_is_removed_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "state" / "h.db"
    with Keeping(path) as keeping:
        keeping.keeps()
        shutil.rmtree(tmp_path / "state")
        keeping.put(LOAD)
        wait_until(lambda: path.exists() and rows_in(path) == 1, "the row is in a new file")

    assert keeping.said == []


@pytest.mark.usefixtures("hasty")
def test_a_file_that_takes_its_place_is_written_from_then_on(tmp_path: Path) -> None:
    path, other = tmp_path / "h.db", written(tmp_path / "other.db", *SOME)
    with Keeping(path) as keeping:
        keeping.keeps()
        for part in ("-wal", "-shm"):
            path.with_name(f"h.db{part}").unlink()
        other.replace(path)
        keeping.put(LOAD)
        wait_until(lambda: rows_in(path) == 3, "the row is in the other file")

    assert keeping.said == []


# --- disks ----------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Callable[..., None]]:
    """A file system of its own at `folder`; what is yielded mounts it anew, with other options."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts disks")
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")

    def again(*options: str) -> None:
        subprocess.run(["mount", "-o", ",".join(("remount", *options)), str(folder)], check=True)

    try:
        yield again
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.usefixtures("hasty")
def test_a_full_disk_loses_nothing_that_fits_once_there_is_room(tmp_path: Path) -> None:
    with mounted(tmp_path, "-t", "tmpfs", "-o", "size=400k", "keepalive-test") as again:
        path = tmp_path / "h.db"
        with Keeping(path) as keeping:
            keeping.put(LOAD).keeps()
            (tmp_path / "other").write_bytes(b"x" * 1)
            with suppress(OSError), (tmp_path / "other").open("wb") as other:
                while True:
                    other.write(bytes(4096))
                    other.flush()
            keeping.put(*[LOAD] * 9999)
            trouble = keeping.in_trouble("full")
            again("size=8m")
            keeping.keeps()
        count = rows_in(path)

    assert trouble == f"{path}: database or disk is full"
    assert len(keeping.said) == 1
    assert count == 10_000


@pytest.mark.usefixtures("hasty")
def test_a_disk_too_small_for_the_file_at_all_is_trouble_until_it_grows(tmp_path: Path) -> None:
    with mounted(tmp_path, "-t", "tmpfs", "-o", "size=64k", "keepalive-test") as again:
        with Keeping(tmp_path / "h.db") as keeping:
            keeping.put(*SOME).in_trouble("full")
            again("size=8m")
            keeping.keeps()
        count = rows_in(tmp_path / "h.db")

    assert count == 2


@pytest.mark.usefixtures("hasty")
def test_a_folder_that_may_not_be_written_to_is_trouble_until_it_may(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    path = written(folder / "h.db", LOAD)
    with mounted(folder, "--bind", str(folder)) as again:
        again("bind", "ro")
        with Keeping(path, NOON + 9) as keeping:
            trouble = keeping.put(LOAD).in_trouble("read-only")
            again("bind", "rw")
            past = keeping.past
            keeping.keeps()

    assert trouble == f"{path}: read-only file system"
    assert past.loads == (5.0,)
    assert rows_in(path) == 2


# --- daemons --------------------------------------------------------------------------------------


def kept_by(running: DaemonProcess, key: str) -> dict[str, Any]:
    page = json.loads(ask(f"{running.url}/api/history?model={key}")[2])
    assert (page["kept"], page["reason"]) == (True, None)
    return dict(page["models"][0])


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "stopped"])
def test_the_next_daemon_knows_how_long_a_load_takes_and_what_happened_before(
    killed: bool, tmp_path: Path
) -> None:
    lm_studio = SimulatorProcess(tmp_path, "gemma:2")
    text = settings(lm_studio.url, "gemma")
    with ending(lm_studio):
        first = DaemonProcess(tmp_path, text, "first")
        with ending(first):
            took = first.reaches("gemma", "warm")["last_load_seconds"]
            path = tmp_path / "state" / "keepalive" / "history.db"
            wait_until(lambda: (W,) in look(path, "SELECT state FROM states"), "it is on disk")
            if killed:
                first.kill()
            else:
                first.process.terminate()
                assert first.ended() == 0
        assert ask(f"{lm_studio.url}/simulator/evict", "POST", {"model": "gemma"})[0] == 200
        second = DaemonProcess(tmp_path, text, "second")
        with ending(second):
            loading = second.reaches("gemma", "loading")
            warm = second.reaches("gemma", "warm")
            told = kept_by(second, "gemma")
        warnings = [row for run in (first, second) for row in run.events() if row["level"] == "warning"]

    assert loading["last_load_seconds"] == took
    assert 0 < loading["load"]["eta_seconds"] <= took
    assert (warm["loads"], warm["evictions"]) == (1, 0)
    assert [load["outcome"] for load in told["loads"]] == ["ok", "ok"]
    assert told["loads"][0]["seconds"] == pytest.approx(took, abs=0.001)
    assert [change["state"] for change in told["timeline"]] == [
        "unknown", "cold", "loading", "warm", "off", "unknown", "cold", "loading", "warm",
    ]  # fmt: skip
    times = [datetime.fromisoformat(change["at"]) for change in told["timeline"]]
    assert times == sorted(times)
    assert warnings == []


@pytest.mark.usefixtures("hasty")
async def test_a_file_that_can_be_read_only_later_tells_its_past_then(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    at = time.time() - 3600
    async with simulator(SimModel("gemma", load_seconds=2.0)) as studio:
        place = Place(studio.url, "gemma")
        rows = Changed(at, W), Loaded(at, LoadOutcome.OK, 300.0), Waited(at, 7.0, True)
        written(path, *rows, place=place, began=at, now=at + 60)
        with closing(sqlite3.connect(path, isolation_level=None)) as holder:
            holder.execute("BEGIN EXCLUSIVE")
            # Nothing but the past says how long it takes.
            text = settings(studio.url, "gemma", upstream='sdk = "off"')
            async with daemon(text + f'[history]\npath = "{path}"\n') as running:
                await until(lambda: model(running, "gemma")["state"] == "loading", "it loads")
                before = model(running, "gemma")["load"]["eta_seconds"]
                trouble = await until(lambda: (r := running.history()["reason"]) and "locked" in r and r)
                holder.execute("COMMIT")
                await until(lambda: model(running, "gemma")["load"]["eta_seconds"], "the past is known")
                await until(lambda: running.history()["reason"] is None, "the present is kept, too")
                page = json.loads((await asked(f"{running.admin_url}/api/history"))[2])
    told = page["models"][0]

    assert before is None
    assert trouble == f"{path}: database is locked"
    assert (page["kept"], page["reason"]) == (True, None)
    assert [load["seconds"] for load in told["loads"]] == [300.0]
    assert [change["state"] for change in told["timeline"]][:3] == ["warm", "off", "unknown"]
    assert told["waits"] == {"requests": 1, "seconds": 7.0}


@pytest.mark.usefixtures("hasty")
async def test_a_file_that_is_no_use_costs_the_daemon_nothing_but_its_history(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    os.mkfifo(path)
    async with (
        simulator(SimModel("gemma", load_seconds=0.2)) as studio,
        daemon(settings(studio.url, "gemma") + f'[history]\npath = "{path}"\n') as running,
    ):
        await until(lambda: model(running, "gemma")["state"] == "warm", "warm")
        page = json.loads((await asked(f"{running.admin_url}/api/history"))[2])

    assert (page["kept"], page["reason"]) == (False, f"{path}: that is no regular file")
    assert [load["outcome"] for load in page["models"][0]["loads"]] == ["ok"]


async def test_without_a_file_the_history_says_so_and_begins_no_thread() -> None:
    async with (
        simulator(SimModel("gemma", load_seconds=0.2)) as studio,
        daemon(settings(studio.url, "gemma") + "[history]\npath = false\n") as running,
    ):
        page = json.loads((await asked(f"{running.admin_url}/api/history"))[2])
        names = [thread.name for thread in threading.enumerate()]

    assert (page["kept"], page["reason"]) == (False, "history.path is false")
    assert "history" not in names


async def test_what_a_reload_adds_is_read_from_the_file_and_what_it_removes_is_watched_no_more(
    tmp_path: Path,
) -> None:
    path, at = tmp_path / "h.db", time.time() - 3600
    models = SimModel("gemma", load_seconds=0.2), SimModel("qwen", load_seconds=0.2)
    async with simulator(*models) as studio:
        written(path, Loaded(at, LoadOutcome.OK, 300.0), place=Place(studio.url, "qwen"), began=at, now=at)
        history = f'[history]\npath = "{path}"\n'
        async with daemon(settings(studio.url, "gemma") + history, path=tmp_path / "c.toml") as running:
            await until(lambda: model(running, "gemma")["state"] == "warm", "warm")
            (tmp_path / "c.toml").write_text(settings(studio.url, "qwen") + history)
            running.reload()

            def past() -> bool:
                told = running.story(ModelId("local", "qwen")) or {"loads": []}
                return [load["seconds"] for load in told["loads"]][:1] == [300.0]

            await until(past, "its past is known")
            gone = running.story(ModelId("local", "gemma"))

    assert gone is None
    states = look(path, "SELECT state FROM states JOIN models ON models.id = model WHERE key = 'gemma'")
    assert states[-2:] == [("warm",), ("off",)]


def test_what_earlier_lives_measured_is_what_is_expected_of_a_load() -> None:
    before = apply(apply(Model(id=GEMMA), listed(1.0)), LoadsRecalled(1.0, GEMMA, (100.0, 120.0, 110.0)))
    loading = apply(before, LoadStarted(2.0, GEMMA))
    late = apply(Model(id=GEMMA, recent_loads=(7.0,)), LoadsRecalled(9.0, GEMMA, (1.0, 2.0, 3.0, 4.0, 5.0)))

    assert eta(loading, [loading], 12.0) == 100.0
    assert late.recent_loads == (2.0, 3.0, 4.0, 5.0, 7.0)
