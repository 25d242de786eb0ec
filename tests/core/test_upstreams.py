"""What is known of an upstream: how it answers, and whether a load on demand displaces."""

from dataclasses import replace
from math import inf

import pytest

from keepalive.core.actions import Drain, Load, Refresh
from keepalive.core.explain import explain
from keepalive.core.facts import (
    ClockJumped,
    Fact,
    HandLost,
    HandTaken,
    InstanceLost,
    ListingStarted,
    LoadOutcome,
    LoadStarted,
    Occupant,
    Odd,
    PingEnded,
    PingOutcome,
    RequestStarted,
    Sdk,
    Sight,
    Tier,
    Trouble,
    UnloadEnded,
    WaitStarted,
    WarmAsked,
)
from keepalive.core.records import Upstream, UpstreamState
from keepalive.core.states import State
from keepalive.core.upstreams import apply_upstream
from tests.kit.models import (
    GEMMA,
    OLD,
    QWEN,
    Box,
    changed,
    entry,
    failed,
    listed,
    load_ended,
    loaded_on_demand,
    nothing,
    old,
    warm,
)


def test_an_upstream_believes_no_listing_older_than_the_one_it_knows():
    upstream = apply_upstream(Upstream("local"), listed(20, entry("gemma", "gemma"), asked=19))
    late = apply_upstream(replace(upstream, listing=True), listed(30, entry("gemma"), asked=18))

    assert late == upstream


@pytest.mark.parametrize(
    ("trouble", "first", "wait"),
    [
        (Trouble.REFUSED, [], 1.5),
        (Trouble.LOADING, [], 1.5),
        (Trouble.UNREACHABLE, [2.0, 4.0, 8.0], 15.0),
        (Trouble.TIMEOUT, [2.0, 4.0, 8.0], 15.0),
        (Trouble.BAD_ANSWER, [2.0, 4.0, 8.0], 15.0),
        (Trouble.UNAUTHORIZED, [], 60.0),
    ],
)
@pytest.mark.parametrize("refresh_interval", [1.0, 15.0, 600.0])
def test_one_that_is_away_is_tried_again_soon_and_then_at_the_same_pace_for_ever(
    trouble: Trouble, first: list[float], wait: float, refresh_interval: float
):
    upstream, at, waits = Upstream("local", refresh_interval=refresh_interval), 1.0, []
    for _ in range(2000):
        upstream = apply_upstream(upstream, failed(at, trouble, asked=at))
        waits.append(upstream.due_at - at)
        at = upstream.due_at

    assert waits == first + [wait] * (2000 - len(first))
    assert upstream.failures == 2000


def test_one_answer_that_is_lost_again_and_again_is_asked_for_soon_each_time():
    upstream, waits = Upstream("local"), []
    for at in (100.0, 200.0, 300.0):
        upstream = apply_upstream(upstream, listed(at, entry("gemma")))
        upstream = apply_upstream(upstream, failed(at + 15, Trouble.TIMEOUT, asked=at + 5))
        waits.append((upstream.due_at - at - 15, upstream.state))

    assert waits == [(2.0, UpstreamState.UP)] * 3


def test_one_that_says_that_it_loads_is_up_and_says_so():
    upstream = apply_upstream(asked_long_ago(), failed(50, Trouble.LOADING, "Loading model"))

    assert (upstream.state, upstream.error, upstream.answered_at) == (UpstreamState.UP, "Loading model", -inf)


def test_what_a_time_out_takes_is_part_of_its_pace_and_still_there_is_a_rest_between_two():
    away = Upstream("local", failures=10)
    asked_for = {
        took: apply_upstream(away, failed(100.0, Trouble.TIMEOUT, asked=100.0 - took)).due_at
        for took in (5.0, 13.0, 14.0, 40.0)
    }

    assert asked_for == {5.0: 110.0, 13.0: 102.0, 14.0: 102.0, 40.0: 102.0}


def test_who_starts_to_wait_has_one_that_is_away_tried_at_once_and_a_thousand_do_no_more():
    away = apply_upstream(
        apply_upstream(Upstream("local", failures=9), ListingStarted(45, "local")),
        failed(50, Trouble.TIMEOUT, asked=45.0),
    )
    waiting = apply_upstream(away, WaitStarted(55, GEMMA))
    tried = apply_upstream(
        apply_upstream(waiting, ListingStarted(55, "local")), failed(55.5, Trouble.TIMEOUT)
    )
    for n in range(1000):
        tried = apply_upstream(tried, WaitStarted(55.6 + n / 1e6, GEMMA))

    assert (away.due_at, waiting.due_at, tried.due_at) == (60.0, 55, 57)


def test_who_starts_to_wait_for_one_that_answers_changes_nothing():
    up = apply_upstream(Upstream("local"), listed(1, entry("gemma")))

    assert apply_upstream(up, WaitStarted(5, GEMMA)) == up


def test_a_wrong_token_is_tried_again_within_a_minute():
    upstream = apply_upstream(Upstream("local"), failed(10, Trouble.UNAUTHORIZED, "wants a token"))

    assert (upstream.state, upstream.due_at, upstream.error) == (
        UpstreamState.UNAUTHORIZED,
        69.99,
        "wants a token",
    )


def test_one_late_answer_is_no_outage_and_three_are():
    upstream = apply_upstream(Upstream("local"), listed(1, entry("gemma")))
    states = []
    for at in (20, 40, 60):
        upstream = apply_upstream(upstream, failed(at, Trouble.TIMEOUT))
        states.append(upstream.state)

    assert states == [UpstreamState.UP, UpstreamState.UP, UpstreamState.DOWN]


def test_it_has_been_silent_since_it_was_first_asked_in_vain_and_says_nothing_else():
    upstream = apply_upstream(Upstream("local"), listed(1, entry("gemma")))
    for at, trouble in ((20, Trouble.TIMEOUT), (40, Trouble.UNREACHABLE), (60, Trouble.TIMEOUT)):
        upstream = apply_upstream(upstream, failed(at, trouble))

    assert upstream.silent_since == 19.99
    for heard in (
        listed(80),
        failed(80, Trouble.REFUSED),
        failed(80, Trouble.BAD_ANSWER),
        failed(80, Trouble.LOADING),
        failed(80, Trouble.UNAUTHORIZED),
        ClockJumped(80, "local", 60.0),  # it may be we who were away
    ):
        assert apply_upstream(upstream, heard).silent_since is None


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
    assert again == [Drain(QWEN), Load(GEMMA)]
    assert state.plan(22.1) == []
    assert explain(state.upstream, list(state.models.values()), state[QWEN], 99.0) == (
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


# --- each fact, and all that it leaves ------------------------------------------------------------


def asked_long_ago(state: UpstreamState = UpstreamState.DOWN, **changes: object) -> Upstream:
    """It has been in trouble, and a listing is under way."""
    trouble: dict[str, object] = {
        "state": state,
        "since": 5.0,
        "error": "it was away",
        "failures": 2,
        "listing": True,
        "asked": 40.0,
        "answered_at": 41.0,
        "due_at": 70.0,
    }
    return Upstream("local", **{**trouble, **changes})  # type: ignore[arg-type]


def test_one_listing_is_under_way_at_a_time():
    assert changed(Upstream("local"), apply_upstream(Upstream("local"), ListingStarted(1, "local"))) == {
        "listing": True,
        "tried_at": 1,
    }


def test_a_listing_ends_all_trouble_and_says_what_is_there():
    rows = entry("gemma", "gemma"), entry("Qwen", loading=True)

    assert changed(asked_long_ago(), apply_upstream(asked_long_ago(), listed(50, *rows, asked=49.0))) == {
        "listing": False,
        "state": UpstreamState.UP,
        "since": 50,
        "tier": Tier.V1,
        "error": None,
        "failures": 0,
        "asked": 49.0,
        "answered_at": 50,
        "due_at": 65.0,
        "resident": {"gemma"},
        "arriving": {"qwen"},
        "occupants": (Occupant("gemma", 1, None),),
        "sees_loading": True,
    }


def test_an_upstream_that_stays_up_is_up_since_the_first_answer():
    assert apply_upstream(asked_long_ago(UpstreamState.UP), listed(50)).since == 5.0


def test_a_listing_as_old_as_the_one_it_knows_only_ends():
    late = listed(50, entry("gemma", "gemma"), asked=40.0)

    assert changed(asked_long_ago(), apply_upstream(asked_long_ago(), late)) == {"listing": False}


def test_a_closed_port_is_down_and_what_listens_there_next_has_to_show_anew_whether_it_evicts():
    before = asked_long_ago(UpstreamState.UP, evicts=True, on_trial=frozenset({"gemma"}))

    assert changed(before, apply_upstream(before, failed(50, Trouble.REFUSED, "nothing listens"))) == {
        "listing": False,
        "state": UpstreamState.DOWN,
        "since": 50,
        "error": "nothing listens",
        "failures": 3,
        "answered_at": -inf,
        "due_at": 51.5,
        "evicts": None,
        "on_trial": frozenset(),
    }


@pytest.mark.parametrize("trouble", [Trouble.UNREACHABLE, Trouble.BAD_ANSWER, Trouble.TIMEOUT])
def test_after_any_other_trouble_it_is_the_same_program(trouble: Trouble):
    upstream = apply_upstream(asked_long_ago(evicts=True), failed(50, trouble))

    assert (upstream.evicts, upstream.state, upstream.since) == (True, UpstreamState.DOWN, 5.0)


def test_a_late_answer_is_forgiven_only_where_others_came_in_time():
    late = failed(50, Trouble.TIMEOUT)

    assert apply_upstream(asked_long_ago(UpstreamState.UP, failures=0), late).state is UpstreamState.UP
    assert apply_upstream(asked_long_ago(UpstreamState.UP, failures=0), late).since == 5.0
    assert apply_upstream(Upstream("local"), late).state is UpstreamState.DOWN
    assert apply_upstream(
        asked_long_ago(UpstreamState.UP, failures=0), failed(50, Trouble.BAD_ANSWER)
    ).state is (UpstreamState.DOWN)


def test_after_a_clock_jump_no_answer_counts():
    before = asked_long_ago()

    assert changed(before, apply_upstream(before, ClockJumped(50, "local", 60.0))) == {
        "answered_at": -inf,
        "due_at": -inf,
    }


def test_who_takes_over_looks_first_and_who_has_lost_it_soon():
    ours, anothers = asked_long_ago(), asked_long_ago(acts=False)

    assert changed(anothers, apply_upstream(anothers, HandTaken(50, "local"))) == {
        "acts": True,
        "answered_at": -inf,
        "due_at": -inf,
    }
    assert changed(ours, apply_upstream(ours, HandLost(50, "local"))) == {"acts": False, "due_at": 50}


@pytest.mark.parametrize(
    ("tier", "auto_evict", "tried"),
    [
        (Tier.V0, None, {"gemma"}),
        (Tier.V0, True, set()),
        (Tier.V0, False, set()),
        (Tier.V1, None, set()),
        (Tier.OPENAI, None, set()),
    ],
)
def test_a_load_on_demand_tries_what_is_resident_unless_the_config_says_what_happens(
    tier: Tier, auto_evict: bool | None, tried: set[str]
):
    before = asked_long_ago(
        tier=tier,
        auto_evict=auto_evict,
        resident=frozenset({"gemma"}),
        trial_over_at=3.0,
        on_trial=frozenset({"qwen"}),
    )

    assert changed(before, apply_upstream(before, LoadStarted(50, QWEN))) == {
        "on_trial": tried,
        "trial_over_at": None,
    }


@pytest.mark.parametrize("outcome", LoadOutcome)
def test_a_load_that_ended_is_looked_at_and_is_no_trial_unless_it_loaded(outcome: LoadOutcome):
    before = asked_long_ago(on_trial=frozenset({"gemma"}))
    ended = {"due_at": -inf, "trial_over_at": 50}
    stopped = {} if outcome is LoadOutcome.OK else {"on_trial": frozenset()}

    assert changed(before, apply_upstream(before, load_ended(50, outcome))) == {**ended, **stopped}


def test_the_verdict_of_a_trial_is_a_listing_asked_after_it():
    trial = asked_long_ago(UpstreamState.UP, tier=Tier.V0, on_trial=frozenset({"gemma"}), trial_over_at=50.0)
    gone, there = entry("gemma"), entry("gemma", "gemma")
    early = apply_upstream(trial, listed(51, gone, asked=50.0, tier=Tier.V0))

    assert (early.evicts, early.on_trial) == (None, {"gemma"})
    for row, evicts in ((gone, True), (there, False)):
        late = apply_upstream(trial, listed(51, row, entry("qwen", "qwen"), asked=50.1, tier=Tier.V0))
        assert (late.evicts, late.on_trial) == (evicts, frozenset())


def test_a_trial_is_passed_by_what_was_there_even_where_the_new_one_has_gone_again():
    trial = asked_long_ago(UpstreamState.UP, tier=Tier.V0, on_trial=frozenset({"gemma"}), trial_over_at=45.0)

    assert apply_upstream(trial, listed(50, entry("gemma", "gemma"), tier=Tier.V0)).evicts is False


def test_a_listing_without_a_trial_leaves_the_verdict():
    before = asked_long_ago(tier=Tier.V0, evicts=True, trial_over_at=45.0)

    assert apply_upstream(before, listed(50, tier=Tier.V0)).evicts is True


def test_what_replaced_an_old_server_has_no_verdict():
    assert apply_upstream(asked_long_ago(tier=Tier.V0, evicts=True), listed(50)).evicts is None


LOOK = [
    PingEnded(50, GEMMA, PingOutcome.ERROR),
    PingEnded(50, GEMMA, PingOutcome.WRONG_MODEL),
    UnloadEnded(50, GEMMA, "gemma"),
    InstanceLost(50, GEMMA, "gone"),
]


@pytest.mark.parametrize("fact", LOOK, ids=lambda fact: type(fact).__name__)
def test_what_may_have_changed_it_makes_it_due_at_once(fact: Fact):
    assert changed(asked_long_ago(), apply_upstream(asked_long_ago(), fact)) == {"due_at": 50}
    assert apply_upstream(asked_long_ago(due_at=45.0), fact).due_at == 45.0


@pytest.mark.parametrize("outcome", [PingOutcome.OK, PingOutcome.SKIPPED, PingOutcome.TIMEOUT])
def test_a_ping_that_went_well_or_not_at_all_asks_for_no_look(outcome: PingOutcome):
    assert apply_upstream(asked_long_ago(), PingEnded(50, GEMMA, outcome)) == asked_long_ago()


def test_who_asks_for_a_model_by_hand_has_it_looked_for_now():
    before = asked_long_ago()

    assert changed(before, apply_upstream(before, WarmAsked(50, GEMMA))) == {"due_at": -inf}


def test_no_other_fact_is_about_an_upstream():
    assert apply_upstream(asked_long_ago(), RequestStarted(50, GEMMA)) == asked_long_ago()


@pytest.mark.parametrize("outcome", PingOutcome)
def test_only_a_ping_that_leaves_a_question_makes_a_listing_due(outcome: PingOutcome):
    known = Upstream("local", due_at=100.0)
    asks = outcome in (PingOutcome.ERROR, PingOutcome.WRONG_MODEL)

    assert apply_upstream(known, PingEnded(50, GEMMA, outcome)).due_at == (50 if asks else 100.0)


def test_a_listing_tells_what_the_socket_is_good_for_and_how_many_models_there_may_be():
    sight = Sight(Sdk.UP, session=2, hung_up=1)
    upstream = apply_upstream(Upstream("local"), replace(listed(1, sight=sight), places=3))

    assert (upstream.sight, upstream.places) == (sight, 3)


@pytest.mark.parametrize("trouble", Trouble)
def test_with_a_server_that_cannot_be_reached_its_socket_is_gone(trouble: Trouble):
    sight = Sight(Sdk.UP, session=2, hung_up=1)
    gone = trouble in (Trouble.REFUSED, Trouble.UNREACHABLE)

    def seen(sight: Sight) -> Sight:
        return apply_upstream(Upstream("local", sight=sight), failed(50, trouble)).sight

    assert seen(sight) == replace(sight, sdk=Sdk.ABSENT if gone else Sdk.UP)
    assert seen(replace(sight, sdk=Sdk.REFUSED)).sdk is Sdk.REFUSED


def test_of_which_models_it_said_nothing_holds_until_it_says_something():
    unread = replace(
        listed(1, entry("qwen")), odd=Odd("1 of 2 rows is left out", {"gemma": "it cannot be read"})
    )
    upstream = apply_upstream(Upstream("local"), unread)

    assert upstream.unread == {"gemma"}
    assert apply_upstream(upstream, listed(2, entry("qwen"), entry("gemma"))).unread == frozenset()
