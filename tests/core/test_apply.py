"""What happened, folded into the record of a model: every state meets every fact."""

from dataclasses import replace
from math import inf

import pytest

from keepalive.core.actions import Load, Refresh
from keepalive.core.apply import apply
from keepalive.core.errors import Reason
from keepalive.core.explain import explain
from keepalive.core.facts import (
    ClockJumped,
    DemandRecalled,
    DrainEnded,
    DrainStarted,
    Fact,
    HandLost,
    HandTaken,
    InstanceLost,
    LoadGivenUp,
    LoadOutcome,
    LoadsRecalled,
    LoadStarted,
    OursRecalled,
    PingStarted,
    ReleaseAsked,
    RequestEnded,
    RequestsCounted,
    RequestStarted,
    UsedElsewhere,
    WaitEnded,
    WaitStarted,
    WarmAsked,
    WindowClosed,
    WindowOpened,
)
from keepalive.core.plan import plan
from keepalive.core.records import Cause, Model, Upstream
from keepalive.core.states import IllegalMove, State
from keepalive.core.upstreams import apply_upstream
from tests.kit.models import (
    GEMMA,
    OUR_MOVES,
    POLICY,
    Box,
    after,
    box,
    changed,
    cold,
    entry,
    every_fact,
    every_model,
    listed,
    load_ended,
    ours,
    tried,
    warm,
)


@pytest.mark.parametrize("name", every_model())
def test_every_state_meets_every_fact(name: str):
    model = every_model()[name]
    for fact in every_fact(1000.0):
        try:
            result = apply(model, fact)
        except IllegalMove:
            assert isinstance(fact, OUR_MOVES), f"{name}: {fact}"
            continue

        assert result.waiting >= 0
        assert result.in_flight >= 0
        assert result.reason or result.state not in (State.UNKNOWN, State.BACKOFF), f"{name}: {fact}"
        assert plan(Upstream("local"), [result], 1001.0) is not None
        assert explain(Upstream("local"), [result], result, 99.0) or result.state is not State.BACKOFF


def test_a_fact_of_an_unknown_kind_changes_nothing():
    assert apply(warm(), Fact(99.0)) == warm()
    assert apply_upstream(Upstream("local"), Fact(99.0)) == Upstream("local")


def test_a_request_that_lost_its_model_makes_the_listing_decide():
    state = Box(warm()).see(listed(20, entry("gemma", "gemma")), InstanceLost(21, GEMMA, "Model unloaded."))
    asked = state.plan(21.1)
    state.see(listed(21.2, entry("gemma")))

    assert asked == [Refresh("local")]
    assert state.plan(21.3) == [Load(GEMMA)]


def test_what_a_request_lost_is_not_pinged_on_the_word_of_a_listing_from_before():
    state = Box(ours()).see(
        listed(20, entry("gemma", "gemma")),
        InstanceLost(20.5, GEMMA, "the model has crashed", Reason.CRASHED),
    )

    assert state.plan(20.6) == [Refresh("local")]


def test_a_model_asked_for_by_hand_is_kept_outside_its_window_until_the_next_one_opens_and_closes():
    state = box(WindowClosed(1, GEMMA), WarmAsked(2, GEMMA), listed(3, entry("gemma")))
    asked = state.plan(3.1)
    state.see(WindowOpened(4, GEMMA), WindowClosed(5, GEMMA))

    assert asked == [Load(GEMMA)]
    assert not state[GEMMA].wanted


def test_a_model_released_by_hand_stays_so_until_its_window_next_opens():
    state = box(ReleaseAsked(1, GEMMA), listed(3, entry("gemma")))

    assert state.plan(3.1) == []
    assert explain(state.upstream, [state[GEMMA]], state[GEMMA], 99.0) == "released by hand"
    assert state.see(WindowOpened(4, GEMMA), listed(5, entry("gemma"))).plan(5.1) == [Load(GEMMA)]


def test_asking_for_a_model_by_hand_forgives_its_failures():
    state = box(
        listed(1, entry("gemma")), LoadStarted(2, GEMMA), load_ended(10, LoadOutcome.REFUSED, message="full")
    )
    state.see(WarmAsked(20, GEMMA))
    look = state.plan(20.1)
    state.see(listed(20.2, entry("gemma")))

    assert look == [Refresh("local", loading=True)]
    assert state.plan(20.3) == [Load(GEMMA)]


def test_a_waiting_request_makes_an_unwanted_model_needed():
    state = box(WindowClosed(1, GEMMA), WaitStarted(2, GEMMA), listed(3, entry("gemma")))

    assert state.plan(3.1) == [Load(GEMMA)]
    assert state.see(WaitEnded(4, GEMMA, 2.0, False), listed(5, entry("gemma"))).plan(5.1) == []


# --- each fact, and all that it leaves ------------------------------------------------------------


def test_a_window_ends_what_was_said_by_hand():
    before = tried(State.WARM, asked_for=False, window_open=False)

    assert changed(before, apply(before, WindowOpened(50, GEMMA))) == {
        "windowed": True,
        "window_open": True,
        "asked_for": None,
    }
    assert changed(before, apply(before, WindowClosed(50, GEMMA))) == {"windowed": True, "asked_for": None}
    assert changed(warm(), apply(warm(), WindowClosed(50, GEMMA))) == {"windowed": True, "window_open": False}


def test_who_asks_by_hand_may_know_that_it_is_mended():
    before = tried(State.BACKOFF, taken=1)

    assert changed(before, apply(before, WarmAsked(50, GEMMA))) == {
        "asked_for": True,
        "retry_at": None,
        "failures": 0,
        "taken": 0,
        "ping_at": -inf,
    }
    assert apply(cold(), WarmAsked(50, GEMMA)).ping_at is None


def test_who_releases_by_hand_changes_only_what_is_wanted():
    assert changed(warm(), apply(warm(), ReleaseAsked(50, GEMMA))) == {"asked_for": False}


def test_who_waits_is_counted():
    before = warm(waiting=3)

    assert changed(before, apply(before, WaitStarted(50, GEMMA))) == {
        "waiting": 4,
        "waiting_since": 50,
        "use_at": 50,
    }
    assert changed(before, apply(before, WaitEnded(50, GEMMA, 1.0, True))) == {"waiting": 2, "use_at": 50}
    assert changed(before, apply(before, WaitEnded(50, GEMMA, 1.0, False))) == {"waiting": 2}
    assert apply(warm(), WaitEnded(50, GEMMA, 1.0, True)).waiting == 0


def test_requests_are_counted():
    before = warm(in_flight=3)

    assert changed(before, apply(before, RequestStarted(50, GEMMA))) == {
        "in_flight": 4,
        "use_at": 50,
        "asks": 1.0,
        "asks_at": 50,
    }
    assert changed(before, apply(before, RequestEnded(50, GEMMA, answered=False))) == {
        "in_flight": 2,
        "used_at": 50,
        "use_at": 50,
    }
    assert apply(warm(), RequestEnded(50, GEMMA, answered=False)).in_flight == 0


@pytest.mark.parametrize(
    ("signs", "counted"),
    [
        ("+", RequestsCounted(30, GEMMA, 1, 0)),
        ("+-", RequestsCounted(31, GEMMA, 1, 1, ended_at=31)),
        ("+!", RequestsCounted(31, GEMMA, 1, 1, ended_at=31, answered_at=31)),
        ("+!+-++", RequestsCounted(35, GEMMA, 4, 2, ended_at=33, answered_at=31)),
        ("-!+", RequestsCounted(32, GEMMA, 1, 2, ended_at=31, answered_at=31)),
    ],
)
@pytest.mark.parametrize(
    "before",
    [warm(in_flight=2), ours(in_flight=2, failures=3), after(warm(in_flight=2), PingStarted(20, GEMMA))],
)
def test_counted_together_requests_leave_a_warm_model_as_one_by_one(
    before: Model, signs: str, counted: RequestsCounted
):
    """`+` begins, `-` ends, `!` ends answered; one a second from 30 on."""
    one_by_one = before
    for at, sign in enumerate(signs, start=30):
        fact = RequestStarted(at, GEMMA) if sign == "+" else RequestEnded(at, GEMMA, answered=sign == "!")
        one_by_one = apply(one_by_one, fact)

    together = apply(before, counted)
    # How much it was asked for of late is told to the second alone.
    assert together.asks == pytest.approx(one_by_one.asks, abs=0.01)
    assert together == replace(one_by_one, asks=together.asks, asks_at=together.asks_at)


def test_a_request_that_was_answered_proves_the_model_and_leaves_the_ping_due():
    before = tried(State.BACKOFF, in_flight=1)

    assert changed(before, apply(before, RequestEnded(50, GEMMA, answered=True))) == {
        "state": State.WARM,
        "since": 50,
        "reason": None,
        "in_flight": 0,
        "used_at": 50,
        "use_at": 50,
        "active_at": 50,
        "seen_at": 50,
        "warm_since": 50,
        "pending": None,
        "retry_at": None,
        "suspected": None,
        "crashed": False,
        "busy": False,
    }


def test_a_request_that_was_answered_beside_a_call_of_ours_proves_nothing_about_its_outcome():
    before = tried(State.BACKOFF, pinging=True)

    assert changed(before, apply(before, RequestEnded(50, GEMMA, answered=True))) == {
        "used_at": 50,
        "use_at": 50,
        "active_at": 50,
    }


def test_what_a_request_lost_is_not_warm_and_is_asked_at_once():
    before = tried(State.WARM, suspected=None)

    assert changed(before, apply(before, InstanceLost(50, GEMMA, "Model unloaded.", Reason.UNLOADED))) == {
        "state": State.BACKOFF,
        "since": 50,
        "reason": "Model unloaded.",
        "touched_at": 50,
        "contested": False,
        "ping_at": 50,
    }


def test_what_a_request_was_told_of_a_model_that_is_not_warm_is_only_remembered():
    before = tried(State.LOADING, suspected=None)

    assert changed(before, apply(before, InstanceLost(50, GEMMA, "crashed", Reason.CRASHED))) == {
        "touched_at": 50,
        "contested": False,
        "suspected": Cause.CRASH,
    }


def test_a_clock_that_jumped_ahead_let_the_model_idle_and_one_set_back_did_not():
    before = warm(used_at=3.0)

    assert changed(before, apply(before, ClockJumped(50, "local", 60.0))) == {
        "touched_at": 50,
        "used_at": -57.0,
    }
    assert changed(before, apply(before, ClockJumped(50, "local", -60.0))) == {"touched_at": 50}


def test_loads_of_earlier_lives_come_before_those_of_this_one_and_five_count():
    before = cold(recent_loads=(5.0, 6.0))
    model = apply(before, LoadsRecalled(50, GEMMA, (1.0, 2.0, 3.0, 4.0)))

    assert changed(before, model) == {"recent_loads": (2.0, 3.0, 4.0, 5.0, 6.0)}


# --- what is loaded on demand ---------------------------------------------------------------------

AUTO = replace(POLICY, auto=True)


def test_a_window_that_opens_counts_as_if_somebody_had_just_asked_for_what_is_loaded_on_demand():
    before = cold(policy=AUTO, windowed=True, window_open=False, asks=3.0, asks_at=50.0 - 4 * 3600)
    opened = apply(before, WindowOpened(50, GEMMA))

    assert changed(before, opened) == {"window_open": True, "use_at": 50, "asks": 2.5, "asks_at": 50}
    assert changed(opened, apply(opened, WindowOpened(60, GEMMA))) == {}
    assert changed(opened, apply(opened, WindowClosed(60, GEMMA))) == {"window_open": False}
    assert changed(before, apply(before, WindowClosed(60, GEMMA))) == {}


def test_what_is_loaded_on_demand_is_wanted_by_hand_until_it_is_there():
    absent, there = cold(policy=AUTO), warm(policy=AUTO)

    assert changed(absent, apply(absent, WarmAsked(50, GEMMA))) == {"asked_for": True, "use_at": 50}
    assert changed(there, apply(there, WarmAsked(50, GEMMA))) == {"use_at": 50, "ping_at": -inf}


def test_the_line_of_those_who_wait_began_with_the_first_and_ends_with_the_last():
    one = apply(warm(ahead=True), WaitStarted(50, GEMMA))
    two = apply(one, WaitStarted(60, GEMMA))
    left = apply(two, WaitEnded(70, GEMMA, 20.0, False))
    none = apply(left, WaitEnded(80, GEMMA, 20.0, False))

    assert (one.ahead, one.waiting_since) == (False, 50)
    assert [m.waiting_since for m in (two, left, none)] == [50, 50, None]


def test_a_request_is_demand_and_ends_that_the_model_is_there_for_nobody():
    before = warm(ahead=True, asks=1.0, asks_at=50.0)
    one = apply(before, RequestStarted(50, GEMMA))
    many = apply(before, RequestsCounted(50, GEMMA, 3, 0))
    ended = apply(before, RequestsCounted(60, GEMMA, 0, 1, ended_at=55))
    later = apply(before, RequestsCounted(50 + 4 * 3600, GEMMA, 1, 9))

    assert (one.ahead, one.asks, one.asks_at) == (False, 2.0, 50)
    assert (many.ahead, many.asks, many.asks_at, many.used_at) == (False, 4.0, 50, before.used_at)
    assert (later.asks, later.asks_at, later.in_flight) == (1.5, 50 + 4 * 3600, 0)
    assert (ended.ahead, ended.asks, ended.asks_at, ended.used_at, ended.use_at) == (True, 1.0, 50.0, 55, 60)


def test_what_was_asked_for_in_earlier_lives_counts_by_how_long_ago_that_was():
    before = cold(policy=AUTO, asks=1.0, asks_at=50_000.0, use_at=49_000.0)
    recalled = DemandRecalled(50_000.0, GEMMA, ((14_400.0, 4), (500.0, 0), (28_800.0, 4)))

    assert changed(before, apply(before, recalled)) == {"asks": 4.0, "use_at": 49_500.0}
    assert apply(cold(), recalled).asks_at == 50_000.0
    assert apply(before, DemandRecalled(50_000.0, GEMMA, ((1001.0, 0),))).use_at == 49_000.0
    assert changed(before, apply(before, DemandRecalled(50_000.0, GEMMA, ()))) == {}


def test_what_no_ping_will_find_out_a_users_word_has_to_tell():
    crashed = InstanceLost(50, GEMMA, "crashed", Reason.CRASHED)

    assert apply(warm(policy=replace(POLICY, pinged=False)), crashed).crashed
    assert not apply(warm(), crashed).crashed
    assert apply(tried(State.WARM), crashed).crashed  # which it was before


def test_copies_of_an_earlier_life_are_recalled_for_as_long_as_that_is_sure():
    model = apply(cold(), OursRecalled(50, GEMMA, frozenset({"gemma"}), 80.0))

    assert changed(cold(), model) == {"recalled": (frozenset({"gemma"}), 80.0)}


def test_a_drain_begins_and_ends():
    drained = apply(warm(), DrainStarted(50, GEMMA))

    assert changed(warm(), drained) == {"draining": True}
    assert apply(drained, DrainEnded(60, GEMMA)) == warm()


def test_a_load_that_is_given_up_is_one_that_is_under_way():
    loads = after(cold(), LoadStarted(40, GEMMA))

    assert changed(loads, apply(loads, LoadGivenUp(50, GEMMA))) == {"giving_up": True}
    assert apply(cold(), LoadGivenUp(50, GEMMA)) == cold()


# --- what other daemons do ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "told", "used"),
    [
        ((0, False), (0, True), True),
        ((0, False), (1, False), True),
        ((0, True), (0, False), True),  # until now
        ((1, False), (0, False), True),
        ((0, False), (0, False), False),
    ],
)
def test_what_callers_elsewhere_want_is_in_use_until_it_is_told_that_they_have_gone(
    before: tuple[int, bool], told: tuple[int, bool], used: bool
):
    fact = UsedElsewhere(50, GEMMA, *told)
    model = warm(callers_elsewhere=before[0], used_elsewhere=before[1], elsewhere_at=20.0, ahead=True)
    known, asked_for = apply(model, fact), apply(replace(model, ahead=False), fact)

    assert (known.callers_elsewhere, known.used_elsewhere) == told
    assert known.elsewhere_at == (50 if used else 20.0)
    assert (known.ahead, asked_for.ahead) == (not used, False)


@pytest.mark.parametrize(
    ("here", "since", "elsewhere", "then"),
    [(0, None, 1, 50), (0, 30.0, 2, 30.0), (1, 30.0, 0, 30.0), (0, 30.0, 0, None)],
)
def test_the_line_goes_on_while_anybody_waits_here_or_elsewhere(
    here: int, since: float | None, elsewhere: int, then: float | None
):
    model = apply(cold(waiting=here, waiting_since=since), UsedElsewhere(50, GEMMA, elsewhere, False))

    assert model.waiting_since == then


def test_who_takes_over_trusts_its_own_eyes_and_who_has_lost_it_lets_nothing_go():
    told = {"ill": "it does not answer", "proved_elsewhere": True}
    before = replace(warm(alone=True, draining=True), **told)

    assert changed(before, apply(before, HandTaken(50, "local"))) == {
        "touched_at": 50,
        "ill": None,
        "alone": False,
        "proved_elsewhere": False,
    }
    assert changed(before, apply(before, HandLost(50, "local"))) == {"draining": False}


@pytest.mark.parametrize(
    ("was", "says", "is_"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_what_a_person_has_taken_upon_him_is_so_until_it_is_released(was: bool, says: bool, is_: bool):
    asked = apply(cold(alone=was), WarmAsked(50, GEMMA, alone=says))
    released = apply(replace(asked, alone=True), ReleaseAsked(60, GEMMA))

    assert (asked.alone, asked.asked_for) == (is_, True)
    assert (released.alone, released.asked_for) == (False, False)
