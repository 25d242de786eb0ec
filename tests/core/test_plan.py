"""What is done, when, and what is left alone."""

from dataclasses import replace

import pytest

from keepalive.core.actions import Action, Load, Refresh, SendPing, SkipPing, Unload
from keepalive.core.errors import Reason
from keepalive.core.explain import explain
from keepalive.core.facts import (
    Entry,
    Instance,
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
    Sight,
    Tier,
    UnloadCause,
    UnloadEnded,
    UnloadStarted,
    WaitStarted,
    WindowClosed,
    WindowOpened,
)
from keepalive.core.plan import blocked_by, plan
from keepalive.core.records import Model, Pending, Ping, Upstream, UpstreamState
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
    assert explain(state.upstream, list(state.models.values()), state[GEMMA], 99.0) == (
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
    while at < 280:
        at += 0.5
        planned = state.plan(at)
        actions += planned
        if planned:
            state.see(ListingStarted(at, "local"), listed(at + 0.01, entry("gemma"), asked=at))

    assert set(actions) == {Refresh("local", loading=True)}
    assert 100 <= len(actions) <= 140


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


def test_a_crashed_instance_of_ours_that_still_answers_somebody_is_neither_unloaded_nor_pinged():
    crash = PingEnded(20, GEMMA, PingOutcome.ERROR, 0.1, "it has crashed", Reason.CRASHED)
    state = Box(ours(in_flight=1)).see(PingStarted(19, GEMMA), crash, listed(40, entry("gemma", "gemma")))

    assert state[GEMMA].ping_due_at < 40.1
    assert state.plan(40.1) == []


def test_a_model_that_works_for_a_stranger_is_not_pinged():
    works = Entry("gemma", instances=(Instance("gemma", busy=True, queued=1),))

    assert Box(warm()).see(listed(303, works)).plan(303.1) == [SkipPing(GEMMA)]


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
    assert explain(state.upstream, [state[GEMMA]], state[GEMMA], 99.0) == "outside its window"
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
    assert state.plan(100.6) == [Unload(GEMMA, "gemma", UnloadCause.WINDOW)]


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
    assert explain(state.upstream, list(state.models.values()), state[GEMMA], 99.0) == (
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


# --- each rule by itself, at its edges ------------------------------------------------------------

LLAMA = ModelId("local", "llama")
ONE, TWO = Instance("gemma"), Instance("gemma:2")
PENDING = Pending(since=1.0, until=999.0, alive_at=2.0)


def up(**changes: object) -> Upstream:
    """Listed at 50, and due again at 65."""
    listed_now: dict[str, object] = {
        "state": UpstreamState.UP,
        "tier": Tier.V1,
        "asked": 50.0,
        "answered_at": 50.0,
        "due_at": 65.0,
        "sees_loading": True,
    }
    return Upstream("local", **{**listed_now, **changes})  # type: ignore[arg-type]


def absent(identity: ModelId = GEMMA, **changes: object) -> Model:
    return a_model(identity, **{"state": State.COLD, "touched_at": 40.0, **changes})


def there(identity: ModelId = GEMMA, **changes: object) -> Model:
    """Warm, and to be pinged since 50."""
    known = {"state": State.WARM, "instances": (Instance(identity.key),), "ping_at": 50.0, "touched_at": 40.0}
    return a_model(identity, **{**known, **changes})


LOOK = Refresh("local", loading=True)


@pytest.mark.parametrize(
    ("upstream", "now", "planned"),
    [
        (up(), 50.0, Load(GEMMA)),
        (up(), 51.0, Load(GEMMA)),
        (up(), 51.1, LOOK),
        (up(state=UpstreamState.DOWN), 50.5, LOOK),
        (up(asked=40.0), 50.5, LOOK),
        (up(asked=40.1), 50.5, Load(GEMMA)),
        (up(sees_loading=False), 50.5, LOOK),
    ],
)
def test_a_load_rests_on_a_good_listing_of_the_last_second_asked_since_our_last_call(
    upstream: Upstream, now: float, planned: Action
):
    assert plan(upstream, [absent()], now) == [planned]


def test_a_ping_needs_no_listing_of_what_is_being_loaded():
    assert plan(up(sees_loading=False), [there()], 50.5) == [SendPing(GEMMA, "gemma")]


def test_nothing_is_asked_while_a_listing_is_under_way():
    assert plan(up(listing=True), [absent()], 70.0) == []
    assert plan(up(listing=True), [], 70.0) == []


def test_a_listing_is_due_when_its_time_has_come():
    assert plan(up(), [], 64.9) == []
    assert plan(up(), [], 65.0) == [Refresh("local")]


def test_a_server_in_trouble_is_asked_at_its_own_pace_whatever_is_wanted():
    assert plan(up(failures=1), [absent(), a_model(QWEN, pending=PENDING)], 64.9) == []
    assert plan(up(failures=1), [absent()], 65.0) == [LOOK]


def test_while_somebody_waits_a_server_in_trouble_is_asked_every_two_seconds():
    away = up(state=UpstreamState.DOWN, failures=9, tried_at=55.0)
    waited_for = absent(waiting=1)

    assert plan(away, [waited_for], 56.9) == []
    assert plan(away, [a_model(QWEN), waited_for], 57.0) == [LOOK]
    assert plan(replace(away, state=UpstreamState.UNAUTHORIZED), [waited_for], 57.0) == []


@pytest.mark.parametrize(
    ("models", "now", "planned"),
    [
        ([there(pending=PENDING, ping_at=99.0)], 51.9, []),
        ([there(pending=PENDING, ping_at=99.0), there(QWEN, ping_at=99.0)], 52.0, [LOOK]),
        ([there(ping_at=99.0)], 52.0, []),
        ([absent(load_started=3.0)], 52.0, []),
        ([absent(load_started=3.0, pending=PENDING)], 52.0, []),
    ],
)
def test_a_load_whose_end_nobody_saw_is_looked_for_every_two_seconds(
    models: list[Model], now: float, planned: list[Action]
):
    assert plan(up(), models, now) == planned


@pytest.mark.parametrize(
    ("model", "loading"),
    [
        (absent(), True),
        (absent(window_open=False), False),
        (there(), False),
        (there(pending=PENDING), True),
        (absent(window_open=False, load_started=3.0), True),
    ],
)
def test_it_is_asked_what_is_being_loaded_where_it_matters(model: Model, loading: bool):
    quiet = there(QWEN, ping_at=99.0)

    assert plan(up(), [quiet, model], 65.0)[-1] == Refresh("local", loading=loading)


# --- loads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "loaded"),
    [
        ({}, True),
        ({"state": State.BACKOFF}, True),
        ({"state": State.UNKNOWN}, False),
        ({"state": State.LOADING}, False),
        ({"window_open": False}, False),
        ({"listed": False}, False),
        ({"instances": (ONE,), "ping_at": 99.0}, False),
        ({"pinging": True}, False),
        ({"unloading": True}, False),
        ({"pending": replace(PENDING, ours=False)}, False),
        ({"retry_at": 50.5}, True),
        ({"retry_at": 50.6}, False),
        ({"retry_at": 99.0, "waiting": 1}, False),
    ],
)
def test_only_what_is_wanted_absent_and_held_off_by_nothing_is_loaded(
    changes: dict[str, object], loaded: bool
):
    assert (Load(GEMMA) in plan(up(), [absent(**changes)], 50.5)) is loaded


def test_only_who_waits_may_fight_for_what_was_taken():
    taken = absent(retry_at=99.0, contested=True)

    assert plan(up(), [taken], 50.5) == []
    assert plan(up(), [replace(taken, waiting=1)], 50.5) == [Load(GEMMA)]


@pytest.mark.parametrize(
    ("other", "loaded"),
    [
        (absent(QWEN, load_started=3.0), False),
        (absent(QWEN, pending=replace(PENDING, seen=True)), False),
        (absent(QWEN, pending=replace(PENDING, loaded=True)), False),
        (absent(QWEN, pending=replace(PENDING, expected=50.5 - PENDING.since + 0.1)), False),
        # Nothing shows that these are alive.
        (absent(QWEN, pending=replace(PENDING, expected=50.5 - PENDING.since)), True),
        (absent(QWEN, pending=PENDING), True),
        (absent(QWEN, pending=replace(PENDING, ours=False, seen=True)), True),
        (absent(QWEN, pending=replace(PENDING, ours=False)), True),
        (there(QWEN, ping_at=99.0), True),
    ],
)
def test_each_load_of_ours_takes_a_place_and_no_other_does(other: Model, loaded: bool):
    assert (Load(GEMMA) in plan(up(), [absent(), other], 50.5)) is loaded


@pytest.mark.parametrize(
    ("changes", "asked", "now", "looked_at"),
    [
        ({}, 40.0, 42.0, True),
        ({}, 40.0, 41.9, False),
        ({}, 42.0, 42.1, False),
        ({"tells_loading": True}, 40.0, 42.0, False),
        ({"load_started": None}, 40.0, 42.0, False),
    ],
)
def test_a_load_of_ours_is_looked_at_soon_after_its_start_to_learn_whether_that_shows(
    changes: dict[str, object], asked: float, now: float, looked_at: bool
):
    model = absent(**{"load_started": 40.0, "state": State.LOADING, **changes}, window_open=False)
    upstream = replace(up(), asked=asked, answered_at=asked, due_at=99.0)

    assert (
        plan(upstream, [model], now) == [Refresh("local", loading=model.load_started is not None)][:looked_at]
    )


def test_more_loads_under_way_than_the_config_allows_leave_no_place():
    under_way = [absent(ModelId("local", key), load_started=3.0) for key in "abc"]

    assert plan(up(max_loading=2), [absent(rank=9), absent(QWEN, rank=1), *under_way], 50.5) == []


def test_who_is_waited_for_comes_first_and_then_the_order_of_the_config():
    third, first, second = absent(GEMMA, rank=2), absent(QWEN, rank=3, waiting=2), absent(LLAMA, rank=1)

    assert plan(up(max_loading=2), [third, first, second], 50.5) == [Load(QWEN), Load(LLAMA)]


def test_of_loads_on_demand_there_is_one_at_a_time_unless_they_are_known_to_bear_each_other():
    models = [absent(), absent(QWEN, rank=1)]
    loading = absent(LLAMA, rank=2, load_started=3.0)

    assert plan(up(tier=Tier.V0, max_loading=3), models, 50.5) == [Load(GEMMA)]
    assert plan(up(tier=Tier.V0, max_loading=3), [*models, loading], 50.5) == []
    assert plan(up(tier=Tier.V0, max_loading=3, evicts=False), models, 50.5) == [Load(GEMMA), Load(QWEN)]
    assert plan(up(tier=Tier.V0, max_loading=1, evicts=False), models, 50.5) == [Load(GEMMA)]


def test_no_ping_goes_where_a_load_on_demand_may_have_pushed_its_model_out():
    """It would load that model again, and push out the other: one of both at a time, until what happens is known."""
    proved_long_ago, needed = there(ours=frozenset({"gemma"})), absent(QWEN, rank=1)
    unknown, both = up(tier=Tier.V0), [proved_long_ago, needed]

    assert plan(unknown, both, 50.5) == [Load(QWEN)]
    assert plan(unknown, [proved_long_ago], 50.5) == [SendPing(GEMMA, "gemma")]
    assert plan(unknown, [proved_long_ago, replace(needed, load_started=50.4)], 50.5) == []
    assert plan(unknown, [replace(proved_long_ago, pinging=True), needed], 50.5) == []
    assert plan(up(tier=Tier.V0, evicts=False), both, 50.5) == [Load(QWEN), SendPing(GEMMA, "gemma")]


# --- what a load on demand could push out ---------------------------------------------------------

DISPLACING = "loading it on LM Studio 0.3.x could push out gemma, which we did not load"


def on_demand(*resident: str, **changes: object) -> Upstream:
    return up(tier=Tier.V0, resident=frozenset(resident), **changes)


@pytest.mark.parametrize(
    ("resident", "blocked"),
    [
        (there(ours=frozenset({"gemma"})), None),
        (there(), DISPLACING),
        (absent(load_started=3.0), None),
        (absent(pending=PENDING), None),
        (absent(pending=replace(PENDING, ours=False)), DISPLACING),
        (absent(), DISPLACING),
        (there(instances=(ONE, TWO), ours=frozenset({"gemma", "gemma:2"})), None),
        (there(instances=(ONE, TWO), ours=frozenset({"gemma"})), DISPLACING),
        (there(load_started=3.0), DISPLACING),
    ],
)
def test_only_what_is_ours_alone_may_be_pushed_out(resident: Model, blocked: str | None):
    model = absent(QWEN)

    assert blocked_by(on_demand("gemma"), [resident, model], model) == blocked


def test_what_stands_in_the_way_is_said_by_the_first_of_its_names_and_is_never_the_model_itself():
    model = absent(QWEN)

    assert blocked_by(on_demand("qwen"), [model], model) is None
    assert blocked_by(on_demand("phi", "llama", "qwen"), [model], model) == (
        "loading it on LM Studio 0.3.x could push out llama, which we did not load"
    )
    assert blocked_by(on_demand(arriving=frozenset({"llama"})), [model], model) == (
        "loading it on LM Studio 0.3.x could push out llama, which we did not load"
    )


def test_nothing_is_pushed_out_by_a_newer_server_or_by_one_that_is_known_to_keep_all():
    model = absent(QWEN)

    assert blocked_by(up(resident=frozenset({"gemma"})), [model], model) is None
    assert blocked_by(on_demand("gemma", evicts=False), [model], model) is None


@pytest.mark.parametrize(
    ("first", "blocked"),
    [
        (absent(rank=1), True),
        (absent(rank=9), False),
        (absent(rank=1, window_open=False), False),
        (absent(rank=1, listed=False), False),
    ],
)
def test_where_one_model_is_kept_it_is_the_first_that_is_needed_and_listed(first: Model, blocked: bool):
    model = absent(QWEN, rank=5)
    reason = "LM Studio 0.3.x keeps one model at a time here, and gemma comes first in the config"

    assert blocked_by(on_demand(evicts=True), [model, first], model) == (reason if blocked else None)
    assert blocked_by(on_demand(), [model, first], model) is None


def test_a_model_that_nobody_needs_is_not_blocked_by_itself():
    model = absent(window_open=False)

    assert blocked_by(on_demand(evicts=True), [model], model) is None


# --- pings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "pinged"),
    [
        ({}, True),
        ({"ping_at": 50.5}, True),
        ({"ping_at": 50.6}, False),
        ({"ping_at": None}, True),
        ({"window_open": False}, False),
        ({"instances": ()}, False),
        ({"unloading": True}, False),
        ({"pinging": True}, False),
        ({"state": State.UNKNOWN}, True),
        ({"crashed": True}, True),
        ({"crashed": True, "ours": frozenset({"gemma"})}, False),
        ({"ours": frozenset({"gemma"})}, True),
        ({"state": State.BACKOFF, "in_flight": 1}, True),
    ],
)
def test_only_what_is_there_needed_and_due_is_pinged(changes: dict[str, object], pinged: bool):
    assert (SendPing(GEMMA, "gemma") in plan(up(), [there(**changes)], 50.5)) is pinged


@pytest.mark.parametrize("state", State)
def test_where_nothing_is_listed_what_is_warm_is_pinged_by_its_key(state: State):
    model = there(instances=(), blind=True, state=state, retry_at=99.0)

    assert plan(up(), [model], 50.5) == ([SendPing(GEMMA, "gemma")] if state is State.WARM else [])


def test_a_ping_goes_to_our_own_copy():
    model = there(instances=(ONE, TWO), ours=frozenset({"gemma:2"}))

    assert plan(up(), [model], 50.5) == [SendPing(GEMMA, "gemma:2")]


@pytest.mark.parametrize(
    ("changes", "skipped"),
    [
        ({"in_flight": 1}, True),
        ({"active_at": 45.0}, True),
        ({"active_at": 45.0, "last_ping": Ping(44.9, PingOutcome.OK, 0.1)}, True),
        ({"active_at": 45.0, "last_ping": Ping(45.0, PingOutcome.OK, 0.1)}, False),
        ({"active_at": 45.0, "vouched_at": 45.0}, False),
        ({"active_at": 45.0, "vouched_at": 44.9}, True),
        ({"last_ping": Ping(44.9, PingOutcome.OK, 0.1)}, False),
        ({"active_at": 45.0, "state": State.UNKNOWN}, False),
    ],
)
def test_a_users_answer_stands_in_for_the_one_ping_after_it(changes: dict[str, object], skipped: bool):
    expected = SkipPing(GEMMA) if skipped else SendPing(GEMMA, "gemma")

    assert plan(up(), [there(**changes)], 50.5) == [expected]


def test_pings_under_way_leave_room_for_the_others_of_four():
    under_way = [there(ModelId("local", key), pinging=True) for key in "abc"]
    more = [there(ModelId("local", key), pinging=True) for key in "de"]
    due = [there(), there(QWEN, rank=1)]

    assert plan(up(), [*due, *under_way], 50.5) == [SendPing(GEMMA, "gemma")]
    assert plan(up(), [*due, *under_way, *more[:1]], 50.5) == []
    assert plan(up(), [*due, *under_way, *more], 50.5) == []


def test_pings_go_first_to_whom_somebody_waits_for_then_to_what_is_not_warm_then_by_the_config():
    a, b, c, d, e = (ModelId("local", key) for key in "abcde")
    models = [
        there(a, rank=0),
        there(b, rank=4),
        there(c, rank=3, state=State.UNKNOWN),
        there(d, rank=2, state=State.UNKNOWN),
        there(e, rank=5, waiting=2),
    ]

    assert [action.model.key for action in plan(up(), models, 50.5)] == ["e", "d", "c", "a"]  # type: ignore[union-attr]


# --- unloads --------------------------------------------------------------------------------------

OURS = frozenset({"gemma", "gemma:2"})


@pytest.mark.parametrize(
    ("changes", "unloaded"),
    [
        ({}, True),
        ({"window_open": True}, False),
        ({"window_open": True, "crashed": True}, True),
        ({"window_open": True, "crashed": True, "ours": frozenset()}, False),
        ({"ours": frozenset()}, False),
        ({"in_flight": 1}, False),
        ({"crashed": True, "in_flight": 1}, False),
        ({"retired": True}, True),
        ({"retired": True, "in_flight": 1}, False),
        ({"pinging": True}, False),
        ({"unloading": True}, False),
        ({"retry_at": 100.5}, True),
        ({"retry_at": 100.6}, False),
        ({"active_at": 40.5}, True),
        ({"active_at": 40.6}, False),
        ({"active_at": 40.6, "crashed": True}, False),
        ({"instances": (replace(ONE, busy=True),)}, False),
        ({"seen_by": Sight(late=True)}, False),
    ],
)
def test_only_what_is_ours_and_idle_and_wanted_by_nobody_is_unloaded(
    changes: dict[str, object], unloaded: bool
):
    before: dict[str, object] = {"window_open": False, "ours": OURS, "ping_at": 999.0}
    planned = plan(up(asked=100.0, answered_at=100.0, due_at=115.0), [there(**{**before, **changes})], 100.5)

    cause = None if "crashed" in changes else UnloadCause.RELEASED
    assert planned == ([Unload(GEMMA, "gemma", cause)] if unloaded else [])


@pytest.mark.parametrize(
    ("key", "held", "kept"), [("Gemma", True, True), ("Gemma", False, False), ("qwen", True, False)]
)
def test_what_is_kept_under_the_same_key_in_other_letters_is_not_unloaded(key: str, held: bool, kept: bool):
    gone = there(window_open=False, retired=True, ours=OURS, ping_at=999.0)
    other = there(id=ModelId("local", key), window_open=held, ping_at=999.0, ours=frozenset())
    fresh = up(asked=100.0, answered_at=100.0, due_at=115.0)

    assert plan(fresh, [gone, other], 100.5) == (
        [] if kept else [Unload(GEMMA, "gemma", UnloadCause.RELEASED)]
    )


def test_that_one_is_kept_in_other_letters_spares_only_what_the_config_no_longer_names():
    gone = there(window_open=False, retired=True, ours=OURS, ping_at=999.0)
    other = there(id=ModelId("local", "Gemma"), ping_at=999.0)
    crashed = there(QWEN, crashed=True, ours=frozenset({"qwen"}))

    assert plan(up(), [gone, other, crashed], 50.5) == [Unload(QWEN, "qwen", None)]


def test_copies_are_unloaded_one_after_the_other_and_only_ours():
    foreign = Instance("gemma:9")
    model = there(window_open=False, instances=(foreign, ONE, TWO), ours=OURS)

    assert plan(up(), [model], 50.5) == [Unload(GEMMA, "gemma", UnloadCause.RELEASED)]


@pytest.mark.parametrize("tier", [Tier.V0, Tier.OPENAI])
def test_an_older_server_is_never_asked_to_unload(tier: Tier):
    assert plan(up(tier=tier), [there(window_open=False, ours=OURS)], 50.5) == []


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({"seen": True}, True),
        ({"loaded": True}, True),
        ({"expected": 60.0}, True),
        ({}, False),
        ({"seen": True, "ours": False}, False),
        ({"loaded": True, "doubted": True}, False),
        ({"expected": 60.0, "doubted": True}, False),
    ],
)
def test_a_load_that_may_have_ended_with_its_server_keeps_no_other_waiting(
    changes: dict[str, object], holds: bool
):
    unseen = absent(state=State.LOADING, pending=replace(PENDING, since=20.0, **changes))

    assert plan(up(), [unseen, absent(QWEN)], 50.5) == ([] if holds else [Load(QWEN)])


# --- together -------------------------------------------------------------------------------------


def test_what_is_skipped_and_what_is_done_come_before_what_is_asked():
    phi = ModelId("local", "phi")
    models = [
        absent(rank=1),
        there(QWEN, in_flight=1),
        there(LLAMA, rank=2),
        there(phi, window_open=False, ours=frozenset({"phi"})),
    ]

    assert plan(up(due_at=50.0), models, 50.5) == [
        SkipPing(QWEN),
        Unload(phi, "phi", UnloadCause.RELEASED),
        Load(GEMMA),
        SendPing(LLAMA, "llama"),
        Refresh("local", loading=True),
    ]


@pytest.mark.parametrize(
    ("changes", "asks"),
    [
        ({"busy": True, "touched_at": 100.0}, True),
        ({"busy": True, "touched_at": 99.9}, False),
        ({"busy": True, "touched_at": 100.0, "instances": (replace(ONE, busy=True),)}, False),
        ({"touched_at": 100.0}, False),
    ],
)
def test_who_left_a_ping_unanswered_is_looked_at_unless_it_is_seen_to_work(
    changes: dict[str, object], asks: bool
):
    model = there(**{"ping_at": 999.0, **changes})
    planned = plan(up(asked=100.0, answered_at=100.0, due_at=115.0), [model], 100.5)

    assert planned == ([Refresh("local")] if asks else [])


@pytest.mark.parametrize(("unread", "done"), [("gemma", []), ("qwen", [SendPing(GEMMA, "gemma")])])
def test_nothing_is_done_with_what_the_listing_does_not_tell_of(unread: str, done: list[Action]):
    assert plan(up(unread=frozenset({unread})), [there()], 50.5) == done
