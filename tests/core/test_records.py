"""What is known, and what can be read off it."""

from dataclasses import replace
from math import inf

import pytest

from keepalive.core.facts import NO_SIGHT, Instance, ModelId
from keepalive.core.records import (
    Cause,
    Model,
    Pending,
    Policy,
    Primed,
    Priming,
    Snapshot,
    Upstream,
    UpstreamState,
    is_loading,
)
from keepalive.core.states import State
from tests.kit.models import GEMMA, POLICY, QWEN, a_model

PENDING = Pending(since=4.0, until=9.0, alive_at=5.0)


# --- what is wanted -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window_open", "asked_for", "wanted"),
    [
        (True, None, True),
        (False, None, False),
        (False, True, True),
        (True, False, False),
    ],
)
def test_a_word_by_hand_counts_more_than_the_window(window_open: bool, asked_for: bool | None, wanted: bool):
    model = a_model(window_open=window_open, asked_for=asked_for)

    assert (model.wanted, model.needed) == (wanted, wanted)


def test_users_need_what_nobody_else_wants():
    assert a_model(window_open=False, waiting=1).needed
    assert a_model(window_open=False, in_flight=1).needed
    assert not a_model(window_open=False, waiting=1).wanted


def test_what_the_config_no_longer_names_is_neither_wanted_nor_needed():
    model = a_model(retired=True, asked_for=True, waiting=1, in_flight=1)

    assert not model.wanted
    assert not model.needed


AUTO = Policy(auto=True)


@pytest.mark.parametrize(
    ("changes", "wanted", "held"),
    [
        ({}, False, True),
        ({"asked_for": True}, True, True),
        ({"asked_for": False}, False, False),
        ({"asked_for": False, "waiting": 1}, False, True),
        ({"window_open": False}, False, False),
        ({"window_open": False, "in_flight": 1}, False, True),
        ({"retired": True}, False, False),
        ({"retired": True, "asked_for": True, "waiting": 1}, False, False),
        ({"policy": POLICY}, True, True),
        ({"policy": POLICY, "asked_for": False}, False, False),
        ({"policy": POLICY, "asked_for": False, "in_flight": 1}, False, True),
    ],
)
def test_what_is_loaded_on_demand_is_wanted_only_by_hand_and_may_stay_until_somebody_says_otherwise(
    changes: dict[str, object], wanted: bool, held: bool
):
    model = a_model(**{"policy": AUTO, **changes})

    assert (model.wanted, model.held) == (wanted, held)


def test_an_instance_is_in_memory_and_where_none_can_be_seen_what_has_answered_is():
    assert a_model(instances=(Instance("a"),)).present
    assert a_model(blind=True, state=State.WARM).present
    assert not a_model(blind=True, state=State.COLD).present
    assert not a_model(state=State.WARM).present


def test_it_works_for_somebody_where_lm_studio_says_so_or_has_requests_for_it():
    assert a_model(instances=(Instance("a"), Instance("a:2", busy=True))).engaged
    assert a_model(instances=(Instance("a"), Instance("a:2", queued=1))).engaged
    assert not a_model(instances=(Instance("a", busy=False, queued=0),)).engaged


@pytest.mark.parametrize(
    ("changes", "in_use", "goes_at"),
    [
        ({}, False, 160.0),
        ({"instances": (Instance("a"),)}, False, None),
        ({"instances": (Instance("a", ttl=inf),)}, False, None),
        ({"instances": (Instance("a", ttl=60.0, busy=True),)}, False, None),
        ({"in_flight": 1}, True, None),
        ({"used_elsewhere": True}, True, None),
    ],
    ids=["idle", "untold", "for ever", "a stranger", "ours", "elsewhere"],
)
def test_it_goes_when_its_timer_strikes_and_not_while_anybody_uses_it(
    changes: dict[str, object], in_use: bool, goes_at: float | None
):
    model = a_model(**{"instances": (Instance("a", ttl=60.0),), "used_at": 100.0, **changes})

    assert (model.in_use, model.goes_at) == (in_use, goes_at)


def test_callers_elsewhere_need_it_as_ours_do():
    asked = a_model(window_open=False, callers_elsewhere=2)

    assert (asked.needed, asked.wanted, replace(asked, waiting=1).callers) == (True, False, 3)
    assert not replace(asked, retired=True).needed
    assert a_model(use_at=50.0, elsewhere_at=60.0).last_use == 60.0
    assert a_model(use_at=50.0, elsewhere_at=40.0).last_use == 50.0


def test_what_is_not_to_be_pinged_is_not_because_of_its_timer():
    timed = {"instances": (Instance("a", ttl=60.0),), "state": State.WARM, "used_at": 100.0}

    assert a_model(**timed).ping_due_at is None
    assert a_model(**timed, ping_at=900.0).ping_due_at == 130.0
    assert a_model(**{**timed, "state": State.LOADING}, ping_at=900.0).ping_due_at == 900.0


def test_only_what_is_warm_and_not_about_to_go_is_given_to_anybody():
    assert a_model(state=State.WARM).given
    assert not a_model(state=State.LOADING).given
    assert not a_model(state=State.WARM, draining=True).given
    assert not a_model(state=State.WARM, unloading=True).given


def test_it_is_unused_since_its_last_caller_or_since_it_came():
    assert a_model(use_at=50.0, there_since=40.0).unused_since == 50.0
    assert a_model(use_at=30.0, there_since=40.0).unused_since == 40.0


def test_it_has_its_place_in_the_line_since_its_first_caller_came_or_since_it_is_as_it_is():
    assert a_model(since=20.0).in_line_since == 20.0
    assert a_model(since=20.0, waiting_since=10.0).in_line_since == 10.0
    assert a_model(since=20.0, waiting_since=0.0).in_line_since == 0.0


# --- what others know ------------------------------------------------------------------------------


def test_whoever_acts_does_not_know_what_a_look_shows_that_is_newer_than_its_last_word():
    both, told = frozenset({"gemma", "gemma:2"}), frozenset({"gemma"})
    model = a_model(asked=20.0, ours=both)

    assert model.unknown_there == both  # it has never said a word
    assert replace(model, told=told, told_at=19.9).unknown_there == {"gemma:2"}
    assert replace(model, told=told, told_at=20.0).unknown_there == frozenset()


# --- what we are doing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size_bytes", "load_timeout", "seconds"),
    [
        (None, 900.0, 240.0),
        (2_000_000_000, 900.0, 120.0),
        (4_000_000_000, 900.0, 160.0),
        (7_000_000_000, 900.0, 240.0),
        (4_000_000_000, 90.0, 90.0),
    ],
)
def test_a_load_that_nobody_has_seen_succeed_is_given_twice_what_a_slow_disk_takes_within_bounds(
    size_bytes: int | None, load_timeout: float, seconds: float
):
    model = a_model(size_bytes=size_bytes, policy=replace(POLICY, load_timeout=load_timeout))

    assert model.longest_load(None) == seconds + 45
    assert model.longest_load(30.0) == 2 * 30 + 45


def test_a_call_is_under_way_while_we_load_ping_or_unload():
    assert not a_model(pending=PENDING).calling
    assert a_model(load_started=0.0).calling
    assert a_model(pinging=True).calling
    assert a_model(unloading=True).calling
    assert a_model(priming=Priming(under_way="agent")).calling
    assert not a_model().calling


def test_it_is_loading_by_us_while_we_load_it_or_did_not_see_the_end():
    assert is_loading(a_model(load_started=0.0))
    assert is_loading(a_model(pending=PENDING))
    assert not is_loading(a_model(pending=replace(PENDING, ours=False)))
    assert not is_loading(a_model())


def test_the_next_opening_is_the_first_that_was_neither_read_nor_unfit():
    priming = Priming(
        openings=("a", "b"), learned=("c", "d"), done=(Primed("a", 1.0, 1.0),), unfit=(("c", "too long"),)
    )

    assert priming.wished == ("a", "b", "c", "d")
    assert priming.next == "b"
    assert replace(priming, openings=("a",)).next == "d"
    assert replace(priming, openings=("a",), learned=("c",)).next is None
    assert Priming().next is None


def test_it_loads_since_we_began_or_since_the_load_whose_end_we_did_not_see():
    done = Pending(since=4.0, until=9.0, alive_at=5.0, loaded=True)

    assert a_model().loading_since is None
    assert a_model(load_started=0.0, pending=PENDING).loading_since == 0.0
    assert a_model(pending=PENDING).loading_since == 4.0
    assert a_model(pending=done).loading_since is None


def test_a_load_is_expected_to_take_what_the_middle_one_of_the_last_took():
    assert a_model().expected_load is None
    assert a_model(recent_loads=(9.0, 1.0, 3.0)).expected_load == 3.0


# --- what has become of it ------------------------------------------------------------------------


def test_the_instance_that_is_addressed_is_ours_or_else_the_oldest():
    copies = (Instance("a"), Instance("b"), Instance("c"))

    assert a_model().instance_id is None
    assert a_model(instances=copies).instance_id == "a"
    assert a_model(instances=copies, ours=frozenset({"b", "c"})).instance_id == "b"
    assert a_model(instances=copies, ours=frozenset({"z"})).instance_id == "a"


def test_a_proof_is_good_for_a_refresh_and_a_ping():
    assert (
        a_model(seen_at=100.0, policy=Policy(refresh_interval=15.0, ping_interval=300.0)).proof_expires == 415
    )


# --- what is known at first -----------------------------------------------------------------------


def test_of_a_new_model_nothing_is_known_and_it_is_wanted():
    assert Model(GEMMA) == Model(
        id=GEMMA,
        rank=0,
        policy=Policy(
            refresh_interval=15.0,
            ping_interval=300.0,
            ping_timeout=60.0,
            load_timeout=900.0,
            lease=86400.0,
            pinged=True,
            auto=False,
            idle=None,
            patience=120.0,
            memory=None,
        ),
        state=State.UNKNOWN,
        since=0.0,
        reason="LM Studio has not been asked yet",
        windowed=False,
        window_open=True,
        asked_for=None,
        retired=False,
        asked=-inf,
        seen_at=-inf,
        listed=True,
        nearest=(),
        blind=False,
        kind="llm",
        size_bytes=None,
        need=None,
        instances=(),
        ours=frozenset(),
        recalled=None,
        beside=frozenset(),
        used_at=-inf,
        there_since=-inf,
        survived=0.0,
        idle_since=None,
        seen_by=NO_SIGHT,
        suspected=None,
        claim=None,
        ahead=False,
        draining=False,
        letting_go=None,
        load_started=None,
        giving_up=False,
        progress=None,
        progress_at=-inf,
        pending=None,
        pinging=False,
        unloading=False,
        priming=Priming(),
        touched_at=-inf,
        tells_loading=False,
        callers_elsewhere=0,
        used_elsewhere=False,
        elsewhere_at=-inf,
        told=frozenset(),
        proved_elsewhere=False,
        alone=False,
        ill=None,
        refused_claim=None,
        granted_claim=None,
        crowd=None,
        warm_since=None,
        failures=0,
        taken=0,
        contested=False,
        made_way=0,
        failure=None,
        retry_at=None,
        ping_at=None,
        last_ping=None,
        pinged_at=-inf,
        crashed=False,
        refused=None,
        busy=False,
        doubled_at=None,
        loads=0,
        evictions=0,
        last_eviction=None,
        recent_loads=(),
        waiting=0,
        in_flight=0,
        active_at=-inf,
        vouched_at=-inf,
        waiting_since=None,
        use_at=-inf,
        asks=0.0,
        asks_at=-inf,
    )


def test_of_what_was_not_said_of_an_opening_nothing_is_known():
    assert Priming() == Priming(
        openings=(),
        learned=(),
        under_way=None,
        done=(),
        unfit=(),
        failed=frozenset(),
        longest=(),
        answers=(),
        useless=None,
        again_at=-inf,
    )
    assert Primed("agent", 1.0, 2.0) == Primed("agent", 1.0, 2.0, tokens=None, ours=True)


def test_of_a_new_upstream_nothing_is_known_and_it_is_due_to_be_asked():
    assert Upstream("local") == Upstream(
        name="local",
        refresh_interval=15.0,
        max_loading=1,
        auto_evict=None,
        memory=None,
        state=UpstreamState.UNKNOWN,
        since=0.0,
        tier=None,
        error=None,
        failures=0,
        listing=False,
        tried_at=-inf,
        asked=-inf,
        answered_at=-inf,
        due_at=-inf,
        resident=frozenset(),
        arriving=frozenset(),
        occupants=(),
        places=None,
        sees_loading=False,
        sight=NO_SIGHT,
        acts=True,
        evicts=None,
        on_trial=frozenset(),
        trial_over_at=None,
    )


def test_a_load_whose_end_nobody_saw_is_taken_for_ours_and_for_unseen():
    assert Pending(since=4.0, until=9.0, alive_at=5.0) == Pending(
        since=4.0,
        until=9.0,
        alive_at=5.0,
        expected=None,
        why=None,
        loaded=False,
        proved=False,
        seen=False,
        ours=True,
    )


def test_what_the_config_says_of_eviction_counts_more_than_what_was_seen():
    assert Upstream("local", evicts=True).displaces is True
    assert Upstream("local", evicts=False, auto_evict=True).displaces is True
    assert Upstream("local", evicts=True, auto_evict=False).displaces is False
    assert Upstream("local").displaces is None


def test_causes_and_states_go_by_the_names_that_metrics_logs_and_records_of_the_past_know():
    assert list(Cause) == ["timer", "displaced", "crash", "restart", "by_hand", "unknown"]
    assert list(UpstreamState) == ["unknown", "up", "down", "unauthorized"]


# --- everything at once ---------------------------------------------------------------------------


def test_a_snapshot_tells_the_models_of_each_upstream():
    there, elsewhere = a_model(), a_model(ModelId("other", "gemma"))
    snapshot = Snapshot(1.0, (Upstream("local"), Upstream("other")), (there, elsewhere, a_model(QWEN)))

    assert snapshot.of("local") == (there, a_model(QWEN))
    assert snapshot.of("other") == (elsewhere,)
