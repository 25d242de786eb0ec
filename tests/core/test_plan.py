"""What is done, when, and what is left alone."""

from dataclasses import replace

import pytest

from keepalive.core.actions import Load, Refresh, SendPing, SkipPing, Unload
from keepalive.core.errors import Reason
from keepalive.core.explain import explain
from keepalive.core.facts import (
    ListingStarted,
    LoadOutcome,
    LoadStarted,
    ModelId,
    PingEnded,
    PingOutcome,
    PingStarted,
    ReleaseAsked,
    RequestEnded,
    RequestStarted,
    UnloadEnded,
    UnloadStarted,
    WaitStarted,
    WindowClosed,
    WindowOpened,
)
from keepalive.core.plan import plan
from keepalive.core.records import Upstream
from keepalive.core.states import State
from keepalive.core.upstreams import apply_upstream
from tests.kit.models import (
    GEMMA,
    OLD,
    QWEN,
    Box,
    a_model,
    after,
    box,
    entry,
    every_model,
    listed,
    load_ended,
    loaded_on_demand,
    nothing,
    old,
    ours,
    unanswered,
    warm,
)


def test_whoever_waits_gets_a_model_at_once_however_often_it_was_taken():
    taken = after(warm(failures=6), listed(200, entry("gemma")))
    upstream = apply_upstream(Upstream("local"), listed(201))

    assert (taken.state, taken.retry_at) == (State.BACKOFF, 360)
    assert plan(upstream, [taken], 201) == []
    assert plan(upstream, [after(taken, WaitStarted(201, GEMMA))], 201) == [Load(GEMMA)]


def test_whoever_waits_does_not_make_a_model_load_that_crashes_or_fails():
    crash = PingEnded(191, GEMMA, PingOutcome.ERROR, message="crashed", why=Reason.CRASHED)
    crashed = after(warm(failures=6), PingStarted(190, GEMMA), crash, listed(200, entry("gemma")))
    taken = after(warm(failures=6), listed(200, entry("gemma")), WaitStarted(201, GEMMA))
    failing = after(taken, LoadStarted(201, GEMMA), load_ended(210, LoadOutcome.FAILED))
    upstream = apply_upstream(Upstream("local"), listed(211))

    assert plan(upstream, [after(crashed, WaitStarted(201, GEMMA))], 211) == []
    assert plan(upstream, [failing], 211) == []


def test_nothing_is_loaded_before_a_listing():
    assert box().plan(0.0) == [Refresh("local", loading=True)]


def test_a_cold_model_that_is_wanted_is_loaded_right_after_a_listing():
    assert box(listed(10, entry("gemma"))).plan(10.1) == [Load(GEMMA)]


def test_a_listing_older_than_a_second_leads_to_another_listing_and_not_to_a_load():
    state = box(listed(10, entry("gemma")))

    assert state.plan(11.5) == [Refresh("local", loading=True)]


def test_a_listing_that_was_not_asked_what_is_loading_leads_to_another_and_not_to_a_load():
    state = Box(warm()).see(replace(listed(20, entry("gemma")), loading=False))
    asked = state.plan(20.1)
    state.see(listed(20.2, entry("gemma", loading=True)))

    assert asked == [Refresh("local", loading=True)]
    assert state.plan(20.3) == []
    assert state[GEMMA].reason == "somebody else is loading it"


def test_a_listing_asked_before_the_last_load_ended_leads_to_no_other():
    state = box(
        listed(10, entry("gemma")),
        LoadStarted(10.1, GEMMA),
        load_ended(20, LoadOutcome.FAILED, message="no"),
        listed(26, entry("gemma"), asked=19.9),
    )

    assert state.plan(26.1) == [Refresh("local", loading=True)]


def test_a_load_is_not_tried_before_its_time():
    state = box(
        listed(1, entry("gemma")), LoadStarted(2, GEMMA), load_ended(10, LoadOutcome.FAILED, message="no")
    )
    state.see(listed(14.8, entry("gemma")))
    early = state.plan(14.9)
    state.see(listed(15.1, entry("gemma")))

    assert early == []
    assert state[GEMMA].state is State.COLD
    assert state.plan(15.2) == [Load(GEMMA)]


def test_models_are_loaded_one_after_the_other_in_the_order_of_the_config():
    first, second = a_model(QWEN, rank=0), a_model(rank=1)
    state = Box(second, first).see(listed(1, entry("gemma"), entry("qwen")))

    assert state.plan(1.1) == [Load(QWEN)]
    state.see(LoadStarted(1.2, QWEN), listed(2, entry("gemma"), entry("qwen")))
    assert state.plan(2.1) == []
    assert explain(state.upstream, list(state.models.values()), state[GEMMA]) == (
        "waits for its turn: qwen is loading"
    )


def test_max_loading_says_how_many_are_loaded_at_once():
    models = [a_model(ModelId("local", key), rank=n) for n, key in enumerate("abcd")]
    state = Box(*models, upstream=Upstream("local", max_loading=3)).see(listed(1, *map(entry, "abcd")))

    assert state.plan(1.1) == [Load(ModelId("local", key)) for key in "abc"]


def test_a_model_for_which_somebody_waits_is_loaded_first():
    state = Box(a_model(QWEN, rank=0), a_model(rank=1)).see(
        listed(1, entry("gemma"), entry("qwen")), WaitStarted(1.05, GEMMA)
    )

    assert state.plan(1.1) == [Load(GEMMA)]


def test_an_unanswered_load_is_looked_at_every_two_seconds_and_never_repeated_meanwhile():
    state = Box(unanswered()).see(listed(11, entry("gemma")))
    at, actions = 11.0, []
    while at < 900:
        at += 0.5
        planned = state.plan(at)
        actions += planned
        if planned:
            state.see(ListingStarted(at, "local"), listed(at + 0.01, entry("gemma"), asked=at))

    assert set(actions) == {Refresh("local", loading=True)}
    assert 350 <= len(actions) <= 450


def test_a_quiet_model_is_pinged_once_per_interval():
    state = Box(warm()).see(listed(302.5, entry("gemma", "gemma")))
    early = state.plan(302.6)
    state.see(listed(303.5, entry("gemma", "gemma")))

    assert early == []
    assert state.plan(303.6) == [SendPing(GEMMA, "gemma")]


def test_a_due_ping_first_looks_whether_the_model_is_there():
    state = Box(warm()).see(listed(290, entry("gemma", "gemma")))

    assert state.plan(304) == [Refresh("local")]


def test_a_ping_is_skipped_after_real_traffic_and_counts_from_it():
    state = Box(warm()).see(
        RequestStarted(200, GEMMA), RequestEnded(210, GEMMA, True), listed(303, entry("gemma", "gemma"))
    )
    first = state.plan(303.1)
    state.see(PingEnded(303.2, GEMMA, PingOutcome.SKIPPED))

    assert first == [SkipPing(GEMMA)]
    assert state[GEMMA].ping_at == 510
    assert state.plan(303.3) == []


def test_a_model_at_work_is_not_pinged():
    state = Box(warm()).see(RequestStarted(200, GEMMA), listed(303, entry("gemma", "gemma")))

    assert state.plan(303.1) == [SkipPing(GEMMA)]
    state.see(PingEnded(303.1, GEMMA, PingOutcome.SKIPPED))
    assert state[GEMMA].ping_at == 603.1


def test_one_answered_request_stands_in_for_one_ping_only():
    state = Box(warm()).see(RequestStarted(4, GEMMA), RequestEnded(5, GEMMA, True))
    state.see(listed(310, entry("gemma", "gemma")), PingEnded(310.1, GEMMA, PingOutcome.SKIPPED))

    assert state.plan(310.2) == [SendPing(GEMMA, "gemma")]


def test_a_crashed_instance_of_ours_that_stays_listed_is_unloaded_and_loaded_anew():
    state = Box(ours()).see(
        listed(20, entry("gemma", "gemma")),
        PingStarted(20.1, GEMMA),
        PingEnded(21, GEMMA, PingOutcome.ERROR, 1.0, "it has crashed", Reason.CRASHED),
        listed(26.1, entry("gemma", "gemma")),
    )
    unload = state.plan(26.2)
    state.see(
        UnloadStarted(26.3, GEMMA, "gemma"), UnloadEnded(26.4, GEMMA, "gemma"), listed(27, entry("gemma"))
    )

    assert unload == [Unload(GEMMA, "gemma")]
    assert state.plan(27.1) == [Load(GEMMA)]


def test_a_crashed_instance_of_somebody_else_is_only_pinged():
    state = Box(warm()).see(
        PingStarted(20.1, GEMMA),
        PingEnded(21, GEMMA, PingOutcome.ERROR, 1.0, "it has crashed", Reason.CRASHED),
        listed(27, entry("gemma", "gemma")),
    )

    assert state.plan(27.1) == [SendPing(GEMMA, "gemma")]


def test_only_a_few_pings_go_out_at_once():
    models = [a_model(ModelId("local", key), rank=n) for n, key in enumerate("abcdef")]
    state = Box(*models).see(listed(1, *(entry(k, k) for k in "abcdef")))

    assert state.plan(1.1) == [SendPing(ModelId("local", key), key) for key in "abcd"]


def test_outside_its_window_a_model_is_not_loaded():
    state = box(listed(1, entry("gemma")), WindowClosed(1.05, GEMMA))

    assert state.plan(1.1) == []
    assert explain(state.upstream, [state[GEMMA]], state[GEMMA]) == "outside its window"
    assert state.see(WindowOpened(1.2, GEMMA)).plan(1.3) == [Load(GEMMA)]


def test_when_its_window_closes_our_instance_is_unloaded_once_idle():
    state = Box(ours()).see(
        RequestStarted(20, GEMMA), WindowClosed(21, GEMMA), listed(30, entry("gemma", "gemma"))
    )
    in_use = state.plan(30.1)
    state.see(RequestEnded(40, GEMMA, True), listed(99, entry("gemma", "gemma")))
    lingering = state.plan(99.1)
    state.see(listed(100.5, entry("gemma", "gemma")))

    assert in_use == []
    assert lingering == []
    assert state.plan(100.6) == [Unload(GEMMA, "gemma")]


def test_when_its_window_closes_an_instance_that_we_found_is_left_alone():
    state = Box(warm()).see(WindowClosed(21, GEMMA), listed(400, entry("gemma", "gemma")))

    assert state.plan(400.1) == []


@pytest.mark.parametrize(
    "name", [n for n in every_model() if "retired" in n or n in ("released", "unloading")]
)
def test_a_model_that_nobody_wants_is_neither_loaded_nor_pinged(name: str):
    model = every_model()[name]
    for entries in ((), (entry("gemma"),), (entry("gemma", "gemma"),)):
        state = Box(model).see(listed(2000, *entries))

        assert not [a for a in state.plan(2000.1) if isinstance(a, (Load, SendPing, SkipPing))]


def test_on_an_old_server_one_model_is_loaded_at_a_time_and_is_warm_when_listed():
    state = old(nothing(1))

    assert state.plan(1.1) == [Load(GEMMA)]
    assert loaded_on_demand(state, GEMMA, 2, "gemma")[GEMMA].state is State.WARM


def test_what_the_config_says_about_auto_evict_is_believed():
    keeps_all = loaded_on_demand(old(nothing(1), auto_evict=False), GEMMA, 2, "gemma")
    keeps_one = loaded_on_demand(old(nothing(1), auto_evict=True), GEMMA, 2, "gemma")

    assert keeps_all.plan(8.1) == [Load(QWEN)]
    assert keeps_one.plan(8.1) == []


def test_an_instance_that_we_did_not_load_is_never_displaced():
    rows = entry("gemma", loading=False), entry("qwen", loading=False), entry("llama", "llama")
    state = old(listed(1, *rows, tier=OLD))

    assert state.plan(1.1) == []
    assert explain(state.upstream, list(state.models.values()), state[GEMMA]) == (
        "loading it on LM Studio 0.3.x could push out llama, which we did not load"
    )
    assert old(listed(1, *rows, tier=OLD), auto_evict=False).plan(1.1) == [Load(GEMMA), Load(QWEN)]


def test_what_somebody_else_is_loading_is_not_displaced_either():
    rows = entry("gemma", loading=False), entry("qwen", loading=False), entry("llama", loading=True)

    assert old(listed(1, *rows, tier=OLD)).plan(1.1) == []


def test_an_old_server_is_given_no_second_load_while_one_is_under_way():
    state = old(nothing(1)).see(LoadStarted(1.1, GEMMA))
    state.see(listed(2, entry("gemma", loading=True), entry("qwen", loading=False), tier=OLD))

    assert state.plan(2.1) == []


def test_an_old_server_is_never_asked_to_unload():
    state = loaded_on_demand(old(nothing(1)), GEMMA, 2, "gemma").see(
        ReleaseAsked(20, GEMMA), listed(99, entry("gemma", "gemma"), entry("qwen", loading=False), tier=OLD)
    )

    assert not [a for a in state.plan(99.1) if isinstance(a, Unload)]
