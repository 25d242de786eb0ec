"""What a listing says: found, missing, being loaded, too old to count, or none at all."""

from dataclasses import replace

import pytest

from keepalive.core.actions import Load, SendPing
from keepalive.core.apply import apply
from keepalive.core.facts import ClockJumped, LoadOutcome, LoadRemembered, LoadStarted, ModelId, Tier, Trouble
from keepalive.core.states import State
from tests.kit.models import (
    GEMMA,
    QWEN,
    Box,
    a_model,
    after,
    box,
    cold,
    entry,
    every_model,
    failed,
    found,
    listed,
    load_ended,
    ours,
    refused,
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


def test_a_refused_connection_ends_what_that_program_was_loading():
    state = Box(unanswered()).see(refused(20), listed(40, entry("gemma")))

    assert state.plan(40.1) == [Load(GEMMA)]


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
    waiting = state.see(listed(900, entry("gemma"), tier=blind)).plan(900.1)
    state.see(listed(948, entry("gemma"), tier=blind))

    assert waiting == []
    assert state.plan(948.1) == [Load(GEMMA)]


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
