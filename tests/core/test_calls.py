"""What came of our loads, pings and unloads, and of those whose end nobody saw."""

import pytest

from keepalive.core.actions import Load, Refresh, SendPing, Unload
from keepalive.core.apply import apply
from keepalive.core.errors import Reason
from keepalive.core.explain import eta
from keepalive.core.facts import (
    LoadOutcome,
    LoadRemembered,
    LoadStarted,
    PingEnded,
    PingOutcome,
    PingStarted,
    ReleaseAsked,
    UnloadEnded,
    UnloadStarted,
)
from keepalive.core.states import IllegalMove, State
from tests.kit.models import (
    GEMMA,
    Box,
    a_model,
    after,
    box,
    cold,
    entry,
    found,
    listed,
    load_ended,
    ours,
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

    assert (model.state, model.reason) == (State.LOADING, "it was cut; it may still be loading")
    assert model.pending is not None
    assert model.pending.until == 2 + 900 + 45


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


def test_a_ping_that_wants_a_token_waits_five_minutes():
    model = after(
        warm(), PingStarted(303, GEMMA), PingEnded(304, GEMMA, PingOutcome.ERROR, why=Reason.UNAUTHORIZED)
    )

    assert (model.state, model.retry_at) == (State.BACKOFF, 604)


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
    assert state.plan(86.6) == [Unload(GEMMA, "gemma")]
