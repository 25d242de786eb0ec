"""What is remembered: of one model, in memory and on disk, and by real daemons that are killed."""

import random
from collections.abc import Iterable

import pytest

from keepalive.facts import (
    Entry,
    Fact,
    Instance,
    Listed,
    LoadEnded,
    LoadOutcome,
    LoadStarted,
    ModelId,
    PingEnded,
    PingOutcome,
    PingStarted,
    Tier,
    WaitEnded,
    WaitStarted,
)
from keepalive.history import History
from keepalive.history.story import (
    CHANGES_MAX,
    DAY,
    HOUR,
    HOURS_MAX,
    OFF,
    Changed,
    Evicted,
    Loaded,
    Pinged,
    Story,
    Waited,
)
from keepalive.lifecycle import Cause, Model, State, apply

GEMMA = ModelId("local", "gemma")
NOON = 1_795_348_800.0  # 2026-11-22T12:00:00Z

W, C, L = State.WARM, State.COLD, State.LOADING


def told(*entries: Changed | Loaded | Evicted | Pinged | Waited) -> Story:
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
    history.configure([GEMMA])
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
    history.configure([GEMMA, other])
    before = history.story(GEMMA)
    history.configure([GEMMA])
    Life(history, other).goes(listed(1.0))

    assert history.story(GEMMA) is before
    assert history.story(other) is None
