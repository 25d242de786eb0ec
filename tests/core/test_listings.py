"""What a listing says: found, missing, being loaded, too old to count, or none at all."""

from dataclasses import replace
from math import inf

import pytest

from keepalive.core.actions import Load, Refresh, SendPing
from keepalive.core.apply import apply
from keepalive.core.errors import Reason
from keepalive.core.facts import (
    ClockJumped,
    Entry,
    Instance,
    Listed,
    LoadOutcome,
    LoadRemembered,
    LoadStarted,
    ModelId,
    Need,
    Odd,
    PingEnded,
    PingOutcome,
    PingStarted,
    Sdk,
    Sight,
    Tier,
    Trouble,
)
from keepalive.core.plan import holds_a_slot
from keepalive.core.records import Cause, Claim, Eviction, Model, Pending, Primed, Priming
from keepalive.core.states import State
from tests.kit.models import (
    GEMMA,
    POLICY,
    QWEN,
    Box,
    a_model,
    after,
    box,
    changed,
    cold,
    entry,
    every_model,
    failed,
    found,
    listed,
    load_ended,
    ours,
    refused,
    tried,
    unanswered,
    warm,
)


def test_a_model_that_is_listed_without_an_instance_is_cold():
    assert (cold().state, cold().since, cold().reason) == (State.COLD, 1, None)


def test_a_model_that_is_found_loaded_is_not_warm_before_it_answers():
    assert (found().state, found().reason) == (State.UNKNOWN, "loaded; has not answered a ping yet")
    assert warm().state is State.WARM


def test_an_answer_asked_earlier_than_the_newest_one_changes_nothing():
    model = after(warm(), listed(100, entry("gemma", "gemma"), asked=99))

    for late in (
        listed(101, entry("gemma"), asked=98),
        listed(101, asked=99),
        failed(101, Trouble.REFUSED, asked=98),
        failed(101, Trouble.UNAUTHORIZED, asked=99),
    ):
        assert apply(model, late) == model


@pytest.mark.parametrize("name", every_model())
def test_a_listing_asked_before_our_last_call_ended_changes_nothing(name: str):
    model = every_model()[name]
    settled = replace(model, touched_at=500.0)
    for entries in ((), (entry("gemma"),), (entry("gemma", "gemma"),), (entry("gemma", loading=True),)):
        assert apply(settled, listed(510, *entries, asked=499)) == settled
        assert apply(settled, listed(510, *entries, asked=500)) == settled


def test_an_answer_to_a_question_from_before_a_clock_jump_changes_nothing():
    model = after(warm(), ClockJumped(50, "local", 7200.0))

    assert apply(model, listed(51, entry("gemma"), asked=49)) == model


def test_keys_are_compared_without_regard_to_case():
    model = after(a_model(ModelId("local", "Acme/Gemma")), listed(1, entry("acme/gemma", "acme/gemma")))

    assert model.instance_id == "acme/gemma"


def test_a_key_that_is_not_listed_is_said_with_the_nearest_listed_keys():
    model = after(a_model(ModelId("local", "gema")), listed(1, entry("gemma"), entry("qwen")))

    assert model.state is State.COLD
    assert model.reason == "LM Studio does not list this key; listed are gemma"
    assert Box(model).see(listed(2, entry("gemma"))).plan(2.1) == []


def test_of_very_many_listed_keys_the_first_thousand_are_compared():
    rows = [entry(f"model-{n:04}") for n in range(1001)]
    within = after(a_model(ModelId("local", "model-0999x")), listed(1, *rows))
    beyond = after(a_model(ModelId("local", "model-1000x")), listed(1, *rows))

    assert (len(within.nearest), within.nearest[0]) == (3, "model-0999")
    assert len(beyond.nearest) == 3
    assert "model-1000" not in beyond.nearest


def test_an_instance_of_the_same_name_after_a_restart_is_not_ours():
    model = after(ours(), refused(20), listed(40, entry("gemma", "gemma")))

    assert model.ours == frozenset()


@pytest.mark.parametrize("trouble", [Trouble.REFUSED, Trouble.UNREACHABLE, Trouble.UNAUTHORIZED])
def test_a_model_on_an_upstream_that_is_gone_is_unknown_and_says_why(trouble: Trouble):
    model = after(warm(), failed(20, trouble, "this is why"))

    assert (model.state, model.since, model.reason) == (State.UNKNOWN, 20, "this is why")


@pytest.mark.parametrize("trouble", [Trouble.TIMEOUT, Trouble.BAD_ANSWER])
def test_a_warm_model_stays_warm_while_its_upstream_is_too_busy_to_list(trouble: Trouble):
    model = warm()

    assert apply(model, failed(20, trouble)) == model
    assert apply(model, failed(318, trouble)) == model


@pytest.mark.parametrize("trouble", [Trouble.TIMEOUT, Trouble.BAD_ANSWER])
def test_warm_is_never_claimed_longer_than_a_refresh_and_a_ping_without_news(trouble: Trouble):
    model = apply(warm(), failed(318.1, trouble))

    assert model.state is State.UNKNOWN
    assert apply(replace(warm(), in_flight=1), failed(318.1, trouble)).state is State.WARM


@pytest.mark.parametrize("trouble", [Trouble.TIMEOUT, Trouble.BAD_ANSWER])
def test_a_model_never_seen_says_what_its_upstream_does_instead(trouble: Trouble):
    model = apply(a_model(), failed(5, trouble, "http://x did not answer the listing"))

    assert (model.state, model.reason) == (State.UNKNOWN, "http://x did not answer the listing")


def test_a_model_in_backoff_still_says_why_after_its_upstream_was_away():
    model = after(
        cold(),
        LoadStarted(2, GEMMA),
        load_ended(10, LoadOutcome.REFUSED, message="insufficient system resources"),
        refused(20),
        listed(40, entry("gemma")),
    )

    assert (model.state, model.reason) == (State.BACKOFF, "insufficient system resources")


def test_a_model_seen_again_after_its_upstream_was_away_is_pinged_at_once():
    state = Box(warm()).see(refused(20), listed(40, entry("gemma", "gemma")))

    assert state[GEMMA].state is State.UNKNOWN
    assert state.plan(40.1) == [SendPing(GEMMA, "gemma")]


def test_a_load_that_ended_well_and_is_never_listed_is_a_failure():
    state = box(listed(1, entry("gemma")), LoadStarted(2, GEMMA), load_ended(10))
    early = state.see(listed(54.9, entry("gemma")))[GEMMA].state
    late = state.see(listed(55.1, entry("gemma")))[GEMMA]

    assert early is State.LOADING
    assert (late.state, late.retry_at) == (State.BACKOFF, 60.1)


def test_a_load_that_somebody_else_finished_first_is_not_repeated():
    state = box(
        listed(1, entry("gemma")), LoadStarted(2, GEMMA), load_ended(10, LoadOutcome.FAILED, message="no")
    )
    state.see(listed(20, entry("gemma", "gemma")))

    assert state.plan(20.1) == [SendPing(GEMMA, "gemma")]


def test_an_unanswered_load_that_turns_up_in_the_listing_is_taken():
    state = Box(unanswered()).see(listed(60, entry("gemma", "gemma")))

    assert state[GEMMA].pending is None
    assert state.plan(60.1) == [SendPing(GEMMA, "gemma")]


def test_an_unanswered_load_that_never_turns_up_is_given_up_after_twice_its_known_time_and_the_lag():
    state = Box(unanswered(recent_loads=(20.0, 30.0)))
    early = state.see(listed(106.9, entry("gemma")))[GEMMA].state
    late = state.see(listed(107.1, entry("gemma")))

    assert early is State.LOADING
    assert late[GEMMA].reason == "its last load came to nothing"
    assert late.plan(107.2) == [Load(GEMMA)]


def test_an_unanswered_load_that_is_seen_loading_and_then_not_is_given_the_lag_of_the_listing():
    state = Box(unanswered()).see(
        listed(30, entry("gemma", loading=True)), listed(32, entry("gemma", loading=False))
    )
    early = state.see(listed(74.9, entry("gemma", loading=False)))[GEMMA].state
    late = state.see(listed(75.1, entry("gemma", loading=False)))

    assert early is State.LOADING
    assert late.plan(75.2) == [Load(GEMMA)]


def test_a_listing_that_cannot_show_loading_does_not_end_an_unanswered_load():
    state = Box(unanswered()).see(listed(30, entry("gemma", loading=True)), listed(100, entry("gemma")))

    assert state[GEMMA].state is State.LOADING


def test_a_load_is_believed_in_beyond_a_refused_connection_which_may_be_the_end_of_a_tunnel_alone():
    state = Box(unanswered(recent_loads=(20.0, 30.0))).see(refused(20), listed(40, entry("gemma")))
    early = state.see(listed(106.9, entry("gemma"))).plan(107.0)
    late = state.see(listed(107.1, entry("gemma"))).plan(107.2)

    assert early == []
    assert late == [Load(GEMMA)]


def test_where_loads_show_one_that_does_not_is_over_soon_after_a_refused_connection():
    state = Box(unanswered(tells_loading=True)).see(refused(20))
    early = state.see(listed(54.9, entry("gemma", loading=False))).plan(55.0)
    late = state.see(listed(55.1, entry("gemma", loading=False))).plan(55.2)

    assert early == []
    assert late == [Load(GEMMA)]


def test_a_load_that_shows_after_a_refused_connection_goes_on():
    state = Box(unanswered()).see(refused(20), listed(40, entry("gemma", loading=True)))

    assert state[GEMMA].reason == "LM Studio is still loading it"
    assert holds_a_slot(state[GEMMA], 40.1)


@pytest.mark.parametrize(
    ("there", "is_over"),
    [(("qwen", "phi"), True), (("qwen",), False), ((), False)],
)
def test_a_load_ended_with_lm_studio_where_of_several_models_none_is_left(
    there: tuple[str, ...], is_over: bool
):
    rows = [entry(key, key) for key in there]
    model = after(cold(), listed(1.5, entry("gemma"), *rows), LoadStarted(2, GEMMA))
    state = Box(after(model, load_ended(10, LoadOutcome.UNKNOWN, message="cut"))).see(refused(20))
    state.see(listed(40, entry("gemma"), entry("qwen"), entry("phi")))

    assert state.plan(40.1) == ([Load(GEMMA)] if is_over else [])


def test_a_load_goes_on_where_one_of_several_models_outlived_a_refused_connection():
    rows = entry("qwen", "qwen"), entry("phi", "phi")
    model = after(cold(), listed(1.5, entry("gemma"), *rows), LoadStarted(2, GEMMA))
    state = Box(after(model, load_ended(10, LoadOutcome.UNKNOWN, message="cut"))).see(refused(20))
    state.see(listed(40, entry("gemma"), entry("qwen"), entry("phi", "phi")))

    assert state.plan(40.1) == []


def test_llama_server_shows_at_once_that_a_load_has_ended_with_it():
    router = Tier.LLAMA
    state = Box(unanswered()).see(refused(20), listed(40, entry("gemma", loading=False), tier=router))
    goes_on = Box(unanswered()).see(refused(20), listed(40, entry("gemma", loading=True), tier=router))

    not_listed = after(unanswered(), refused(20), listed(40, tier=router))
    not_doubted = Box(unanswered()).see(listed(40, entry("gemma", loading=False), tier=router))

    assert state.plan(40.1) == [Load(GEMMA)]
    assert not_listed.pending is None
    assert (goes_on.plan(40.1), goes_on[GEMMA].reason) == ([], "LM Studio is still loading it")
    assert not_doubted.plan(40.1) == []


def test_nobody_waits_behind_a_load_that_may_have_ended_with_lm_studio():
    begun = Box(unanswered(recent_loads=(200.0,)), a_model(QWEN, rank=1))
    waits = begun.see(listed(15, entry("gemma"), entry("qwen"))).plan(15.1)
    goes = begun.see(refused(20), listed(40, entry("gemma"), entry("qwen"))).plan(40.1)

    assert waits == []
    assert goes == [Load(QWEN)]


def test_what_was_loaded_and_not_yet_listed_when_lm_studio_ended_has_not_failed():
    model = after(cold(), LoadStarted(2, GEMMA), load_ended(10), refused(20))
    early = after(model, listed(54.9, entry("gemma")))
    late = after(model, listed(55.1, entry("gemma")))

    assert early.state is State.LOADING
    assert (late.state, late.failures, late.pending) == (State.COLD, 0, None)
    assert late.reason == "it was loaded, and went with LM Studio"


@pytest.mark.parametrize("trouble", [Trouble.TIMEOUT, Trouble.UNREACHABLE, Trouble.BAD_ANSWER])
def test_any_other_trouble_does_not_end_it(trouble: Trouble):
    state = Box(unanswered()).see(failed(20, trouble), listed(40, entry("gemma")))

    assert state[GEMMA].state is State.LOADING
    assert state.plan(40.1) == []


def test_somebody_elses_load_is_waited_for_and_takes_no_place_of_ours():
    state = Box(a_model(rank=0), a_model(QWEN, rank=1)).see(
        listed(1, entry("gemma", loading=True), entry("qwen"))
    )

    assert state[GEMMA].reason == "somebody else is loading it"
    assert state.plan(1.1) == [Load(QWEN)]


def test_anothers_copy_that_vanishes_beside_our_unanswered_load_is_not_pinged():
    state = box(listed(1, entry("gemma")), LoadStarted(2, GEMMA), listed(5, entry("gemma", "gemma")))
    state.see(load_ended(10, LoadOutcome.UNKNOWN, message="cut"), listed(20, entry("gemma")))

    assert state[GEMMA].instances == ()
    assert state.plan(20.1) == []


@pytest.mark.parametrize("outcome", [LoadOutcome.UNKNOWN])
def test_an_unanswered_load_on_a_server_without_residency_is_given_up_in_time(outcome: LoadOutcome):
    blind = Tier.OPENAI
    state = box(listed(1, entry("gemma"), tier=blind), LoadStarted(2, GEMMA), load_ended(10, outcome))
    waiting = state.see(listed(286, entry("gemma"), tier=blind)).plan(286.1)
    state.see(listed(288, entry("gemma"), tier=blind))

    assert waiting == []
    assert state.plan(288.1) == [Load(GEMMA)]


@pytest.mark.parametrize(
    ("size", "load_timeout", "until"),
    [
        (None, 900.0, 285.0),
        (200, 900.0, 165.0),
        (5_000_000_000, 900.0, 245.0),
        (60_000_000_000, 900.0, 285.0),
        (None, 30.0, 75.0),
    ],
)
def test_a_load_that_nobody_has_seen_succeed_is_believed_in_for_as_long_as_a_slow_disk_takes(
    size: int | None, load_timeout: float, until: float
):
    policy = replace(POLICY, load_timeout=load_timeout)
    model = after(a_model(policy=policy), LoadRemembered(1, GEMMA, 0.0, None))
    waiting = after(model, listed(until - 0.1, entry("gemma", size=size)))
    over = after(waiting, listed(until, entry("gemma", size=size)))

    assert waiting.pending is not None
    assert (waiting.state, waiting.pending.until) == (State.LOADING, until)
    assert (over.state, over.pending) == (State.COLD, None)


def test_a_remembered_load_on_a_server_without_residency_is_given_up_in_time():
    blind = Tier.OPENAI
    state = box(LoadRemembered(1, GEMMA, 0.0, 10.0), listed(2, entry("gemma"), tier=blind))
    state.see(listed(66, entry("gemma"), tier=blind))

    assert state.plan(66.1) == [Load(GEMMA)]


def test_on_a_server_without_residency_a_fast_answer_is_warm():
    state = box(listed(1, entry("gemma"), tier=Tier.OPENAI))
    first = state.plan(1.1)
    state.see(LoadStarted(1.2, GEMMA), load_ended(3, proved=True))

    assert first == [Load(GEMMA)]
    assert state[GEMMA].state is State.WARM
    state.see(listed(303.5, entry("gemma"), tier=Tier.OPENAI))
    assert state.plan(303.6) == [SendPing(GEMMA, "gemma")]


def test_on_a_server_without_residency_an_old_proof_is_no_proof():
    state = box(
        listed(1, entry("gemma"), tier=Tier.OPENAI), LoadStarted(1.2, GEMMA), load_ended(3, proved=True)
    )
    state.see(listed(319, entry("gemma"), tier=Tier.OPENAI))

    assert state[GEMMA].state is State.COLD
    assert state[GEMMA].reason == "this server does not show what is loaded; only a request can tell"


# --- each listing, and all that it leaves ---------------------------------------------------------

LLAMA = entry("llama", "llama")
PENDING = Pending(since=1.0, until=99.0, alive_at=2.0)
SEEN = replace(PENDING, seen=True)


def test_a_listing_says_what_a_model_is_and_what_is_loaded_beside_it():
    row = Entry("gemma", kind="embedding", size_bytes=7, loading=False)
    before = replace(cold(), listed=False, nearest=("jemma",), blind=True)

    assert changed(before, apply(before, listed(50, row, LLAMA, asked=49))) == {
        "asked": 49,
        "blind": False,
        "listed": True,
        "nearest": (),
        "kind": "embedding",
        "size_bytes": 7,
        "beside": {"llama"},
    }


def test_a_listing_that_once_showed_a_load_is_known_to_show_them():
    silent = after(a_model(), listed(1, entry("gemma")), listed(2, entry("gemma", loading=False)))
    told = after(silent, listed(3, entry("gemma", loading=True)), listed(4, entry("gemma")))

    assert (silent.tells_loading, told.tells_loading) == (False, True)


def test_a_key_that_is_not_listed_is_like_any_of_which_it_may_be_a_part():
    before = a_model(ModelId("local", "gemma-3"))
    model = apply(before, listed(50, entry("google/gemma-3-12b"), entry("llama"), asked=49))

    assert changed(before, model) == {
        "state": State.COLD,
        "since": 50,
        "reason": "LM Studio does not list this key; listed are google/gemma-3-12b",
        "asked": 49,
        "listed": False,
        "nearest": ("google/gemma-3-12b",),
    }


def test_a_key_that_is_gone_from_the_listing_is_not_being_loaded():
    evicted = after(found(), listed(3, LLAMA))
    idled_longer = replace(found(), survived=9.0, beside=frozenset({"gemma", "llama"}))
    by_hand = after(idled_longer, listed(2.5, LLAMA))
    given_up = after(a_model(pending=SEEN, state=State.LOADING), listed(47, LLAMA))

    assert evicted.last_eviction == Eviction(3, Cause.DISPLACED, 2)
    assert by_hand.last_eviction == Eviction(2.5, Cause.BY_HAND, 1.5)
    assert (given_up.state, given_up.pending) == (State.COLD, None)


# --- found ----------------------------------------------------------------------------------------


def test_what_has_just_appeared_has_still_to_answer_and_begins_a_story_of_its_own():
    before = tried(State.BACKOFF, instances=(), survived=5.0, ours=frozenset({"gemma", "gemma:9"}))

    assert changed(before, apply(before, listed(50, entry("gemma", "gemma", "gemma:2"), asked=49))) == {
        "state": State.UNKNOWN,
        "since": 50,
        "there_since": 50,
        "reason": "loaded; has not answered a ping yet",
        "asked": 49,
        "beside": {"gemma"},
        "instances": (Instance("gemma"), Instance("gemma:2")),
        "ours": {"gemma"},
        "pending": None,
        "seen_at": 50,
        "used_at": 50,
        "ping_at": 50,
        "retry_at": None,
        "crashed": False,
        "busy": False,
        "survived": 0.0,
        "suspected": None,
    }


def test_what_is_still_there_keeps_its_troubles():
    before = tried(State.BACKOFF, used_at=40.0)

    assert changed(before, apply(before, listed(50, entry("gemma", "gemma"), asked=49))) == {
        "asked": 49,
        "beside": {"gemma"},
        "pending": None,
        "seen_at": 50,
        "survived": 9.0,
    }


@pytest.mark.parametrize("suspected", [Cause.RESTART, Cause.UNKNOWN])
def test_what_is_still_there_was_not_restarted(suspected: Cause):
    model = apply(tried(State.WARM, suspected=suspected), listed(50, entry("gemma", "gemma")))

    assert model.suspected is None


@pytest.mark.parametrize("work", [{"in_flight": 1}, {"pinging": True}, {"unloading": True}])
def test_what_is_at_work_does_not_idle(work: dict[str, object]):
    idle = tried(State.WARM, used_at=40.0, survived=3.0)

    assert apply(idle, listed(50, entry("gemma", "gemma"), asked=49)).survived == 9.0
    for survived in (3.0, 0.0):
        at_work = replace(idle, survived=survived, **work)  # type: ignore[arg-type]
        assert apply(at_work, listed(50, entry("gemma", "gemma"), asked=49)).survived == survived


def test_a_load_that_answered_is_warm_when_it_is_listed():
    before = tried(State.LOADING, instances=(), pending=replace(PENDING, loaded=True, proved=True))
    model = apply(before, listed(50, entry("gemma", "gemma")))

    assert (model.state, model.warm_since, model.pending, model.ping_at) == (State.WARM, 50, None, 350)


def test_a_load_that_turns_up_is_loading_until_it_answers():
    model = apply(unanswered(), listed(60, entry("gemma", "gemma")))

    assert (model.state, model.reason) == (State.LOADING, "loaded; has not answered a ping yet")


def test_anothers_copy_beside_our_load_leaves_it_under_way():
    before = replace(cold(), state=State.LOADING, load_started=2.0, reason=None)
    model = apply(before, listed(50, entry("gemma", "gemma")))

    assert (model.state, model.reason, model.load_started) == (State.LOADING, None, 2.0)
    assert model.instances == (Instance("gemma"),)


@pytest.mark.parametrize(
    ("state", "then", "reason"),
    [
        (State.WARM, State.WARM, None),
        (State.BACKOFF, State.UNKNOWN, "loaded, but not wanted now"),
        (State.LOADING, State.UNKNOWN, "loaded, but not wanted now"),
    ],
)
def test_what_nobody_wants_need_not_answer(state: State, then: State, reason: str | None):
    model = apply(tried(state, window_open=False), listed(50, entry("gemma", "gemma")))

    assert (model.state, model.reason) == (then, reason)


def test_what_is_still_there_and_did_not_answer_as_it_should_stays_as_it_is():
    model = apply(tried(State.BACKOFF), listed(50, entry("gemma", "gemma")))

    assert (model.state, model.reason) == (State.BACKOFF, "it went wrong")


# --- being loaded ---------------------------------------------------------------------------------


def test_somebody_elses_load_may_take_the_place_of_what_was_there():
    before = tried(State.WARM, pending=None, suspected=None, evictions=4, used_at=40.0, warm_since=None)

    assert changed(before, apply(before, listed(50, entry("gemma", loading=True), asked=49))) == {
        "state": State.LOADING,
        "since": 50,
        "reason": "somebody else is loading it",
        "asked": 49,
        "tells_loading": True,
        "pending": Pending(since=50, until=95, alive_at=50, seen=True, ours=False),
        "instances": (),
        "ours": frozenset(),
        "busy": False,
        "evictions": 5,
        "last_eviction": Eviction(50, Cause.BY_HAND, 10.0),
        "failures": 3,
        "taken": 1,
        "failure": "it went missing 3 times in a row without holding 300 s",
        "retry_at": 60.0,
    }


def test_our_load_that_is_seen_is_believed_for_as_long_as_it_was_and_for_the_lag_at_least():
    before = a_model(state=State.LOADING, pending=PENDING)
    early = apply(before, listed(50, entry("gemma", loading=True)))
    late = apply(before, listed(60, entry("gemma", loading=True)))

    assert early.reason == "LM Studio is still loading it"
    assert early.pending == Pending(since=1.0, until=99.0, alive_at=50, seen=True)
    assert late.pending == Pending(since=1.0, until=105.0, alive_at=60, seen=True)


def test_a_load_that_we_see_ourselves_needs_no_listing():
    before = replace(cold(), state=State.LOADING, load_started=2.0, reason=None)

    assert changed(before, apply(before, listed(50, entry("gemma", loading=True), asked=49))) == {
        "asked": 49,
        "tells_loading": True,
    }


# --- missing --------------------------------------------------------------------------------------


def test_what_is_gone_while_an_opening_is_on_its_way_to_it_may_be_loaded_by_that():
    """It came there behind it, perhaps, and is a load then that nothing shows: none is begun beside it."""
    why = "what was being replayed to it may have loaded it again"
    priming = Priming(openings=("agent",), under_way="agent")
    away = replace(ours(), priming=priming)
    gone = after(away, listed(26, entry("gemma")))
    given_up = after(gone, listed(92, entry("gemma")))

    assert (gone.state, gone.reason) == (
        State.LOADING,
        f"an earlier load may still be under way, because {why}",
    )
    assert gone.pending == Pending(26, 26 + 65, alive_at=26, expected=10.0, why=why)
    assert (gone.instances, gone.ours, gone.evictions) == ((), frozenset(), 1)
    assert after(gone, listed(90, entry("gemma"))).pending == gone.pending
    # Once, and where a load would not show.
    assert (given_up.state, given_up.pending) == (State.COLD, None)
    assert after(given_up, listed(93, entry("gemma"))).pending is None
    assert after(ours(), listed(26, entry("gemma"))).pending is None
    shows = replace(away, tells_loading=True)
    assert after(shows, listed(26, entry("gemma", loading=False))).pending is None
    assert after(shows, listed(26, entry("gemma", loading=None))).pending == gone.pending
    assert after(away, listed(26, entry("gemma", loading=False))).pending == gone.pending


def test_what_is_gone_beside_our_load_was_anothers_and_is_no_eviction():
    before = tried(State.LOADING, pending=None, load_started=2.0)

    assert changed(before, apply(before, listed(50, entry("gemma"), asked=49))) == {
        "asked": 49,
        "instances": (),
    }


def test_a_load_that_nobody_saw_end_makes_what_is_not_listed_loading():
    before = a_model(pending=PENDING)
    again = apply(replace(before, state=State.LOADING, reason="it was cut"), listed(50, entry("gemma")))

    assert changed(before, apply(before, listed(50, entry("gemma"), asked=49))) == {
        "state": State.LOADING,
        "since": 50,
        "reason": "an earlier load may still be under way",
        "asked": 49,
    }
    assert (again.state, again.reason) == (State.LOADING, "it was cut")
    why = a_model(pending=replace(PENDING, why="it was cut"))
    assert apply(why, listed(50)).reason == "an earlier load may still be under way, because it was cut"


def test_a_model_that_was_there_says_that_it_no_longer_is_and_one_that_was_not_says_nothing():
    assert apply(warm(), listed(50, entry("gemma"))).reason == "LM Studio no longer has it in memory"
    assert apply(a_model(), listed(50, entry("gemma"))).reason is None


def resolved(pending: Pending, at: float, *, loading: bool | None = False, **changes: object) -> Model:
    before = a_model(state=State.LOADING, reason="it was cut", pending=pending, **changes)
    return apply(before, listed(at, entry("gemma", loading=loading)))


def test_a_load_that_ended_well_is_waited_for_until_the_lag_is_over():
    loaded = Pending(since=1.0, until=50.0, alive_at=5.0, loaded=True)
    model = resolved(loaded, 50)

    assert resolved(loaded, 49.9).pending == loaded
    assert (model.state, model.pending, model.failures, model.retry_at) == (State.BACKOFF, None, 1, 55)
    assert model.reason == "LM Studio said that it had loaded it, but did not list it for 45 s"


def test_an_unseen_load_is_given_up_when_its_time_is_over():
    assert resolved(PENDING, 98.9).pending == PENDING
    assert changed(PENDING_GONE, resolved(PENDING, 99)) == {}
    assert resolved(replace(PENDING, ours=False), 99).reason is None


PENDING_GONE = replace(
    a_model(), state=State.COLD, since=99, reason="its last load came to nothing", asked=98.99
)


def test_a_load_that_was_seen_and_is_not_seen_any_more_is_over_when_the_lag_is():
    assert resolved(SEEN, 46.9).pending == SEEN
    assert resolved(SEEN, 47).pending is None


def test_where_loads_are_shown_one_that_never_was_is_over_as_well():
    assert resolved(PENDING, 47).pending == PENDING
    assert resolved(PENDING, 47, tells_loading=True).pending is None


def test_a_listing_that_does_not_show_loads_says_nothing_of_one_that_was_seen():
    assert resolved(SEEN, 47, loading=None).pending == SEEN
    assert resolved(SEEN, 47, loading=None, tells_loading=True).pending == SEEN


def test_only_a_guess_is_cut_short_by_what_a_slow_disk_takes():
    guess = replace(PENDING, until=999.0)
    known, loaded = replace(guess, expected=477.0), replace(guess, loaded=True)

    assert resolved(guess, 285).pending == replace(guess, until=286.0)
    assert resolved(guess, 286).pending is None
    assert resolved(known, 286).pending == known
    assert resolved(loaded, 286).pending == loaded


# --- where nothing is shown -----------------------------------------------------------------------


def blindly(before: Model, at: float = 50) -> Model:
    return apply(before, listed(at, entry("gemma"), asked=49, tier=Tier.OPENAI))


def test_a_server_that_shows_nothing_takes_nothing_away_from_a_proof():
    before = tried(State.WARM, pending=None, listed=False, nearest=("jemma",))

    assert changed(before, blindly(replace(before, seen_at=-265.0))) == {
        "seen_at": -265.0,
        "asked": 49,
        "blind": True,
        "listed": True,
        "nearest": (),
        "instances": (),
        "ours": frozenset(),
    }


@pytest.mark.parametrize(
    ("changes", "then"),
    [
        ({"seen_at": -265.0}, State.WARM),
        ({"seen_at": -265.1}, State.COLD),
        ({"seen_at": -265.1, "in_flight": 1}, State.WARM),
        ({"seen_at": -265.1, "pinging": True}, State.WARM),
        ({"state": State.UNKNOWN}, State.COLD),
        ({"state": State.UNKNOWN, "pinging": True}, State.UNKNOWN),
        ({"state": State.UNKNOWN, "in_flight": 1}, State.COLD),
        ({"state": State.BACKOFF}, State.BACKOFF),
    ],
)
def test_a_server_that_shows_nothing_is_believed_for_as_long_as_a_proof_is_good(
    changes: dict[str, object], then: State
):
    before = tried(State.WARM, pending=None, retry_at=None)

    assert blindly(replace(before, **changes)).state is then  # type: ignore[arg-type]


@pytest.mark.parametrize("state", [State.COLD, State.BACKOFF])
def test_a_server_that_shows_nothing_has_nothing_new_to_say_of_what_is_not_there(state: State):
    assert blindly(tried(state, pending=None)).reason == "it went wrong"


def test_a_server_that_shows_nothing_says_so():
    assert blindly(a_model()).reason == ("this server does not show what is loaded; only a request can tell")


def test_on_a_server_that_shows_nothing_a_load_is_waited_for():
    assert blindly(a_model(pending=PENDING)).reason == "an earlier load may still be under way"
    assert blindly(a_model(pending=SEEN, state=State.LOADING)).pending == SEEN
    assert blindly(a_model(pending=PENDING, state=State.LOADING), at=99).state is State.COLD


def test_where_no_ping_can_show_more_a_server_that_shows_nothing_has_all_that_is_needed():
    policy = replace(POLICY, pinged=False)
    needed = tried(State.COLD, pending=None, policy=policy)
    let_go = tried(State.UNKNOWN, pending=None, policy=policy, window_open=False, retry_at=None)

    assert (blindly(needed).state, blindly(let_go).state) == (State.WARM, State.COLD)


# --- where another daemon proves what is there ------------------------------------------------------


def trusted(*entries: Entry, tier: Tier = Tier.V1) -> Listed:
    return replace(listed(50, *entries, asked=49, tier=tier), trusted=True)


@pytest.mark.parametrize("entries", [(), (entry("gemma"),)], ids=["no such key", "not loaded"])
def test_what_is_gone_where_another_one_acts_is_gone_for_a_reason_that_he_knows(entries: tuple[Entry, ...]):
    before = tried(State.WARM, pending=None, retry_at=None)
    during = tried(State.LOADING, pending=None, load_started=30.0)

    model, still = apply(before, trusted(*entries)), apply(during, trusted(*entries))

    assert (model.state, model.evictions, model.failures, model.instances) == (State.COLD, 0, 2, ())
    assert (still.instances, still.ours, still.busy) == ((), frozenset(), False)
    assert (still.state, still.load_started) == (State.LOADING, 30.0)


@pytest.mark.parametrize(
    ("changes", "then"),
    [
        ({}, State.WARM),
        ({"crashed": True}, State.BACKOFF),
        ({"ill": "it does not answer"}, State.BACKOFF),
        ({"load_started": 30.0}, State.BACKOFF),
    ],
)
def test_what_is_listed_where_another_one_acts_is_warm_unless_somebody_knows_better(
    changes: dict[str, object], then: State
):
    before = tried(State.BACKOFF, **{"crashed": False, **changes})

    assert apply(before, trusted(entry("gemma", "gemma"))).state is then


@pytest.mark.parametrize(
    ("state", "proved", "seen_at", "then"),
    [
        (State.WARM, False, 50, State.WARM),  # until he says otherwise
        (State.WARM, True, 50, State.WARM),
        (State.UNKNOWN, True, 50, State.WARM),
        (State.COLD, True, 50, State.WARM),
        (State.UNKNOWN, False, -900.0, State.COLD),
        (State.COLD, False, -900.0, State.COLD),
    ],
)
def test_where_nothing_is_listed_the_word_of_the_one_who_acts_is_proof(
    state: State, proved: bool, seen_at: float, then: State
):
    before = tried(state, pending=None, retry_at=None, proved_elsewhere=proved, seen_at=-900.0)
    model = apply(before, trusted(entry("gemma"), tier=Tier.OPENAI))

    assert (model.state, model.seen_at) == (then, seen_at)
    assert blindly(replace(before, state=State.UNKNOWN)).state is State.COLD  # once we act ourselves


# --- none at all ----------------------------------------------------------------------------------


def test_a_program_that_is_gone_took_its_instances_with_it_and_perhaps_its_loads():
    recalled = (frozenset({"gemma"}), 99.0)
    claims = {"refused_claim": Claim(9, 1.0), "granted_claim": Claim(8, 2.0)}
    crowd = (frozenset({"qwen"}), 3.0)
    before = tried(State.WARM, suspected=None, recalled=recalled, crowd=crowd, **claims)

    assert changed(before, apply(before, failed(50, Trouble.REFUSED, "nothing listens"))) == {
        "state": State.UNKNOWN,
        "since": 50,
        "reason": "nothing listens",
        "suspected": Cause.RESTART,
        "pending": replace(before.pending, doubted=True),
        "ours": frozenset(),
        "lost": frozenset({"gemma"}),
        "recalled": None,
        "refused_claim": None,
        "granted_claim": None,
        "crowd": None,
        "busy": False,
        "ping_at": -inf,
    }


def test_with_a_program_that_is_gone_anothers_load_is_gone_and_ours_is_not_seen_any_more():
    ours, anothers = a_model(pending=SEEN), a_model(pending=replace(SEEN, ours=False))

    assert apply(ours, refused(50)).pending == replace(PENDING, doubted=True)
    assert apply(anothers, refused(50)).pending is None


def test_behind_a_broken_way_everything_may_still_be_there():
    before = tried(State.WARM, suspected=None)
    found_there = replace(before, ours=frozenset())

    assert changed(before, apply(before, failed(50, Trouble.UNREACHABLE, "no way"))) == {
        "state": State.UNKNOWN,
        "since": 50,
        "reason": "no way",
        "suspected": Cause.UNKNOWN,
        "busy": False,
        "ping_at": -inf,
    }
    assert apply(found_there, failed(50, Trouble.UNREACHABLE)).suspected is Cause.UNKNOWN
    assert apply(found_there, failed(50, Trouble.REFUSED)).suspected is Cause.RESTART


def test_a_port_that_was_closed_after_the_way_was_broken_was_a_restart_all_the_same():
    model = after(
        tried(State.WARM, suspected=None), failed(50, Trouble.UNREACHABLE), failed(60, Trouble.REFUSED)
    )

    assert model.suspected is Cause.RESTART


def test_what_was_suspected_before_the_server_was_gone_is_suspected_still():
    for trouble in (Trouble.REFUSED, Trouble.UNREACHABLE):
        assert apply(tried(State.WARM), failed(50, trouble)).suspected is Cause.CRASH


def test_who_wants_another_token_says_nothing_of_a_restart():
    before = tried(State.WARM, suspected=None)

    assert changed(before, apply(before, failed(50, Trouble.UNAUTHORIZED, "wants a token"))) == {
        "state": State.UNKNOWN,
        "since": 50,
        "reason": "wants a token",
        "busy": False,
        "ping_at": -inf,
    }


@pytest.mark.parametrize("trouble", [Trouble.TIMEOUT, Trouble.BAD_ANSWER])
def test_who_does_not_list_is_no_judge_of_what_is_not_warm(trouble: Trouble):
    for state in (State.COLD, State.LOADING, State.BACKOFF):
        assert apply(tried(state), failed(5000, trouble)) == tried(state)
    unknown = apply(tried(State.UNKNOWN), failed(5000, trouble, "too late"))

    assert changed(tried(State.UNKNOWN), unknown) == {"reason": "too late"}


def test_who_does_not_list_for_too_long_leaves_nothing_to_be_claimed():
    before = tried(State.WARM, seen_at=0.0)

    assert apply(before, failed(315, Trouble.TIMEOUT)) == before
    assert changed(before, apply(before, failed(315.1, Trouble.TIMEOUT, "too late"))) == {
        "state": State.UNKNOWN,
        "since": 315.1,
        "reason": "too late",
        "busy": False,
        "ping_at": -inf,
    }


# --- a server that says that it loads ---------------------------------------------------------------


@pytest.mark.parametrize("state", State)
def test_a_server_that_says_that_it_loads_makes_its_models_loading(state: State):
    before = tried(state, pending=None)

    after_it = apply(before, failed(50, Trouble.LOADING, "Loading model"))

    assert (after_it.state, after_it.reason) == (
        State.LOADING,
        "the server says that it is loading: Loading model",
    )
    assert after_it.pending == Pending(50, 52, alive_at=50, seen=True, ours=False)
    assert after_it.ping_at == 52


def test_it_is_loading_since_it_first_said_so_and_looked_at_every_two_seconds():
    state = Box(warm()).see(failed(50, Trouble.LOADING), failed(52, Trouble.LOADING))

    assert (state[GEMMA].loading_since, state[GEMMA].since) == (50, 50)
    assert state.plan(53.4) == []
    assert state.plan(53.5) == [Refresh("local", loading=True)]


def test_what_answers_users_is_not_loading_whatever_stands_in_front_of_it_says():
    busy = replace(warm(), in_flight=1)
    waits = tried(State.UNKNOWN, pending=None, in_flight=1)

    assert apply(busy, failed(50, Trouble.LOADING)) == busy
    assert apply(waits, failed(50, Trouble.LOADING)).state is State.LOADING


def test_a_load_of_ours_goes_on_beside_what_the_server_says():
    ours_under_way = after(cold(), LoadStarted(2, GEMMA))
    unseen = unanswered()

    assert apply(ours_under_way, failed(50, Trouble.LOADING)) == ours_under_way
    after_it = apply(unseen, failed(50, Trouble.LOADING))
    assert unseen.pending is not None
    assert after_it.pending == replace(unseen.pending, alive_at=50)


def test_once_it_has_loaded_it_is_asked_again_and_not_before():
    blind = Tier.OPENAI
    state = box(failed(50, Trouble.LOADING), listed(51.9, entry("gemma"), tier=blind))
    early = state.plan(51.91)
    late = state.see(listed(52.1, entry("gemma"), tier=blind)).plan(52.11)

    assert early == []
    assert late == [Load(GEMMA)]


def test_what_is_listed_when_it_has_loaded_is_proved_at_once():
    state = box(failed(50, Trouble.LOADING), listed(51.9, entry("gemma", "gemma")))

    assert state.plan(51.91) == [SendPing(GEMMA, "gemma")]


def test_a_ping_that_hears_that_the_server_loads_is_no_failure():
    no = PingEnded(21, GEMMA, PingOutcome.ERROR, 0.1, "Loading model", Reason.LOADING)
    model = after(warm(), PingStarted(20, GEMMA), no)

    assert (model.state, model.failures, model.retry_at) == (State.LOADING, 0, None)
    assert model.reason == "the server says that it is loading: Loading model"


def test_a_load_that_hears_that_the_server_loads_is_no_failure_and_is_not_believed_in():
    no = load_ended(21, LoadOutcome.UNKNOWN, message="Loading model", why=Reason.LOADING)
    model = after(cold(), LoadStarted(20, GEMMA))
    model = apply(replace(model, blind=True), no)

    assert (model.state, model.failures, model.retry_at) == (State.LOADING, 0, None)
    assert model.pending == Pending(21, 23, alive_at=21, seen=True, ours=False)


@pytest.mark.parametrize("outcome", [LoadOutcome.UNKNOWN, LoadOutcome.FAILED])
def test_where_it_shows_what_is_loaded_a_load_that_hears_that_it_loads_may_be_that_load(outcome: LoadOutcome):
    no = load_ended(21, outcome, message="loading", why=Reason.LOADING)
    state = Box(after(cold(), LoadStarted(20, GEMMA), no))
    later = state.see(listed(24, entry("gemma")), listed(60, entry("gemma")))

    assert (later[GEMMA].state, later.plan(60.1)) == (State.LOADING, [])
    assert later.see(listed(70, entry("gemma", "gemma"))).plan(70.1) == [SendPing(GEMMA, "gemma")]


def test_what_a_load_will_need_is_kept_until_it_is_estimated_anew():
    need = Need(9_000_000_000, passes_guardrails=True)
    model = after(cold(), listed(2, replace(entry("gemma"), need=need)))

    assert model.need == need
    assert after(model, listed(3, entry("gemma"))).need == need
    assert after(model, listed(3, replace(entry("gemma"), need=Need(1)))).need == Need(1)


# --- copies of an earlier life, and what the socket shows of those that are there -------------------


def test_copies_of_an_earlier_life_are_ours_where_the_first_listing_shows_them_in_time():
    recalled = (frozenset({"gemma", "gemma:2"}), 50.0)
    before = replace(cold(), recalled=recalled, ours=frozenset({"gemma:3"}))
    there = entry("gemma", "gemma", "gemma:3", "gemma:4")

    in_time, late = after(before, listed(50, there)), after(before, listed(50.1, there))
    gone = after(before, listed(40))

    assert (in_time.ours, in_time.recalled) == ({"gemma", "gemma:3"}, None)
    assert (late.ours, late.recalled) == ({"gemma:3"}, None)
    assert (gone.ours, gone.recalled) == (frozenset(), None)
    assert after(gone, listed(45, there)).ours == frozenset()


def copies(*busy: bool | None) -> Entry:
    return Entry("gemma", instances=tuple(Instance(f"gemma:{n}", busy=b) for n, b in enumerate(busy)))


def test_a_model_rests_while_all_its_copies_are_seen_to():
    resting = after(warm(), listed(20, copies(False, False), asked=19))

    assert resting.idle_since == 19
    assert after(resting, listed(30, copies(False, False))).idle_since == 19
    assert after(resting, listed(30, copies(False, None))).idle_since is None
    assert after(warm(), listed(20, copies(False, True))).idle_since is None


def test_what_was_read_is_forgotten_with_the_copy_that_read_it():
    priming = Priming(openings=("agent",), done=(Primed("agent", 13.0, 1.0),))
    model = replace(ours(), priming=priming)

    assert after(model, listed(20, entry("gemma", "gemma"))).priming.done == priming.done
    assert after(model, listed(20, entry("gemma", "gemma:2"))).priming.done == ()
    assert (
        after(replace(model, priming=Priming()), listed(20, entry("gemma", "gemma:2"))).priming == Priming()
    )


def test_when_it_was_last_used_is_told_by_lm_studios_own_clock_where_both_are_told():
    there = Entry("gemma", instances=(Instance("gemma", last_used=1000.0),))

    for clock, used_at in ((1004.0, 46.0), (990.0, 50.0), (None, 3)):
        assert after(warm(), listed(50, there, sight=Sight(Sdk.UP, clock=clock))).used_at == used_at
    assert after(warm(), listed(50, entry("gemma", "gemma"), sight=Sight(Sdk.UP, clock=1004.0))).used_at == 3


def test_what_works_for_somebody_is_warm_unless_it_has_crashed():
    works = listed(50, copies(True))

    for state in (State.UNKNOWN, State.COLD, State.LOADING):
        model = after(tried(state, crashed=False, pending=None), works)
        assert (model.state, model.ping_at) == (State.WARM, 350.0)
    assert after(tried(State.UNKNOWN, pending=None), works).state is State.UNKNOWN


def test_a_size_that_was_told_once_is_known_while_a_listing_tells_none():
    known = after(cold(), listed(2, entry("gemma", size=7)))

    assert after(known, listed(3, entry("gemma"))).size_bytes == 7
    assert after(known, listed(3, entry("gemma", size=9))).size_bytes == 9


def test_what_made_room_for_our_own_load_on_demand_says_so():
    model = after(replace(ours(), draining=True), listed(20, entry("gemma"), tier=Tier.V0))

    assert (model.state, model.reason, model.made_way) == (State.COLD, "it made room for another", 1)


@pytest.mark.parametrize(
    ("model", "then"), [(cold(), State.UNKNOWN), (warm(), State.WARM), (tried("backoff"), State.UNKNOWN)]
)
def test_of_a_model_whose_row_cannot_be_read_nothing_is_concluded_or_done(model: Model, then: State):
    odd = Odd("1 of 2 rows are left out", {"gemma": "its row cannot be read"})
    state = Box(model, cold(id=QWEN)).see(replace(listed(310, entry("qwen")), odd=odd))

    assert state[GEMMA].state is then
    assert state[GEMMA].reason in (None, odd.keys["gemma"])
    assert state.upstream.error == odd.why
    assert state.plan(310.1) == [Load(QWEN)]  # neither a load nor a ping of the other


@pytest.mark.parametrize(
    "loading",
    [{}, {"load_started": 18.0, "state": State.LOADING}, {"pending": PENDING, "state": State.LOADING}],
    ids=["it was there alone", "ours is being loaded", "a load of ours was not seen to end"],
)
def test_once_nothing_is_there_nothing_is_known_of_whose_the_next_copy_is(loading: dict[str, object]):
    one = frozenset({"gemma"})
    before = replace(warm(), told=one, lost=one, vouched=one, disowned=one, told_at=19.0, **loading)
    gone = after(before, listed(20, entry("gemma")))

    assert (gone.told, gone.lost, gone.vouched, gone.disowned) == (frozenset(),) * 4
    assert after(replace(before, told_at=30.0), listed(31, entry("gemma"), asked=30.0)).told == one


def test_what_whoever_acts_left_out_is_not_ours_once_and_may_be_again():
    one = frozenset({"gemma"})
    model = after(replace(ours(), disowned=one), listed(20, entry("gemma", "gemma")))

    assert (model.ours, model.disowned) == (frozenset(), frozenset())


@pytest.mark.parametrize(
    ("begun", "there", "doubled_at"),
    [
        ({"load_started": 30.0}, ["gemma"], 50),
        ({"pending": replace(PENDING, loaded=True)}, ["gemma"], 50),
        ({"pending": replace(PENDING, loaded=True), "ours": frozenset({"gemma"})}, ["gemma"], None),
        ({"pending": replace(PENDING, loaded=True), "ours": frozenset({"gemma"})}, ["gemma", "gemma:2"], 50),
        ({"pending": PENDING}, ["gemma"], None),
        ({}, ["gemma"], None),
        ({"load_started": 30.0, "instances": (Instance("gemma"),)}, ["gemma"], None),
    ],
)
def test_a_copy_of_somebody_elses_that_comes_while_ours_is_being_loaded_is_told(
    begun: dict[str, object], there: list[str], doubled_at: float | None
):
    model = a_model(**{"state": State.LOADING, **begun})

    assert after(model, listed(50, entry("gemma", *there))).doubled_at == doubled_at


@pytest.mark.parametrize(
    ("crashed", "ours", "then"),
    [
        (False, True, State.WARM),
        (True, False, State.WARM),
        (True, True, State.BACKOFF),
    ],
)
def test_what_is_not_to_be_pinged_is_warm_by_being_listed_unless_it_is_ours_and_has_crashed(
    crashed: bool, ours: bool, then: State
):
    mine = frozenset({"gemma"}) if ours else frozenset()
    policy = replace(POLICY, pinged=False)
    model = tried(State.BACKOFF, pending=None, policy=policy, crashed=crashed, ours=mine)

    assert after(model, listed(50, entry("gemma", "gemma"))).state is then


def test_only_what_was_asked_after_the_doubt_arose_whether_it_is_there_tells():
    doubted = replace(warm(), unsure_since=50.0)

    for asked, unsure_since in ((49.9, 50.0), (50.0, 50.0), (50.1, None)):
        assert after(doubted, listed(51, entry("gemma", "gemma"), asked=asked)).unsure_since == unsure_since
    assert after(warm(), listed(51, entry("gemma", "gemma"))).unsure_since is None
