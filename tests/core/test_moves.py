"""What several kinds of fact lead to: another state, and what goes with it."""

from dataclasses import replace
from math import inf

import pytest

from keepalive.core.errors import Reason
from keepalive.core.facts import ModelId, PingEnded, PingOutcome, PingStarted
from keepalive.core.moves import (
    absent,
    backoff,
    believed,
    crashes_beside,
    failed,
    fails_again,
    move,
    proved,
    says_that_it_loads,
)
from keepalive.core.records import Cause, Pending, Primed, Priming
from keepalive.core.states import IllegalMove, Sign, State
from tests.kit.models import GEMMA, POLICY, a_model, after, changed, cold, ours, tried, warm

# --- from state to state --------------------------------------------------------------------------


def test_a_move_says_where_it_leads_since_when_and_why():
    model = move(cold(), Sign.SEEN_LOADING, 50.0, "somebody loads it")

    assert changed(cold(), model) == {"state": State.LOADING, "since": 50.0, "reason": "somebody loads it"}


def test_a_move_that_leads_nowhere_else_has_a_new_reason_and_the_old_time():
    model = move(warm(), Sign.PRESENT, 50.0, "it is busy")

    assert changed(warm(), model) == {"reason": "it is busy"}


def test_what_was_read_is_forgotten_when_it_is_warm_no_more():
    priming = Priming(openings=("agent",), done=(Primed("agent", 13.0, 1.0),), failed=frozenset({"agent"}))
    before = tried(State.WARM, priming=priming)

    assert move(before, Sign.PRESENT, 50.0, None).priming == priming
    for sign in (Sign.ABSENT, Sign.SEEN_LOADING, Sign.DISPROVED):
        assert move(before, sign, 50.0, None).priming == replace(priming, done=())


def test_a_move_that_the_table_does_not_know_says_which():
    with pytest.raises(IllegalMove, match=r"^gemma on local: we load it in state warm$"):
        move(warm(), Sign.LOAD_STARTED, 50.0, None)


def test_what_was_to_be_unloaded_a_little_later_and_is_gone_is_held_off_by_nothing():
    before = replace(warm(), retry_at=55.0, reason="it answers", failure=None)

    for reason in (None, "it is gone"):
        model = absent(before, 50.0, reason)
        assert (model.state, model.retry_at, model.reason) == (State.COLD, None, reason)


def test_what_failed_and_is_gone_is_held_off_until_its_time_and_says_why():
    before = replace(warm(), retry_at=55.0, failure="no memory")

    model = absent(before, 50.0, None)

    assert (model.state, model.retry_at, model.reason) == (State.BACKOFF, 55.0, "no memory")
    late = absent(before, 55.0, None)
    assert (late.state, late.reason) == (State.COLD, None)


def test_it_waits_5_seconds_after_the_first_failure_doubling_to_300():
    assert [backoff(failures) for failures in range(1, 9)] == [5, 10, 20, 40, 80, 160, 300, 300]
    assert backoff(100_000) == 300


def test_a_token_that_was_refused_is_tried_again_after_a_minute():
    why = Reason.UNAUTHORIZED
    model = after(warm(), PingStarted(40, GEMMA), PingEnded(50, GEMMA, PingOutcome.ERROR, why=why))

    assert model.retry_at == 110


def test_a_failure_of_its_own_counts_those_before_it_and_not_how_often_it_was_taken():
    taken = tried(State.COLD, failures=5, taken=3)

    assert changed(taken, fails_again(taken)) == {"failures": 3, "taken": 0}
    assert fails_again(tried(State.COLD, failures=1, taken=3)).failures == 1
    assert fails_again(tried(State.COLD, failures=0)).failures == 1


# --- it says that it is loading -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "believed"),
    [
        (None, Pending(50.0, 52.0, alive_at=50.0, seen=True, ours=False)),
        (
            Pending(10.0, 12.0, alive_at=10.0, seen=True, ours=False),
            Pending(10.0, 52.0, alive_at=50.0, seen=True, ours=False),
        ),
        (Pending(10.0, 99.0, alive_at=10.0), Pending(10.0, 99.0, alive_at=50.0)),
    ],
    ids=["nothing was known", "it has said so before", "a load of ours"],
)
def test_what_says_that_it_loads_is_looked_at_again_soon(known: Pending | None, believed: Pending):
    before = tried(State.WARM, pending=known, suspected=None)

    assert changed(before, says_that_it_loads(before, 50.0, "not yet")) == {
        "state": State.LOADING,
        "since": 50.0,
        "reason": "the server says that it is loading: not yet",
        "pending": believed,
        "suspected": Cause.RESTART,
        "busy": False,
        "ping_at": 52.0,
    }


def test_what_says_that_it_loads_keeps_what_it_is_suspected_of_and_says_nothing_of_our_own_load():
    crashed, ours = tried(State.WARM, suspected=Cause.CRASH), tried(State.LOADING, load_started=30.0)

    assert says_that_it_loads(crashed, 50.0, "not yet").suspected is Cause.CRASH
    assert says_that_it_loads(ours, 50.0, "not yet") is ours


# --- it answered ----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [State.UNKNOWN, State.LOADING, State.BACKOFF])
def test_an_answer_makes_it_warm_and_ends_what_held_it_off(state: State):
    model = proved(tried(state), 50.0)

    assert changed(tried(state), model) == {
        "state": State.WARM,
        "since": 50.0,
        "reason": None,
        "pending": None,
        "seen_at": 50.0,
        "used_at": 50.0,
        "suspected": None,
        "warm_since": 50.0,
        "retry_at": None,
        "ping_at": 350.0,
        "crashed": False,
        "busy": False,
    }


def test_a_model_that_has_been_warm_for_five_minutes_is_forgiven_its_failures():
    known = tried(State.WARM, taken=1)
    early, later = proved(known, 302.9), proved(known, 303.0)

    assert (early.failures, early.taken, early.warm_since, early.since) == (2, 1, 3.0, 20.0)
    assert (later.failures, later.taken, later.warm_since, later.since) == (0, 0, 3.0, 20.0)


@pytest.mark.parametrize(
    ("auto", "asked_for", "still"),
    [(True, True, None), (True, False, False), (False, True, True), (False, False, False)],
)
def test_a_wish_by_hand_is_met_by_an_answer_of_what_is_loaded_on_demand(
    auto: bool, asked_for: bool, still: bool | None
):
    before = tried(State.LOADING, asked_for=asked_for, policy=replace(POLICY, auto=auto))

    assert proved(before, 50.0).asked_for is still


def test_an_answer_of_what_refuses_pings_says_what_to_do_about_it():
    assert proved(tried(State.LOADING, refused="no image"), 50.0).reason == (
        'its ping is refused: no image; set ping in [[models]] "gemma": one that it takes, or "off"'
    )


def test_time_in_which_it_was_not_warm_counts_for_nothing():
    model = proved(tried(State.BACKOFF), 1000.0)

    assert (model.failures, model.warm_since) == (2, 1000.0)


def test_an_answer_of_what_is_no_longer_listed_proves_nothing():
    assert proved(cold(), 50.0) == cold()
    assert proved(cold(blind=True), 50.0) == cold()


def test_where_nothing_is_listed_an_answer_is_all_the_proof_there_is():
    assert proved(a_model(blind=True), 50.0).state is State.WARM


def test_a_ping_that_failed_in_between_begins_the_five_minutes_anew():
    model = after(
        ours(failures=2),
        PingStarted(20, GEMMA),
        PingEnded(21, GEMMA, PingOutcome.ERROR, why=Reason.OTHER),
        PingStarted(300, GEMMA),
        PingEnded(330, GEMMA, PingOutcome.OK),
        PingStarted(400, GEMMA),
        PingEnded(430, GEMMA, PingOutcome.OK),
    )

    assert (model.warm_since, model.failures) == (330, 3)


# --- its load failed ------------------------------------------------------------------------------


def test_a_failed_load_is_one_failure_more_and_says_when_it_is_tried_again():
    model = failed(tried(State.LOADING), 50.0, "no memory")

    assert changed(tried(State.LOADING), model) == {
        "state": State.BACKOFF,
        "since": 50.0,
        "reason": "no memory",
        "failures": 3,
        "failure": "no memory",
        "retry_at": 70.0,
        "warm_since": None,
    }


@pytest.mark.parametrize("key", ["Acme/Gemma@q4", "acme/gemma"])
def test_what_it_crashed_beside_are_all_others_and_no_variant_of_its_own(key: str):
    beside = frozenset({"acme/gemma", "acme/gemma@q4", "qwen"} if "@" in key else {"acme/gemma", "qwen"})
    crowded = a_model(ModelId("local", key), beside=beside)
    alone = replace(crowded, beside=beside - {"qwen"})

    assert changed(crowded, crashes_beside(crowded, 50.0)) == {"crowd": (frozenset({"qwen"}), 50.0)}
    assert crashes_beside(alone, 50.0) == alone


# --- it is believed ---------------------------------------------------------------------------------


def test_what_is_believed_again_is_as_good_as_seen_and_is_not_to_be_pinged():
    before = tried(State.WARM, blind=True, seen_at=20.0)

    assert changed(before, believed(before, 50.0)) == {"seen_at": 50.0, "ping_at": None}


# --- it is not there ------------------------------------------------------------------------------


def test_what_is_not_there_is_cold_and_has_nothing_to_be_pinged():
    before = tried(State.WARM, retry_at=None, ahead=True, draining=True)
    model = absent(before, 50.0, "it is gone")

    assert changed(before, model) == {
        "ahead": False,
        "draining": False,
        "state": State.COLD,
        "since": 50.0,
        "reason": "it is gone",
        "instances": (),
        "ours": frozenset(),
        "busy": False,
        "crashed": False,
        "ping_at": None,
    }


def test_what_is_not_there_is_held_off_until_its_time_and_says_what_went_wrong():
    early, then = absent(tried(State.WARM), 89.9, "it is gone"), absent(tried(State.WARM), 90.0, "it is gone")

    assert (early.state, early.reason) == (State.BACKOFF, "it went wrong before")
    assert (then.state, then.reason) == (State.COLD, "it is gone")


def test_what_comes_after_it_by_the_same_name_is_none_of_what_we_had_there():
    one = frozenset({"gemma"})
    gone = absent(tried(State.WARM, lost=one, vouched=one), 50.0, None)

    assert (gone.ours, gone.lost, gone.vouched) == (frozenset(),) * 3


def test_a_key_that_is_not_listed_is_cold_whatever_it_waited_for():
    model = absent(tried(State.WARM, retry_at=inf, listed=False, nearest=("gemma2", "jemma")), 50.0, "gone")
    alone = absent(tried(State.WARM, listed=False), 50.0, "gone")

    assert model.state is State.COLD
    assert model.reason == "LM Studio does not list this key; listed are gemma2, jemma"
    assert alone.reason == "LM Studio does not list this key"
