"""What happened, folded into the record of a model: every state meets every fact."""

import pytest

from keepalive.core.actions import Load, Refresh
from keepalive.core.apply import apply
from keepalive.core.errors import Reason
from keepalive.core.explain import explain
from keepalive.core.facts import (
    Fact,
    InstanceLost,
    LoadOutcome,
    LoadStarted,
    ReleaseAsked,
    WaitEnded,
    WaitStarted,
    WarmAsked,
    WindowClosed,
    WindowOpened,
)
from keepalive.core.plan import plan
from keepalive.core.records import Upstream
from keepalive.core.states import IllegalMove, State
from keepalive.core.upstreams import apply_upstream
from tests.kit.models import (
    GEMMA,
    OUR_MOVES,
    Box,
    box,
    entry,
    every_fact,
    every_model,
    listed,
    load_ended,
    ours,
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
        assert explain(Upstream("local"), [result], result, 1001.0) or result.state is not State.BACKOFF


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
    assert explain(state.upstream, [state[GEMMA]], state[GEMMA], 3.1) == "released by hand"
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
