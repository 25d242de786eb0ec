"""What is known, and what can be read off it."""

from math import inf

import pytest

from keepalive.core.facts import Instance, ModelId
from keepalive.core.records import (
    Cause,
    Eviction,
    Model,
    Pending,
    Policy,
    Snapshot,
    Upstream,
    UpstreamState,
)
from keepalive.core.states import State
from tests.kit.models import GEMMA, QWEN, a_model

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


# --- what we are doing ----------------------------------------------------------------------------


def test_a_call_is_under_way_while_we_load_ping_or_unload():
    assert not a_model(pending=PENDING).calling
    assert a_model(load_started=0.0).calling
    assert a_model(pinging=True).calling
    assert a_model(unloading=True).calling


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


def test_what_was_taken_is_contested_until_a_call_of_ours_has_ended():
    taken = Eviction(at=50.0, cause=Cause.DISPLACED, idle_seconds=0.0)
    crashed = Eviction(at=50.0, cause=Cause.CRASH, idle_seconds=0.0)

    assert a_model(last_eviction=taken, touched_at=50.0).contested
    assert not a_model(last_eviction=taken, touched_at=50.1).contested
    assert not a_model(last_eviction=crashed, touched_at=40.0).contested
    assert not a_model().contested


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
            refresh_interval=15.0, ping_interval=300.0, ping_timeout=60.0, load_timeout=900.0, lease=86400.0
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
        instances=(),
        ours=frozenset(),
        beside=frozenset(),
        used_at=-inf,
        survived=0.0,
        suspected=None,
        load_started=None,
        pending=None,
        pinging=False,
        unloading=False,
        touched_at=-inf,
        tells_loading=False,
        warm_since=None,
        failures=0,
        failure=None,
        retry_at=None,
        ping_at=None,
        last_ping=None,
        pinged_at=-inf,
        crashed=False,
        busy=False,
        loads=0,
        evictions=0,
        last_eviction=None,
        recent_loads=(),
        waiting=0,
        in_flight=0,
        active_at=-inf,
        vouched_at=-inf,
    )


def test_of_a_new_upstream_nothing_is_known_and_it_is_due_to_be_asked():
    assert Upstream("local") == Upstream(
        name="local",
        refresh_interval=15.0,
        max_loading=1,
        auto_evict=None,
        state=UpstreamState.UNKNOWN,
        since=0.0,
        tier=None,
        error=None,
        failures=0,
        listing=False,
        asked=-inf,
        answered_at=-inf,
        due_at=-inf,
        resident=frozenset(),
        arriving=frozenset(),
        sees_loading=False,
        evicts=None,
        on_trial=frozenset(),
        trial_over_at=None,
    )


def test_a_load_whose_end_nobody_saw_is_taken_for_ours_and_for_unseen():
    assert Pending(since=4.0, until=9.0, alive_at=5.0) == Pending(
        since=4.0, until=9.0, alive_at=5.0, loaded=False, proved=False, seen=False, ours=True
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
