"""What is known of an upstream: how it answers, and whether a load on demand displaces."""

from dataclasses import replace

from keepalive.core.actions import Load, Refresh
from keepalive.core.explain import explain
from keepalive.core.facts import ClockJumped, LoadStarted, Trouble
from keepalive.core.records import Upstream, UpstreamState
from keepalive.core.states import State
from keepalive.core.upstreams import apply_upstream
from tests.kit.models import (
    GEMMA,
    OLD,
    QWEN,
    Box,
    entry,
    failed,
    listed,
    loaded_on_demand,
    nothing,
    old,
    refused,
    warm,
)


def test_an_upstream_believes_no_listing_older_than_the_one_it_knows():
    upstream = apply_upstream(Upstream("local"), listed(20, entry("gemma", "gemma"), asked=19))
    late = apply_upstream(replace(upstream, listing=True), listed(30, entry("gemma"), asked=18))

    assert late == upstream


def test_a_dead_upstream_is_asked_ever_more_slowly_up_to_a_minute():
    upstream, at, waits = Upstream("local"), 1.0, []
    for _ in range(5):
        upstream = apply_upstream(upstream, refused(at))
        waits.append(upstream.due_at - at)
        at = upstream.due_at

    assert waits == [15, 30, 60, 60, 60]
    assert upstream.state is UpstreamState.DOWN


def test_a_wrong_token_is_not_tried_again_soon():
    upstream = apply_upstream(Upstream("local"), failed(10, Trouble.UNAUTHORIZED, "wants a token"))

    assert (upstream.state, upstream.due_at, upstream.error) == (
        UpstreamState.UNAUTHORIZED,
        310,
        "wants a token",
    )


def test_one_late_answer_is_no_outage_and_three_are():
    upstream = apply_upstream(Upstream("local"), listed(1, entry("gemma")))
    states = []
    for at in (20, 40, 60):
        upstream = apply_upstream(upstream, failed(at, Trouble.TIMEOUT))
        states.append(upstream.state)

    assert states == [UpstreamState.UP, UpstreamState.UP, UpstreamState.DOWN]


def test_a_clock_jump_makes_the_next_plan_look_first():
    state = Box(warm()).see(listed(20, entry("gemma", "gemma")), ClockJumped(20.5, "local", 86400.0))

    assert state.plan(20.6) == [Refresh("local")]


def test_a_second_model_is_tried_beside_the_first_and_both_stay_where_that_works():
    state = loaded_on_demand(old(nothing(1)), GEMMA, 2, "gemma")
    second = state.plan(8.1)
    loaded_on_demand(state, QWEN, 9, "gemma", "qwen")

    assert second == [Load(QWEN)]
    assert state.upstream.displaces is False
    assert (state[GEMMA].state, state[QWEN].state) == (State.WARM, State.WARM)


def test_mutual_eviction_is_recognised_and_the_first_listed_model_wins():
    state = loaded_on_demand(old(nothing(1)), GEMMA, 2, "gemma")
    loaded_on_demand(state, QWEN, 9, "qwen")
    again = state.plan(15.1)
    loaded_on_demand(state, GEMMA, 16, "gemma")

    assert state.upstream.displaces is True
    assert again == [Load(GEMMA)]
    assert state.plan(22.1) == []
    assert explain(state.upstream, list(state.models.values()), state[QWEN], 22.1) == (
        "LM Studio 0.3.x keeps one model at a time here, and gemma comes first in the config"
    )


def test_a_listing_during_the_load_is_no_verdict_on_who_survives_it():
    state = loaded_on_demand(old(nothing(1)), GEMMA, 2, "gemma")
    rows = entry("gemma", "gemma"), entry("qwen", loading=True)
    state.see(LoadStarted(9, QWEN), listed(12, *rows, tier=OLD))

    assert state.upstream.displaces is None


def test_what_was_only_being_loaded_is_no_witness_of_what_survives():
    state = old(
        listed(1, entry("gemma", loading=True), entry("qwen", loading=False), tier=OLD), auto_evict=None
    )
    loaded_on_demand(state, QWEN, 2, "gemma", "qwen")

    assert state.upstream.displaces is None


def test_a_server_that_starts_to_evict_is_recognised_although_it_did_not_before():
    state = loaded_on_demand(old(nothing(1)), GEMMA, 2, "gemma")
    loaded_on_demand(state, QWEN, 9, "gemma", "qwen")
    state.see(listed(400, entry("gemma", "gemma"), entry("qwen", loading=False), tier=OLD))
    loaded_on_demand(state, QWEN, 401, "qwen")

    assert state.upstream.displaces is True
