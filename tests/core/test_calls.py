"""What came of our loads, pings and unloads, and of those whose end nobody saw."""

import contextlib
from dataclasses import replace
from math import inf

import pytest

from keepalive.core.actions import Load, Refresh, SendPing, Unload
from keepalive.core.apply import apply
from keepalive.core.errors import Reason
from keepalive.core.explain import eta
from keepalive.core.facts import (
    HolderTold,
    Instance,
    InstanceLost,
    LoadForgone,
    LoadOutcome,
    LoadProgressed,
    LoadRemembered,
    LoadResolved,
    LoadStarted,
    PingEnded,
    PingOutcome,
    PingStarted,
    ReleaseAsked,
    RequestEnded,
    RequestStarted,
    Tier,
    UnloadCause,
    UnloadEnded,
    UnloadStarted,
)
from keepalive.core.records import UNSEEN, Cause, Claim, Model, Pending, Ping, Policy
from keepalive.core.states import IllegalMove, State
from tests.kit.models import (
    GEMMA,
    Box,
    a_model,
    after,
    box,
    changed,
    cold,
    entry,
    found,
    listed,
    load_ended,
    ours,
    tried,
    unanswered,
    warm,
)


def test_a_load_that_ended_well_waits_to_be_listed_and_is_then_pinged():
    state = box(listed(1, entry("gemma")), LoadStarted(2, GEMMA), load_ended(10, seconds=7.9))
    waiting = state[GEMMA]
    lagging = state.see(listed(11, entry("gemma")))[GEMMA]
    state.see(listed(41, entry("gemma", "gemma")))

    assert (waiting.state, waiting.loads, waiting.recent_loads) == (State.LOADING, 1, (7.9,))
    assert waiting.reason == "loaded in 7.9 s; waiting for LM Studio to list it"
    assert lagging.state is State.LOADING
    assert state.plan(41.1) == [SendPing(GEMMA, "gemma")]
    assert state[GEMMA].ours == {"gemma"}


def test_a_failed_load_is_tried_again_after_5_seconds_doubling_to_300():
    model, waits, at = cold(), [], 10.0
    for _ in range(8):
        model = after(model, LoadStarted(at, GEMMA), load_ended(at + 1, LoadOutcome.FAILED, message="no"))
        waits.append(model.retry_at - at - 1)
        at += 1000
        model = after(model, listed(at - 1, entry("gemma")))

    assert waits == [5, 10, 20, 40, 80, 160, 300, 300]


def test_a_guardrail_refusal_waits_five_minutes_at_once():
    model = after(cold(), LoadStarted(2, GEMMA), load_ended(10, LoadOutcome.REFUSED, message="no memory"))

    assert (model.state, model.retry_at, model.reason) == (State.BACKOFF, 310, "no memory")


def test_a_load_that_wants_a_token_waits_a_minute():
    model = after(
        cold(),
        LoadStarted(2, GEMMA),
        load_ended(10, LoadOutcome.REFUSED, message="it wants a token", why=Reason.UNAUTHORIZED),
    )

    assert (model.state, model.retry_at, model.reason) == (State.BACKOFF, 70, "it wants a token")


def test_our_own_illegal_moves_raise():
    for model in (warm(), found(), unanswered(), after(cold(), LoadStarted(2, GEMMA))):
        with pytest.raises(IllegalMove):
            apply(model, LoadStarted(99, GEMMA))
    for model in (cold(), a_model(), after(found(), PingStarted(2, GEMMA))):
        with pytest.raises(IllegalMove):
            apply(model, PingStarted(99, GEMMA))
    with pytest.raises(IllegalMove):
        apply(warm(), UnloadStarted(99, GEMMA, "gemma"))


def test_a_load_without_an_answer_is_unknown_and_not_failed():
    model = unanswered()

    assert (model.state, model.reason) == (
        State.LOADING,
        f"{UNSEEN}, because its end was not seen: it was cut",
    )
    assert model.pending is not None
    assert model.pending.until == 2 + 240 + 45


def test_a_load_of_an_earlier_life_is_waited_for():
    state = box(LoadRemembered(1, GEMMA, started=-20.0, expected=30.0), listed(2, entry("gemma")))
    early = state.plan(2.1)
    state.see(listed(85.1, entry("gemma")))

    assert early == []
    assert state[GEMMA].state is State.COLD
    assert state.plan(85.2) == [Load(GEMMA)]


def test_a_load_of_an_earlier_life_that_is_listed_is_taken():
    state = box(LoadRemembered(1, GEMMA, started=-20.0, expected=30.0), listed(2, entry("gemma", "gemma")))

    assert state.plan(2.1) == [SendPing(GEMMA, "gemma")]


def test_a_load_of_an_earlier_life_shows_as_loading():
    model = after(a_model(), LoadRemembered(1, GEMMA, -20.0, 30.0), listed(2, entry("gemma")))

    assert (model.state, model.loading_since) == (State.LOADING, -20.0)
    assert eta(model, [model], 2) is None


def test_a_ping_without_an_answer_is_a_question_for_the_listing():
    state = Box(warm()).see(
        listed(303, entry("gemma", "gemma")),
        PingStarted(303.5, GEMMA),
        PingEnded(363.5, GEMMA, PingOutcome.TIMEOUT),
    )
    asked = state.plan(363.6)
    state.see(listed(363.7, entry("gemma", "gemma")))

    assert asked == [Refresh("local")]
    assert (state[GEMMA].state, state[GEMMA].busy) == (State.WARM, True)
    assert state.plan(363.8) == []
    assert state[GEMMA].ping_at == 423.5


def test_a_ping_that_the_model_refuses_is_backoff_with_its_words():
    model = after(
        warm(),
        PingStarted(303, GEMMA),
        PingEnded(304, GEMMA, PingOutcome.ERROR, 1.0, "HTTP 500", Reason.OTHER),
    )

    assert (model.state, model.retry_at, model.ping_at, model.reason) == (State.BACKOFF, 309, 309, "HTTP 500")


def test_a_ping_that_wants_a_token_waits_a_minute():
    model = after(
        warm(), PingStarted(303, GEMMA), PingEnded(304, GEMMA, PingOutcome.ERROR, why=Reason.UNAUTHORIZED)
    )

    assert (model.state, model.retry_at) == (State.BACKOFF, 364)


def test_a_ping_answered_by_another_model_does_not_prove_this_one():
    model = after(
        found(),
        PingStarted(2, GEMMA),
        PingEnded(3, GEMMA, PingOutcome.WRONG_MODEL, 0.1, "qwen answered the ping in its place"),
    )

    assert (model.state, model.reason) == (State.BACKOFF, "qwen answered the ping in its place")


def test_a_ping_whose_connection_broke_blames_the_connection():
    model = after(
        warm(), PingStarted(303, GEMMA), PingEnded(304, GEMMA, PingOutcome.ERROR, 1.0, "it broke off")
    )

    assert (model.state, model.ping_at, model.reason) == (State.WARM, 319, "it broke off")


def test_an_unload_that_fails_is_tried_again_later_and_says_so():
    state = Box(ours()).see(ReleaseAsked(20, GEMMA), listed(80, entry("gemma", "gemma")))
    state.see(UnloadStarted(80.1, GEMMA, "gemma"), UnloadEnded(81, GEMMA, "gemma", "HTTP 500"))
    state.see(listed(82, entry("gemma", "gemma")))
    early = state.plan(82.1)
    state.see(listed(86.5, entry("gemma", "gemma")))

    assert early == []
    assert state.plan(86.6) == [Unload(GEMMA, "gemma", UnloadCause.RELEASED)]


# --- each call, and all that it leaves ------------------------------------------------------------


def test_a_load_that_begins_ends_what_held_it_off():
    before = tried(State.BACKOFF, instances=(), pending=None, draining=True, letting_go=UnloadCause.ROOM)

    assert changed(before, apply(before, LoadStarted(50, GEMMA, ahead=True, claim=7))) == {
        "state": State.LOADING,
        "since": 50,
        "reason": None,
        "load_started": 50,
        "retry_at": None,
        "claim": 7,
        "ahead": True,
        "draining": False,
        "letting_go": None,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"pinging": True},
        {"pending": Pending(since=1.0, until=9.0, alive_at=1.0)},
        {"instances": (Instance("gemma"),)},
    ],
)
def test_no_load_begins_beside_another_call_an_unseen_load_or_an_instance(changes: dict[str, object]):
    told = "gemma on local: a load though one is under way, or an instance is there"

    with pytest.raises(IllegalMove, match=f"^{told}$"):
        apply(replace(cold(), **changes), LoadStarted(99, GEMMA))  # type: ignore[arg-type]


BEFORE = "it was begun before this daemon was started or its config read anew, and nobody saw it end"


def test_a_load_of_an_earlier_life_is_believed_to_go_on_for_as_long_as_it_may_take():
    known = apply(a_model(), LoadRemembered(1, GEMMA, started=-20.0, expected=30.0, tells_loading=True))
    unknown = apply(a_model(), LoadRemembered(1, GEMMA, started=-20.0, expected=None))

    assert changed(a_model(), known) == {
        "pending": Pending(since=-20.0, until=85.0, alive_at=1, expected=30.0, why=BEFORE),
        "tells_loading": True,
        "reason": f"an earlier load may still be under way, because {BEFORE}",
    }
    assert unknown.pending == Pending(since=-20.0, until=265.0, alive_at=1, why=BEFORE)


def loading(**changes: object) -> Model:
    return tried(State.LOADING, instances=(), pending=None, load_started=30.0, **changes)


def test_a_load_that_ended_well_is_ours_and_has_still_to_be_listed():
    before = loading(ours=frozenset({"gemma:2"}), recent_loads=(1.0, 2.0, 3.0, 4.0, 5.0), loads=7)

    assert changed(before, apply(before, load_ended(50, seconds=7.94, proved=True))) == {
        "reason": "loaded in 7.9 s; waiting for LM Studio to list it",
        "load_started": None,
        "touched_at": 50,
        "contested": False,
        "loads": 8,
        "recent_loads": (2.0, 3.0, 4.0, 5.0, 7.94),
        "ours": {"gemma", "gemma:2"},
        "pending": Pending(since=30.0, until=95.0, alive_at=50, loaded=True, proved=True),
    }


def test_a_load_is_timed_by_our_own_clock_where_lm_studio_does_not_say():
    model = apply(loading(), load_ended(50, elapsed=20.0, seconds=None, instance_id=None))

    assert (model.recent_loads, model.ours) == ((20.0,), {"gemma"})
    assert model.pending is not None
    assert model.pending.proved is False
    assert apply(loading(), load_ended(50, seconds=0.0)).recent_loads == (0.0,)


def test_a_load_that_is_not_known_to_have_begun_began_when_it_ended():
    model = apply(loading(), load_ended(50))
    unknown = apply(replace(loading(), load_started=None), load_ended(50))
    at_first = apply(replace(loading(), load_started=0.0), load_ended(50))

    assert [m.pending.since for m in (model, unknown, at_first) if m.pending] == [30.0, 50, 0.0]


def test_where_nothing_is_listed_a_load_that_ended_well_has_answered():
    model = apply(loading(blind=True), load_ended(50))

    assert (model.state, model.pending, model.ping_at) == (State.WARM, None, 350)


def test_a_load_without_an_answer_may_go_on_and_counts_as_a_failure():
    before = loading()

    assert changed(before, apply(before, load_ended(50, LoadOutcome.UNKNOWN, message="it was cut"))) == {
        "reason": f"{UNSEEN}, because its end was not seen: it was cut",
        "load_started": None,
        "touched_at": 50,
        "contested": False,
        "pending": Pending(30.0, 30.0 + 240.0 + 45.0, alive_at=50, why="its end was not seen: it was cut"),
        "failures": 3,
        "failure": "it was cut",
        "retry_at": 70.0,
    }
    assert apply(before, load_ended(50, LoadOutcome.UNKNOWN)).reason == (
        f"{UNSEEN}, because its end was not seen: no answer to the load"
    )


@pytest.mark.parametrize(
    ("at", "until", "expected"),
    [
        (134.9, 30.0 + 105.0, 30.0),  # twice the longest of its loads, and the lag
        (135.0, 30.0 + 210.0, 105.0),  # it has taken as long already: as long again
        (230.0, 30.0 + 400.0, 200.0),
    ],
)
def test_an_unseen_load_that_has_outlasted_what_was_known_is_given_twice_that_time(
    at: float, until: float, expected: float
):
    model = apply(loading(recent_loads=(20.0, 30.0)), load_ended(at, LoadOutcome.UNKNOWN))

    assert model.pending is not None
    assert (model.pending.until, model.pending.expected) == (pytest.approx(until), pytest.approx(expected))
    # A listing that does not show it shortens a guess, and no more.
    late = apply(model, listed(at + 0.02, entry("gemma", size=1)))
    assert late.pending is not None
    assert late.pending.until == model.pending.until


def test_a_load_that_failed_says_why_and_is_tried_again():
    before = loading()

    assert changed(before, apply(before, load_ended(50, LoadOutcome.FAILED, message="no such file"))) == {
        "state": State.BACKOFF,
        "since": 50,
        "reason": "no such file",
        "load_started": None,
        "touched_at": 50,
        "contested": False,
        "failures": 3,
        "failure": "no such file",
        "retry_at": 70.0,
        "warm_since": None,
    }
    assert apply(before, load_ended(50, LoadOutcome.FAILED)).reason == "the load failed"


def test_a_load_that_the_server_answers_by_saying_that_it_loads_goes_on():
    for outcome in (LoadOutcome.UNKNOWN, LoadOutcome.FAILED):
        before = loading(blind=True)
        model = apply(before, load_ended(50, outcome, message="not yet", why=Reason.LOADING))

        assert (model.state, model.reason) == (State.LOADING, "the server says that it is loading: not yet")
        assert (model.load_started, model.failures) == (None, 2)
    silent = apply(loading(blind=True), load_ended(50, LoadOutcome.UNKNOWN, why=Reason.LOADING))
    assert silent.reason == "the server says that it is loading: no more words"


def test_where_listings_tell_a_load_that_the_server_answers_by_saying_that_it_loads_is_one_without_an_answer():
    said = apply(loading(), load_ended(50, LoadOutcome.FAILED, message="not yet", why=Reason.LOADING))

    assert said == apply(loading(), load_ended(50, LoadOutcome.UNKNOWN, message="not yet"))
    assert said.pending is not None
    failed = apply(
        loading(blind=True), load_ended(50, LoadOutcome.FAILED, message="no", why=Reason.RESOURCES)
    )
    assert (failed.state, failed.reason) == (State.BACKOFF, "no")


def test_progress_that_stands_still_keeps_the_time_at_which_it_came():
    half = apply(loading(), LoadProgressed(40, GEMMA, 0.5))

    assert changed(half, apply(half, LoadProgressed(45, GEMMA, 0.5))) == {}
    assert changed(half, apply(half, LoadProgressed(45, GEMMA, 0.6))) == {"progress": 0.6, "progress_at": 45}
    assert apply(loading(), LoadProgressed(40, GEMMA, 0.0)).progress == 0.0


@pytest.mark.parametrize("outcome", LoadOutcome)
def test_whatever_it_came_to_a_load_that_has_ended_leaves_nothing_of_its_own(outcome: LoadOutcome):
    model = apply(loading(giving_up=True, progress=0.5, alone=True), load_ended(50, outcome))

    assert (model.load_started, model.giving_up, model.progress, model.alone) == (None, False, None, False)


def test_a_load_that_was_not_begun_after_all_leaves_nothing_but_a_look():
    before = loading(giving_up=True, progress=0.5, alone=True, retry_at=None, ahead=True)

    assert changed(before, apply(before, LoadForgone(50, GEMMA, "another one acts"))) == {
        "state": State.COLD,
        "since": 50,
        "reason": "another one acts",
        "load_started": None,
        "giving_up": False,
        "progress": None,
        "alone": False,
        "touched_at": 50,
        "ours": frozenset(),
        "ping_at": None,
        "busy": False,
        "crashed": False,
        "ahead": False,
    }


def test_a_load_that_was_given_up_leaves_nothing_and_is_no_failure():
    before = loading(giving_up=True, retry_at=None, ahead=True)

    assert changed(before, apply(before, load_ended(50, LoadOutcome.GIVEN_UP, message="ended"))) == {
        "state": State.COLD,
        "since": 50,
        "reason": None,
        "load_started": None,
        "giving_up": False,
        "touched_at": 50,
        "contested": False,
        "ours": frozenset(),
        "ping_at": None,
        "busy": False,
        "crashed": False,
        "ahead": False,
    }


def test_a_load_that_was_granted_tells_how_much_fits_and_one_that_was_refused_how_much_does_not():
    before = loading(claim=7, failures=0)
    unclaimed = loading(failures=0, granted_claim=Claim(5, 1.0), refused_claim=Claim(6, 2.0))

    granted = apply(before, load_ended(50))
    refused = apply(before, load_ended(50, LoadOutcome.REFUSED))
    unheard = apply(before, load_ended(50, LoadOutcome.REFUSED, why=Reason.UNAUTHORIZED))

    assert (granted.granted_claim, granted.refused_claim) == (Claim(7, 50), None)
    assert (refused.granted_claim, refused.refused_claim, refused.retry_at) == (None, Claim(7, 50), 55.0)
    assert (unheard.refused_claim, unheard.retry_at) == (None, 110.0)
    assert apply(unclaimed, load_ended(50)).granted_claim is None
    assert apply(unclaimed, load_ended(50, LoadOutcome.REFUSED)).refused_claim == Claim(6, 2.0)
    assert apply(replace(before, failures=9), load_ended(50, LoadOutcome.REFUSED)).retry_at == 350.0


def test_a_ping_is_under_way_from_its_beginning():
    before = tried(State.WARM)

    assert changed(before, apply(before, PingStarted(50, GEMMA))) == {"pinging": True}


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({"blind": True, "state": State.WARM}, True),
        ({"blind": True, "state": State.COLD}, False),
        ({"blind": False, "state": State.WARM}, False),
        ({"instances": (Instance("gemma"),), "state": State.COLD}, True),
        ({"instances": (Instance("gemma"),), "unloading": True}, False),
        ({"blind": True, "state": State.WARM, "pinging": True}, False),
    ],
)
def test_only_what_is_there_is_pinged_and_beside_no_other_call(changes: dict[str, object], allowed: bool):
    told = "gemma on local: a ping though nothing is loaded, or a call is under way"
    before = a_model(**changes)

    with contextlib.nullcontext() if allowed else pytest.raises(IllegalMove, match=f"^{told}$"):
        apply(before, PingStarted(99, GEMMA))


def pinging(state: State = State.WARM, **changes: object) -> Model:
    return tried(state, pinging=True, pending=None, **changes)


def test_a_ping_that_users_made_needless_is_due_an_interval_after_them():
    idle = tried(State.WARM, active_at=40.0)
    busy = tried(State.WARM, active_at=40.0, in_flight=1)
    skipped = PingEnded(50, GEMMA, PingOutcome.SKIPPED)

    assert changed(idle, apply(idle, skipped)) == {"ping_at": 340.0, "vouched_at": 40.0}
    assert changed(busy, apply(busy, skipped)) == {"ping_at": 350.0, "vouched_at": 40.0}


def test_a_ping_that_was_answered_proves_the_model():
    model = apply(pinging(), PingEnded(50, GEMMA, PingOutcome.OK, 0.2))

    assert changed(pinging(), model) == {
        "reason": None,
        "pinging": False,
        "touched_at": 50,
        "contested": False,
        "used_at": 50,
        "seen_at": 50,
        "last_ping": Ping(50, PingOutcome.OK, 0.2),
        "pinged_at": 50,
        "ping_at": 350.0,
        "retry_at": None,
        "suspected": None,
        "crashed": False,
        "busy": False,
    }


def test_a_ping_without_an_answer_leaves_all_but_the_question():
    model = apply(pinging(busy=False), PingEnded(50, GEMMA, PingOutcome.TIMEOUT, 60.0, "no answer in 60 s"))

    assert changed(pinging(busy=False), model) == {
        "reason": "no answer in 60 s",
        "pinging": False,
        "touched_at": 50,
        "contested": False,
        "used_at": 50,
        "last_ping": Ping(50, PingOutcome.TIMEOUT, 60.0),
        "ping_at": 110.0,
        "busy": True,
    }


@pytest.mark.parametrize(
    ("refresh", "timeout", "interval", "again"),
    [(15.0, 60.0, 300.0, 110.0), (90.0, 60.0, 300.0, 140.0), (15.0, 60.0, 30.0, 80.0)],
)
def test_a_ping_without_an_answer_is_repeated_after_its_own_time_and_no_later_than_the_next(
    refresh: float, timeout: float, interval: float, again: float
):
    policy = Policy(refresh_interval=refresh, ping_timeout=timeout, ping_interval=interval)
    model = apply(pinging(policy=policy), PingEnded(50, GEMMA, PingOutcome.TIMEOUT))

    assert (model.ping_at, model.reason) == (again, "it did not answer the ping as it should")


def test_a_ping_whose_connection_broke_is_repeated_after_the_next_listing():
    model = apply(pinging(), PingEnded(50, GEMMA, PingOutcome.ERROR, 1.0, "it broke off"))

    assert changed(pinging(), model) == {
        "reason": "it broke off",
        "pinging": False,
        "touched_at": 50,
        "contested": False,
        "used_at": 50,
        "last_ping": Ping(50, PingOutcome.ERROR, 1.0),
        "ping_at": 65.0,
        "busy": False,
    }


def test_an_answer_that_is_none_disproves_the_model():
    before = pinging(suspected=Cause.RESTART)
    model = apply(before, PingEnded(50, GEMMA, PingOutcome.WRONG_MODEL, 1.0, "qwen answered"))

    assert changed(before, model) == {
        "state": State.BACKOFF,
        "since": 50,
        "reason": "qwen answered",
        "failures": 3,
        "failure": "qwen answered",
        "retry_at": 70.0,
        "ping_at": 70.0,
        "pinging": False,
        "touched_at": 50,
        "contested": False,
        "used_at": 50,
        "last_ping": Ping(50, PingOutcome.WRONG_MODEL, 1.0),
        "busy": False,
        "crashed": False,
    }


def test_a_ping_that_the_server_answers_by_saying_that_it_loads_is_asked_again_soon():
    model = apply(pinging(), PingEnded(50, GEMMA, PingOutcome.ERROR, 1.0, "not yet", Reason.LOADING))

    assert (model.state, model.ping_at) == (State.LOADING, 52.0)
    assert (model.reason, model.failures) == ("the server says that it is loading: not yet", 2)


def test_a_ping_that_tells_of_a_crash_makes_it_a_suspect():
    model = apply(
        pinging(crashed=False, suspected=None), PingEnded(50, GEMMA, PingOutcome.ERROR, why=Reason.CRASHED)
    )

    assert (model.crashed, model.suspected, model.retry_at) == (True, Cause.CRASH, 70.0)


@pytest.mark.parametrize(
    ("why", "warm_since", "crowd"),
    [
        (Reason.CRASHED, None, (frozenset({"qwen"}), 50)),
        (Reason.CRASHED, 3.0, None),  # it has answered: there was room for it
        (Reason.OTHER, None, None),
    ],
)
def test_what_crashes_before_it_ever_answered_may_have_had_too_little_room_beside_the_others(
    why: Reason, warm_since: float | None, crowd: object
):
    before = pinging(State.LOADING, warm_since=warm_since, beside=frozenset({"gemma", "qwen"}))

    assert apply(before, PingEnded(50, GEMMA, PingOutcome.ERROR, why=why)).crowd == crowd


def test_an_unload_is_under_way_from_its_beginning():
    before = tried(State.WARM)

    assert changed(before, apply(before, UnloadStarted(50, GEMMA, "gemma", UnloadCause.IDLE))) == {
        "unloading": True,
        "letting_go": UnloadCause.IDLE,
    }


@pytest.mark.parametrize(("instance", "busy"), [("gemma:2", False), ("gemma", True)])
def test_only_what_is_ours_is_unloaded_and_beside_no_other_call(instance: str, busy: bool):
    with pytest.raises(IllegalMove, match=f"^gemma on local: unloading {instance}, which is not ours$"):
        apply(tried(State.WARM, pinging=busy), UnloadStarted(99, GEMMA, instance))


def test_what_is_unloaded_is_gone_at_once():
    before = tried(State.WARM, unloading=True, retry_at=None)

    assert changed(before, apply(before, UnloadEnded(50, GEMMA, "gemma"))) == {
        "state": State.COLD,
        "since": 50,
        "reason": None,
        "unloading": False,
        "touched_at": 50,
        "contested": False,
        "instances": (),
        "ours": frozenset(),
        "warm_since": None,
        "ping_at": None,
        "crashed": False,
        "busy": False,
    }


def test_another_copy_stays_when_one_is_unloaded():
    copies = (Instance("gemma:2"), Instance("gemma"))
    ids = frozenset({"gemma", "gemma:2"})
    before = tried(State.WARM, unloading=True, draining=True, instances=copies, ours=ids)

    assert changed(before, apply(before, UnloadEnded(50, GEMMA, "gemma"))) == {
        "unloading": False,
        "draining": False,
        "touched_at": 50,
        "contested": False,
        "instances": (Instance("gemma:2"),),
        "ours": {"gemma:2"},
        "warm_since": None,
    }


def test_an_unload_that_failed_leaves_it_there_and_is_tried_again():
    before = tried(State.WARM, unloading=True)

    assert changed(before, apply(before, UnloadEnded(50, GEMMA, "gemma", "HTTP 500"))) == {
        "reason": "could not unload it: HTTP 500",
        "unloading": False,
        "touched_at": 50,
        "contested": False,
        "failures": 3,
        "failure": "could not unload it: HTTP 500",
        "retry_at": 70.0,
    }


def test_what_is_found_to_answer_somebody_stays_and_goes_after_what_is_idle():
    before = tried(State.WARM, unloading=True, letting_go=UnloadCause.ROOM)

    assert changed(before, apply(before, UnloadEnded(50, GEMMA, "gemma", "it answers", in_use=True))) == {
        "reason": "it answers",
        "unloading": False,
        "touched_at": 50,
        "contested": False,
        "use_at": 50,
        "used_at": 50,
        "retry_at": 55.0,
    }


# --- a ping that is of no use -----------------------------------------------------------------------

REFUSED = 'its ping is refused: no image; set ping in [[models]] "gemma": one that it takes, or "off"'


@pytest.mark.parametrize("state", [State.UNKNOWN, State.LOADING, State.WARM, State.BACKOFF])
def test_a_ping_that_is_refused_as_a_request_is_no_illness_of_what_is_listed(state: State):
    before = tried(state, pinging=True, pending=None)
    model = apply(before, PingEnded(50, GEMMA, PingOutcome.REFUSED, 0.2, "no image"))

    assert (model.state, model.reason, model.retry_at) == (State.WARM, REFUSED, None)
    assert (model.last_ping, model.ping_at) == (Ping(50, PingOutcome.REFUSED, 0.2), 350)
    assert apply(before, PingEnded(50, GEMMA, PingOutcome.REFUSED)).refused == "no words"
    assert model.pinged_at == before.pinged_at


def test_what_refuses_pings_says_so_after_each_proof_until_one_is_answered():
    model = after(found(), PingStarted(2, GEMMA), PingEnded(3, GEMMA, PingOutcome.REFUSED, 0.2, "no image"))
    used = after(
        model, RequestStarted(4, GEMMA), RequestEnded(5, GEMMA, True), listed(6, entry("gemma", "gemma"))
    )
    mended = after(used, PingStarted(7, GEMMA), PingEnded(8, GEMMA, PingOutcome.OK, 0.1))

    assert [model.reason, used.reason, mended.reason] == [REFUSED, REFUSED, None]


def test_a_ping_that_was_refused_does_not_keep_what_went_missing_warm():
    model = after(
        found(), PingStarted(2, GEMMA), PingEnded(3, GEMMA, PingOutcome.REFUSED), listed(20, entry("gemma"))
    )

    assert model.state is State.COLD


def test_a_load_by_ping_that_was_refused_as_a_request_is_warm_where_nothing_can_be_seen():
    no = load_ended(3, message="no image")
    model = after(a_model(), listed(1, entry("gemma"), tier=Tier.OPENAI), LoadStarted(2, GEMMA), no)

    assert (model.state, model.reason) == (State.WARM, REFUSED)


def test_where_residency_shows_the_listing_has_the_last_word_on_a_load_whose_ping_was_refused():
    rows = {there: [entry("gemma", *(["gemma"] if there else []), loading=False)] for there in (True, False)}
    begun = box(
        listed(1, entry("gemma"), tier=Tier.V0), LoadStarted(2, GEMMA), load_ended(3, message="no image")
    )
    missing = after(begun[GEMMA], listed(49, *rows[False], tier=Tier.V0))
    begun.see(listed(4, *rows[True], tier=Tier.V0))

    assert begun.plan(4.1) == [SendPing(GEMMA, "gemma")]
    assert missing.state is State.BACKOFF


# --- no ping at all ---------------------------------------------------------------------------------

UNPINGED = Policy(pinged=False)


@pytest.mark.parametrize("tier", Tier)
def test_a_model_that_nobody_is_to_ping_is_warm_because_it_is_listed(tier: Tier):
    instances = [] if tier is Tier.OPENAI else ["gemma"]
    state = box(listed(1, entry("gemma", *instances), tier=tier), policy=UNPINGED)
    first = state[GEMMA]
    state.see(listed(5000, entry("gemma", *instances), tier=tier))

    assert (first.state, first.ping_at, first.pinged_at) == (State.WARM, None, -inf)
    assert (state[GEMMA].state, state[GEMMA].seen_at, state[GEMMA].used_at) == (
        State.WARM,
        5000,
        first.used_at,
    )
    assert state.plan(5000.1) == []


def test_it_has_to_be_loaded_all_the_same_and_to_be_wanted():
    state = box(listed(1, entry("gemma")), policy=UNPINGED)
    loading = state.plan(1.1)
    state.see(LoadStarted(2, GEMMA), load_ended(10), listed(11, entry("gemma", "gemma")))
    unwanted = box(listed(1, entry("gemma"), tier=Tier.OPENAI), policy=UNPINGED, window_open=False)

    assert loading == [Load(GEMMA)]
    assert state[GEMMA].state is State.WARM
    assert unwanted[GEMMA].state is State.COLD


def test_what_crashed_and_is_ours_is_not_believed_but_loaded_anew():
    state = Box(ours(policy=UNPINGED)).see(
        InstanceLost(20, GEMMA, "it has crashed", Reason.CRASHED), listed(21, entry("gemma", "gemma"))
    )
    elsewhere = Box(found(policy=UNPINGED)).see(
        InstanceLost(20, GEMMA, "it has crashed", Reason.CRASHED), listed(21, entry("gemma", "gemma"))
    )

    assert state[GEMMA].state is State.BACKOFF
    assert state.plan(21.1) == [Unload(GEMMA, "gemma")]
    assert (elsewhere[GEMMA].state, elsewhere.plan(21.1)) == (State.WARM, [])


# --- what another daemon did ------------------------------------------------------------------------


def begun_elsewhere(**told: object) -> LoadRemembered:
    return LoadRemembered(50, GEMMA, started=40.0, expected=30.0, by="a", **told)  # type: ignore[arg-type]


def test_a_load_that_another_daemon_began_is_waited_for_like_one_of_ours():
    before = cold(progress=0.5)

    assert changed(before, apply(before, begun_elsewhere(tells_loading=True))) == {
        "state": State.LOADING,
        "since": 50,
        "reason": "a loads it",
        "progress": None,
        "tells_loading": True,
        "pending": Pending(since=40.0, until=145.0, alive_at=50, expected=30.0, why="a began it"),
        "touched_at": 50,
    }
    assert apply(replace(before, tells_loading=True), begun_elsewhere()).tells_loading
    assert not apply(before, begun_elsewhere()).tells_loading


def test_what_is_listed_while_another_daemon_begins_to_load_it_is_given_to_nobody_before_the_next_look():
    model = apply(warm(), begun_elsewhere())

    assert (model.state, model.unsure_since, model.given) == (State.WARM, 50, False)


STRANGERS = Pending(since=1.0, until=99.0, alive_at=2.0, ours=False)


@pytest.mark.parametrize(
    ("known", "better"),
    [
        ({"load_started": 30.0}, True),
        ({"pending": replace(STRANGERS, ours=True)}, False),
        ({"pending": STRANGERS}, False),
        ({"blind": True, "state": State.WARM}, False),
    ],
    ids=["our load", "an earlier load of ours", "a load of nobody we know", "an old answer"],
)
def test_of_what_we_began_and_only_of_that_we_know_better_than_another_daemon(
    known: dict[str, object], better: bool
):
    before = a_model(**known)
    model = apply(before, begun_elsewhere())

    assert (model == before) is better
    assert better or (model.state, model.pending.until) == (State.LOADING, 145.0)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "over"),
    [
        ({}, True),
        ({"load_started": 30.0}, False),
        ({"pending": STRANGERS}, False),
        ({"pending": None}, False),
        ({"instances": (Instance("gemma"),)}, True),
    ],
    ids=["one that was told of", "our load", "a load of nobody we know", "none", "a copy"],
)
def test_a_load_that_another_daemon_saw_end_is_over_here_too(changes: dict[str, object], over: bool):
    told_of = {"state": State.LOADING, "progress": 0.5, "pending": replace(STRANGERS, ours=True)}
    before = a_model(**{**told_of, **changes})

    then = changed(before, apply(before, LoadResolved(50, GEMMA)))

    assert then == ({"pending": None, "progress": None} if over else {})


def test_what_the_daemon_that_acts_tells_of_a_model_counts_here():
    copies = (Instance("gemma"), Instance("gemma:2"))
    before = tried(State.WARM, instances=copies, recent_loads=(9.0,))
    told = HolderTold(
        50,
        GEMMA,
        frozenset({"gemma:2", "gemma:3"}),
        failure="no memory",
        failures=5,
        retry_at=70.0,
        loads=(3.0, 4.0),
    )

    assert changed(before, apply(before, told)) == {
        "told": {"gemma:2", "gemma:3"},
        "ours": {"gemma", "gemma:2"},
        "told_at": 50,
        "recent_loads": (3.0, 4.0),
        "failure": "no memory",
        "failures": 5,
        "retry_at": 70.0,
        "contested": False,
    }
    assert apply(before, HolderTold(50, GEMMA)).recent_loads == (9.0,)
    alone = replace(before, alone=True)
    assert apply(alone, told) is alone  # he tells of what was before our load


def test_what_the_daemon_that_acts_finds_ill_is_ill_here_where_it_is_listed():
    told = HolderTold(50, GEMMA, ill="it does not answer")
    there, gone = tried(State.WARM), tried(State.COLD, instances=())

    ill = apply(there, told)

    assert (ill.state, ill.reason, ill.ill) == (State.BACKOFF, "it does not answer", "it does not answer")
    assert (apply(gone, told).state, apply(gone, told).ill) == (State.COLD, "it does not answer")
    assert apply(replace(there, ill="it was"), HolderTold(50, GEMMA)).ill is None


@pytest.mark.parametrize(
    ("state", "retry_at", "then"),
    [
        (State.COLD, 50.1, State.BACKOFF),
        (State.COLD, 50, State.COLD),
        (State.COLD, None, State.COLD),
        (State.UNKNOWN, 50.1, State.UNKNOWN),
    ],
)
def test_what_the_daemon_that_acts_holds_off_is_held_off_here(
    state: State, retry_at: float | None, then: State
):
    before = tried(state, instances=(), reason=None)
    model = apply(before, HolderTold(50, GEMMA, failure="no memory", retry_at=retry_at))

    assert (model.state, model.reason) == (then, "no memory" if then is State.BACKOFF else None)


@pytest.mark.parametrize(
    ("state", "changes", "warm", "then"),
    [
        (State.COLD, {}, True, State.WARM),
        (State.WARM, {}, False, State.COLD),
        (State.WARM, {}, True, None),
        (State.COLD, {}, False, None),
        (State.COLD, {"load_started": 30.0}, True, None),
        (State.COLD, {"blind": False}, True, None),
    ],
)
def test_where_nothing_is_listed_the_daemon_that_acts_says_what_is_warm(
    state: State, changes: dict[str, object], warm: bool, then: State | None
):
    before = replace(tried(state, instances=(), blind=True), **changes)  # type: ignore[arg-type]
    model = apply(before, HolderTold(50, GEMMA, warm=warm, failure="it is gone"))
    told = {"told_at": 50, "failures": 0, "failure": "it is gone", "retry_at": None, "contested": False}

    if then is None:
        assert changed(before, model) == (told | {"proved_elsewhere": True} if warm else told)
    else:
        assert (model.state, model.reason) == (then, None if warm else "it is gone")
